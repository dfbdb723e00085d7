"""Searches on recorded curves: the product's own searchers and stopping rules, without any training.

A replay draws a trial, looks up its recorded curve, shows it to the stopping rule point by point and pays for the steps
up to where it ends, one trial after another. A point that is drawn again is paid again, as a search would.
"""

import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuning.distributions import Choice
from tuning.searchers import Grid, Random, Searcher, Tpe
from tuning.space import Key, Space
from tuning.stopping import Asha, Never, Stopping
from tuning.trials import Objective, Trial

NEAR = 0.01
"""A trial has found it when its end is within this share of the best one's."""
PATIENCE = 4
"""A replay gives up after as many trials as so many grids have."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Every point of a grid, run to its end."""

    space: Space
    objective: Objective
    trials: tuple[Trial, ...]
    rungs: tuple[int, ...]
    """Where ASHA looks."""
    keep: int = 3

    @property
    def whole(self) -> float:
        """Seconds of the whole grid."""
        return sum(trial.seconds for trial in self.trials)

    @property
    def best(self) -> float:
        """The best end."""
        return self.objective.sign * max(self.objective.sign * self.end(trial) for trial in self.trials)

    def end(self, trial: Trial) -> float:
        """The objective at the end of a trial."""
        value = trial.value(self.objective.name)
        assert value is not None, f"{trial.run} has no {self.objective.name}"
        return value

    def good(self, trial: Trial) -> bool:
        """Whether a trial that ran to its end is near the best one."""
        return self.objective.sign * (self.best - self.end(trial)) <= NEAR * abs(self.best)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What 200 replays of one searcher cost, in shares of the whole grid; infinite where they gave up."""

    name: str
    shares: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the replays cost at most this."""
        return statistics.median(self.shares)

    @property
    def most(self) -> float:
        """Nine in ten of the replays cost at most this."""
        return sorted(self.shares)[math.ceil(0.9 * len(self.shares)) - 1]

    @property
    def missed(self) -> float:
        """The share of replays that never found it."""
        return sum(math.isinf(share) for share in self.shares) / len(self.shares)


def contestants(recorded: Recorded) -> dict[str, Callable[[int], tuple[Searcher, Stopping]]]:
    """Name -> a searcher and a stopping rule for a seed. A population is not among them: it changes settings on the
    way, and such curves are not recorded."""
    asha = Asha(objective=recorded.objective, rungs=recorded.rungs, keep=recorded.keep)
    drawing: dict[str, Callable[[int], Searcher]] = {
        "grid": lambda seed: Grid(space=turned(recorded.space, seed)),
        "random": lambda seed: Random(space=recorded.space, seed=seed),
        "tpe": lambda seed: Tpe(space=recorded.space, objectives=(recorded.objective,), seed=seed),
    }
    found: dict[str, Callable[[int], tuple[Searcher, Stopping]]] = {}
    for name, make in drawing.items():
        found[name] = lambda seed, make=make: (make(seed), Never())
        found[f"{name} + asha"] = lambda seed, make=make: (make(seed), asha)
    return found


def turned(space: Space, seed: int) -> Space:
    """The space with its keys and their values in another order: nobody knows before which corner a grid should begin
    in."""
    dice = random.Random(seed)
    keys: list[Key] = []
    for key in space.keys:
        assert isinstance(key.distribution, Choice), "a grid is one of choices"
        values = tuple(dice.sample(key.distribution.values, len(key.distribution.values)))
        keys.append(replace(key, distribution=replace(key.distribution, values=values)))
    dice.shuffle(keys)
    return replace(space, keys=tuple(keys))


def cost(recorded: Recorded, name: str, make: Callable[[int], tuple[Searcher, Stopping]], replays: int) -> Cost:
    """Every replay with a seed of its own."""
    whole = recorded.whole
    return Cost(name=name, shares=tuple(replay(recorded, *make(seed)) / whole for seed in range(replays)))


def replay(recorded: Recorded, searcher: Searcher, stopping: Stopping) -> float:
    """Seconds until a trial near the best one had run to its end; infinite where none did."""
    trials: list[Trial] = []
    seconds = 0.0
    known = {_name(trial.settings): trial for trial in recorded.trials}
    while len(trials) < PATIENCE * len(recorded.trials):
        settings = searcher.suggest(trials)
        if settings is None:
            break
        ended = _run(known[_name(settings)], len(trials), trials, stopping)
        trials.append(ended)
        seconds += ended.seconds
        if ended.state == "finished" and recorded.good(ended):
            return seconds
    return math.inf


def _run(recorded: Trial, number: int, before: Sequence[Trial], stopping: Stopping) -> Trial:
    """The trial as the stopping rule leaves it: finished, or stopped at a point."""
    trial = replace(recorded, number=number, state="running", curve=())
    for point in recorded.curve[:-1]:
        trial = replace(trial, curve=(*trial.curve, point))
        why = stopping.why_stop(trial, [*before, trial])
        if why is not None:
            return replace(trial, state="stopped", why=why)
    return replace(trial, state="finished", curve=recorded.curve)


def _name(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True)


def table(recorded: Recorded, costs: Sequence[Cost]) -> str:
    """A line per searcher."""
    lines = [f"{'searcher':14}  {'median':>7}  {'90 %':>7}  {'not found':>9}"]
    for one in costs:
        lines.append(f"{one.name:14}  {share(one.median):>7}  {share(one.most):>7}  {one.missed:9.0%}")
    return "\n".join(lines)


def share(value: float) -> str:
    """A share of the grid in words."""
    return "never" if math.isinf(value) else f"{value:.2f}"
