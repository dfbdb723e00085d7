"""Figures of single keys: how much each decides, and the objective against its values."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tuning import findings, response
from tuning.distributions import Choice, Real, Whole, read
from tuning.drawing import (
    BLUE,
    DARK,
    GREY,
    ORANGE,
    RED,
    interval,
    legend,
    limits,
    new_figure,
    noise_bar,
    plain_line,
    words,
)
from tuning.findings import Level
from tuning.importance import Importance
from tuning.trials import Found, Trial


def importance(rows: Sequence[Importance], names: Mapping[str, str], trials: int) -> Figure:
    """A bar per key with its spread, and what luck gives."""
    figure, axes = new_figure(1.3 + 0.38 * len(rows))
    for height, one in enumerate(reversed(rows)):
        axes.barh(height, one.share, color=BLUE if one.told_from_luck else GREY, alpha=0.75, height=0.6)
        axes.plot([one.low, one.high], [height, height], color=DARK, linewidth=1.5)
        axes.plot([one.luck] * 2, [height - 0.38, height + 0.38], color=RED, linewidth=2)
    axes.plot([], [], color=DARK, label="spread (10 to 90 %)")
    axes.plot([], [], color=RED, linewidth=2, label="what luck gives (90 %)")
    plain = [names[one.key].replace("$", r"\$") for one in reversed(rows)]
    having = ["" if one.trials == trials else f" ({one.trials})" for one in reversed(rows)]
    labels = [name + count for name, count in zip(plain, having, strict=True)]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlim(left=0)
    axes.set_xlabel("share of what all keys decide")
    legend(figure)
    return figure


def of_key(found: Found, at: Level, key: str, name: str) -> Figure:
    """The objective against one key, with what remains of it when the other keys are averaged over. All keys share
    one vertical axis and one legend, which is not in here."""
    figure, axes = new_figure(3.2)
    plain = findings.plain_values(found, at.step)
    axes.set_ylim(limits([*at.values.values(), *plain]))
    trials = [found.trials[n] for n in at.values if key in found.trials[n].settings]
    drawn, values = [t.settings[key] for t in trials], [at.values[t.number] for t in trials]
    shape = read(found.search.keys[key])
    if isinstance(shape, Choice):
        _choice(axes, shape.values, drawn, values, trials)
    else:
        assert isinstance(shape, Real | Whole)
        _scale(axes, found, drawn, values, trials, shape)
    plain_line(axes, plain)
    noise_bar(axes, found)
    axes.set_xlabel(name.replace("$", r"\$"))
    axes.set_ylabel(f"{found.search.objectives[0].name} at step {at.step}")
    return figure


def _scale(
    axes: Axes, found: Found, drawn: list[Any], values: list[float], trials: list[Trial], shape: Real | Whole
) -> None:
    """Over the whole range of the space: where nothing was tried, too."""
    log = isinstance(shape, Real) and shape.log
    if log:
        axes.set_xscale("log")
        stretch = (shape.high / shape.low) ** 0.03
        axes.set_xlim(shape.low / stretch, shape.high * stretch)
    else:
        stretch = 0.03 * (shape.high - shape.low)
        axes.set_xlim(shape.low - stretch, shape.high + stretch)
    _dots(axes, drawn, values, trials)
    noise = findings.noise(found)
    curve = response.smooth(drawn, values, log=log, least_noise=noise.deviation if noise else 0.0)
    if curve is not None:
        axes.plot(curve.at, curve.mean, color=ORANGE, linewidth=2, label="smoothed mean")
        axes.fill_between(curve.at, curve.low, curve.high, color=ORANGE, alpha=0.2, linewidth=0, label="95 % band")


def _choice(axes: Axes, possible: Sequence[Any], drawn: list[Any], values: list[float], trials: list[Trial]) -> None:
    told = response.groups(possible, drawn, values)
    place = {findings.as_text(group.value): number for number, group in enumerate(told)}
    # Side by side by the trial's number, so that equal values do not hide each other.
    _dots(axes, [place[findings.as_text(v)] + (t.number % 7 - 3) * 0.04 for v, t in zip(drawn, trials, strict=True)],
          values, trials)  # fmt: skip
    for number, group in enumerate(told):
        if group.low is not None and group.high is not None:
            interval(axes, number + 0.25, (group.low, group.high), upright=True, color=ORANGE, linewidth=2)
        label = None if number else "mean, 95 %"
        axes.plot(number + 0.25, group.mean, "D", color=ORANGE, markersize=6, label=label)
    labels = [words(findings.as_text(group.value)) + f"\n{len(group.values)}x" for group in told]
    long = max(map(len, labels), default=0) * len(labels) > 60
    axes.set_xticks(range(len(told)), labels, rotation=25 if long else 0, ha="right" if long else "center")
    axes.set_xlim(-0.5, len(told) - 0.4)


def _dots(axes: Axes, at: Sequence[float], values: Sequence[float], trials: Sequence[Trial]) -> None:
    size = 5.0 if len(trials) < 60 else 3.5
    for state, fill, label in (("finished", BLUE, "went to the end"), ("stopped", "white", "stopped early")):
        chosen = [i for i, trial in enumerate(trials) if trial.state == state]
        if chosen:
            axes.plot([at[i] for i in chosen], [values[i] for i in chosen], "o", color=BLUE, markerfacecolor=fill,
                      markersize=size, alpha=0.7, linewidth=0, label=label)  # fmt: skip
