"""The command ``prompt-lab report``: tables and pictures from result files alone.

`report` makes the lines and the figures, `plots` draws; here they are laid
out as Markdown and CSV. Every figure has its number of tasks and runs beside it, and what is
missing, failed or not alike is named under the tables.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_lab.analysis.gain_report import (
    CURVE_MEAN_COLUMNS,
    GAIN_COLUMNS,
    GainReport,
    adaptation_rows,
    draw_gains,
    find_gains,
    gain_legend,
    gain_rows,
    gain_table,
)
from prompt_lab.analysis.report import (
    FIXED,
    FURTHER,
    Comparison,
    Figure,
    Line,
    TaskResult,
    by_ontology,
    compare,
    counted,
    families,
    find_reference,
    find_results,
    group_of,
    listed,
    make_lines,
    mean_score,
    named_lines,
    read_results,
    tasks_in_order,
)
from prompt_lab.analysis.significance_report import (
    Correction,
    StartReport,
    draw_starts,
    start_report,
    start_sections,
    start_tables,
    with_source_seed,
)
from prompt_lab.analysis.statistics import DENOMINATOR_RULE
from prompt_lab.analysis.vectors_report import (
    VectorReport,
    draw_vectors,
    is_sum,
    vector_report,
    vector_sections,
    vector_tables,
)
from prompt_lab.files.tensors import write_atomically, write_csv

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prompt_lab.analysis.plots import Series

DEFAULT_REFERENCES = ("prompt_tuning", "fine_tuning")
MOST_KINDS = 6
"""Kinds of tasks that a picture of codes tells apart; of more, their groups."""

SPREAD = "standard deviation (ddof 1) over a task's samples and seeds"
COUNTS: tuple[str, ...] = (
    *("rows", "failed", "unfinished", "chosen"),
    *("failed_chosen", "without_score", "repeats"),
)
"""What is counted of runs."""

_FOR_ALL_TASKS = ("initialised", "num_virtual_tokens", "optimizer", "metric_variant")
_EVERYTHING = ("all", "all tasks")

References = Mapping[str, Mapping[str, Line]]
"""By name of the reference and label of the line: what the line is compared with."""

Sets = Mapping[tuple[str, str], set[str] | None]
"""Tasks of each set by (kind, name); None stands for all tasks."""


@dataclass(frozen=True)
class Report:
    """All that the tables are made of.

    Attributes:
        lines: the lines.
        references: what each line is compared with, by the reference's name in words.
        sets: the sets of tasks.
        gains: gains of prompts learned on other tasks.
        vectors: task prompt vectors.
        starts: starts of prompt tuning.
        source: how many runs were read from how many files, in words.
        notes: what to know of the whole.
    """

    lines: Sequence[Line]
    references: References
    sets: Sets
    gains: GainReport
    vectors: VectorReport
    starts: StartReport
    source: str
    notes: Sequence[str]


def report_command(
    results: list[str],
    *,
    out: str,
    reference: list[str] | None = None,
    partition: str | None = None,
    correction: Correction = "holm",
) -> list[Path]:
    """Compare methods: tables and pictures from the results.csv files of tests.

    Of the runs of a method with equal task, sample and seeds, the one with the best dev score
    counts; means are over seeds, then samples, then tasks. Writes table.md (also printed),
    table.csv (each figure with its counts), tasks.csv (each task), and pictures as PNG and SVG.
    Where prompts start from ones learned on other tasks, also gains.csv (relative gains against
    plain prompt tuning) and adaptation.csv (dev scores over steps, from the fits' curves.csv).
    Where tasks were tuned from several starts, or with several K, also starts.csv and
    significance.csv (t-tests of the best start against the second best). Of VectorArithmetic's
    results, vectors-cross.csv, vectors-pairs.csv and vectors-expressions.csv.

    Args:
        results: results.csv files, or folders to search for them.
        out: folder for tables and pictures.
        reference: methods to compare with, such as prompt_tuning, or names of lines as the table
            has them; without it prompt_tuning and fine_tuning where the results have them.
        partition: name of a partition, such as ipt/random, for means over its sets.
        correction: of the p-values of one table for their number: holm, bonferroni, or none.

    Returns:
        The files.

    Raises:
        FileNotFoundError: no such file or folder, or no results in it.
        ValueError: a file that is not a result file or an old one, a reference that the results do
            not have, an unknown partition.
        NotADirectoryError: ``out`` is a file.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {folder} is a file: name a folder")
    report = make_report(results, reference, partition, correction)
    text = markdown(report)
    print(text)
    write_atomically(folder / "table.md", text.encode())
    write_csv(folder / "table.csv", TABLE_COLUMNS, table_rows(report))
    write_csv(folder / "tasks.csv", TASK_COLUMNS, task_rows(report))
    tables = [folder / name for name in ("table.md", "table.csv", "tasks.csv")]
    for name, columns, rows in (*vector_tables(report.vectors), *start_tables(report.starts)):
        tables.append(folder / name)
        write_csv(tables[-1], columns, rows)
    return [*tables, *_write_gains(report.gains, folder), *draw(report, folder)]


def _write_gains(gains: GainReport, folder: Path) -> list[Path]:
    """Write the tables of gains and adaptation curves, where there are any."""
    files = []
    if gains.settings:
        files.append(folder / "gains.csv")
        write_csv(files[-1], GAIN_COLUMNS, gain_rows(gains))
    if any(setting.curves for setting in gains.settings):
        files.append(folder / "adaptation.csv")
        write_csv(files[-1], CURVE_MEAN_COLUMNS, adaptation_rows(gains))
    return files


def make_report(
    places: Iterable[str | Path],
    reference: Sequence[str] | None = None,
    partition: str | None = None,
    correction: Correction = "holm",
) -> Report:
    """Read results and find out what is compared with what.

    Args:
        places: result files and folders.
        reference: methods or labels; None for those of `DEFAULT_REFERENCES` that are there.
        partition: name of a partition of the package.
        correction: of p-values.

    Raises:
        FileNotFoundError: as `find_results`.
        ValueError: as `read_results`, `find_reference`, `prompt_lab.data.partitions.partition`,
            `vector_report` and `start_report`.
    """
    sets_of_partition = _partition_sets(partition) if partition is not None else {}
    files = find_results(places)
    rows = [with_source_seed(row) for row in read_results(files)]
    vectors = vector_report(rows, correction)
    lines = make_lines([row for row in rows if not is_sum(row)])
    references, notes = _find_references(reference, lines)
    sets: dict[tuple[str, str], set[str] | None] = {_EVERYTHING: None}
    sets |= {("ontology", name): tasks for name, tasks in by_ontology(lines).items()}
    sets |= {(f"partition {partition}", name): t for name, t in sets_of_partition.items()}
    if partition is not None:
        notes += _partition_notes(partition, sets_of_partition, lines)
    tasks = {row.cells["task"] for row in rows}
    source = f"{len(rows)} runs of {counted(len(tasks), 'task')} from {counted(len(files), 'file')}"
    gains, starts = find_gains(lines, reference), start_report(rows, correction)
    return Report(lines, references, sets, gains, vectors, starts, source, notes)


def _find_references(
    names: Sequence[str] | None, lines: Sequence[Line]
) -> tuple[References, list[str]]:
    """References by name in words, and notes on usual ones that are not clear."""
    if names is not None:
        return {_spoken(name): find_reference(name, lines) for name in names}, []
    found, notes = {}, []
    for name in DEFAULT_REFERENCES:
        if not named_lines(name, lines):
            continue
        try:
            found[_spoken(name)] = find_reference(name, lines)
        except ValueError as error:
            notes.append(f"No comparison: {error}.")
    return found, notes


def _spoken(name: str) -> str:
    """A name as words."""
    return name.replace("_", " ")


def _partition_sets(name: str) -> dict[str, set[str]]:
    """The sets of a partition that have tasks."""
    from prompt_lab.data.partitions import partition

    found = partition(name)
    sets = {which: set(getattr(found, which)) for which in ("source", "dev", "target")}
    return {which: tasks for which, tasks in sets.items() if tasks}


def _partition_notes(
    name: str, sets: Mapping[str, set[str]], lines: Iterable[Line]
) -> Iterator[str]:
    """How much of a partition the results hold, and what they hold beside it."""
    held = {task for line in lines for task in line.tasks}
    counts = [f"{len(tasks & held)} of {len(tasks)} {which}" for which, tasks in sets.items()]
    yield f"Partition {name}: the results have {', '.join(counts)} tasks."
    stray = sorted(held.difference(*sets.values()))
    if stray:
        yield f"In no set of {name}: {', '.join(stray)}."


# ---- Markdown ------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The report as Markdown: a table of all tasks, tables by set and dimension, notes."""
    parts = ["# Results", _legend(report)]
    parts += ["## All tasks", _main_table(report)]
    kinds = dict.fromkeys(kind for kind, _ in report.sets)
    for kind in list(kinds)[1:]:
        for name in (None, *report.references):
            parts += [f"## {_title(name)} by {kind}", _table_by_set(report, kind, name)]
    if families(report.lines):
        for name in (None, *report.references):
            title = f"## {_title(name)} by intrinsic dimension"
            parts += [title, _table_by_dimension(report, name)]
    if report.gains.settings:
        parts += ["## Average relative gain", gain_legend(report.gains)]
        parts.append(_table(*gain_table(report.gains)))
    for title, legend, table in (*vector_sections(report.vectors), *start_sections(report.starts)):
        parts += [f"## {title}", legend, _table(*table)]
    notes = [
        *report.notes,
        *report.gains.notes,
        *report.vectors.notes,
        *report.starts.notes,
        *line_notes(report.lines),
        *comparison_notes(report),
    ]
    if notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def _legend(report: Report) -> str:
    """What the figures are, in a paragraph."""
    text = [
        f"{report.source}. Of the runs with equal settings, task, sample and seeds, the one with "
        "the highest dev score counts (ties: the lower learning rate, then the smaller batch). A "
        "task's score is the mean over seeds, then over samples; other figures are means over "
        "tasks. (12/36) means 12 tasks and 36 such runs.",
        f"std: {SPREAD}, mean over the tasks that have several.",
    ]
    if report.references:
        text.append(
            "E_rel: mean over tasks of score / reference, on the tasks that both have (ARG is "
            f"E_rel less 1); {DENOMINATOR_RULE}. Beside it the means of both on all tasks that "
            "both have."
        )
    return " ".join(text)


def _title(reference: str | None) -> str:
    """What a table is of."""
    return "Mean score" if reference is None else f"E_rel against {reference}"


def _main_table(report: Report) -> str:
    """One line per method: runs, failures, mean, spread and every reference."""
    header = ["method", "runs", "failed", "mean", "std"]
    for name in report.references:
        header += [f"E_rel, {name}", f"mean : {name}"]
    rows = []
    for line in report.lines:
        mean, counts = mean_score(line), run_counts(line.tasks.values())
        cells = [line.label, str(counts["rows"]), str(counts["failed"])]
        cells += [show(mean), _number(mean.std)]
        for found in _comparisons(report, line, None).values():
            cells += [show(found.e_rel), _both(found)] if found else ["-", "-"]
        rows.append(cells)
    return _table(header, rows)


def _table_by_set(report: Report, kind: str, reference: str | None) -> str:
    """One line per method, one column per set of a kind."""
    names = {name: tasks for (of_kind, name), tasks in report.sets.items() if of_kind == kind}
    rows = [
        [line.label, *(show(_value(report, line, reference, tasks)) for tasks in names.values())]
        for line in report.lines
    ]
    return _table(["method", *names], rows)


def _table_by_dimension(report: Report, reference: str | None) -> str:
    """One line per family, one column per intrinsic dimension."""
    found = families(report.lines)
    rows = []
    for name, lines in found.items():
        by_dimension = {line.dimension: _value(report, line, reference, None) for line in lines}
        cells = [show(by_dimension.get(dimension)) for dimension in dimensions(report.lines)]
        rows.append([name, *cells])
    return _table(["method", *(f"{value:g}" for value in dimensions(report.lines))], rows)


def dimensions(lines: Iterable[Line]) -> list[float]:
    """All intrinsic dimensions of some lines, in order."""
    return sorted({line.dimension for line in lines if line.dimension is not None})


def _value(
    report: Report, line: Line, reference: str | None, tasks: set[str] | None
) -> Figure | None:
    """Mean score, or E_rel against a reference; None where there is nothing to compare with."""
    if reference is None:
        return mean_score(line, tasks)
    found = _comparisons(report, line, tasks)[reference]
    return found.e_rel if found else None


def _comparisons(
    report: Report, line: Line, tasks: set[str] | None
) -> dict[str, Comparison | None]:
    """A line against every reference."""
    return {
        name: compare(line, of_line[line.label], tasks) if line.label in of_line else None
        for name, of_line in report.references.items()
    }


def show(figure: Figure | None) -> str:
    """A figure with the number of its tasks and runs."""
    if figure is None or not figure.tasks:
        return "-"
    return f"{_number(figure.value)} ({figure.tasks}/{figure.runs})"


def _both(found: Comparison) -> str:
    """The means of a line and its reference on the tasks that both have."""
    if not found.shared:
        return "-"
    counts = f"({found.mean.tasks}/{found.mean.runs} : {found.reference_mean.runs})"
    return f"{_number(found.mean.value)} : {_number(found.reference_mean.value)} {counts}"


def _number(value: float) -> str:
    """Three digits, or a dash."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned as text too."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (header, *rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


# ---- notes ---------------------------------------------------------------------------------------


def run_counts(results: Iterable[TaskResult]) -> dict[str, int]:
    """How many runs there are, were chosen, failed and so on, over the results of some tasks."""
    counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
    for result in results:
        counts["rows"] += len(result.rows)
        counts["failed"] += sum(row.failed for row in result.rows)
        counts["unfinished"] += sum(row.unfinished for row in result.rows)
        counts["chosen"] += len(result.chosen)
        counts["failed_chosen"] += sum(row.failed for row in result.chosen)
        counts["without_score"] += len(result.chosen) - len(result.tests)
        counts["repeats"] += result.repeats
    return counts


def line_notes(lines: Iterable[Line]) -> list[str]:
    """What to know of the runs of each line; equal notes are joined."""
    notes: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        for text in (*_run_notes(line), *_setting_notes(line)):
            notes[text].append(line.label)
    return _joined(notes)


def _run_notes(line: Line) -> Iterator[str]:
    """Failed, unfinished, repeated and unscored runs of a line."""
    results = line.tasks.values()
    counts = run_counts(results)
    if counts["failed"]:
        chosen = [result.task for result in results if any(r.failed for r in result.chosen)]
        yield (
            f"{counts['failed']} of {counts['rows']} runs failed (they keep the score of their "
            f"best prompt); {counts['failed_chosen']} of them count"
            + (f", on {listed(chosen)}" if chosen else "")
        )
    if counts["unfinished"]:
        yield f"{counts['unfinished']} of {counts['rows']} runs were tested before their end"
    if counts["repeats"]:
        yield (
            f"{counts['repeats']} runs repeat another one's settings, learning rate and batch size "
            "(in other fits, or tested twice); dev chose among them too"
        )
    if not line.is_baseline:
        blind = [result.task for result in results if _chosen_blindly(result)]
        if blind:
            yield f"no dev score to choose by, so the lowest learning rate, on {listed(blind)}"
        lacking = [result.task for result in results if len(result.tests) < len(result.chosen)]
        if lacking:
            yield f"{counts['without_score']} runs that count have no score, on {listed(lacking)}"


def _chosen_blindly(result: TaskResult) -> bool:
    """Whether several runs stood for a choice and none of them had a dev score."""
    return len(result.rows) > len(result.chosen) and any(r.dev == -math.inf for r in result.chosen)


def _setting_notes(line: Line) -> Iterator[str]:
    """Settings that differ within a line, though nothing in a task asks for it."""
    chosen = [row for result in line.tasks.values() for row in result.chosen]
    for column in _FOR_ALL_TASKS:
        values = {row.setting(column) for row in chosen}
        if len(values) > 1:
            yield f"{_spoken(column)} differs within the line: {', '.join(sorted(values))}"


def comparison_notes(report: Report) -> list[str]:
    """Tasks that a comparison lacks, leaves out, or makes on unlike runs; equal notes joined."""
    notes: dict[str, list[str]] = defaultdict(list)
    for line in report.lines:
        for name, found in _comparisons(report, line, None).items():
            if found is None:
                notes[f"no line of {name} on the same backbone to compare with"].append(line.label)
                continue
            for text in _comparison_notes(found, line.is_baseline):
                notes[f"against {name}, {text}"].append(line.label)
    return _joined(notes)


def _comparison_notes(found: Comparison, is_baseline: bool) -> Iterator[str]:
    """What is not alike in one comparison."""
    if found.only_here:
        yield f"no score of the reference for {listed(found.only_here)}"
    if found.only_reference:
        yield f"no score here for {listed(found.only_reference)}"
    reasons = sorted(found.left_out.items(), key=lambda item: item[1])
    for why, group in groupby(reasons, key=lambda item: item[1]):
        yield f"left out of E_rel, {why}: {listed([task for task, _ in group])}"
    for column, tasks in found.differs.items():
        if not is_baseline:
            yield f"compared although {_spoken(column)} is not the same: {listed(tasks)}"


def _joined(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Each note once, after the lines that it is of."""
    return [f"{'; '.join(labels)}: {text}." for text, labels in notes.items()]


# ---- CSV -----------------------------------------------------------------------------------------

TABLE_COLUMNS = (
    *("line", *FIXED, *FURTHER, "kind", "set"),
    *COUNTS,
    *("tasks", "runs", "mean", "std", "reference"),
    *("shared_tasks", "shared_runs", "shared_mean", "reference_runs", "reference_mean"),
    *("e_rel", "e_rel_std", "e_rel_tasks", "e_rel_runs"),
    *("only_here", "only_reference", "left_out"),
)
TASK_COLUMNS = (
    *("line", "task", "ontology", "set", "metric", "samples", "learning_rates", "batch_sizes"),
    *COUNTS,
    *("runs", "score", "std", "reference", "reference_score", "ratio", "left_out"),
)


def table_rows(report: Report) -> Iterator[dict[str, Any]]:
    """One row per line, set of tasks and reference; one without a reference where there is none."""
    for line in report.lines:
        for (kind, name), tasks in report.sets.items():
            results = [r for task, r in line.tasks.items() if tasks is None or task in tasks]
            mean = mean_score(line, tasks)
            row: dict[str, Any] = {"line": line.label, **_settings(line), "kind": kind, "set": name}
            row |= run_counts(results)
            row |= {"tasks": mean.tasks, "runs": mean.runs, "mean": mean.value, "std": mean.std}
            found = _comparisons(report, line, tasks)
            yield from (row | _comparison_cells(name, one) for name, one in found.items() if one)
            if not any(found.values()):
                yield row


def _settings(line: Line) -> dict[str, str]:
    """The columns that describe a line; those that differ between its tasks are empty."""
    settings = {column: line.key[column] for column in FIXED}
    for column in FURTHER:
        values = {value for result in line.tasks.values() for value in result.values(column)}
        settings[column] = values.pop() if len(values) == 1 else ""
    return settings


def _comparison_cells(reference: str, found: Comparison) -> dict[str, Any]:
    """The cells of a comparison in ``table.csv``."""
    return {
        "reference": reference,
        "shared_tasks": found.mean.tasks,
        "shared_runs": found.mean.runs,
        "shared_mean": found.mean.value,
        "reference_runs": found.reference_mean.runs,
        "reference_mean": found.reference_mean.value,
        "e_rel": found.e_rel.value,
        "e_rel_std": found.e_rel.std,
        "e_rel_tasks": found.e_rel.tasks,
        "e_rel_runs": found.e_rel.runs,
        "only_here": " ".join(found.only_here),
        "only_reference": " ".join(found.only_reference),
        "left_out": " ".join(found.left_out),
    }


def task_rows(report: Report) -> Iterator[dict[str, Any]]:
    """One row per line, task and reference; one without a reference where there is none."""
    for line in report.lines:
        comparisons = {n: c for n, c in _comparisons(report, line, None).items() if c}
        for result in line.tasks.values():
            row = {
                "line": line.label,
                "task": result.task,
                "ontology": result.ontology,
                "set": _set_of(report.sets, result.task),
                "metric": " ".join(result.values("metric")),
                "samples": " ".join(result.values("sample")),
                "learning_rates": " ".join(result.values("learning_rate")),
                "batch_sizes": " ".join(result.values("batch_size")),
                "runs": len(result.tests),
                "score": result.score,
                "std": result.std,
                **run_counts([result]),
            }
            for name, found in comparisons.items():
                base = report.references[name][line.label].tasks.get(result.task)
                yield row | {
                    "reference": name,
                    "reference_score": base.score if base else None,
                    "ratio": found.ratios.get(result.task),
                    "left_out": found.left_out.get(result.task),
                }
            if not comparisons:
                yield row


def _set_of(sets: Sets, task: str) -> str:
    """The set of the partition that has a task; empty where none has, or without a partition."""
    found = [n for (kind, n), t in sets.items() if kind.startswith("partition") and t and task in t]
    return " ".join(found)


# ---- pictures ------------------------------------------------------------------------------------


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw bars per task, curves over the intrinsic dimension where there are several, and codes.

    Args:
        report: the report.
        folder: where the pictures go.

    Returns:
        The files.
    """
    files = [*_draw_bars(report, folder), *_draw_maps(report, folder)]
    files += draw_gains(report.gains, folder)
    files += [*draw_vectors(report.vectors, folder), *draw_starts(report.starts, folder)]
    if len(dimensions(report.lines)) > 1:
        for name in (None, *report.references):
            files += _draw_curves(report, name, folder)
    return files


def _draw_bars(report: Report, folder: Path) -> list[Path]:
    """Scores per task, in pages of some tasks and some lines; baselines are left to the tables."""
    from prompt_lab.analysis.plots import save_task_bars

    lines = [line for line in report.lines if not line.is_baseline]
    tasks = tasks_in_order(lines)
    if not tasks:
        return []
    runs = [len(result.tests) for line in lines for result in line.tasks.values()]
    note = f"error bars: {SPREAD}; {_range(runs)} runs per bar"
    series = [_bars_of(line, tasks) for line in lines]
    return save_task_bars(tasks, series, "test score", note, folder / "scores")


def _bars_of(line: Line, tasks: Sequence[str]) -> Series:
    """The bars of one line."""
    from prompt_lab.analysis.plots import Series

    results = [line.tasks.get(task) for task in tasks]
    scores = [math.nan if result is None else result.score for result in results]
    return Series(line.label, scores, [math.nan if r is None else r.std for r in results])


def _draw_maps(report: Report, folder: Path) -> list[Path]:
    """The codes of each subspace on their principal components, where there are three or more."""
    import numpy as np

    from prompt_lab.analysis.plots import file_name, save_figure, vector_map

    files = []
    for line in report.lines:
        runs = [
            (r, row.cells.get("prompt_file", "")) for r in line.tasks.values() for row in r.chosen
        ]
        found = [(result, code) for result, path in runs if (code := _read_code(path)) is not None]
        if line.dimension is None or line.dimension < 2 or len(found) < 3:
            continue
        kinds = {result.ontology for result, _ in found}
        is_small = len(kinds) <= MOST_KINDS
        groups = [r.ontology if is_small else group_of(r.ontology) for r, _ in found]
        sets = [_set_of(report.sets, result.task) or "all tasks" for result, _ in found]
        note = f"{line.label}: codes of {len(found)} runs"
        figure = vector_map(np.stack([code for _, code in found]), groups, sets, note)
        files += save_figure(figure, folder / f"codes-{file_name(line.label)}")
    return files


def _read_code(path: str) -> NDArray[Any] | None:
    """The code (I,) in a prompt file, or None where there is no file or no code in it."""
    from prompt_lab.files.prompts import load_prompt

    if not path or not Path(path).is_file():
        return None
    code = load_prompt(path).code
    return None if code is None else code.numpy()


def _draw_curves(report: Report, reference: str | None, folder: Path) -> list[Path]:
    """Mean score, or E_rel against a reference, over the intrinsic dimension."""
    from prompt_lab.analysis.plots import Series, dimension_curves, file_name, save_figure

    places = dimensions(report.lines)
    series, figures = [], []
    for name, lines in families(report.lines).items():
        of_line = {line.dimension: _value(report, line, reference, None) for line in lines}
        found = [of_line.get(place) or Figure(math.nan, 0, 0) for place in places]
        figures += [figure for figure in found if figure.tasks]
        series.append(Series(name, [f.value for f in found], [f.std for f in found]))
    if not figures:
        return []
    tasks, runs = _range([f.tasks for f in figures]), _range([f.runs for f in figures])
    note = f"error bars: {SPREAD}, mean over tasks; {tasks} tasks and {runs} runs per point"
    level = None if reference is None else (reference, 1.0)
    stem = "score" if reference is None else f"e_rel-{file_name(reference)}"
    figure = dimension_curves(places, series, _title(reference), note, level)
    return save_figure(figure, folder / f"{stem}-by-dimension")


def _range(values: Sequence[int]) -> str:
    """The least and the most of some counts."""
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"
