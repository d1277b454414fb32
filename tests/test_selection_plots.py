"""Pictures of the choice of source tasks: readable, and true to their numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from test_plots import assert_readable

from prompt_lab.analysis.interpretation_plots import heatmap, norm_violins
from prompt_lab.analysis.selection_plots import method_curves, spread_marks, token_map
from prompt_lab.analysis.transfer_table import spread

LONG = [f"selection-winogrande_with_a_long_name_of_task_{at}" for at in range(13)]


@pytest.mark.parametrize("count", [1, 2, 13])
def test_means_stand_with_deviation_and_interval(count):
    rng = np.random.default_rng(0)
    values = [rng.normal(size=10) for _ in range(count - 1)] + [np.array([1.5])]
    figure = spread_marks(
        LONG[:count], [spread(own) for own in values], "relative transfer", "note"
    )
    assert_readable(figure)
    axes = figure.axes[0]
    for marks in axes.containers:
        points = marks[0].get_xdata()
        np.testing.assert_allclose(points, [own.mean() for own in values])
    if count > 1:
        first = spread(values[0])
        (std,), (interval,) = (marks[2] for marks in axes.containers)
        ends = [lines.get_segments()[0][:, 0] for lines in (std, interval)]
        np.testing.assert_allclose(ends[0], [first.mean - first.std, first.mean + first.std])
        np.testing.assert_allclose(ends[1], [first.low, first.high])


@pytest.mark.parametrize(("places", "count"), [(1, 1), (2, 2), (13, 14), (60, 20)])
def test_curves_of_many_methods_differ_in_more_than_colour(places, count):
    rng = np.random.default_rng(0)
    curves = {f"method-{at}": rng.uniform(size=places) for at in range(count)}
    curves["method-0"][-1] = math.nan
    steps = list(range(100, 100 * places + 1, 100))
    figure = method_curves(steps, curves, ("step", "nDCG, percent"), "a note", ("random", 0.5))
    assert_readable(figure)
    level, *lines = figure.axes[0].lines
    assert list(level.get_ydata()) == [0.5, 0.5]
    for line, values in zip(lines, curves.values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
    looks = {(line.get_marker(), line.get_linestyle(), line.get_fillstyle()) for line in lines}
    assert len(looks) == count


def test_rows_of_prompts_differ_in_marker_and_colour():
    points = np.random.default_rng(0).normal(size=(12, 2))
    groups = [f"best: {LONG[at % 4]} (71.25)" for at in range(12)]
    figure = token_map(points, groups, "a note " * 30)
    assert_readable(figure)
    lines = figure.axes[0].lines
    assert len({line.get_marker() for line in lines}) == 4
    assert len({to_hex(line.get_color()) for line in lines}) == 4
    np.testing.assert_array_equal(np.transpose(lines[1].get_data()), points[1::4])


def test_violins_show_few_values_one_by_one_and_a_level():
    values = [np.array([-3.0, -2.0, -1.0]), np.linspace(-4, -1, 61), np.array([-2.0])]
    figure = norm_violins(LONG[:3], values, "relative transfer", "note", dots=60, level=0.0)
    assert_readable(figure)
    axes = figure.axes[0]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[-3, -2, -1], [-2]]
    assert axes.get_xlim()[1] >= 0
    plain = norm_violins(LONG[:3], values, "norm").axes[0]
    assert not [line for line in plain.lines if line.get_marker() == "o"]


@pytest.mark.parametrize("size", [(2, 2), (13, 10)])
@pytest.mark.parametrize("label", ["relative transfer\nin percent", "similarity\nunigram-unit"])
def test_maps_of_two_and_of_many_tasks_are_readable(size, label):
    values = np.random.default_rng(0).normal(size=size) * 10
    values[0, 0] = math.nan
    for names in (["a", "b"], LONG):
        if size[0] <= len(names):
            lines, columns = names[: size[0]], names[: size[1]]
            figure = heatmap(
                *(lines, columns, values, label),
                axes_names=("target", "source"),
                form="{:+.1f}",
                note="hatched: no value",
            )
            assert_readable(figure)


def test_pictures_of_nothing_are_refused():
    with pytest.raises(ValueError, match="one or more means"):
        spread_marks([], [], "x")
    with pytest.raises(ValueError, match="value for each of 2 places"):
        method_curves([1, 2], {"a": [1]}, ("x", "y"))
    with pytest.raises(ValueError, match="one or more curves"):
        method_curves([], {}, ("x", "y"))
    with pytest.raises(ValueError, match=r"give \(P, 2\)"):
        token_map(np.ones((2, 3)), ["a", "b"])
