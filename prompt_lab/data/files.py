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
    """The rows of one few-shot file; row i stands on line i + 1.

    Attributes:
        inputs: Input text of each row.
        references: Accepted answers of each row, at least one; training uses them as targets.
        path: The file.
        digest: SHA-256 of the file's bytes, in hexadecimal.
    """

    inputs: list[str]
    references: list[list[str]]
    path: Path
    digest: str

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.inputs)


def read_task(
    root: str | Path, task: Task, sample: int, allow_overlap: bool = False
) -> dict[SplitName, Split]:
    """Read the three splits of one sample of a task, and check labels and overlap.

    Args:
        root: Data root, the folder that holds one folder per task.
        task: Row of the task table.
        sample: Number of the few-shot sample, as in the file names.
        allow_overlap: Accept rows that stand in two splits.

    Returns:
        The splits under the keys "train", "dev" and "test".

    Raises:
        DataError: A file is missing or bad, has a label outside the task's set, or shares a row
            with another split.
    """
    return read_samples(root, task, [sample], allow_overlap)[sample]


def read_samples(
    root: str | Path, task: Task, samples: Sequence[int], allow_overlap: bool = False
) -> dict[int, dict[SplitName, Split]]:
    """Read several samples of a task as `read_task` does.

    The samples of CrossFit share their test rows: the lines of files that are equal byte by byte
    are cut once, and their rows are the same lists.

    Args:
        root: Data root, the folder that holds one folder per task.
        task: Row of the task table. Where its ``shots`` is None, the only K in the folder is taken.
        samples: Numbers of the few-shot samples.
        allow_overlap: Accept rows that stand in two splits.

    Returns:
        For each sample, the splits under the keys "train", "dev" and "test".

    Raises:
        DataError: As `read_task`.
    """
    shots = find_shots(root, task)
    known: dict[str, Split] = {}
    read: dict[int, dict[SplitName, Split]] = {}
    for sample in samples:
        read[sample] = {
            name: _read_file(_find_file(Path(root), task, shots, sample, name), task, known)
            for name in SPLITS
        }
        if not allow_overlap:
            for name, lines, fault in overlaps(read[sample]):
                raise DataError(f"{read[sample][name].path}, line {min(lines)}: {fault}")
    return read


def read_split(root: str | Path, task: Task, sample: int, split: SplitName) -> Split:
    """Read one few-shot file.

    Args:
        root: Data root, the folder that holds one folder per task.
        task: Row of the task table. Where its ``shots`` is None, the only K in the folder is taken.
        sample: Number of the few-shot sample, as in the file names.
        split: "train", "dev" or "test".

    Returns:
        The rows of the file.

    Raises:
        MissingDataError: File, task folder or root is not there; the message says what is.
        DataError: The file is empty, is not UTF-8, or has a bad row or label.
    """
    return _read_file(_find_file(Path(root), task, find_shots(root, task), sample, split), task, {})


def _read_file(path: Path, task: Task, known: dict[str, Split]) -> Split:
    """Read a file, or take the rows of a known one (by digest) with the same bytes."""
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest in known:
        return replace(known[digest], path=path)
    rows = read_lines(path, data, task)
    known[digest] = Split([row[0] for row in rows], [row[1:] for row in rows], path, digest)
    return known[digest]


def read_lines(path: Path, data: bytes, task: Task | None = None) -> list[list[str]]:
    """The fields of every line of a file, the input first.

    Args:
        path: The file, for messages.
        data: Its bytes.
        task: Whose labels are the only answers, if it has any.

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
        if fault := _fault(whole, fields):
            yield number, [], fault
        else:
            yield number, fields, label_fault(fields[1:], task)


def label_fault(answers: Sequence[str], task: Task | None) -> str:
    """What is wrong with the answers of a row of a task with labels, or an empty text."""
    if task is None or task.labels is None:
        return ""
    wrong = next((answer for answer in answers if answer not in task.labels), None)
    if wrong is None:
        return ""
    allowed = ", ".join(map(repr, task.labels))
    return f"not a label of {task.name}: {wrong!r}; allowed: {allowed}"


def _fault(line: str, fields: list[str]) -> str | None:
    """What is wrong with a line, or None."""
    if "\0" in line:
        return "the line holds a NUL character; remove it"
    if "\r" in line:
        return "a carriage return stands inside the line; end lines with \\n or \\r\\n"
    if all(fields) and len(fields) > 1:
        return None
    if not any(fields):
        return "the line is empty; remove it"
    if len(fields) == 1:
        return "the target column is missing; write the input, a tab, the target"
    if not fields[0]:
        return "the input (column 1) is empty"
    if not fields[1]:
        return "the target (column 2) is empty"
    return f"column {fields.index('') + 1} is empty; remove the tab or write a reference"


def overlaps(splits: Mapping[SplitName, Split]) -> Iterator[tuple[SplitName, list[int], str]]:
    """Rows that stand in two splits of a sample.

    Rows are the same when their inputs are equal and they share a reference. Repeated rows within
    one split are allowed, and so is one input with different answers.

    Yields:
        The second of two splits that share rows, its lines that stand in the first, and what is
        wrong, of the first of them.
    """
    for first, second in combinations(splits, 2):
        if set(splits[first].inputs).isdisjoint(splits[second].inputs):
            continue  # most often so, and much faster to see
        known: dict[tuple[str, str], int] = {}
        for line, row in _rows(splits[first]):
            known.setdefault(row, line)
        shared: dict[int, int] = {}
        for line, row in _rows(splits[second]):
            if row in known:
                shared.setdefault(line, known[row])
        if shared:
            line = min(shared)
            yield (
                second,
                list(shared),
                f"the same row stands in {first}, line {shared[line]}; remove it from one of the "
                "files, or set data.allow_overlap",
            )


def _rows(split: Split) -> Iterator[tuple[int, tuple[str, str]]]:
    """Line, input and reference, for each reference."""
    for line, (text, answers) in enumerate(zip(split.inputs, split.references, strict=True), 1):
        yield from ((line, (text, answer)) for answer in answers)


def find_shots(root: str | Path, task: Task) -> Shots:
    """K of the files that are read of a task.

    Args:
        root: Data root, the folder that holds one folder per task.
        task: Row of the task table.

    Returns:
        The ``shots`` of the row, or the only K in the task's folder where that is None.

    Raises:
        MissingDataError: There is no task folder, or, where it matters, no file in it.
        DataError: The row leaves K open, and the folder holds several.
    """
    folder = Path(root) / task.name
    if not folder.is_dir():
        raise MissingDataError(_describe_missing_folder(Path(root), task.name))
    return _only_shots(folder) if task.shots is None else task.shots


def _find_file(root: Path, task: Task, shots: Shots, sample: int, split: SplitName) -> Path:
    """Path of a few-shot file that exists; otherwise say what is there instead."""
    folder = root / task.name
    path = folder / f"{task.name}_{shots}_{sample}_{split}.tsv"
    if not path.is_file():
        other = [k for k, *_ in list_files(folder)]
        hint = "" if shots in other or not other else "; data.shots chooses K"
        raise MissingDataError(f"no file {path}; {_describe_folder(folder)}{hint}")
    return path


def _only_shots(folder: Path) -> Shots:
    """The one K that the files of a task folder have."""
    found: list[Shots] = list(dict.fromkeys(shots for shots, _, _ in list_files(folder)))
    if not found:
        expected = f"{folder / folder.name}_<K>_<sample>_<split>.tsv"
        raise MissingDataError(f"no file {expected}; {_describe_folder(folder)}")
    if len(found) > 1:
        numbers = ", ".join(map(str, found))
        which = "say which with data.shots, or shots in the row"
        raise DataError(f"{folder} holds files for K = {numbers}; {which}")
    return found[0]


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
    held: dict[tuple[Shots, str], list[str]] = {}
    for shots, sample, split in list_files(folder):
        held.setdefault((shots, split), []).append(str(sample))
    groups = [f"K = {k} {split}: {', '.join(samples)}" for (k, split), samples in held.items()]
    if not groups:
        return f"{folder} holds no files of this form"
    return f"the samples in {folder} are: {'; '.join(groups)}"


def _describe_missing_folder(root: Path, name: str) -> str:
    """Say that a task folder is missing, and which folders come nearest."""
    if not root.is_dir():
        return f"no folder {root}: the data root does not exist (looked for {root / name})"
    held = sorted(path.name for path in root.iterdir() if path.is_dir())
    near = ", ".join(difflib.get_close_matches(name, held, n=3, cutoff=0.4))
    hint = f"the nearest names there are {near}" if near else "no name there is near to it"
    return f"no folder {root / name}; {hint}"
