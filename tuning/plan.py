"""What a search is to do, from a recipe and a space, with all mistakes in one message before anything starts."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from cluster.grammar import ConfigError, overlay, parse
from cluster.part import Part
from tuning import objectives
from tuning import space as spaces
from tuning.options import SearchConfig
from tuning.space import Space
from tuning.timing import Timing, timing

FIXED = ("name", "seed", "storage", "tracking", "resources")
"""Settings that a space cannot search: they are the search's own, or change nothing that is learnt."""
FEW = 24
"""Trials that are drawn unless told otherwise."""
CACHED = ("data", "views")
"""What data and caches are made for: one value, or a few."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A search that may begin."""

    name: str
    recipe: str
    """The recipe's name."""
    storage: str
    space: Space
    options: SearchConfig
    tree: Mapping[str, Any]
    """The recipe with all that is the same in every trial."""
    trials: int
    timing: Timing

    @property
    def folder(self) -> Path:
        """Where the search keeps what it found."""
        return Path(self.storage) / f"{self.name}_search"

    def recipe_of(self, run: str, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe of one run."""
        return overlay(self.tree, {"name": run, "seed": seed} | dict(changes))

    def early(self, changes: Mapping[str, Any]) -> str:
        """What decides a trial's steps before the gate, as text. Of a late key that is whether it is there at all: a
        weight of 0 or null may leave modules out."""
        kept = {k: v if k not in self.timing.late or v in (0, None) else "late" for k, v in changes.items()}
        return json.dumps(kept, sort_keys=True)

    def plain_recipe(self, run: str, seed: int) -> dict[str, Any]:
        """The recipe of the student without a teacher; where nothing is distilled, the recipe itself."""
        alone = {"distill": {}, "teachers": []} if self.tree.get("distill") else {}
        return overlay(self.tree, {"name": run, "seed": seed} | alone)


def make_plan(settings: Any, recipe: Path, space_file: Path, given: Mapping[str, Any]) -> Plan:
    """Everything checked. ConfigError with all mistakes in one message.

    `settings`: the module `cluster.config`, or a part of it; `given`: what the command line lays over: the recipe's
    settings, `search.KEY` for how to search and `space.KEY` for a distribution instead of the file's.
    """
    overrides, asked, replaced = _split(given)
    space, wrong = spaces.load(space_file, replaced)
    options = SearchConfig()
    try:
        options = settings.check_settings(SearchConfig, {**space.search, **asked}, "search")
    except ConfigError as error:
        wrong += [f"search.{line}" for line in error.mistakes]
    tree: dict[str, Any] = {}
    try:
        tree = space.laid_over(parse(recipe.read_text(), str(recipe)), overrides)
    except ConfigError as error:
        wrong.append(str(error))
    configs, refused = _checked(settings, space, options, tree) if tree and space.keys else ([], [])
    wrong += refused
    plan = None
    if configs:
        build = settings.beside("cluster.build") if isinstance(settings, Part) else import_module("cluster.build")
        wrong += objectives.mistakes(configs[0], options.wanted, build.split_folder(configs[0], "val"))
        plan, more = _planned(configs, space, options, tree)
        wrong += more
    if wrong or plan is None:
        told = list(dict.fromkeys(wrong))
        raise ConfigError("\n  ".join([f"{space_file} over {recipe}: {len(told)} mistake(s)", *told]))
    return plan


def _split(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings of the recipe, of the search, and distributions."""
    parts: dict[str, dict[str, Any]] = {"": {}, "search": {}, "space": {}}
    for key, value in given.items():
        section, _, rest = key.partition(".")
        if section in ("search", "space"):
            parts[section][rest] = value
        else:
            parts[""][key] = value
    return parts[""], parts["search"], parts["space"]


def _checked(
    settings: Any, space: Space, options: SearchConfig, tree: Mapping[str, Any]
) -> tuple[list[Any], list[str]]:
    """A RunConfig for every draw that stands for others; and what is wrong with the space's keys and values."""
    wrong = [line for key in space.keys for line in _about_key(key, tree)]
    draws = space.probes()
    if options.searcher == "grid":
        try:
            draws = space.grid()
        except ConfigError as error:
            wrong += error.mistakes
    configs: list[Any] = []
    for draw in draws:
        config, lines = _tried(settings, overlay(tree, space.changes(draw)))
        configs += [] if config is None else [config]
        wrong += lines
    if wrong:
        # A mistake in one key hides others: each key alone. What the space fills in is then missing, and no mistake.
        filled = tuple(f"{key.name}: the recipe leaves this" for key in space.keys)
        for draw in (draw for key in space.keys for draw in space.alone(key)):
            lines = _tried(settings, overlay(tree, space.changes(draw)))[1]
            wrong += [line for line in lines if not line.startswith(filled)]
    return configs, wrong


def _tried(settings: Any, tree: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The tree's RunConfig, or None and what is wrong with it."""
    try:
        config = settings.check(tree, "draw")
        _require_levels(config)
    except ConfigError as error:
        return None, list(error.mistakes or [str(error)])
    except ValueError as error:
        return None, [f"distill.{error}"]
    return config, []


def _about_key(key: spaces.Key, tree: Mapping[str, Any]) -> Iterator[str]:
    first, *rest = key.name.split(".")
    if first in FIXED:
        yield f"{key.name}: is not searched: {', '.join(FIXED)} are the search's own, or change nothing that is learnt"
    if first in CACHED and "choice" not in key.words:
        yield f"{key.name}: each value needs data and caches of its own; take a choice of a few"
    methods = tree.get("distill") or {}
    if first == "distill" and rest and isinstance(methods, Mapping) and rest[0] not in methods:
        yield (
            f"{key.name}: the recipe does not distil with {rest[0]!r} (its methods: {', '.join(methods) or 'none'}); "
            f"add distill.{rest[0]}={{}}, or methods: [{rest[0]}] to the space"
        )


def _require_levels(config: Any) -> None:
    """ValueError where a method starts at a level that the detector lacks."""
    hmkd = config.distill.get("hmkd")
    if hmkd is not None:
        hmkd.levels(tuple(2**level for level in config.student.levels))


def _planned(
    configs: list[Any], space: Space, options: SearchConfig, tree: Mapping[str, Any]
) -> tuple[Plan | None, list[str]]:
    """The plan of checked draws; and why its trials cannot be timed as asked."""
    try:
        trials = _trials(space, options)
    except ConfigError as error:
        return None, list(error.mistakes)
    base = configs[0]
    timed, wrong = timing(configs, space, options, trials)
    plan = Plan(
        name=options.name or f"{base.name}_{space.name}",
        recipe=base.name,
        storage=base.storage,
        space=space,
        options=options,
        tree=tree,
        trials=trials,
        timing=timed,
    )
    return plan, wrong


def _trials(space: Space, options: SearchConfig) -> int:
    """How many are run: as many as there are points, or fewer where `trials` says so; ConfigError for no grid."""
    if options.searcher == "grid":
        points = len(space.grid())
    elif options.searcher == "population":
        points = options.members * options.generations
    else:
        return options.trials or FEW
    return min(options.trials or points, points)
