"""Who draws the next trial's settings: functions of the trials so far, so that nothing is learnt that a kill can lose.

A searcher knows neither runs nor Ray: `suggest` sees all trials of the search, those that run included, and returns
the settings of the next one, or None when there is no more. Replaying recorded curves asks it in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tuning.space import Space
from tuning.trials import Objective, Trial

if TYPE_CHECKING:
    import optuna


class Searcher(Protocol):
    """Draws trials one after another."""

    def suggest(self, trials: Sequence[Trial]) -> dict[str, Any] | None:
        """Settings of trial number `len(trials)` of the searched ones; None: all was tried."""
        ...


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every point once, in order."""

    space: Space

    def suggest(self, trials: Sequence[Trial]) -> dict[str, Any] | None:
        points = self.space.grid()
        return points[len(trials)] if len(trials) < len(points) else None


@dataclass(frozen=True, kw_only=True)
class Random:
    """Independent draws."""

    space: Space
    seed: int = 0

    def suggest(self, trials: Sequence[Trial]) -> dict[str, Any] | None:
        import optuna

        return _drawn(self.space, _study(optuna.samplers.RandomSampler(_seed(self.seed, trials)), 1))


@dataclass(frozen=True, kw_only=True)
class Tpe:
    """Optuna's tree-structured Parzen estimator, told of all trials anew each time.

    Stopped trials count as pruned at their last value; running ones as bad ones, so that trials side by side differ;
    failed ones not at all. Several objectives: the front is sought, and stopped trials are left out.
    """

    space: Space
    objectives: tuple[Objective, ...]
    seed: int = 0
    startup: int = 8

    def suggest(self, trials: Sequence[Trial]) -> dict[str, Any] | None:
        import optuna

        sampler = optuna.samplers.TPESampler(
            seed=_seed(self.seed, trials), n_startup_trials=self.startup, constant_liar=True
        )
        study = _study(sampler, len(self.objectives))
        told = (_told(self.space, trial, self.objectives) for trial in trials)
        study.add_trials([trial for trial in told if trial is not None])
        return _drawn(self.space, study)


def _seed(seed: int, trials: Sequence[Trial]) -> int:
    """One draw's own: a trial's settings do not depend on when the driver was started."""
    return (seed * 1_000_003 + len(trials)) % 2**32


def _study(sampler: Any, objectives: int) -> "optuna.Study":
    """All minimise, whatever the objectives' goals are."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=sampler, directions=[optuna.study.StudyDirection.MINIMIZE] * objectives)


def _drawn(space: Space, study: "optuna.Study") -> dict[str, Any]:
    trial = study.ask()
    settings: dict[str, Any] = {}
    for key in space.keys:
        if key.applies(settings):
            settings[key.name] = key.distribution.draw(trial, key.name)
    return settings


def _told(space: Space, trial: Trial, objectives: Sequence[Objective]) -> "optuna.trial.FrozenTrial | None":
    """The trial in Optuna's words; None for one that teaches nothing."""
    from optuna.trial import TrialState, create_trial

    keys = [key for key in space.keys if key.name in trial.settings]
    known: dict[str, Any] = {
        "params": {key.name: key.distribution.parameter(trial.settings[key.name]) for key in keys},
        "distributions": {key.name: key.distribution.shape() for key in keys},
    }
    values = [trial.value(objective.name) for objective in objectives]
    if trial.state in ("waiting", "running"):
        return create_trial(state=TrialState.RUNNING, **known)
    if trial.state == "finished" and None not in values:
        losses = [-o.sign * v for o, v in zip(objectives, values, strict=True) if v is not None]
        return create_trial(state=TrialState.COMPLETE, values=losses, **known)
    if trial.state == "stopped" and len(objectives) == 1:
        first = objectives[0]
        steps = {p.step: -first.sign * p.values[first.name] for p in trial.curve if first.name in p.values}
        return create_trial(state=TrialState.PRUNED, intermediate_values=steps, **known)
    return None
