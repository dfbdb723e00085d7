"""When things happen in a search: where ASHA looks, where a population's generations end, and up to which step trials
share their warm-up."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tuning.options import SearchConfig
from tuning.space import Space

START = 100
"""Steps that take about as long as the start and the end of a run: half a minute of processes, imports and records."""
CHANGING = ("optim.lr", "optim.weight_decay", "optim.backbone_lr", "optim.clip_norm")
"""Settings of the optimizer that a population may change."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Steps, counted from a trial's first."""

    steps: int
    """Of a whole trial."""
    grace: int
    """Steps before which no trial is stopped."""
    rungs: tuple[int, ...] = ()
    """Steps at which ASHA looks; none without it."""
    late: frozenset[str] = frozenset()
    """Keys that change nothing before step `gate`."""
    ends: tuple[int, ...] = ()
    """Where a population's generations rest."""
    gate: int = 0
    """Steps that trials with the same other keys share; 0: none."""


def timing(configs: Sequence[Any], space: Space, options: SearchConfig, trials: int) -> tuple[Timing, list[str]]:
    """For the recipes of draws that stand for all others; and why trials could not be stopped, or changed, early."""
    steps, every = configs[0].optim.steps, configs[0].evaluation.every
    gates = [m.start + m.ramp for config in configs for m in config.distill.values()]
    ramped = math.ceil(max(gates, default=0.0) * steps)
    grace = ramped if options.grace is None else math.ceil(options.grace * steps)
    population = options.searcher == "population"
    wrong = _about_population(configs, space, options) if population else []
    rungs: tuple[int, ...] = ()
    if options.stopping == "asha":
        rungs = tuple(_rungs(grace, steps, every, options.keep)) if every else ()
        wrong += _about_stopping(grace, ramped, steps, every, rungs)
    late, gate = _shared(configs, space, options, trials)
    ends = _ends(steps, options) if population else ()
    return Timing(steps=steps, grace=grace, rungs=rungs, late=late, ends=ends, gate=gate), wrong


def _about_stopping(grace: int, ramped: int, steps: int, every: int | None, rungs: tuple[int, ...]) -> Iterator[str]:
    if not every:
        yield "search.stopping: asha needs evaluations on the way; add evaluation.every=STEPS"
    elif not rungs:
        yield (
            f"search.stopping: asha finds no evaluation between step {grace} and the end at {steps} with "
            f"evaluation.every={every}; lower it, or take search.stopping=none"
        )
    if grace < ramped:
        yield (
            f"search.grace: {grace} steps end before the last method's ramp does, at step {ramped} of {steps}: "
            "until then all students are alike, and stopping would be a lottery; take "
            f"{math.ceil(1000 * ramped / steps) / 1000:.3g} or more, or null"
        )


def _ends(steps: int, options: SearchConfig) -> tuple[int, ...]:
    return tuple(round(steps * (i + 1) / options.generations) for i in range(options.generations))


def _about_population(configs: Sequence[Any], space: Space, options: SearchConfig) -> list[str]:
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


def _late_of(configs: Sequence[Any]) -> set[str]:
    return {name for config in configs for method in config.distill.values() for name in method.late}


def _shared(configs: Sequence[Any], space: Space, options: SearchConfig, trials: int) -> tuple[frozenset[str], int]:
    """`late` and `gate`, where a common warm-up spares more than it costs: some keys act after the gate alone, and the
    others have few values."""
    steps, none = configs[0].optim.steps, (frozenset[str](), 0)
    late = frozenset(key.name for key in space.keys if _acts_late(key.name, configs))
    others = [key for key in space.keys if key.name not in late]
    starts = {min((m.start for m in config.distill.values()), default=0.0) for config in configs}
    few = all("choice" in key.words or "int" in key.words for key in others)
    if options.warmup == "own" or options.searcher == "population" or not late or not few or len(starts) > 1:
        return none
    gate = math.ceil(min(starts) * steps)
    parts = math.prod(len(key.distribution.grid()) for key in others)
    spared = gate * (trials - parts)
    if options.warmup == "auto" and spared < START * parts:
        return none
    return (late, gate) if 0 < gate < steps else none


def _acts_late(key: str, configs: Sequence[Any]) -> bool:
    first, _, rest = key.partition(".")
    method, _, name = rest.partition(".")
    return first == "distill" and all(method in c.distill and name in c.distill[method].late for c in configs)


def _rungs(grace: int, steps: int, every: int, keep: int) -> Iterator[int]:
    """Evaluations at or after `grace`, each about `keep` times as late as the one before, before the end."""
    rung = every * max(1, math.ceil(grace / every))
    while rung < steps:
        yield rung
        rung = every * math.ceil(rung * keep / every)
