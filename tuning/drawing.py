"""What all figures of a report share: one size, so that a phone shows them one by one and a screen side by side."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tuning import findings
from tuning.trials import Found

SIZE = (5.2, 3.5)
BLUE, ORANGE, GREEN, RED, GREY, DARK = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#9aa0a6", "#333333"
LONGEST = 16
"""Letters of a value on an axis."""


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


def plain_line(axes: Axes, values: Sequence[float]) -> None:
    """The plain student's mean and the range of its seeds."""
    if values:
        axes.axhline(sum(values) / len(values), color=DARK, linestyle="--", linewidth=1.2, label="plain student")
        axes.axhspan(min(values), max(values), color=DARK, alpha=0.1, linewidth=0)


def noise_bar(axes: Axes, found: Found) -> None:
    """How far seeds alone part, as a bar at the right edge: one standard deviation to each side."""
    noise = findings.noise(found)
    if noise is None:
        return
    across, (low, high) = axes.get_xlim(), axes.get_ylim()
    middle = low + 0.5 * (high - low)
    axes.errorbar(
        [1.02], [middle], yerr=[noise.deviation], color=RED, capsize=3, transform=axes.get_yaxis_transform(),
        clip_on=False, label="between seeds, +-1 sd",
    )  # fmt: skip
    axes.set_xlim(across)
    axes.set_ylim(low, high)


def legend(axes: Axes) -> None:
    """Of what has a label, where there is room."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7.5, frameon=True, framealpha=0.85, edgecolor="none", loc="best")


def words(text: str) -> str:
    """Short, and with dollars that begin no formula."""
    short = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return short.replace("$", r"\$")
