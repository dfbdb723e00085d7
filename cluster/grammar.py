"""The one grammar of settings: `dotted.key=value` in a recipe, on the command line, in a Tune trial, in MLflow.

A value is JSON where it is JSON (`2e-4`, `true`, `null`, `[800, 1333]`), else it is text; YAML files are read by the
same rule. A number in a key counts the entries of a list: `teachers.0.weights=runs/teacher/student`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

REQUIRED = "REQUIRED"
"""A recipe writes this where only the person who runs it knows the value."""


class ConfigError(ValueError):
    """A recipe that cannot be run, told in the words of the recipe."""

    mistakes: tuple[str, ...] = ()
    """Line by line, where there may be several."""


def to_value(text: str) -> Any:
    """Text as JSON where it is JSON, else as itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def to_text(value: Any) -> str:
    """The inverse of `to_value`; a string that looks like JSON gets quotes."""
    return value if isinstance(value, str) and to_value(value) == value else json.dumps(value)


def from_arguments(arguments: Iterable[str]) -> dict[str, Any]:
    """`["optim.lr=2e-4", "name=first"]` -> `{"optim.lr": 0.0002, "name": "first"}`."""
    flat: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"expected dotted.key=value, got {argument!r}; for example optim.lr=2e-4")
        if key in flat:
            raise ConfigError(f"{key} is set twice, to {to_text(flat[key])} and to {text}; keep one of them")
        flat[key] = _given(text, key)
    return flat


def _given(text: str, key: str) -> Any:
    """A setting as it is typed: lists and mappings may be written as in a recipe, `[c5, pyramid]`, not as JSON only."""
    value = to_value(text)
    if not isinstance(value, str) or not text.startswith(("[", "{")):
        return value
    try:
        return yaml.load(text, _RecipeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: begins as a list or a mapping and is none: {text!r} ({_first(error)})") from None


def _first(error: yaml.YAMLError) -> str:
    return str(error).splitlines()[0]


def overlay(tree: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Set dotted keys: `overlay({"optim": {"lr": 1}}, {"optim.lr": 2})` -> `{"optim": {"lr": 2}}`."""
    merged: Any = dict(tree)
    for key, value in flat.items():
        merged = _set(merged, key.split("."), value, key)
    return merged


def _set(node: Any, parts: list[str], value: Any, key: str) -> Any:
    """A copy of `node` in which the setting at `parts` is `value`."""
    if not parts:
        return value
    head, rest = parts[0], parts[1:]
    if isinstance(node, list) or (node in (None, {}) and head == "0"):
        entries = list(node or [])
        if not head.isdigit() or int(head) > len(entries):
            raise ConfigError(f"{key}: {head!r} is no entry of a list of {len(entries)}; counting starts at 0")
        old = entries[int(head)] if int(head) < len(entries) else None
        return [*entries[: int(head)], _set(old, rest, value, key), *entries[int(head) + 1 :]]
    if node is not None and not isinstance(node, Mapping):
        raise ConfigError(f"{key}: cannot set {head!r} below the plain value {to_text(node)}")
    return {**(node or {}), head: _set((node or {}).get(head), rest, value, key)}


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `overlay({}, ...)`: `{"optim": {"lr": 2}}` -> `{"optim.lr": 2}`. Empty trees stay as values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        named = isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value)
        below = {str(i): entry for i, entry in enumerate(value)} if named else value
        if isinstance(below, Mapping) and below:
            flat |= {f"{key}.{rest}": leaf for rest, leaf in flatten(below).items()}
        else:
            flat[key] = value
    return flat


def parse(text: str, source: str) -> dict[str, Any]:
    """A recipe's text as a tree. `source` names it in messages."""
    try:
        tree = yaml.load(text, _RecipeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not a readable recipe: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: a recipe is a list of `key: value` lines, got {type(tree).__name__}")
    return tree


def write(tree: Mapping[str, Any]) -> str:
    """A tree as the text of a recipe: the inverse of `parse`."""
    return yaml.dump(dict(tree), Dumper=_RecipeDumper, sort_keys=False, default_flow_style=None, width=120)


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def find(recipe: str | Path) -> Path:
    """The file of a recipe that is given as a path or by the name of a shipped one."""
    if Path(recipe).is_file():
        return Path(recipe)
    if str(recipe) in recipes():
        return recipes()[str(recipe)]
    raise ConfigError(
        f"no recipe file {str(recipe)!r}, and no shipped one of that name; shipped: {', '.join(recipes())}"
    )


class _RecipeLoader(yaml.SafeLoader):
    """YAML whose plain scalars follow `to_value` (YAML 1.1 itself reads 2e-4 as text and `no` as false)."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own spelling)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if not isinstance(node, yaml.ScalarNode) or node.style is not None:
            return node.value
        return to_value(node.value) if node.value else None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {', '.join(twice)} is set twice")
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


class _RecipeDumper(yaml.SafeDumper):
    """Writes text so that `_RecipeLoader` reads the same text back."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own spelling)


def _represent(dumper: yaml.SafeDumper, value: Any) -> yaml.ScalarNode:
    text = value if isinstance(value, str) else json.dumps(value)
    plain = not isinstance(value, str) or (text and to_value(text) == text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _construct_plain(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    return loader.construct_scalar(node)


_RecipeLoader.add_constructor("tag:yaml.org,2002:str", _construct_plain)
for _type in (str, int, float, bool, type(None)):
    _RecipeDumper.add_representer(_type, _represent)
