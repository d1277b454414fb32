"""Where the rows of a data set come from: the Hugging Face hub, a copy of it, or one's own files.

The hub keeps every public data set as Parquet files too, on a branch of its own, in folders
``<config>/<split>``. Those are read, through `datasets`; loading scripts are never run. A folder in
the same layout, ``<folder>/<data set>/<config>/<split>/*.parquet``, stands for the hub where there
is no network. One's own rows are ``<folder>/<task>/<split>`` with one of the endings of `FORMATS`,
with the hub's names of splits and columns.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_lab.data.files import DataError, MissingDataError
from prompt_lab.data.prepare import Row
from prompt_lab.data.tasks import Task

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

HUB = "hub"
"""The source that stands for the Hugging Face hub."""

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
"""Endings of a user's own files. Tables have a header; TSV has no quoting, CSV the usual one."""

_HUB_FILES = "hf://datasets/{}@refs%2Fconvert%2Fparquet"
_ROWS_AT_ONCE = 1000


def read_rows(task: Task, split: str, source: str = HUB) -> Iterator[Row]:
    """Read the rows of one split of a task's data set, in their order.

    Args:
        task: Row of the task table, with a source.
        split: Name of the split on the hub, such as "train" or "validation_matched".
        source: "hub", or a folder with own files or with a copy of the hub's.

    Raises:
        MissingDataError: No such data set, configuration or split; the message says what there is.
        DataError: A file cannot be read, or the hub cannot be reached.
    """
    assert task.source is not None
    if source == HUB:
        if task.source.hub is None:
            raise MissingDataError(
                f"{task.name} is not on the hub; put its rows into files and give their folder as "
                f"source{f' ({task.note})' if task.note else ''}"
            )
        return _read_parquet(task, split, task.source.hub, is_on_hub=True)
    folder = Path(source)
    if not folder.is_dir():
        raise MissingDataError(f"no folder {folder}: give a folder with rows, or {HUB} as source")
    if (folder / task.name).is_dir():
        return _read_own(folder / task.name, split)
    if task.source.hub is not None and (folder / task.source.hub).is_dir():
        return _read_parquet(task, split, str(folder / task.source.hub), is_on_hub=False)
    places = [folder / task.name, *([folder / task.source.hub] if task.source.hub else [])]
    raise MissingDataError(f"no folder {' and none '.join(map(str, places))} with the rows")


def _read_own(folder: Path, split: str) -> Iterator[Row]:
    """The rows of a user's own file."""
    found = [path for ending in FORMATS if (path := folder / f"{split}.{ending}").is_file()]
    if len(found) > 1:
        raise DataError(f"{', '.join(map(str, found))}: keep one file of the split")
    if not found:
        there = sorted(path.name for path in folder.iterdir() if path.is_file())
        raise MissingDataError(
            f"no file {folder / split}.{{{','.join(FORMATS)}}}; {folder} has "
            f"{', '.join(there) or 'no files'}"
        )
    path = found[0]
    if path.suffix == ".parquet":
        return _parquet_rows([str(path)])
    return _checked(path, _read_text(path))


def _read_text(path: Path) -> Iterator[Row]:
    """The rows of a JSON, CSV or TSV file, as they are parsed."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".json":
            held = json.load(file)
            yield from held if isinstance(held, list) else [held]
        elif path.suffix == ".jsonl":
            yield from (json.loads(line) for line in file if line.strip())
        else:
            is_tsv = path.suffix == ".tsv"
            yield from csv.DictReader(
                file,
                delimiter="\t" if is_tsv else ",",
                quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL,
                strict=not is_tsv,
            )


def _checked(path: Path, rows: Iterable[object]) -> Iterator[Row]:
    """The rows of a file, each of them a mapping; faults become one line with file and row."""
    number, is_table = 0, path.suffix in (".csv", ".tsv")
    try:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or (is_table and _is_ragged(row)):
                raise DataError(f"{path}, row {number}: not one value for each column")
            yield row
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{path}, row {number + 1}: {error}; mend or replace the file") from None


def _is_ragged(row: Row) -> bool:
    """Whether a row of a table has more or fewer cells than the header; `csv` says so by None."""
    return None in row or None in row.values()


def _read_parquet(task: Task, split: str, place: str, is_on_hub: bool) -> Iterator[Row]:
    """The rows of a data set's Parquet files: a data set of the hub, or a folder."""
    try:
        base = _HUB_FILES.format(_full_id(place)) if is_on_hub else place
        return _parquet_rows(_find_parquet(task, split, base))
    except DataError:
        raise
    except Exception as error:  # whatever network, hub and file libraries raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"data set {place} cannot be read: {reason[:300]}; try again (finished downloads are "
            "kept), or give a folder with the rows as source"
        ) from error


def _full_id(name: str) -> str:
    """The id of a data set with its owner; the hub still knows the short names of old ones."""
    from huggingface_hub import HfApi

    return name if "/" in name else HfApi().dataset_info(name).id


def _find_parquet(task: Task, split: str, base: str) -> list[str]:
    """Paths of the Parquet files of a split."""
    from fsspec.core import url_to_fs

    assert task.source is not None
    files, root = url_to_fs(base)
    config = _find_config(files, root, task.source.config)
    found = sorted(files.glob(f"{config}/{split}/*.parquet"))
    if not found:
        splits = _folders(files, config)
        if f"partial-{split}" in splits:
            raise MissingDataError(f"{base}: the hub has only a part of {split} as Parquet")
        raise MissingDataError(
            f"{config} has no split {split!r}; it has {', '.join(splits) or 'none'}"
        )
    return [files.unstrip_protocol(path) for path in found]


def _find_config(files: AbstractFileSystem, root: str, config: str | None) -> str:
    """The folder of a configuration; of the only one where the table names none."""
    there = _folders(files, root)
    if config in there:
        return f"{root}/{config}"
    if config is None and len(there) == 1:
        return f"{root}/{there[0]}"
    if config is None and "default" in there:
        return f"{root}/default"
    wanted = "one configuration" if config is None else f"a configuration {config!r}"
    raise MissingDataError(f"{root} should have {wanted}; it has {', '.join(there) or 'none'}")


def _folders(files: AbstractFileSystem, path: str) -> list[str]:
    """Names of the folders in a folder, sorted; those of version control left out."""
    entries = files.ls(path, detail=True)
    names = [entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"]
    return sorted(name for name in names if not name.startswith("."))


def _parquet_rows(paths: list[str]) -> Iterator[Row]:
    """The rows of Parquet files, read through `datasets`; downloads happen at once, not lazily."""
    from datasets import Dataset, load_dataset

    try:
        held = load_dataset("parquet", data_files=paths, split="train")
    except Exception as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{paths[0]} cannot be read: {cause[:300]}") from error
    assert isinstance(held, Dataset)
    batches = (held[at : at + _ROWS_AT_ONCE] for at in range(0, len(held), _ROWS_AT_ONCE))
    return chain.from_iterable(map(_unpack, batches))


def _unpack(batch: dict[str, list[object]]) -> Iterator[Row]:
    """Columns as rows."""
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
