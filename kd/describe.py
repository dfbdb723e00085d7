"""The methods' reference, made of their own files: docstrings, settings, defaults. `make docs` writes docs/methods.md.

python -m kd.describe docs/methods.md
"""

import ast
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kd.methods import base
from kd.methods.base import MethodConfig
from kd.plugins import plugins

HEAD = """\
# Methods

Made by `make docs` from the files in `kd/methods/`: change a docstring or a setting there and run it again.

A method is switched on by its name under a recipe's `distill`, with the settings below; several go together.
`reads` is what it wants of the teacher, and so what a cache stores; `sparse`: positions inside boxes are all that it
reads; `head`: it asks what the teacher's head says, which then stays loaded; an assistant learns beside the student,
with an optimizer of its own.
"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One line of a table of settings."""

    name: str
    type: str
    default: str
    meaning: str


def text() -> str:
    """The whole of docs/methods.md."""
    methods = plugins("kd.methods")
    parts = [HEAD, *_overview(methods), "\n## Settings that every method has\n", *_table(_settings(MethodConfig))]
    for name, module in methods.items():
        parts += [f"\n## {name}\n", _prose(module), ""]
        own = list(_changed(module.Config))
        parts += _table(own) if own else ["No settings of its own."]
    return "\n".join(parts) + "\n"


def _overview(methods: dict[str, ModuleType]) -> list[str]:
    rows = ["| method | source | reads | sparse | head | assistant |", "|---|---|---|---|---|---|"]
    for name, module in methods.items():
        loss = module.Loss
        asks = {True: "yes", False: ""}.get(loss.needs_head, "by its settings")  # a property: only an object knows
        flags = ("yes" if module.Config().sparse_suffices else "", asks, "yes" if hasattr(module, "Assistant") else "")
        cells = (f"[{name}](#{name})", _cell(_source(module)), ", ".join(sorted(loss.reads)) or "nothing", *flags)
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _source(module: ModuleType) -> str:
    """What the docstring's first sentence names in brackets: authors, venue, arXiv."""
    found = re.search(r"\(([^()]*(?:\([^()]*\)[^()]*)*)\)", _prose(module))
    return " ".join(found.group(1).split()) if found else ""


def _prose(module: ModuleType) -> str:
    return inspect.cleandoc(module.__doc__ or "")


def _table(settings: list[Setting]) -> list[str]:
    rows = ["| setting | default | type | meaning |", "|---|---|---|---|"]
    return rows + [f"| `{s.name}` | `{_cell(s.default)}` | {_cell(s.type)} | {_cell(s.meaning)} |" for s in settings]


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|")


def _changed(config: type) -> Iterator[Setting]:
    """The settings of a method that not every method has, and those that have another default here."""
    shared = {s.name: s for s in _settings(MethodConfig)}
    for setting in _settings(config):
        common = shared.get(setting.name)
        if common is None or common.default != setting.default or common.meaning != setting.meaning:
            yield setting


def _settings(config: type) -> list[Setting]:
    """Every setting of a settings dataclass; those of a dataclass inside it by their dotted names."""
    meanings, types = _documented(config)
    found: list[Setting] = []
    for field in fields(config):
        value = _default(field)
        if is_dataclass(value):
            inner = type(value)
            prefix = meanings.get(field.name, "") or inspect.cleandoc(inner.__doc__ or "")
            found.append(Setting(name=field.name, type="section", default="{}", meaning=prefix))
            found += [
                Setting(
                    name=f"{field.name}.{s.name}",
                    type=s.type,
                    default=_told(getattr(value, s.name, s.default)),
                    meaning=s.meaning,
                )
                for s in _settings(inner)
            ]
            continue
        default = "required" if value is MISSING else _told(value)
        found.append(
            Setting(name=field.name, type=types[field.name], default=default, meaning=meanings.get(field.name, ""))
        )
    return found


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _told(value: Any) -> str:
    """A default as a recipe writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_told, value))}]"
    return json.dumps(value, default=str)


def _documented(config: type) -> tuple[dict[str, str], dict[str, str]]:
    """What the source says of each setting: the text below it, and its type; a class's own words before its bases'."""
    meanings: dict[str, str] = {}
    types: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not is_dataclass(cls):
            continue
        module = inspect.getmodule(cls)
        tree = ast.parse(inspect.getsource(module or base))
        (body,) = [n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls.__name__]
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                name = statement.target.id
                types[name] = _type(statement.annotation, module)
                said = following.value if isinstance(following, ast.Expr) else None
                if isinstance(said, ast.Constant) and isinstance(said.value, str):
                    meanings[name] = said.value
    return meanings, types


def _type(annotation: ast.expr, module: ModuleType | None) -> str:
    """The annotation's text; a Literal, also one with a name of its own, as its values."""
    named = getattr(module, annotation.id, None) if isinstance(annotation, ast.Name) else None
    if typing.get_origin(named) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(named))
    words = ast.unparse(annotation)
    literal = re.sub(r"Literal\[([^\]]*)\]", lambda found: found.group(1).replace("'", "").replace(", ", " | "), words)
    while (listed := re.sub(r"tuple\[([^\[\],]*), \.\.\.\]", r"list of \1", literal)) != literal:
        literal = listed
    return literal.replace("None", "null")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text())
    else:
        sys.stdout.write(text())
