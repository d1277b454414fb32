"""Five kinds of figures of DataFrames: dots with intervals, lines, heat maps, scatters, violins.

The table has a row for each mark; ``x``, ``y``, ``value``, ``place``, ``label`` name its columns;
``looks`` is how labels are drawn, ``level`` where a line goes across all of them.

A line of a report has one colour (Okabe and Ito's, safe for colour-blind eyes) in all figures; its
points differ in marker and dash. Equal tables give equal files; no window or global state is used.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from prompt_lab.files.tensors import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.4, 6.9
"""Widths in inches: one column of a paper, and both."""

COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    *("#5c4b9b", "#7f7f7f", "#8c510a", "#000000"),
)
MARKERS = "osD^vPX*<>"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
Looks = Mapping[str, dict[str, Any]]
"""Colour, marker and dash by label."""

_STYLE = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 8),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 7.5),
    **dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.6),
    **dict.fromkeys(("xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False),
    **{"axes.edgecolor": "#444444", "axes.axisbelow": True, "grid.color": "#e3e3e3"},
    **{"lines.linewidth": 1.3, "lines.markersize": 4.5, "legend.handlelength": 2.2},
    "svg.hashsalt": "prompt_lab",
}
_BARS = {
    **{"elinewidth": 0.8, "capsize": 1.6, "capthick": 0.8},
    **{"markeredgewidth": 0.4, "markeredgecolor": "white"},
}
_LEVEL = {"color": "#444444", "linewidth": 0.8, "dashes": (3, 2), "zorder": 1}


def looks(points: pd.DataFrame, label: str = "label") -> dict[str, dict[str, Any]]:
    """How each point (columns ``line`` and ``label``) is drawn: colour by line, marker by label."""
    found = {}
    for place, (_, of_line) in enumerate(points.groupby("line", sort=False)):
        for at, name in enumerate(dict.fromkeys(of_line[label])):
            found[name] = {
                "color": COLOURS[place % len(COLOURS)],
                "marker": MARKERS[(place + at) % len(MARKERS)],
                "linestyle": DASHES[at % len(DASHES)],
            }
    return found


def dots(
    table: pd.DataFrame,
    value: str,
    looks: Looks,
    xlabel: str,
    spread: str | tuple[str, str] | None = None,
    level: float | None = None,
) -> Figure:
    """A value of each ``task``, from top to bottom, with a dot for each ``label``.

    ``spread`` is the column of a deviation either way, or the columns of both ends of an interval.
    `places_on_page` says how many tasks fit a page.
    """
    tasks, labels = list(dict.fromkeys(table["task"])), _in_order(table["label"], looks)
    with _figure(PAGE, 0.5 + _room(len(labels)) * len(tasks), labels) as (figure, axes):
        for at in range(0, len(tasks), 2):
            axes.axhspan(at - 0.5, at + 0.5, color="#f6f6f6", linewidth=0, zorder=0)
        if level is not None:
            axes.axvline(level, **_LEVEL)
        step = min(0.8 / len(labels), 0.25)
        for at, name in enumerate(labels):
            own = table[table["label"] == name]
            heights = own["task"].map(tasks.index) + (at - (len(labels) - 1) / 2) * step
            style = _BARS | looks[name] | {"linestyle": "none", "label": _wrap(name, 40)}
            axes.errorbar(own[value], heights, xerr=_ends(own, value, spread), **style)
        axes.set_yticks(range(len(tasks)), [_wrap(name, 34) for name in tasks])
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel(_wrap(xlabel, 90))
        _legend(figure, axes)
    return figure


def places_on_page(labels: int) -> int:
    """How many places with so many labels each stand in one figure of dots."""
    return max(1, int(8 / _room(labels)))


def _room(labels: int) -> float:
    return 0.07 + max(0.085 * labels, 0.13)


def lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    label: str,
    looks: Looks,
    xlabel: str,
    ylabel: str,
    spread: str | None = None,
    level: float | None = None,
    steps: bool = False,
) -> Figure:
    """A value over ``x``, a line for each label.

    ``x`` are values such as dimensions or K, at equal distances in the order of the table; with
    ``steps`` numbers on a scale. ``spread`` is the column of a deviation either way, drawn as bars,
    or as a band over steps.
    """
    labels = _in_order(table[label], looks)
    places = list(dict.fromkeys(table[x]))
    wide = len(labels) > 5 or (len(places) > 8 and not steps)
    with _figure(PAGE if wide else COLUMN, 2.5 if wide else 2.1, labels) as (figure, axes):
        if level is not None:
            axes.axhline(level, **_LEVEL)
        for at, name in enumerate(labels):
            own = table[(table[label] == name) & table[y].notna()]
            style = looks[name] | {"label": _wrap(name, 40)}
            if steps:
                axes.plot(own[x], own[y], markevery=max(1, len(own) // 8), **style)
                if spread is not None:
                    ends, colour = (own[y] - own[spread], own[y] + own[spread]), style["color"]
                    axes.fill_between(own[x], *ends, color=colour, alpha=0.2, linewidth=0)
                continue
            along = own[x].map(places.index)
            along += (at - (len(labels) - 1) / 2) * min(0.06, 0.4 / len(labels))
            axes.errorbar(along, own[y], yerr=_ends(own, y, spread), **_BARS | style)
        if not steps:
            names = [f"{x:g}" if isinstance(x, float) else str(x) for x in places]
            axes.set_xticks(range(len(places)), names)
            axes.set_xlim(-0.4, len(places) - 0.6)
        axes.grid(axis="y")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(_wrap(ylabel, 40))
        _legend(figure, axes)
    return figure


def heatmap(
    table: pd.DataFrame,
    label: str,
    centre: float | None = None,
    texts: pd.DataFrame | None = None,
    xlabel: str = "",
    ylabel: str = "",
) -> Figure:
    """A table of numbers as colours, with the numbers or other ``texts`` in it; NaN stays empty.

    With a ``centre``, colours go from blue to red around it.
    """
    import seaborn

    rows, columns = ([_wrap(str(x), 30) for x in names] for names in (table.index, table.columns))
    longest = max(len(line) for name in columns for line in name.split("\n"))
    upright = longest > 9 or len(columns) > 8
    lines = 1 if texts is None else 1 + texts.map(lambda text: text.count("\n")).max(axis=None)
    inside = len(rows) * max(0.24, 0.08 + 0.12 * lines)
    height = 0.6 + inside + 0.065 * longest * upright + 0.15 * bool(xlabel)
    beside = max(len(line) for name in rows for line in name.split("\n"))
    width = 1.1 + 0.06 * beside + 0.15 * bool(ylabel) + 0.52 * len(columns)
    with _figure(min(PAGE, width), height) as (figure, axes):
        style = {"cmap": "cividis" if centre is None else "vlag", "center": centre}
        style |= {"annot": True if texts is None else texts.to_numpy(), "annot_kws": {"size": 7}}
        style |= {"fmt": ".2f" if texts is None else "", "linewidths": 0.5}
        style["cbar_kws"] = {"label": _wrap(label, max(int(inside / 0.07), 16))}
        grid = table.set_axis(rows).set_axis(columns, axis=1).astype(float)
        seaborn.heatmap(grid, ax=axes, **style)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.tick_params(axis="both", length=0)
        axes.tick_params(axis="y", rotation=0)
        axes.tick_params(axis="x", rotation=90 if upright else 0)
    return figure


def scatter(table: pd.DataFrame, x: str, y: str, hue: str, xlabel: str, ylabel: str) -> Figure:
    """Points in two dimensions; ``hue`` is the column of their groups."""
    groups = list(dict.fromkeys(table[hue]))
    with _figure(COLUMN * 1.3, 3.0, groups) as (figure, axes):
        for at, name in enumerate(groups):
            own, colour = table[table[hue] == name], COLOURS[at % len(COLOURS)]
            style = {"marker": MARKERS[at % len(MARKERS)], "linewidth": 0.4, "edgecolor": "white"}
            axes.scatter(own[x], own[y], 34, colour, label=_wrap(str(name), 40), **style)
        axes.margins(0.1)
        axes.grid()
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _legend(figure, axes)
    return figure


def violins(
    table: pd.DataFrame,
    value: str,
    label: str,
    looks: Looks,
    ylabel: str,
    level: float | None = None,
) -> Figure:
    """How a value is spread, a violin for each label, with every value as a dot in it."""
    import seaborn

    labels = _in_order(table[label], looks)
    palette = {name: looks[name]["color"] for name in labels}
    longest = max(len(line) for name in labels for line in _wrap(name, 14).split("\n"))
    upright = longest > min(12, 90 // len(labels))
    names = [_wrap(name, 30 if upright else 14) for name in labels]
    height = 2.6 + 0.065 * max(map(len, names)) * upright
    with _figure(min(PAGE, 1.2 + 0.75 * len(labels)), height) as (figure, axes):
        if level is not None:
            axes.axhline(level, **_LEVEL)
        columns = {"x": label, "y": value, "hue": label, "palette": palette, "order": labels}
        style = {"inner": None, "cut": 0, "linewidth": 0.6, "alpha": 0.35, "density_norm": "width"}
        seaborn.violinplot(table, ax=axes, legend=False, **columns, **style)
        draw = np.random.default_rng(0)
        for at, name in enumerate(labels):
            own = table.loc[table[label] == name, value]
            along = at + draw.uniform(-0.08, 0.08, len(own))
            axes.plot(along, own, ".", color=palette[name], markersize=3.5, markeredgewidth=0)
        axes.set_xticks(range(len(labels)), names, rotation=90 if upright else 0)
        axes.grid(axis="y")
        axes.set(xlabel="", ylabel=_wrap(ylabel, 40))
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG (300 dpi) and SVG, the same bytes for the same figure; the files.

    ``stem`` is the path without ending.
    """
    import matplotlib

    written = []
    for kind, details in (("png", {"Software": None}), ("svg", {"Date": None})):
        buffer = BytesIO()
        with matplotlib.rc_context(_STYLE):
            figure.savefig(buffer, format=kind, dpi=300, metadata=details)
        written.append(stem.with_name(f"{stem.name}.{kind}"))
        write_atomically(written[-1], buffer.getvalue())
    return written


@contextmanager
def _figure(
    width: float, height: float, labels: Sequence[str] = ()
) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure with one pair of axes, drawn by Agg, and room above them for a legend."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(labels) // _columns(width, labels)) if len(labels) > 1 else 0
    lines = max([_wrap(label, 40).count("\n") + 1 for label in labels], default=0)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height + 0.05 + 0.16 * rows * lines), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()


def _in_order(labels: pd.Series, looks: Looks) -> list[str]:
    found = {*labels}
    return [name for name in looks if name in found]


def _ends(table: pd.DataFrame, value: str, spread: str | tuple[str, str] | None) -> Any:
    """Lengths of error bars either way; none where no end is known."""
    if spread is None:
        return None
    if isinstance(spread, str):
        ends = table[[spread, spread]].to_numpy(float).T
    else:
        ends = np.abs(table[[*spread]].to_numpy(float).T - table[value].to_numpy(float))
    return None if np.isnan(ends).all() else ends


def _legend(figure: Figure, axes: Axes) -> None:
    """A legend above the axes, in as many columns as fit; none for a single label."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = _columns(figure.get_size_inches()[0], labels)
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def _columns(width: float, labels: Sequence[str]) -> int:
    longest = max(len(line) for label in labels for line in _wrap(label, 40).split("\n"))
    return min(max(int(width * 15 // (longest + 7)), 1), len(labels))


def _wrap(text: str, width: int) -> str:
    """Text in lines of at most so many characters, without any mathematical notation."""
    lines: Sequence[str] = textwrap.wrap(text, width, break_on_hyphens=False) or [""]
    return "\n".join(lines).replace("$", r"\$")
