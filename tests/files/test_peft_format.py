"""PEFT folders as files: what is written, what is read, and what is refused in one sentence.

That PEFT agrees is tested in ``test_peft.py``; the references here are safetensors and NumPy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HIDDEN
from safetensors.torch import save_file

from prompt_lab.files.peft import is_peft, load_peft, save_peft
from prompt_lab.files.prompts import Prompt
from prompt_lab.files.tensors import read_safetensors

N = 4


def make() -> Prompt:
    """A trained prompt, its init another."""
    tensors = torch.randn(2, N, HIDDEN, generator=torch.Generator().manual_seed(0))
    names = ("emotion_13", "someone/some-model", "0123", "4567", "emotion")
    return Prompt(*tensors, *names, sample=13, dev_score=0.5, metric="ACC")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PEFT folder with the prompt of ``make``."""
    save_peft(tmp_path / "peft", make(), "SEQ_2_SEQ_LM", 2, 4)
    return tmp_path / "peft"


def change(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> None:
    """Change keys of the config of a folder, or all its tensors."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


# ---- writing ------------------------------------------------------------------------------------


def test_a_folder_holds_one_float32_tensor_config_and_card(folder):
    prompt = make()
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    tensors, metadata = read_safetensors(folder / "adapter_model.safetensors")
    assert ([*tensors], metadata) == (["prompt_embeddings"], {"format": "pt"})
    assert tensors["prompt_embeddings"].equal(prompt.prompt)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/some-model"
    assert (config["num_virtual_tokens"], config["token_dim"]) == (N, HIDDEN)
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nbase_model: "someone/some-model"\nlibrary_name: peft\n---\n')
    assert "- task: emotion\n- few-shot sample: 13\n- dev ACC: 0.5\n" in card
    assert "use_cache" not in card
    save_peft(folder.parent / "causal", make(), "CAUSAL_LM", 2, 4)
    assert "`use_cache=False`" in (folder.parent / "causal" / "README.md").read_text()
    assert is_peft(folder)
    assert not is_peft(folder / "README.md")
    assert not is_peft(folder.parent)


def test_rows_of_a_bank_in_bfloat16_are_written_as_float32(tmp_path):
    bank = torch.randn(N, 3, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    prompt = make()
    prompt.prompt = bank[:, 1]  # not contiguous
    save_peft(tmp_path, prompt, "CAUSAL_LM", 2, 4)
    assert torch.equal(load_peft(tmp_path).prompt, bank[:, 1].float())


def test_a_write_that_fails_leaves_no_peft_folder(tmp_path, monkeypatch):
    """The disk fills up with the last file, the config, which makes a folder one of PEFT."""

    def full(path: Path, content: bytes) -> None:
        assert "config" not in path.name, "disk full"

    monkeypatch.setattr("prompt_lab.files.peft.write_atomically", full)
    with pytest.raises(AssertionError, match="disk full"):
        save_peft(tmp_path, make(), "CAUSAL_LM", 2, 4)
    assert not is_peft(tmp_path)


# ---- reading ------------------------------------------------------------------------------------


def test_a_folder_is_read_as_a_prompt_that_starts_from_itself(folder):
    found = load_peft(folder)
    assert torch.equal(found.prompt, make().prompt)
    assert torch.equal(found.init, make().prompt)
    assert found.prompt.data_ptr() != found.init.data_ptr()
    assert (found.name, found.backbone) == ("peft", "someone/some-model")
    assert (found.backbone_digest, found.tokenizer_digest) == ("", "")
    assert (found.start, found.start_file) == ("prompt", str(folder))


def test_of_two_submodules_the_first_rows_are_taken_and_other_floats_become_float32(folder):
    for kind in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for stated in (2, None):  # None is PEFT's default
            rows = torch.randn(2 * N, HIDDEN).to(kind)
            change(folder, {"prompt_embeddings": rows}, num_transformer_submodules=stated)
            found = load_peft(folder).prompt
            assert found.dtype == torch.float32
            assert found.equal(rows[:N].float())


def test_config_keys_that_are_not_needed_may_be_missing_or_new(folder):
    """As in folders of older and newer versions of PEFT."""
    minimal = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": N, "of_tomorrow": {}}
    (folder / "adapter_config.json").write_text(json.dumps(minimal))
    assert torch.equal(load_peft(folder).prompt, make().prompt)


def multitask(folder: Path, tasks: int = 3, rank: int = 2) -> dict[str, torch.Tensor]:
    """Make it a multitask prompt."""
    tensors = {
        "prompt_embeddings": torch.randn(N, HIDDEN),
        "prefix_task_cols": torch.randn(tasks, N, rank),
        "prefix_task_rows": torch.randn(tasks, rank, HIDDEN),
    }
    change(folder, tensors, peft_type="MULTITASK_PROMPT_TUNING")
    return tensors


def test_a_task_of_a_multitask_prompt_is_the_product_of_its_factors(folder):
    arrays = {name: tensor.numpy() for name, tensor in multitask(folder).items()}
    for task in range(3):
        factor = np.einsum(
            "nr,rd->nd", arrays["prefix_task_cols"][task], arrays["prefix_task_rows"][task]
        )
        found = load_peft(folder, task)
        np.testing.assert_allclose(found.prompt, arrays["prompt_embeddings"] * factor, 1e-5, 1e-6)
        assert found.name == f"peft_{task}"
        assert (found.start, found.start_file) == ("prompt", str(folder))


# ---- refused ------------------------------------------------------------------------------------


def no_prompt(folder: Path, reason: str, task: int | None = None) -> None:
    """One sentence, whatever is wrong with a folder."""
    with pytest.raises(ValueError, match=rf"^{folder}: not a PEFT prompt folder: .*({reason})"):
        load_peft(folder, task)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "LORA"}, "an adapter of type LORA for"),
        ({"peft_type": None}, "an adapter of type None for"),
        ({"task_type": "SEQ_CLS"}, "for SEQ_CLS; only soft prompts .* can be read: PROMPT_TUNING"),
        ({"modules_to_save": ["classifier"]}, r"\['classifier'\] of the model were trained"),
        ({"num_virtual_tokens": None}, "TypeError"),
        ({"num_virtual_tokens": 0}, r"0 virtual tokens x 1 .* are \(4, 32\)"),
        ({"num_virtual_tokens": "4"}, r"\('4', 32\), but prompt_embeddings are \(4, 32\)"),
        ({"num_virtual_tokens": 2}, r"2 virtual tokens x 1 submodules are \(2, 32\), but "),
        ({"num_transformer_submodules": 4, "num_virtual_tokens": 1}, "1 virtual tokens x 4 submo"),
        ({"token_dim": 31}, r"\(4, 31\), but prompt_embeddings are \(4, 32\) of torch.float32"),
    ],
)
def test_configs_that_cannot_be_or_do_not_fit_are_refused(folder, config, reason):
    change(folder, **config)
    no_prompt(folder, reason)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"other": torch.zeros(N, HIDDEN)}, "KeyError 'prompt_embeddings'"),
        ({"prompt_embeddings": torch.zeros(N, HIDDEN, dtype=torch.long)}, "of torch.int64"),
        ({"prompt_embeddings": torch.zeros(N * HIDDEN)}, r"prompt_embeddings are \(128,\)"),
        ({"prompt_embeddings": torch.zeros(())}, "IndexError"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, tensors, reason):
    change(folder, tensors, token_dim=None)
    no_prompt(folder, reason)


def test_damaged_files_and_factors_that_do_not_fit_are_refused(folder):
    reason = "do not fit prompt_embeddings|not enough values"
    for name in ("prefix_task_cols", "prefix_task_rows"):
        for shape in ((), (3, 2), (3, 5, 5), (2, N, 2)):
            change(folder, {**multitask(folder), name: torch.zeros(shape)})
            no_prompt(folder, reason, 0)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    for kept in (0, 7, 100, 500):
        (folder / "adapter_model.safetensors").write_bytes(whole[:kept])
        no_prompt(folder, "damaged or not a safetensors file")
    for text in ("{", "[]", "{}", '{"peft_type": "PROMPT_TUNING"}'):
        (folder / "adapter_config.json").write_text(text)
        no_prompt(folder, "")


def test_a_multitask_prompt_needs_a_task_that_is_there_and_others_none(folder):
    no_prompt(folder, "this is PROMPT_TUNING: leave it out", 0)
    multitask(folder)
    for task, words in ((None, "no task index is given"), (3, "no task 3"), (-1, "no task -1")):
        no_prompt(folder, f"3 tasks .*{words}: import one of 0 to 2 with task_index", task)


def test_missing_files_are_named_and_pickles_are_not_read(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    reason = f"no adapter_model.safetensors in {folder}: .*; load its pickle .* save it again"
    with pytest.raises(FileNotFoundError, match=reason):
        load_peft(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"no adapter_config.json in {folder}"):
        load_peft(folder)
    with pytest.raises(FileNotFoundError, match="not a PEFT prompt folder"):
        load_peft(folder / "nowhere")
