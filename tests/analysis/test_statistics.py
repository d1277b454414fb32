"""Tests, correction, bootstrap and maps: against SciPy, NumPy and by hand."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr

from prompt_lab.analysis.statistics import (
    bootstrap,
    holm,
    mantel,
    principal_components,
    t_test,
    tsne,
)

ONE = np.array([0.5, 0.62, 0.71, 0.55])
OTHER = np.array([0.4, 0.66, 0.6, 0.5])


@pytest.mark.parametrize("paired", [True, False])
def test_t_tests_are_those_of_scipy_without_missing_scores(paired):
    """Which leave out their pairs, or themselves."""
    other = OTHER[1:] if paired else OTHER
    how = stats.ttest_rel if paired else partial(stats.ttest_ind, equal_var=False)
    expected = how(ONE[1:], other)
    found = t_test([np.nan, *ONE[1:]], OTHER, paired)
    interval = expected.confidence_interval(0.95)
    assert [found[x] for x in "pt"] == [expected.pvalue, expected.statistic]
    assert [found[x] for x in ("low", "high")] == [*interval]
    assert found["difference"] == pytest.approx(ONE[1:].mean() - other.mean())
    assert (found["n"], found["n_other"]) == (3, len(other))


@pytest.mark.parametrize(
    ("one", "other", "paired"),
    [([0.5], [0.4], True), ([], [], False), (ONE, ONE - 0.1, True), ([1, 1], [0.5, 0.5], False)],
)
def test_without_runs_or_spread_there_is_no_test(one, other, paired):
    assert np.isnan(t_test(one, other, paired)["p"])


def test_holm_by_hand():
    expected = [0.04, 0.06, np.nan, 0.06, 0.9]
    np.testing.assert_allclose(holm([0.01, 0.02, np.nan, 0.03, 0.9]), expected)
    assert holm([]).shape == (0,)


def test_intervals_repeat_hold_the_mean_and_grow_with_the_spread():
    tasks = [ONE, OTHER, ONE + 0.2]
    low, high = bootstrap(tasks)
    assert (low, high) == bootstrap(tasks)
    assert low < np.mean([x.mean() for x in tasks]) < high
    assert bootstrap([ONE, OTHER + 0.5])[1] - bootstrap([ONE, OTHER + 0.5])[0] > high - low
    assert np.isnan(bootstrap([[0.5]])).all()
    assert np.isnan(bootstrap([])).all()
    low, high = bootstrap([ONE])
    assert ONE.min() < low < high < ONE.max()


def test_intervals_of_ratios_hold_the_ratio():
    low, high = bootstrap([ONE, OTHER], [OTHER, ONE])
    assert low < (ONE.mean() / OTHER.mean() + OTHER.mean() / ONE.mean()) / 2 < high


def test_components_are_those_of_the_covariance():
    vectors = np.random.default_rng(0).normal(size=(7, 3)) * [3, 1, 0.1]
    points, shares = principal_components(vectors)
    values = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    np.testing.assert_allclose(points.var(0, ddof=1), values[:2])
    np.testing.assert_allclose(shares, values[:2] / values.sum())
    assert principal_components([[1.0], [2.0]])[0][:, 1].tolist() == [0, 0]
    assert principal_components([[1.0, 1.0], [1.0, 1.0]])[1] == (0, 0)


# ---- Mantel's test and t-SNE ---------------------------------------------------------------------


def matrices(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Distances of some points, and an asymmetric matrix that falls with them, with noise."""
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(size, 3))
    far = cdist(points, points)
    return far, -far + 0.5 * draw.normal(size=(size, size))


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix[~np.eye(len(matrix), dtype=bool)]


@pytest.mark.parametrize("size", [4, 8])
def test_tasks_are_permuted_in_every_way_or_at_random_with_the_seed(size):
    """Reference: SciPy's coefficient under all 24 orders of four tasks, or under 99 drawn ones."""
    far, gains = matrices(size)
    draw = np.random.default_rng(3)
    orders = [draw.permutation(8) for _ in range(99)]
    orders = [*itertools.permutations(range(4))][1:] if size == 4 else orders
    given, *made = (
        spearmanr(off_diagonal(far[np.ix_(o, o)]), off_diagonal(gains)).statistic
        for o in [range(size), *orders]
    )
    p = (np.sum(np.abs(made) >= abs(given) - 1e-12) + 1) / (len(made) + 1)
    found = mantel(far, gains, permutations=99, seed=3)
    cells = size * (size - 1)
    assert found == {"rho": given, "p": p, "cells": cells, "permutations": len(made)}


def test_diagonals_are_not_looked_at_and_unknown_cells_are_left_out():
    far, gains = matrices(5)
    given = mantel(far, gains)
    np.fill_diagonal(far, np.nan)
    np.fill_diagonal(gains, 1e9)
    assert mantel(far, gains) == given
    gains[0, 3] = gains[2, 1] = np.nan
    known = np.isfinite(off_diagonal(gains))
    wanted = spearmanr(off_diagonal(far)[known], off_diagonal(gains)[known]).statistic
    found = mantel(far, gains)
    assert found["rho"] == pytest.approx(wanted)
    assert (found["cells"], found["permutations"]) == (18, 119)


@pytest.mark.parametrize("size", [2, 4])
def test_matrices_without_a_correlation_have_none(size):
    far, gains = matrices(size)
    cases = [(far, np.full_like(far, np.nan)), (far, np.ones_like(far)), (np.ones_like(far), gains)]
    for one, other in cases if size > 2 else [(far, gains)]:
        assert np.isnan(mantel(one, other)["rho"])
        assert np.isnan(mantel(one, other)["p"])


def test_tsne_keeps_two_clusters_apart_whatever_the_number_of_coordinates():
    vectors = np.random.default_rng(0).normal(size=(12, 400)) + 5 * (np.arange(12) < 6)[:, None]
    points, perplexity = tsne(vectors)
    assert perplexity == pytest.approx(11 / 3)
    near = cdist(points, points) + np.diag([np.inf] * 12)
    assert all((at < 6) == (near[at].argmin() < 6) for at in range(12))
    assert np.array_equal(points, tsne(vectors)[0])
