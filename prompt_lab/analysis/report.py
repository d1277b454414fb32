"""Lines of a report from result files: choice by dev, means, and comparison with a reference.

A **line** is what a table has a line for: a method in one variant, stage, backbone and intrinsic
dimension. Of its runs that share task, sample and seeds, the one with the highest dev score counts;
a task's score is the mean over seeds, then over samples. Other settings (`FURTHER`) tell lines
apart only where one task has several values of them, since they may depend on the task: K, the way
of answering, an initial text. A start from a prompt learned on other tasks (`UPSTREAM`) always
makes a line of its own. Runs that failed keep the score of their best prompt and are counted.

Nothing here loads torch or a model. Left out: tests of significance, and layout, which is in
`prompt_lab.commands.report_command`.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

from prompt_lab.analysis.statistics import Relative, relative_performance, summarise
from prompt_lab.files.results import BASELINES, RESULT_COLUMNS

FIXED: tuple[str, ...] = ("method", "variant", "stage", "backbone", "intrinsic_dim")
"""Columns that always tell lines apart."""

FURTHER: tuple[str, ...] = (
    *("initialised", "num_virtual_tokens", "optimizer"),
    *("shots", "decoding", "metric_variant"),
)
"""Columns that do so where one task has several values of them."""

UPSTREAM: tuple[str, ...] = ("maml", "fomaml", "reptile", "multitask")
"""Algorithms that learn a prompt on source tasks, from which prompt tuning then starts."""

SAME = ("metric", "metric_variant", "shots", "decoding")
"""Columns in which a task's runs should agree with those that they are compared with."""

NEEDED = (
    *dict.fromkeys((*FIXED, *FURTHER, *SAME)),
    *("fit_id", "task", "ontology", "sample", "init_seed", "order_seed"),
    *("learning_rate", "batch_size", "dev", "test", "status"),
)
"""Columns that a result file must have."""

_OF_ONE_FILE = ("seconds", "prompt_file")
_NUMBERS = ("learning_rate", "batch_size", "dev", "test", "intrinsic_dim")
_WITHOUT_METHOD = ("no_prompt", "chance", "majority")
_FAILED = ("failed", "diverged")
_UNFINISHED = "training"
_STOPPED = "stopped early"
_TUNED = "tuned"
_RECONSTRUCTION = "reconstruction"


@dataclass(frozen=True)
class Row:
    """One line of a result file.

    Attributes:
        cells: its cells as text, by column; the prompt file with the folder of the results.
        dev: dev score; minus infinity where there is none.
        test: test score; NaN where there is none.
        learning_rate: NaN where there is none.
        batch_size: NaN where there is none.
    """

    cells: Mapping[str, str]
    dev: float
    test: float
    learning_rate: float
    batch_size: float

    def setting(self, column: str) -> str:
        """A cell as it tells lines apart.

        How a run was initialised may name its own source prompt, and a subspace file with its
        dimension; neither is a setting beside task and dimension, so they are taken out.
        """
        text = self.cells[column]
        if column != "initialised":
            return text
        if text.startswith(_RECONSTRUCTION):
            return _RECONSTRUCTION
        folder, slash, file = text.rpartition("/")
        dimension = re.escape(self.cells["intrinsic_dim"])
        if not dimension or not file.endswith(".safetensors"):
            return text
        return folder + slash + re.sub(rf"(?<![\d.]){dimension}(?!\d)", "I", file)

    @property
    def failed(self) -> bool:
        """Whether its training ended in a failure."""
        return self.cells["status"].lower().startswith(_FAILED)

    @property
    def stopped(self) -> bool:
        """Whether its training ended early for want of a better dev score."""
        return self.cells["status"] == _STOPPED

    @property
    def unfinished(self) -> bool:
        """Whether it was tested before its training ended."""
        return self.cells["status"] == _UNFINISHED


@dataclass(frozen=True)
class TaskResult:
    """What one line of the report has on one task.

    Attributes:
        task: name of the task.
        ontology: kind of the task, "group/subgroup".
        score: mean over samples of the mean over seeds of the chosen runs' test scores; NaN without
            any.
        std: standard deviation (ddof 1) over all chosen runs; NaN where fewer than two have one.
        tests: test scores of the chosen runs that have one.
        chosen: the runs that dev chose, one per sample and seeds.
        rows: all its runs.
        repeats: runs beyond the first among those of equal settings, learning rate and batch size.
    """

    task: str
    ontology: str
    score: float
    std: float
    tests: tuple[float, ...]
    chosen: tuple[Row, ...]
    rows: tuple[Row, ...]
    repeats: int

    def values(self, column: str) -> tuple[str, ...]:
        """The values of a column among the chosen runs, each once, in order."""
        return tuple(sorted({row.cells[column] for row in self.chosen}))


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        label: its name in tables and figures.
        family: the name without the intrinsic dimension.
        key: the columns that tell it apart from other lines.
        tasks: its results by task, in order of ontology and name.
    """

    label: str
    family: str
    key: Mapping[str, str]
    tasks: Mapping[str, TaskResult]

    @property
    def is_baseline(self) -> bool:
        """Whether nothing was tuned: no prompt, the initial prompt, chance or majority."""
        return self.key["variant"] in BASELINES

    @property
    def upstream(self) -> tuple[str, str] | None:
        """Algorithm and sources of the prompt that it starts from, if learned on other tasks."""
        return upstream_of(self.key["initialised"])

    @property
    def dimension(self) -> float | None:
        """Intrinsic dimension, where there is one."""
        text = self.key["intrinsic_dim"]
        return float(text) if text else None

    def scored(self, tasks: Collection[str] | None = None) -> list[TaskResult]:
        """Results with a score, of these tasks or of all."""
        return [
            result
            for name, result in self.tasks.items()
            if (tasks is None or name in tasks) and not math.isnan(result.score)
        ]


@dataclass(frozen=True)
class Figure:
    """A mean over tasks.

    Attributes:
        value: the mean; NaN without a task.
        tasks: number of tasks in it.
        runs: number of chosen runs in it.
        std: standard deviation (ddof 1) over a task's runs, mean over the tasks that have several.
    """

    value: float
    tasks: int
    runs: int
    std: float = math.nan


@dataclass(frozen=True)
class Comparison:
    """A line against a reference, on the tasks for which both have a score.

    Attributes:
        e_rel: mean of score / reference.
        mean: mean score of the line.
        reference_mean: mean score of the reference.
        relative: the ratios, in the order of ``shared``.
        shared: the tasks that both have.
        only_here: tasks that the reference lacks.
        only_reference: tasks that the line lacks.
        differs: columns (or "sample") in which some tasks differ from the reference, with them.
    """

    e_rel: Figure
    mean: Figure
    reference_mean: Figure
    relative: Relative
    shared: tuple[str, ...]
    only_here: tuple[str, ...]
    only_reference: tuple[str, ...]
    differs: Mapping[str, tuple[str, ...]]

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Tasks that both have but E_rel leaves out, and why."""
        return {self.shared[at]: why for at, why in self.relative.left_out.items()}

    @cached_property
    def ratios(self) -> dict[str, float]:
        """Score / reference of each task that counts."""
        pairs = zip(self.shared, self.relative.values, strict=True)
        return {task: value for task, value in pairs if not math.isnan(value)}


# ---- reading -------------------------------------------------------------------------------------


def is_result_file(path: Path) -> bool:
    """Whether a file is a results.csv, by its header; a folder and nothing are none."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return "fit_id" in file.readline().strip().split(",")


def find_results(places: Iterable[str | Path]) -> list[Path]:
    """The result files at some places, each once.

    A folder stands for every ``results.csv`` in it and below; folders ``previous-1`` and so on,
    where a new fit keeps what it replaces, are passed over unless they are named themselves.

    Args:
        places: files and folders.

    Raises:
        FileNotFoundError: a place is not there, or a folder has no result file.
    """
    found: dict[Path, Path] = {}
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"no file or folder {place}: give results.csv files or folders")
        files = [place] if not place.is_dir() else _below(place)
        if not files:
            raise FileNotFoundError(
                f"no results.csv in {place} or below: prompt-lab test writes it; name its run_dir"
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _below(folder: Path) -> list[Path]:
    """Result files in a folder and below, without those that a later fit replaced."""
    return [
        path
        for path in sorted(folder.rglob("results.csv"))
        if path.is_file()
        and not any(re.fullmatch(r"previous-\d+", p) for p in path.relative_to(folder).parts)
    ]


def read_results(paths: Iterable[str | Path]) -> list[Row]:
    """All runs of some result files; a run that stands in several of them is taken once.

    Args:
        paths: result files, as `find_results` gives them.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is no result file, lacks columns or has a line that cannot be read; or
            there is no run in any.
    """
    rows: dict[tuple[str, ...], Row] = {}
    files = list(map(Path, paths))
    for path in files:
        for row in _read(path):
            rows.setdefault(_identity(row), row)
    if not rows:
        raise ValueError(f"no runs in {', '.join(map(str, files))}: only a header; run the tests")
    return list(rows.values())


def _read(path: Path) -> list[Row]:
    """The runs of one file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if "fit_id" not in columns or "test" not in columns:
                raise ValueError(f"{path} is no results.csv of prompt-lab: no columns fit_id, test")
            missing = [name for name in NEEDED if name not in columns]
            if missing:
                raise ValueError(
                    f"{path} lacks the columns {', '.join(missing)}: an older version wrote it; "
                    "run prompt-lab test again"
                )
            return [_parse(path, reader.line_num, cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no results.csv of prompt-lab: {error}") from None


def _parse(path: Path, line: int, cells: dict[str, str]) -> Row:
    """One line of a file, with its numbers read."""
    if None in cells or None in cells.values():
        raise ValueError(f"{path}, line {line}: not as many cells as columns; is the file whole?")
    numbers: dict[str, float] = {}
    for name in _NUMBERS:
        try:
            numbers[name] = float(cells[name]) if cells[name] else math.nan
        except ValueError:
            what = f"{name} is {cells[name]!r}, not a number"
            raise ValueError(f"{path}, line {line}: {what}; correct it or test again") from None
    if cells["variant"] in BASELINES:  # the same in every fit
        cells = {**cells, "fit_id": ""}
    if cells["variant"] in _WITHOUT_METHOD:  # and for every method
        cells = {**cells, "method": "", "stage": ""}
    if cells.get("prompt_file"):
        cells = {**cells, "prompt_file": str(path.parent / cells["prompt_file"])}
    dev = -math.inf if math.isnan(numbers["dev"]) else numbers["dev"]
    return Row(cells, dev, numbers["test"], numbers["learning_rate"], numbers["batch_size"])


def _identity(row: Row) -> tuple[str, ...]:
    """What makes two lines of files the same run: all but time and place."""
    names = [name for name in RESULT_COLUMNS if name not in _OF_ONE_FILE]
    return tuple(row.cells.get(name, "") for name in names)


# ---- lines ---------------------------------------------------------------------------------------


def make_lines(rows: Sequence[Row]) -> list[Line]:
    """Group runs to the lines of a report, and choose by dev within them.

    Args:
        rows: runs, as `read_results` gives them.

    Returns:
        The lines: tuned ones first, by label and intrinsic dimension, then the baselines.
    """
    telling = _telling_columns(rows)
    by_key: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        columns = telling[_values(row, FIXED)]
        if upstream_of(row.cells["initialised"]):
            columns = columns | {"initialised"}
        by_key[tuple(row.setting(c) if c in columns else "" for c in (*FIXED, *FURTHER))].append(
            row
        )
    keys = [dict(zip((*FIXED, *FURTHER), key, strict=True)) for key in by_key]
    lines = [
        Line(*_names(key, keys), key, _task_results(of_key))
        for key, of_key in zip(keys, by_key.values(), strict=True)
    ]
    return sorted(lines, key=lambda x: (x.is_baseline, x.family, x.dimension or 0, x.label))


def _telling_columns(rows: Iterable[Row]) -> dict[tuple[str, ...], set[str]]:
    """For each value of the fixed columns, all columns that tell its lines apart.

    Starts from prompts learned on other tasks are passed over: they tell apart in any case, and
    should not part the lines of other starts.
    """
    seen: dict[tuple[str, ...], dict[tuple[str, str], set[str]]]
    seen = defaultdict(lambda: defaultdict(set))
    for row in rows:
        for column in FURTHER:
            if column == "initialised" and upstream_of(row.cells[column]):
                continue
            seen[_values(row, FIXED)][row.cells["task"], column].add(row.setting(column))
    return {
        key: {*FIXED, *(column for (_, column), values in of_key.items() if len(values) > 1)}
        for key, of_key in seen.items()
    }


def upstream_of(initialised: str) -> tuple[str, str] | None:
    """Algorithm and sources in "maml mpt/cls_to_cls/source"; None for any other start."""
    algorithm, _, sources = initialised.partition(" ")
    return (algorithm, sources.strip()) if algorithm in UPSTREAM and sources.strip() else None


def _values(row: Row, columns: Iterable[str]) -> tuple[str, ...]:
    """The cells of some columns."""
    return tuple(row.cells[column] for column in columns)


def _names(key: Mapping[str, str], keys: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """Label and family of a line: its method, and what tells it apart from its method's others."""
    alike = [other for other in keys if _same(key, other, ("method", "variant"))]
    varying = [name for name in key if len({other[name] for other in alike}) > 1]
    if upstream_of(key["initialised"]) and "initialised" not in varying:
        varying = [name for name in key if name in (*varying, "initialised")]
    parts = [_words(key["method"])] if key["method"] else []
    if key["variant"] != _TUNED:
        parts.append(key["variant"].replace("_", " "))
    parts += [part(name, key[name]) for name in varying if key[name] and name != "intrinsic_dim"]
    name = ", ".join(parts)
    if not key["intrinsic_dim"]:
        return name, name
    rest = [column for column in key if column != "intrinsic_dim"]
    whole = any(_same(key, other, rest) and not other["intrinsic_dim"] for other in keys)
    family = f"{name}, subspace" if whole else name
    return f"{name}, dim {key['intrinsic_dim']}", family


def _same(one: Mapping[str, str], other: Mapping[str, str], columns: Iterable[str]) -> bool:
    """Whether two keys agree in some columns."""
    return all(one[column] == other[column] for column in columns)


def part(column: str, value: str) -> str:
    """A setting within a label."""
    if column == "initialised" and upstream_of(value):
        return value
    word = {"shots": "K", "num_virtual_tokens": "N"}.get(column, column.replace("_", " "))
    return f"{word} {value}"


def _words(name: str) -> str:
    """A class name in words: "PromptTuning" is "prompt tuning"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()


def _task_results(rows: Iterable[Row]) -> dict[str, TaskResult]:
    """Results of one line by task, in order of ontology group and name."""
    by_task: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row.cells["task"]].append(row)
    results = [_task_result(of_task) for of_task in by_task.values()]
    results.sort(key=lambda result: (group_rank(group_of(result.ontology)), result.task))
    return {result.task: result for result in results}


def _task_result(rows: Sequence[Row]) -> TaskResult:
    """Result of one line on one task."""
    chosen = choose_by_dev(rows)
    by_sample: dict[str, list[float]] = defaultdict(list)
    for row in chosen:
        by_sample[row.cells["sample"]].append(row.test)
    score = summarise(summarise(tests).mean for tests in by_sample.values()).mean
    tests = tuple(row.test for row in chosen if math.isfinite(row.test))
    settings = {(*_cell_of(row), str(row.learning_rate), str(row.batch_size)) for row in rows}
    first = rows[0].cells
    return TaskResult(
        task=first["task"],
        ontology=first["ontology"],
        score=score,
        std=summarise(tests).std,
        tests=tests,
        chosen=tuple(chosen),
        rows=tuple(rows),
        repeats=len(rows) - len(settings),
    )


def choose_by_dev(rows: Iterable[Row]) -> list[Row]:
    """Of the runs of a line and task that share sample and seeds, the one with the best dev score.

    Ties go to the lower learning rate, then to the smaller batch, then to the first. A run without
    a dev score loses to all others.
    """
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        cell = _cell_of(row)
        if cell not in best or _preference(row) < _preference(best[cell]):
            best[cell] = row
    return list(best.values())


def _cell_of(row: Row) -> tuple[str, ...]:
    """What the runs share among which dev chooses, within a line and a task."""
    return _values(row, ("sample", "init_seed", "order_seed"))


def _preference(row: Row) -> tuple[float, float, float]:
    """Smaller is better; settings that are not known come last."""
    rate, size = (math.inf if math.isnan(x) else x for x in (row.learning_rate, row.batch_size))
    return -row.dev, rate, size


# ---- groups of tasks -----------------------------------------------------------------------------

GROUPS = ("cls", "qa", "cg", "other")
"""Groups of CrossFit's ontology, in the order of tables."""


def group_of(ontology: str) -> str:
    """The group of an ontology: "cls" of "cls/nli"."""
    return ontology.split("/")[0]


def group_rank(group: str) -> tuple[int, str]:
    """Sorts CrossFit's groups in their order, and others after them by name."""
    return (GROUPS.index(group) if group in GROUPS else len(GROUPS), group)


def by_ontology(lines: Iterable[Line]) -> dict[str, set[str]]:
    """The tasks of each ontology group that the lines have."""
    groups: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        for result in line.tasks.values():
            groups[group_of(result.ontology)].add(result.task)
    return dict(sorted(groups.items(), key=lambda item: group_rank(item[0])))


def tasks_in_order(lines: Iterable[Line]) -> list[str]:
    """All tasks of some lines, in order of ontology group and name."""
    ontology = {result.task: result.ontology for line in lines for result in line.tasks.values()}
    return sorted(ontology, key=lambda task: (group_rank(group_of(ontology[task])), task))


# ---- figures -------------------------------------------------------------------------------------


def mean_score(line: Line, tasks: Collection[str] | None = None) -> Figure:
    """Mean over tasks of a line's scores, of these tasks or of all."""
    return _figure(line.scored(tasks), lambda result: result.score, lambda result: result.std)


def _figure(
    results: Sequence[TaskResult],
    value: Callable[[TaskResult], float],
    spread: Callable[[TaskResult], float],
) -> Figure:
    """Mean of a value over the results of tasks, with counts and mean spread."""
    runs = sum(len(result.tests) for result in results)
    std = summarise(map(spread, results)).mean
    return Figure(summarise(map(value, results)).mean, len(results), runs, std)


def compare(line: Line, reference: Line, tasks: Collection[str] | None = None) -> Comparison:
    """A line against a reference on the tasks that both have, of these tasks or of all.

    Args:
        line: the line.
        reference: the reference's line.
        tasks: the tasks to keep to; None for all.
    """
    ours = {result.task: result for result in line.scored(tasks)}
    theirs = {result.task: result for result in reference.scored(tasks)}
    shared = [task for task in ours if task in theirs]
    base = {task: theirs[task].score for task in shared}
    relative = relative_performance([ours[task].score for task in shared], list(base.values()))
    counted = [ours[task] for at, task in enumerate(shared) if at not in relative.left_out]
    columns = ("sample", *SAME)
    differs = {
        column: tuple(t for t in shared if ours[t].values(column) != theirs[t].values(column))
        for column in columns
    }
    return Comparison(
        e_rel=_figure(
            counted,
            lambda result: result.score / base[result.task],
            lambda result: result.std / base[result.task],
        ),
        mean=mean_score(line, shared),
        reference_mean=mean_score(reference, shared),
        relative=relative,
        shared=tuple(shared),
        only_here=tuple(task for task in ours if task not in theirs),
        only_reference=tuple(task for task in theirs if task not in ours),
        differs={column: found for column, found in differs.items() if found},
    )


# ---- references ----------------------------------------------------------------------------------


def find_reference(name: str, lines: Sequence[Line]) -> dict[str, Line]:
    """The reference of every line under one name.

    The name is a label, or a method such as "prompt_tuning", which stands for its tuned lines
    without an intrinsic dimension and without a start from a prompt learned on other tasks; of
    those, if there are any, for the ones that start from no prompt file or vector. A
    line's reference has the same backbone; if several have, the one that also agrees in K, way of
    answering and metric variant.

    Args:
        name: label or method; case, spaces, "_" and "-" do not matter.
        lines: all lines.

    Returns:
        The reference by the label of the line; lines whose backbone no reference has are left out.

    Raises:
        ValueError: no line has the name, or a line would have several references.
    """
    named = named_lines(name, lines)
    if not named:
        labels = "; ".join(line.label for line in lines)
        raise ValueError(f"no reference {name!r} in the results; there are: {labels}")
    references = {line.label: references_among(line, named) for line in lines}
    for label, found in references.items():
        if len(found) > 1:
            raise ValueError(
                f"{name!r} is several lines for {label!r}: "
                f"{few([line.label for line in found])}; name one of them as the reference"
            )
    return {label: found[0] for label, found in references.items() if found}


def named_lines(name: str, lines: Iterable[Line]) -> list[Line]:
    """The lines that a name stands for, as `find_reference` reads it; empty where there is none."""
    lines = list(lines)
    labelled = [line for line in lines if _plain(line.label) == _plain(name)]
    found = labelled or [
        line
        for line in lines
        if _plain(line.key["method"]) == _plain(name)
        and line.key["variant"] == _TUNED
        and line.dimension is None
        and line.upstream is None
    ]
    return labelled or [line for line in found if is_plain(line.key["initialised"])] or found


def references_among(line: Line, named: Sequence[Line]) -> list[Line]:
    """The lines among some that a line can be compared with: of its backbone, the closest."""
    if any(other is line for other in named):
        return [line]
    fit = [other for other in named if other.key["backbone"] == line.key["backbone"]]
    closer = [other for other in fit if _same(line.key, other.key, ("shots", "decoding"))]
    closer = [other for other in closer if _same(line.key, other.key, ("metric_variant",))]
    return closer if len(fit) > 1 and closer else fit


def _plain(name: str) -> str:
    """A name without case, spaces and signs between words."""
    return re.sub(r"[\s_-]+", "", name).lower()


def families(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines that differ in the intrinsic dimension only, in its order, by family."""
    found = sorted((line for line in lines if line.dimension is not None), key=_by_dimension)
    return {name: list(of_name) for name, of_name in groupby(found, lambda line: line.family)}


def _by_dimension(line: Line) -> tuple[str, float]:
    """Order of lines within families."""
    return line.family, line.dimension or 0.0


# ---- words ---------------------------------------------------------------------------------------


def counted(number: int, word: str) -> str:
    """A number and its word, in the plural where it must be."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def listed(tasks: Sequence[str]) -> str:
    """Names of tasks and how many they are."""
    return f"{counted(len(tasks), 'task')} ({', '.join(tasks)})"


def few(names: Sequence[str]) -> str:
    """The first three names, with semicolons, and how many more there are."""
    more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(names[:3]) + more
