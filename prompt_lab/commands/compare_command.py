"""The command ``prompt-lab vectors compare``: how alike prompts, and their vectors, are.

Belanec et al. 2024 (arXiv 2408.01119, figures 2 and 3) compare tuned prompts, and task prompt
vectors, by the cosine of all their numbers, averaged over initial prompts. Here an entry of two
different tasks is the mean over all pairs of a prompt of the one and a prompt of the other; those
of different and of equal initial prompts are averaged apart, since prompts of one initial prompt
share what is left of it. An entry of one task is the mean over pairs of two of its prompts; none is
paired with itself. The prompts' figure is made of prompts, and the vectors' of vectors; the code of
the paper averages vectors into the entries between tasks of the prompts' figure too.

Beside the cosines stand what they are to be read against: the mean cosine of the initial prompts,
and the norm of the vectors over that of the initial prompts. Left out: pairs of different few-shot
samples, other measures (``prompt-lab select`` has some), and tests, as pairs share prompts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prompt_lab.analysis.old_results import Summary, extent, spread, summarise
from prompt_lab.files.tensors import write_csv
from prompt_lab.files.vectors import Group, check_compatible, find_vectors, listed

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.files.prompts import FoundPrompt

What = Literal["prompts", "vectors"]
Starts = Literal["different", "equal"]

Entries = Mapping[tuple[str, str], Summary]
"""Cosines of the pairs of two tasks, in both orders; for one task, of pairs of its prompts."""

_NO_PAIRS = Summary(math.nan, math.nan, 0, 0)

PLACES: tuple[tuple[What, Starts], ...] = (
    *(("prompts", "different"), ("prompts", "equal")),
    *(("vectors", "different"), ("vectors", "equal")),
)

_SIMILARITY_COLUMNS = ("what", "initial_prompts", "task", "other", "mean", "std", "pairs")
_NORM_COLUMNS = (
    *("task", "prompts", "vector", "vector_std", "init", "init_std"),
    *("ratio", "ratio_std"),
)


@dataclass(frozen=True)
class Comparison:
    """How alike the prompts of tasks are.

    Attributes:
        tasks: tasks, by name.
        cosines: entries of prompts and of vectors, for different and for equal initial prompts.
        initial: cosines of different initial prompts of one sample.
        norms: by task, norms of vectors, of initial prompts, and the ratio of the two.
    """

    tasks: Sequence[str]
    cosines: Mapping[tuple[What, Starts], Entries]
    initial: Summary
    norms: Mapping[str, tuple[Summary, Summary, Summary]]


def compare_vectors(prompts: list[str], *, out: str) -> list[Path]:
    """Cosines of tuned prompts, and of task prompt vectors, between tasks and initial prompts.

    Draws four heat maps (PNG, SVG): prompts and vectors, from different initial prompts and from
    one and the same. An entry is the mean over all such pairs of few-shot samples in common; on the
    diagonal over pairs of two prompts of a task. Writes similarities.csv (mean, standard deviation
    and number of pairs) and norms.csv (norms of vectors and initial prompts, and their ratio), and
    prints both.

    Of a grid the prompt of best dev score stands for its task, sample and seed. A prompt that is
    its own initial prompt has no vector, and is named and left out there.

    Args:
        prompts: prompt stores, folders of fits, prompt files or checkpoints, with tuned prompts of
            several tasks or seeds.
        out: folder for pictures and tables.

    Returns:
        The files.

    Raises:
        FileNotFoundError: a store that is not there.
        ValueError: stores without tuned prompts, prompts of different backbones or shapes, numbers
            that are not finite, or only one prompt of each sample.
        NotADirectoryError: ``out`` is a file.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {folder} is a file: name a folder")
    groups = _load(find_vectors(prompts))
    if max(len(sources) for sources in groups.values()) < 2:
        raise ValueError(
            f"only one tuned prompt of each sample in {', '.join(prompts)}: nothing to compare; "
            "tune several tasks, or several model.init_seed"
        )
    found = compare_prompts(groups)
    _print(found)
    write_csv(folder / "similarities.csv", _SIMILARITY_COLUMNS, _similarity_rows(found))
    write_csv(folder / "norms.csv", _NORM_COLUMNS, _norm_rows(found))
    return [folder / "similarities.csv", folder / "norms.csv", *_draw(found, folder)]


def _load(
    found: Mapping[Group, Mapping[str, FoundPrompt]],
) -> dict[int | None, list[FoundPrompt]]:
    """The prompts of each sample."""
    groups: dict[int | None, list[FoundPrompt]] = {}
    first = None
    for (sample, _), paths in found.items():
        for path in paths.values():
            source = path
            first = first or source
            check_compatible(first, source)
            groups.setdefault(sample, []).append(source)
    return groups


# ---- what is compared ----------------------------------------------------------------------------


def compare_prompts(groups: Mapping[int | None, Sequence[FoundPrompt]]) -> Comparison:
    """Cosines and norms of the prompts of each few-shot sample.

    Args:
        groups: prompts by sample; no two with one task and one initial prompt in a sample.
    """
    import torch

    tasks = sorted({source.prompt.task for sources in groups.values() for source in sources})
    values: dict[tuple[What, Starts], dict[tuple[str, str], list[float]]]
    values = {place: {} for place in PLACES}
    initial: list[float] = []
    for sources in groups.values():
        banks: dict[What, Tensor] = {
            "prompts": torch.stack([source.prompt.prompt for source in sources]).double(),
            "vectors": torch.stack([source.vector for source in sources]),
        }
        names = [source.prompt.task for source in sources]
        starts = _starts(sources)
        for what, bank in banks.items():
            cosines = _cosines(bank)
            _tell_zero(what, sources, cosines)
            for a, b in combinations(range(len(sources)), 2):
                which: Starts = "equal" if starts[a] == starts[b] else "different"
                key = (min(names[a], names[b]), max(names[a], names[b]))
                values[what, which].setdefault(key, []).append(cosines[a][b])
        own = [starts.index(start) for start in dict.fromkeys(starts)]
        inits = _cosines(torch.stack([sources[at].prompt.init for at in own]).double())
        initial += [inits[a][b] for a, b in combinations(range(len(own)), 2)]
    cosines_of = {
        place: {
            pair: summarise(found) for (a, b), found in by_key.items() for pair in ((a, b), (b, a))
        }
        for place, by_key in values.items()
    }
    everyone = [source for sources in groups.values() for source in sources]
    norms = {task: _norms([s for s in everyone if s.prompt.task == task]) for task in tasks}
    return Comparison(tasks, cosines_of, summarise(initial), norms)


def _starts(sources: Sequence[FoundPrompt]) -> list[int]:
    """The initial prompt of each source, as the place of the first that has the same numbers."""
    first: dict[bytes, int] = {}
    return [first.setdefault(s.prompt.init.numpy().tobytes(), i) for i, s in enumerate(sources)]


def _cosines(bank: Tensor) -> list[list[float]]:
    """Cosines (R, R) of a bank (R, N, D); NaN for prompts of zeros, which have no direction."""
    import torch

    from prompt_lab.core.similarity import cosine_similarities

    has_direction = bank.flatten(1).any(dim=1)
    found = torch.full((len(bank), len(bank)), math.nan, dtype=torch.float64)
    if has_direction.any():
        kept = bank[has_direction]
        found[has_direction.outer(has_direction)] = cosine_similarities(kept, kept).flatten()
    return found.tolist()


def _tell_zero(
    what: What, sources: Sequence[FoundPrompt], cosines: Sequence[Sequence[float]]
) -> None:
    """Name what is left out for having no direction."""
    zero = [s.where for at, s in enumerate(sources) if math.isnan(cosines[at][at])]
    if zero:
        print(f"prompt-lab: {what} left out, as they are zero: {listed(zero)}", file=sys.stderr)


def _norms(sources: Sequence[FoundPrompt]) -> tuple[Summary, Summary, Summary]:
    """Frobenius norms of the vectors and of the initial prompts of a task, and their ratios."""
    vectors = [source.vector.norm().item() for source in sources]
    inits = [source.prompt.init.double().norm().item() for source in sources]
    ratios = [v / i if i else math.nan for v, i in zip(vectors, inits, strict=True)]
    return summarise(vectors), summarise(inits), summarise(ratios)


# ---- what is written -----------------------------------------------------------------------------


def _similarity_rows(found: Comparison) -> Iterator[dict[str, Any]]:
    """A row per kind and two tasks, and one for the initial prompts."""
    for (what, which), entries in found.cosines.items():
        for (task, other), one in entries.items():
            if task <= other:
                row = {"what": what, "initial_prompts": which, "task": task, "other": other}
                yield row | {"mean": one.mean, "std": one.std, "pairs": one.count}
    one = found.initial
    row = {"what": "init", "initial_prompts": "different"}
    yield row | {"mean": one.mean, "std": one.std, "pairs": one.count}


def _norm_rows(found: Comparison) -> Iterator[dict[str, Any]]:
    """A row per task."""
    for task, (vector, init, ratio) in found.norms.items():
        row: dict[str, Any] = {"task": task, "prompts": vector.count}
        for name, one in (("vector", vector), ("init", init), ("ratio", ratio)):
            row |= {name: one.mean, f"{name}_std": one.std}
        yield row


def _print(found: Comparison) -> None:
    """Both tables as text."""
    for (what, which), entries in found.cosines.items():
        if entries:
            print(f"cosines of {what}, {which} initial prompts: mean ± std (ddof 1) and pairs\n")
            rows = [
                [a, *(spread(entries.get((a, b), _NO_PAIRS)) for b in found.tasks)]
                for a in found.tasks
            ]
            _print_table(["", *found.tasks], rows)
    print(f"cosines of different initial prompts: {spread(found.initial)}\n")
    print("norms: mean ± std (ddof 1) and prompts\n")
    rows = [[task, *map(spread, norms)] for task, norms in found.norms.items()]
    _print_table(["task", "vector", "init", "vector / init"], rows)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with aligned columns, and an empty line."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    print()


def _draw(found: Comparison, folder: Path) -> list[Path]:
    """Draw a heat map for each kind that has pairs."""
    import numpy as np

    from prompt_lab.analysis.interpretation_plots import heatmap
    from prompt_lab.analysis.old_plots import save_figure

    files = []
    for (what, which), entries in found.cosines.items():
        if not any(one.count for one in entries.values()):
            continue
        cells = [[entries.get((a, b), _NO_PAIRS) for b in found.tasks] for a in found.tasks]
        pairs = extent([one.count for one in entries.values()])
        note = f"mean ± std (ddof 1) over {pairs} pairs of {which} initial prompts"
        if which == "different" and found.initial.count:
            note += f"; initial prompts themselves: {found.initial.mean:.3f}"
        figure = heatmap(
            found.tasks,
            found.tasks,
            np.array([[one.mean for one in row] for row in cells]),
            f"cosine of {what}",
            form="{:.2f}",
            spread=np.array([[one.std for one in row] for row in cells]),
            note=note,
        )
        files += save_figure(figure, folder / f"{what}-{which}")
    return files
