"""Means with counts, scores relative to a reference method, tests of significance.

``relative_performance`` is E_rel of Qin et al. 2021 (arXiv 2110.07867, section 4) and
``average_relative_gain`` is ARG of Ye et al. 2021 (arXiv 2104.08835). Neither paper says
what becomes of a task whose reference scores zero; `DENOMINATOR_RULE` is ours. A value that is NaN
or infinite is a missing one.

The t-tests and the bootstrap are SciPy's; here are the rules for missing values and for values
without spread, so that one empty cell does not end a table of comparisons. They take the scores of
the runs themselves: a mean and a deviation from a printed table are rounded, and often have ddof 0.
Left out: weights of tasks, tests that do not assume normal scores, false discovery rates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = Sequence[float] | NDArray[Any]

Kind = Literal["welch", "student", "paired"]
Alternative = Literal["two-sided", "less", "greater"]
Correction = Literal["holm", "bonferroni"]
Bootstrap = Literal["percentile", "BCa"]

DENOMINATOR_RULE = (
    "a task is left out of the mean, and named, where its score or its reference is missing, and "
    "where its reference is zero or negative, for which a ratio says nothing"
)

ROUNDING = 1e-12
"""Values that differ by no more than this share of the largest of them count as equal."""


@dataclass(frozen=True)
class Summary:
    """Mean and spread of some values.

    Attributes:
        mean: mean of the known values; NaN without any.
        std: their standard deviation (ddof 1); NaN where there are fewer than two.
        count: number of known values.
        missing: number of values that are NaN or infinite.
    """

    mean: float
    std: float
    count: int
    missing: int


@dataclass(frozen=True)
class Relative:
    """Scores relative to a reference, task by task and as a mean.

    Attributes:
        mean: mean over the tasks that count; NaN without any.
        std: standard deviation (ddof 1) over them; NaN where there are fewer than two.
        count: number of tasks that count.
        values: per task, NaN where it is left out.
        left_out: position of each task that is left out, and why: "score missing",
            "reference missing", "reference zero" or "reference negative".
    """

    mean: float
    std: float
    count: int
    values: tuple[float, ...]
    left_out: dict[int, str]


@dataclass(frozen=True)
class TTest:
    """A t-test of two groups of scores, `one` against `other`.

    Attributes:
        statistic: t; positive where `one` is higher; NaN with a reason.
        p: probability of a t at least as far out if the true means are equal, before any
            correction; NaN with a reason.
        degrees_of_freedom: of Student's distribution; NaN with a reason.
        difference: mean of `one` less mean of `other`, over the values that count; NaN where a side
            has none.
        interval: 95 % confidence interval of the difference; one end is infinite where the
            alternative is one-sided; NaN with a reason.
        counts: number of values of either side that count; in a paired test both are the number of
            whole pairs.
        missing: number of values of either side that do not; in a paired test both are the number
            of pairs left out.
        kind: "welch", "student" or "paired".
        alternative: "two-sided", "less" or "greater".
        reason: why there is no test; empty where there is one.
    """

    statistic: float
    p: float
    degrees_of_freedom: float
    difference: float
    interval: tuple[float, float]
    counts: tuple[int, int]
    missing: tuple[int, int]
    kind: Kind
    alternative: Alternative
    reason: str = ""


def summarise(values: Iterable[float]) -> Summary:
    """Mean, standard deviation (ddof 1) and count of the values that are finite.

    Args:
        values: numbers, of which some may be NaN or infinite.

    Returns:
        The summary; no value at all is no error.
    """
    import numpy as np

    given = np.asarray(list(values), dtype=np.float64)
    known = given[np.isfinite(given)]
    mean = float(known.mean()) if known.size else float("nan")
    std = float(known.std(ddof=1)) if known.size > 1 else float("nan")
    return Summary(mean, std, int(known.size), int(given.size - known.size))


def relative_performance(scores: Scores, reference: Scores) -> Relative:
    """E_rel: mean over tasks of score / reference (Qin et al. 2021).

    Args:
        scores: one score per task.
        reference: the reference method's score of the same tasks, in the same order.

    Returns:
        The mean over the tasks that count by `DENOMINATOR_RULE`, and those that do not.

    Raises:
        ValueError: the two do not have one value per task each.
    """
    return _relative(scores, reference, shift=0.0)


def average_relative_gain(scores: Scores, reference: Scores) -> Relative:
    """ARG: mean over tasks of (score - reference) / reference (Ye et al. 2021); E_rel less 1.

    Arguments, result and errors are those of `relative_performance`.
    """
    return _relative(scores, reference, shift=1.0)


def t_test(
    one: Scores,
    other: Scores,
    kind: Kind = "welch",
    *,
    alternative: Alternative = "two-sided",
) -> TTest:
    """Whether the mean scores of two groups of runs differ: SciPy's t-tests.

    "student" (Student 1908) takes both groups to have one variance, "welch" (Welch 1947) does not.
    "paired" (Student 1908) tests the mean of ``one[i] - other[i]``; it is the one to use where
    run i of both groups shares its initialisation and sample. The caller puts them in one order.

    A value that is NaN or infinite is missing and left out; "paired" leaves out each pair with a
    missing member. Without two values on each side (two pairs) there is no test. Nor is there one
    where both sides are constant up to rounding, or all differences of pairs are equal so: the
    spread is the only measure of the error, and SciPy would say p = 0, or NaN for equal means.
    Then the result says so in `reason` and its p is NaN.

    Args:
        one: scores of the runs of one group; at full precision, never rounded.
        other: scores of the other group; for "paired" as many, in the order of `one`.
        kind: which test.
        alternative: "greater" tests for `one` above `other`, "less" for below.

    Returns:
        The test. Its p-value is that of one comparison; `adjust` corrects those of several.

    Raises:
        ValueError: an unknown kind or alternative, not one row of numbers a side, or unequal
            lengths for the paired test.
    """
    import numpy as np

    _check_choice("kind", kind, get_args(Kind))
    _check_choice("alternative", alternative, get_args(Alternative))
    first, second = _row("one", one), _row("other", other)
    keep_first, keep_second = np.isfinite(first), np.isfinite(second)
    if kind == "paired":
        if first.size != second.size:
            raise ValueError(
                f"{first.size} and {second.size} scores for a paired test: give run i of both "
                "groups at place i (NaN for a missing run), or choose 'welch'"
            )
        keep_first = keep_second = keep_first & keep_second
    a, b = first[keep_first], second[keep_second]
    counts, missing = (a.size, b.size), (first.size - a.size, second.size - b.size)
    difference = float(a.mean() - b.mean()) if a.size and b.size else math.nan
    reason = _why_no_test(a, b, kind)
    statistic, p, degrees, low, high = (math.nan,) * 5 if reason else _test(a, b, kind, alternative)
    return TTest(
        statistic=statistic,
        p=p,
        degrees_of_freedom=degrees,
        difference=difference,
        interval=(low, high),
        counts=counts,
        missing=missing,
        kind=kind,
        alternative=alternative,
        reason=reason,
    )


def adjust(p_values: Scores, method: Correction = "holm") -> list[float]:
    """p-values of a family of tests, corrected so that the chance of any false claim is bounded.

    A test is significant at level a where its adjusted p-value is at most a. "bonferroni" (Dunn
    1961) is min(1, m p) for m tests. "holm" (Holm 1979) sorts them, p_(1) first, and gives p_(i)
    the largest min(1, (m - j + 1) p_(j)) of all j <= i; it bounds the same chance, and is never
    larger than Bonferroni's.

    Args:
        p_values: one p-value per test, of all tests of the family and not of the best ones only.
            NaN is a test that could not be made: it stays NaN and does not count in m.
        method: which correction.

    Returns:
        Adjusted p-values in the order given.

    Raises:
        ValueError: an unknown method, not one row of numbers, or one outside 0 to 1.
    """
    import numpy as np

    _check_choice("method", method, get_args(Correction))
    given = _row("p_values", p_values)
    known = np.flatnonzero(~np.isnan(given))
    p = given[known]
    if outside := p[(p < 0) | (p > 1)].tolist():
        raise ValueError(f"p-values {outside}: each must lie between 0 and 1, or be NaN")
    adjusted = np.full(given.size, np.nan)
    if method == "bonferroni":
        adjusted[known] = np.minimum(1, p.size * p)
    else:
        order = np.argsort(p, kind="stable")
        steps = np.arange(p.size, 0, -1) * p[order]
        adjusted[known[order]] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted.tolist()


def bootstrap_interval(
    values: Scores,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
    method: Bootstrap = "percentile",
) -> tuple[float, float]:
    """Bootstrap confidence interval of the mean (Efron 1979; "BCa": Efron 1987): SciPy's.

    For few values both methods are too narrow. On normal values, 95 % intervals held the true mean
    76 % of the time for 3 values, 84 % for 5, 90 % for 10 and 93 % for 30.

    Args:
        values: one row of numbers, for example one score per run; those that are NaN or infinite
            are missing and left out.
        level: share of such intervals that should hold the true mean.
        resamples: number of resamples; enough to leave one of them in either tail.
        seed: of the resampling; the same seed and values give the same interval.
        method: "percentile" of the resampled means, or corrected for bias and skewness ("BCa").

    Returns:
        Low and high end; NaN twice for fewer than two values; smallest and largest value where
        these are equal up to rounding, so twice the value where all are the same.

    Raises:
        ValueError: values that are not one row of numbers, a level outside 0 to 1, too few
            resamples, a negative seed or an unknown method.
    """
    import numpy as np
    from scipy.stats import bootstrap

    _check_choice("method", method, get_args(Bootstrap))
    if not 0 < level < 1:
        raise ValueError(f"level {level}: give a share between 0 and 1, such as 0.95")
    if resamples < (least := math.ceil(round(2 / (1 - level), 6))):
        raise ValueError(
            f"resamples {resamples}: level {level} needs at least {least} to have one in either "
            "tail; some thousand make a steady interval"
        )
    if seed < 0:
        raise ValueError(f"seed {seed}: give zero or a positive whole number")
    given = _row("values", values)
    known = given[np.isfinite(given)]
    if known.size < 2:
        return math.nan, math.nan
    if _equal(known, known):
        return float(known.min()), float(known.max())
    low, high = bootstrap(
        (known,), np.mean, n_resamples=resamples, confidence_level=level, method=method, rng=seed
    ).confidence_interval
    return float(low), float(high)


def _test(
    a: NDArray[Any], b: NDArray[Any], kind: Kind, alternative: Alternative
) -> tuple[float, ...]:
    """SciPy's t, p, degrees of freedom and both ends of the 95 % interval of the difference."""
    from scipy.stats import ttest_ind, ttest_rel

    with warnings.catch_warnings():  # SciPy warns where one side alone has no spread
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        if kind == "paired":
            found: Any = ttest_rel(a, b, alternative=alternative)
        else:
            found = ttest_ind(a, b, equal_var=kind == "student", alternative=alternative)
    low, high = found.confidence_interval(0.95)
    return tuple(float(x) for x in (found.statistic, found.pvalue, found.df, low, high))


def _why_no_test(a: NDArray[Any], b: NDArray[Any], kind: Kind) -> str:
    """Why finite values (pairs, for "paired") allow no t-test; empty where they do."""
    import numpy as np

    if kind == "paired":
        if a.size < 2:
            return "fewer than two pairs"
        if _equal(a - b, np.concatenate([a, b])):
            return "no spread: all differences of pairs are equal"
    elif min(a.size, b.size) < 2:
        return "fewer than two values"
    elif _equal(a, a) and _equal(b, b):
        return "no spread: both sides are constant"
    return ""


def _equal(values: NDArray[Any], sources: NDArray[Any]) -> bool:
    """Whether values made from some sources are equal up to the rounding of the latter."""
    return bool(values.max() - values.min() <= ROUNDING * abs(sources).max())


def _row(name: str, values: Scores) -> NDArray[Any]:
    """Values as one row in float64; refused where they are no such row."""
    import numpy as np

    try:
        row = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: give one row of numbers ({error})") from error
    if row.ndim != 1:
        raise ValueError(f"{name} of shape {row.shape}: give one row of numbers")
    return row


def _check_choice(name: str, given: str, allowed: tuple[str, ...]) -> None:
    """Refuse a choice that is not allowed, and say which are."""
    if given not in allowed:
        raise ValueError(f"{name} {given!r}: choose one of {', '.join(map(repr, allowed))}")


def _relative(scores: Scores, reference: Scores, shift: float) -> Relative:
    """Mean over tasks of (score - shift x reference) / reference."""
    import numpy as np

    score, base = np.asarray(scores, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if score.ndim != 1 or score.shape != base.shape:
        raise ValueError(
            f"scores of shape {score.shape} and reference of shape {base.shape}: give one number "
            "per task each, in the same order"
        )
    left_out = {at: why for at in range(len(score)) if (why := _reason(score[at], base[at]))}
    values = np.full(len(score), np.nan)
    kept = [at for at in range(len(score)) if at not in left_out]
    values[kept] = (score[kept] - shift * base[kept]) / base[kept]
    summary = summarise(values[kept])
    return Relative(summary.mean, summary.std, len(kept), tuple(values.tolist()), left_out)


def _reason(score: float, reference: float) -> str:
    """Why a task does not count; empty where it does."""
    if not math.isfinite(reference):
        return "reference missing"
    if not math.isfinite(score):
        return "score missing"
    if reference <= 0:
        return "reference zero" if reference == 0 else "reference negative"
    return ""
