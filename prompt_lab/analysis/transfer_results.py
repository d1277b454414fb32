"""Measured transfer between tasks, from CSV tables and from the results of fits.

In ``results.csv`` a run is a transfer if it starts from the prompt file of another task. Scores
become percent. Left out: rankings of sources, which `prompt_lab.analysis.selection` judges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_lab.analysis.transfer_table import (
    NO_TRANSFER,
    PAPER_TABLE,
    Entry,
    Table,
    make_table,
    read_table,
)
from prompt_lab.files.results import PLAIN_STARTS

if TYPE_CHECKING:
    from prompt_lab.analysis.old_results import Row

PAPER = "paper"
"""Reserved name of the transfer table of Lin et al. 2024 that ships with the package."""

_ALIKE = ("method", "backbone", "num_virtual_tokens", "metric_variant")
"""Columns of result files in which all runs of a transfer table must agree."""


def read_transfer(places: Sequence[str]) -> Table:
    """Measured transfer from CSV tables and result files.

    Of the runs of one source, task, sample and seeds, the one with the best dev score counts. The
    seed of a run is its sample, initialisation seed and order seed, with slashes between them.

    Args:
        places: CSV tables, results.csv files, folders with such, or `PAPER`.

    Raises:
        FileNotFoundError: a file, folder or prompt file that is not there.
        ValueError: a table that cannot be read, results of several settings, or no transfer.
    """
    from prompt_lab.analysis.old_results import find_results, is_result_file, read_results

    entries: list[Entry] = []
    sizes: dict[str, float] = {}
    results: list[Path] = []
    notes: tuple[str, ...] = ()
    for place in places:
        path = PAPER_TABLE if place == PAPER else Path(place)
        if path.is_dir() or is_result_file(path):
            results += find_results([path])
            continue
        found, own_sizes = read_table(path)
        entries += found
        sizes |= own_sizes
    if results:
        found, notes = _results_entries(read_results(results))
        entries += found
    table = make_table(entries, sizes)
    return Table(table.scores, table.baseline, table.sizes, (*notes, *table.notes))


def _results_entries(rows: Sequence[Row]) -> tuple[list[Entry], tuple[str, ...]]:
    """Scores in percent of the runs that are transfers or have none, and what was left out."""
    from prompt_lab.files.results import best_by_dev

    tuned = [row for row in rows if row.cells["variant"] == "tuned"]
    targets = {
        row.cells["task"]
        for row in tuned
        if _source(row) not in ("", NO_TRANSFER, row.cells["task"])
    }
    used = [row for row in tuned if row.cells["task"] in targets and _source(row)]
    if not targets:
        raise ValueError(
            "no run starts from the prompt file of another task (model.init.name file, with "
            "model.init.source_tasks or a .safetensors file as model.init.path), so there is no "
            "transfer to compare with"
        )
    _check_alike(used)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in used:
        source = _source(row), row.cells["order_seed"]
        groups.setdefault(source, []).append(row.cells)
    entries, untested = [], 0
    for (source, order), group in groups.items():
        for cells in best_by_dev(group):
            seed = "/".join((cells["sample"], cells["init_seed"], order))
            if cells["test"]:
                score = 100 * float(cells["test"])
                entries.append(Entry(source, cells["task"], score, seed))
            untested += not cells["test"]
    others = len(tuned) - len(used)
    notes = []
    if others:
        notes.append(f"left out, {others} tuned runs of other tasks or other starts")
    if untested:
        notes.append(f"left out, {untested} runs without a test score")
    return entries, tuple(notes)


def _source(row: Row) -> str:
    """Task whose prompt a run starts from; `NO_TRANSFER`, or empty for other starts."""
    if row.cells["start"] in PLAIN_STARTS:
        return NO_TRANSFER
    return row.cells["start_of"] if row.cells["start"] == "prompt" else ""


def _check_alike(rows: Sequence[Row]) -> None:
    """Refuse runs whose scores cannot be compared."""
    for column in _ALIKE:
        values = sorted({row.cells[column] for row in rows})
        if len(values) > 1:
            raise ValueError(
                f"the transfer runs differ in {column}: {', '.join(values)}; give the result files "
                "of one"
            )
    alone = [row for row in rows if _source(row) == NO_TRANSFER]
    for what, column, own in (
        ("the transfer runs of a task differ in shots", "shots", rows),
        ("a task has several starts without transfer", "start", alone),
    ):
        found: dict[str, set[str]] = {}
        for row in own:
            found.setdefault(row.cells["task"], set()).add(row.cells[column])
        several = [f"{x} ({', '.join(sorted(ways))})" for x, ways in found.items() if len(ways) > 1]
        if several:
            raise ValueError(f"{what}: {'; '.join(several)}; give the result files of one")
