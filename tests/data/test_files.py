"""Few-shot files: what is read, and what is refused with file, line and reason."""

from __future__ import annotations

import hashlib
import os
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
    read_samples,
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


def real_root() -> Path:
    """The few-shot folders of the test data."""
    data = os.environ.get("PROMPT_LAB_TEST_DATA")
    if not data:
        pytest.skip("PROMPT_LAB_TEST_DATA is not set")
    return Path(data, "crossfit")


def test_rows_are_read_as_they_stand(tmp_path: Path) -> None:
    """Quotes are text, further columns are references, no line is a header."""
    data = b'a "b\tgood\n"c" d\tbad\tworse\n'
    path = write(tmp_path, data)
    split = read_split(tmp_path, OPEN, 13, "train")
    assert split.inputs == ['a "b', '"c" d']
    assert split.references == [["good"], ["bad", "worse"]]
    assert len(split) == 2
    assert split.path == path
    assert split.digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "data",
    [
        b"a\tgood\nb\tbad\n",
        b"a\tgood\nb\tbad",
        b"a\tgood\r\nb\tbad\r\n",
        b"\xef\xbb\xbfa\tgood\nb\tbad\n",
        b" a \t good\nb\tbad \n",
    ],
    ids=["plain", "no-last-line-end", "crlf", "byte-order-mark", "spaces"],
)
def test_line_ends_marks_and_outer_spaces_change_nothing(tmp_path: Path, data: bytes) -> None:
    """Reference: the rows of the plain file."""
    write(tmp_path, data)
    split = read_split(tmp_path, OPEN, 13, "train")
    assert (split.inputs, split.references) == (["a", "b"], [["good"], ["bad"]])


def test_a_line_break_within_a_field_is_a_mark(tmp_path: Path) -> None:
    write(tmp_path, "two␤lines\tgood␤news\nb␤\tbad\n".encode())
    split = read_split(tmp_path, OPEN, 13, "train")
    assert (split.inputs, split.references) == (["two\nlines", "b"], [["good\nnews"], ["bad"]])
    write(tmp_path, "␤\tgood\n".encode())
    with pytest.raises(DataError, match=r"the input \(column 1\) is empty"):
        read_split(tmp_path, OPEN, 13, "train")


def test_no_file_of_crossfit_holds_the_mark(test_data: Path) -> None:
    files = [*(test_data / "crossfit").rglob("*.tsv")]
    assert len(files) > 1000
    assert not [file for file in files if BREAK.encode() in file.read_bytes()]


@pytest.mark.parametrize("mark", ["\u2028", "\x0b", "\x0c", "\x85", "\x1c"])
def test_unicode_line_breaks_do_not_cut_rows(tmp_path: Path, mark: str) -> None:
    """Only a line feed ends a row; `str.splitlines` would cut here."""
    write(tmp_path, f"a{mark}b\tgood\n".encode())
    assert read_split(tmp_path, OPEN, 13, "train").inputs == [f"a{mark}b"]


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
    ],
)
def test_bad_files_are_refused_with_file_line_and_reason(
    tmp_path: Path, data: bytes, line: int, reason: str
) -> None:
    """The message is `FILE, line N: reason`; columns never shift."""
    path = write(tmp_path, data)
    with pytest.raises(DataError, match=reason) as caught:
        read_split(tmp_path, OPEN, 13, "train")
    assert str(caught.value).startswith(f"{path}, line {line}: ")


def test_missing_file_names_the_samples_there_are(tmp_path: Path) -> None:
    """The path that was expected, and every K and sample of the folder."""
    write(tmp_path, b"a\tgood\n", "my-task_a_16_13_train.tsv")
    write(tmp_path, b"a\tgood\n", "my-task_a_16_100_train.tsv")
    write(tmp_path, b"a\tgood\n", "my-task_a_32_42_dev.tsv")
    with pytest.raises(FileNotFoundError, match=r"no file .*my-task_a_16_21_train\.tsv") as caught:
        read_split(tmp_path, OPEN, 21, "train")
    assert isinstance(caught.value, DataError)
    assert str(caught.value).endswith("K = 16 train: 13, 100; K = 32 dev: 42")


def test_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    """A misspelt folder is found, a missing root is named."""
    (tmp_path / "my-task-a").mkdir()
    with pytest.raises(DataError, match=r"no folder .*my-task_a; the nearest .* my-task-a$"):
        read_split(tmp_path, OPEN, 13, "train")
    with pytest.raises(DataError, match="gone: the data root does not exist"):
        read_split(tmp_path / "gone", OPEN, 13, "train")


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


def test_files_of_another_k_are_pointed_at(tmp_path: Path) -> None:
    """The setting that reads them is named where there are none of the K that was asked for."""
    write(tmp_path, b"a\tgood\n", "my-task_a_64_13_train.tsv")
    with pytest.raises(FileNotFoundError, match=r"K = 64 train: 13; data\.shots chooses K$"):
        read_split(tmp_path, OPEN, 13, "train")


def test_labels_outside_the_set_are_refused(tmp_path: Path) -> None:
    """Letter case counts; the message names file, line, label and what is allowed."""
    write(tmp_path, b"a\tgood\nb\tBad\n")
    assert len(read_split(tmp_path, OPEN, 13, "train")) == 2
    found = r"train\.tsv, line 2: not a label of my-task_a: 'Bad'; allowed: 'good', 'bad'"
    with pytest.raises(DataError, match=found):
        read_split(tmp_path, CLOSED, 13, "train")
    write(tmp_path, b"a\tbad\tawful\n")
    with pytest.raises(DataError, match=r"line 1: .*'awful'"):
        read_split(tmp_path, CLOSED, 13, "train")


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


def test_read_task_reads_and_checks_three_splits(tmp_path: Path) -> None:
    """Both checks are run on what was read."""
    for number, split in enumerate(SPLITS):
        write(tmp_path, b"row %d\tgood\n" % number, f"my-task_a_16_13_{split}.tsv")
    splits = read_task(tmp_path, CLOSED, 13)
    assert {name: split.inputs for name, split in splits.items()} == {
        "train": ["row 0"],
        "dev": ["row 1"],
        "test": ["row 2"],
    }
    path = write(tmp_path, b"row 0\tgood\n", "my-task_a_16_13_test.tsv")
    with pytest.raises(DataError, match=r"test\.tsv, line 1: the same row stands in train, line 1"):
        read_task(tmp_path, CLOSED, 13)
    path.write_bytes(b"row 2\tugly\n")
    with pytest.raises(DataError, match="not a label of my-task_a: 'ugly'"):
        read_task(tmp_path, CLOSED, 13)


def test_samples_are_read_as_each_would_be_alone(tmp_path: Path) -> None:
    """Reference: `read_split`. Files of equal bytes share their rows, but keep their own path."""
    for sample in (13, 42):
        for split in SPLITS:
            name = split if split == "test" else f"{split} {sample}"
            write(tmp_path, f"{name}\tgood\n".encode(), f"my-task_a_16_{sample}_{split}.tsv")
    read = read_samples(tmp_path, CLOSED, [42, 13])
    assert list(read) == [42, 13]
    for sample, splits in read.items():
        assert splits == {name: read_split(tmp_path, CLOSED, sample, name) for name in SPLITS}
    assert read[13]["test"].inputs is read[42]["test"].inputs
    assert read[13]["test"].references is read[42]["test"].references


def test_every_sample_is_checked_against_the_test_rows_it_shares(tmp_path: Path) -> None:
    """The message names the files of the sample at fault."""
    for sample in (13, 42):
        for split in SPLITS:
            name = split if split == "test" else f"{split} {sample}"
            write(tmp_path, f"{name}\tgood\n".encode(), f"my-task_a_16_{sample}_{split}.tsv")
    write(tmp_path, b"other\tgood\ntest\tgood\n", "my-task_a_16_42_dev.tsv")
    found = r"a_16_42_test\.tsv, line 1: the same row stands in dev, line 2"
    with pytest.raises(DataError, match=found):
        read_samples(tmp_path, CLOSED, [13, 42])
    assert len(read_samples(tmp_path, CLOSED, [13, 42], allow_overlap=True)) == 2
    write(tmp_path, b"dev 42\tugly\n", "my-task_a_16_42_dev.tsv")
    with pytest.raises(DataError, match=r"42_dev\.tsv, line 1: not a label of my-task_a: 'ugly'"):
        read_samples(tmp_path, CLOSED, [13, 42])


def test_all_real_tasks_load_and_pass_the_checks() -> None:
    """Reference: the line counts of the files, and the reader of CrossFit up to outer spaces."""
    root, tasks = real_root(), load_tasks()
    names = sorted(path.parent.name for path in root.glob("*/*_100_train.tsv"))
    assert names
    for name in names:
        for sample in (100, 13, 21, 42, 87):
            splits = read_task(root, tasks[name], sample)
            assert all(len(s) == s.path.read_bytes().count(b"\n") for s in splits.values())
        train = read_split(root, tasks[name], 87, "train")
        rows = [line.strip().split("\t") for line in train.path.open(encoding="utf-8")]
        assert train.inputs == [row[0].strip() for row in rows]
        assert train.references == [[field.strip() for field in row[1:]] for row in rows]


def test_a_closed_set_has_no_label_that_real_files_lack() -> None:
    """Reference: the union of the answers over all files of a task."""
    root = real_root()
    for task in load_tasks().values():
        if task.labels is None or not (root / task.name).is_dir():
            continue
        lines = [
            line
            for path in (root / task.name).glob("*.tsv")
            for line in path.read_text(encoding="utf-8").split("\n")
            if line
        ]
        assert {line.split("\t")[1] for line in lines} == set(task.labels), task.name
