"""Measured transfer between tasks: its table, and what it gains over no transfer.

A table has the scores in percent that targets reach from sources, perhaps of several seeds and
perhaps with those without transfer, or, for a ranking, similarities. It is read from CSV files;
`transfer_results` makes it from runs. Left out: rankings, which `selection`
judges.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prompt_lab.analysis.old_results import bootstrap_interval, summarise

NO_TRANSFER = "no-transfer"
"""Name of the row with the scores that the targets reach without a source."""

PAPER_TABLE = Path(__file__).parents[1] / "data" / "selection_transfer.csv"
"""Table 7 of Lin et al. 2024, and the sizes of its Table 2."""

_LONG = ("source", "target", "score")
_SIZE = "size"


@dataclass(frozen=True)
class Entry:
    """One number of a table.

    Attributes:
        source: the source task; `NO_TRANSFER` for none.
        target: the target task.
        score: a score in percent, or a similarity.
        seed: what tells repetitions apart; empty where there is one.
    """

    source: str
    target: str
    score: float
    seed: str = ""


@dataclass(frozen=True)
class Table:
    """Measured transfer.

    Attributes:
        scores: in percent, by target, source and seed.
        baseline: mean score without transfer, by target; of some targets, or none.
        sizes: rows of the training set, by source; of some sources, or none.
        notes: what was left out, and what is missing.
    """

    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    baseline: Mapping[str, float]
    sizes: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def sources(self) -> list[str]:
        """The sources of all targets, each once."""
        return list(dict.fromkeys(name for found in self.scores.values() for name in found))

    def pairs(self) -> list[tuple[str, str]]:
        """Target and source of every pair that was measured."""
        return [(target, source) for target, own in self.scores.items() for source in own]


@dataclass(frozen=True)
class Spread:
    """Mean and spread of some numbers; NaN where there are too few for it.

    Attributes:
        count: how many numbers.
        mean: their mean.
        std: standard deviation (ddof 1).
        low: lower end of the 95 % bootstrap interval of the mean, by percentiles.
        high: its upper end.
    """

    count: int
    mean: float
    std: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Mean, standard deviation and bootstrap interval of the values that are finite."""
    given = list(values)
    summary = summarise(given)
    return Spread(summary.count, summary.mean, summary.std, *bootstrap_interval(given))


def relative_transfer(table: Table) -> dict[tuple[str, str], list[float]]:
    """What transfer gains, as a share of the score without it.

    (M_st - M_t) / M_t: Lin et al. 2024, section 3, with M_st the score of target t from source s,
    and M_t the mean score of t without transfer, over its seeds.

    Args:
        table: measured transfer.

    Returns:
        In percent, one number for each seed, by target and source. Targets without a mean above 0
        are left out.
    """
    gains = {}
    for target, source in table.pairs():
        base = table.baseline.get(target, 0.0)
        if base > 0:
            scores = table.scores[target][source].values()
            gains[target, source] = [100 * (score - base) / base for score in scores]
    return gains


def make_table(entries: Sequence[Entry], sizes: Mapping[str, float] | None = None) -> Table:
    """Measured transfer from its numbers.

    A task as its own source is left out. What some target or seed lacks is told in the notes.

    Args:
        entries: scores in percent; those of source `NO_TRANSFER` make the baseline.
        sizes: rows of training sets, by source.

    Raises:
        ValueError: a pair twice for one seed, a score outside -100 to 100, all scores at most 1,
            targets with a baseline only, or with fewer than two sources.
    """
    keys = [(entry.source, entry.target, entry.seed) for entry in entries]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        source, target, seed = twice[0]
        of_seed = f" and seed {seed}" if seed else ""
        raise ValueError(
            f"{len(twice)} scores stand more than once, such as that of {source} for {target}"
            f"{of_seed}: keep one, or tell them apart in a column seed"
        )
    _check_percent([entry.score for entry in entries])
    scores: dict[str, dict[str, dict[str, float]]] = {}
    baseline: dict[str, list[float]] = {}
    own = []
    for entry in entries:
        if entry.source == NO_TRANSFER:
            baseline.setdefault(entry.target, []).append(entry.score)
        elif entry.source == entry.target:
            own.append(entry.target)
        else:
            of_target = scores.setdefault(entry.target, {})
            of_target.setdefault(entry.source, {})[entry.seed] = entry.score
    few = [target for target in {**baseline, **scores} if len(scores.get(target, {})) < 2]
    if few or not scores:
        raise ValueError(f"a ranking needs two sources or more for a target: {some(few)}")
    means = {target: math.fsum(values) / len(values) for target, values in baseline.items()}
    notes = _notes(scores, sorted(set(own)))
    return Table(scores, means, dict(sizes or {}), notes)


def read_table(path: str | Path) -> tuple[list[Entry], dict[str, float]]:
    """Read a CSV table of numbers for pairs of tasks, scores or similarities.

    It is either long, with the columns ``source``, ``target``, ``score`` and perhaps ``seed``, or
    wide: a row per source, named in the first column, and a column per target. Either may have a
    column ``size``, the rows of the source's training set. Empty cells are missing numbers, and
    lines that start with # are comments.

    Args:
        path: the file.

    Returns:
        The numbers, and the sizes by source.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no such table; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give a CSV table")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    kept = [(at, line) for at, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]
    cells = [[cell.strip() for cell in row] for row in csv.reader(line for _, line in kept)]
    if len(cells) < 2 or len(cells) != len(kept):
        raise ValueError(f"{path} has no rows: give a header, and a line for each source")
    header, *rows = cells
    _check_header(path, header)
    entries: list[Entry] = []
    sizes: dict[str, float] = {}
    for (line, _), row in zip(kept[1:], rows, strict=True):
        try:
            entries += _row_entries(header, row, sizes)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
    return entries, sizes


def _check_header(path: Path, header: Sequence[str]) -> None:
    """Refuse a header that names no table."""
    twice = [name or "(empty)" for name, count in Counter(header).items() if count > 1]
    if twice or "" in header[1:]:
        raise ValueError(f"{path}: columns without a name, or twice: {some(twice or ['(empty)'])}")
    if set(_LONG) <= set(header):
        unknown = [name for name in header if name not in (*_LONG, "seed", _SIZE)]
        if unknown:
            raise ValueError(
                f"{path}: unknown columns {', '.join(unknown)}; a long table has source, target, "
                "score, and perhaps seed and size"
            )
    elif not [name for name in header[1:] if name != _SIZE]:
        raise ValueError(f"{path}: no column of a target; give a row per source, a column each")


def _row_entries(header: Sequence[str], row: Sequence[str], sizes: dict[str, float]) -> list[Entry]:
    """The numbers of one line; its size is added to ``sizes``."""
    if len(row) != len(header):
        raise ValueError(f"{len(row)} cells for {len(header)} columns")
    cells = dict(zip(header, row, strict=True))
    is_long = set(_LONG) <= set(header)
    source = _source(cells["source"] if is_long else row[0])
    if cells.get(_SIZE):
        size = _number(_SIZE, cells[_SIZE])
        if size <= 0 or sizes.setdefault(source, size) != size:
            raise ValueError(f"size of {source} is {cells[_SIZE]}: give one number above 0")
    if not is_long:
        numbers = ((name, text) for name, text in zip(header[1:], row[1:], strict=True))
        return [
            Entry(source, name, _number(name, text))
            for name, text in numbers
            if text != ""
            if name != _SIZE
        ]
    if not cells["target"]:
        raise ValueError("no target")
    if not cells["score"]:
        return []
    return [Entry(source, cells["target"], _number("score", cells["score"]), cells.get("seed", ""))]


def _source(name: str) -> str:
    """Name of a source; `NO_TRANSFER` in any spelling."""
    if not name:
        raise ValueError(f"no source; {NO_TRANSFER} stands for none")
    plain = re.sub(r"[\s_-]+", "-", name.lower())
    return NO_TRANSFER if plain == NO_TRANSFER else name


def _number(name: str, text: str) -> float:
    """A finite number of a cell."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} is {text!r}, not a finite number; leave missing ones empty")
    return value


def _check_percent(scores: Sequence[float]) -> None:
    """Refuse scores that are no percent."""
    wrong = [score for score in scores if abs(score) > 100]
    if wrong:
        raise ValueError(f"scores such as {wrong[0]:g}: give percent, at most 100")
    if scores and max(map(abs, scores)) <= 1:
        raise ValueError(
            "all scores are at most 1: give percent, 0 to 100, which the gains of nDCG need"
        )


def _notes(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]], own: list[str]
) -> tuple[str, ...]:
    """What a table leaves out, and what it lacks."""
    notes = [f"left out, a task as its own source: {some(own)}"] if own else []
    sources = list(dict.fromkeys(name for found in scores.values() for name in found))
    missing = [
        f"{source} for {target}"
        for target, found in scores.items()
        for source in sources
        if source not in found and source != target
    ]
    if missing:
        notes.append(f"not measured, so not ranked for that target: {some(missing)}")
    seeds = list(dict.fromkeys(s for f in scores.values() for own in f.values() for s in own))
    uneven = [
        f"{source} for {target}"
        for target, found in scores.items()
        for source, of_seed in found.items()
        if len(of_seed) < len(seeds)
    ]
    if uneven:
        notes.append(f"measured with fewer than {len(seeds)} seeds: {some(uneven)}")
    return tuple(notes)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names as text, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
