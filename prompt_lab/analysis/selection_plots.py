"""Pictures of the choice of source tasks: means with their spread, curves of methods, tokens.

Each function returns a figure, which `plots.save_figure` writes; heat maps and violins
are those of `interpretation_plots`. What a picture tells apart differs in marker, line
style or filling as well as in colour. Left out: which pictures are drawn, which
`prompt_lab.analysis.selection_report` decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prompt_lab.analysis.old_plots import (
    COLOURS,
    DASHES,
    MARKERS,
    WIDTH,
    _key,
    _legend,
    _mark,
    _new_figure,
    _text,
)
from prompt_lab.analysis.transfer_table import Spread

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

_NAME = 44
"""Characters of a name beside a picture before it is broken."""

_LINE = 0.14
"""Height of a line of names, in inches."""

_MARKS = 15
"""About how many marks a curve has."""


def spread_marks(
    names: Sequence[str], spreads: Sequence[Spread], label: str, note: str = ""
) -> Figure:
    """Means, each with its standard deviation and, below, its 95 % bootstrap interval.

    Args:
        names: name of each, from top to bottom.
        spreads: its mean and spread; what is NaN is not drawn.
        label: what the values are.
        note: a text for below the picture.

    Raises:
        ValueError: nothing to draw, or not one name for each.
    """
    if not names or len(names) != len(spreads):
        raise ValueError("give one or more means, and a name for each")
    lines = [_text(name, _NAME) for name in names]
    row = max(0.26, *(_LINE * (1 + name.count("\n")) + 0.06 for name in lines))
    figure, axes = _new_figure(WIDTH, 1.2 + row * len(names))
    places = np.arange(len(names), dtype=float)
    means = np.array([one.mean for one in spreads])
    std = np.array([one.std for one in spreads])
    ends = np.array([[one.mean - one.low, one.high - one.mean] for one in spreads]).T
    styles: list[tuple[str, float, Any, dict[str, Any]]] = [
        ("mean ± standard deviation", -0.14, std, {"marker": "s", "markerfacecolor": "white"}),
        ("mean with 95 % bootstrap interval", 0.14, ends.clip(0), {"marker": "o"}),
    ]
    handles: list[Artist] = []
    for _, shift, error, style in styles:
        bars = axes.errorbar(
            means,
            places + shift,
            xerr=error,
            linestyle="",
            color="black" if style["marker"] == "o" else "#777",
            markersize=4.5,
            elinewidth=1.0,
            capsize=2.5,
            **style,
        )
        handles.append(bars)  # pyright: ignore[reportArgumentType]
    axes.set_yticks(places, lines)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(0, color="#555", linewidth=1, dashes=(1, 1.5))
    axes.set_xlabel(label)
    axes.grid(axis="x", color="#ddd", linewidth=0.6)
    _legend(figure, handles, [style[0] for style in styles], note)
    return figure


def method_curves(
    places: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    axes_names: tuple[str, str],
    note: str = "",
    level: tuple[str, float] | None = None,
) -> Figure:
    """One curve for each method, over steps or over the number of sources that are tried.

    Args:
        places: where the values are, in order.
        curves: by name, a value for each place; at places that are NaN there is no mark.
        axes_names: what places and values are.
        note: a text for below the picture.
        level: name and value of a horizontal line.

    Raises:
        ValueError: nothing to draw, or a curve without one value for each place.
    """
    wrong = [name for name, values in curves.items() if len(values) != len(places)]
    if not len(places) or not curves or wrong:
        raise ValueError(f"give one or more curves with a value for each of {len(places)} places")
    figure, axes = _new_figure(WIDTH, 4.6)
    handles: list[Artist] = []
    if level is not None:
        handles.append(axes.axhline(level[1], color="#555", linewidth=1, dashes=(1, 1.5)))
    every = max(1, len(places) // _MARKS)
    for at, values in enumerate(curves.values()):
        turn = (at % every, every)
        handles += axes.plot(places, np.asarray(values, float), markevery=turn, **_curve(at))
    if len(places) <= _MARKS:
        axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(_text(axes_names[1], 50))
    axes.grid(axis="y", color="#ddd", linewidth=0.6)
    _legend(figure, handles, [*([level[0]] if level is not None else []), *curves], note)
    return figure


def token_map(points: NDArray[np.floating], groups: Sequence[str], note: str = "") -> Figure:
    """The rows of some prompts as points of a map.

    Args:
        points: (P, 2).
        groups: (P,) the prompt of each.
        note: a text for below the picture.

    Raises:
        ValueError: no points, or not one group for each.
    """
    given = np.asarray(points, dtype=float)
    if given.shape != (len(groups), 2) or not len(groups):
        raise ValueError(f"points of shape {given.shape} for {len(groups)} groups: give (P, 2)")
    kinds = list(dict.fromkeys(groups))
    figure, axes = _new_figure(WIDTH, 5.4)
    small = {"markersize": 4.5, "alpha": 0.8}
    styles: list[dict[str, Any]] = [{**_mark(at, 0), **small} for at in range(len(kinds))]
    for kind, style in zip(kinds, styles, strict=True):
        own = given[[group == kind for group in groups]]
        axes.plot(*own.T, linestyle="", markeredgewidth=0.4, **style)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("first coordinate of t-SNE")
    axes.set_ylabel("second coordinate")
    axes.grid(color="#eee", linewidth=0.6)
    _legend(figure, [_key(**style) for style in styles], kinds, note)
    return figure


def _curve(at: int) -> dict[str, Any]:
    """How a curve is drawn, by its place; 32 differ, those from the ninth on with open marks."""
    cycle = at // len(MARKERS)
    return {
        "color": COLOURS[at % len(COLOURS)],
        "marker": MARKERS[at % len(MARKERS)],
        "linestyle": DASHES[(at + cycle) % len(DASHES)],
        "fillstyle": "none" if cycle % 2 else "full",
        "markersize": 5,
        "linewidth": 1.2,
    }
