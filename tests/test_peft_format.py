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
from safetensors.torch import load_file, save_file

from prompt_lab.files.peft import is_peft, load_peft, read_safetensors, save_peft
from prompt_lab.files.prompts import Prompt

N = 4


def make() -> Prompt:
    """A trained prompt, its init another."""
    generator = torch.Generator().manual_seed(0)
    prompt, init = (torch.randn(N, HIDDEN, generator=generator) for _ in range(2))
    return Prompt(
        prompt=prompt,
        init=init,
        name="emotion_13",
        backbone="someone/some-model",
        backbone_digest="0123",
        tokenizer_digest="4567",
        task="emotion",
        sample=13,
        dev_score=0.5,
        metric="ACC",
    )


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


def test_a_folder_holds_one_float32_tensor_config_and_card(folder: Path) -> None:
    prompt = make()
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    assert set(tensors) == {"prompt_embeddings"}
    assert torch.equal(tensors["prompt_embeddings"], prompt.prompt)
    assert read_safetensors(folder / "adapter_model.safetensors")[1] == {"format": "pt"}
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


def test_rows_of_a_bank_in_bfloat16_are_written_as_float32(tmp_path: Path) -> None:
    bank = torch.randn(N, 3, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    prompt = make()
    prompt.prompt = bank[:, 1]  # not contiguous
    save_peft(tmp_path, prompt, "CAUSAL_LM", 2, 4)
    assert torch.equal(load_peft(tmp_path).prompt, bank[:, 1].float())


def test_other_task_types_and_shapes_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task_type is 'SEQ_CLS'; allowed: SEQ_2_SEQ_LM"):
        save_peft(tmp_path / "p", make(), "SEQ_CLS", 2, 4)  # pyright: ignore
    prompt = make()
    prompt.prompt = prompt.prompt[0]
    with pytest.raises(ValueError, match=r"must be \(N, D\)"):
        save_peft(tmp_path / "p", prompt, "CAUSAL_LM", 2, 4)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_no_peft_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up with the last file, the config, which makes a folder one of PEFT."""
    write = Path.write_bytes

    def full_disk(self: Path, content: bytes) -> int:
        if "config" in self.name:
            raise OSError("disk full")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="disk full"):
        save_peft(tmp_path, make(), "CAUSAL_LM", 2, 4)
    assert not is_peft(tmp_path)


# ---- reading ------------------------------------------------------------------------------------


def test_a_folder_is_read_as_a_prompt_that_starts_from_itself(folder: Path) -> None:
    found = load_peft(folder)
    assert torch.equal(found.prompt, make().prompt)
    assert torch.equal(found.init, make().prompt)
    assert found.prompt.data_ptr() != found.init.data_ptr()
    assert (found.name, found.backbone) == ("peft", "someone/some-model")
    assert (found.backbone_digest, found.tokenizer_digest) == ("", "")
    assert (found.start, found.start_file) == ("prompt", str(folder))


@pytest.mark.parametrize("stated", [2, None], ids=["stated", "PEFT's default"])
def test_of_two_submodules_the_first_rows_are_taken(folder: Path, stated: int | None) -> None:
    rows = torch.randn(2 * N, HIDDEN)
    change(folder, {"prompt_embeddings": rows}, num_transformer_submodules=stated)
    assert torch.equal(load_peft(folder).prompt, rows[:N])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(folder: Path, dtype: torch.dtype) -> None:
    rows = torch.randn(N, HIDDEN).to(dtype)
    change(folder, {"prompt_embeddings": rows})
    found = load_peft(folder)
    assert found.prompt.dtype == torch.float32
    assert torch.equal(found.prompt, rows.float())


def test_config_keys_that_are_not_needed_may_be_missing_or_new(folder: Path) -> None:
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


def test_a_task_of_a_multitask_prompt_is_the_product_of_its_factors(folder: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in multitask(folder).items()}
    for task in range(3):
        factor = np.einsum(
            "nr,rd->nd", arrays["prefix_task_cols"][task], arrays["prefix_task_rows"][task]
        )
        found = load_peft(folder, task)
        np.testing.assert_allclose(found.prompt, arrays["prompt_embeddings"] * factor, rtol=1e-5)
        assert found.name == f"peft_{task}"
        assert (found.start, found.start_file) == ("prompt", str(folder))


@pytest.mark.parametrize(("task", "words"), [(None, "no task index is given"), (3, "no task 3")])
def test_a_multitask_prompt_needs_a_task_that_is_there(
    folder: Path, task: int | None, words: str
) -> None:
    multitask(folder)
    with pytest.raises(ValueError, match=f"3 tasks .*{words}: import one of 0 to 2 with task_inde"):
        load_peft(folder, task)
    with pytest.raises(ValueError, match="there is no task -1"):
        load_peft(folder, -1)


def test_a_task_index_without_need_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="this is PROMPT_TUNING: leave it out"):
        load_peft(folder, 0)


# ---- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LORA", "P_TUNING", "PREFIX_TUNING", "CPT", "IA3", None])
def test_other_types_are_refused_by_name(folder: Path, kind: str | None) -> None:
    change(folder, peft_type=kind)
    with pytest.raises(ValueError, match=f"a PEFT adapter of type {kind}; only soft prompts"):
        load_peft(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "a PEFT prompt for SEQ_CLS; allowed: SEQ_2_SEQ_LM, CAUSAL_LM"),
        ({"modules_to_save": ["classifier"]}, r"\['classifier'\] of the model were trained"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens is None; allowed: 1 or more"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0; allowed"),
        ({"num_virtual_tokens": "4"}, "num_virtual_tokens is '4'; allowed"),
        ({"num_transformer_submodules": 3}, "num_transformer_submodules is 3; allowed: 1 or 2"),
        ({"token_dim": 0}, "token_dim is 0; allowed: 1 or more"),
        ({"num_virtual_tokens": 2}, r"2 virtual tokens x 1 .*shape \(4, 32\)"),
        ({"token_dim": 31}, r"of width 31, but prompt_embeddings has shape \(4, 32\)"),
    ],
)
def test_configs_that_cannot_be_or_do_not_fit_are_refused(
    folder: Path, config: dict[str, Any], message: str
) -> None:
    change(folder, **config)
    with pytest.raises(ValueError, match=message):
        load_peft(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.zeros(N, HIDDEN)}, r"no tensor 'prompt_embeddings' .* are \['other'\]"),
        ({"prompt_embeddings": torch.zeros(N, HIDDEN, dtype=torch.long)}, "of floats"),
        ({"prompt_embeddings": torch.zeros(N * HIDDEN)}, r"has shape \(128,\)"),
        ({"prompt_embeddings": torch.zeros(())}, r"has shape \(\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    folder: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    change(folder, tensors)
    with pytest.raises(ValueError, match=message):
        load_peft(folder)


@pytest.mark.parametrize("name", ["prefix_task_cols", "prefix_task_rows"])
@pytest.mark.parametrize("shape", [(), (3, 2), (3, 5, 5), (2, N, 2)])
def test_factors_that_do_not_fit_are_refused(
    folder: Path, name: str, shape: tuple[int, ...]
) -> None:
    change(folder, {**multitask(folder), name: torch.zeros(shape)})
    with pytest.raises(ValueError, match="do not fit prompt_embeddings"):
        load_peft(folder, 0)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"no adapter_model.safetensors in {folder}"):
        load_peft(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"no adapter_config.json in {folder}"):
        load_peft(folder)
    with pytest.raises(FileNotFoundError, match="it is not a PEFT folder"):
        load_peft(folder / "nowhere")


def test_pickles_are_refused_unread(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"is a pickle.*save it again with save_pretrained"):
        load_peft(folder)


@pytest.mark.parametrize("kept", [0, 7, 100, 500])
def test_truncated_tensors_are_refused(folder: Path, kept: int) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load_peft(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "damaged, not JSON"), ("[]", "not a config of PEFT"), ("{}", "not a config of PEFT")],
)
def test_damaged_configs_are_refused(folder: Path, text: str, message: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_peft(folder)
