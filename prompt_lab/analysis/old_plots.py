"""What pictures of rankings and readings still need of the old plots.

Left by the old report; it goes with the modules that import it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prompt_lab.files.tensors import write_atomically

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    *("#000000", "#0072b2", "#d55e00", "#009e73"),
    *("#cc79a7", "#e69f00", "#56b4e9", "#666"),
)


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


DASHES = ("-", "--", "-.", ":")


FILLS = ("full", "none", "left", "bottom")


WIDTH = 7.2
"""Width of a picture in inches; two columns of a paper."""


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


def _text(text: str, width: int) -> str:
    """Text in lines of at most so many characters, without any mathematical notation."""
    lines = textwrap.wrap(text, width) or [""]
    return "\n".join(lines).replace("$", r"\$")
