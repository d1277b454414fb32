"""Means with counts and relative scores, against plain loops; what a mean leaves out, and why."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from prompt_lab.statistics import (
    DENOMINATOR_RULE,
    average_relative_gain,
    relative_performance,
    summarise,
)

NAN, INF = math.nan, math.inf


def scores(seed: int, size: int = 30) -> list[float]:
    return [random.Random(seed * 1000 + at).uniform(0.05, 1) for at in range(size)]


# ---- mean and spread -----------------------------------------------------------------------------


def test_mean_and_deviation_are_those_of_the_statistics_module():
    """Reference: the standard library, whose deviation has ddof 1 too."""
    values = scores(0)
    found = summarise(values)
    assert found.mean == pytest.approx(statistics.mean(values), rel=1e-12)
    assert found.std == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert (found.count, found.missing) == (30, 0)


@pytest.mark.parametrize("gap", [NAN, INF, -INF])
def test_missing_values_are_left_out_and_counted(gap):
    found = summarise([0.2, gap, 0.6, gap])
    assert found == summarise([0.2, 0.6]).__class__(0.4, found.std, 2, 2)
    assert found.std == pytest.approx(statistics.stdev([0.2, 0.6]))


def test_too_few_values_have_no_mean_or_no_deviation():
    empty, one = summarise([]), summarise([0.5, NAN])
    assert math.isnan(empty.mean)
    assert math.isnan(empty.std)
    assert (empty.count, empty.missing) == (0, 0)
    assert one.mean == 0.5
    assert math.isnan(one.std)  # one value has no spread; zero would say that runs agree
    assert math.isnan(summarise([NAN]).mean)


# ---- relative scores -----------------------------------------------------------------------------


def test_relative_performance_is_the_mean_of_the_ratios():
    """Reference: a loop over tasks; it is not the ratio of the means."""
    ours, base = scores(1), scores(2)
    ratios = []
    for one, other in zip(ours, base, strict=True):
        ratios.append(one / other)
    found = relative_performance(ours, base)
    assert found.values == pytest.approx(ratios, rel=1e-12)
    assert found.mean == pytest.approx(sum(ratios) / 30, rel=1e-12)
    assert found.std == pytest.approx(statistics.stdev(ratios), rel=1e-12)
    assert (found.count, found.left_out) == (30, {})
    assert found.mean != pytest.approx(sum(ours) / sum(base), rel=1e-3)


def test_average_relative_gain_is_the_mean_of_the_gains():
    """Reference: a loop over tasks."""
    ours, base = scores(3), scores(4)
    gains = [(one - other) / other for one, other in zip(ours, base, strict=True)]
    found = average_relative_gain(ours, base)
    assert found.values == pytest.approx(gains, rel=1e-12, abs=1e-15)
    assert found.mean == pytest.approx(sum(gains) / 30, rel=1e-12)
    assert found.mean == pytest.approx(relative_performance(ours, base).mean - 1, rel=1e-12)


@pytest.mark.parametrize("function", [relative_performance, average_relative_gain])
def test_tasks_without_a_ratio_are_left_out_with_the_reason(function):
    ours = [0.5, 0.5, 0.5, 0.5, NAN, NAN, 0.5, 0.0]
    base = [0.25, 0.0, -0.1, NAN, 0.5, 0.0, INF, 0.5]
    found = function(ours, base)
    assert found.left_out == {
        1: "reference zero",
        2: "reference negative",
        3: "reference missing",
        4: "score missing",
        5: "score missing",
        6: "reference missing",
    }
    kept = function([0.5, 0.0], [0.25, 0.5])
    assert (found.count, found.mean, found.std) == (2, kept.mean, kept.std)
    assert [at for at, value in enumerate(found.values) if math.isnan(value)] == [1, 2, 3, 4, 5, 6]
    for word in ("missing", "zero", "negative", "named"):
        assert word in DENOMINATOR_RULE


def test_a_score_of_zero_counts_and_a_negative_one_too():
    assert relative_performance([0.0, -0.2], [0.5, 0.4]).mean == pytest.approx(-0.25)


def test_no_task_at_all_has_no_mean():
    found = relative_performance([], [])
    assert math.isnan(found.mean)
    assert found.count == 0
    assert math.isnan(relative_performance([0.5], [0.0]).mean)


@pytest.mark.parametrize(
    ("ours", "base"), [([0.5], [0.5, 0.5]), ([[0.5]], [[0.5]]), (np.ones(3), np.ones((3, 1)))]
)
def test_scores_and_reference_of_different_shapes_are_refused(ours, base):
    with pytest.raises(ValueError, match="one number per task each"):
        relative_performance(ours, base)
