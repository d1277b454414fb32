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

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from prompt_lab.analysis.transfer_table import Table, some

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = Sequence[float] | NDArray[Any]

Seeds = Literal["mean", "each"]

KS: tuple[int, ...] = (1, 3)
"""The k of Regret@k and of the relative transfer."""


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
    table: Table,
    similarities: Mapping[str, Mapping[str, float]],
    seeds: Seeds = "mean",
    ks: Sequence[int] = KS,
) -> dict[str, Quality]:
    """Judge rankings of sources by what was measured.

    Args:
        table: measured transfer.
        similarities: by target and source; the highest is the most promising.
        seeds: whether scores of several seeds are averaged before ranking ("mean"), or the measures
            of each seed are ("each"; a seed counts for a target where all its sources have it).
        ks: the k of the measures of the first k.

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
            f"{some(lost)}; add them, or take the pairs out of the transfer table"
        )
    found = {}
    for target, of_source in table.scores.items():
        likeness = [similarities[target][source] for source in of_source]
        judged = [
            judge(scores, likeness, table.baseline.get(target, math.nan), ks)
            for scores in _score_rows(target, of_source, seeds)
        ]
        found[target] = mean_quality(judged)
    return found


def judge(
    scores: Numbers, similarities: Numbers, baseline: float = math.nan, ks: Sequence[int] = KS
) -> Quality:
    """All measures of one ranking.

    Args:
        scores: (S,) what the target reaches from each source, in percent.
        similarities: (S,) the ranking, the highest first.
        baseline: score without transfer; NaN for unknown.
        ks: the k of the measures of the first k.

    Raises:
        ValueError: as :func:`ndcg`.
    """
    regret, best, gain = (dict.fromkeys(ks, math.nan) for _ in range(3))
    for k in ks:
        if k <= len(scores):
            regret[k] = regret_at_k(scores, similarities, k)
            best[k] = best_of_top_k(scores, similarities, k)
            gain[k] = (best[k] - baseline) / baseline if baseline > 0 else math.nan
    return Quality(len(scores), ndcg(scores, similarities), regret, best, gain)


def mean_quality(found: Sequence[Quality]) -> Quality:
    """The mean of each measure over rankings of one target; where it is NaN, it does not count."""

    def mean(values: Iterable[float]) -> float:
        """Mean of the known ones."""
        known = [value for value in values if not math.isnan(value)]
        return math.fsum(known) / len(known) if known else math.nan

    first = found[0]
    return Quality(
        first.sources,
        mean(own.ndcg for own in found),
        {k: mean(own.regret[k] for own in found) for k in first.regret},
        {k: mean(own.score[k] for own in found) for k in first.score},
        {k: mean(own.gain[k] for own in found) for k in first.gain},
    )


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
