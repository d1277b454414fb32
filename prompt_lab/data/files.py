r"""Few-shot files: strict reading, with errors that say file, line and reason.

A file is ``<root>/<task>/<task>_<K>_<sample>_<split>.tsv``: UTF-8, no header, no quoting, one row a
line, the input in the first column and one or more references in the others. K is a number, or
``all`` where train and dev hold a whole data set. Lines end in ``\n`` or ``\r\n``, and a
byte-order mark at the start is dropped. Spaces around a field are dropped too, so that an answer
can equal its reference. No field may be empty: the reader of the CrossFit gym strips the whole line
before it splits it, which shifts the columns of such rows; here they are errors. A line break
within a field is written as ``BREAK``, which no file of CrossFit's holds.

Files are neither downloaded nor written here, and rows are not tokenised.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

from prompt_lab.data.tasks import Shots, Task

SplitName = Literal["train", "dev", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")

BREAK = "␤"
"""What stands for a line break within a field: U+2424, the symbol for newline."""


class DataError(ValueError):
    """A few-shot file that cannot be used; the message says which one, where and why."""


class MissingDataError(DataError, FileNotFoundError):
    """A few-shot file, its folder or the data root is not there."""


@dataclass(frozen=True)
class Split:
    """The rows of one few-shot file; row i stands on line i + 1."""

    inputs: list[str]
    references: list[list[str]]  # accepted answers of each row, at least one
    path: Path
    digest: str  # SHA-256 of the file's bytes, in hexadecimal

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.inputs)


def read_task(
    root: str | Path,
    task: Task,
    sample: int,
    allow_overlap: bool = False,
    known: dict[str, Split] | None = None,
) -> dict[SplitName, Split]:
    """Read the three splits of one sample of a task, and check labels and overlap.

    Args:
        root: Data root, the folder that holds one folder per task.
        task: Row of the task table. Where its ``shots`` is None, the only K in the folder is taken.
        sample: Number of the few-shot sample, as in the file names.
        allow_overlap: Accept rows that stand in two splits.
        known: Files that were read, by digest, to be filled: rows of equal files are shared, as the
            samples of CrossFit share their test rows.

    Raises:
        MissingDataError: File, task folder or root is not there; the message says what is.
        DataError: A file is empty or not UTF-8, has a bad row or a label outside the task's set, or
            shares a row with another split.
    """
    splits: dict[SplitName, Split] = {
        name: read_split(root, task, sample, name, known) for name in SPLITS
    }
    for name, lines, fault in () if allow_overlap else overlaps(splits):
        raise DataError(f"{splits[name].path}, line {min(lines)}: {fault}")
    return splits


def read_split(
    root: str | Path,
    task: Task,
    sample: int,
    split: SplitName,
    known: dict[str, Split] | None = None,
) -> Split:
    """Read one few-shot file; arguments and errors as of `read_task`."""
    folder, shots = Path(root) / task.name, find_shots(root, task)
    path = folder / file_name(task.name, shots, sample, split)
    if not path.is_file():
        other = {k for k, *_ in list_files(folder)}
        hint = "; data.shots chooses K" if other and shots not in other else ""
        raise MissingDataError(f"no file {path}; {_describe_folder(folder)}{hint}")
    data = path.read_bytes()
    digest, known = hashlib.sha256(data).hexdigest(), {} if known is None else known
    if digest in known:
        return replace(known[digest], path=path)
    rows = read_lines(path, data, task)
    known[digest] = Split([row[0] for row in rows], [row[1:] for row in rows], path, digest)
    return known[digest]


def read_lines(path: Path, data: bytes, task: Task | None = None) -> list[list[str]]:
    """The fields of every line of a file, the input first.

    Raises:
        DataError: The first of its `faults`; the message names file and line.
    """
    rows = []
    for line, fields, fault in faults(data, task):
        if fault:
            raise DataError(f"{path}, line {line}: {fault}")
        rows.append(fields)
    return rows


def faults(data: bytes, task: Task | None = None) -> Iterator[tuple[int, list[str], str]]:
    """All lines of a file, and what is wrong with each.

    Lines are cut at line feeds only; other Unicode line breaks are text.

    Args:
        data: Bytes of the file.
        task: Whose labels are the only answers, if it has any.

    Yields:
        Number of the line, from 1; its fields, the input first, or none where it cannot be cut;
        what is wrong, or an empty text. Faults of one kind are alike up to a colon.
    """
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield line, [], f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        return
    if not text:
        yield 1, [], "the file is empty"
        return
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        whole = line.removesuffix("\r")
        fields = [field.replace(BREAK, "\n").strip() for field in whole.split("\t")]
        if "\0" in line:
            yield number, [], "the line holds a NUL character; remove it"
        elif "\r" in whole:
            fault = "a carriage return stands inside the line; end lines with \\n or \\r\\n"
            yield number, [], fault
        elif all(fields) and len(fields) > 1:
            yield number, fields, label_fault(fields[1:], task)
        elif not any(fields):
            yield number, [], "the line is empty; remove it"
        elif len(fields) == 1:
            yield number, [], "the target column is missing; write the input, a tab, the target"
        else:
            at = fields.index("")
            last = f"column {at + 1} is empty; remove the tab or write a reference"
            names = ("the input (column 1) is empty", "the target (column 2) is empty", last)
            yield number, [], names[min(at, 2)]


def label_fault(answers: Sequence[str], task: Task | None) -> str:
    """What is wrong with the answers of a row of a task with labels, or an empty text."""
    labels = None if task is None else task.labels
    if task is None or labels is None or all(answer in labels for answer in answers):
        return ""
    wrong = next(answer for answer in answers if answer not in labels)
    return f"not a label of {task.name}: {wrong!r}; allowed: {', '.join(map(repr, labels))}"


def overlaps(splits: Mapping[SplitName, Split]) -> Iterator[tuple[SplitName, list[int], str]]:
    """Rows that stand in two splits of a sample.

    Rows are the same when their inputs are equal and they share a reference. Repeated rows within
    one split are allowed, and so is one input with different answers.

    Yields:
        The second of two splits that share rows, its lines that stand in the first, and what is
        wrong, of the first of them.
    """

    def rows(split: Split) -> Iterator[tuple[int, tuple[str, str]]]:
        both = zip(split.inputs, split.references, strict=True)
        return ((n, (text, one)) for n, (text, own) in enumerate(both, 1) for one in own)

    for first, second in combinations(splits, 2):
        if set(splits[first].inputs).isdisjoint(splits[second].inputs):
            continue  # most often so, and much faster to see
        known: dict[tuple[str, str], int] = {}
        for line, row in rows(splits[first]):
            known.setdefault(row, line)
        shared: dict[int, int] = {}
        for line, row in rows(splits[second]):
            if row in known:
                shared.setdefault(line, known[row])
        if shared:
            yield (
                second,
                list(shared),
                f"the same row stands in {first}, line {shared[min(shared)]}; remove it from one "
                "of the files, or set data.allow_overlap",
            )


def find_shots(root: str | Path, task: Task) -> Shots:
    """K of the files that are read of a task: its row's, or the only one in the task's folder.

    Raises:
        MissingDataError: There is no task folder, or, where it matters, no file in it.
        DataError: The row leaves K open, and the folder holds several.
    """
    root, folder = Path(root), Path(root) / task.name
    if not root.is_dir():
        raise MissingDataError(
            f"no folder {root}: the data root does not exist (looked for {folder})"
        )
    if not folder.is_dir():
        held = sorted(path.name for path in root.iterdir() if path.is_dir())
        near = ", ".join(difflib.get_close_matches(task.name, held, n=3, cutoff=0.4))
        hint = f"the nearest names there are {near}" if near else "no name there is near to it"
        raise MissingDataError(f"no folder {folder}; {hint}")
    if task.shots is not None:
        return task.shots
    found: list[Shots] = list(dict.fromkeys(shots for shots, *_ in list_files(folder)))
    if not found:
        expected = folder / file_name(task.name, "<K>", "<sample>", "<split>")
        raise MissingDataError(f"no file {expected}; {_describe_folder(folder)}")
    if len(found) > 1:
        numbers = ", ".join(map(str, found))
        which = "say which with data.shots, or shots in the row"
        raise DataError(f"{folder} holds files for K = {numbers}; {which}")
    return found[0]


def file_name(task: str, shots: Shots | str, sample: int | str, split: str) -> str:
    """Name of a few-shot file."""
    return f"{task}_{shots}_{sample}_{split}.tsv"


def list_files(folder: Path) -> list[tuple[Shots, int, str]]:
    """K, sample and split of every few-shot file in a task folder, sorted; K "all" stands last."""
    name = re.compile(re.escape(folder.name) + r"_([0-9]+|all)_([0-9]+)_(train|dev|test)\.tsv")
    matches = [name.fullmatch(path.name) for path in folder.iterdir()]
    files: list[tuple[Shots, int, str]] = [
        ("all" if m[1] == "all" else int(m[1]), int(m[2]), m[3]) for m in matches if m
    ]
    return sorted(files, key=lambda file: (math.inf if file[0] == "all" else file[0], *file[1:]))


def _describe_folder(folder: Path) -> str:
    """List the samples of each K and split that a task folder holds."""
    held: dict[str, list[str]] = {}
    for shots, sample, split in list_files(folder):
        held.setdefault(f"K = {shots} {split}", []).append(str(sample))
    if not held:
        return f"{folder} holds no files of this form"
    groups = "; ".join(f"{name}: {', '.join(samples)}" for name, samples in held.items())
    return f"the samples in {folder} are: {groups}"
