"""Means with counts and relative scores, against plain loops; what a mean leaves out, and why.

Tests of significance against SciPy, published values and the formulas.
"""

from __future__ import annotations

import math
import random
import statistics
import warnings

import numpy as np
import pytest
import scipy.stats

from prompt_lab.analysis.statistics import (
    DENOMINATOR_RULE,
    adjust,
    average_relative_gain,
    bootstrap_interval,
    relative_performance,
    summarise,
    t_test,
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


# ---- t-tests -------------------------------------------------------------------------------------

# The sleep data of Student 1908 (hours gained by ten patients with two drugs), as in R's `sleep`.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
KINDS = ("welch", "student", "paired")


def scipy_test(one, other, kind, alternative="two-sided"):
    if kind == "paired":
        return scipy.stats.ttest_rel(one, other, alternative=alternative)
    return scipy.stats.ttest_ind(one, other, equal_var=kind == "student", alternative=alternative)


@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_t_test_is_that_of_scipy(kind, alternative):
    one, other = scores(5, 12), scores(6, 12 if kind == "paired" else 7)
    found = t_test(one, other, kind, alternative=alternative)
    expected = scipy_test(one, other, kind, alternative)
    interval = expected.confidence_interval(0.95)
    assert (found.statistic, found.p) == (expected.statistic, expected.pvalue)
    assert found.degrees_of_freedom == expected.df
    assert found.interval == (interval.low, interval.high)
    assert found.difference == pytest.approx(statistics.mean(one) - statistics.mean(other))
    assert (found.counts, found.missing) == ((12, len(other)), (0, 0))
    assert (found.kind, found.alternative, found.reason) == (kind, alternative, "")


@pytest.mark.parametrize(
    ("kind", "statistic", "degrees", "p", "interval"),
    [
        ("welch", -1.8608, 17.776, 0.07939, (-3.3654832, 0.2054832)),
        ("student", -1.8608, 18, 0.07919, (-3.363874, 0.203874)),
        ("paired", -4.0621, 9, 0.002833, (-2.4598858, -0.7001142)),
    ],
)
def test_students_own_data_give_the_published_values(kind, statistic, degrees, p, interval):
    """Reference: the output of R's t.test on these data."""
    found = t_test(FIRST, SECOND, kind)
    assert found.statistic == pytest.approx(statistic, abs=5e-5)
    assert found.degrees_of_freedom == pytest.approx(degrees, abs=5e-4)
    assert found.p == pytest.approx(p, rel=1e-3)
    assert found.interval == pytest.approx(interval, abs=1e-6)
    assert found.difference == pytest.approx(-1.58)


def test_welchs_test_follows_the_formula():
    """Reference: Welch 1947 in plain arithmetic; the deviations have ddof 1."""
    one, other = scores(7, 10), scores(8, 3)
    errors = [statistics.variance(side) / len(side) for side in (one, other)]
    t = (statistics.mean(one) - statistics.mean(other)) / math.sqrt(sum(errors))
    degrees = sum(errors) ** 2 / (errors[0] ** 2 / 9 + errors[1] ** 2 / 2)
    found = t_test(one, other)
    assert (found.kind, found.alternative) == ("welch", "two-sided")
    assert found.statistic == pytest.approx(t, rel=1e-12)
    assert found.degrees_of_freedom == pytest.approx(degrees, rel=1e-12)
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(abs(t), degrees), rel=1e-9)


@pytest.mark.parametrize("kind", ["welch", "student"])
def test_missing_values_of_two_samples_are_left_out_side_by_side(kind):
    found = t_test([NAN, 0.1, 0.4, INF, 0.3], [0.2, 0.6, -INF, 0.5], kind)
    expected = t_test([0.1, 0.4, 0.3], [0.2, 0.6, 0.5], kind)
    assert (found.statistic, found.p, found.interval) == (
        expected.statistic,
        expected.p,
        expected.interval,
    )
    assert (found.counts, found.missing) == ((3, 3), (2, 1))


def test_pairs_with_a_missing_member_are_left_out_whole():
    found = t_test([NAN, 0.1, 0.4, 0.9, 0.3], [0.2, 0.6, INF, 0.5, 0.8], "paired")
    expected = t_test([0.1, 0.9, 0.3], [0.6, 0.5, 0.8], "paired")
    assert (found.statistic, found.p) == (expected.statistic, expected.p)
    assert found.difference == pytest.approx((1.3 - 1.9) / 3)
    assert (found.counts, found.missing) == ((3, 3), (2, 2))


@pytest.mark.parametrize(
    ("one", "other", "kind", "difference", "counts", "reason"),
    [
        ([], [], "welch", NAN, (0, 0), "fewer than two values"),
        ([], [], "paired", NAN, (0, 0), "fewer than two pairs"),
        ([0.5, NAN], [0.2, 0.3], "welch", 0.25, (1, 2), "fewer than two values"),
        ([0.5, 0.7], [NAN, INF], "student", NAN, (2, 0), "fewer than two values"),
        ([0.5, NAN, 0.7], [NAN, 0.1, 0.3], "paired", 0.4, (1, 1), "fewer than two pairs"),
        ([1, 1, 1], [1, 1], "welch", 0, (3, 2), "no spread"),
        ([1, 1, 1], [0, 0, 0], "student", 1, (3, 3), "no spread"),
        ([0, 0], [0, 0], "welch", 0, (2, 2), "no spread"),
        ([0.1] * 3, [0.7] * 3, "welch", -0.6, (3, 3), "no spread"),
        ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], "paired", -0.3, (3, 3), "no spread"),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], "paired", 0, (3, 3), "no spread"),
    ],
)
def test_cells_without_a_test_say_why_and_do_not_warn(one, other, kind, difference, counts, reason):
    """0.1 three times has a variance by rounding: SciPy's t there is of the order of 1e16."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = t_test(one, other, kind)
    assert found.reason.startswith(reason)
    assert found.counts == counts
    assert found.difference == pytest.approx(difference, nan_ok=True)
    numbers = (found.statistic, found.p, found.degrees_of_freedom, *found.interval)
    assert all(math.isnan(number) for number in numbers)


def test_one_constant_side_still_has_a_test_and_no_warning():
    """Reference: the test of one sample against a fixed mean, which Welch's test then is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = t_test([0.1, 0.1, 0.1], [0.2, 0.3, 0.5])
    expected = scipy.stats.ttest_1samp([0.2, 0.3, 0.5], 0.1)
    assert found.statistic == pytest.approx(-expected.statistic, rel=1e-9)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.degrees_of_freedom == pytest.approx(2)
    assert found.reason == ""


def test_swapping_the_sides_turns_the_sign():
    for kind in KINDS:
        there, back = t_test(FIRST, SECOND, kind), t_test(SECOND, FIRST, kind)
        assert back.statistic == pytest.approx(-there.statistic)
        assert back.p == pytest.approx(there.p)
        assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]))


def test_bad_arguments_of_a_t_test_are_refused():
    with pytest.raises(ValueError, match=r"2 and 3 scores for a paired test.*NaN for a missing"):
        t_test([0.1, 0.2], [0.1, 0.2, 0.3], "paired")
    with pytest.raises(ValueError, match=r"kind 'anova': choose one of 'welch', 'student'"):
        t_test([0.1, 0.2], [0.1, 0.2], "anova")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alternative 'more': .*'greater'"):
        t_test([0.1, 0.2], [0.1, 0.2], alternative="more")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one of shape"):
        t_test(np.ones((2, 2)), [0.1, 0.2])
    with pytest.raises(ValueError, match="other: give one row of numbers"):
        t_test([0.1, 0.2], ["good", "bad"])  # type: ignore[list-item]


# ---- corrections for several tests ---------------------------------------------------------------


def test_corrections_equal_cases_worked_by_hand():
    p = [0.01, 0.04, 0.03, 0.005]
    assert adjust(p) == adjust(p, "holm") == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust(p, "bonferroni") == pytest.approx([0.04, 0.16, 0.12, 0.02])
    assert adjust([0.6, 0.3, 0.9]) == pytest.approx([1, 0.9, 1])
    assert adjust([0.02, 0.02, 0.021]) == pytest.approx([0.06, 0.06, 0.06])
    assert adjust([0.02]) == adjust([0.02], "bonferroni") == [0.02]
    assert adjust([0.0, 1.0]) == [0.0, 1.0]


def rejected_step_down(p: list[float], level: float) -> set[int]:
    """The procedure of Holm 1979 as he states it: stop at the first that is too large."""
    out: set[int] = set()
    for at in sorted(range(len(p)), key=p.__getitem__):
        if p[at] > level / (len(p) - len(out)):
            break
        out.add(at)
    return out


def test_adjusted_values_reject_what_the_procedures_reject():
    for seed in range(20):
        p = [value**3 for value in scores(seed, 9)]
        holm, bonferroni = adjust(p), adjust(p, "bonferroni")
        for level in (0.01, 0.05, 0.1, 0.3, 0.7):
            assert {at for at in range(9) if holm[at] <= level} == rejected_step_down(p, level)
            rejected = {at for at in range(9) if bonferroni[at] <= level}
            assert rejected == {at for at in range(9) if p[at] <= level / 9}
        assert all(a <= b <= 1 for a, b in zip(holm, bonferroni, strict=True))
        assert all(a >= b for a, b in zip(holm, p, strict=True))


@pytest.mark.parametrize("method", ["holm", "bonferroni"])
def test_a_test_that_could_not_be_made_stays_nan_and_does_not_count(method):
    p = [0.01, 0.04, 0.03, 0.005]
    found = adjust([NAN, *p[:2], NAN, *p[2:]], method)
    assert [at for at, value in enumerate(found) if math.isnan(value)] == [0, 3]
    assert [value for value in found if not math.isnan(value)] == adjust(p, method)
    assert adjust([], method) == []
    assert all(math.isnan(value) for value in adjust([NAN, NAN], method))


def test_bad_p_values_are_refused():
    for bad in (-0.1, 1.5, INF, -INF):
        with pytest.raises(ValueError, match="between 0 and 1"):
            adjust([0.5, bad])
    with pytest.raises(ValueError, match="method 'fdr': choose one of 'holm', 'bonferroni'"):
        adjust([0.5], "fdr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one row of numbers"):
        adjust([[0.5]])  # type: ignore[list-item]


# ---- bootstrap -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_a_bootstrap_interval_is_that_of_scipy(method):
    values = [value**4 for value in scores(9, 15)]
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=999, confidence_level=0.9, method=method, rng=7
    ).confidence_interval
    found = bootstrap_interval(values, 0.9, 999, 7, method)
    assert found == (expected.low, expected.high)
    assert found == bootstrap_interval(values, 0.9, 999, 7, method)
    assert found != bootstrap_interval(values, 0.9, 999, 8, method)
    assert found[0] < statistics.mean(values) < found[1]


def test_a_percentile_interval_holds_the_middle_of_resampled_means():
    """Reference: resampling in a loop; the two differ by chance only."""
    values, draw = scores(10, 12), random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=12)) for _ in range(8000))
    assert bootstrap_interval(values) == pytest.approx((means[200], means[-201]), abs=0.01)


def test_two_values_are_the_ends_of_their_own_interval():
    """A quarter of all resamples is one value twice, so either end is beyond a tail of 2.5 %."""
    assert bootstrap_interval([0.4, 0.1]) == (0.1, 0.4)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_intervals_without_spread_or_values_do_not_warn(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for few in ([], [0.5], [0.5, NAN, INF]):
            assert all(math.isnan(end) for end in bootstrap_interval(few, method=method))
        assert bootstrap_interval([0.1, 0.1, NAN, 0.1], method=method) == (0.1, 0.1)
        assert bootstrap_interval([0.3, 0.1 + 0.2], method=method) == (0.3, 0.1 + 0.2)
        assert bootstrap_interval([0, 0], method=method) == (0, 0)


def test_missing_values_do_not_change_an_interval():
    values = scores(11, 6)
    assert bootstrap_interval([NAN, *values, INF]) == bootstrap_interval(values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"level": 1}, "level 1: give a share"),
        ({"level": 95}, "level 95"),
        ({"level": NAN}, "level nan"),
        ({"resamples": 39}, "at least 40"),
        ({"resamples": 0}, "resamples 0"),
        ({"seed": -1}, "seed -1"),
        ({"method": "basic"}, "method 'basic': choose one of 'percentile', 'BCa'"),
        ({"values": 0.5}, "values of shape"),
        ({"values": ["high"]}, "values: give one row"),
    ],
)
def test_bad_arguments_of_an_interval_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**{"values": [0.1, 0.2, 0.4], **wrong})
