"""The figures of a search's report that are not about single keys."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tuning import findings, response
from tuning.drawing import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    RED,
    interval,
    legend,
    limits,
    new_figure,
    noise_bar,
    plain_line,
)
from tuning.trials import Found, Trial, better

NAMED = 3
"""Curves with a legend of their own."""


def learning_curves(found: Found) -> Figure:
    """Every trial's objective over its steps, with where and how it ended."""
    figure, axes = new_figure()
    name = found.search.objectives[0].name
    searched = found.of_role("search", "warmup")
    best = better(found.search.objectives[0], findings.finished(found.of_role("search")))[:NAMED]
    thin = max(0.25, min(1.0, 12 / max(1, len(searched))))
    for trial in searched:
        steps, values = _whole(trial, name, found)
        if trial not in best and steps:
            colour = {"finished": BLUE, "failed": RED}.get(trial.state, GREY)
            axes.plot(steps, values, _line(steps), color=colour, linewidth=0.9, alpha=thin)
            if trial.state in ("stopped", "failed"):
                axes.plot(steps[-1], values[-1], "x", color=colour, markersize=5)
    for trial, colour in zip(best, (ORANGE, GREEN, BLUE), strict=False):
        steps, values = _whole(trial, name, found)
        axes.plot(steps, values, _line(steps), color=colour, linewidth=2, label=f"trial {trial.number}")
    _plain_curve(axes, found, name)
    for state, colour in (("stopped", GREY), ("failed", RED)):
        if any(t.state == state and _curve(t, name)[0] for t in searched):
            axes.plot([], [], "x", color=colour, label=f"{state} here")
    if 0 < found.search.grace < found.search.steps:
        axes.axvline(found.search.grace, color=DARK, linewidth=0.8, linestyle=":", label="none is stopped before")
    axes.set_xlabel("steps")
    axes.set_ylabel(name)
    axes.set_xlim(0, found.search.steps * 1.02)
    noise_bar(axes, found)
    legend(figure)
    return figure


def _line(steps: Sequence[int]) -> str:
    """Of a trial that was evaluated once there is a dot."""
    return "-" if len(steps) > 1 else "o"


def _curve(trial: Trial, name: str) -> tuple[list[int], list[float]]:
    points = [(p.step, p.values[name]) for p in trial.curve if name in p.values]
    return [step for step, _ in points], [value for _, value in points]


def _whole(trial: Trial, name: str, found: Found) -> tuple[list[int], list[float]]:
    """The curve with the point of its origin from which it went on."""
    steps, values = _curve(trial, name)
    if trial.origin is None or not steps:
        return steps, values
    before = [(s, v) for s, v in zip(*_curve(found.trials[trial.origin], name), strict=True) if s < steps[0]][-1:]
    return [s for s, _ in before] + steps, [v for _, v in before] + values


def _plain_curve(axes: Axes, found: Found, name: str) -> None:
    curves = [dict(zip(*_curve(t, name), strict=True)) for t in found.of_role("plain") if t.state == "finished"]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not steps:
        return
    rows = [[curve[step] for curve in curves] for step in steps]
    label = f"plain student, {len(curves)} seed{'s' * (len(curves) > 1)}"
    means = [sum(row) / len(row) for row in rows]
    axes.plot(steps, means, "--" if len(steps) > 1 else "*", color=DARK, linewidth=1.5, label=label)
    axes.fill_between(steps, [min(r) for r in rows], [max(r) for r in rows], color=DARK, alpha=0.12, linewidth=0)


def cost(found: Found) -> Figure:
    """The best value so far against what the search had cost."""
    figure, axes = new_figure()
    objective = found.search.objectives[0]
    told = findings.progress(found)
    unit, divisor = ("hours", 3600) if told and told[-1].seconds > 2 * 3600 else ("minutes", 60)
    ends = [(s.seconds / divisor, s.trial.value(objective.name)) for s in told if findings.finished([s.trial])]
    axes.plot([x for x, v in ends if v is not None], [v for _, v in ends if v is not None], "o", color=BLUE, alpha=0.4,
              markersize=4, label="finished trial", linewidth=0)  # fmt: skip
    line = [(s.seconds / divisor, s.best) for s in told if s.best is not None]
    if line:
        axes.step(*zip(*line, strict=True), where="post", color=BLUE, linewidth=2, label="best so far")
    plain = findings.plain_values(found)
    axes.set_ylim(limits([*(v for _, v in ends if v is not None), *plain], _over_seeds(found)))
    plain_line(axes, plain)
    _contenders_at_end(axes, found, told[-1].seconds / divisor if told else 0.0)
    axes.set_xlabel(f"{'processor ' if found.search.clock == 'processor' else ''}{unit} of all trials so far")
    axes.set_ylabel(objective.name)
    axes.set_xlim(left=0)
    noise_bar(axes, found)
    legend(figure)
    return figure


def _contenders_at_end(axes: Axes, found: Found, end: float) -> None:
    """What the chosen ones are worth over seeds: the best of many is lucky, too."""
    for place, one in enumerate(found.conclusion.contenders if found.conclusion else ()):
        spread = response.mean_interval(one.values)
        if spread is not None:
            at = end * (1.03 + 0.03 * place)
            interval(axes, at, spread, upright=True, color=ORANGE, linewidth=1.5)
            axes.plot(at, one.mean, "D", color=ORANGE, markersize=5, label=None if place else "chosen, over seeds")


def _over_seeds(found: Found) -> list[float]:
    """The means of the chosen ones, and the ends of their intervals."""
    told: list[float] = []
    for one in found.conclusion.contenders if found.conclusion else ():
        told += [one.mean, *(response.mean_interval(one.values) or ())]
    return told


def contenders(found: Found) -> Figure:
    """Each configuration that was looked at again, seed by seed, and the plain student."""
    assert found.conclusion is not None
    rows: list[tuple[str, Sequence[float], str]] = [
        (f"trial {one.number}", one.values, BLUE) for one in found.conclusion.contenders
    ]
    plain = findings.plain_values(found)
    rows += [("plain student", plain, DARK)] if plain else []
    figure, axes = new_figure(1.3 + 0.42 * len(rows))
    spreads = [end for _, values, _ in rows for end in response.mean_interval(values) or ()]
    axes.set_xlim(limits([value for _, values, _ in rows for value in values], spreads))
    for height, (_, values, colour) in enumerate(reversed(rows)):
        spread = response.mean_interval(values)
        if spread is not None:
            interval(axes, height, spread, upright=False, color=colour, linewidth=2.5, alpha=0.35)
        axes.plot(values, [height] * len(values), "o", color=colour, markersize=5, alpha=0.7)
        axes.plot(sum(values) / len(values), height, "|", color=colour, markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"{found.search.objectives[0].name}: each seed, mean and its 95 % interval")
    return figure


def pareto(found: Found) -> Figure:
    """The first two objectives of finished trials, and those that no other one beats in both."""
    figure, axes = new_figure()
    first, second = found.search.objectives[:2]
    best = findings.front((first, second), found.of_role("search"))
    for trials, colour, style, label in (
        (findings.finished(found.of_role("search")), GREY, "o", "finished trial"),
        (best, ORANGE, "o-", "none is better in both"),
        (findings.finished(found.of_role("plain")), DARK, "*", "plain student"),
    ):
        pairs = [(t.value(second.name), t.value(first.name)) for t in trials]
        whole = [pair for pair in pairs if None not in pair]
        if whole:
            axes.plot(*zip(*whole, strict=True), style, color=colour, markersize=8 if style == "*" else 5, label=label)
    axes.set_xlabel(f"{second.name} ({'less' if second.goal == 'min' else 'more'} is better)")
    axes.set_ylabel(first.name)
    legend(figure)
    return figure
