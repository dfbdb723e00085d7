"""What a few runs in pairs can say: the same views and seeds, once with and once without something."""

import math
from collections.abc import Sequence

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""
MOST_PAIRS = len(T_QUANTILES) + 1


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t-interval of the mean of paired differences; None for fewer than two of them.

    Raises ValueError for more than ten.
    """
    count = len(differences)
    if count < 2:
        return None
    if count > MOST_PAIRS:
        raise ValueError(f"t quantiles are known for up to {MOST_PAIRS} pairs, got {count}")
    mean = sum(differences) / count
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1))
    half = T_QUANTILES[count - 2] * deviation / math.sqrt(count)
    return mean - half, mean + half


def verdict(differences: Sequence[float]) -> str:
    """`better` or `worse` where the interval excludes zero, `no difference` where it does not."""
    found = interval(differences)
    if found is None:
        return "one pair says nothing" if differences else "no pair"
    return "better" if found[0] > 0 else "worse" if found[1] < 0 else "no difference"
