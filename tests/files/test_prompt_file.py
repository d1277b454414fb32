"""Prompt files and stores: what is written is read; damage is in ``test_tensors.py``."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN
from safetensors.torch import save_file

from prompt_lab.files.prompts import (
    METADATA_FIELDS,
    Prompt,
    PromptStore,
    find_prompts,
    load_prompt,
    save_prompt,
)
from prompt_lab.files.tensors import read_safetensors


def make(name: str = "emotion_13_seed0", **changes: Any) -> Prompt:
    """A prompt with many fields filled in: None, text with quotes, 1/3."""
    prompt, init = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    facts = {"task": "emotion", "sample": 13, "start": "vocab", "start_seed": 0, "order_seed": 4}
    facts |= {"steps": 120, "dev_score": 1 / 3, "metric": "ACC", "status": 'stopped, "early"'}
    facts["made_from"] = {"expression": "a + b", "scale": 0.1, "vectors": [{"task": "a"}]}
    digests = ("0123456789abcdef", "fedcba")
    return replace(Prompt(prompt, init, name, "someone/some-model", *digests, **facts), **changes)


def assert_equal(found: Prompt, expected: Prompt) -> None:
    assert found.metadata() == expected.metadata()
    assert found.prompt.equal(expected.prompt)
    assert found.init.equal(expected.init)


@pytest.fixture
def store(tmp_path: Path) -> PromptStore:
    """A store of two prompts, in a folder that it makes."""
    made = PromptStore(tmp_path / "new" / "store")
    made.save([make("b", task="x, y"), make("a")])
    return made


def index(store: PromptStore) -> list[dict[str, str]]:
    with (store.folder / "index.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- one file -----------------------------------------------------------------------------------


def test_a_prompt_is_read_as_it_was_written_and_takes_the_place_of_the_old_file(tmp_path):
    """Bit for bit, and metadata with their types; also a prompt that is its own init."""
    path, start = tmp_path / "deep" / "p.safetensors", torch.ones(5, HIDDEN)
    for prompt in (make(), make(prompt=start, init=start)):
        save_prompt(path, prompt)
        assert_equal(load_prompt(path), prompt)
        (found,) = find_prompts(path)
        assert found.metadata == prompt.metadata()
    assert [*path.parent.iterdir()] == [path]


def test_files_hold_two_float32_tensors_and_say_their_shape(tmp_path):
    """From bf16 and from slices of a bank, too."""
    bank = torch.randn(3, 5, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    save_prompt(tmp_path / "p", make(prompt=bank[1], init=bank.transpose(0, 1)[:, 2]))
    tensors, metadata = read_safetensors(tmp_path / "p")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {*tensors} == {"prompt", "init"}
    assert tensors["prompt"].equal(bank[1].float())
    assert tensors["init"].equal(bank[2].float())
    assert (metadata["num_virtual_tokens"], metadata["hidden_size"]) == ("5", str(HIDDEN))


def test_only_two_matrices_of_one_shape_are_written(tmp_path):
    flat = torch.zeros(5)
    for wrong in ({"init": torch.zeros(4, HIDDEN)}, {"prompt": flat, "init": flat}):
        with pytest.raises(ValueError, match=r"must both be \(N, D\)"):
            save_prompt(tmp_path / "p.safetensors", make(**wrong))
    assert list(tmp_path.iterdir()) == []


def test_a_file_from_before_a_field_was_known_is_read(tmp_path):
    """Fields that it lacks have their defaults."""
    save_prompt(tmp_path / "p", make())
    tensors, metadata = read_safetensors(tmp_path / "p")
    del metadata["made_from"]
    save_file(tensors, tmp_path / "p", metadata)
    assert_equal(load_prompt(tmp_path / "p"), make(made_from=None))


# ---- the store ----------------------------------------------------------------------------------


def test_a_store_gives_prompts_back_by_name_or_names_all_that_are_missing(store):
    assert [prompt.name for prompt in store.load(["b", "a"])] == ["b", "a"]
    assert_equal(store.load(["a"])[0], make("a"))
    with pytest.raises(FileNotFoundError, match=r"2 of 4 prompts are not in .*: c, d$"):
        store.load(["a", "c", "b", "d"])
    with pytest.raises(FileNotFoundError, match=r"no prompt store .*nowhere"):
        PromptStore(store.folder / "nowhere").index()


def test_a_store_checks_the_backbone_and_the_files(store, backbone):
    with pytest.raises(ValueError, match=r"a.safetensors: made for backbone 'someone/some-model'"):
        store.load(["a"], backbone("t5"))
    store.path("b").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b.safetensors: damaged"):
        store.index()


@pytest.mark.parametrize("name", ["", "..", "../a", "a/b", "/a", ".hidden"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be the name of a prompt"):
        PromptStore(tmp_path / "store").save([make(name)])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_index_repeats_the_files_metadata_and_is_rebuilt_from_them(store):
    """Reference: Python's CSV reader; absent values are empty fields. The files are believed."""
    rows = index(store)
    assert tuple(rows[0]) == METADATA_FIELDS
    assert [(row["name"], row["task"]) for row in rows] == [("a", "emotion"), ("b", "x, y")]
    assert rows[0]["status"] == 'stopped, "early"'
    assert (float(rows[0]["dev_score"]), rows[0]["test_score"]) == (1 / 3, "")
    assert store.index() == [make("a").metadata(), make("b", task="x, y").metadata()]
    (store.folder / "index.csv").write_text("nonsense")
    store.write_index()
    assert index(store) == rows
    store.path("a").unlink()
    store.save([make("c")])
    assert [row["name"] for row in index(store)] == ["b", "c"]
