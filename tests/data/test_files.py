"""Few-shot files: what is read, and what is refused with file, line and reason."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from prompt_lab.data.files import (
    BREAK,
    SPLITS,
    DataError,
    Split,
    faults,
    find_shots,
    list_files,
    overlaps,
    read_split,
    read_task,
)
from prompt_lab.data.tasks import Task, load_tasks

OPEN = Task("my-task_a", "custom", "EM", 16, None)
CLOSED = Task("my-task_a", "custom", "ACC", 16, ("good", "bad"))


def write(root: Path, data: bytes, name: str = "my-task_a_16_13_train.tsv") -> Path:
    """Write one few-shot file of the task."""
    path = root / "my-task_a" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def make_splits(**splits: list[tuple[str, ...]]) -> dict[Any, Split]:
    """Splits in memory; each row is the input and its references."""
    return {
        name: Split([row[0] for row in rows], [list(row[1:]) for row in rows], Path(name), "")
        for name, rows in splits.items()
    }


ROWS = (["a", "b"], [["good"], ["bad"]])


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (b"a\tgood\nb\tbad\n", ROWS),
        (b"a\tgood\nb\tbad", ROWS),
        (b"a\tgood\r\nb\tbad\r\n", ROWS),
        (b"\xef\xbb\xbfa\tgood\nb\tbad\n", ROWS),
        (b" a \t good\nb\tbad \n", ROWS),
        (b'a "b\tgood\n"c" d\tbad\tworse\n', (['a "b', '"c" d'], [["good"], ["bad", "worse"]])),
        (
            "two␤lines\tgood␤news\nb␤\tbad\n".encode(),
            (["two\nlines", "b"], [["good\nnews"], ["bad"]]),
        ),
        *[(f"a{mark}b\tgood\n".encode(), ([f"a{mark}b"], [["good"]])) for mark in "\u2028\x0b\x85"],
    ],
)
def test_rows_are_read_as_they_stand(tmp_path: Path, data: bytes, rows: Any) -> None:
    """Only a line feed ends a row; quotes are text, further columns are references."""
    path = write(tmp_path, data)
    split = read_split(tmp_path, OPEN, 13, "train")
    assert (split.inputs, split.references) == rows
    assert (split.path, split.digest) == (path, hashlib.sha256(data).hexdigest())
    assert len(split) == len(rows[0])


@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        (b"a\tgood\nb\n", 2, "the target column is missing"),
        (b"a\tgood\n\tgood\n", 2, "the input .column 1. is empty"),
        (b"a\tgood\n \tgood\n", 2, "the input .column 1. is empty"),
        (b"a\tgood\nb\t\n", 2, "the target .column 2. is empty"),
        (b"a\t\tgood\n", 1, "the target .column 2. is empty"),
        (b"a\tgood\t\n", 1, "column 3 is empty"),
        (b"a\tgood\t \tbad\n", 1, "column 3 is empty"),
        (b"a\tgood\n\nb\tbad\n", 2, "the line is empty"),
        (b"a\tgood\n\n", 2, "the line is empty"),
        (b"a\tgood\nb\tb\xe9te\n", 2, "byte 0xe9 is not UTF-8"),
        ("a\tgood\n".encode("utf-16"), 1, "byte 0xff is not UTF-8"),
        (b"a\tgood\nb\0\tbad\n", 2, "NUL"),
        (b"a\tgood\rb\tbad\r", 1, "carriage return"),
        (b"", 1, "the file is empty"),
        (b"\xef\xbb\xbf", 1, "the file is empty"),
        (b"\n", 1, "the line is empty"),
        ("␤\tgood\n".encode(), 1, "the input .column 1. is empty"),
        (b"a\tgood\nb\tBad\n", 2, "not a label of my-task_a: 'Bad'; allowed: 'good', 'bad'"),
        (b"a\tbad\tawful\n", 1, "'awful'"),
    ],
)
def test_bad_files_are_refused_with_file_line_and_reason(
    tmp_path: Path, data: bytes, line: int, reason: str
) -> None:
    """The message is `FILE, line N: reason`; columns never shift."""
    path = write(tmp_path, data)
    with pytest.raises(DataError, match=reason) as caught:
        read_split(tmp_path, CLOSED, 13, "train")
    assert str(caught.value).startswith(f"{path}, line {line}: ")


def test_any_k_takes_the_only_one_there_is(tmp_path: Path) -> None:
    """Without `shots`, one K is taken, none and several are errors."""
    task = Task("my-task_a", "custom", "EM", None, None)
    (tmp_path / "my-task_a").mkdir()
    with pytest.raises(FileNotFoundError, match=r"my-task_a_<K>_<sample>_<split>\.tsv"):
        read_split(tmp_path, task, 13, "train")
    path = write(tmp_path, b"a\tgood\n", "my-task_a_8_13_train.tsv")
    assert read_split(tmp_path, task, 13, "train").path == path
    write(tmp_path, b"a\tgood\n", "my-task_a_64_21_dev.tsv")
    with pytest.raises(DataError, match="files for K = 8, 64; say which"):
        read_split(tmp_path, task, 13, "train")


def test_k_may_be_the_word_all(tmp_path: Path) -> None:
    """It is read where the row says it, or where it is the only one; it stands behind numbers."""
    whole = Task("my-task_a", "custom", "EM", "all", None)
    either = Task("my-task_a", "custom", "EM", None, None)
    path = write(tmp_path, b"a\tgood\n", "my-task_a_all_13_train.tsv")
    assert read_split(tmp_path, whole, 13, "train").path == path
    assert read_split(tmp_path, either, 13, "train").path == path
    assert [find_shots(tmp_path, task) for task in (whole, either, OPEN)] == ["all", "all", 16]
    for name in ("my-task_a_100_13_dev.tsv", "my-task_a_16_13_dev.tsv", "my-task_a_any_13_dev.tsv"):
        write(tmp_path, b"a\tgood\n", name)
    assert list_files(path.parent) == [(16, 13, "dev"), (100, 13, "dev"), ("all", 13, "train")]
    with pytest.raises(DataError, match=r"K = 16, 100, all; say which with data\.shots"):
        find_shots(tmp_path, either)


def test_all_faults_of_a_file_are_found() -> None:
    """What stands up to the colon is the kind of a fault; lines keep their numbers."""
    lines = list(faults(b"a\tgood\n\tgood\nb\tBad\nc\tbad\tawful\n", CLOSED))
    assert [(line, fields) for line, fields, _ in lines] == [
        (1, ["a", "good"]),
        (2, []),
        (3, ["b", "Bad"]),
        (4, ["c", "bad", "awful"]),
    ]
    kind = "not a label of my-task_a"
    kinds = [fault.partition(":")[0] for _, _, fault in lines]
    assert kinds == ["", "the input (column 1) is empty", kind, kind]


@pytest.mark.parametrize(
    ("train", "dev", "test", "found"),
    [
        (("a", "x"), ("a", "x"), ("c", "z"), "dev, line 2: .* in train, line 2"),
        (("a", "x"), ("b", "y"), ("a", "x"), "test, line 2: .* in train, line 2"),
        (("a", "x"), ("b", "y"), ("b", "y"), "test, line 2: .* in dev, line 2"),
        (("a", "x", "y"), ("a", "y"), ("c", "z"), "dev, line 2: .* in train, line 2"),
    ],
)
def test_rows_shared_by_splits_are_refused(
    train: tuple[str, ...], dev: tuple[str, ...], test: tuple[str, ...], found: str
) -> None:
    """Reference: rows put in by hand, on line 2 of both files."""
    rows = {"train": train, "dev": dev, "test": test}
    splits = make_splits(**{name: [(name, "own"), row] for name, row in rows.items()})
    ((split, lines, fault),) = overlaps(splits)
    assert re.match(found, f"{split}, line {lines[0]}: {fault}")


def test_rows_that_differ_in_input_or_answer_are_not_shared() -> None:
    """Repeats within a split and one input with two answers are allowed; test may be absent."""
    rows = {"train": [("a", "x"), ("a", "x")], "dev": [("a", "y"), ("b", "x")]}
    assert not list(overlaps(make_splits(**rows, test=[("c", "x")])))
    assert not list(overlaps(make_splits(**rows)))


def test_what_is_missing_is_told_with_what_is_there(tmp_path: Path) -> None:
    """The path that was expected, and every K and sample of the folder."""
    for name in ("16_13_train", "16_100_train", "32_42_dev"):
        write(tmp_path, b"a\tgood\n", f"my-task_a_{name}.tsv")
    with pytest.raises(FileNotFoundError, match=r"no file .*my-task_a_16_21_train\.tsv") as caught:
        read_split(tmp_path, OPEN, 21, "train")
    assert isinstance(caught.value, DataError)
    assert str(caught.value).endswith("K = 16 train: 13, 100; K = 32 dev: 42")
    other = Task("my-task_a", "custom", "EM", 64, None)
    with pytest.raises(FileNotFoundError, match=r"K = 32 dev: 42; data\.shots chooses K$"):
        read_split(tmp_path, other, 13, "train")
    near = Task("my-task-b", "custom", "EM", 64, None)
    with pytest.raises(DataError, match=r"no folder .*my-task-b; the nearest .* my-task_a$"):
        read_split(tmp_path, near, 13, "train")
    with pytest.raises(DataError, match="gone: the data root does not exist"):
        read_split(tmp_path / "gone", OPEN, 13, "train")


def test_three_splits_of_a_sample_are_read_and_checked(tmp_path: Path) -> None:
    """As each alone; files of equal bytes share their rows, but keep their own path."""
    for sample in (13, 42):
        for split in SPLITS:
            name = split if split == "test" else f"{split} {sample}"
            write(tmp_path, f"{name}\tgood\n".encode(), f"my-task_a_16_{sample}_{split}.tsv")
    known: dict[str, Split] = {}
    read = {sample: read_task(tmp_path, CLOSED, sample, known=known) for sample in (42, 13)}
    for sample, splits in read.items():
        assert splits == {name: read_split(tmp_path, CLOSED, sample, name) for name in SPLITS}
    assert read[13]["test"].inputs is read[42]["test"].inputs
    assert read[13]["test"].path != read[42]["test"].path
    write(tmp_path, b"other\tgood\ntest\tgood\n", "my-task_a_16_42_dev.tsv")
    found = r"a_16_42_test\.tsv, line 1: the same row stands in dev, line 2"
    with pytest.raises(DataError, match=found):
        read_task(tmp_path, CLOSED, 42, known=known)
    assert len(read_task(tmp_path, CLOSED, 42, allow_overlap=True)["dev"]) == 2
    write(tmp_path, b"dev 42\tugly\n", "my-task_a_16_42_dev.tsv")
    with pytest.raises(DataError, match=r"42_dev\.tsv, line 1: not a label of my-task_a: 'ugly'"):
        read_task(tmp_path, CLOSED, 42, known=known)


def test_all_real_tasks_load_and_pass_the_checks(test_data: Path) -> None:
    """Reference: the line counts of the files, and the reader of CrossFit up to outer spaces.

    A closed set has no label that the files lack, and no file holds the mark of a line break.
    """
    root, tasks = test_data / "crossfit", load_tasks()
    names = sorted(path.parent.name for path in root.glob("*/*_100_train.tsv"))
    assert names
    for name in names:
        answers, known = set(), {}
        for sample in (100, 13, 21, 42, 87):
            splits = read_task(root, tasks[name], sample, known=known)
            for split in splits.values():
                data = split.path.read_bytes()
                assert len(split) == data.count(b"\n")
                assert BREAK.encode() not in data
                answers |= {row[0] for row in split.references}
        if tasks[name].labels is not None:
            assert answers == set(tasks[name].labels), name
        train = read_split(root, tasks[name], 87, "train")
        rows = [line.strip().split("\t") for line in train.path.open(encoding="utf-8")]
        assert train.inputs == [row[0].strip() for row in rows]
        assert train.references == [[field.strip() for field in row[1:]] for row in rows]
