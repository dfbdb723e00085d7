"""How much each key decides whether a trial is among the best third: PED-ANOVA (Watanabe et al., IJCAI 2023), Optuna's,
with its spread and with what luck gives.

It compares where the best trials lie in a key with where all of them lie; conditional keys count for what they do where
they apply. Few trials lie apart by chance, too: each share stands beside those of the same trials with their values
shuffled.
"""

import math
import random
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuning.distributions import read

if TYPE_CHECKING:
    import optuna

LEAST = 8
"""Trials below which nothing is said."""
DRAWS = 30
"""Halves of the trials for the spread, and as many shuffles."""
TARGET = 1 / 3
"""The share of the trials that count as good."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What one key decides."""

    key: str
    share: float
    """Of what all keys decide, by all trials: 0..1."""
    low: float
    high: float
    """10 % and 90 % over random halves of the trials, which part about as much as new trials would."""
    luck: float
    """90 % of the key's share where values are shuffled."""
    trials: int
    """That have the key: of conditional ones not all."""

    @property
    def told_from_luck(self) -> bool:
        """Whether the share is more than luck gives."""
        return self.share > self.luck


def importances(
    keys: Mapping[str, Mapping[str, Any]],
    settings: Mapping[int, Mapping[str, Any]],
    values: Mapping[int, float],
    sign: int = 1,
) -> list[Importance]:
    """For every key that was drawn, the greatest first; nothing for few trials.

    `keys`: as a search stores them; `settings` and `values` by trial number; `sign`: +1 where more is better, else -1.
    """
    numbers = list(values)
    drawn = [key for key in keys if any(key in settings[n] for n in numbers)]
    if len(numbers) < LEAST or not drawn:
        return []
    losses = [-sign * values[n] for n in numbers]
    study = _study(keys, [settings[n] for n in numbers], losses)
    dice = random.Random(0)
    whole = _shares(study, drawn, losses)
    halves = [_shares(study, drawn, _half(losses, dice)) for _ in range(DRAWS)]
    shuffles = [_shares(study, drawn, dice.sample(losses, len(losses))) for _ in range(DRAWS)]
    told: list[Importance] = []
    for key in drawn:
        spread = statistics.quantiles([one[key] for one in halves], n=10, method="inclusive")
        luck = statistics.quantiles([one[key] for one in shuffles], n=10, method="inclusive")[-1]
        having = sum(key in settings[n] for n in numbers)
        told.append(Importance(key=key, share=whole[key], low=spread[0], high=spread[-1], luck=luck, trials=having))
    return sorted(told, key=lambda one: -one.share)


def _study(
    keys: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], losses: Sequence[float]
) -> "optuna.Study":
    import optuna
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    shapes = {key: read(words) for key, words in keys.items()}
    study = optuna.create_study()
    study.add_trials(
        [
            create_trial(
                params={key: shapes[key].parameter(value) for key, value in row.items()},
                distributions={key: shapes[key].shape() for key in row},
                value=loss,
            )
            for row, loss in zip(rows, losses, strict=True)
        ]
    )
    return study


def _half(losses: Sequence[float], dice: random.Random) -> list[float]:
    """The losses of a random half; Optuna leaves out what is not a number."""
    kept = set(dice.sample(range(len(losses)), len(losses) // 2))
    return [loss if place in kept else math.nan for place, loss in enumerate(losses)]


def _shares(study: "optuna.Study", keys: Sequence[str], losses: Sequence[float]) -> dict[str, float]:
    """Adding up to 1, or all 0 where nothing differs."""
    from optuna.importance import PedAnovaImportanceEvaluator

    with warnings.catch_warnings():
        # It tells that a target is minimised, which is meant, and that few trials say little, which the spread says.
        warnings.simplefilter("ignore")
        found = PedAnovaImportanceEvaluator(target_quantile=TARGET).evaluate(
            study, params=list(keys), target=lambda trial: losses[trial.number]
        )
    total = sum(found.values())
    return {key: found[key] / total if total > 0 else 0.0 for key in keys}
