"""What is wrong with a recipe, in the recipe's own words."""

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from typing_extensions import is_typeddict

from cluster.grammar import REQUIRED, flatten

if TYPE_CHECKING:
    from cluster.config import RunConfig


def told(error: ValidationError, root: type, tree: Mapping[str, Any]) -> list[str]:
    """One line per mistake that pydantic found, and per setting left open. `root` is the dataclass of the tree."""
    lines = dict(zip(_open_keys(tree), left_open(tree), strict=True))
    for one in error.errors():
        where, node = _walk(root, one["loc"])
        known = sorted(_settings(_walk(root, one["loc"][:-1])[1]))
        lines.setdefault(".".join(where), _line(where, node, known, one))
    return list(lines.values())


def left_open(tree: Mapping[str, Any]) -> list[str]:
    """One line per setting that the recipe leaves to the person who runs it."""
    return [f"{key}: the recipe leaves this to you: add {key}=..." for key in _open_keys(tree)]


def contradictions(config: "RunConfig") -> list[str]:
    """One line per pair of settings that are fine alone and wrong together."""
    optim, resources = config.optim, config.resources
    lines: list[str] = []
    if not config.name or set(config.name) & set("/\\") or config.name.startswith("."):
        lines.append(f"name: becomes a folder's name, so it has no slash and no leading dot, got {config.name!r}")
    if config.seed < 0:
        lines.append(f"seed: must be >= 0, got {config.seed}")
    if optim.batch < resources.most_workers * optim.accumulate:
        lines.append(
            f"optim.batch: {optim.batch} images cannot be shared by resources.workers={resources.most_workers} "
            f"x optim.accumulate={optim.accumulate}; take at least {resources.most_workers * optim.accumulate}"
        )
    if optim.batch % config.order.lanes:
        lines.append(f"order.lanes: {config.order.lanes} lanes must divide optim.batch={optim.batch}")
    if optim.warmup >= optim.steps:
        lines.append(f"optim.warmup: {optim.warmup} steps do not fit into optim.steps={optim.steps}")
    if optim.ema is not None and resources.zero == 3:
        lines.append(
            "optim.ema: cannot be kept at resources.zero=3, where no worker has the whole weights; "
            "set resources.zero=2 or optim.ema=null"
        )
    if resources.offload and resources.zero == 0:
        lines.append(
            "resources.offload: at resources.zero=0 the optimizer steps on the weights themselves, where they are; "
            "set resources.zero=1, 2 or 3, or resources.offload=false"
        )
    return lines + _about_teachers(config)


def _about_teachers(config: "RunConfig") -> list[str]:
    lines: list[str] = []
    if config.taught and not config.teachers:
        methods = ", ".join(name for name, settings in config.distill.items() if settings.taught)
        lines.append(f"distill: {methods} needs a teacher; add teachers.0.weights=... or set distill={{}}")
    names = [teacher.name for teacher in config.teachers]
    twice = [name for name, count in Counter(names).items() if count > 1]
    lines += [f"teachers: more than one is named {name!r}; give each its own name" for name in twice]
    lines += [
        f"teachers.{i}.name: becomes a part of file and metric names: letters, digits, - and _ only, got {name!r}"
        for i, name in enumerate(names)
        if not name or not name.replace("-", "").replace("_", "").isalnum()
    ]
    lines += [line for i, t in enumerate(config.teachers) if t.shard for line in _about_sharding(config, i)]
    return lines + [line for i in range(len(names)) for line in _about_codecs(config, i)]


NOT_YET = "does not work yet: with DeepSpeed 0.19 two workers wait for each other for ever when they gather a teacher"


def _about_sharding(config: "RunConfig", number: int) -> list[str]:
    """A teacher in shards: not yet, and why; or that nobody runs, or that one worker holds anyway."""
    key = f"teachers.{number}.shard"
    lines = [f"{key}: {NOT_YET}; leave it false"]
    if config.teachers[number].cache:
        lines.append(
            f"{key}: a cached teacher is not run in the steps, so there is nothing to share out; "
            f"set {key}=false, or teachers.{number}.cache=false for a live one"
        )
    if config.resources.least_workers == 1:
        lines.append(
            f"{key}: one worker holds the whole teacher however it is cut; set resources.workers to 2 or more, "
            f"or {key}=false and teachers.{number}.cache=true, which needs it only until the cache is filled"
        )
    return lines


def _about_codecs(config: "RunConfig", number: int) -> list[str]:
    """A cache of foreground alone, and a method that reads elsewhere."""
    teacher = config.teachers[number]
    everywhere = {name: s for name, s in config.distill.items() if s.taught and not s.sparse_suffices}
    if not teacher.cache or not everywhere:
        return []
    named = {"codec": teacher.codec} | {f"tap_codecs.{tap}": codec for tap, codec in teacher.tap_codecs.items()}
    masked = [f"distill.{name}.foreground=true" for name, s in everywhere.items() if hasattr(s, "foreground")]
    return [
        f"teachers.{number}.{key}: {codec} stores only what lies inside boxes, and {' and '.join(everywhere)} "
        f"{'reads' if len(everywhere) == 1 else 'read'} the whole map; set "
        f"{' or '.join([f'teachers.{number}.{key}=int8', *(masked if len(masked) == len(everywhere) else [])])}"
        for key, codec in named.items()
        if codec.startswith("sparse")
    ]


def _open_keys(tree: Mapping[str, Any]) -> list[str]:
    return [key for key, value in flatten(tree).items() if value == REQUIRED]


def _walk(node: Any, location: tuple[Any, ...]) -> tuple[list[str], Any]:
    """The dotted key of a pydantic location, and the type found there. A union's tag is no part of the key."""
    words: list[str] = []
    for part in location:
        node = _bare(node)
        members = _named(node)
        if part in members:
            node = members[part]
            continue
        words.append(str(part))
        node = get_args(node)[0] if isinstance(part, int) and get_args(node) else _settings(node).get(str(part))
    return words, _bare(node)


def _line(where: list[str], node: Any, known: list[str], error: Any) -> str:
    key, kind, given = ".".join(where), error["type"], error["input"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: no such setting{_hint(where[-1], known)}"
    if kind == "union_tag_invalid":
        return f"{key}.name: no such plug-in{_hint(error['ctx']['tag'], sorted(_named(node)))}"
    if kind == "union_tag_not_found":
        return f"{key}.name: required; one of {', '.join(sorted(_named(node)))}"
    if kind == "missing" or given is None:
        return f"{key}: required; add {key}=..."
    said = error["msg"].removeprefix("Value error, ").removeprefix(f"{key}: ")
    return f"{key}: {said}" if isinstance(given, Mapping) else f"{key}: {said} (got {given!r})"


def _hint(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    suggestion = f"; did you mean {close[0]!r}?" if close else ""
    return f"{suggestion} (known here: {', '.join(known)})"


def _bare(node: Any) -> Any:
    """The type without `Annotated` and without `| None`."""
    if get_origin(node) is Annotated:
        return _bare(get_args(node)[0])
    others = [member for member in get_args(node) if member is not NoneType]
    return _bare(others[0]) if NoneType in get_args(node) and len(others) == 1 else node


def _named(node: Any) -> dict[str, Any]:
    """The members of a union of plug-ins' settings, by plug-in."""
    members = [member for member in get_args(node) if is_dataclass(member)]
    return {member.name: member for member in members if hasattr(member, "name")}  # pyright: ignore


def _settings(node: Any) -> dict[str, Any]:
    """The names that may follow `node` in a dotted key, with their types."""
    hints = get_type_hints(node, include_extras=True) if is_dataclass(node) or is_typeddict(node) else {}
    return {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}
