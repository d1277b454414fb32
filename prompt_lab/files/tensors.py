"""One kind of tensor file for everything that is trained, and how files are written.

A tensor file is one ``.safetensors`` with flat string metadata: ``format`` prompt_lab, its
``kind``, ``format_version``, and fields whose values are JSON. A prompt, a map from codes, an
attention and fine-tuned weights differ in kind and fields only. Nothing is ever unpickled.

Files appear whole or not at all and are forced to the disk; a folder is held by one process at a
time. A process that is killed leaves whole files and no lock.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.core.attention_mixture import PromptAttention
    from prompt_lab.core.backbone import Backbone
    from prompt_lab.core.subspace import AdapterMap, Subspace

Network = TypeVar("Network", "Subspace", "AdapterMap", "PromptAttention")

FORMAT, FORMAT_VERSION = "prompt_lab", 1

_MADE_FOR = {"backbone": str, "backbone_digest": str}
_BANK = {"num_virtual_tokens": int, "hidden_size": int}
_MAP = {"intrinsic_dim": int, "inner_size": int | None}
KINDS: dict[str, dict[str, Any]] = {
    "prompt": {"name": str, **_BANK, **_MADE_FOR, "tokenizer_digest": str},
    "subspace": {**_BANK, **_MAP, **_MADE_FOR},
    "adapters": {"size": int, "bottleneck": int, **_MAP, **_MADE_FOR},
    "attention": {"hidden_size": int, "inner_size": int, "temperature": float | int, **_MADE_FOR},
    "weights": {"best_step": int, "status": int, "seconds": float | int, **_MADE_FOR},
}
"""The fields that each kind of file must have, with their types."""


# ---- tensor files --------------------------------------------------------------------------------


def save_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a tensor file of one of :data:`KINDS`, whole or not at all; folders are made.

    No two tensors may share memory; metadata are values that JSON can hold, the fields of the kind
    among them.
    """
    from safetensors.torch import save

    text = {name: json.dumps(value) for name, value in metadata.items()}
    text |= {"format": FORMAT, "kind": kind, "format_version": str(FORMAT_VERSION)}
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(content, text))


def load_tensors(
    path: str | Path, kind: str, backbone: Backbone | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a tensor file of a kind: its tensors, on the CPU, and its metadata.

    A backbone that it is meant for is compared with the file's, by weights and width.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_metadata`, or made for another backbone.
    """
    metadata = read_metadata(path, kind)
    if backbone is not None:
        check_backbone(metadata, backbone, path)
    return read_safetensors(path)[0], metadata


def read_safetensors(path: str | Path, whole: bool = True) -> tuple[dict[str, Tensor], dict]:
    """The tensors, on the CPU, and the metadata as text of any safetensors file.

    With ``whole`` false no tensor is read.

    Raises:
        FileNotFoundError, ValueError: no such file; damaged, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
        # Not by safe_open, whose tensors lie in the file: it may be replaced meanwhile.
        return load(Path(path).read_bytes()) if whole else {}, metadata
    except (SafetensorError, LookupError) as error:
        raise ValueError(
            f"{path}: damaged or not a safetensors file ({error}); get or make it again"
        ) from error


def read_metadata(path: str | Path, kind: str) -> dict[str, Any]:
    """The metadata of a tensor file, without reading its tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of another kind or a newer format, or without the fields of its kind;
            naming file and reason.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {kind} file {path}")
    raw = read_safetensors(path, whole=False)[1]
    own = raw.pop("format", None) == FORMAT
    found, version = raw.pop("kind", None), raw.pop("format_version", "")
    if not own or (found != kind and found is not None):
        other = f"a file of kind {found!r}" if own else "no such metadata"
        raise ValueError(f"{path}: not a {kind} file of prompt_lab ({other})")
    if found is None or not version.isdecimal():
        raise ValueError(f"{path}: damaged, no version of the format or no kind in its metadata")
    if int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path}: {kind} file of format {version}; this version of prompt_lab reads up to "
            f"{FORMAT_VERSION}: upgrade prompt_lab"
        )
    try:
        metadata = {name: json.loads(value) for name, value in raw.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, its metadata is not JSON ({error})") from None
    if wrong := [
        f"{name} is {metadata[name]!r}" if name in metadata else f"no {name}"
        for name, what in KINDS[kind].items()
        if name not in metadata or not isinstance(metadata[name], what)
    ]:
        raise ValueError(f"{path}: damaged, in its metadata {', '.join(wrong)}")
    return metadata


def check_backbone(metadata: Mapping[str, Any], backbone: Backbone, where: str | Path) -> None:
    """Refuse (``ValueError``) what was made for another backbone, as far as its metadata tells.

    They hold ``backbone``, ``backbone_digest`` (may be empty) and ``hidden_size`` (may lack).
    """
    name, digest = metadata["backbone"] or "a model it does not name", metadata["backbone_digest"]
    width = metadata.get("hidden_size", backbone.hidden_size)
    if width != backbone.hidden_size:
        raise ValueError(
            f"{where}: width {width} made for {name!r}, but backbone {backbone.name!r} has hidden "
            f"size {backbone.hidden_size}"
        )
    if digest and digest != backbone.digest:
        raise ValueError(
            f"{where}: made for backbone {name!r} with weights {digest[:12]}, but "
            f"{backbone.name!r} has weights {backbone.digest[:12]}"
        )


# ---- networks -----------------------------------------------------------------------------------


def save_network(path: str | Path, network: Network, metadata: Mapping[str, Any]) -> None:
    """Write a subspace, a map to adapters or an attention, its weights as float32.

    Its sizes go into the metadata, beside those that are given, such as source tasks and steps.
    """
    from prompt_lab import __version__

    tensors = {name: tensor.float() for name, tensor in network.state_dict().items()}
    sizes = {name: getattr(network, name) for name in network.SIZES}
    save_tensors(path, network.KIND, tensors, {"version": __version__, **metadata, **sizes})


def load_network(
    path: str | Path, kind: type[Network], backbone: Backbone | None = None
) -> Network:
    """Read a network that :func:`save_network` wrote, on the CPU, frozen, with its ``metadata``.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_tensors`, or tensors of other sizes.
    """
    tensors, metadata = load_tensors(path, kind.KIND, backbone)
    try:
        network = kind(**{name: metadata[name] for name in kind.SIZES}, seed=None)
        floats = {name: tensor.float() for name, tensor in tensors.items()}
        network.load_state_dict(floats, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged: {' '.join(str(error).split())}") from None
    network.metadata = metadata
    return network.requires_grad_(False)


# ---- how files are written -----------------------------------------------------------------------


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part; synced.

    Raises:
        OSError: naming the file: a full disk, a folder that cannot be written to.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(content)
            _sync(draft)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        with suppress(OSError):  # a file system that cannot sync folders
            _sync(path.parent)


def _sync(path: Path) -> None:
    if os.name == "nt":  # cannot open folders, nor sync what is open to be read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the ``OSError`` of a write say which file it was and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            error.errno,
            f"{path} cannot be written ({reason}): make room there, or give another folder",
        ) from error


@contextmanager
def held(folder: Path, by: str, job: str = "", first: bool = True) -> Iterator[int]:
    """Hold a folder, so that no other process that asks for it gets it.

    The system lets go of it when the process ends, however it ends; where it has no such locks the
    folder is not held. The folder is made if it is not there; its file ``.lock`` stays. ``by`` says
    who else may hold it, ``job`` what the processes of one job have in common. Only the ``first``
    of them holds the folder; the others go on if nobody holds it, or their own job, so that they do
    not wait in vain for a first one that was refused.

    Yields:
        Descriptor of the lock file, which holds the number of the process and the job.

    Raises:
        ValueError, OSError: another process holds the folder; it cannot be written to.
    """
    path = folder / ".lock"
    with naming(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        process, _, holder = os.pread(lock, 200, 0).decode(errors="replace").partition(" ")
        is_own = job != "" and holder == job and not first
        is_free = is_own or _lock(lock)
        if not is_free and first and job:  # another process of the job may be looking
            time.sleep(0.5)
            is_free = _lock(lock)
        if not is_free:
            raise ValueError(
                f"{folder} is in use by {by} (process {process}): wait for it or stop it, or give "
                "another --run_dir"
            )
        if first:
            with naming(path):
                os.truncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()} {job}".strip().encode(), 0)
        else:
            os.close(lock)
            lock = -1
        yield lock
    finally:
        if lock >= 0:
            os.close(lock)


def _lock(descriptor: int) -> bool:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
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
