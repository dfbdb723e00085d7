"""What the figures of a report show is readable: legends beside the data, intervals that end at their axis."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.tuning.finished_search import finished
from tuning import drawing, findings, key_figures, report_figures


def figures(trials: int) -> dict[str, Figure]:
    found = finished(trials=trials, latency=True)
    level = findings.level(found)
    assert level is not None
    keys = {key: key_figures.of_key(found, level, key, key) for key in found.search.keys}
    return {
        "curves": report_figures.learning_curves(found),
        "cost": report_figures.cost(found),
        "seeds": report_figures.contenders(found),
        "front": report_figures.pareto(found),
        **keys,
    }


@pytest.mark.parametrize("trials", [3, 40])
def test_no_legend_lies_on_the_data(trials: int) -> None:
    for name, figure in figures(trials).items():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        (axes,) = figure.axes
        assert axes.get_legend() is None, name
        for legend in figure.legends:
            assert not legend.get_window_extent().overlaps(axes.get_window_extent()), name
            assert legend.get_window_extent().x0 >= 0, name
            assert legend.get_window_extent().x1 <= figure.bbox.x1, name


@pytest.mark.parametrize("trials", [3, 40])
def test_keys_share_one_axis_and_one_legend(trials: int) -> None:
    keys = [figure for name, figure in figures(trials).items() if "." in name]
    assert len({figure.axes[0].get_ylim() for figure in keys}) == 1
    assert not any(figure.legends for figure in keys)
    (legend,) = drawing.legend_alone(keys).legends
    told = [text.get_text() for text in legend.get_texts()]
    assert len(told) == len(set(told))
    assert {"went to the end", "plain student"} <= set(told)


def test_an_interval_wider_than_its_axis_ends_there_with_arrows() -> None:
    _, axes = drawing.new_figure()
    axes.set_ylim(10, 20)
    drawing.interval(axes, 1.0, (12.0, 18.0), upright=True, color="k")
    assert len(axes.lines) == 1
    drawing.interval(axes, 2.0, (-300.0, 18.0), upright=True, color="k")
    line, arrow = axes.lines[1:]
    assert np.asarray(line.get_xydata()).tolist() == [[2.0, 10.0], [2.0, 18.0]]
    assert (arrow.get_marker(), np.asarray(arrow.get_xydata()).tolist()) == ("v", [[2.0, 10.0]])
    assert axes.get_ylim() == (10, 20)


def test_trials_that_were_evaluated_once_are_dots() -> None:
    found = finished(trials=3)
    ends = tuple(replace(t, curve=t.curve[-1:]) for t in found.trials)
    (axes,) = report_figures.learning_curves(replace(found, trials=ends)).axes
    drawn = [line for line in axes.lines if np.asarray(line.get_xdata()).tolist() == [found.search.steps]]
    assert len(drawn) == 4  # three trials and the plain student
    assert all(line.get_marker() != "None" for line in drawn)


def test_an_axis_holds_all_values_and_intervals_only_as_far_as_values_stay_apart() -> None:
    low, high = drawing.limits([1.0, 2.0], [0.9, 500.0])
    assert low < 0.9
    assert 2.0 < high < 3.0
    low, high = drawing.limits([5.0])
    assert low < 5.0 < high
