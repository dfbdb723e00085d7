"""A space: dotted keys and what they are drawn from, with how to search it; a YAML file.

    methods: [mkd]                          # the run distils with these alone, with the recipe's settings of them
    settings: {evaluation.every: 100}       # dotted settings laid over the recipe; what the command line says wins
    keys:
      distill.mkd.weight: {loguniform: [0.1, 10.0]}
      distill.mkd.generator: {choice: [true, false]}
      distill.mkd.zeta: {uniform: [0.2, 0.8], when: {distill.mkd.generator: true}}
    search: {trials: 24}

A key with `when` is drawn only where the keys before it that it names have that value, or one of a list of values.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from cluster.grammar import ConfigError, overlay, parse
from tuning.distributions import Distribution, read

SECTIONS: dict[str, type] = {"methods": list, "settings": Mapping, "keys": Mapping, "search": Mapping}
MOST_POINTS = 10_000


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a space."""

    name: str
    """Dotted, as in the recipe."""
    distribution: Distribution
    words: Mapping[str, Any]
    """As the file says it."""
    when: Mapping[str, tuple[Any, ...]]
    """Earlier key -> the values with which this one is drawn."""

    def applies(self, settings: Mapping[str, Any]) -> bool:
        """Whether it is drawn beside these."""
        return all(key in settings and settings[key] in values for key, values in self.when.items())


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched."""

    name: str
    keys: tuple[Key, ...]
    """In the order in which they are drawn."""
    methods: tuple[str, ...] = ()
    """The run's methods; none: the recipe's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted settings of the recipe, below those of the command line."""
    search: Mapping[str, Any] = field(default_factory=dict)
    """Of `tuning.options.SearchConfig`."""

    def laid_over(self, recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's tree with what is the same in all trials."""
        own = recipe.get("distill") or {}
        methods = {"distill": {name: own.get(name) or {} for name in self.methods}} if self.methods else {}
        return overlay({**recipe, **methods}, {**self.settings, **overrides})

    def changes(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The dotted settings of the recipe that a draw means."""
        laid: dict[str, Any] = {}
        for key in self.keys:
            if key.name in settings:
                laid |= key.distribution.changes(key.name, settings[key.name])
        return laid

    def grid(self) -> list[dict[str, Any]]:
        """All points of the grid, the last key changing fastest. ConfigError where a key has no grid."""
        wrong: list[str] = []
        values: list[list[Any]] = []
        for key in self.keys:
            try:
                values.append(key.distribution.grid())
            except ValueError as error:
                wrong.append(f"{key.name}: {error}")
        count = 1
        for some in values:
            count *= len(some)
        if count > MOST_POINTS:
            wrong.append(f"the grid has {count} points, at most {MOST_POINTS} are searched; take tpe or random")
        if wrong:
            error = ConfigError("\n".join(wrong))
            error.mistakes = tuple(wrong)
            raise error
        drawn = (self.applying(dict(zip((k.name for k in self.keys), v, strict=True))) for v in product(*values))
        found: list[dict[str, Any]] = []
        for one in drawn:
            if one not in found:
                found.append(one)
        return found

    def applying(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the settings whose conditions hold."""
        kept: dict[str, Any] = {}
        for key in self.keys:
            if key.name in settings and key.applies(kept):
                kept[key.name] = settings[key.name]
        return kept

    def probes(self) -> list[dict[str, Any]]:
        """Draws that together hold each key's ends or values, each beside the first value of the others that lets it
        apply: a recipe that accepts all of them accepts every key's values alone."""
        found: list[dict[str, Any]] = []
        for key in self.keys:
            for value in key.distribution.probes():
                beside = self._first() | {name: values[0] for name, values in self._needed(key).items()}
                draw = self.applying(beside | {key.name: value})
                if draw not in found:
                    found.append(draw)
        return found

    def alone(self, key: Key) -> list[dict[str, Any]]:
        """A draw for each of the key's ends or values, beside nothing but what its conditions need."""
        needed = {name: values[0] for name, values in self._needed(key).items()}
        return [self.applying(needed | {key.name: value}) for value in key.distribution.probes()]

    def _first(self) -> dict[str, Any]:
        return {key.name: key.distribution.probes()[0] for key in self.keys}

    def _needed(self, key: Key) -> dict[str, tuple[Any, ...]]:
        """The conditions of a key, and of the keys that these name."""
        by_name = {one.name: one for one in self.keys}
        needed: dict[str, tuple[Any, ...]] = {}
        for name, values in key.when.items():
            needed |= self._needed(by_name[name]) | {name: values}
        return needed


def shipped() -> dict[str, Path]:
    """The shipped spaces by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "spaces").glob("*.yaml"))}


def find(space: str | Path) -> Path:
    """The file of a space that is given as a path or by the name of a shipped one."""
    if Path(space).is_file():
        return Path(space)
    if str(space) in shipped():
        return shipped()[str(space)]
    close = difflib.get_close_matches(str(space), shipped(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"no file of a space {str(space)!r}, and no shipped one of that name{hint}; shipped: {', '.join(shipped())}"
    )


def load(path: Path, replaced: Mapping[str, Any]) -> tuple[Space, list[str]]:
    """The space of a file, and what is wrong with it. `replaced`: key -> distribution instead of the file's; null
    leaves the key out."""
    tree = parse(path.read_text(), str(path))
    wrong = [f"{path}: {line}" for line in _sections(tree)]
    if wrong:
        return Space(name=path.stem, keys=()), wrong
    named = {name: words for name, words in {**(tree.get("keys") or {}), **replaced}.items() if words is not None}
    if not named:
        wrong.append(f"{path}: no keys to search; add keys: {{dotted.key: {{uniform: [0, 1]}}}}")
    keys: list[Key] = []
    for name, words in named.items():
        try:
            keys.append(_key(str(name), words, keys))
        except ConfigError as error:
            wrong.append(f"{name}: {error}{_how(str(name)) if 'leaves this to you' in str(error) else ''}")
    space = Space(
        name=path.stem,
        keys=tuple(keys),
        methods=tuple(tree.get("methods") or ()),
        settings=tree.get("settings") or {},
        search=tree.get("search") or {},
    )
    return space, wrong


def _sections(tree: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, value in tree.items():
        if name not in SECTIONS:
            close = difflib.get_close_matches(str(name), SECTIONS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            lines.append(f"{name}: no such section{hint} (known: {', '.join(SECTIONS)})")
        elif value is not None and not isinstance(value, SECTIONS[name]):
            expected = "a list" if SECTIONS[name] is list else "`key: value` lines"
            lines.append(f"{name}: expected {expected}, got {value!r}")
    return lines


def _how(name: str) -> str:
    return f"; add space.{name}='{{\"choice\": [...]}}'"


def _key(name: str, words: Any, before: Sequence[Key]) -> Key:
    distribution = read(words)
    given = words.get("when") or {}
    known = {key.name: key for key in before}
    if not isinstance(given, Mapping):
        raise ConfigError(f"when takes {{key: value}} or {{key: [values]}}, got {given!r}")
    when: dict[str, tuple[Any, ...]] = {}
    for other, values in given.items():
        if other not in known:
            close = difflib.get_close_matches(str(other), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"when names {other!r}, which is no key before this one{hint}")
        when[other] = tuple(values) if isinstance(values, list) else (values,)
        possible = getattr(known[other].distribution, "values", None)
        if possible is not None and (unknown := [v for v in when[other] if v not in possible]):
            raise ConfigError(f"when {other} is {unknown[0]!r}: it never is; its values are {list(possible)}")
    return Key(name=name, distribution=distribution, words=words, when=when)
