"""Runs side by side: those that differ by their seed alone are one row, and rows are compared where seeds match."""

import difflib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.grammar import ConfigError
from kd.evaluation.paired import interval, verdict
from tuning.options import LITTLE
from tuning.tracked import FINISHED, PREFIXES, Tracked

WIDEST = 40
"""Letters of a setting's value in the table."""
DRAWN = 10
"""Rows with a colour of their own in the picture."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration."""

    name: str
    """Of its first run."""
    runs: Mapping[int | None, Tracked]
    """By seed; of several runs with one seed the last."""
    differs: Mapping[str, str]
    """Its settings that are not the same in all rows; `-` for one that it lacks. A whole section that some rows lack is
    one entry, `as set` where it is."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A metric of a row, less the first row's, over the seeds that both have."""

    mean: float
    pairs: int
    low: float | None
    high: float | None
    """95 % interval of the mean; null with one pair."""
    verdict: str


def rows(runs: Sequence[Tracked]) -> list[Row]:
    """One per configuration of the finished runs, in the order in which each first came."""
    groups: dict[tuple[tuple[str, str], ...], list[Tracked]] = {}
    for run in runs:
        if run.status == FINISHED:
            groups.setdefault(tuple(sorted(run.settings.items())), []).append(run)
    keys = sorted({key for settings in groups for key, _ in settings})
    settings = [dict(group) for group in groups]
    varied = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    names = _folded(varied, settings)
    return [
        Row(
            name=group[0].name,
            runs={run.seed: run for run in group},
            differs={name: (one[key] if name == key else "as set") if key in one else "-" for name, key in names},
        )
        for one, group in zip(settings, groups.values(), strict=True)
    ]


def _folded(varied: Sequence[str], settings: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """What to show with a key that stands for it: a method or teacher that some runs lack and all others have alike is
    one line, `distill.scalekd`, not one per setting."""
    together: dict[tuple[str, tuple[bool, ...]], list[str]] = {}
    for key in varied:
        if len({one[key] for one in settings if key in one}) == 1:
            section = ".".join(key.split(".")[:2])
            together.setdefault((section, tuple(key in one for one in settings)), []).append(key)
    folded = {key: section for (section, _), keys in together.items() if len(keys) > 1 for key in keys}
    told = {folded.get(key, key): key for key in reversed(varied)}
    return [(name, told[name]) for name in dict.fromkeys(folded.get(key, key) for key in varied)]


def require_metrics(told: Sequence[Row], metrics: Sequence[str]) -> None:
    """ConfigError for a metric that no run has."""
    known = sorted({_plain(key) for row in told for run in row.runs.values() for key in run.metrics})
    for name in metrics:
        if all(run.metric(name) is None for row in told for run in row.runs.values()):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            values = [key for key in known if not key.startswith(("loss", "time", "system", "share", "lr"))]
            raise ConfigError(f"no run has a metric {name!r}{hint} (known here: {', '.join(values)})")


def _plain(key: str) -> str:
    return next(key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix))


def gap(row: Row, base: Row, metric: str) -> Gap | None:
    """None where no seed is in both with a value."""
    pairs = [
        (mine, theirs)
        for seed, run in row.runs.items()
        if seed is not None and seed in base.runs
        if (mine := run.metric(metric)) is not None and (theirs := base.runs[seed].metric(metric)) is not None
    ]
    gains = [mine - theirs for mine, theirs in pairs]
    if not gains:
        return None
    low, high = interval(gains) or (None, None)
    sign = -1 if metric in LITTLE else 1
    said = verdict([sign * gain for gain in gains])
    return Gap(mean=statistics.mean(gains), pairs=len(gains), low=low, high=high, verdict=said)


def shown(told: Sequence[Row], metrics: Sequence[str]) -> list[dict[str, object]]:
    """The rows in words; the first is what the others are compared to."""
    return [_shown(row, told[0], metrics) for row in told]


def _shown(row: Row, base: Row, metrics: Sequence[str]) -> dict[str, object]:
    cells: dict[str, object] = {"run": row.name, "seeds": ", ".join(str(seed) for seed in row.runs)}
    for metric in metrics:
        values = [v for run in row.runs.values() if (v := run.metric(metric)) is not None]
        cells[metric] = f"{statistics.mean(values):.2f}" if values else "-"
        found = None if row is base else gap(row, base, metric)
        cells[f"{metric}, difference"] = "-" if found is None else _told(found)
    found = None if row is base else gap(row, base, metrics[0])
    cells["verdict"] = "compared to" if row is base else "no pair" if found is None else found.verdict
    cells["settings that differ"] = "\n".join(f"{key} {_cut(value)}" for key, value in row.differs.items()) or "-"
    return cells


def _told(found: Gap) -> str:
    between = "" if found.low is None else f" [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{found.mean:+.2f}{between} ({found.pairs})"


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def picture(
    told: Sequence[Row], curves: Mapping[str, Mapping[str, Mapping[int, float]]], metrics: Sequence[str], path: Path
) -> Path:
    """A PNG with a panel per metric: each row's mean over seeds and the range of these.

    `curves`: metric -> run id -> step -> value.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(metrics), 4.2), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for place, row in enumerate(told):
            own = [curves[metric][run.run_id] for run in row.runs.values() if curves[metric].get(run.run_id)]
            steps = sorted(set.intersection(*map(set, own))) if own else []
            if not steps:
                continue
            values = [[curve[step] for curve in own] for step in steps]
            colour = colormaps["tab10"](place) if place < DRAWN else "lightgrey"
            label = f"{row.name} ({len(own)})".replace("$", r"\$") if place < DRAWN else None
            style = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.6}
            axes.plot(steps, [statistics.mean(v) for v in values], label=label, **style)
            axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)
        axes.set_xlabel("steps")
        axes.set_ylabel(metric.replace("$", r"\$"))
        axes.grid(color="#e8eaed")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(fontsize=8, title="run (seeds): mean and range", title_fontsize=8)
    figure.savefig(path, format="png")
    return path
