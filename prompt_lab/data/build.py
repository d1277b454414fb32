"""Build the few-shot files of one task from the rows of its data set.

Rows become lines (`prompt_lab.data.templates`), lines become splits (`prompt_lab.data.few_shot`).
Where CrossFit published the MD5 digest of a file, the new one is compared with it. Beside the files
stands ``<task>_<K>_build.json``: settings, digests, and what to know; it is written last, so that a
task without it is not finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from prompt_lab import __version__
from prompt_lab.data import few_shot
from prompt_lab.data.files import (
    BREAK,
    SPLITS,
    DataError,
    MissingDataError,
    file_name,
    read_lines,
)
from prompt_lab.data.sources import HUB, read_rows
from prompt_lab.data.tasks import Shots, Task, load_tasks
from prompt_lab.data.templates import Line, make_lines
from prompt_lab.files.tensors import write_atomically

Sampling = Literal["crossfit", "stratified"]

SAMPLES = (100, 13, 21, 42, 87)
"""The samples that CrossFit has of every task."""

STRATIFIED_DEV_ROWS = 250
"""Dev rows beside a stratified sample of any size (Belanec et al. 2024, section 4.3)."""

_BREAKS = str.maketrans(dict.fromkeys("\t\n\r\0", " "))
"""What would break the lines or columns of a file, and the space it becomes; see `_encode`."""

_PUBLISHED = Path(__file__).with_name("crossfit_md5.tsv")


@dataclass
class Built:
    """What is known of a task's files for one K."""

    task: str
    shots: Shots
    sampling: Sampling  # how train and dev were drawn
    apart_from: dict[str, list[int]] = field(default_factory=dict)  # by sample: not drawn again
    source: dict[str, Any] = field(default_factory=dict)  # the task's templates, splits and labels
    files: dict[str, str] = field(default_factory=dict)  # MD5 digest of each file, by its name
    notes: list[str] = field(default_factory=list)  # what to know, such as rows that were left out
    version: str = __version__
    is_new: bool = True  # whether the files were made now, or were there

    @property
    def published(self) -> dict[str, bool]:
        """Files whose digest CrossFit published, and whether it is theirs."""
        known = published_digests()
        return {name: known[name] == own for name, own in self.files.items() if name in known}

    def has(self, other: Built, folder: Path, samples: Sequence[int]) -> bool:
        """Whether these files, as they lie in the folder, are those of the other's samples."""
        names = [file_name(other.task, other.shots, s, split) for s in samples for split in SPLITS]
        return (
            self.source == other.source
            and all(self.apart_from.get(str(s)) == other.apart_from.get(str(s)) for s in samples)
            and all(_digest(folder / name) == self.files.get(name, "") for name in names)
        )


def build_task(
    task: Task,
    out: str | Path,
    source: str = HUB,
    shots: Shots | None = None,
    samples: Sequence[int] = SAMPLES,
    sampling_law: Sampling = "crossfit",
    apart_from: Sequence[int] = (),
    overwrite: bool = False,
    has_lines: bool = False,
) -> Built:
    """Make the files of a task, if they are not there yet.

    Args:
        task: Row of the task table, with a source.
        out: Data root; the files go to ``<out>/<task>``.
        source: "hub" or a folder, as for `prompt_lab.data.sources.read_rows`.
        shots: K; None for the table's. "all" takes the whole pool.
        samples: Numbers of the samples, which seed their shuffles.
        sampling_law: "crossfit", K rows per label or per set; or "stratified", K rows in all with
            the labels' shares.
        apart_from: Samples whose train and dev rows, of the same K, are not drawn again. So two
            samples share their test rows only: unseen data for what was learnt on the other.
        overwrite: Replace files that were built with other settings.
        has_lines: The source is a folder with ``<task>/train.tsv``, ``test.tsv`` and perhaps
            ``dev.tsv``, whose lines have the gym's form: no header, input, tab, answers. Train and
            dev are drawn from the first and last together.

    Raises:
        DataError: No source, rows that do not fit the table, a label without any row, or files of
            other settings; in one line. No file has then been written or changed.
        OSError: The folder cannot be written to.
    """
    if task.source is None and not has_lines:
        raise DataError(
            f"{task.name}: its row does not say what it is made from (train, input ...)"
        )
    shots = task.shots if shots is None else shots
    if shots is None:
        raise DataError(f"{task.name}: its row has no shots, say how many rows to draw")
    folder = Path(out) / task.name
    record = folder / f"{task.name}_{shots}_build.json"
    apart = {str(sample): sorted(apart_from) for sample in samples if apart_from}
    built = Built(task.name, shots, sampling_law, apart, {} if has_lines else _made_from(task))
    earlier = None
    with suppress(FileNotFoundError, NotADirectoryError, TypeError, ValueError):  # none to be read
        earlier = Built(**json.loads(record.read_text(encoding="utf-8")), is_new=False)
    if earlier is not None and not overwrite:
        if earlier.sampling != sampling_law:
            raise DataError(
                f"{folder} has files for K = {shots} with {earlier.sampling} sampling: give "
                "another out, or overwrite"
            )
        if earlier.has(built, folder, samples):
            return earlier
    pool, test = _read_lines(task, source) if has_lines else _make_lines(task, source)
    contents = _contents(task, pool, test, built, apart_from, samples, has_lines)
    for name, content in contents.items():
        built.files[name] = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if _digest(folder / name) not in (None, built.files[name]) and not overwrite:
            raise DataError(
                f"{folder / name} has other rows than would be built now: give another out, or "
                "overwrite"
            )
    for name, content in contents.items():
        write_atomically(folder / name, content)
    if earlier is not None and earlier.source == built.source:  # its other samples stay
        built.files = earlier.files | built.files
        built.apart_from = earlier.apart_from | built.apart_from
        built.notes = list(dict.fromkeys([*earlier.notes, *built.notes]))
    held = {key: value for key, value in asdict(built).items() if key != "is_new"}
    write_atomically(record, json.dumps(held, indent=1, ensure_ascii=False).encode() + b"\n")
    return built


@cache
def published_digests() -> dict[str, str]:
    """The MD5 digests that CrossFit publishes: file name to digest, 2400 of them."""
    rows = [line.split("\t") for line in _PUBLISHED.read_text(encoding="utf-8").splitlines()]
    columns, digests = rows[0][2:], {}
    for task_and_shots, test, *others in rows[1:]:
        digests |= {f"{task_and_shots}_{sample}_test.tsv": test for sample in SAMPLES}
        pairs = zip(columns, others, strict=True)
        digests |= {f"{task_and_shots}_{column}.tsv": digest for column, digest in pairs}
    return digests


def _made_from(task: Task) -> dict[str, Any]:
    """What the row of a task says of its files, as JSON has it."""
    assert task.source is not None
    held = {**asdict(task.source), "labels": task.labels}
    return json.loads(json.dumps({key: value for key, value in held.items() if value is not None}))


def _make_lines(task: Task, source: str) -> tuple[list[Line], list[Line]]:
    """The lines that train and dev are drawn from, and those of test, by the task's templates."""
    origin = task.source
    assert origin is not None
    lines = {
        split: list(make_lines(read_rows(task, split, source), task))
        for split in dict.fromkeys((origin.train, origin.test))
    }
    return (
        few_shot.take_part(lines[origin.train], origin.train_part),
        few_shot.take_part(lines[origin.test], origin.test_part),
    )


def _read_lines(task: Task, source: str) -> tuple[list[Line], list[Line]]:
    """The lines of whole sets in the gym's form: train and dev together, and test."""
    held: dict[str, list[Line]] = {"dev": []}
    for split in SPLITS:
        path = Path(source) / task.name / f"{split}.tsv"
        if path.is_file():
            held[split] = [tuple(fields) for fields in read_lines(path, path.read_bytes())]
        elif split != "dev":
            raise MissingDataError(
                f"no file {path}: finished lines stand in <source>/<task>/train.tsv, test.tsv and, "
                "if you like, dev.tsv"
            )
    return held["train"] + held["dev"], held["test"]


def _contents(
    task: Task,
    pool: Sequence[Line],
    test: Sequence[Line],
    built: Built,
    apart_from: Sequence[int],
    samples: Sequence[int],
    has_lines: bool,
) -> dict[str, bytes]:
    """Content of every file by its name; what to know of them goes to the notes of ``built``."""
    split = task.source.train if task.source else "train"
    for lines, where in ((pool, f"split {split}"), (test, "the test part")):
        if not lines:
            raise DataError(f"{task.name}: {where} has no rows")
    labels = (task.labels or ()) if task.kind == "classification" else ()
    held = {line[1] for line in pool}
    if empty := [label for label in labels if label not in held]:
        raise DataError(
            f"{task.name}: no row to draw from has the label {', '.join(empty)}; the "
            f"{len(pool)} rows have {', '.join(sorted(held))}"
        )
    if apart_from:
        drawn = [_draw(pool, task, built, sample) for sample in apart_from]
        seen = {row for both in drawn for rows in both for row in rows}
        pool = [line for row, line in enumerate(pool) if row not in seen]
    keeps_breaks = has_lines or task.name not in load_tasks()
    test_bytes, contents = _encode(test, "test", built.notes, keeps_breaks), {}
    for sample in samples:
        drawn = _draw(pool, task, built, sample)
        for split, numbers in zip(SPLITS, drawn, strict=False):
            if not numbers:
                raise DataError(f"{task.name}: the rows do not suffice for {split} of {sample}")
            own, where = [pool[number] for number in numbers], f"{sample} {split}"
            held = {line[1] for line in own}
            if split == "train" and (lost := [label for label in labels if label not in held]):
                built.notes.append(f"{where}: no row has the label {', '.join(lost)}")
            name = file_name(task.name, built.shots, sample, split)
            contents[name] = _encode(own, where, built.notes, keeps_breaks)
        contents[file_name(task.name, built.shots, sample, "test")] = test_bytes
    return contents


def _draw(
    lines: Sequence[Line], task: Task, built: Built, sample: int
) -> tuple[list[int], list[int]]:
    labels = [line[1:] if task.kind == "classification" else () for line in lines]
    if built.shots == "all":
        return few_shot.draw_all(labels, sample)
    if built.sampling == "stratified":
        return few_shot.draw_stratified(labels, built.shots, STRATIFIED_DEV_ROWS, sample)
    return few_shot.draw_few_shot(labels, built.shots, sample)


def _encode(lines: Sequence[Line], where: str, notes: list[str], keeps_breaks: bool) -> bytes:
    """The bytes of a file; rows with an empty field go.

    Line breaks inside a field become spaces, as CrossFit has them, or are kept as ``BREAK``.
    """
    kept, broken, empty = [], 0, 0
    for line in lines:
        whole = list(line)
        if keeps_breaks:
            whole = [text.strip().replace("\r\n", "\n").replace("\n", BREAK) for text in line]
        tidy = [text.translate(_BREAKS) for text in whole]
        broken += tidy != whole
        if all(text.strip() for text in tidy):
            kept.append("\t".join(tidy) + "\n")
        else:
            empty += 1
    if broken:
        notes.append(f"{where}: tabs or line breaks in {broken} rows became spaces")
    if empty:
        notes.append(f"{where}: {empty} rows with an empty input or answer were left out")
    return "".join(kept).encode()


def _digest(path: Path) -> str | None:
    try:
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None
