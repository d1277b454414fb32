"""Pictures with made-up values: whole labels, no overlaps, marks that differ in grey too."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from sklearn.decomposition import PCA

from prompt_lab.analysis.plots import (
    BARS,
    DASHES,
    FILLS,
    MARKERS,
    MOST_BARS,
    PAGE,
    Series,
    dimension_curves,
    principal_components,
    save_figure,
    save_task_bars,
    step_curves,
    task_bars,
    vector_map,
)

LONG = "blimp-determiner_noun_agreement_with_adj_irregular_1"
TASKS = [LONG, *(f"tweet_eval-stance_number_{at}" for at in range(19))]
NOTE = "error bars: standard deviation (ddof 1) over a task's samples and seeds, mean over tasks"


def series(size: int, count: int, name: str = "prompt tuning, subspace, dim") -> list[Series]:
    rng = random.Random(0)
    return [
        Series(
            f"{name} {at}",
            [rng.uniform(0, 1) for _ in range(size)],
            [rng.uniform(0, 0.1) for _ in range(size)],
        )
        for at in range(count)
    ]


def texts(figure: Figure) -> Iterator[Text]:
    """All texts that can be seen; labels of ticks beyond the axes are not drawn."""
    figure.draw_without_rendering()
    beyond = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks()
            beyond += [tick.label1 for tick in ticks if not low <= tick.get_loc() <= high]
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in beyond:
            yield text


def assert_readable(figure: Figure) -> None:
    """Every text lies within the picture, and no two overlap."""
    page = figure.bbox
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    for word, box in boxes:
        assert page.x0 - 1 <= box.x0 <= box.x1 <= page.x1 + 1, f"{word!r} is cut"
        assert page.y0 - 1 <= box.y0 <= box.y1 <= page.y1 + 1, f"{word!r} is cut"
    for at, (word, box) in enumerate(boxes):
        for other_word, other in boxes[at + 1 :]:
            shared = min(box.x1, other.x1) - max(box.x0, other.x0) > 1
            assert not (shared and min(box.y1, other.y1) - max(box.y0, other.y0) > 1), (
                f"{word!r} and {other_word!r} overlap"
            )


# ---- bars ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, MOST_BARS])
def test_bars_of_20_tasks_have_whole_names_that_do_not_overlap(count):
    figure = task_bars(TASKS, series(20, count), "test score", NOTE, level=0.5)
    assert_readable(figure)
    names = [label.get_text().replace("\n", "") for label in figure.axes[0].get_yticklabels()]
    assert names == TASKS


@pytest.mark.parametrize("count", [1, 3])
def test_names_of_any_length_and_script_fit(count):
    tasks = ["x" * 120, "W" * 60, "$a_b$ ^{c}", "r\u00e9sum\u00e9 \u00fc\u00df"]
    figure = task_bars(tasks, series(4, count, "W" * 100), "score", NOTE * 3)
    assert_readable(figure)


def test_bars_are_as_long_as_the_values_and_a_cross_marks_what_is_missing():
    drawn = [Series("a", [0.5, math.nan, -0.25], [0.1, 0.1, math.nan])]
    axes = task_bars(TASKS[:3], drawn, "score").axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.0, -0.25]
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert list(np.asarray(cross.get_ydata())) == [1.0]
    tops = [bar.get_y() for bar in axes.patches]
    assert tops == sorted(tops)
    assert axes.yaxis.get_inverted()  # the first task is on top


def test_a_layout_that_is_drawn_twice_stays():
    figure = task_bars(TASKS, series(20, 2), "score", NOTE)
    figure.draw_without_rendering()
    first = figure.axes[0].get_position().bounds
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().bounds == pytest.approx(first, abs=1e-3)


def test_no_two_kinds_of_bars_look_alike_in_grey():
    """Grey is the luminance of Rec. 601; kinds of one hatch are at least 0.2 apart."""
    from matplotlib.colors import to_rgb

    kinds = [(float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114))), h) for colour, h in BARS]
    for at, (grey, hatch) in enumerate(kinds):
        for other, other_hatch in kinds[at + 1 :]:
            assert hatch != other_hatch or abs(grey - other) > 0.2


def test_many_tasks_and_series_go_on_several_pages(tmp_path: Path):
    tasks = [f"task {at}" for at in range(PAGE + 1)]
    names = [path.name for path in save_task_bars(tasks, series(21, 9), "x", "", tmp_path / "a.b")]
    assert names == [f"a.b-{page}.{kind}" for page in (1, 2, 3, 4) for kind in ("png", "svg")]
    (first, *_) = save_task_bars(tasks[:2], series(2, 1), "x", "", tmp_path / "a.b")
    assert first.name == "a.b.png"


# ---- curves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8])
def test_curves_over_the_dimension_are_readable(count):
    figure = dimension_curves(
        [5, 10, 50, 100, 250], series(5, count), "E_rel against it", NOTE, ("prompt tuning", 1.0)
    )
    assert_readable(figure)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["5", "10", "50", "100", "250"]


def test_many_dimensions_do_not_overlap():
    assert_readable(dimension_curves(list(range(1000, 1030)), series(30, 2), "score", NOTE))


def test_curves_pass_through_the_values_and_differ_in_marker_and_dashes():
    drawn = series(3, 4)
    axes = dimension_curves([5, 10, 50], drawn, "score").axes[0]
    lines = [container.lines[0] for container in axes.containers]
    assert [list(np.asarray(line.get_ydata())) for line in lines] == [one.values for one in drawn]
    marks = {(line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(marks) == 4
    assert len(set(MARKERS)) == 8
    assert len(set(DASHES)) == 4
    for line in lines:  # side by side, less than a quarter of the distance between dimensions
        assert np.abs(np.asarray(line.get_xdata(), dtype=float) - [0, 1, 2]).max() < 0.25


def test_error_bars_reach_one_deviation_to_both_sides():
    axes = dimension_curves([5, 10], [Series("a", [0.5, 0.7], [0.1, math.nan])], "score").axes[0]
    (container,) = axes.containers
    (first, *_) = container.lines[2][0].get_segments()
    assert [y for _, y in first] == pytest.approx([0.4, 0.6])


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("steps", [1, 4, 61])
def test_curves_over_steps_are_readable(steps, count):
    names = series(steps, count, "maml from mpt/both_to_non_cls/source")
    assert_readable(step_curves(range(0, 50 * steps, 50), names, "mean dev score", NOTE))


def test_curves_over_steps_pass_through_the_values_and_skip_missing_ones():
    drawn = [Series("a", [0.1, math.nan, 0.3], [math.nan] * 3), series(3, 1)[0]]
    axes = step_curves([0, 50, 100], drawn, "dev").axes[0]
    one, other = (line for line in axes.lines if line.get_linestyle() != "None")
    assert list(np.asarray(one.get_xdata())) == [0, 100]
    assert list(np.asarray(one.get_ydata())) == [0.1, 0.3]
    assert list(np.asarray(other.get_xdata())) == [0, 50, 100]
    assert one.get_marker() != other.get_marker()
    assert one.get_linestyle() != other.get_linestyle()


def test_error_bars_of_curves_over_many_steps_take_turns():
    """Each stands at a step of its own line, and no two lines share one."""
    drawn = series(60, 4)
    axes = step_curves(range(60), drawn, "dev").axes[0]
    seen: set[float] = set()
    for one, container in zip(drawn, axes.containers, strict=True):
        bars = container.lines[2][0].get_segments()
        for (x, low), (_, high) in bars:
            at = round(x)
            assert x == at
            assert (low + high) / 2 == pytest.approx(one.values[at])
            assert (high - low) / 2 == pytest.approx(one.std[at])
        places = {x for (x, _), _ in bars}
        assert len(places) == 10
        assert not places & seen
        seen |= places


# ---- vectors -------------------------------------------------------------------------------------


def vectors(rows: int = 40, size: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, size)) * np.arange(1, size + 1)


def test_components_are_those_of_scikit_learn():
    """Reference: PCA of scikit-learn, whose signs are free."""
    points, shares = principal_components(vectors())
    reference = PCA(2).fit(vectors())
    expected = reference.transform(vectors())
    signs = np.sign((points * expected).sum(0))
    assert points == pytest.approx(expected * signs, abs=1e-10)
    assert shares == pytest.approx(reference.explained_variance_ratio_, abs=1e-12)


def test_one_number_per_vector_and_equal_vectors_have_no_second_component():
    points, shares = principal_components(np.array([[1.0], [3.0]]))
    assert points == pytest.approx(np.array([[-1.0, 0.0], [1.0, 0.0]]))
    assert shares == (1.0, 0.0)
    assert principal_components(np.ones((3, 4)))[1] == (0.0, 0.0)


def test_the_map_tells_groups_by_shape_and_sets_by_filling():
    groups = ["cls", "qa", "cg", "other"] * 10
    sets = ["source"] * 30 + ["target"] * 10
    figure = vector_map(vectors(), groups, sets, NOTE)
    assert_readable(figure)
    marks = [(line.get_marker(), line.get_fillstyle()) for line in figure.axes[0].lines]
    shapes = dict(zip(("cls", "qa", "cg", "other"), MARKERS, strict=False))
    fills = dict(zip(("source", "target"), FILLS, strict=False))
    assert marks == [(shapes[g], fills[s]) for g, s in zip(groups, sets, strict=True)]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["cls", "qa", "cg", "other", "source", "target"]


# ---- files ---------------------------------------------------------------------------------------


def test_figures_become_png_and_svg_with_equal_bytes_each_time(tmp_path: Path):
    for name in ("one", "two"):
        written = save_figure(task_bars(TASKS, series(20, 3), "score", NOTE), tmp_path / name)
        assert written == [tmp_path / f"{name}.png", tmp_path / f"{name}.svg"]
    assert (tmp_path / "one.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()[:1000]
    for kind in ("png", "svg"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()


def test_a_dot_in_the_name_of_a_file_stays(tmp_path: Path):
    figure = dimension_curves([5], series(1, 1), "score")
    assert save_figure(figure, tmp_path / "lr0.3")[0].name == "lr0.3.png"


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: task_bars(TASKS, [], "score"), "nothing to draw"),
        (lambda: task_bars([], series(0, 1), "score"), "nothing to draw"),
        (lambda: task_bars(TASKS, series(3, 1), "score"), "of which there are 20"),
        (lambda: task_bars(TASKS, series(20, MOST_BARS + 1), "score"), "at most 8 at a time"),
        (lambda: dimension_curves([5], series(2, 1), "score"), "of which there are 1"),
        (lambda: step_curves([], series(0, 1), "score"), "nothing to draw"),
        (lambda: step_curves([5], series(2, 1), "score"), "per step, of which there are 1"),
        (lambda: save_task_bars(TASKS, series(3, 1), "x", "", Path("a")), "of which there are 20"),
        (lambda: vector_map(vectors()[:1], ["a"], ["b"]), "at least two rows"),
        (lambda: vector_map(vectors() * np.nan, ["a"] * 40, ["b"] * 40), "not finite"),
        (lambda: vector_map(vectors(), ["a"] * 39, ["b"] * 40), "39 groups"),
        (lambda: vector_map(vectors(5), ["a"] * 5, list("vwxyz")), "5 sets"),
    ],
)
def test_bad_input_is_refused_in_one_line(draw, message):
    with pytest.raises(ValueError, match=message) as caught:
        draw()
    assert "\n" not in str(caught.value)
