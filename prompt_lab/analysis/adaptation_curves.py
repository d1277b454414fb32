"""Adaptation curves: dev scores of the runs that count, over the steps of their training.

They are read from ``curves.csv`` beside the runs' prompts, and averaged over tasks and samples that
all compared starts have. Fine tuning has no curve here, since its results name no prompt. Left out:
pictures and tables, which are in `prompt_lab.analysis.gain_report`.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from prompt_lab.analysis.report import Line, Row, counted, listed
from prompt_lab.analysis.statistics import summarise
from prompt_lab.files.results import read_csv

PLAIN = "plain"
"""Name of the start that plain prompt tuning has."""

Cell = tuple[str, str]
"""A task and one of its samples."""

_MANY = 3
"""Most folders that a note names."""


@dataclass(frozen=True)
class Curve:
    """Dev scores of one run.

    Attributes:
        dev: dev score by step; at least one.
        ended: whether training ended before its budget, by patience or failure.
    """

    dev: Mapping[int, float]
    ended: bool = False

    @cached_property
    def last(self) -> int:
        """The last step."""
        return max(self.dev)

    def at(self, step: int) -> float | None:
        """Dev score at a step; a run that ended early keeps its last one; None where unknown."""
        if self.ended and step > self.last:
            return self.dev[self.last]
        return self.dev.get(step)


@dataclass(frozen=True)
class Point:
    """One step of an adaptation curve.

    Attributes:
        step: optimizer steps done.
        mean: mean over tasks of the mean over samples of the dev score.
        std: standard deviation (ddof 1) over samples of the mean over tasks; NaN with fewer than
            two samples.
        tasks: number of tasks.
        samples: number of samples.
    """

    step: int
    mean: float
    std: float
    tasks: int
    samples: int


def adaptation(curves: Mapping[Cell, Sequence[Curve]]) -> list[Point]:
    """Mean dev score over tasks and samples, at the steps for which every run has one.

    Args:
        curves: the runs of each task and sample; those of several seeds are averaged first.
    """
    steps = {step for of_cell in curves.values() for run in of_cell for step in run.dev}
    points = []
    for step in sorted(steps):
        dev = {cell: [run.at(step) for run in of_cell] for cell, of_cell in curves.items()}
        if any(None in of_cell for of_cell in dev.values()):
            continue
        by_task: dict[str, list[float]] = defaultdict(list)
        by_sample: dict[str, list[float]] = defaultdict(list)
        for (task, sample), of_cell in dev.items():
            value = summarise(x for x in of_cell if x is not None).mean
            by_task[task].append(value)
            by_sample[sample].append(value)
        mean = summarise(summarise(of_task).mean for of_task in by_task.values())
        spread = summarise(summarise(of_sample).mean for of_sample in by_sample.values())
        points.append(Point(step, mean.mean, spread.std, mean.count, spread.count))
    return points


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """Dev scores by run and step of a ``curves.csv``; steps without a dev score are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no such table, or with words for numbers.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    try:
        for row in read_csv(path):
            dev = float(row["dev"] or math.nan)
            if math.isfinite(dev):
                found[row["run"]][int(row["step"])] = dev
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no curves.csv of prompt-lab: {error!r}") from None
    return dict(found)


class CurveReader:
    """Curves of runs, with what kept some runs from having one; reads each file once."""

    def __init__(self) -> None:
        """Start with nothing read."""
        self._files: dict[Path, dict[str, dict[int, float]] | str] = {}

    def curves(self, line: Line, tasks: Iterable[str]) -> dict[Cell, list[Curve]]:
        """Curves of the runs of a line that count, on some tasks."""
        found: dict[Cell, list[Curve]] = defaultdict(list)
        for cell, row in _chosen(line, tasks):
            dev = self._dev(row)
            if not isinstance(dev, str):
                found[cell].append(Curve(dev, row.failed or row.stopped))
        return dict(found)

    def problems(self, line: Line, tasks: Iterable[str]) -> Iterator[str]:
        """Why runs of a line that count have no curve."""
        folders: dict[str, list[str]] = defaultdict(list)
        for _, row in _chosen(line, tasks):
            dev = self._dev(row)
            if isinstance(dev, str):
                folders[dev].append(str(_folder(row)))
        for why, of_why in folders.items():
            names = list(dict.fromkeys(of_why))
            more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
            yield (
                f"no adaptation curve for {counted(len(of_why), 'run')}, {why}: "
                f"{', '.join(names[:_MANY])}{more}"
            )

    def _dev(self, row: Row) -> dict[int, float] | str:
        """Dev scores of a run by step, or why there are none."""
        name = row.cells.get("prompt_file", "")
        if not name:
            return "which name no prompt file"
        path = _folder(row) / "curves.csv"
        if path not in self._files:
            try:
                self._files[path] = read_curves(path)
            except FileNotFoundError:
                self._files[path] = "without a curves.csv"
            except (OSError, ValueError):
                self._files[path] = "with a curves.csv that cannot be read"
        found = self._files[path]
        if isinstance(found, str):
            return found
        return found.get(Path(name).stem) or "with a curves.csv that has no dev score of them"


def _chosen(line: Line, tasks: Iterable[str]) -> Iterator[tuple[Cell, Row]]:
    """The runs of a line that count, on some tasks, each with its task and sample."""
    for task in tasks:
        if task in line.tasks:
            yield from (((task, row.cells["sample"]), row) for row in line.tasks[task].chosen)


def _folder(row: Row) -> Path:
    """The folder of a run's fit, in which ``prompts/`` and ``curves.csv`` lie."""
    return Path(row.cells.get("prompt_file", "")).parent.parent


def adaptations(
    lines: Mapping[str, Line], tasks: Sequence[str], reader: CurveReader
) -> tuple[dict[str, list[Point]], list[str]]:
    """Adaptation curves by start, on the tasks and samples that all starts have, and notes."""
    found = {start: reader.curves(line, tasks) for start, line in lines.items()}
    found = {start: curves for start, curves in found.items() if curves}
    if not set(found) - {PLAIN}:
        return {}, []
    cells = [set(curves) for curves in found.values()]
    shared = set.intersection(*cells)
    stray = sorted(set.union(*cells) - shared)
    notes, curves, short = [], {}, []
    if stray:
        notes.append(
            f"adaptation curves are of the tasks and samples that all of {', '.join(found)} have; "
            f"left out: {counted(len(stray), 'pair')} of {listed(_tasks_of(stray))}"
        )
    samples = {sample for _, sample in shared}
    if len(shared) < len(_tasks_of(shared)) * len(samples):
        notes.append(
            "not every sample has all tasks, so the spread of adaptation curves holds differences "
            "between tasks"
        )
    for start, of_start in found.items():
        kept = {cell: runs for cell, runs in of_start.items() if cell in shared}
        points = adaptation(kept)
        if points:
            curves[start] = points
            short += _carried(start, kept, points[-1].step)
        elif kept:
            notes.append(f"no adaptation curve of {start}: its runs share no step")
    if short:
        notes.append(
            "adaptation curves carry on the last dev score of runs that ended before the last step "
            f"(patience or failure): {', '.join(short)}"
        )
    return curves, notes


def _carried(start: str, curves: Mapping[Cell, Sequence[Curve]], last: int) -> Iterator[str]:
    """How many runs of a start ended before a step; nothing where none did."""
    runs = [run for of_cell in curves.values() for run in of_cell]
    short = sum(run.ended and run.last < last for run in runs)
    if short:
        yield f"{short} of {counted(len(runs), 'run')} of {start}"


def _tasks_of(cells: Iterable[Cell]) -> list[str]:
    """The tasks of some pairs of task and sample."""
    return sorted({task for task, _ in cells})
