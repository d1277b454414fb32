"""The commands ``prompt-lab tasks list``, ``show`` and ``check``.

They say what the task table and a folder of few-shot files hold, before a fit reads them. ``check``
reports all that it finds, where a fit stops at the first fault; rows are read as a fit does.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prompt_lab.commands.build import read_shots
from prompt_lab.files.vectors import listed
from prompt_lab.sandbox import SANDBOX

if TYPE_CHECKING:
    from prompt_lab.data.files import Split, SplitName
    from prompt_lab.data.tasks import Shots, Task

HEAD, TAIL = 200, 100
"""Characters that ``show`` keeps at the start and the end of a long text; options stand there."""

MOST_ANSWERS = 3
"""Accepted answers of a row that ``show`` prints."""


def list_tasks(
    ontology: str | None = None,
    metric: str | None = None,
    partition: str | None = None,
    root: str | None = None,
    task_file: str | None = None,
) -> None:
    """Print one line per task: name, ontology, metric, K, number of labels.

    K is the number in the file names, or all; "any K" takes what the folder has. With a partition,
    the line has the task's set too, and tasks that the table lacks are named on standard error.
    With a root, only tasks with files there are printed, and the samples with all three splits.

    Args:
        ontology: only tasks of this kind, such as cls or cls/nli.
        metric: only tasks with this metric, such as ACC.
        partition: only tasks of this partition or of one of its sets, such as crossfit/random or
            crossfit/random/target.
        root: only tasks with files in this folder; sandbox for the package's own.
        task_file: YAML file with rows for your own tasks.
    """
    from prompt_lab.data.tasks import load_tasks

    table = load_tasks(task_file)
    tasks = list(table.values())
    if ontology is not None:
        kinds = {task.ontology for task in tasks}
        _check_known("ontology", ontology, kinds | {kind.split("/")[0] for kind in kinds})
        tasks = [task for task in tasks if f"{task.ontology}/".startswith(f"{ontology}/")]
    if metric is not None:
        _check_known("metric", metric, {task.metric for task in table.values()})
        tasks = [task for task in tasks if task.metric == metric]
    names = {task.name: "" for task in tasks}
    sets = names if partition is None else _sets(partition, set(table))
    held = names if root is None else _held(root, tasks)
    rows = []
    for task in tasks:
        if task.name in sets and task.name in held:
            shots = "any K" if task.shots is None else f"K {task.shots}"
            labels = "open" if task.labels is None else f"{len(task.labels)} labels"
            facts = (task.name, task.ontology, task.metric, shots, labels)
            rows.append((*facts, sets[task.name], held[task.name]))
    if not rows:
        raise ValueError("no task fits all that was asked for: leave a setting out")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width]
        print("  ".join(cells).rstrip())


def show_task(
    task: str,
    root: str | None = None,
    sample: int = 100,
    count: int = 3,
    shots: str | None = None,
    task_file: str | None = None,
) -> None:
    """Print what the table says of a task, and some of its training rows.

    The rows are spread evenly over the file, where rows of a label often stand together. Of a long
    text the middle is left out, and the number of its characters said.

    Args:
        task: name of the task.
        root: folder that holds one folder per task, or sandbox for the package's own; without it
            no rows are printed.
        sample: few-shot sample, the second number in the file names.
        count: how many rows to print.
        shots: K of the file names, or all; the table's if left out.
        task_file: YAML file with rows for your own tasks.
    """
    if count < 1:
        raise ValueError(f"count is {count}: give at least 1")
    (row,) = _with_shots([task], shots, task_file)
    rows = None if root is None else _train_rows(root, row, sample)
    print(row.name)
    for name, text in _facts_of(row):
        _print_field(name, text)
    if rows is None:
        return
    count = min(count, len(rows))
    print(f"\n{count} of the {len(rows)} rows of train, sample {sample}")
    for place in (number * len(rows) // count for number in range(count)):
        text, answers = rows[place]
        print(f"\nline {place + 1}")
        _print_field("input", shorten(text))
        for number, answer in enumerate(answers[:MOST_ANSWERS]):
            _print_field("or" if number else "answer", shorten(answer))
        if len(answers) > MOST_ANSWERS:
            _print_field("", f"and {len(answers) - MOST_ANSWERS} more answers")


def check_tasks(
    root: str,
    tasks: list[str] | None = None,
    shots: str | None = None,
    task_file: str | None = None,
) -> int:
    """Check the files of a data folder; print a line for each finding, then a summary.

    Errors are what a fit refuses: a task without files for its K; a split that is missing; a file
    that is empty or not UTF-8; a row that is empty, lacks its input or an answer, has an empty
    column or a stray carriage return or NUL; an answer outside the labels; a row in two splits
    (unless data.allow_overlap is set); several K where the table names none.

    Notes are what a fit accepts: in train and dev, another number of rows than K of each label, or
    K in all (where K is all, only a label without rows); further answers in a task with labels;
    samples whose test rows differ; files of another K (which a fit reads with data.shots), files
    with other names, and folders of no known task, which are not checked.

    Findings of one kind in one file are one line, with the first place and their number. The exit
    status is 1 if there is an error.

    Args:
        root: folder that holds one folder per task.
        tasks: only these tasks; by default all known ones that have a folder there.
        shots: K of the file names, or all; the table's if left out.
        task_file: YAML file with rows for your own tasks.
    """
    from prompt_lab.data.tasks import load_tasks

    known = load_tasks(task_file)
    folders = _folders(root)
    chosen = _with_shots(tasks or [n for n in folders if n in known], shots, task_file)
    if not chosen:
        raise ValueError(
            f"{root} has no folder of a known task: give the folder that holds them, and tasks of "
            f"your own by --task_file; its folders: {listed(folders) or 'none'}"
        )
    errors = notes = 0
    for finding in check_folder(Path(root), chosen, [] if tasks else folders):
        print(finding)
        errors, notes = errors + finding.is_error, notes + (not finding.is_error)
    print(f"{len(chosen)} tasks checked; errors: {errors}, notes: {notes}")
    return int(errors > 0)


# ---- list and show -------------------------------------------------------------------------------


def _check_known(flag: str, given: str, known: set[str]) -> None:
    if given not in known:
        raise ValueError(f"--{flag} is {given!r}; allowed: {', '.join(sorted(known))}")


def _with_shots(names: Sequence[str], shots: str | None, task_file: str | None) -> list[Task]:
    from prompt_lab.data.tasks import find_tasks

    found = find_tasks(names, task_file)
    return found if shots is None else [replace(task, shots=read_shots(shots)) for task in found]


def _facts_of(task: Task) -> Iterator[tuple[str, str]]:
    yield "ontology", task.ontology
    yield "metric", task.metric
    yield "K", "any" if task.shots is None else str(task.shots)
    yield "drawn", "K of each label" if task.kind == "classification" else "K in all"
    yield "labels", "none, answers are open" if task.labels is None else ", ".join(task.labels)
    source = task.source
    if source is not None:
        yield "data set", ", ".join(filter(None, (source.hub or "not on the hub", source.config)))
        is_one = source.train == source.test
        both = f"train {source.train}, test {source.test}"
        yield "splits", f"train and test are drawn from {source.train}" if is_one else both
        yield "template", source.input
        yield "target", source.target or f"the label in {source.label}"
        if source.prepare is not None:
            yield "prepared", f"by {source.prepare} of prompt_lab/data/prepare.py"
        if source.keep is not None:
            yield "kept", f"rows where {source.keep}"
    yield "licence", task.licence
    if task.note:
        yield "note", task.note


def _sets(reference: str, known: set[str]) -> dict[str, str]:
    from prompt_lab.data.partitions import partition

    name, _, only = reference.rpartition("/")
    sets = ("source", "dev", "target")
    found = partition(name if only in sets else reference)
    asked = (only,) if only in sets else sets
    members = {task: which for which in asked for task in getattr(found, which)}
    if lacking := sorted(members.keys() - known):
        print(f"prompt-lab: not in the task table: {', '.join(lacking)}", file=sys.stderr)
    return members


def _held(root: str, tasks: Sequence[Task]) -> dict[str, str]:
    """The tasks that have a whole sample in the root, and in words which samples those are."""
    if root == SANDBOX:
        from prompt_lab.sandbox import TASKS

        return {task.name: "any sample" for task in tasks if task.name in TASKS}
    folders, found = _folders(root), {}
    for task in tasks:
        held = _few_shot_files(Path(root, task.name))[0] if task.name in folders else []
        splits = Counter((shots, sample) for shots, sample, _ in held)
        whole = {s for (k, s), number in splits.items() if number == 3 and task.shots in (None, k)}
        if whole:
            found[task.name] = f"samples {', '.join(map(str, sorted(whole)))}"
    return found


def _train_rows(root: str, task: Task, sample: int) -> list[tuple[str, list[str]]]:
    from prompt_lab.data.files import read_split
    from prompt_lab.sandbox import TASKS, rows

    if root != SANDBOX:
        split = read_split(root, task, sample, "train")
        return list(zip(split.inputs, split.references, strict=True))
    if task.name not in TASKS:
        raise ValueError(f"{task.name} is not in the sandbox: give the folder of its files as root")
    return [(text, [answer]) for text, answer in rows(task.name, sample, "train")]


def _print_field(name: str, text: str) -> None:
    start, width = f"  {name:<10}", max(shutil.get_terminal_size((100, 24)).columns, 40)
    wrapper = textwrap.TextWrapper(width, start, " " * len(start), break_on_hyphens=False)
    print(wrapper.fill(text))


def shorten(text: str) -> str:
    """A text without the middle, if it is long; marks no terminal shows become spaces."""
    text = "".join(mark if mark.isprintable() else " " for mark in text)
    left_out = len(text) - HEAD - TAIL
    if left_out <= 0:
        return text
    return f"{text[:HEAD]} [... {left_out} characters left out ...] {text[-TAIL:]}"


# ---- check ---------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """One thing to know about a data folder: where, what, and whether a fit refuses it.

    ``line`` is the first that shows it, counted from 1. As text it is one line.
    """

    task: str
    what: str
    is_error: bool = True
    shots: Shots | None = None
    sample: int | None = None
    split: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        parts = {"K": self.shots, "sample": self.sample, "split": self.split, "line": self.line}
        place = [f"{word} {value}" for word, value in parts.items() if value is not None]
        kind = "error" if self.is_error else "note"
        return f"{kind}: {', '.join([self.task, *place])}: {self.what}"


def check_folder(root: Path, tasks: Sequence[Task], folders: Sequence[str]) -> Iterator[Finding]:
    """All that is wrong or worth knowing in a data folder, by task, K, sample and split.

    ``folders`` are noted where they are none of the tasks.
    """
    names = {task.name for task in tasks}
    for folder in folders:
        if folder not in names:
            yield Finding(folder, "no known task, not read; --task_file can add one", False)
    for task in tasks:
        yield from _check_task(root / task.name, task)


def _folders(root: str) -> list[str]:
    """Names of the folders in a data root, sorted; hidden ones are left out."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no folder {root}: give the folder that holds one per task")
    return sorted(p.name for p in Path(root).iterdir() if p.is_dir() and p.name[0] != ".")


def _few_shot_files(folder: Path) -> tuple[list[tuple[Shots, int, str]], list[str]]:
    """K, sample and split of the few-shot files of a task, sorted, and the names of all others."""
    from prompt_lab.data.files import file_name, list_files

    keys = {file_name(folder.name, *key): key for key in list_files(folder)}
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    others = {name for name in names - keys.keys() if not name.endswith("_build.json")}
    return [key for name, key in keys.items() if (folder / name).is_file()], sorted(others)


def _check_task(folder: Path, task: Task) -> Iterator[Finding]:
    if not folder.is_dir():
        yield Finding(task.name, f"no folder {folder}")
        return
    held, others = _few_shot_files(folder)
    form = f"{task.name}_{task.shots or '<K>'}_<sample>_<split>.tsv"
    if others:
        yield Finding(task.name, f"not of the form {form}, not read: {listed(others)}", False)
    found: list[Shots] = list(dict.fromkeys(shots for shots, _, _ in held))
    read = [shots for shots in found if task.shots in (None, shots)]
    if not read:
        yield Finding(task.name, f"no file {form}")
    if len(read) > 1:
        which = "say which with data.shots, or shots in its row"
        yield Finding(task.name, f"files for K = {listed(map(str, read))}: {which}")
    for shots in found:
        if shots in read:
            yield from _check_shots(folder, task, shots, held)
        else:
            what = f"not checked, but K = {task.shots} is; data.shots {shots} reads these"
            yield Finding(task.name, what, False, shots)


def _check_shots(
    folder: Path, task: Task, shots: Shots, held: list[tuple[Shots, int, str]]
) -> Iterator[Finding]:
    from prompt_lab.data.files import SPLITS, file_name, overlaps

    tests: dict[int, list[tuple[str, list[str]]]] = {}
    for sample in sorted({sample for k, sample, _ in held if k == shots}):
        splits: dict[SplitName, Split] = {}
        for split in SPLITS:
            at = partial(Finding, task.name, shots=shots, sample=sample, split=split)
            path = folder / file_name(task.name, shots, sample, split)
            if (shots, sample, split) not in held:
                yield at(f"no file {path.name}")
                continue
            splits[split], findings = _check_rows(path, task, at)
            yield from findings
            if split != "test" and (what := _off_counts(splits[split], task, shots)):
                yield at(what, is_error=False)
        for split, lines, what in overlaps(splits):
            yield Finding(task.name, _counted(what, lines), True, shots, sample, split, lines[0])
        if "test" in splits:
            rows = zip(splits["test"].inputs, splits["test"].references, strict=True)
            if readable := sorted(row for row in rows if row[1]):
                tests[sample] = readable
    first = min(tests, default=0)
    if other := [str(sample) for sample in tests if tests[sample] != tests[first]]:
        what = f"rows differ from those of sample {first} in samples {listed(other)}"
        yield Finding(task.name, what, False, shots, split="test")


def _check_rows(path: Path, task: Task, at: Callable[..., Finding]) -> tuple[Split, list[Finding]]:
    """The rows of a file, without any text where one cannot be read, and findings about them."""
    from prompt_lab.data.files import Split, faults

    rows = [*faults(path.read_bytes(), task)]
    found: dict[str, tuple[str, list[int]]] = {}
    for line, _, what in rows:
        if what:
            found.setdefault(what.partition(":")[0], (what, []))[1].append(line)
    findings = [at(_counted(what, lines), line=lines[0]) for what, lines in found.values()]
    more = [line for line, fields, _ in rows if len(fields) > 2]
    if more and task.labels is not None:
        what = "more than one answer, which a task with labels rarely has"
        findings.append(at(_counted(what, more), is_error=False, line=more[0]))
    inputs = [fields[0] if fields else "" for _, fields, _ in rows]
    return Split(inputs, [fields[1:] for _, fields, _ in rows], path, ""), findings


def _off_counts(split: Split, task: Task, shots: Shots) -> str:
    """Where there are neither K rows of each label nor K in all, or no row of a label."""
    rows = [answers[0] for answers in split.references if answers]
    counts, labels = Counter(rows), task.labels or ()
    if shots in ("all", len(rows)):
        off = [label for label in labels if not counts[label]]
        return f"{len(rows)} rows, none with the label {listed(off)}" if off else ""
    off = [f"{label} {counts[label]}" for label in labels if counts[label] != shots]
    if off:
        return f"{len(rows)} rows, not {shots} of each label: {listed(off)}"
    return "" if labels else f"{len(rows)} rows, not {shots}"


def _counted(what: str, lines: Sequence[int]) -> str:
    return what if len(lines) == 1 else f"{what} ({len(lines)} lines)"
