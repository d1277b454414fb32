"""Files that appear whole or not at all, and folders that one process at a time writes to.

A process that is killed leaves whole files and no lock. A failing power supply is not covered:
nothing is forced to the disk.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part.

    Raises:
        OSError: naming the file: a full disk, a folder that cannot be written to.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(content)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the error of a write say which file it was and what to do.

    Raises:
        OSError: in place of the one that was raised, of the same number.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            error.errno,
            f"{path} cannot be written ({reason}): make room there, or give another folder",
        ) from error


@contextmanager
def held(folder: Path, by: str) -> Iterator[int]:
    """Hold a folder, so that no other process that asks for it gets it.

    The system lets go of it when the process ends, however it ends. Where the system has no such
    locks the folder is not held.

    Args:
        folder: made if it is not there; its file ``.lock`` stays.
        by: who else may hold it, for the message.

    Yields:
        Descriptor of the lock file, which holds the number of the process.

    Raises:
        ValueError: another process holds the folder.
        OSError: a folder that cannot be written to.
    """
    path = folder / ".lock"
    with naming(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _lock(lock):
            process = os.pread(lock, 20, 0).decode(errors="replace")
            raise ValueError(
                f"{folder} is in use by {by} (process {process}): wait for it or stop it, or give "
                "another --run_dir"
            )
        with naming(path):
            os.truncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _lock(descriptor: int) -> bool:
    """Lock an open file; whether no other process has it locked."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV with a header; None, NaN and what a row lacks become empty cells."""
    buffer = StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(row.get(name)) for name in columns} for row in rows)
    write_atomically(path, buffer.getvalue().encode())


def cell(value: Any) -> Any:
    """What a CSV cell holds."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
