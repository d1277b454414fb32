"""Tokenised rows kept on disk: one Arrow file per split, named after all that its ids depend on.

The name is a SHA-256 over the digest of the few-shot file, the tokenizer's own files, what the
backbone makes of a probe text, the lengths, the prefix, and the versions of the libraries. A file
is thus never out of date: where one of these changes, another file is looked for. Files are written
whole or not at all, and a checksum finds those that were damaged later. Answers as text are not
kept, since the few-shot file is read and checked in any case. Left out: removal of old files.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zlib
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prompt_lab.atomic_file import write_atomically
from prompt_lab.data.batches import Rows
from prompt_lab.data.tasks import Task

if TYPE_CHECKING:
    import pyarrow as pa

    from prompt_lab.backbone import Backbone

VERSION = 1
"""Raised when the files, or the rules that make the rows, change in a way the key does not see."""

PROBE = "A probe, of 3 lines:\n two  spaces\tand é✓ "


def rules_digest(backbone: Backbone) -> str:
    """SHA-256 over the rules by which a backbone turns text into token ids.

    Those are all that its tokenizer consists of, the versions of the libraries, and what comes out
    for a probe: beginning and end tokens, the space in front of an answer, and special tokens that
    stand in a text.

    Args:
        backbone: the backbone; it is not changed.

    Returns:
        64 hexadecimal digits.
    """
    import tokenizers
    import transformers

    tokenizer = backbone.tokenizer
    probe = " ".join([PROBE, *sorted(tokenizer.all_special_tokens)])
    parts = [
        VERSION,
        transformers.__version__,
        tokenizers.__version__,
        type(tokenizer).__name__,
        tokenizer.truncation_side,
        backbone.is_encoder_decoder,
        backbone.encode_inputs([probe], len(probe) + 2),
        backbone.encode_targets([probe]),  # the last call, which leaves no truncation in the state
        _tokenizer_state(tokenizer),
    ]
    return _digest(parts)


def cache_key(
    data_digest: str, rules: str, max_input_length: int, prefix: str, with_targets: bool
) -> str:
    """The name of the file that holds the tokenised rows of a split.

    Args:
        data_digest: SHA-256 of the few-shot file.
        rules: what `rules_digest` gave for the backbone.
        max_input_length: most tokens of an input.
        prefix: text in front of every input.
        with_targets: whether the answers' ids are kept, too, as they are for train and dev.

    Returns:
        64 hexadecimal digits.
    """
    return _digest([VERSION, data_digest, rules, max_input_length, prefix, with_targets])


def check_folder(folder: str | Path) -> None:
    """Make the folder of the files, and see that one can be written there.

    Args:
        folder: the folder.

    Raises:
        ValueError: no file can be written there.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise ValueError(
            f"data.cache is {folder}, where no file can be written ({error.strerror}): give a "
            "folder of your own, or null to keep no tokenised rows"
        ) from None


def write_rows(folder: str | Path, key: str, rows: Rows) -> None:
    """Keep the tokenised rows of a split.

    Args:
        folder: the folder of the files.
        key: what `cache_key` gave for the split.
        rows: the rows; all of them have targets, or none.

    Raises:
        OSError: the file could not be written.
    """
    import pyarrow as pa

    columns = {"inputs": _nest([rows.inputs])}
    if rows.targets:
        columns["targets"] = _nest([rows.targets, list(chain.from_iterable(rows.targets))])
    checksum = _checksum(key, rows.longest_target, columns)
    facts = {"longest_target": str(rows.longest_target), "checksum": str(checksum)}
    table = pa.table(columns, metadata=facts)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    write_atomically(_path(folder, key), sink.getvalue().to_pybytes())


def read_rows(folder: str | Path, key: str, task: Task, references: list[list[str]]) -> Rows | None:
    """The tokenised rows of a split, if they were kept and the file is whole.

    Args:
        folder: the folder of the files.
        key: what `cache_key` gave for the split.
        task: the task of the rows.
        references: the accepted answers of the rows, from the few-shot file.

    Returns:
        The rows as they were before they were written, or None.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(str(_path(folder, key))) as source:
            table = pa.ipc.open_file(source).read_all().combine_chunks()
            table.validate(full=True)
            columns = {name: table[name].chunk(0) for name in table.column_names}
            facts = table.schema.metadata or {}
            longest = int(facts[b"longest_target"])
            known = int(facts[b"checksum"]) == _checksum(key, longest, columns)
            if not known or any(len(c) != len(references) for c in columns.values()):
                return None
            inputs = _lists(columns["inputs"])
            targets = _lists(columns["targets"]) if "targets" in columns else []
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException):
        return None  # not there, or damaged in one of many ways: the rows are tokenised again
    return Rows(task, inputs, targets, references, longest)


def _path(folder: str | Path, key: str) -> Path:
    """The file of a key."""
    return Path(folder, f"{key}.arrow")


def _digest(parts: list[Any]) -> str:
    """SHA-256 over plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tokenizer_state(tokenizer: Any) -> str:
    """SHA-256 over what a tokenizer consists of: vocabulary, merges, normaliser, and so on."""
    if tokenizer.is_fast:
        return _digest([tokenizer.backend_tokenizer.to_str()])
    with tempfile.TemporaryDirectory() as folder:  # those that are written in Python
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return _digest([(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files])


def _nest(levels: list[list[list[Any]]]) -> pa.LargeListArray:
    """An array of lists, and of lists of lists where there is a second level; int32 at the end."""
    import pyarrow as pa

    inner = levels[-1]
    count = sum(map(len, inner))
    array: Any = pa.array(np.fromiter(chain.from_iterable(inner), np.int32, count))
    for level in reversed(levels):
        offsets = np.cumsum([0, *map(len, level)], dtype=np.int64)
        array = pa.LargeListArray.from_arrays(pa.array(offsets), array)
    return array


def _lists(array: Any) -> list[Any]:
    """An array of lists as Python lists; much faster than ``to_pylist``."""
    items = array.values
    nested = hasattr(items, "offsets")
    values = _lists(items) if nested else items.to_numpy().tolist()
    return [values[start:stop] for start, stop in pairwise(array.offsets.to_numpy().tolist())]


def _checksum(key: str, longest_target: int, columns: dict[str, Any]) -> int:
    """CRC-32 over all that a file says."""
    found = zlib.crc32(f"{key} {longest_target} {list(columns)}".encode())
    for array in columns.values():
        while hasattr(array, "offsets"):
            found = zlib.crc32(array.offsets.to_numpy(), found)
            array = array.values
        found = zlib.crc32(array.to_numpy(), found)
    return found
