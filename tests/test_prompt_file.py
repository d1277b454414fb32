"""Prompt files and stores: what is written is read, whole or not at all; what is wrong is named."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN
from safetensors.torch import save_file

from prompt_lab.core.backbone import Backbone
from prompt_lab.files.prompt_file import (
    FORMAT_VERSION,
    METADATA_FIELDS,
    REQUIRED_FIELDS,
    Prompt,
    PromptStore,
    load_prompt,
    read_metadata,
    save_prompt,
)

Factory = Callable[..., Backbone]


def make(name: str = "emotion_13_seed0", **changes: Any) -> Prompt:
    """A prompt with every field filled in."""
    generator = torch.Generator().manual_seed(1)
    prompt = Prompt(
        prompt=torch.randn(5, HIDDEN, generator=generator),
        init=torch.randn(5, HIDDEN, generator=generator),
        name=name,
        backbone="someone/some-model",
        backbone_digest="0123456789abcdef",
        tokenizer_digest="fedcba",
        task="emotion",
        sample=13,
        start="vocab",
        start_seed=0,
        init_seed=0,
        order_seed=4,
        learning_rate=0.3,
        batch_size=8,
        steps=120,
        dev_score=1 / 3,
        test_score=None,
        metric="ACC",
        status='stopped, "early"',
        seconds=1.25,
        version="0.1.0",
        made_from={"expression": "a + b", "scale": 0.1, "vectors": [{"task": "a"}]},
    )
    return replace(prompt, **changes)


def assert_equal(found: Prompt, expected: Prompt) -> None:
    assert found.metadata() == expected.metadata()
    assert torch.equal(found.prompt, expected.prompt)
    assert torch.equal(found.init, expected.init)


# ---- one file -----------------------------------------------------------------------------------


def test_a_prompt_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Bit for bit, and metadata with their types: None, text with quotes, 1/3."""
    prompt = make()
    save_prompt(tmp_path / "deep" / "p.safetensors", prompt)
    assert_equal(load_prompt(tmp_path / "deep" / "p.safetensors"), prompt)
    assert read_metadata(tmp_path / "deep" / "p.safetensors") == prompt.metadata()


def test_files_hold_two_float32_tensors_and_say_their_shape(tmp_path: Path) -> None:
    """Reference: the safetensors library; from bf16 and from a slice of a bank, too."""
    from safetensors import safe_open

    bank = torch.randn(3, 5, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    path = tmp_path / "p.safetensors"
    save_prompt(path, make(prompt=bank[1], init=bank.transpose(0, 1)[:, 2]))  # not contiguous
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(tensors) == {"prompt", "init"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["prompt"], bank[1].float())
    assert torch.equal(tensors["init"], bank[2].float())
    assert metadata["num_virtual_tokens"] == "5"
    assert metadata["hidden_size"] == str(HIDDEN)


def test_a_prompt_that_is_its_own_init_can_be_written(tmp_path: Path) -> None:
    """One tensor under both names, as of a prompt that was not trained."""
    start = torch.ones(5, HIDDEN)
    save_prompt(tmp_path / "p.safetensors", make(prompt=start, init=start))
    assert_equal(load_prompt(tmp_path / "p.safetensors"), make(prompt=start, init=start))


def test_only_two_matrices_of_one_shape_are_written(tmp_path: Path) -> None:
    flat = torch.zeros(5)
    for wrong in ({"init": torch.zeros(4, HIDDEN)}, {"prompt": flat, "init": flat}):
        with pytest.raises(ValueError, match=r"must both be \(N, D\)"):
            save_prompt(tmp_path / "p.safetensors", make(**wrong))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["write", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The disk fills up in the middle of the bytes, or the last step fails."""
    path, old = tmp_path / "p.safetensors", make()
    save_prompt(path, old)

    def full_disk(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:50])
        raise OSError("no space left on device")

    def no_replace(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(Path, "write_bytes", full_disk)
        else:
            patch.setattr(os, "replace", no_replace)
        with pytest.raises(OSError, match="no space left"):
            save_prompt(path, make(steps=999))
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    assert_equal(load_prompt(path), old)


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_prompt(path, make())
    save_prompt(path, make(steps=999))
    assert load_prompt(path).steps == 999
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (load_prompt, read_metadata):
        with pytest.raises(FileNotFoundError, match=r"no prompt file .*p.safetensors"):
            read(tmp_path / "p.safetensors")


@pytest.mark.parametrize("kept", [0, 1, 8, 20, 300, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    """Cut in the length, in the header, and in the numbers."""
    path = tmp_path / "p.safetensors"
    save_prompt(path, make())
    path.write_bytes(path.read_bytes()[:kept])
    for read in (load_prompt, read_metadata):
        with pytest.raises(ValueError, match=r"p.safetensors: damaged or not a safetensors file"):
            read(path)


def test_pickled_and_other_files_are_refused(tmp_path: Path) -> None:
    """Nothing is unpickled: a file that would run code on loading only gives an error."""
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    for content in (pickle.dumps(Bomb()), b"some words\n" * 40):
        (tmp_path / "p.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            load_prompt(tmp_path / "p.safetensors")
    torch.save({"prompt": torch.zeros(2, 2)}, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load_prompt(tmp_path / "p.safetensors")
    assert not (tmp_path / "exploded").exists()


def test_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file({"prompt_embeddings": torch.zeros(5, HIDDEN)}, path)
    with pytest.raises(ValueError, match=r"not a prompt file of prompt_lab"):
        load_prompt(path)
    tensors = {"prompt": torch.zeros(5, HIDDEN), "init": torch.zeros(5, HIDDEN)}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"not a prompt file of prompt_lab"):
        load_prompt(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"prompt": (5, 4)},
        {"prompt": (5, 4), "init": (4, 4)},
        {"prompt": (5, 4), "init": (5, 4), "more": (1,)},
    ],
    ids=str,
)
def test_other_tensors_are_refused(tmp_path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    path = tmp_path / "p.safetensors"
    metadata = {"format": "prompt_lab", "format_version": str(FORMAT_VERSION)}
    metadata |= dict.fromkeys(REQUIRED_FIELDS, '"x"')
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path, metadata)
    with pytest.raises(ValueError, match="holds prompt and init"):
        load_prompt(path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    metadata = {"format": "prompt_lab", "format_version": str(FORMAT_VERSION + 1)}
    save_file({"prompt": torch.zeros(5, 4), "init": torch.zeros(5, 4)}, path, metadata)
    with pytest.raises(ValueError, match=r"format 2; this version .* reads up to 1: upgrade"):
        load_prompt(path)


def test_a_file_from_before_a_field_was_known_is_read(tmp_path: Path) -> None:
    """Fields that it lacks have their defaults."""
    from safetensors import safe_open

    path, prompt = tmp_path / "p.safetensors", make()
    save_prompt(path, prompt)
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    del metadata["made_from"]
    save_file({"prompt": prompt.prompt, "init": prompt.init}, path, metadata)
    assert_equal(load_prompt(path), replace(prompt, made_from=None))


def test_a_prompt_loads_for_its_own_backbone_only(backbone: Factory, tmp_path: Path) -> None:
    """Both sides are named: other weights, and another width."""
    ours, path = backbone("t5"), tmp_path / "p.safetensors"
    mine = make(backbone=ours.name, backbone_digest=ours.digest)
    save_prompt(path, mine)
    assert_equal(load_prompt(path, ours), mine)
    with pytest.raises(ValueError, match=r"made for backbone 'tiny-t5' with .*'tiny-gpt2' has"):
        load_prompt(path, backbone("gpt2"))
    narrow = torch.zeros(5, HIDDEN // 2)
    save_prompt(path, replace(mine, prompt=narrow, init=narrow))
    with pytest.raises(ValueError, match=r"width 16 made for 'tiny-t5', but .*'tiny-t5' has .* 32"):
        load_prompt(path, ours)


# ---- the store ----------------------------------------------------------------------------------


def test_a_store_gives_prompts_back_by_name(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "new" / "store")
    store.save([make("a"), make("b", task="other")])
    assert [prompt.name for prompt in store.load(["b", "a"])] == ["b", "a"]
    assert_equal(store.load(["a"])[0], make("a"))
    assert store.path("a") == tmp_path / "new" / "store" / "a.safetensors"


def test_all_missing_prompts_are_named(tmp_path: Path) -> None:
    store = PromptStore(tmp_path)
    store.save([make("a"), make("b")])
    with pytest.raises(FileNotFoundError, match=r"2 of 4 prompts are not in .*: c, d$"):
        store.load(["a", "c", "b", "d"])


def test_a_store_checks_the_backbone_of_what_it_loads(backbone: Factory, tmp_path: Path) -> None:
    store = PromptStore(tmp_path)
    store.save([make("a")])
    with pytest.raises(ValueError, match=r"a.safetensors: made for backbone 'someone/some-model'"):
        store.load(["a"], backbone("t5"))


@pytest.mark.parametrize("name", ["", "..", "../a", "a/b", "/a", ".hidden"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    store = PromptStore(tmp_path / "store")
    for call in (lambda: store.path(name), lambda: store.save([make(name)])):
        with pytest.raises(ValueError, match="cannot be the name of a prompt"):
            call()
    assert not list(tmp_path.rglob("*.safetensors"))


def read_index(folder: Path) -> list[dict[str, str]]:
    with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_index_repeats_the_files_metadata(tmp_path: Path) -> None:
    """Reference: Python's CSV reader; absent values are empty fields."""
    store = PromptStore(tmp_path)
    store.save([make("b", task="x, y"), make("a")])
    rows = read_index(tmp_path)
    assert tuple(rows[0]) == METADATA_FIELDS
    assert [row["name"] for row in rows] == ["a", "b"]
    assert rows[1]["task"] == "x, y"
    assert rows[0]["status"] == 'stopped, "early"'
    assert float(rows[0]["dev_score"]) == 1 / 3
    assert rows[0]["test_score"] == ""
    assert store.index() == [make("a").metadata(), make("b", task="x, y").metadata()]


def test_the_index_is_rebuilt_from_the_files(tmp_path: Path) -> None:
    """Lost or out of date, it is never believed: files are."""
    store = PromptStore(tmp_path)
    store.save([make("a"), make("b")])
    before = (tmp_path / "index.csv").read_bytes()
    (tmp_path / "index.csv").unlink()
    (tmp_path / "a.safetensors").rename(tmp_path / "kept")
    assert [row["name"] for row in store.index()] == ["b"]
    (tmp_path / "kept").rename(tmp_path / "a.safetensors")
    (tmp_path / "index.csv").write_text("nonsense")
    store.write_index()
    assert (tmp_path / "index.csv").read_bytes() == before
    store.save([make("c")])
    assert [row["name"] for row in read_index(tmp_path)] == ["a", "b", "c"]


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prompt store .*nowhere"):
        PromptStore(tmp_path / "nowhere").index()


def test_a_damaged_file_in_a_store_is_named(tmp_path: Path) -> None:
    store = PromptStore(tmp_path)
    store.save([make("a"), make("b")])
    store.path("b").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b.safetensors: damaged"):
        store.index()
