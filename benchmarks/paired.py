"""Tables of runs that were made in pairs: the same views and seeds, once with and once without a method."""

from collections.abc import Mapping, Sequence

from kd.evaluation.paired import interval, verdict


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
