"""What a search consists of: values that decide and report, kept in one file by `tuning.trial_store`.

Searchers and stopping rules are functions of these trials alone, so that a search that was killed knows all that it
had learnt, and recorded curves can be replayed. Values are as the evaluation tells them (AP in 0..100, ms_per_image in
milliseconds): never negated, and left out where there is none to tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Goal = Literal["max", "min"]
Role = Literal["search", "again", "plain", "warmup"]
State = Literal["waiting", "running", "finished", "stopped", "failed"]
ENDED: tuple[State, ...] = ("finished", "stopped", "failed")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A number of the evaluation that is to be large, or small."""

    name: str
    """`AP_small`, `AP`, `ms_per_image`, ..."""
    goal: Goal = "max"

    @property
    def sign(self) -> int:
        """What a value is multiplied by so that more is better."""
        return 1 if self.goal == "max" else -1


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched, and how; fixed when the search begins."""

    name: str
    """Runs of it are called NAME_trial000, NAME_plain_seed0, ..."""
    recipe: str
    """The recipe's own name."""
    space: str
    """The space's name."""
    keys: Mapping[str, Mapping[str, Any]]
    """Dotted key -> distribution as in the space's file, in its order."""
    objectives: tuple[Objective, ...]
    """The first is what stopping rules look at and what winners are named by."""
    searcher: str
    stopping: str
    trials: int
    """How many are to be drawn."""
    steps: int
    """Of a whole run."""
    grace: int = 0
    """Steps before which no trial is stopped."""
    seed: int = 0
    clock: Literal["processor", "wall"] = "processor"
    """What `Point.seconds` counts: seconds of the processors, or by the clock (on a GPU)."""
    settings: str = ""
    """Hash of what all trials share."""
    begun: str = ""
    """ISO time."""
    parent_run: str = ""
    """The search's MLflow run; empty before it is opened."""
    tracking: str = ""
    """MLflow's URI."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation of a trial."""

    step: int
    """Optimizer steps done before it."""
    values: Mapping[str, float]
    """The objectives by name, as far as this evaluation gives them."""
    seconds: float
    """Spent on all training steps before it, those of an `origin` included."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a search."""

    number: int
    role: Role
    """`search`: drawn by the searcher; `again`: the settings of trial `of` on a further seed; `plain`: the student
    without a teacher; `warmup`: the steps before a gate that other trials share."""
    settings: Mapping[str, Any]
    """Key of the space -> value (a label, where the space labels its choices); keys that do not apply are left out."""
    changes: Mapping[str, Any]
    """Dotted settings laid over the recipe: what the trial really differs by."""
    seed: int
    run: str
    """The run's name: its folder below `storage`."""
    state: State = "waiting"
    curve: tuple[Point, ...] = ()
    """By rising step."""
    of: int | None = None
    origin: int | None = None
    """The trial from whose checkpoint this one began; null: from the first step."""
    until: int | None = None
    """The step after which it rests for others to begin from; null: it runs to the end."""
    checkpoint: str = ""
    """Of one that rests: the folder of the checkpoint that it left."""
    starts: int = 0
    """How often it was started: above 1, something was killed."""
    run_id: str | None = None
    """Its MLflow run."""
    minutes: float | None = None
    """By the clock, of the whole run where it finished, pack and start-up of workers included."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Of a finished run: every number of its last evaluation, parameters, ms_per_image."""
    why: str = ""
    """Why it was stopped or failed."""

    @property
    def last(self) -> Point | None:
        """The newest evaluation."""
        return self.curve[-1] if self.curve else None

    @property
    def seconds(self) -> float:
        """What it has cost so far, as its newest evaluation knows."""
        return self.curve[-1].seconds if self.curve else 0.0

    def value(self, objective: str) -> float | None:
        """The newest value of an objective; None where no evaluation gave it."""
        return next((point.values[objective] for point in reversed(self.curve) if objective in point.values), None)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A configuration over its seeds, against the plain student on the same ones."""

    number: int
    """Of the trial that drew it."""
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    """The first objective, seed by seed."""
    plain: tuple[float, ...]
    mean: float
    difference: float
    """Mean of the paired differences, more being better."""
    low: float | None
    high: float | None
    """Their 95 % interval; null with one seed."""
    verdict: str
    """`better`, `worse` or `no difference`, or why nothing can be said."""


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """The answer of a search."""

    best: int
    """The number of the trial with the best mean over seeds."""
    beats_plain: bool
    sentence: str
    contenders: tuple[Contender, ...]
    """Best first."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """All that the file holds."""

    search: Search
    trials: tuple[Trial, ...] = ()
    conclusion: Conclusion | None = None

    def of_role(self, *roles: Role) -> tuple[Trial, ...]:
        """The trials of these roles, by number."""
        return tuple(trial for trial in self.trials if trial.role in roles)


def better(objective: Objective, trials: Sequence[Trial]) -> list[Trial]:
    """Those with a value of the objective, best first; among equals the earlier one."""
    valued = [(trial.value(objective.name), trial) for trial in trials]
    told = [(value, trial) for value, trial in valued if value is not None]
    return [trial for value, trial in sorted(told, key=lambda one: (-objective.sign * one[0], one[1].number))]
