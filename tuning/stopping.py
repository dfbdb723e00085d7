"""When a trial is not worth its further steps: functions of the curves alone, for live and recorded ones alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tuning.trials import Objective, Trial


class Stopping(Protocol):
    """Looks at a trial whenever it was evaluated."""

    def why_stop(self, trial: Trial, trials: Sequence[Trial]) -> str | None:
        """Why `trial`, whose newest point is new, ends here; None: it goes on. `trials`: all that are searched, `trial`
        as it is now among them."""
        ...


@dataclass(frozen=True)
class Never:
    """Every trial runs to its end."""

    def why_stop(self, trial: Trial, trials: Sequence[Trial]) -> str | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Asha:
    """Asynchronous successive halving (Li et al., MLSys 2020), its stopping form: at each rung a trial goes on if it is
    among the best 1/`keep` of those that came there so far, itself included; the first always goes on."""

    objective: Objective
    rungs: tuple[int, ...]
    """Rising steps, the first not before the last gate's ramp has ended."""
    keep: int = 3

    def why_stop(self, trial: Trial, trials: Sequence[Trial]) -> str | None:
        last = trial.last
        if last is None or last.step not in self.rungs:
            return None
        mine = _at(trial, last.step, self.objective)
        if mine is None:
            return f"no {self.objective.name} at step {last.step}"
        there = [_at(other, last.step, self.objective) for other in trials]
        values = sorted((self.objective.sign * v for v in there if v is not None), reverse=True)
        place = values.index(self.objective.sign * mine) + 1
        allowed = max(1, len(values) // self.keep)
        if place <= allowed:
            return None
        return f"{place}. of {len(values)} at step {last.step}, where the best {allowed} went on"


def _at(trial: Trial, step: int, objective: Objective) -> float | None:
    """The objective at exactly this step."""
    return next((point.values.get(objective.name) for point in trial.curve if point.step == step), None)
