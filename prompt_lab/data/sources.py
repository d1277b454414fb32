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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prompt_lab.data.files import DataError, MissingDataError
from prompt_lab.data.prepare import Row
from prompt_lab.data.tasks import Task

HUB = "hub"
"""The source that stands for the Hugging Face hub."""

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
"""Endings of a user's own files. Tables have a header; TSV has no quoting, CSV the usual one."""

_HUB_FILES = "hf://datasets/{}@refs%2Fconvert%2Fparquet"


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
    hub, config = task.source.hub, task.source.config
    if source == HUB:
        if hub is None:
            raise MissingDataError(
                f"{task.name} is not on the hub; put its rows into files and give their folder as "
                f"source{f' ({task.note})' if task.note else ''}"
            )
        return _read_hub(hub, config, split, is_local=False)
    folder = Path(source)
    if not folder.is_dir():
        raise MissingDataError(f"no folder {folder}: give a folder with rows, or {HUB} as source")
    if (folder / task.name).is_dir():
        return _read_own(folder / task.name, split)
    if hub is not None and (folder / hub).is_dir():
        return _read_hub(str(folder / hub), config, split, is_local=True)
    places = [folder / name for name in (task.name, hub) if name]
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
    return _parquet_rows(found) if found[0].suffix == ".parquet" else _text_rows(found[0])


def _text_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON, CSV or TSV file; faults become one line with file and row."""
    number, ending = 0, path.suffix
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: Any
            if ending == ".json":
                held = json.load(file)
                rows = held if isinstance(held, list) else [held]
            elif ending == ".jsonl":
                rows = (json.loads(line) for line in file if line.strip())
            elif ending == ".tsv":
                rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                rows = csv.DictReader(file, strict=True)
            for number, row in enumerate(rows, 1):  # `csv` tells more or fewer cells by None
                ragged = ending in (".csv", ".tsv") and (None in row or None in row.values())
                if not isinstance(row, dict) or ragged:
                    raise DataError(f"{path}, row {number}: not one value for each column")
                yield row
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{path}, row {number + 1}: {error}; mend or replace the file") from None


def _read_hub(place: str, config: str | None, split: str, *, is_local: bool) -> Iterator[Row]:
    """The rows of a data set's Parquet files: a data set of the hub, or a copy in a folder."""
    from fsspec.core import url_to_fs
    from huggingface_hub import HfApi

    try:
        base = place
        if not is_local:  # the hub still knows the short names of old data sets
            base = _HUB_FILES.format(place if "/" in place else HfApi().dataset_info(place).id)
        files, root = url_to_fs(base)

        def folders(path: str) -> list[str]:
            entries = [e["name"] for e in files.ls(path, detail=True) if e["type"] == "directory"]
            return sorted(n for n in (e.rsplit("/", 1)[-1] for e in entries) if n[0] != ".")

        there = folders(root)
        if config is None and (len(there) == 1 or "default" in there):
            config = there[0] if len(there) == 1 else "default"
        if config not in there:
            wanted = "one configuration" if config is None else f"a configuration {config!r}"
            held = ", ".join(there) or "none"
            raise MissingDataError(f"{root} should have {wanted}; it has {held}")
        found = sorted(files.glob(f"{root}/{config}/{split}/*.parquet"))
        if not found:
            splits = folders(f"{root}/{config}")
            if f"partial-{split}" in splits:
                raise MissingDataError(f"{base}: the hub has only a part of {split} as Parquet")
            held = ", ".join(splits) or "none"
            raise MissingDataError(f"{root}/{config} has no split {split!r}; it has {held}")
        return _parquet_rows([files.unstrip_protocol(path) for path in found])
    except DataError:
        raise
    except Exception as error:  # whatever network, hub and file libraries raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"data set {place} cannot be read: {reason[:300]}; try again (finished downloads are "
            "kept), or give a folder with the rows as source"
        ) from error


def _parquet_rows(paths: Sequence[str | Path]) -> Iterator[Row]:
    """The rows of Parquet files, read through `datasets`; downloads happen at once, not lazily."""
    from datasets import Dataset, load_dataset

    try:
        held = load_dataset("parquet", data_files=list(map(str, paths)), split="train")
    except Exception as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{paths[0]} cannot be read: {cause[:300]}") from error
    assert isinstance(held, Dataset)
    return (
        dict(zip(batch, values, strict=True))
        for batch in held.iter(1000)
        for values in zip(*batch.values(), strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    )
