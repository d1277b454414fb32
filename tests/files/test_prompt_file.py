"""Prompt files and stores: what is written is read; damage is in ``test_tensors.py``."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN
from safetensors.torch import save_file

from prompt_lab.core.backbone import Backbone
from prompt_lab.files.prompts import (
    METADATA_FIELDS,
    Prompt,
    PromptStore,
    find_prompts,
    load_prompt,
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
    (found,) = find_prompts(tmp_path / "deep" / "p.safetensors")
    assert found.metadata == prompt.metadata()


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


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_prompt(path, make())
    save_prompt(path, make(steps=999))
    assert load_prompt(path).steps == 999
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


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
