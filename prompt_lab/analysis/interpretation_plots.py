"""Pictures of what prompts say: drift, norms, distances and transfer, maps of repeated runs.

Each function returns a figure, which `plots.save_figure` writes. Heat maps are grey,
with a value in every cell; what a picture tells apart differs in shape or line style as well as in
colour. Left out: which prompts are drawn on which page, which the command decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prompt_lab.analysis.old_plots import WIDTH, _key, _legend, _mark, _new_figure, _text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

Matrix = NDArray[np.floating]

MOST_CELLS = 24
"""Lines or columns of a heat map with values; larger ones are drawn without them."""

_NAME = 44
"""Characters of a name beside a picture before it is broken."""

_LETTER, _LINE = 0.075, 0.14
"""Width of a letter and height of a line of names, in inches."""


def heatmap(
    names: Sequence[str],
    columns: Sequence[str],
    values: Matrix,
    label: str,
    *,
    axes_names: tuple[str, str] = ("", ""),
    form: str = "{:.3g}",
    spread: Matrix | None = None,
    note: str = "",
) -> Figure:
    """A matrix in grey, darker for larger values, with the value in each cell.

    Matrices of more than `MOST_CELLS` lines or columns have no values in their cells.

    Args:
        names: name of each line.
        columns: name of each column.
        values: one number per line and column; cells that are NaN are hatched.
        label: what the values are.
        axes_names: what columns and lines are.
        form: how a value is written.
        spread: a deviation for each cell, written below its value; NaN for none.
        note: a text for below the picture.

    Raises:
        ValueError: no cells, or not one name for each line and column.
    """
    given = np.asarray(values, dtype=float)
    if not given.size or given.shape != (len(names), len(columns)):
        raise ValueError(
            f"values of shape {given.shape} for {len(names)} lines and {len(columns)} columns: "
            "give each cell a number"
        )
    has_values = max(given.shape) <= MOST_CELLS
    width = _NAME if has_values else max(map(len, (*names, *columns)))
    lines, heads = ([_text(name, width) for name in some] for some in (names, columns))
    cell = max(_LINE * (1 + name.count("\n")) for name in (*lines, *heads)) + 0.05
    longest = _LETTER * min(width, max(map(len, (*names, *columns))))
    size = (max(cell, 0.5), max(cell, 0.3 if spread is None else 0.42))
    size = size if has_values else (cell, cell)
    figure, axes = _new_figure(
        max(WIDTH * 0.6, longest + size[0] * len(columns) + 1.8),
        longest + size[1] * len(names) + 1.0,
    )
    mesh = _mesh(axes, given, label)
    axes.set_xticks(np.arange(len(columns)), heads, rotation=90)
    axes.set_yticks(np.arange(len(names)), lines)
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    if has_values:
        for (row, column), value in np.ndenumerate(given):
            if math.isnan(value):
                continue
            colour = _ink(mesh, float(value))
            text = re.sub(r"^-(?=0*\.?0*$)", "", form.format(value))  # no -0.00
            if spread is not None and not math.isnan(spread[row, column]):
                text += f"\n±{form.format(spread[row, column])}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    if note:
        wide = int(figure.get_figwidth() / 0.07)
        figure.supxlabel(_text(note, wide), fontsize=7.5, color="#333")
    return figure


def drift_map(
    names: Sequence[str],
    drifts: Sequence[Matrix],
    is_lost: Sequence[NDArray[np.bool_]],
    note: str = "",
) -> Figure:
    """How far each row of each prompt has moved, in grey; a dot where its first token is lost.

    Args:
        names: name of each prompt, from top to bottom; about 30 fit a page.
        drifts: for each prompt its drift (N,); the N may differ.
        is_lost: for each prompt (N,), whether the nearest token is no longer the initial one.
        note: a text for below the picture.

    Raises:
        ValueError: no prompts, or not one drift and one flag for each row.
    """
    sizes = [len(drift) for drift in drifts]
    if not sizes or sizes != [len(lost) for lost in is_lost] or len(sizes) != len(names):
        raise ValueError("give one or more prompts, with a drift and a flag for each of their rows")
    longest = max(sizes)
    values = np.full((len(names), longest), np.nan)
    lost = np.zeros(values.shape, dtype=bool)
    for at, (drift, flags) in enumerate(zip(drifts, is_lost, strict=True)):
        values[at, : len(drift)], lost[at, : len(drift)] = drift, flags
    lines = [_text(name, _NAME) for name in names]
    row = max(_LINE * (1 + name.count("\n")) for name in lines) + 0.06
    figure, axes = _new_figure(WIDTH, 1.3 + row * len(names))
    mesh = _mesh(axes, values, "Euclidean distance\nfrom initial row")
    size = max(1.6, min(5.0, 130 / longest))
    for colour in ("black", "white"):
        places = [at for at in np.argwhere(lost) if _ink(mesh, float(values[tuple(at)])) == colour]
        if places:
            y, x = np.array(places).T
            axes.plot(x, y, "o", color=colour, markersize=size, markeredgewidth=0)
    step = max(1, round(longest / 16))
    axes.set_xticks(np.arange(0, longest, step), [str(1 + i) for i in range(0, longest, step)])
    axes.set_yticks(np.arange(len(names)), lines)
    axes.set_xlabel("row of the prompt")
    words = ["dot: its nearest token is no longer the initial one"] if lost.any() else []
    figure.supxlabel(_text("; ".join([*words, *([note] if note else [])]), 105), fontsize=7.5)
    return figure


def norm_violins(
    names: Sequence[str],
    norms: Sequence[Matrix],
    label: str,
    note: str = "",
    *,
    dots: int = 0,
    level: float | None = None,
) -> Figure:
    """Distributions of norms, or of other numbers, as lying violins with median and range.

    Args:
        names: name of each distribution, from top to bottom.
        norms: its values.
        label: what the values are.
        note: a text for below the picture.
        dots: distributions of at most so many values show each value as a dot.
        level: where to draw a line across all distributions.

    Raises:
        ValueError: no distribution, an empty one, or not one name for each.
    """
    if not names or len(names) != len(norms) or any(not len(values) for values in norms):
        raise ValueError("give one or more distributions that are not empty, and a name for each")
    lines = [_text(name, _NAME) for name in names]
    row = max(_LINE * (1 + name.count("\n")) for name in lines) + 0.25
    figure, axes = _new_figure(WIDTH, 0.9 + row * len(names))
    places = np.arange(len(names))
    given = [np.asarray(values, dtype=float) for values in norms]
    drawn: dict[str, Any] = axes.violinplot(
        given, places, orientation="horizontal", widths=0.85, showmedians=True
    )
    for body in drawn["bodies"]:
        body.set(facecolor="#c9c9c9", edgecolor="black", alpha=1, linewidth=0.6)
    for part in ("cmins", "cmaxes", "cbars", "cmedians"):
        drawn[part].set(color="black", linewidth=1.6 if part == "cmedians" else 0.8)
    for place, values in zip(places, given, strict=True):
        if len(values) <= dots:
            style = {"markersize": 3.2, "color": "black", "markerfacecolor": "white"}
            axes.plot(values, np.full(len(values), place), "o", markeredgewidth=0.7, **style)
    axes.set_yticks(places, lines)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if level is not None:
        axes.axvline(level, color="#555", linewidth=1, dashes=(1, 1.5))
    axes.set_xlim(left=min(0.0, float(axes.get_xlim()[0])))
    axes.set_xlabel(label)
    axes.grid(axis="x", color="#ddd", linewidth=0.6)
    if note:
        figure.supxlabel(_text(note, 105), fontsize=7.5, color="#333")
    return figure


def prompt_map(
    points: Matrix, groups: Sequence[str], axes_names: tuple[str, str], note: str = ""
) -> Figure:
    """Prompts as points, where the runs of one group are corners of one outline.

    Args:
        points: (R, 2).
        groups: (R,) the group of each, such as its task.
        axes_names: what the two coordinates are.
        note: a text for below the picture.

    Raises:
        ValueError: no points, or not one group for each.
    """
    given = np.asarray(points, dtype=float)
    if given.shape != (len(groups), 2) or not len(groups):
        raise ValueError(f"points of shape {given.shape} for {len(groups)} groups: give (R, 2)")
    kinds = list(dict.fromkeys(groups))
    labels = [_text(kind, 55) for kind in kinds]
    columns = max(1, int(WIDTH / (_LETTER * min(55, max(map(len, labels))) + 0.5)))
    lines = math.ceil(len(kinds) / columns) * (1 + max(label.count("\n") for label in labels))
    figure, axes = _new_figure(WIDTH, 4.6 + 0.17 * lines)
    for at, kind in enumerate(kinds):
        own = outline(given[[group == kind for group in groups]])
        style = _mark(at, at // 8 % 4)
        axes.plot(*own.T, linestyle="-", linewidth=0.9, **style)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.08)
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    axes.grid(color="#eee", linewidth=0.6)
    handles = [_key(**_mark(at, at // 8 % 4)) for at in range(len(kinds))]
    _legend(figure, handles, kinds, note)
    return figure


def outline(points: Matrix) -> NDArray[np.float64]:
    """Points in the order of their angle around their mean, and the first again: (n + 1, 2).

    A single point, and two, stay as they are.
    """
    given = np.asarray(points, dtype=float)
    if len(given) < 3:
        return given
    x, y = (given - given.mean(axis=0)).T
    order = np.argsort(np.arctan2(y, x), kind="stable")
    return given[[*order, order[0]]]


def tsne_points(vectors: Matrix, seed: int = 0) -> tuple[NDArray[np.float64], float]:
    """A map of vectors by t-SNE (van der Maaten and Hinton 2008): scikit-learn's, exact.

    The perplexity is 30, or a third of the other points where there are fewer: it must stay below
    their number. t-SNE keeps neighbours together; distances and directions on its map say little.

    Args:
        vectors: (R, P), one per row.
        seed: of scikit-learn.

    Returns:
        Points (R, 2), and the perplexity.

    Raises:
        ValueError: fewer than four vectors, or values that are not finite.
    """
    from sklearn.manifold import TSNE

    given = np.asarray(vectors, dtype=np.float64)
    if given.ndim != 2 or len(given) < 4 or not np.isfinite(given).all():
        raise ValueError(
            f"vectors of shape {given.shape}: give at least four rows of finite numbers for t-SNE"
        )
    perplexity = min(30.0, (len(given) - 1) / 3)
    # Distances stay as they are when vectors turn; few coordinates make t-SNE's start cheap.
    left, size, _ = np.linalg.svd(given - given.mean(axis=0), full_matrices=False)
    made = TSNE(perplexity=perplexity, init="pca", method="exact", random_state=seed)
    return made.fit_transform(left * size).astype(np.float64), perplexity


def _mesh(axes: Axes, values: Matrix, label: str) -> QuadMesh:
    """Cells of a matrix, from the top, with a bar that tells their scale."""
    shown = np.ma.masked_invalid(values)
    rows, columns = values.shape
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5  # cells lie around the ticks
    gaps = {"edgecolors": "white", "linewidth": 0.4} if columns <= 40 else {}
    mesh = axes.pcolormesh(*edges, shown, cmap="Greys", **gaps)
    if not gaps:
        axes.hlines(edges[1], -0.5, columns - 0.5, color="white", linewidth=0.8)
    axes.patch.set(hatch="////", edgecolor="#bbb", linewidth=0)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02, aspect=25)
    bar.ax.tick_params(labelsize=7)
    least, most = mesh.get_clim()
    bar.set_ticks([tick for tick in bar.get_ticks() if least <= tick <= most])
    bar.set_label(label, fontsize=8)
    return mesh


def _ink(mesh: QuadMesh, value: float) -> str:
    """Black, or white on the dark cells of a value."""
    red, green, blue, _ = mesh.to_rgba(np.array([value]))[0]
    return "white" if red + green + blue < 1.65 else "black"
