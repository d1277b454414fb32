"""What the results of ``VectorArithmetic`` say of task prompt vectors (arXiv 2408.01119).

Three tables of Belanec et al. 2024, from result files: vectors on other initial prompts than their
own (table 1), sums of two vectors relative to the tuned prompts of their tasks (figure 4), and sums
that a user wrote, among them those that take a vector away (their future work). Beside each stands
what would explain a score without any transfer: the bare initial prompt, and, for the first, the
vector without an initial prompt and its size.

A **cell** is a sample and a seed of the vectors. Scores of one test are compared with tuned prompts
of the same test and cells; one test is one ``fit_id``. Left out: the layout of the report, which is
in `prompt_lab.commands.report_command`, and cosines, which ``prompt-lab vectors compare`` draws.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prompt_lab.analysis.report import Row, counted
from prompt_lab.analysis.significance_report import (
    LEVEL,
    Correction,
    Table,
    corrected,
    correction_words,
    extent,
    mark,
    number,
    show_p,
    signed,
    spread,
    test_cells,
)
from prompt_lab.analysis.statistics import Summary, TTest, relative_performance, summarise, t_test
from prompt_lab.core.arithmetic import parse_expression

Cell = tuple[str, str]
"""Sample, and seed of the initial prompt that the vectors started from."""

METHOD = "VectorArithmetic"
SUMS = ("vectors", "vector_alone")
"""Variants that are sums of vectors; the others are tuned and initial prompts."""

KEPT = 0.5
"""Share of a tuned prompt's score from which a sum keeps a task (arXiv 2408.01119, section 4.3)."""

_SETTING = ("backbone", "num_virtual_tokens", "decoding", "metric_variant")
_SEED = re.compile(r"(?P<way>.*) seed (?P<seed>-?\d+)")


@dataclass(frozen=True)
class Sum:
    """A line of results of one sum on one task.

    Attributes:
        row: the line.
        coefficients: factor of each task's vector.
        way: how its initial prompt was made.
        start: seed of its initial prompt, which in a cross study need not be that of the vector.
        crosses: whether it is of a cross study.
        scale: lambda.
    """

    row: Row
    coefficients: Mapping[str, float]
    way: str
    start: str
    crosses: bool
    scale: float

    @property
    def task(self) -> str:
        """What it was evaluated on."""
        return self.row.cells["task"]

    @property
    def expression(self) -> str:
        """The sum as it was asked for."""
        return self.row.cells["expression"]

    @property
    def cell(self) -> Cell:
        """Sample and seed of the vectors."""
        return self.row.cells["sample"], self.row.cells["init_seed"]


@dataclass(frozen=True)
class Crossed:
    """A task's vectors on their own and on other initial prompts.

    Standard deviations are over prompts; those of ``other`` share vectors and initial prompts, so
    its count is no number of independent runs.

    Attributes:
        test: name of the test.
        task: the task.
        metric: its metric.
        own: scores of the tuned prompts: each vector on its own initial prompt.
        chosen: scores on the own initial prompt with a lambda that dev chose; empty for lambda 1.
        other: scores of each vector on each other initial prompt of its sample.
        initial: scores of the initial prompts alone.
        alone: scores of the vectors without an initial prompt.
        seeds: number of cells that have a score on another initial prompt: vectors trained apart.
        ratio: norm of the vector / norm of its initial prompt; empty without the prompt files.
        t_test: paired test over cells of the mean over the other initial prompts against the own.
        adjusted: its p-value, corrected for the tasks of the test.
    """

    test: str
    task: str
    metric: str
    own: Summary
    chosen: Summary
    other: Summary
    initial: Summary
    alone: Summary
    seeds: int
    ratio: Summary
    t_test: TTest
    adjusted: float


@dataclass(frozen=True)
class Scored:
    """A sum on one task, beside the tuned and the initial prompts of the same cells.

    Attributes:
        test: name of the test.
        expression: the sum.
        task: the task.
        role: "added", "taken away" or "not in it".
        metric: metric of the task.
        score: scores of the sum.
        single: scores of the task's tuned prompts; empty where it has none.
        initial: scores of the bare initial prompts.
        scale: the lambdas that dev chose.
        scales: least and largest of them.
        share: mean score / mean of the tuned prompts, over the cells that have both; NaN where that
            says nothing.
        share_std: standard deviation (ddof 1) of the cells' own shares.
        share_cells: number of cells that have both.
        initial_share: mean of the initial prompts / mean of the tuned prompts of the same cells.
        left_out: why there is no share; empty where there is one.
    """

    test: str
    expression: str
    task: str
    role: str
    metric: str
    score: Summary
    single: Summary
    initial: Summary
    scale: Summary
    scales: tuple[float, float]
    share: float
    share_std: float
    share_cells: int
    initial_share: float
    left_out: str


@dataclass(frozen=True)
class Pair:
    """A sum of two vectors on both of their tasks.

    Attributes:
        test: name of the test.
        expression: the sum.
        tasks: the sum on its first and on its second task.
    """

    test: str
    expression: str
    tasks: tuple[Scored, Scored]

    @property
    def kept(self) -> bool | None:
        """Whether both tasks keep at least `KEPT` of their score; None where a share is missing."""
        shares = [scored.share for scored in self.tasks]
        return None if any(map(math.isnan, shares)) else min(shares) >= KEPT


@dataclass(frozen=True)
class VectorReport:
    """What results say of task prompt vectors.

    Attributes:
        crossed: vectors on other initial prompts.
        pairs: sums of two vectors.
        expressions: other sums.
        correction: of the p-values.
        notes: what is missing or not alike.
    """

    crossed: Sequence[Crossed] = ()
    pairs: Sequence[Pair] = ()
    expressions: Sequence[Scored] = ()
    correction: Correction = "holm"
    notes: Sequence[str] = field(default=())


# ---- reading -------------------------------------------------------------------------------------


def is_sum(row: Row) -> bool:
    """Whether a line of results is a sum of vectors, which is no method to compare with others."""
    return row.cells["method"] == METHOD and row.cells["variant"] in SUMS


def vector_report(rows: Iterable[Row], correction: Correction = "holm") -> VectorReport:
    """Tables of task prompt vectors from lines of results.

    Args:
        rows: lines of results, of any methods.
        correction: for several p-values in one table.

    Raises:
        ValueError: lines without the columns ``expression`` and ``scale``, or such cells that
            cannot be read.
    """
    own = [row for row in rows if row.cells["method"] == METHOD]
    if not any(map(is_sum, own)):
        return VectorReport(correction=correction)
    known = _Known(own)
    sums = list(_read_sums(filter(is_sum, own)))
    unlike = {_identity(one.row): one for one in reversed(sums)}  # the first of equal ones stays
    notes = []
    if len(unlike) < len(sums):
        notes.append(
            f"VectorArithmetic: {counted(len(sums) - len(unlike), 'score')} of sums that the same "
            "test has another score of; the first counts."
        )
    by_test: dict[str, list[Sum]] = defaultdict(list)
    for one in sums:
        if unlike[_identity(one.row)] is one:
            by_test[one.row.cells["fit_id"]].append(one)
    crossed, pairs, expressions = [], [], []
    for test, of_test in zip(_test_names(by_test), by_test.values(), strict=True):
        crossed += _crossed(test, of_test, known, correction)
        by_expression: dict[str, list[Sum]] = defaultdict(list)
        for one in of_test:
            if not one.crosses and one.row.cells["variant"] != "vector_alone":
                by_expression[one.expression].append(one)
        for of_expression in by_expression.values():
            scored = _scored(test, of_expression, known)
            if _is_pair(of_expression):
                pairs.append(Pair(test, scored[0].expression, (scored[0], scored[1])))
            else:
                expressions += scored
    lost = [one for pair in pairs for one in pair.tasks if one.left_out]
    notes += [f"{one.expression} on {one.task}: no share, {one.left_out}." for one in lost]
    return VectorReport(crossed, pairs, expressions, correction, notes)


def _read_sums(rows: Iterable[Row]) -> Iterator[Sum]:
    """The sums that lines of results are of."""
    for row in rows:
        if "expression" not in row.cells or "scale" not in row.cells:
            raise ValueError(
                "results of VectorArithmetic lack the columns expression and scale: run prompt-lab "
                "test again"
            )
        text = row.cells["scale"]
        try:
            scale = float(text) if text else math.nan
        except ValueError:
            raise ValueError(f"scale is {text!r}, not a number; correct it or test again") from None
        found = _SEED.fullmatch(row.cells["initialised"])
        way, start = found.groups() if found else (row.cells["initialised"], "")
        yield Sum(
            row=row,
            coefficients=parse_expression(row.cells["expression"]),
            way=way,
            start=start or row.cells["init_seed"],
            crosses=found is not None,
            scale=scale,
        )


def _identity(row: Row) -> tuple[str, ...]:
    """What makes two lines the same sum in the same test."""
    columns = ("fit_id", "variant", "expression", "task", "sample", "init_seed", "initialised")
    return tuple(row.cells[column] for column in columns)


def _test_names(by_test: Mapping[str, Sequence[Sum]]) -> list[str]:
    """A name for each test: its folder, and its ``fit_id`` where that is not enough."""
    paths = [Path(sums[0].row.cells.get("prompt_file", "")) for sums in by_test.values()]
    names = [path.parent.parent.name for path in paths]
    return [
        name if name and names.count(name) == 1 else " ".join(filter(None, (name, test)))
        for name, test in zip(names, by_test, strict=True)
    ]


class _Known:
    """The tuned and the initial prompts that sums are compared with.

    Args:
        rows: lines of ``VectorArithmetic``.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.singles: dict[tuple[str, ...], Row] = {}
        self.initials: dict[tuple[str, ...], Row] = {}
        for row in rows:
            cells = row.cells
            if cells["variant"] == "single":
                key = (cells["fit_id"], cells["task"], cells["sample"], cells["init_seed"])
                self.singles.setdefault(key, row)
            if cells["variant"] == "initial_prompt":
                place = (cells["task"], cells["sample"], cells["initialised"], cells["init_seed"])
                self.initials.setdefault((*_setting(row), *place), row)

    def single(self, one: Sum) -> Row | None:
        """The tuned prompt of a sum's task, sample and seed, of the same test."""
        return self.singles.get((one.row.cells["fit_id"], one.task, *one.cell))

    def initial(self, one: Sum) -> Row | None:
        """The initial prompt of a sum, on its task.

        A test of an initial prompt says nothing of a fit, so that of any test will do.
        """
        place = (one.task, one.row.cells["sample"], one.way, one.start)
        return self.initials.get((*_setting(one.row), *place))


def _setting(row: Row) -> tuple[str, ...]:
    """What a score of an initial prompt depends on, beside its task, sample and seed."""
    return tuple(row.cells[column] for column in _SETTING)


def _test_of(row: Row | None) -> float:
    """A test score; NaN where there is no line."""
    return math.nan if row is None else row.test


# ---- vectors on other initial prompts ------------------------------------------------------------


def _crossed(
    test: str, sums: Sequence[Sum], known: _Known, correction: Correction
) -> list[Crossed]:
    """The tasks of a cross study of one test."""
    by_task: dict[str, list[Sum]] = defaultdict(list)
    for one in sums:
        if one.crosses:
            by_task[one.task].append(one)
    found = []
    for task, of_task in by_task.items():
        alone = [s for s in sums if s.row.cells["variant"] == "vector_alone" and s.task == task]
        found.append(_crossed_task(test, of_task, alone, known))
    p_values = corrected([one.t_test.p for one in found], correction)
    return [replace(one, adjusted=p) for one, p in zip(found, p_values, strict=True)]


def _crossed_task(test: str, sums: Sequence[Sum], alone: Sequence[Sum], known: _Known) -> Crossed:
    """A task of a cross study; its p-value is not corrected yet."""
    by_cell: dict[Cell, list[float]] = defaultdict(list)
    chosen, singles, initials = [], {}, {}
    for one in sums:
        if one.start == one.cell[1]:
            chosen.append(one.row.test)
        else:
            by_cell[one.cell].append(one.row.test)
        singles[one.cell] = known.single(one)
        initials[one.cell[0], one.start] = known.initial(one)
    own = {cell: _test_of(row) for cell, row in singles.items()}
    pairs = [(summarise(tests).mean, own[cell]) for cell, tests in by_cell.items()]
    result = t_test([x for x, _ in pairs], [y for _, y in pairs], "paired")
    ratios = (norm_ratio(row.cells.get("prompt_file", "")) for row in singles.values() if row)
    return Crossed(
        test=test,
        task=sums[0].task,
        metric=sums[0].row.cells["metric"],
        own=summarise(own.values()),
        chosen=summarise(chosen),
        other=summarise(value for tests in by_cell.values() for value in tests),
        initial=summarise(_test_of(row) for row in initials.values()),
        alone=summarise(one.row.test for one in alone),
        seeds=sum(not math.isnan(mean) for mean, _ in pairs),
        ratio=summarise(ratios),
        t_test=result,
        adjusted=math.nan,
    )


def norm_ratio(path: str) -> float:
    """Frobenius norm of a prompt file's vector / that of its init; NaN where there is none."""
    from prompt_lab.files.prompts import load_prompt

    if not path or not Path(path).is_file():
        return math.nan
    prompt = load_prompt(path)
    start = prompt.init.double().norm().item()
    moved = (prompt.prompt.double() - prompt.init.double()).norm().item()
    return moved / start if start else math.nan


# ---- sums ----------------------------------------------------------------------------------------


def _is_pair(sums: Sequence[Sum]) -> bool:
    """Whether the sums of one expression are two vectors, on just the two tasks of these."""
    coefficients = sums[0].coefficients
    return list(coefficients.values()) == [1.0, 1.0] and {s.task for s in sums} == {*coefficients}


def _scored(test: str, sums: Sequence[Sum], known: _Known) -> list[Scored]:
    """One expression on each of its tasks; those in the expression come first."""
    by_task: dict[str, list[Sum]] = {task: [] for task in sums[0].coefficients}
    for one in sums:
        by_task.setdefault(one.task, []).append(one)
    return [_scored_task(test, of_task, known) for of_task in by_task.values() if of_task]


def _scored_task(test: str, sums: Sequence[Sum], known: _Known) -> Scored:
    """One expression on one task."""
    first = sums[0]
    score = [one.row.test for one in sums]
    single = [_test_of(known.single(one)) for one in sums]
    initial = [_test_of(known.initial(one)) for one in sums]
    whole = [at for at in range(len(sums)) if math.isfinite(score[at] + single[at])]
    means = [summarise(values[at] for at in whole).mean for values in (score, single)]
    relative = relative_performance(means[:1], means[1:])
    shares = relative_performance([score[at] for at in whole], [single[at] for at in whole])
    both = [at for at in range(len(sums)) if math.isfinite(initial[at] + single[at])]
    base = [[summarise(values[at] for at in both).mean] for values in (initial, single)]
    scales = [one.scale for one in sums]
    return Scored(
        test=test,
        expression=first.expression,
        task=first.task,
        role=_role(first.coefficients.get(first.task, 0)),
        metric=first.row.cells["metric"],
        score=summarise(score),
        single=summarise(single),
        initial=summarise(initial),
        scale=summarise(scales),
        scales=(min(scales), max(scales)),
        share=relative.mean,
        share_std=shares.std,
        share_cells=len(whole),
        initial_share=relative_performance(*base).mean,
        left_out=relative.left_out.get(0, ""),
    )


def _role(coefficient: float) -> str:
    """What a sum does with the vector of the task that it is evaluated on."""
    return "added" if coefficient > 0 else "taken away" if coefficient < 0 else "not in it"


# ---- tables --------------------------------------------------------------------------------------


def vector_sections(report: VectorReport) -> Iterator[tuple[str, str, Table]]:
    """Title, legend and table of each section that the report has lines for."""
    if report.crossed:
        yield "Task prompt vectors on other initial prompts", _cross_legend(report), _cross(report)
    if report.pairs:
        yield "Sums of two task prompt vectors", _pair_legend(report), _pair_table(report)
    if report.expressions:
        title = "Other sums of task prompt vectors"
        yield title, _EXPRESSION_LEGEND, _expression_table(report)


def _named(what: str, one: Crossed | Pair | Scored, lines: Sequence[Any]) -> str:
    """What a line of a table is of, with its test where the table has several."""
    return what if len({other.test for other in lines}) < 2 else f"{what} ({one.test})"


def _cross_legend(report: VectorReport) -> str:
    """What the table of other initial prompts is."""
    return (
        "Mean ± standard deviation (ddof 1) over prompts, and how many. own: each vector on the "
        "initial prompt that it was tuned from, which is the tuned prompt. other: each vector on "
        "each other initial prompt of its sample; these prompts share vectors and initial "
        "prompts, so fewer are independent: vectors is the number of samples and seeds. initial: "
        "the initial prompts with no vector. alone: the vectors with no initial prompt. "
        "vector/init: norm of the vector / norm of its initial prompt; where it is large, the "
        "initial prompt matters little in any case. difference: other less own, mean over samples "
        "and seeds of a vector's mean over other initial prompts less its own score. p: paired "
        f"t-test of that, {correction_words(report.correction)} over the tasks of a test; it takes "
        "vectors for independent, though they meet the same initial prompts. *: p at most "
        f"{LEVEL:g}."
    )


def _cross(report: VectorReport) -> Table:
    """A line per task."""
    searched = any(one.chosen.count for one in report.crossed)
    header = ["task", "metric", "own", *(["own, lambda by dev"] if searched else []), "other"]
    header += ["vectors", "initial", "alone", "vector/init", "difference", "p"]
    lines = []
    for one in report.crossed:
        line = [_named(one.task, one, report.crossed), one.metric, spread(one.own)]
        line += [spread(one.chosen)] if searched else []
        line += [spread(one.other), str(one.seeds), spread(one.initial), spread(one.alone)]
        line += [spread(one.ratio), signed(one.t_test.difference)]
        line.append(show_p(one.adjusted) + mark(one.adjusted))
        lines.append(line)
    return header, lines


def _pair_legend(report: VectorReport) -> str:
    """What the table of pairs is."""
    kept = sum(pair.kept is True for pair in report.pairs)
    known = sum(pair.kept is not None for pair in report.pairs)
    return (
        "Each sum stands on the initial prompt of its vectors, scaled by the lambda that dev "
        "chose (mean, least to largest over samples and seeds). score, tuned and initial: mean ± "
        "standard deviation (ddof 1) over samples and seeds, and how many, of the sum, of the "
        "task's own tuned prompt and of the bare initial prompt. share: mean score / mean of tuned "
        "over the samples and seeds that have both, ± standard deviation of the shares of each. "
        "initial share: what the bare initial prompt has of it. kept: at least "
        f"{KEPT:.0%} on both tasks; this says little where guessing is as good. Kept: {kept} of "
        f"{known} pairs."
    )


def _pair_table(report: VectorReport) -> Table:
    """Two lines per pair."""
    header = ["sum", "lambda", "task", "metric", "score", "tuned", "initial"]
    header += ["share", "initial share", "kept"]
    lines = []
    for pair in report.pairs:
        words = {True: "yes", False: "no", None: "-"}[pair.kept]
        for one, is_first in zip(pair.tasks, (True, False), strict=True):
            name = (
                [_named(pair.expression, pair, report.pairs), _scale(one)] if is_first else ["", ""]
            )
            line = [*name, one.task, one.metric, *map(spread, (one.score, one.single, one.initial))]
            std = "" if math.isnan(one.share_std) else f" ± {one.share_std:.3f}"
            line += [number(one.share) + std, number(one.initial_share), words if is_first else ""]
            lines.append(line)
    return header, lines


_EXPRESSION_LEGEND = (
    "Sums of task prompt vectors on the initial prompt of their vectors, and what each does to "
    "each task. vector: whether the task's own vector is added, taken away or not in the sum; a "
    "task is unlearned where its vector is taken away and its score falls below initial, which "
    "needs an initial prompt above chance, while other tasks keep theirs. score, initial and "
    "tuned: mean ± standard deviation (ddof 1) over samples and seeds, and how many, of the sum, "
    "of the bare initial prompt and of the task's own tuned prompt. lambda: mean, least to largest."
)


def _expression_table(report: VectorReport) -> Table:
    """A line per sum and task."""
    header = ["sum", "lambda", "task", "vector", "metric", "score", "initial", "tuned"]
    header += ["less initial", "less tuned"]
    lines, before = [], ""
    for one in report.expressions:
        name = _named(one.expression, one, report.expressions)
        line = [name, _scale(one)] if name != before else ["", ""]
        line += [one.task, one.role, one.metric]
        line += map(spread, (one.score, one.initial, one.single))
        line += [signed(one.score.mean - base.mean) for base in (one.initial, one.single)]
        lines.append(line)
        before = name
    return header, lines


def _scale(one: Scored) -> str:
    """The lambdas of a sum: mean, and range where they differ."""
    low, high = one.scales
    ends = f" ({low:g} to {high:g})" if low < high else ""
    return "-" if math.isnan(one.scale.mean) else f"{one.scale.mean:.3g}{ends}"


# ---- CSV -----------------------------------------------------------------------------------------

_CROSS_COLUMNS = (
    *("test", "task", "metric", "kind", "mean", "std", "prompts", "vectors"),
    *("difference", "difference_low", "difference_high", "t", "degrees_of_freedom", "p"),
    *("correction", "p_corrected", "reason"),
)
_SCORED_COLUMNS = (
    *("test", "expression", "task", "vector", "metric", "score", "std", "cells"),
    *("tuned", "tuned_std", "tuned_cells", "initial", "initial_std", "initial_cells"),
    *("share", "share_std", "share_cells", "initial_share", "left_out"),
    *("scale", "scale_std", "scale_least", "scale_largest"),
)


def vector_tables(
    report: VectorReport,
) -> Iterator[tuple[str, tuple[str, ...], Iterator[dict[str, Any]]]]:
    """Name, columns and rows of each CSV file; numbers are not rounded."""
    if report.crossed:
        yield "vectors-cross.csv", _CROSS_COLUMNS, _cross_rows(report)
    if report.pairs:
        yield "vectors-pairs.csv", (*_SCORED_COLUMNS, "kept"), _pair_rows(report)
    if report.expressions:
        yield "vectors-expressions.csv", _SCORED_COLUMNS, map(_scored_row, report.expressions)


def _cross_rows(report: VectorReport) -> Iterator[dict[str, Any]]:
    """A row per task and kind of prompt; the test stands in that of other initial prompts."""
    for one in report.crossed:
        for kind in ("own", "chosen", "other", "initial", "alone", "ratio"):
            found: Summary = getattr(one, kind)
            row: dict[str, Any] = {"test": one.test, "task": one.task, "metric": one.metric}
            row |= {"kind": kind, "mean": found.mean, "std": found.std, "prompts": found.count}
            if kind == "other":
                row |= {"vectors": one.seeds, "correction": report.correction}
                row |= test_cells(one.t_test) | {"p_corrected": one.adjusted}
            if found.count:
                yield row


def _pair_rows(report: VectorReport) -> Iterator[dict[str, Any]]:
    """Two rows per pair."""
    for pair in report.pairs:
        words = {True: "yes", False: "no", None: ""}[pair.kept]
        yield from (_scored_row(one) | {"kept": words} for one in pair.tasks)


def _scored_row(one: Scored) -> dict[str, Any]:
    """A row of a sum on a task."""
    names = ("share", "share_std", "share_cells", "initial_share", "left_out")
    row = {name: getattr(one, name) for name in ("test", "expression", "task", "metric", *names)}
    row |= {"vector": one.role}
    row |= {"score": one.score.mean, "std": one.score.std, "cells": one.score.count}
    for name, found in (("tuned", one.single), ("initial", one.initial)):
        row |= {name: found.mean, f"{name}_std": found.std, f"{name}_cells": found.count}
    least, largest = one.scales
    return row | {
        "scale": one.scale.mean,
        "scale_std": one.scale.std,
        "scale_least": least,
        "scale_largest": largest,
    }


# ---- pictures ------------------------------------------------------------------------------------


def draw_vectors(report: VectorReport, folder: Path) -> list[Path]:
    """Draw vectors on other initial prompts, and the shares that pairs keep.

    Args:
        report: the report.
        folder: where the pictures go.

    Returns:
        The files.
    """
    return [*_draw_cross(report, folder), *_draw_pairs(report, folder)]


def _draw_cross(report: VectorReport, folder: Path) -> list[Path]:
    """Scores per task, with bars for own, other and no initial prompt, and for no vector."""
    from prompt_lab.analysis.plots import Series, save_task_bars

    if not report.crossed:
        return []
    labels = {
        "own": "vector on its own initial prompt",
        "other": "vector on other initial prompts",
        "initial": "initial prompt alone",
        "alone": "vector alone",
    }
    series, counts = [], []
    for kind, label in labels.items():
        found: list[Summary] = [getattr(one, kind) for one in report.crossed]
        counts += [one.count for one in found]
        series.append(Series(label, [one.mean for one in found], [one.std for one in found]))
    tasks = [_named(one.task, one, report.crossed) for one in report.crossed]
    note = f"error bars: standard deviation (ddof 1) over {extent(counts)} prompts"
    return save_task_bars(tasks, series, "test score", note, folder / "vectors-cross")


def _draw_pairs(report: VectorReport, folder: Path) -> list[Path]:
    """Share of the tuned prompts' scores per pair, on pages, with a line at `KEPT`."""
    from prompt_lab.analysis.plots import PAGE, Series, save_figure, task_bars

    pages = [report.pairs[at : at + PAGE] for at in range(0, len(report.pairs), PAGE)]
    files = []
    for page, pairs in enumerate(pages, 1):
        series = []
        for at, place in enumerate(("first", "second")):
            found = [pair.tasks[at] for pair in pairs]
            shares, std = [one.share for one in found], [one.share_std for one in found]
            series.append(Series(f"sum, on the {place} task", shares, std))
            initial = [one.initial_share for one in found]
            name = f"initial prompt alone, on the {place} task"
            series.append(Series(name, initial, [math.nan] * len(initial)))
        names = [_named(pair.expression, pair, report.pairs) for pair in pairs]
        runs = extent([one.share_cells for pair in pairs for one in pair.tasks])
        note = f"error bars: standard deviation (ddof 1) over {runs} seeds; line: {KEPT:.0%}"
        figure = task_bars(names, series, "test score / that of the tuned prompt", note, KEPT)
        stem = "vectors-pairs" if len(pages) == 1 else f"vectors-pairs-{page}"
        files += save_figure(figure, folder / stem)
    return files
