"""Means with counts, and scores relative to those of a reference method.

``relative_performance`` is E_rel of Qin et al. 2021 (arXiv 2110.07867, section 4) and
``average_relative_gain`` is ARG of Ye et al. 2021 (arXiv 2104.08835). Neither paper says
what becomes of a task whose reference scores zero; `DENOMINATOR_RULE` is ours. A value that is NaN
or infinite is a missing one. Left out: tests of significance, weights of tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = Sequence[float] | NDArray[Any]

DENOMINATOR_RULE = (
    "a task is left out of the mean, and named, where its score or its reference is missing, and "
    "where its reference is zero or negative, for which a ratio says nothing"
)


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
