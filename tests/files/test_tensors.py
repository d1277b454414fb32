"""Tensor files of every kind: what is written is read; what is damaged is one sentence.

The reference is the safetensors library. Atomic writes, locks and kills are in ``test_faults.py``.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

from prompt_lab import __version__
from prompt_lab.core.attention_mixture import PromptAttention
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.subspace import AdapterMap, Subspace
from prompt_lab.files.prompts import Prompt, load_prompt, save_prompt
from prompt_lab.files.tensors import (
    KINDS,
    load_network,
    load_tensors,
    read_metadata,
    read_safetensors,
    save_network,
    save_tensors,
)

Factory = Callable[..., Backbone]
MADE_FOR = {"backbone": "someone/some-model", "backbone_digest": "0123456789abcdef"}
NETWORKS = {
    "subspace": Subspace(4, HIDDEN, 3, 7),
    "adapters": AdapterMap(20, 3, None),
    "attention": PromptAttention(HIDDEN, 3, temperature=2.5),
}


@dataclass
class Kind:
    """One kind of file: how it is written and read."""

    name: str

    def write(self, path: Path, **made_for: str) -> Path:
        metadata: dict[str, Any] = {**MADE_FOR, **made_for}
        if self.name == "prompt":
            prompt, init = torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(0))
            save_prompt(path, Prompt(prompt, init, "p", tokenizer_digest="01", **metadata))
        elif self.name == "weights":
            facts = {"best_step": 3, "status": 1, "seconds": 2.0}
            save_tensors(path, "weights", {"a.weight": torch.ones(4, 3)}, {**facts, **metadata})
        else:
            more = {"bottleneck": 2} if self.name == "adapters" else {}
            save_network(path, NETWORKS[self.name], {**metadata, **more, "tasks": ["a", "b"]})
        return path

    def read(self, path: Path, backbone: Backbone | None = None) -> Any:
        if self.name == "prompt":
            return load_prompt(path, backbone)
        if self.name == "weights":
            return load_tensors(path, "weights", backbone)
        return load_network(path, type(NETWORKS[self.name]), backbone)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param)


@pytest.fixture
def written(kind: Kind, tmp_path: Path) -> Path:
    return kind.write(tmp_path / "deep" / "x.safetensors")


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **metadata: str | None) -> None:
    """The same file with other tensors, or with metadata changed, or left out where None."""
    old, known = read_safetensors(path)
    new = {k: v for k, v in {**known, **metadata}.items() if v is not None}
    save_file(old if tensors is None else tensors, path, new)


def refused(kind: Kind, path: Path, reason: str) -> None:
    """Tensors and metadata: one sentence that names file and reason."""
    for read in (kind.read, lambda path: read_metadata(path, kind.name)):
        with pytest.raises(ValueError, match=f"^{path}: [^\n]*{reason}"):
            read(path)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_read_as_it_was_written_in_single_precision_and_frozen(tmp_path, name):
    path, network = Kind(name).write(tmp_path / "x"), NETWORKS[name]
    found = load_network(path, type(network))
    assert MADE_FOR.items() <= found.metadata.items()
    assert (found.metadata["tasks"], found.metadata["version"]) == (["a", "b"], __version__)
    assert [getattr(found, n) for n in found.SIZES] == [getattr(network, n) for n in network.SIZES]
    own = network.state_dict()
    assert found.state_dict().keys() == own.keys()
    assert all(found.state_dict()[name].equal(own[name]) for name in own)
    assert not any(weight.requires_grad for weight in found.parameters())
    save_network(path, Subspace(4, HIDDEN, 3, 7).double(), MADE_FOR)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


def test_tensors_keep_their_dtype_and_metadata_are_json(tmp_path):
    bank = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    facts = {**MADE_FOR, "best_step": 1, "status": 0, "seconds": 0.5, "more": ["x", None, 1 / 3]}
    save_tensors(tmp_path / "x", "weights", {"a": bank.T}, facts)  # not contiguous
    tensors, metadata = load_tensors(tmp_path / "x", "weights")
    assert tensors["a"].equal(bank.T)
    assert metadata == facts
    raw = read_safetensors(tmp_path / "x")[1]
    assert (raw["format"], raw["kind"], raw["format_version"]) == ("prompt_lab", "weights", "1")
    assert json.loads(raw["more"]) == facts["more"]


@pytest.mark.parametrize("where", ["write", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_part(kind, written, monkeypatch, where):
    """The disk fills up in the middle of the bytes, or the last step fails."""
    old = written.read_bytes()

    def half(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:50])
        raise OSError("disk full")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    if where == "write":
        monkeypatch.setattr(Path, "write_bytes", half)
    else:
        monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match=r"x.safetensors cannot be written .*disk full"):
        kind.write(written, backbone="another")
    assert written.read_bytes() == old
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_file_and_folder_are_synced_before_and_after_the_move(kind, tmp_path, monkeypatch):
    """A power failure leaves the old file or the whole new one."""
    done, sync, replace = [], os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix)
        sync(descriptor)

    def moved(source: Path, target: Path) -> None:
        done.append("move")
        replace(source, target)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", moved)
    kind.write(tmp_path / "x.safetensors")
    assert done == [".part", "move", ""]


def test_files_that_are_missing_cut_short_or_of_others_are_refused(kind, written, tmp_path):
    """Nothing is unpickled: a file that would run code on loading only gives an error."""

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    for read in (kind.read, lambda path: read_metadata(path, kind.name)):
        with pytest.raises(FileNotFoundError, match=f"^no {kind.name} file .*absent$"):
            read(tmp_path / "absent")
    whole, path = written.read_bytes(), tmp_path / "x"
    torch.save({"prompt": torch.zeros(2, 2)}, path)
    cut = [whole[:kept] for kept in (0, 1, 8, 20, 300, -1)]
    for content in (path.read_bytes(), pickle.dumps(Bomb()), b"some words\n" * 40, *cut):
        path.write_bytes(content)
        refused(kind, path, "damaged or not a safetensors file")
    assert not (tmp_path / "exploded").exists()
    for metadata in (None, {"format": "pt"}, {"kind": "prompt"}):
        save_file({"prompt": torch.zeros(4, 3), "init": torch.zeros(4, 3)}, path, metadata)
        refused(kind, path, rf"not a {kind.name} file of prompt_lab \(no such metadata\)")
    for other in KINDS.keys() - {kind.name}:
        Kind(other).write(path)
        refused(kind, path, rf"not a {kind.name} file of prompt_lab \(a file of kind '{other}'\)")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": "2"}, "of format 2; this version .* reads up to 1: upgrade"),
        ({"format_version": None}, "damaged, no version of the format or no kind"),
        ({"format_version": "one"}, "damaged, no version of the format or no kind"),
        ({"kind": None}, "damaged, no version of the format or no kind"),
        ({"backbone": "{"}, "damaged, its metadata is not JSON"),
        ({"more": "[" * 100_000}, "damaged, its metadata is not JSON"),
        ({"backbone": "3"}, "damaged, in its metadata backbone is 3"),
        ({"backbone": None, "backbone_digest": None}, "metadata no backbone, no backbone_digest"),
    ],
    ids=str,
)
def test_damaged_metadata_is_told(kind, written, changes, reason):
    rewrite(written, **changes)
    refused(kind, written, reason)
    for name in KINDS[kind.name]:  # every field is needed
        rewrite(kind.write(written), **{name: None})
        refused(kind, written, f"damaged, in its metadata no {name}")


@pytest.mark.parametrize("name", ["prompt", *NETWORKS])
def test_tensors_that_disagree_with_the_metadata_are_refused(tmp_path, name):
    kind, path = Kind(name), tmp_path / "x"
    size = next(n for n, what in KINDS[name].items() if what is int and n != "bottleneck")
    for changes in ({size: "5"}, {size: "0"}, {size: "-1"}):
        rewrite(kind.write(path), **changes)
        with pytest.raises(ValueError, match=f"^{path}: damaged[:,] "):
            kind.read(path)
    for extra in (True, False):
        tensors = load_file(kind.write(path))
        if extra:
            tensors["more"] = torch.zeros(1)
        else:
            del tensors[sorted(tensors)[0]]
        rewrite(path, tensors)
        with pytest.raises(ValueError, match=f"^{path}: damaged: "):
            kind.read(path)


def test_another_backbone_is_refused_with_both_sides(kind, tmp_path, backbone):
    ours, path = backbone("t5"), tmp_path / "x"
    kind.write(path, backbone=ours.name, backbone_digest=ours.digest)
    kind.read(path, ours)
    with pytest.raises(ValueError, match=f"^{path}: made for backbone 'tiny-t5' .*'tiny-gpt2' has"):
        kind.read(path, backbone("gpt2"))
    if "hidden_size" in KINDS[kind.name]:
        rewrite(path, hidden_size="16")
        with pytest.raises(ValueError, match=r"width 16 made for 'tiny-t5', but .*'tiny-t5' has"):
            kind.read(path, ours)
