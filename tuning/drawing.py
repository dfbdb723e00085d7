"""What figures of a report share: one size, so that a phone shows them one by one and a screen side by side; legends
below the axes, never on the data; intervals that end at the axis, and say so."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tuning import findings
from tuning.trials import Found

SIZE = (5.2, 3.6)
BLUE, ORANGE, GREEN, RED, GREY, DARK = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#9aa0a6", "#333333"
LONGEST = 16
"""Letters of a value on an axis."""
MARGIN = 0.08
"""Of the range of the values, left free to each side of them."""
WIDEST = 0.5
"""Of the range of the values, by which intervals may widen an axis to each side."""


def new_figure(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    """An empty figure with the report's looks."""
    figure = Figure(figsize=(SIZE[0], height), layout="constrained", dpi=160)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e8eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """As a PNG."""
    figure.savefig(path, format="png")
    return path


def limits(values: Iterable[float], ends: Iterable[float] = ()) -> tuple[float, float]:
    """An axis that shows all values, and the ends of their intervals as far as values stay apart."""
    some = list(values)
    low, high = min(some, default=0.0), max(some, default=1.0)
    air = MARGIN * (high - low) or 0.5
    reach = WIDEST * (high - low) or 0.5
    told = [min(max(end, low - reach), high + reach) for end in ends]
    return min([low, *told]) - air, max([high, *told]) + air


def interval(axes: Axes, at: float, ends: tuple[float, float], *, upright: bool, **style: Any) -> None:
    """A line from end to end, cut at the limits of the axis, with an arrow where it would go on. The limits of that
    axis must be set."""
    low, high = axes.get_ylim() if upright else axes.get_xlim()
    shown = [min(max(end, low), high) for end in ends]
    line = ([at, at], shown) if upright else (shown, [at, at])
    axes.plot(*line, solid_capstyle="butt", **style)
    for end, edge, arrow in ((ends[0], low, "v" if upright else "<"), (ends[1], high, "^" if upright else ">")):
        if not low <= end <= high:
            place = ([at], [edge]) if upright else ([edge], [at])
            axes.plot(*place, arrow, color=style["color"], markersize=5, clip_on=False)


def plain_line(axes: Axes, values: Sequence[float]) -> None:
    """The plain student's mean and the range of its seeds."""
    if values:
        axes.axhline(sum(values) / len(values), color=DARK, linestyle="--", linewidth=1.2, label="plain student")
        axes.axhspan(min(values), max(values), color=DARK, alpha=0.1, linewidth=0)


def noise_bar(axes: Axes, found: Found) -> None:
    """How far seeds alone part, as a bar at the right edge: one standard deviation to each side, at most the axis."""
    noise = findings.noise(found)
    if noise is None:
        return
    across, (low, high) = axes.get_xlim(), axes.get_ylim()
    half = min(noise.deviation, 0.5 * (high - low))
    axes.errorbar(
        [1.02], [0.5 * (low + high)], yerr=[half], color=RED, capsize=3, transform=axes.get_yaxis_transform(),
        clip_on=False, label="between seeds, ±1 sd",
    )  # fmt: skip
    axes.set_xlim(across)
    axes.set_ylim(low, high)


def legend(figure: Figure, *, columns: int = 3) -> None:
    """Of what has a label, below the axes."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7.5, frameon=False)


def legend_alone(figures: Iterable[Figure]) -> Figure:
    """One legend for several figures: every label once."""
    told: dict[str, Any] = {}
    for figure in figures:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        told |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in told}
    alone = Figure(figsize=(SIZE[0], 0.25 + 0.2 * -(-len(told) // 3)), dpi=160)
    alone.legend(list(told.values()), list(told), loc="center", ncols=3, fontsize=8, frameon=False)
    return alone


def words(text: str) -> str:
    """Short, and with dollars that begin no formula."""
    short = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return short.replace("$", r"\$")
