"""Tables of runs that were made in pairs: the same views and seeds, once with and once without a method."""

import math
from collections.abc import Mapping, Sequence

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t-interval of the mean of paired differences; None for fewer than two of them.

    Raises ValueError for more than ten.
    """
    count = len(differences)
    if count < 2:
        return None
    if count - 1 > len(T_QUANTILES):
        raise ValueError(f"t quantiles are known for up to {len(T_QUANTILES) + 1} pairs, got {count}")
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


def table(scores: Mapping[str, Mapping[int, Mapping[str, float]]], base: str, columns: Sequence[str]) -> str:
    """Rows of means and of paired differences to `base` in the first column.

    `scores`: method -> seed -> {column: value}; pairs are the seeds that both have.
    """
    width = max([len("method"), *map(len, scores)])
    head = "  ".join([f"{'method':{width}}", "runs", *(f"{c:>9}" for c in columns), f"{'difference':>10}"])
    lines = [head + "  95 % interval     verdict"]
    for method, by_seed in scores.items():
        means = [sum(run[c] for run in by_seed.values()) / len(by_seed) for c in columns]
        line = "  ".join([f"{method:{width}}", f"{len(by_seed):4}", *(f"{mean:9.2f}" for mean in means)])
        lines.append(line + ("" if method == base else "  " + _difference(by_seed, scores.get(base, {}), columns[0])))
    return "\n".join(lines)


def _difference(
    by_seed: Mapping[int, Mapping[str, float]], base: Mapping[int, Mapping[str, float]], column: str
) -> str:
    differences = [run[column] - base[seed][column] for seed, run in by_seed.items() if seed in base]
    if not differences:
        return f"{'-':>10}"
    found = interval(differences)
    span = f"[{found[0]:+.2f}, {found[1]:+.2f}]" if found else "-"
    return f"{sum(differences) / len(differences):+10.2f}  {span:16}  {verdict(differences)}"
