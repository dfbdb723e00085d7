"""What a search is to do, from a recipe and a space, with all mistakes in one message before anything starts."""

import json
import math
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

FIXED = ("name", "seed", "storage", "tracking", "resources")
"""Settings that a space cannot search: they are the search's own, or change nothing that is learnt."""
FEW = 24
"""Trials that are drawn unless told otherwise."""
START = 100
"""Steps that take about as long as the start and the end of a run: half a minute of processes, imports and records."""
CHANGING = ("optim.lr", "optim.weight_decay", "optim.backbone_lr", "optim.clip_norm")
"""Settings of the optimizer that a population may change."""
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
    steps: int
    grace: int
    """Steps before which no trial is stopped."""
    rungs: tuple[int, ...]
    """Steps at which ASHA looks; none without it."""
    late: frozenset[str] = frozenset()
    """Keys that change nothing before step `gate`."""
    ends: tuple[int, ...] = ()
    """Where a population's generations rest."""
    gate: int = 0
    """Steps that trials with the same other keys share; 0: none."""

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
        kept = {k: v if k not in self.late or v in (0, None) else "late" for k, v in changes.items()}
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
        plan, more = _timed(configs, space, options, tree)
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


def _timed(
    configs: list[Any], space: Space, options: SearchConfig, tree: Mapping[str, Any]
) -> tuple[Plan | None, list[str]]:
    """The plan with its steps; and why trials could not be stopped early."""
    base = configs[0]
    steps, every = base.optim.steps, base.evaluation.every
    gates = [m.start + m.ramp for config in configs for m in config.distill.values()]
    gate = math.ceil(max(gates, default=0.0) * steps)
    grace = gate if options.grace is None else math.ceil(options.grace * steps)
    wrong = _about_population(configs, space, options) if options.searcher == "population" else []
    rungs: tuple[int, ...] = ()
    if options.stopping == "asha":
        rungs = tuple(_rungs(grace, steps, every, options.keep)) if every else ()
        if not every:
            wrong.append("search.stopping: asha needs evaluations on the way; add evaluation.every=STEPS")
        elif not rungs:
            wrong.append(
                f"search.stopping: asha finds no evaluation between step {grace} and the end at {steps} with "
                f"evaluation.every={every}; lower it, or take search.stopping=none"
            )
        if grace < gate:
            wrong.append(
                f"search.grace: {grace} steps end before the last method's ramp does, at step {gate} of {steps}: "
                "until then all students are alike, and stopping would be a lottery; take "
                f"{math.ceil(1000 * gate / steps) / 1000:.3g} or more, or null"
            )
    if options.searcher == "grid" and not wrong:
        try:
            points = len(space.grid())
        except ConfigError as error:
            return None, list(error.mistakes)
    else:
        points = options.members * options.generations if options.searcher == "population" else FEW
    trials = options.trials or points
    plan = Plan(
        name=options.name or f"{base.name}_{space.name}",
        recipe=base.name,
        storage=base.storage,
        space=space,
        options=options,
        tree=tree,
        trials=min(trials, points) if options.searcher in ("grid", "population") else trials,
        steps=steps,
        grace=grace,
        rungs=rungs,
        ends=_ends(steps, options) if options.searcher == "population" else (),
        **_shared(configs, space, options, steps, min(trials, points) if options.searcher == "grid" else trials),
    )  # fmt: skip
    return plan, wrong


def _ends(steps: int, options: SearchConfig) -> tuple[int, ...]:
    return tuple(round(steps * (i + 1) / options.generations) for i in range(options.generations))


def _about_population(configs: list[Any], space: Space, options: SearchConfig) -> list[str]:
    """Why settings cannot change while a student learns, or nobody would know who is worst."""
    steps, every = configs[0].optim.steps, configs[0].evaluation.every
    wrong = [
        f"{key.name}: a population changes settings while students learn, and this one may decide what is built; "
        f"it can change {', '.join(CHANGING)}, and of a method {', '.join(sorted(_late_of(configs)))}"
        for key in space.keys
        if key.name not in CHANGING and not _acts_late(key.name, configs)
    ]
    off = [end for end in _ends(steps, options)[:-1] if not every or end % every]
    if off:
        wrong.append(
            f"evaluation.every: {every} gives no number at step {off[0]}, where a generation of the population ends; "
            f"take a divisor of {steps // options.generations}"
        )
    if options.stopping != "none":
        wrong.append("search.stopping: a population replaces its worst itself; take none")
    return wrong


def _late_of(configs: list[Any]) -> set[str]:
    return {name for config in configs for method in config.distill.values() for name in method.late}


def _shared(configs: list[Any], space: Space, options: SearchConfig, steps: int, trials: int) -> dict[str, Any]:
    """`late` and `gate` of the plan, where a common warm-up spares more than it costs: some keys act after the gate
    alone, and the others have few values."""
    late = frozenset(key.name for key in space.keys if _acts_late(key.name, configs))
    others = [key for key in space.keys if key.name not in late]
    starts = {min((m.start for m in config.distill.values()), default=0.0) for config in configs}
    few = all("choice" in key.words or "int" in key.words for key in others)
    if options.warmup == "own" or options.searcher == "population" or not late or not few or len(starts) > 1:
        return {}
    gate = math.ceil(min(starts) * steps)
    parts = math.prod(len(key.distribution.grid()) for key in others)
    spared = gate * (trials - parts)
    if options.warmup == "auto" and spared < START * parts:
        return {}
    return {"late": late, "gate": gate} if 0 < gate < steps else {}


def _acts_late(key: str, configs: list[Any]) -> bool:
    first, _, rest = key.partition(".")
    method, _, name = rest.partition(".")
    return first == "distill" and all(method in c.distill and name in c.distill[method].late for c in configs)


def _rungs(grace: int, steps: int, every: int, keep: int) -> Iterator[int]:
    """Evaluations at or after `grace`, each about `keep` times as late as the one before, before the end."""
    rung = every * max(1, math.ceil(grace / every))
    while rung < steps:
        yield rung
        rung = every * math.ceil(rung * keep / every)
