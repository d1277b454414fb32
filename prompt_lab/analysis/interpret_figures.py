"""The figures of `prompt-lab interpret`: which prompts are drawn in which picture, and its file.

`prompt_lab.analysis.interpretation_plots` draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_lab.analysis.interpret_prompts import distance_name

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.analysis.interpret_tokens import Reading, Vocabulary
    from prompt_lab.analysis.interpret_transfer import Transfer

PAGE = 30
"""Prompts in one picture of drift."""


def draw_figures(
    folder: Path,
    readings: Sequence[Reading],
    vocabulary: Vocabulary,
    distances: Tensor,
    transfer: Transfer | None,
    compare: str,
) -> list[Path]:
    """Draw everything; returns the files."""
    from prompt_lab.analysis.interpretation_plots import heatmap
    from prompt_lab.analysis.old_plots import save_figure

    files = [*_draw_drift(folder, readings), *_draw_norms(folder, readings, vocabulary)]
    files += _draw_distances(folder, readings, distances, compare)
    files += _draw_maps(folder, readings, distances, compare)
    if transfer is not None:
        figure = heatmap(
            transfer.tasks,
            transfer.tasks,
            transfer.gains.numpy(),
            "score less score without prompt",
            axes_names=("target", "source of the prompt"),
            form="{:+.3f}",
            note=f"on the diagonal, a prompt's own task; off it, {_correlation(transfer)}",
        )
        files += save_figure(figure, folder / "transfer")
    return files


def _correlation(transfer: Transfer) -> str:
    """How gains go with distances, by Spearman's rho, in a few words."""
    found = transfer.correlations[0]
    if found.reason:
        return f"no rank correlation with distance: {found.reason}"
    return f"Spearman's rho with distance {found.coefficient:+.3f}, p = {found.p:.3g}"


def _draw_drift(folder: Path, readings: Sequence[Reading]) -> Iterator[Path]:
    """Drift of each row, in pages of some prompts."""
    from prompt_lab.analysis.interpretation_plots import drift_map
    from prompt_lab.analysis.old_plots import save_figure

    names = short_names([one.tuned.label for one in readings])
    starts = range(0, len(readings), PAGE)
    for number, start in enumerate(starts, 1):
        page = readings[start : start + PAGE]
        figure = drift_map(
            names[start : start + PAGE],
            [one.drift.l2.numpy() for one in page],
            [((one.initial >= 0) & ~one.survived).numpy() for one in page],
            "hatched: the prompt has no such row" * (len({len(one.norms) for one in page}) > 1),
        )
        yield from save_figure(figure, folder / ("drift" + f"-{number}" * (len(starts) > 1)))


def short_names(labels: Sequence[str]) -> list[str]:
    """Names without the last parts, such as a learning rate, that all of them share."""
    parts = [label.split("_") for label in labels]
    while len(labels) > 1 and min(map(len, parts)) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    return ["_".join(own) for own in parts]


def _draw_norms(
    folder: Path, readings: Sequence[Reading], vocabulary: Vocabulary
) -> Iterator[Path]:
    """Norms of rows: of the vocabulary, the initial prompts, and the prompts of each task."""
    import numpy as np
    import torch

    from prompt_lab.analysis.interpretation import row_norms
    from prompt_lab.analysis.interpretation_plots import norm_violins
    from prompt_lab.analysis.old_plots import save_figure

    # Quantiles stand for a vocabulary of any size.
    norms = row_norms(vocabulary.table, vocabulary.ids).numpy()
    starts = {one.tuned.prompt.init.numpy().tobytes(): one.initial_norms for one in readings}
    groups: dict[str, list[Tensor]] = {}
    for one in readings:
        groups.setdefault(one.tuned.group, []).append(one.norms)
    names = ["vocabulary", "initial prompts", *(f"{n} ({len(p)})" for n, p in groups.items())]
    values = [torch.cat(list(starts.values())), *(torch.cat(parts) for parts in groups.values())]
    quantiles = np.quantile(norms, np.linspace(0, 1, 1001))
    figure = norm_violins(
        names,
        [quantiles, *(part.numpy() for part in values)],
        "norm of a row",
        "line: median, and least to largest; in brackets: number of prompts",
    )
    yield from save_figure(figure, folder / "norms")


def _draw_distances(
    folder: Path, readings: Sequence[Reading], distances: Tensor, compare: str
) -> Iterator[Path]:
    """Distances between prompts, where they are few, and mean distances between tasks."""
    from prompt_lab.analysis.interpretation import group_distances
    from prompt_lab.analysis.interpretation_plots import MOST_CELLS, heatmap
    from prompt_lab.analysis.old_plots import save_figure

    labels = short_names([one.tuned.label for one in readings])
    tasks, means = group_distances(distances, [one.tuned.group for one in readings])
    if len(labels) > 1 and (len(labels) <= MOST_CELLS or len(tasks) in (1, len(labels))):
        others = distances.clone().fill_diagonal_(math.nan).numpy()
        figure = heatmap(labels, labels, others, distance_name(compare))
        yield from save_figure(figure, folder / "distances")
    if 1 < len(tasks) < len(labels):
        note = "mean over pairs of prompts; on the diagonal, of different runs of one task"
        name = distance_name(compare)
        yield from save_figure(
            heatmap(tasks, tasks, means.numpy(), name, note=note), folder / "task-distances"
        )


def _draw_maps(
    folder: Path, readings: Sequence[Reading], distances: Tensor, compare: str
) -> Iterator[Path]:
    """Maps of the prompts by PCA and t-SNE, where there are four and they differ."""
    import torch

    from prompt_lab.analysis.interpretation_plots import prompt_map, tsne_points
    from prompt_lab.analysis.old_plots import principal_components, save_figure

    if len(readings) < 4 or not distances.any():
        return
    prompts = [one.tuned.prompt.prompt.double() for one in readings]
    parts = [p.flatten() if compare == "rows" else p.mean(dim=0) for p in prompts]
    vectors = torch.stack(parts).numpy()
    groups = [one.tuned.group for one in readings]
    points, shares = principal_components(vectors)
    words = (
        f"first component ({shares[0]:.0%} of the variance)",
        f"second component ({shares[1]:.0%})",
    )
    what = f"{len(readings)} prompts; runs of one task are joined"
    yield from save_figure(prompt_map(points, groups, words, what), folder / "map-pca")
    points, perplexity = tsne_points(vectors)
    words = ("first coordinate of t-SNE", "second coordinate")
    what += f"; perplexity {perplexity:.3g}, seed 0; only what is near says something"
    yield from save_figure(prompt_map(points, groups, words, what), folder / "map-tsne")
