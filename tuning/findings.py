"""What a search has found so far, as numbers for its report: what may be compared, what it cost, what is luck."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.grammar import to_text
from tuning.trials import Found, Objective, Trial

MOST = 0.9
"""Share of the trials that an evaluation must have reached for all to be compared by it."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """The first objective of many trials after equally many steps."""

    step: int
    values: Mapping[int, float]
    """By trial number."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How far runs part that differ by their seed alone."""

    deviation: float
    """Standard deviation between seeds, pooled over configurations."""
    freedom: int
    """Degrees of freedom that it rests on."""
    configurations: int


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Where the search stood when a trial had ended, were they done one after another."""

    trial: Trial
    seconds: float
    """Of all trials up to this one; of a search without kills, what was really spent."""
    best: float | None
    """The best value of a finished trial so far."""


def level(found: Found) -> Level | None:
    """The searched trials at the last evaluation that nine in ten of them reached; None before there is one.

    Stopped trials ended early and finished ones were chosen: only at an equal step do both say what a setting does.
    Trials that failed or still run are left out.
    """
    name = found.search.objectives[0].name
    told = [_by_step(t, name) for t in found.of_role("search") if t.state in ("finished", "stopped")]
    curves = [curve for curve in told if curve]
    steps = {step for curve in curves for step in curve}
    common = [s for s in steps if sum(s in curve for curve in curves) >= MOST * len(curves)]
    if not common:
        return None
    at = max(common)
    values = {t.number: v for t in found.of_role("search") if (v := _by_step(t, name).get(at)) is not None}
    return Level(step=at, values={n: v for n, v in values.items() if found.trials[n].state in ("finished", "stopped")})


def _by_step(trial: Trial, name: str) -> dict[int, float]:
    return {point.step: point.values[name] for point in trial.curve if name in point.values}


def finished(trials: Iterable[Trial]) -> list[Trial]:
    """Those that came to the end of the schedule: neither stopped nor at rest for others to go on from."""
    return [trial for trial in trials if trial.state == "finished" and trial.until is None]


def plain_values(found: Found, step: int | None = None) -> list[float]:
    """The plain student's first objective, seed by seed: at a step, or at the end of finished runs."""
    name = found.search.objectives[0].name
    plain = found.of_role("plain")
    if step is not None:
        return [v for t in plain if (v := _by_step(t, name).get(step)) is not None]
    return [v for t in finished(plain) if (v := t.value(name)) is not None]


def noise(found: Found) -> Noise | None:
    """From further seeds of chosen configurations and from the plain student's; None where each ran once.

    The run that a configuration was chosen by is left out: it was chosen for having had luck, too.
    """
    name = found.search.objectives[0].name
    groups: dict[int | None, list[float]] = {}
    for trial in found.of_role("again", "plain"):
        value = trial.value(name)
        if trial.state == "finished" and value is not None:
            groups.setdefault(trial.of, []).append(value)
    several = [group for group in groups.values() if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    if not freedom:
        return None
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in several)
    return Noise(deviation=math.sqrt(squares / freedom), freedom=freedom, configurations=len(several))


def own_seconds(trial: Trial, trials: Sequence[Trial]) -> float:
    """What a trial cost beyond the steps that it took over from its origin."""
    if trial.origin is None or not trial.curve:
        return trial.seconds
    before = [p.seconds for p in trials[trial.origin].curve if p.step < trial.curve[0].step]
    return max(0.0, trial.seconds - (before[-1] if before else 0.0))


def progress(found: Found) -> list[Spent]:
    """One entry per searched trial or shared warm-up that has ended, by number."""
    objective = found.search.objectives[0]
    told: list[Spent] = []
    seconds, best = 0.0, None
    for trial in found.of_role("search", "warmup"):
        if trial.state in ("waiting", "running"):
            continue
        seconds += own_seconds(trial, found.trials)
        value = trial.value(objective.name)
        if trial.role == "search" and value is not None and finished([trial]):
            best = value if best is None else objective.sign * max(objective.sign * best, objective.sign * value)
        told.append(Spent(trial=trial, seconds=seconds, best=best))
    return told


def front(objectives: Sequence[Objective], trials: Iterable[Trial]) -> list[Trial]:
    """Of finished trials those to which none is better in one objective and as good in the others, best first in the
    first one."""
    names = [objective.name for objective in objectives]
    valued = [(t, [t.value(name) for name in names]) for t in finished(trials)]
    whole = [
        (t, [o.sign * v for o, v in zip(objectives, row, strict=True) if v is not None])
        for t, row in valued
        if None not in row
    ]
    kept = [(t, row) for t, row in whole if not any(_dominates(other, row) for _, other in whole)]
    return [t for t, row in sorted(kept, key=lambda one: (-one[1][0], one[0].number))]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Dotted keys without the sections that all of them share."""
    split = [key.split(".") for key in keys]
    shared = 0
    while len({tuple(parts[: shared + 1]) for parts in split}) == 1 and all(len(parts) > shared + 1 for parts in split):
        shared += 1
    return {".".join(parts): ".".join(parts[shared:]) for parts in split}


def as_text(value: Any) -> str:
    """A setting's value in a few letters."""
    return f"{value:.3g}" if isinstance(value, float) else to_text(value)
