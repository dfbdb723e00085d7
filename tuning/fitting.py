"""Whether every value of a space fits the student and its teachers: what a method refuses once it is built (heads that
do not divide a width, a level that is not there) is told before the first trial, for all values at once."""

from collections.abc import Callable
from typing import Any

from cluster.config import RunConfig, check
from cluster.grammar import ConfigError, to_text
from cluster.pairs import require_fitting_pairs
from data_sharding.record import Category
from tuning.distributions import Real
from tuning.plan import Plan


def require_fitting(plan: Plan, categories: Callable[[RunConfig], tuple[Category, ...]]) -> None:
    """One forward on a blank image for every value that may change a shape. ConfigError with all that are refused;
    `categories`: of a run's data."""
    refused: dict[str, str] = {}
    for draw in _shapes(plan):
        config = check(plan.recipe_of(plan.name, 0, plan.space.changes(draw)), "draw")
        try:
            require_fitting_pairs(config, categories(config))
        except ConfigError as error:
            told = ", ".join(f"{key}={to_text(value)}" for key, value in draw.items())
            refused.setdefault(str(error), told)
    if refused:
        lines = [f"{draw}: {error}" for error, draw in refused.items()]
        raise ConfigError("\n  ".join([f"space {plan.space.name}: {len(lines)} mistake(s)", *lines]))


def _shapes(plan: Plan) -> list[dict[str, Any]]:
    """The draws that stand for all others, weights and rates left at one value."""
    some = {key.name: key.distribution.probes()[0] for key in plan.space.keys if isinstance(key.distribution, Real)}
    found: list[dict[str, Any]] = []
    for draw in plan.space.probes():
        one = {**draw, **{name: value for name, value in some.items() if name in draw}}
        if one not in found:
            found.append(one)
    return found
