"""Tests, correction, bootstrap and components: against SciPy, NumPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from prompt_lab.analysis.statistics import bootstrap, holm, principal_components, t_test

ONE = np.array([0.5, 0.62, 0.71, 0.55])
OTHER = np.array([0.4, 0.66, 0.6, 0.5])


@pytest.mark.parametrize("paired", [True, False])
def test_t_tests_are_those_of_scipy(paired):
    expected = (
        stats.ttest_rel(ONE, OTHER) if paired else stats.ttest_ind(ONE, OTHER, equal_var=False)
    )
    found = t_test(ONE, OTHER, paired)
    assert found["p"] == expected.pvalue
    assert found["t"] == expected.statistic
    assert (found["low"], found["high"]) == (*expected.confidence_interval(0.95),)
    assert found["difference"] == pytest.approx(ONE.mean() - OTHER.mean())


def test_missing_scores_leave_out_pairs_or_values():
    gap = np.array([np.nan, *ONE[1:]])
    assert t_test(gap, OTHER, True)["p"] == t_test(ONE[1:], OTHER[1:], True)["p"]
    assert t_test(gap, OTHER, False)["p"] == t_test(ONE[1:], OTHER, False)["p"]
    assert t_test(gap, OTHER, False)["n"] == 3


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
