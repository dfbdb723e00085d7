"""Where a search stands: what runs next, what was heard of it, and what that means. It knows nothing of Ray.

The order: trials that were running when a driver was killed; then what the searcher draws; then the plain student and
the best configurations on further seeds, seed by seed. Every event is stored before anything follows from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tuning.plan import Plan
from tuning.population import Population
from tuning.searchers import Searcher
from tuning.stopping import Stopping
from tuning.trial_store import TrialStore
from tuning.trials import ENDED, Found, Point, Role, Trial, better

WAIT: Literal["wait"] = "wait"
DONE: Literal["done"] = "done"


@dataclass(kw_only=True)
class Desk:
    """One search while its driver lives."""

    plan: Plan
    store: TrialStore
    searcher: Searcher | Population
    stopping: Stopping
    at_once: int
    """Trials that run side by side."""
    changed: Callable[[Found], None]
    """Told of every new state."""

    def __post_init__(self) -> None:
        self.found = self.store.read()
        self._started: set[int] = set()
        self._gone: set[int] = set()

    def next(self) -> Trial | Literal["wait", "done"]:
        """The trial to start now, `wait` while others must end first, `done` when there is no more."""
        running = self._started - self._gone
        if len(running) >= self.at_once:
            return WAIT
        left = [t for t in self.found.trials if t.state not in ENDED and t.number not in self._started]
        trial = left[0] if left else self._new()
        if trial is None:
            return WAIT if running else DONE
        self._started.add(trial.number)
        return self._put(replace(trial, state="running", starts=trial.starts + 1, why=""))

    def heard(self, number: int, point: Point) -> str | None:
        """A trial was evaluated; why it is to be stopped, if it is. What is known already changes nothing."""
        trial = self.found.trials[number]
        if trial.state in ENDED or (trial.last is not None and point.step <= trial.last.step):
            return trial.why if trial.state == "stopped" else None
        trial = self._put(replace(trial, curve=(*trial.curve, point)))
        if trial.role != "search" or point.step >= self.plan.timing.steps:
            return None
        why = self.stopping.why_stop(trial, self.found.of_role("search"))
        if why is not None:
            self._put(replace(trial, state="stopped", why=why))
        return why

    def finished(self, number: int, last: Point, facts: Mapping[str, float], minutes: float, run_id: str) -> None:
        """A trial came to its end."""
        trial = self.found.trials[number]
        self._gone.add(number)
        if trial.state in ENDED:
            return
        curve = (*(point for point in trial.curve if point.step < last.step), last)
        self._put(replace(trial, state="finished", curve=curve, facts=facts, minutes=minutes, run_id=run_id))

    def refused(self, number: int, why: str) -> None:
        """A trial cannot go on, and could not if it were begun again."""
        self._gone.add(number)
        self._put(replace(self.found.trials[number], state="failed", why=why))

    def restarted(self, number: int) -> None:
        """A trial's process is no more, and this driver has begun another one, which goes on from its checkpoint."""
        trial = self.found.trials[number]
        if trial.state not in ENDED:
            self._put(replace(trial, starts=trial.starts + 1))

    def gone(self, number: int, why: str = "") -> None:
        """A trial's process is no more; unless the trial has ended, the next driver continues it."""
        self._gone.add(number)
        trial = self.found.trials[number]
        if trial.state not in ENDED and why:
            self._put(replace(trial, why=why))

    @property
    def broken(self) -> list[Trial]:
        """Trials that are neither running nor at their end."""
        return [t for t in self.found.trials if t.state not in ENDED and t.number in self._gone]

    def rested(self, number: int, last: Point, checkpoint: str, run_id: str) -> None:
        """A trial came to where it rests."""
        self._gone.add(number)
        trial = self.found.trials[number]
        known = next((point.values for point in trial.curve if point.step == last.step), {})
        curve = (*(point for point in trial.curve if point.step < last.step), replace(last, values=known))
        self._put(replace(trial, state="finished", curve=curve, checkpoint=checkpoint, run_id=run_id))

    def _new(self) -> Trial | None:
        searched = self.found.of_role("search")
        if isinstance(self.searcher, Population):
            piece = self.searcher.next(searched)
            if piece == WAIT:
                return None
            if piece is not None:
                trial = self._searched(piece.settings)
                return replace(trial, origin=piece.origin, until=piece.until)
        elif len(searched) < self.plan.trials:
            settings = self.searcher.suggest(searched)
            if settings is not None:
                return self._drawn(settings)
        if any(trial.state not in ENDED for trial in searched) or self.plan.options.seeds == 1:
            return None
        return next((trial for trial in self._seeded(searched)), None)

    def _drawn(self, settings: Mapping[str, Any]) -> Trial | None:
        """The trial of these settings, or the warm-up that it needs first; None while that one runs."""
        trial = self._searched(settings)
        if not self.plan.timing.gate:
            return trial
        early = self.plan.early(trial.changes)
        warm = next((t for t in self.found.of_role("warmup") if self.plan.early(t.changes) == early), None)
        if warm is None:
            run = f"{self.plan.name}_warmup{trial.number:03d}"
            return replace(trial, role="warmup", run=run, until=self.plan.timing.gate)
        if warm.state not in ENDED:
            return None
        return replace(trial, origin=warm.number) if warm.state == "finished" else trial

    def _searched(self, settings: Mapping[str, Any]) -> Trial:
        number, seed = len(self.found.trials), int(self.plan.tree.get("seed", 0))
        run = f"{self.plan.name}_trial{number:03d}"
        return self._trial("search", settings, self.plan.space.changes(settings), seed, run)

    def _seeded(self, searched: tuple[Trial, ...]) -> list[Trial]:
        """What is left of the second look, in its order."""
        first = int(self.plan.tree.get("seed", 0))
        there = {(t.role, t.of, t.seed) for t in self.found.trials}
        left: list[Trial] = []
        best = self.contenders(searched)
        for seed in range(first, first + self.plan.options.seeds) if best else ():
            if ("plain", None, seed) not in there:
                left.append(self._trial("plain", {}, {}, seed, f"{self.plan.name}_plain_seed{seed}"))
            for of in best:
                if seed != first and ("again", of.number, seed) not in there:
                    again = self._trial("again", of.settings, of.changes, seed, f"{of.run}_seed{seed}")
                    left.append(replace(again, of=of.number))
        return left

    def contenders(self, searched: tuple[Trial, ...]) -> list[Trial]:
        """The configurations that are looked at again: once chosen, they stay."""
        chosen = {t.of for t in self.found.trials if t.role == "again"}
        objective = self.plan.options.wanted[0]
        best = better(objective, [t for t in searched if t.state == "finished" and t.until is None])
        if chosen:
            # A driver that was killed while the first of them began: the others are still the best of the same trials.
            best = [t for t in best if t.number in chosen] + [t for t in best if t.number not in chosen]
        return best[: max(self.plan.options.best, len(chosen))]

    def _trial(self, role: Role, settings: Mapping[str, Any], changes: Mapping[str, Any], seed: int, run: str) -> Trial:
        number = len(self.found.trials)
        return Trial(number=number, role=role, settings=settings, changes=changes, seed=seed, run=run)

    def _put(self, trial: Trial) -> Trial:
        self.found = self.store.put(trial)
        self.changed(self.found)
        return trial
