"""How well a ranking of source tasks finds those that help a target task most.

A target's **scores** are what it reached from each of S sources, in percent, and a ranking is given
by S **similarities** (any numbers, the most promising source has the highest). nDCG and Regret@k
are those of Lin et al. 2024, "Exploring the Effectiveness and Consistency of Task Selection in
Intermediate-Task Transfer Learning", equations 5 to 7.

The gain of nDCG is 2^score - 1 on scores from 0 to 100, as in the paper and its code, so a point of
score doubles it and the best source counts most. Whoever scales scores to 0 to 1 gets other
numbers; a table of such scores is refused.

**Ties.** Sources of equal similarity are in random order: every measure is its exact expected value
over all orders of them. So RANDOM is the ranking in which all are equal, and its value no draw.

**Seeds.** A table may have several scores of one pair. With "mean" (the equations) they are
averaged first; with "each" (the authors' code, and the published figures) each seed is judged by
itself and its measures are averaged, which gives lower values, since a ranking is then held against
the best source of that seed.

Left out: correlations of whole rankings, which weigh all places alike.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = Sequence[float] | NDArray[Any]

Seeds = Literal["mean", "each"]

KS: tuple[int, ...] = (1, 3)
"""The k of Regret@k and of the relative transfer."""

NO_TRANSFER = "no-transfer"
"""Name of the row with the scores that the targets reach without a source."""

PAPER_TABLE = Path(__file__).parent / "data" / "selection_transfer.csv"
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
class Quality:
    """How good the ranking of the sources of one target is.

    Attributes:
        sources: number of sources.
        ndcg: nDCG of the full ranking, at most 1; NaN where no source scores above 0.
        regret: Regret@k by k, from 0; NaN where no source scores above 0, or there are fewer than
            k.
        score: score of the best of the first k, in percent, by k; NaN where there are fewer.
        gain: (score - baseline) / baseline, by k; NaN without a baseline above 0.
    """

    sources: int
    ndcg: float
    regret: Mapping[int, float]
    score: Mapping[int, float]
    gain: Mapping[int, float]


# ---- measures ------------------------------------------------------------------------------------


def ndcg(scores: Numbers, similarities: Numbers, k: int | None = None) -> float:
    """Normalised discounted cumulative gain of a ranking (Järvelin and Kekäläinen 2002).

    DCG = sum over places i = 1, 2, ... of (2^score_i - 1) / log2(i + 1), over all S places or the
    first k; nDCG is the DCG of the ranking over that of the best ranking (Lin et al. 2024,
    equations 5 and 6). Equal similarities have the expected value over their orders; equal numbers
    for all sources give that of a random ranking.

    Args:
        scores: (S,) what the target reaches from each source, in percent.
        similarities: (S,) the ranking, the highest first.
        k: places that count; without it all, as in the paper.

    Returns:
        At most 1; from 0 where no score is negative; NaN where no score is above 0.

    Raises:
        ValueError: not two rows of equal length of finite numbers, a score outside -100 to 100, or
            a k outside 1 to S.
    """
    import numpy as np

    score, likeness = _checked(scores, similarities, k)
    gains = np.exp2(score) - 1
    discounts = 1 / np.log2(np.arange(2, len(score) + 2))
    discounts[k if k is not None else len(score) :] = 0
    found, start = 0.0, 0
    for tied in _ties(likeness):
        found += gains[tied].mean() * discounts[start : start + len(tied)].sum()
        start += len(tied)
    if score.max() <= 0:
        return math.nan
    return float(found / (np.sort(gains)[::-1] @ discounts))


def best_of_top_k(scores: Numbers, similarities: Numbers, k: int) -> float:
    """The highest score among the first k sources of a ranking.

    Where a group of equal similarities stands across place k, m places remain for its g sources,
    and the value is the mean over all choices of m of g: the j-th smallest of them is the largest
    chosen one with probability C(j - 1, m - 1) / C(g, m).

    Args:
        scores: (S,) what the target reaches from each source, in percent.
        similarities: (S,) the ranking, the highest first.
        k: how many are chosen.

    Raises:
        ValueError: as :func:`ndcg`.
    """
    import numpy as np

    score, likeness = _checked(scores, similarities, k)
    sure, left = -math.inf, k
    for tied in _ties(likeness):
        values = np.sort(score[tied])
        if len(values) > left:
            ways = math.comb(len(values), left)
            chances = [math.comb(j, left - 1) / ways for j in range(len(values))]
            return float(np.maximum(values, sure) @ chances)
        sure, left = max(sure, values[-1]), left - len(values)
        if not left:
            break
    return float(sure)


def regret_at_k(scores: Numbers, similarities: Numbers, k: int) -> float:
    """What is lost by taking the best of the first k sources instead of the best of all.

    (max over all sources - max over the first k) / max over all sources: Renggli et al. 2022, Lin
    et al. 2024, equation 7. Equal similarities have the expected value over their orders.

    Args:
        scores: (S,) what the target reaches from each source, in percent.
        similarities: (S,) the ranking, the highest first.
        k: how many are chosen.

    Returns:
        From 0, a share of the best score; NaN where no score is above 0.

    Raises:
        ValueError: as :func:`ndcg`.
    """
    best = best_of_top_k(scores, similarities, k)
    highest = max(map(float, scores))
    return max(0.0, (highest - best) / highest) if highest > 0 else math.nan


def evaluate(
    table: Table, similarities: Mapping[str, Mapping[str, float]], seeds: Seeds = "mean"
) -> dict[str, Quality]:
    """Judge rankings of sources by what was measured.

    Args:
        table: measured transfer.
        similarities: by target and source; the highest is the most promising.
        seeds: whether scores of several seeds are averaged before ranking ("mean"), or the measures
            of each seed are ("each"; a seed counts for a target where all its sources have it).

    Returns:
        By target.

    Raises:
        ValueError: similarities that are missing or not finite, another ``seeds``, or a target
            without a seed that all its sources have.
    """
    if seeds not in get_args(Seeds):
        raise ValueError(f"seeds is {seeds!r}; allowed: {', '.join(get_args(Seeds))}")
    lost = [
        f"{source} for {target}"
        for target, source in table.pairs()
        if not math.isfinite(similarities.get(target, {}).get(source, math.nan))
    ]
    if lost:
        raise ValueError(
            f"no similarity of {len(lost)} of {len(table.pairs())} pairs that were measured: "
            f"{_some(lost)}; add them, or take the pairs out of the transfer table"
        )
    found = {}
    for target, of_source in table.scores.items():
        likeness = [similarities[target][source] for source in of_source]
        judged = [
            _quality(scores, likeness, table.baseline.get(target, math.nan))
            for scores in _score_rows(target, of_source, seeds)
        ]
        found[target] = _mean_quality(judged)
    return found


def _checked(
    scores: Numbers, similarities: Numbers, k: int | None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scores and similarities in float64; refused where they are no ranking of scores."""
    import numpy as np

    rows = []
    for name, given in (("scores", scores), ("similarities", similarities)):
        row = np.asarray(given, dtype=np.float64)
        if row.ndim != 1 or not row.size or not np.isfinite(row).all():
            raise ValueError(f"{name} {given!r}: give one row of finite numbers")
        rows.append(row)
    if rows[0].size != rows[1].size:
        raise ValueError(
            f"{rows[0].size} scores and {rows[1].size} similarities: give one each per source"
        )
    if abs(rows[0]).max() > 100:
        raise ValueError(f"scores {scores!r}: give percent, at most 100")
    if k is not None and not 1 <= k <= rows[0].size:
        raise ValueError(f"k is {k}, and there are {rows[0].size} sources: give 1 to that number")
    return rows[0], rows[1]


def _ties(similarities: NDArray[Any]) -> list[NDArray[Any]]:
    """Places of the sources of equal similarity, the highest similarity first."""
    import numpy as np

    values = np.unique(similarities)[::-1]
    return [np.flatnonzero(similarities == value) for value in values]


def _score_rows(
    target: str, of_source: Mapping[str, Mapping[str, float]], seeds: Seeds
) -> list[list[float]]:
    """Scores of a target's sources: their means over seeds, or those of each whole seed."""
    if seeds == "mean":
        return [[math.fsum(own.values()) / len(own) for own in of_source.values()]]
    first, *others = of_source.values()
    whole = [seed for seed in first if all(seed in own for own in others)]
    if not whole:
        raise ValueError(
            f"{target}: no seed that all its sources have, so none can be judged by itself; add "
            "the missing scores, or take the mean over seeds"
        )
    return [[own[seed] for own in of_source.values()] for seed in whole]


def _quality(scores: Sequence[float], similarities: Sequence[float], baseline: float) -> Quality:
    """All measures of one ranking."""
    ks = [k for k in KS if k <= len(scores)]
    regret, best, gain = (dict.fromkeys(KS, math.nan) for _ in range(3))
    for k in ks:
        regret[k] = regret_at_k(scores, similarities, k)
        best[k] = best_of_top_k(scores, similarities, k)
        gain[k] = (best[k] - baseline) / baseline if baseline > 0 else math.nan
    return Quality(len(scores), ndcg(scores, similarities), regret, best, gain)


def _mean_quality(found: Sequence[Quality]) -> Quality:
    """The mean over seeds of each measure; seeds for which it is NaN do not count."""

    def mean(values: Iterable[float]) -> float:
        """Mean of the known ones."""
        known = [value for value in values if not math.isnan(value)]
        return math.fsum(known) / len(known) if known else math.nan

    return Quality(
        found[0].sources,
        mean(own.ndcg for own in found),
        {k: mean(own.regret[k] for own in found) for k in KS},
        {k: mean(own.score[k] for own in found) for k in KS},
        {k: mean(own.gain[k] for own in found) for k in KS},
    )


# ---- tables --------------------------------------------------------------------------------------


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
        raise ValueError(f"a ranking needs two sources or more for a target: {_some(few)}")
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
        raise ValueError(f"{path}: columns without a name, or twice: {_some(twice or ['(empty)'])}")
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
    notes = [f"left out, a task as its own source: {_some(own)}"] if own else []
    sources = list(dict.fromkeys(name for found in scores.values() for name in found))
    missing = [
        f"{source} for {target}"
        for target, found in scores.items()
        for source in sources
        if source not in found and source != target
    ]
    if missing:
        notes.append(f"not measured, so not ranked for that target: {_some(missing)}")
    seeds = list(dict.fromkeys(s for f in scores.values() for own in f.values() for s in own))
    uneven = [
        f"{source} for {target}"
        for target, found in scores.items()
        for source, of_seed in found.items()
        if len(of_seed) < len(seeds)
    ]
    if uneven:
        notes.append(f"measured with fewer than {len(seeds)} seeds: {_some(uneven)}")
    return tuple(notes)


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
