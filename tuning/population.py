"""Population-based training (Jaderberg et al., 2017, arXiv:1711.09846), in generations: members learn side by side to
a step and rest there; those that do worst begin again from the checkpoint of one that does best, with its settings a
little changed; the others go on as they are.

Each piece is a run of its own that begins where another one rests, so that nothing is lost with a process, and which
piece comes next is a function of those that have ended.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tuning.distributions import Choice, Real, Whole
from tuning.space import Key, Space
from tuning.trials import ENDED, Objective, Trial, better

FACTORS = (0.8, 1.2)
REPLACED = 4
"""One of so many members is replaced after a generation, and one of so many is copied."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The next run: a member in a generation."""

    settings: dict[str, Any]
    origin: int | None
    """The trial that it goes on from."""
    until: int | None
    """Where it rests; null: at the end."""


@dataclass(frozen=True, kw_only=True)
class Population:
    """Pieces by generation and member: searched trial number g * members + m is member m in generation g."""

    space: Space
    objective: Objective
    members: int
    ends: tuple[int, ...]
    """The step at which each generation rests; the last is the end of the schedule."""
    seed: int = 0

    def next(self, trials: Sequence[Trial]) -> Piece | Literal["wait"] | None:
        """The next piece after these searched trials; `wait`: the generation before must end; None: all are begun."""
        generation, member = divmod(len(trials), self.members)
        if generation >= len(self.ends):
            return None
        until = None if generation == len(self.ends) - 1 else self.ends[generation]
        if generation == 0:
            return Piece(settings=self._drawn(member), origin=None, until=until)
        before = trials[(generation - 1) * self.members : generation * self.members]
        if any(trial.state not in ENDED for trial in before):
            return "wait"
        origin = self._followed(before, member)
        if origin is None:
            return None
        settings = dict(origin.settings)
        if origin is not before[member]:
            settings = self._changed(settings, random.Random(f"{self.seed} {generation} {member}"))
        return Piece(settings=settings, origin=origin.number, until=until)

    def _followed(self, before: Sequence[Trial], member: int) -> Trial | None:
        """Whom the member goes on from: itself, or one of the best if it is among the worst. None: nobody is left."""
        ranked = better(self.objective, [trial for trial in before if trial.state == "finished"])
        few = max(1, len(before) // REPLACED)
        good = [trial for trial in before if trial in ranked[: max(1, len(ranked) - few)]]
        if not ranked or before[member] in good:
            return before[member] if ranked else None
        best = ranked[:few]
        return best[random.Random(f"{self.seed} {len(before)} {member} {before[0].number}").randrange(len(best))]

    def _drawn(self, member: int) -> dict[str, Any]:
        """A member's first settings, drawn at random."""
        from tuning.searchers import Random

        blank = Trial(number=0, role="search", settings={}, changes={}, seed=0, run="")
        return Random(space=self.space, seed=self.seed).suggest([blank] * member) or {}

    def _changed(self, settings: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
        return {
            key.name: _perturbed(key, settings[key.name], chance) for key in self.space.keys if key.name in settings
        }


def _perturbed(key: Key, value: Any, chance: random.Random) -> Any:
    """A little more or less, or a neighbour among the values; within the range."""
    distribution, factor = key.distribution, chance.choice(FACTORS)
    if isinstance(distribution, Real):
        return min(max(value * factor, distribution.low), distribution.high)
    if isinstance(distribution, Whole):
        step = distribution.step if factor > 1 else -distribution.step
        return min(max(value + step, distribution.low), distribution.high)
    assert isinstance(distribution, Choice)
    place = distribution.values.index(value) + (1 if factor > 1 else -1)
    return distribution.values[min(max(place, 0), len(distribution.values) - 1)]
