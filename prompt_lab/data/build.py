"""Build the few-shot files of one task from the rows of its data set.

Rows become lines (`prompt_lab.data.templates`), lines become splits (`prompt_lab.data.few_shot`),
and each file is written whole or not at all. Lines that are there already, as whole sets in the
gym's form, are drawn from without templates. Where CrossFit published the MD5 digest of a file, the
new one is compared with it. Beside the files stands ``<task>_<K>_build.json``: settings, digests,
and what to know; it is written last, so that a task without it is not finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from prompt_lab import __version__
from prompt_lab.data import few_shot
from prompt_lab.data.files import BREAK, SPLITS, DataError, MissingDataError, read_lines
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
    """What is known of a task's files for one K.

    Attributes:
        task: Name of the task.
        shots: K.
        sampling: How train and dev were drawn.
        apart_from: By sample, the samples whose train and dev rows were not drawn again, if any.
        files: MD5 digest of each file, by its name.
        notes: What to know of them, such as rows that were left out.
        version: Version of the package.
        is_new: Whether the files were made now, or were there.
    """

    task: str
    shots: Shots
    sampling: Sampling
    apart_from: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    version: str = __version__
    is_new: bool = True

    @property
    def published(self) -> dict[str, bool]:
        """Files whose digest CrossFit published, and whether it is theirs."""
        known = published_digests()
        return {name: known[name] == own for name, own in self.files.items() if name in known}


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
    earlier = _read_record(record)
    numbers = [str(sample) for sample in samples]
    apart = dict.fromkeys(numbers, sorted(apart_from)) if apart_from else {}
    wanted = [_file_name(task, shots, sample, split) for sample in samples for split in SPLITS]
    if earlier is not None and not overwrite:
        if earlier.sampling != sampling_law:
            raise DataError(
                f"{folder} has files for K = {shots} with {earlier.sampling} sampling: give "
                "another out, or overwrite"
            )
        is_same = all(earlier.apart_from.get(sample) == apart.get(sample) for sample in numbers)
        if is_same and all(
            _digest(folder / name) == earlier.files.get(name, "") for name in wanted
        ):
            earlier.is_new = False
            return earlier
    built = Built(task.name, shots, sampling_law, apart)
    pool, test = _read_lines(task, source) if has_lines else _pool_and_test(task, source)
    keeps_breaks = has_lines or task.name not in load_tasks()
    contents = dict(_contents(task, pool, test, built, samples, apart_from, keeps_breaks))
    _write(folder, contents, built, earlier, overwrite)
    record_bytes = json.dumps(_as_record(built), indent=1, ensure_ascii=False).encode()
    write_atomically(record, record_bytes + b"\n")
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


def _contents(
    task: Task,
    pool: Sequence[Line],
    test: Sequence[Line],
    built: Built,
    samples: Sequence[int],
    apart_from: Sequence[int],
    keeps_breaks: bool,
) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file; what to know of them goes to the notes of ``built``."""
    _check_rows(task, pool, test)
    draw = _drawer([line[1:] for line in pool], task, built.shots, built.sampling)
    if apart_from:
        seen = {row for sample in apart_from for rows in draw(sample) for row in rows}
        pool = [line for row, line in enumerate(pool) if row not in seen]
        draw = _drawer([line[1:] for line in pool], task, built.shots, built.sampling)
    test_bytes = _encode(test, "test", built.notes, keeps_breaks)
    for sample in samples:
        for split, numbers in zip(("train", "dev"), draw(sample), strict=True):
            if not numbers:
                raise DataError(f"{task.name}: the rows do not suffice for {split} of {sample}")
            where = f"{sample} {split}"
            drawn = [pool[number] for number in numbers]
            if split == "train":
                built.notes += _without_rows(task, drawn, where)
            content = _encode(drawn, where, built.notes, keeps_breaks)
            yield _file_name(task, built.shots, sample, split), content
        yield _file_name(task, built.shots, sample, "test"), test_bytes


def _check_rows(task: Task, pool: Sequence[Line], test: Sequence[Line]) -> None:
    """Refuse a part without rows, and a label without a row to draw."""
    split = "train" if task.source is None else task.source.train
    for lines, where in ((pool, f"split {split}"), (test, "the test part")):
        if not lines:
            raise DataError(f"{task.name}: {where} has no rows")
    if task.kind != "classification" or not task.labels:
        return
    held = {line[1] for line in pool}
    empty = [label for label in task.labels if label not in held]
    if empty:
        raise DataError(
            f"{task.name}: no row to draw from has the label {', '.join(empty)}; the "
            f"{len(pool)} rows have {', '.join(sorted(held))}"
        )


def _without_rows(task: Task, train: Sequence[Line], where: str) -> list[str]:
    """A note on labels that a stratified draw left without a training row, if there are any."""
    held = {line[1] for line in train}
    known = task.labels if task.kind == "classification" else None
    lost = [label for label in known or () if label not in held]
    return [f"{where}: no row has the label {', '.join(lost)}"] if lost else []


def _pool_and_test(task: Task, source: str) -> tuple[list[Line], list[Line]]:
    """The lines that train and dev are drawn from, and those of test."""
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
    folder = Path(source) / task.name
    held: dict[str, list[Line]] = {}
    for split in SPLITS:
        path = folder / f"{split}.tsv"
        if path.is_file():
            held[split] = [tuple(fields) for fields in read_lines(path, path.read_bytes())]
        elif split != "dev":
            raise MissingDataError(
                f"no file {path}: finished lines stand in <source>/<task>/train.tsv, test.tsv and, "
                "if you like, dev.tsv"
            )
    return held["train"] + held.get("dev", []), held["test"]


def _drawer(
    answers: Sequence[Line], task: Task, shots: Shots, sampling_law: Sampling
) -> Callable[[int], tuple[list[int], list[int]]]:
    """The function from a sample's number to the row numbers of its train and dev."""
    labels = answers if task.kind == "classification" else [()] * len(answers)
    if shots == "all":
        return lambda sample: few_shot.draw_all(labels, sample)
    if sampling_law == "stratified":
        return lambda sample: few_shot.draw_stratified(labels, shots, STRATIFIED_DEV_ROWS, sample)
    return lambda sample: few_shot.draw_few_shot(labels, task.kind, shots, sample)


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


def _write(
    folder: Path,
    contents: dict[str, bytes],
    built: Built,
    earlier: Built | None,
    overwrite: bool,
) -> None:
    """Write the files; those of earlier samples stay in the record."""
    for name, content in contents.items():
        own = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if _digest(folder / name) not in (None, own) and not overwrite:
            raise DataError(
                f"{folder / name} has other rows than would be built now: give another out, or "
                "overwrite"
            )
        built.files[name] = own
    for name, content in contents.items():
        write_atomically(folder / name, content)
    if earlier is not None:
        built.files = {**earlier.files, **built.files}
        built.apart_from = {**earlier.apart_from, **built.apart_from}
        built.notes = list(dict.fromkeys([*earlier.notes, *built.notes]))


def _read_record(path: Path) -> Built | None:
    """What an earlier build left, or None where there is none that can be read."""
    try:
        return Built(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (TypeError, ValueError):
        return None


def _as_record(built: Built) -> dict[str, object]:
    """What is kept of a build."""
    held = asdict(built)
    del held["is_new"]
    return held


def _digest(path: Path) -> str | None:
    """MD5 digest of a file, or None where there is none."""
    try:
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _file_name(task: Task, shots: Shots, sample: int, split: str) -> str:
    """Name of a few-shot file."""
    return f"{task.name}_{shots}_{sample}_{split}.tsv"
