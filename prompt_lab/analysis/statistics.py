"""Statistics of tables: t-tests, Holm's correction, bootstrap, Mantel's test, PCA and t-SNE.

Numbers in, numbers out: what cannot be said is NaN. SciPy makes the tests.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.05
"""Corrected p-values up to this one are marked."""

ROUNDING = 1e-12
"""Differences that spread by no more than this share of the scores count as equal."""

Floats = NDArray[np.float64]


def t_test(one: ArrayLike, other: ArrayLike, paired: bool) -> dict[str, float]:
    """Two-sided t-test of the scores of ``one`` against ``other``: Student's of pairs, or Welch's.

    Values that are not finite are left out, in a paired test with their partners. Gives ``n`` and
    ``n_other`` (values that count), ``difference`` of the means with its 95 % interval ``low`` to
    ``high``, ``t``, ``df`` and ``p`` (not corrected); NaN without two values a side or any spread.
    """
    from scipy.stats import ttest_ind, ttest_rel

    a, b = np.asarray(one, float), np.asarray(other, float)
    if paired:
        whole = np.isfinite(a) & np.isfinite(b)
        a, b = a[whole], b[whole]
    a, b = _finite(a), _finite(b)
    difference = float(a.mean() - b.mean()) if len(a) and len(b) else np.nan
    found = {"n": len(a), "n_other": len(b), "difference": difference}
    nothing = dict.fromkeys(("low", "high", "t", "df", "p"), np.nan)
    if min(len(a), len(b)) < 2:
        return found | nothing
    apart = [a - b] if paired else [a, b]
    if all(np.ptp(x) <= ROUNDING * max(abs(a).max(), abs(b).max()) for x in apart):
        return found | nothing
    with np.errstate(all="ignore"):
        test = ttest_rel(a, b) if paired else ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)  # pyright: ignore[reportAttributeAccessIssue]
    numbers = (low, high, test.statistic, test.df, test.pvalue)  # pyright: ignore
    return found | dict(zip(nothing, map(float, numbers), strict=True))


def holm(p_values: ArrayLike) -> Floats:
    """p-values of all tests of a table, corrected after Holm (1979); NaN stays and does not count.

    A test is significant at level a where its corrected p is at most a.
    """
    p = np.asarray(p_values, float)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    corrected = np.full(p.shape, np.nan)
    steps = np.arange(len(order), 0, -1) * p[order]
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected


def bootstrap(
    scores: Sequence[ArrayLike],
    reference: Sequence[ArrayLike] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over tasks of a mean over runs (percentiles).

    Tasks are drawn with replacement, and within each its runs. Of normal values it holds the true
    mean 76 % of the time for 3, 84 % for 5, 93 % for 30. Scores that are not finite are left out.
    With a ``reference`` on the same tasks it is of E_rel, the mean of score / reference. NaN twice
    with a single run of a single task, or none.
    """
    groups = [_finite(of_task) for of_task in scores]
    bases = [np.ones(1)] * len(groups) if reference is None else [_finite(x) for x in reference]
    pairs = [(x, y) for x, y in zip(groups, bases, strict=True) if len(x) and len(y)]
    if not pairs or (len(pairs) == 1 and len(pairs[0][0]) < 2):
        return np.nan, np.nan
    draw = np.random.default_rng(seed)
    means = [_means(draw, x, resamples) / _means(draw, y, resamples) for x, y in pairs]
    tasks = draw.integers(len(pairs), size=(resamples, len(pairs)))
    places = draw.integers(resamples, size=(resamples, len(pairs)))
    drawn = np.stack(means)[tasks, places]
    drawn = drawn[np.isfinite(drawn).all(axis=1)].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return float(low), float(high)


def _finite(values: ArrayLike) -> Floats:
    given = np.asarray(values, float)
    return given[np.isfinite(given)]


def _means(draw: np.random.Generator, values: Floats, resamples: int) -> Floats:
    places = draw.integers(len(values), size=(resamples, len(values)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return values[places].mean(axis=1)


def mantel(
    distances: ArrayLike, values: ArrayLike, permutations: int = 999, seed: int = 0
) -> dict[str, float]:
    """Spearman's correlation of two matrices (T, T) off their diagonals, with Mantel's test.

    Mantel (1967) permutes the tasks of one matrix, rows and columns together, since its cells are
    not independent: p = (b + 1) / (m + 1), where b of m permutations have a coefficient at least as
    far from zero; all orders where there are no more than m + 1. ``values`` need not be symmetric.

    Returns:
        ``rho`` and the two-sided ``p``, NaN with fewer than three tasks or three known cells and
        where one side is constant; ``cells`` that are known, ``permutations`` that were made.
    """
    from scipy.stats import spearmanr

    far, given = np.asarray(distances, float), np.asarray(values, float)
    size = len(far)
    known = ~np.eye(size, dtype=bool) & np.isfinite(given)

    def rho(order: Sequence[int] | NDArray[np.int64]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant ones have none
            return float(spearmanr(far[np.ix_(order, order)][known], given[known]).statistic)  # pyright: ignore

    cells = int(known.sum())
    found = {"rho": np.nan, "p": np.nan, "cells": cells, "permutations": 0}
    if size < 3 or cells < 3 or np.isnan(own := rho(range(size))):
        return found
    if math.factorial(size) - 1 <= permutations:
        orders = itertools.islice(itertools.permutations(range(size)), 1, None)
    else:
        draw = np.random.default_rng(seed)
        orders = (draw.permutation(size) for _ in range(permutations))
    made = [rho(order) for order in orders]
    beyond = (np.abs(np.nan_to_num(made)) >= abs(own) - ROUNDING).sum()
    p = float(beyond + 1) / (len(made) + 1)
    return found | {"rho": own, "p": p, "permutations": len(made)}


def principal_components(vectors: ArrayLike) -> tuple[Floats, tuple[float, float]]:
    """First two principal components of vectors (R, I): points (R, 2), and shares of the variance.

    Each component points to where its largest weight is positive, which fixes the sign. With I = 1
    the second is zero.
    """
    given = np.asarray(vectors, float)
    left, size, right = np.linalg.svd(given - given.mean(0), full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(1)])
    count = min(2, len(size))
    points, variance = np.zeros((len(given), 2)), np.zeros(2)
    points[:, :count] = (left * size * np.where(signs == 0, 1, signs))[:, :count]
    variance[:count] = size[:count] ** 2
    total = float((size**2).sum()) or 1.0
    return points, (float(variance[0] / total), float(variance[1] / total))


def tsne(vectors: ArrayLike, seed: int = 0) -> tuple[Floats, float]:
    """A map (R, 2) of vectors (R, I), R from 4, by exact t-SNE (van der Maaten and Hinton 2008).

    The perplexity, given too, is 30, or a third of the other points where there are fewer: it must
    stay below their number. t-SNE keeps neighbours together; distances and directions on its map
    say little.
    """
    from sklearn.manifold import TSNE

    given = np.asarray(vectors, float)
    perplexity = min(30.0, (len(given) - 1) / 3)
    # Distances stay as they are when vectors turn; few coordinates make t-SNE's start cheap.
    left, size, _ = np.linalg.svd(given - given.mean(0), full_matrices=False)
    made = TSNE(perplexity=perplexity, init="pca", method="exact", random_state=seed)
    return made.fit_transform(left * size).astype(float), perplexity
