"""Pictures of results: curves over dimensions or steps, bars per task, a map of vectors.

Each function returns a figure, which `save_figure` writes as PNG and SVG; `save_task_bars` writes
many bars on several pages. What a picture tells
apart differs in marker, line style, hatch or filling as well as in colour, so that it can be read
in grey. matplotlib is imported inside the functions, and no window or global state is used.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prompt_lab.files.tensors import write_atomically

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

COLOURS = (
    *("#000000", "#0072b2", "#d55e00", "#009e73"),
    *("#cc79a7", "#e69f00", "#56b4e9", "#666"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
BARS = (
    *(("#303030", ""), ("#ffffff", "////"), ("#56b4e9", ""), ("#f6d48b", "....")),
    *(("#ffffff", "xxxx"), ("#c9c9c9", "\\\\\\\\"), ("#ffffff", "----"), ("#d55e00", "++++")),
)
"""Filling and hatch of bars; neighbours differ in lightness."""

FILLS = ("full", "none", "left", "bottom")
MOST_BARS = len(BARS)
"""Series that one picture of bars can tell apart."""

PAGE = 20
"""Tasks in one picture of bars."""

WIDTH = 7.2
"""Width of a picture in inches; two columns of a paper."""

_BAR, _LINE, _GAP = 0.13, 0.15, 0.1
"""Height of a bar, of a line of text and between tasks, in inches."""

_ERROR_BAR: dict[str, Any] = {"capsize": 2.5, "elinewidth": 0.8}

_MARKS = 10
"""About how many marks with error bars a line over steps has."""


@dataclass(frozen=True)
class Series:
    """Values that belong together: one line of a picture, or the bars of one kind.

    Attributes:
        label: its name in the legend.
        values: one per place; NaN where there is none.
        std: standard deviation of each, drawn as an error bar; NaN where there is none.
    """

    label: str
    values: Sequence[float]
    std: Sequence[float]


def dimension_curves(
    dimensions: Sequence[float],
    series: Sequence[Series],
    ylabel: str,
    note: str = "",
    level: tuple[str, float] | None = None,
) -> Figure:
    """A score over the intrinsic dimension, one line per stage or variant.

    Dimensions stand at equal distances, and lines a little beside each other, so that error bars
    do not hide one another.

    Args:
        dimensions: the dimensions, in order.
        series: the lines, with a value per dimension.
        ylabel: what the values are.
        note: what the error bars are, for below the picture.
        level: name and value of a horizontal line, such as the reference's score.

    Raises:
        ValueError: nothing to draw, or a series without one value per dimension.
    """
    _check(series, len(dimensions), "dimension")
    figure, axes = _new_figure(WIDTH, 4.0)
    handles: list[Artist] = []
    if level is not None:
        handles.append(axes.axhline(level[1], color="#555", linewidth=1, dashes=(1, 1.5)))
    places = np.arange(len(dimensions), dtype=float)
    step = min(0.06, 0.5 / len(series))
    for at, one in enumerate(series):
        shift = (at - (len(series) - 1) / 2) * step
        drawn = axes.errorbar(
            places + shift, one.values, yerr=_bars(one.std), **_line(at), **_ERROR_BAR
        )
        handles.append(drawn)  # pyright: ignore[reportArgumentType]
    names = [f"{value:g}" for value in dimensions]
    axes.set_xticks(places, names, rotation=90 if len(names) * max(map(len, names)) > 60 else 0)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel("intrinsic dimension")
    axes.set_ylabel(_text(ylabel, 45))
    axes.grid(axis="y", color="#ddd", linewidth=0.6)
    labels = [*([level[0]] if level is not None else []), *(one.label for one in series)]
    _legend(figure, handles, labels, note)
    return figure


def step_curves(
    steps: Sequence[float], series: Sequence[Series], ylabel: str, note: str = ""
) -> Figure:
    """A score over the steps of training, one line per series.

    Every line has about ten marks with error bars, which take turns with those of other lines.
    Where there are too few steps for that, error bars stand a little beside their marks, so that
    they do not hide one another. A line leaves out the steps for which it has no value.

    Args:
        steps: the steps, in order.
        series: the lines, with a value per step; NaN where there is none.
        ylabel: what the values are.
        note: what the error bars are, for below the picture.

    Raises:
        ValueError: nothing to draw, or a series without one value per step.
    """
    _check(series, len(steps), "step")
    figure, axes = _new_figure(WIDTH, 4.0)
    places = np.asarray(steps, dtype=float)
    gap = float(np.diff(places).min()) if len(places) > 1 else 1.0
    handles: list[Artist] = []
    for at, one in enumerate(series):
        values, std = np.asarray(one.values, dtype=float), np.asarray(one.std, dtype=float)
        known = ~np.isnan(values)
        every = max(1, int(known.sum()) // _MARKS)
        turn = slice(at * every // len(series), None, every)
        shift = (at - (len(series) - 1) / 2) * min(0.04, 0.3 / len(series)) * gap
        aside = shift if every < len(series) else 0.0
        (line,) = axes.plot(places[known], values[known], markevery=turn, **_line(at))
        axes.errorbar(
            places[known][turn] + aside,
            values[known][turn],
            yerr=_bars(std[known][turn]),
            fmt="none",
            ecolor=line.get_color(),
            **_ERROR_BAR,
        )
        handles.append(line)
    axes.set_xlabel("step")
    axes.set_ylabel(_text(ylabel, 45))
    axes.grid(axis="y", color="#ddd", linewidth=0.6)
    _legend(figure, handles, [one.label for one in series], note)
    return figure


def task_bars(
    tasks: Sequence[str],
    series: Sequence[Series],
    xlabel: str,
    note: str = "",
    level: float | None = None,
) -> Figure:
    """Bars per task, lying, so that long names of tasks stay whole.

    A cross marks what has no value.

    Args:
        tasks: names of the tasks, from top to bottom; about 20 fit a page.
        series: the kinds of bars, from top to bottom within a task, with a value per task.
        xlabel: what the values are.
        note: what the error bars are, for below the picture.
        level: where to draw a line across all tasks.

    Raises:
        ValueError: nothing to draw, more series than can be told apart, or a series without one
            value per task.
    """
    _check(series, len(tasks), "task")
    if len(series) > MOST_BARS:
        raise ValueError(
            f"{len(series)} series in one picture of bars: draw at most {MOST_BARS} at a time"
        )
    names = [_text(task, 36) for task in tasks]
    lines = [_BAR * len(series), *(_LINE * (1 + name.count("\n")) for name in names)]
    row = max(lines) + _GAP
    figure, axes = _new_figure(WIDTH, 1.3 + row * len(tasks) + 0.2 * len(series))
    centres = np.arange(len(tasks), dtype=float)
    handles: list[Artist] = []
    height = _BAR / row
    for at, one in enumerate(series):
        places = centres + (at - (len(series) - 1) / 2) * height
        values = np.asarray(one.values, dtype=float)
        colour, hatch = BARS[at]
        std = np.where(np.isnan(values), np.nan, np.asarray(one.std, dtype=float))
        bars = axes.barh(
            places,
            np.nan_to_num(values),
            height,
            xerr=_bars(std),
            color=colour,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.6,
            error_kw={"elinewidth": 0.8, "capsize": 1.5, "ecolor": "black"},
        )
        _outline(bars)
        handles.append(bars)  # pyright: ignore[reportArgumentType]
        lacking = places[np.isnan(values)]
        if lacking.size:
            axes.plot(0 * lacking, lacking, "x", color="black", markersize=4, clip_on=False)
    axes.set_yticks(centres, names)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlabel(_text(xlabel, 60))
    axes.grid(axis="x", color="#ddd", linewidth=0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    if level is not None:
        axes.axvline(level, color="#555", linewidth=1, dashes=(1, 1.5))
    some = any(np.isnan(np.asarray(one.values, dtype=float)).any() for one in series)
    _legend(figure, handles, [one.label for one in series], _with_cross(note) if some else note)
    return figure


def save_task_bars(
    tasks: Sequence[str], series: Sequence[Series], xlabel: str, note: str, stem: Path
) -> list[Path]:
    """Write bars per task, on pages of at most `PAGE` tasks and `MOST_BARS` series.

    Args:
        tasks: names of the tasks.
        series: the kinds of bars, with a value per task.
        xlabel: what the values are.
        note: what the error bars are, for below every page.
        stem: path without ending; pages add "-1", "-2" to it where there are several.

    Returns:
        The files.

    Raises:
        ValueError: as `task_bars`.
    """
    _check(series, len(tasks), "task")
    pages = [
        (slice(i, i + PAGE), series[j : j + MOST_BARS])
        for i in range(0, len(tasks), PAGE)
        for j in range(0, len(series), MOST_BARS)
    ]
    files = []
    for number, (part, drawn) in enumerate(pages, 1):
        cut = [Series(one.label, one.values[part], one.std[part]) for one in drawn]
        name = f"{stem.name}-{number}" if len(pages) > 1 else stem.name
        files += save_figure(task_bars(tasks[part], cut, xlabel, note), stem.with_name(name))
    return files


def vector_map(
    vectors: NDArray[np.floating], groups: Sequence[str], sets: Sequence[str], note: str = ""
) -> Figure:
    """Vectors on their first two principal components.

    Shape and colour of a mark tell the group, such as the ontology group of a task; its filling
    tells the set, such as source or target.

    Args:
        vectors: (R, I), one vector per row.
        groups: (R,) group of each.
        sets: (R,) set of each, at most four different ones.
        note: a text for below the picture.

    Raises:
        ValueError: fewer than two vectors, values that are not finite, a group or set too few, more
            than four sets.
    """
    points, shares = principal_components(vectors)
    kinds, parts = list(dict.fromkeys(groups)), list(dict.fromkeys(sets))
    if not len(groups) == len(sets) == len(points):
        raise ValueError(
            f"{len(points)} vectors, {len(groups)} groups and {len(sets)} sets: give one of each"
        )
    if len(parts) > len(FILLS):
        raise ValueError(
            f"{len(parts)} sets ({', '.join(parts)}): at most {len(FILLS)} can be told"
        )
    figure, axes = _new_figure(WIDTH, 5.0)
    for (x, y), group, part in zip(points, groups, sets, strict=True):
        axes.plot(x, y, linestyle="", **_mark(kinds.index(group), parts.index(part)))
    axes.set_xlabel(f"first component ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second component ({shares[1]:.0%})")
    axes.grid(color="#eee", linewidth=0.6)
    handles: list[Artist] = [_key(**_mark(at, 0)) for at in range(len(kinds))]
    grey = {"marker": "o", "color": "#555", "markerfacecoloralt": "white"}
    handles += [_key(fillstyle=FILLS[at], **grey) for at in range(len(parts))]
    _legend(figure, handles, [*kinds, *parts], note)
    return figure


def principal_components(
    vectors: NDArray[np.floating],
) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """First two principal components of some vectors, by SVD of the centred matrix.

    Each component points to where its largest weight is positive, which fixes the sign.

    Args:
        vectors: (R, I), one vector per row; with I = 1 the second component is zero.

    Returns:
        Coordinates (R, 2), and the share of the variance of each component; zero where all vectors
        are equal.

    Raises:
        ValueError: fewer than two vectors, or values that are not finite.
    """
    given = np.asarray(vectors, dtype=np.float64)
    if given.ndim != 2 or len(given) < 2 or given.shape[1] < 1:
        raise ValueError(f"vectors of shape {given.shape}: give at least two rows of one length")
    if not np.isfinite(given).all():
        raise ValueError("vectors with values that are not finite: leave out runs that failed")
    left, size, right = np.linalg.svd(given - given.mean(0), full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(1)])
    points = np.zeros((len(given), 2))
    count = min(2, len(size))
    points[:, :count] = (left * size * np.where(signs == 0, 1, signs))[:, :count]
    variance = np.zeros(2)
    variance[:count] = size[:count] ** 2
    total = float((size**2).sum())
    shares = variance / total if total > 0 else np.zeros(2)
    return points, (float(shares[0]), float(shares[1]))


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG (200 dpi) and SVG; equal figures give equal bytes.

    Args:
        figure: the figure.
        stem: path without ending.

    Returns:
        The two files.
    """
    import matplotlib

    written = []
    for kind, details in (("png", {"Software": None}), ("svg", {"Date": None})):
        buffer = BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "prompt_lab"}):
            figure.savefig(buffer, format=kind, dpi=200, metadata=details)
        path = stem.with_name(f"{stem.name}.{kind}")
        write_atomically(path, buffer.getvalue())
        written.append(path)
    return written


def file_name(words: str) -> str:
    """Words as a part of a file name."""
    return "_".join("".join(c if c.isalnum() else " " for c in words).split())


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, drawn by Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _check(series: Sequence[Series], places: int, what: str) -> None:
    """Refuse pictures of nothing and series of another length."""
    if not series or not places:
        raise ValueError(f"nothing to draw: give at least one series and one {what}")
    for one in series:
        if not len(one.values) == len(one.std) == places:
            raise ValueError(
                f"series {one.label!r} has {len(one.values)} values and {len(one.std)} deviations: "
                f"give one of each per {what}, of which there are {places}"
            )


def _line(at: int) -> dict[str, Any]:
    """How a line of a picture is drawn, by its place among the lines."""
    return {
        "color": COLOURS[at % len(COLOURS)],
        "marker": MARKERS[at % len(MARKERS)],
        "linestyle": DASHES[at % len(DASHES)],
        "markersize": 5,
        "linewidth": 1.2,
    }


def _bars(std: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Error bars, or none where no deviation is known."""
    known = np.asarray(std, dtype=float)
    return None if np.isnan(known).all() else known


def _outline(bars: BarContainer) -> None:
    """Give error bars a white edge, so that they can be seen on dark and on hatched bars."""
    from matplotlib.patheffects import withStroke

    if bars.errorbar is None:
        return
    _, caps, lines = bars.errorbar.lines
    for part in (*caps, *lines):
        part.set_path_effects([withStroke(linewidth=2.4, foreground="white")])


def _mark(group: int, part: int) -> dict[str, Any]:
    """How a vector of a group and a set is drawn."""
    return {
        "marker": MARKERS[group % len(MARKERS)],
        "color": COLOURS[(group + group // len(MARKERS)) % len(COLOURS)],
        "fillstyle": FILLS[part],
        "markerfacecoloralt": "white",
        "markersize": 7,
    }


def _key(**style: Any) -> Artist:
    """A mark for the legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", **style)


def _legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], note: str) -> None:
    """A legend above the axes, in as many columns as fit, and a note below them."""
    texts = [_text(label, 55) for label in labels]
    for columns in range(len(texts), 0, -1):
        legend = figure.legend(
            handles,
            texts,
            loc="outside upper center",
            ncols=columns,
            fontsize=8,
            frameon=False,
            handlelength=2.6,
            handleheight=1.1,
        )
        if columns == 1 or legend.get_window_extent().width < 0.98 * figure.bbox.width:
            break
        legend.remove()
    if note:
        figure.supxlabel(_text(note, 105), fontsize=7.5, color="#333")


def _with_cross(note: str) -> str:
    """The note, with what a cross means."""
    return f"{note}; cross: no value" if note else "cross: no value"


def _text(text: str, width: int) -> str:
    """Text in lines of at most so many characters, without any mathematical notation."""
    lines = textwrap.wrap(text, width) or [""]
    return "\n".join(lines).replace("$", r"\$")
