"""Figures: what they draw, in whose colours, without overlaps, and the same bytes twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from prompt_lab.analysis import plots


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [
        {"line": line.split(",")[0], "label": line, "task": task, "x": x, "y": at + 0.1 * x}
        for at, line in enumerate(["plain", "maml", "subspace, 5 dims", "subspace, 50 dims"])
        for x, task in enumerate(["glue-mnli", "a_task_of_a_very_long_name_that_goes_on", "emo"])
    ]
    return pd.DataFrame(rows).assign(std=0.1)


def draw(kind: str, table: pd.DataFrame) -> Figure:
    looks, grid = plots.looks(table), table.pivot_table(index="label", columns="task", values="y")
    texts = grid.map("{:.1f}\n± 0.1".format)
    lines = (table, "x", "y", "label", looks, "K", "score", "std")
    return {
        "dots": lambda: plots.dots(table, "y", looks, "score", "std", 0.5),
        "lines": lambda: plots.lines(*lines, 0.5),
        "steps": lambda: plots.lines(*lines, steps=True),
        "heatmap": lambda: plots.heatmap(grid, "E_rel"),
        "texts": lambda: plots.heatmap(grid, "a long label", 0.0, texts, "target", "source"),
        "scatter": lambda: plots.scatter(table, "x", "y", "line", "one", "two"),
        "violins": lambda: plots.violins(table, "y", "label", looks, "gain", 0.0),
    }[kind]()


def texts(figure: Figure) -> Iterator[Text]:
    """All texts that can be seen; labels of ticks beyond the axes are not drawn."""
    figure.draw_without_rendering()
    beyond = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks()
            ticks = [tick for tick in ticks if not low <= tick.get_loc() <= high]
            beyond += [label for tick in ticks for label in (tick.label1, tick.label2)]
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


@pytest.mark.parametrize(
    "kind", ["dots", "lines", "steps", "heatmap", "texts", "scatter", "violins"]
)
def test_figures_are_readable_fit_a_page_and_are_the_same_twice(kind, table, tmp_path):
    figure = draw(kind, table)
    assert figure.get_size_inches()[0] <= plots.PAGE
    assert_readable(figure)
    one, two = (plots.save_figure(draw(kind, table), tmp_path / name) for name in ("one", "two"))
    assert [path.suffix for path in one] == [".png", ".svg"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_a_line_has_one_colour_and_its_points_differ(table):
    looks = plots.looks(table)
    five, fifty = looks["subspace, 5 dims"], looks["subspace, 50 dims"]
    assert five["color"] == fifty["color"]
    assert five["marker"] != fifty["marker"]
    assert len({look["color"] for look in looks.values()}) == 3
    families = plots.looks(table.assign(family=table["line"]), "family")
    assert {name: look["color"] for name, look in families.items()} == {
        "plain": looks["plain"]["color"],
        "maml": looks["maml"]["color"],
        "subspace": five["color"],
    }


def test_dots_stand_at_their_values_with_their_bars(table):
    figure = plots.dots(table, "y", plots.looks(table), "score", "std")
    first = figure.axes[0].containers[0]
    assert first.lines[0].get_xdata().tolist() == pytest.approx([0, 0.1, 0.2])
    assert first.lines[2][0].get_segments()[0][:, 0].tolist() == pytest.approx([-0.1, 0.1])
    ends = table.assign(low=table["y"] - 0.2, high=table["y"] + 0.3)
    figure = plots.dots(ends, "y", plots.looks(table), "score", ("low", "high"))
    segment = figure.axes[0].containers[0].lines[2][0].get_segments()[0]
    assert segment[:, 0].tolist() == pytest.approx([-0.2, 0.3])


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("label", ["a", "a line of a report, prompt of a task of a long name"])
def test_cells_of_a_heat_map_hold_their_numbers(columns, label):
    grid = pd.DataFrame(0.5, [f"{label} {at}" for at in range(4)], [*"abc"[:columns]])
    figure = plots.heatmap(grid, "Mean score")
    assert_readable(figure)
    width = figure.axes[0].get_window_extent().width / figure.dpi
    assert 0.35 < width / columns < 1.4


def test_missing_values_leave_gaps_and_dollars_are_no_formulas(table, tmp_path):
    table.loc[0, ["y", "std"]] = np.nan
    figure = plots.dots(table, "y", plots.looks(table), "cost in $ and $", "std")
    plots.save_figure(figure, tmp_path / "dots")
    figure = plots.lines(table, "x", "y", "label", plots.looks(table), "K", "score", "std")
    assert figure.axes[0].containers[0].lines[0].get_xdata().size == 2
