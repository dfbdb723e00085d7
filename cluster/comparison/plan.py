"""What a comparison trains: the plain student, a row per method, and what else the same effort could buy.

Rows are `distill` sections by name; all beside `distill` is the recipe's in every row, so that the budget is one.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.grammar import ConfigError, flatten, overlay, parse
from kd.plugins import plugin_names

Kind = Literal["plain", "method", "equal_time", "fresh", "double"]
PLAIN = "plain"
REFERENCES: dict[str, str] = {
    "equal_time": "plain_equal_time",
    "fresh": "plain_fresh_views",
    "double": "plain_2x_input",
}
"""Plain students beside the one on the same views, by kind: the names of their rows."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the command line asks for beside the recipe."""

    methods: tuple[str, ...] | None = None
    """Names of rows or methods; None: all rows of the file, or the recipe's own methods, each alone."""
    rows: Path | None = None
    """A file of rows."""
    seeds: int = 3
    references: tuple[str, ...] = tuple(REFERENCES)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table, trained once per seed."""

    name: str
    kind: Kind
    tree: Mapping[str, Any]
    """The recipe, but for name and seed, and for what is known only later (the steps of an equal time)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All rows, in the order in which each round trains them."""

    recipe: str
    """The recipe's name: runs are RECIPE_ROW_seedN, the comparison's own folder is RECIPE_comparison."""
    storage: str
    rows: tuple[Row, ...]
    seeds: int
    notes: tuple[str, ...] = ()
    """What was left out, and why."""

    @property
    def folder(self) -> Path:
        """Where the comparison keeps its rows, table and plot."""
        return Path(self.storage) / f"{self.recipe}_comparison"

    def rounds(self) -> Iterator[tuple[Row, int]]:
        """(row, seed), seed by seed: whenever it is stopped, the pairs are complete but for the last round."""
        return ((row, seed) for seed in range(self.seeds) for row in self.rows)

    def run(self, row: Row, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe of one run."""
        name = f"{self.recipe}_{row.name}_seed{seed}"
        return overlay(row.tree, {"name": name, "seed": seed} | dict(changes))


def shipped() -> dict[str, Path]:
    """The shipped files of rows, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parents[1] / "comparisons").glob("*.yaml"))}


def find_rows(given: str) -> Path:
    """The file of rows that is given as a path or by the name of a shipped one."""
    if Path(given).is_file():
        return Path(given)
    if given in shipped():
        return shipped()[given]
    raise ConfigError(f"no file of rows {given!r}, and no shipped one of that name; shipped: {', '.join(shipped())}")


def make_plan(settings: Any, base: Any, wanted: Wanted) -> Plan:
    """Every row, checked; ConfigError with all mistakes in one message.

    `settings`: the module `cluster.config`, or a part of it; `base`: the recipe as its RunConfig.
    """
    tree: dict[str, Any] = settings.to_tree(base)
    plain = tree | {"distill": {}, "teachers": []}
    sections, wrong = _sections(tree["distill"], wanted)
    rows = [Row(name=PLAIN, kind="plain", tree=plain)]
    rows += [Row(name=name, kind="method", tree=tree | {"distill": one}) for name, one in sections.items()]
    more, notes = _references(plain, wanted.references)
    rows += more
    for row in rows:
        try:
            settings.check(row.tree, f"row {row.name}")
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return Plan(recipe=base.name, storage=base.storage, rows=tuple(rows), seeds=wanted.seeds, notes=tuple(notes))


def _sections(own: Mapping[str, Any], wanted: Wanted) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The `distill` section of every row that is asked for, by name; and what is wrong with the names."""
    named, wrong = _read(wanted.rows) if wanted.rows is not None else ({}, [])
    methods = plugin_names("kd.methods")
    found: dict[str, dict[str, Any]] = {}
    for name in wanted.methods or list(named) or list(own):
        if name in named:
            found[name] = {method: _laid_over(own, method, given) for method, given in named[name].items()}
        elif name in methods:
            found[name] = {name: own.get(name) or {}}
        else:
            known = [*named, *(method for method in methods if method not in named)]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            wrong.append(f"--methods: no row and no method {name!r}{hint} (known: {', '.join(known)})")
    if not found and not wrong:
        wrong.append("nothing to compare: name methods with --methods fitnet,pkd or a file with --rows")
    return found, wrong


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The rows of a file: name -> method -> settings; and what is wrong with it."""
    named: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    for name, section in parse(path.read_text(), str(path)).items():
        if name == PLAIN or name in REFERENCES.values() or not _NAME.fullmatch(name):
            wrong.append(f"{path}: {name!r} cannot name a row: letters, digits, _ - . only, and none of the plain rows")
        elif not isinstance(section, Mapping) or not section:
            wrong.append(f"{path}: row {name} is `method: settings`, as under a recipe's distill, got {section!r}")
        else:
            named[name] = dict(section)
    return named, wrong


def _laid_over(own: Mapping[str, Any], method: str, given: Any) -> Any:
    """A row's settings of a method over the recipe's own; what is no mapping is left for the check to tell of."""
    if given is not None and not isinstance(given, Mapping):
        return given
    return overlay(own.get(method) or {}, flatten(given or {}))


def _references(plain: Mapping[str, Any], kinds: tuple[str, ...]) -> tuple[list[Row], list[str]]:
    """The further plain students, and why one was left out."""
    rows: list[Row] = []
    notes: list[str] = []
    for kind, name in REFERENCES.items():
        if kind not in kinds:
            continue
        if kind == "fresh" and not _chance(plain["views"]):
            notes.append(f"{name} is left out: nothing in the recipe's views is drawn, so fresh ones are the same")
        elif kind == "double" and not _sizes(plain):
            notes.append(f"{name} is left out: where short_side is null there is no size to double")
        else:
            tree = overlay(plain, _doubled(plain)) if kind == "double" else plain
            rows.append(Row(name=name, kind=kind, tree=tree))  # pyright: ignore[reportArgumentType]
    return rows, notes


def _chance(views: Mapping[str, Any]) -> bool:
    """Whether two views of an image can differ, other than by its tiles."""
    low, high = views["scale"]
    sizes = views["short_side"] or []
    return views["crop"] is not None or 0 < views["flip"] < 1 or len(sizes) > 1 or low != high


def _sizes(plain: Mapping[str, Any]) -> bool:
    evaluated = plain["evaluation"]["views"]
    return plain["views"]["short_side"] is not None and (evaluated is None or evaluated["short_side"] is not None)


def _doubled(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Training and evaluation at twice the pixels: crops and tiles, which count the source's pixels, stay."""

    def twice(value: Any) -> Any:
        return [twice(v) for v in value] if isinstance(value, list) else 2 * value

    where = {"views": plain["views"], "evaluation.views": plain["evaluation"]["views"]}
    names = ("short_side", "long_side", "buckets")
    return {f"{key}.{name}": twice(views[name]) for key, views in where.items() if views for name in names}
