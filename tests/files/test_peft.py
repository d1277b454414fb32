"""Equality 3: the same prompt gives PEFT's logits, loss and gradient, and files pass both ways.

The reference is PEFT itself around the same weights. PEFT's inputs are padded on the right: with
padding on the left it puts the prompt before the padding, and its answers change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODER_DECODER, HIDDEN, make_model
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    MultitaskPromptTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from prompt_lab.commands.prompts import export_prompts
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.batch import IGNORE, Batch, make_batch
from prompt_lab.files.peft import WEIGHTS, load_peft
from prompt_lab.files.prompts import Prompt, save_prompt

Factory = Callable[..., Backbone]
Folders = Callable[[str], Path]

N = 5
KINDS = ("t5", "bart", "gpt2", "bloom", "llama", "qwen2")
INPUTS = ["the small red house", "a dog and a cat ran over the field", "yes"]
TARGETS = ["positive", "no maybe", "she likes to read"]


def make_prompt(seed: int = 0) -> Tensor:
    """A random prompt (N, D) of the size of the tiny models' embeddings."""
    return torch.randn(N, HIDDEN, generator=torch.Generator().manual_seed(seed)) * 0.3


def task_type(kind: str) -> str:
    return "SEQ_2_SEQ_LM" if kind in ENCODER_DECODER else "CAUSAL_LM"


def in_peft(kind: str, prompt: Tensor, submodules: int = 1) -> Any:
    """The tiny model of a kind inside PEFT, with the prompt copied into its first N rows."""
    config = PromptTuningConfig(
        task_type=task_type(kind), num_virtual_tokens=N, num_transformer_submodules=submodules
    )
    model = get_peft_model(make_model(kind), config).eval()
    model.prompt_encoder["default"].embedding.weight.data[:N] = prompt
    return model


def tokens(model: Backbone) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of all inputs and of all targets."""
    return model.encode_inputs(INPUTS), model.encode_targets(TARGETS)


def peft_inputs(model: Backbone, inputs: list[list[int]], targets: list[list[int]]) -> Any:
    """What PEFT takes for these rows, padded on the right, and where the targets stand."""
    joint = not model.is_encoder_decoder
    rows = [x + y for x, y in zip(inputs, targets, strict=True)] if joint else inputs
    wanted = [[IGNORE] * len(x) * joint + y for x, y in zip(inputs, targets, strict=True)]

    def pad(lists: list[list[int]], value: int) -> Tensor:
        width = max(map(len, lists))
        return torch.tensor([ids + [value] * (width - len(ids)) for ids in lists])

    mask = pad([[1] * len(ids) for ids in rows], 0)
    ids = {"input_ids": pad(rows, model.pad_id), "attention_mask": mask}
    return {**ids, "labels": pad(wanted, IGNORE)}


def batch_of(model: Backbone, inputs: list[list[int]], targets: list[list[int]]) -> Batch:
    side = {"pad_id": model.pad_id, "left_padded": not model.is_encoder_decoder}
    return make_batch(inputs, targets, [0] * len(inputs), **side)


def our_loss(model: Backbone, prompt: Tensor, inputs: Any, targets: Any) -> Tensor:
    """Our loss as PEFT averages it: over the tokens of all rows."""
    batch = batch_of(model, inputs, targets)
    lengths = torch.tensor(batch.target_lengths)
    return (model.loss(prompt[None], batch) * lengths).sum() / lengths.sum()


def our_log_probabilities(model: Backbone, prompt: Tensor, x: list[int], y: list[int]) -> Tensor:
    """Log-probabilities (T, V) at the target positions of one row, from :meth:`loss` alone.

    The V rows whose target is ``y[:t]`` and then any one token differ in its loss alone.
    """
    count = model.model.config.vocab_size
    lines = []
    for t in range(len(y)):
        targets = [[*y[:t], v] for v in range(count)]
        with torch.no_grad():
            losses = model.loss(prompt[None], batch_of(model, [x] * count, targets))
        lines.append((-losses * (t + 1)).log_softmax(0))
    return torch.stack(lines)


def assert_same_logits(model: Backbone, prompt: Tensor, peft: Any, **extra: Any) -> None:
    """The log-probabilities at the targets of the first row are PEFT's."""
    (x, *_), (y, *_) = tokens(model)
    with torch.no_grad():
        logits = peft(**peft_inputs(model, [x], [y]), **extra).logits[0]
    expected = (logits if model.is_encoder_decoder else logits[-len(y) - 1 : -1]).log_softmax(1)
    found = our_log_probabilities(model, prompt, x, y)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# ---- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_the_targets_equal_those_of_peft(backbone, kind):
    """Of BART, too, which scales its embeddings here: the prompt comes after the scale in both."""
    assert_same_logits(backbone(kind), make_prompt(), in_peft(kind, make_prompt()))


@pytest.mark.parametrize("rows", [1, 3], ids=["one row", "padded rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_those_of_peft(backbone, kind, rows):
    """Once our rows are weighted by target length: PEFT averages over tokens, we over rows."""
    model, prompt = backbone(kind), make_prompt().requires_grad_()
    inputs, targets = (ids[:rows] for ids in tokens(model))
    peft = in_peft(kind, prompt.detach())
    expected = peft(**peft_inputs(model, inputs, targets)).loss
    expected.backward()
    found = our_loss(model, prompt, inputs, targets)
    found.backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradient = peft.prompt_encoder["default"].embedding.weight.grad
    assert prompt.grad is not None
    assert gradient.norm() > 1e-3
    assert (prompt.grad - gradient).norm() < 3e-5 * gradient.norm().clamp(min=1)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_an_exported_prompt_and_answers_as_we_do(backbone, model_folder, tmp_path, kind):
    """Base model and prompt by PEFT's own loader, from nothing but the folder's path."""
    model, prompt = backbone(kind), make_prompt()
    stored = Prompt(prompt, prompt, "p", str(model_folder(kind)), "", "", task="emotion")
    save_prompt(tmp_path / "p.safetensors", stored)
    (folder,) = export_prompts(str(tmp_path / "p.safetensors"), str(tmp_path / "out"))
    seq2seq = kind in ENCODER_DECODER
    loader = AutoPeftModelForSeq2SeqLM if seq2seq else AutoPeftModelForCausalLM
    peft = loader.from_pretrained(folder).eval()
    inputs, targets = tokens(model)
    with torch.no_grad():
        expected = peft(**peft_inputs(model, inputs, targets)).loss
        found = our_loss(model, prompt, inputs, targets)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_folder_equals_the_one_that_peft_writes(model_folder, tmp_path, kind):
    """Config key by key, and the tensor file byte by byte."""
    name, prompt = str(model_folder(kind)), make_prompt()
    loader = AutoModelForSeq2SeqLM if kind in ENCODER_DECODER else AutoModelForCausalLM
    config = PromptTuningConfig(
        task_type=task_type(kind), num_virtual_tokens=N, num_transformer_submodules=1
    )
    peft = get_peft_model(loader.from_pretrained(name), config)
    peft.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
    peft.save_pretrained(tmp_path / "theirs")
    save_prompt(tmp_path / "p.safetensors", Prompt(prompt, prompt, "p", name, "", ""))
    export_prompts(str(tmp_path / "p.safetensors"), str(tmp_path / "ours"))
    files = [tmp_path / side / "adapter_config.json" for side in ("theirs", "ours")]
    theirs, ours = (json.loads(file.read_text()) for file in files)
    theirs["peft_version"] = ours["peft_version"]  # the tests may run with a newer PEFT
    assert ours == theirs
    theirs, ours = (file.with_name(WEIGHTS).read_bytes() for file in files)
    assert ours == theirs


@pytest.mark.parametrize(("kind", "submodules"), [("t5", 1), ("t5", 2), ("bart", 2), ("gpt2", 1)])
def test_prompts_trained_by_peft_load_and_give_its_logits(backbone, tmp_path, kind, submodules):
    """PEFT's default for encoder-decoder models is two submodules, of which it uses one."""
    model = backbone(kind)
    inputs, targets = tokens(model)
    peft = in_peft(kind, make_prompt(), submodules)
    optimizer = torch.optim.AdamW(
        [weight for weight in peft.parameters() if weight.requires_grad], lr=0.1
    )
    for _ in range(3):
        optimizer.zero_grad()
        peft(**peft_inputs(model, inputs, targets)).loss.backward()
        optimizer.step()
    peft.save_pretrained(tmp_path / "peft")
    prompt = load_peft(tmp_path / "peft").prompt
    assert prompt.shape == (N, HIDDEN)
    assert (prompt - make_prompt()).abs().max() > 0.05
    assert_same_logits(model, prompt, peft)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_prompts_of_p_tuning_load_and_give_its_logits(backbone, tmp_path, kind, encoder):
    """What P-tuning saves is what its encoder made; T5 has two submodules, of which it uses one."""
    sizes = {"num_virtual_tokens": N, "encoder_hidden_size": 16, "encoder_num_layers": 2}
    sizes |= {"task_type": task_type(kind), "encoder_reparameterization_type": encoder}
    peft = get_peft_model(make_model(kind), PromptEncoderConfig(**sizes)).eval()
    peft.save_pretrained(tmp_path / "peft")
    assert_same_logits(backbone(kind), load_peft(tmp_path / "peft").prompt, peft)


def multitask(kind: str, submodules: int) -> Any:
    """A multitask prompt of three tasks with large random factors inside PEFT."""
    config = MultitaskPromptTuningConfig(
        task_type=task_type(kind),
        num_virtual_tokens=N,
        num_transformer_submodules=submodules,
        num_tasks=3,
        num_ranks=2,
    )
    peft = get_peft_model(make_model(kind), config).eval()
    encoder = peft.prompt_encoder["default"]
    generator = torch.Generator().manual_seed(3)
    for weight in (encoder.prefix_task_cols, encoder.prefix_task_rows):
        weight.data = torch.randn(weight.shape, generator=generator) * 0.5
    return peft


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_each_task_of_a_multitask_prompt_loads_and_gives_its_logits(backbone, tmp_path, kind):
    peft = multitask(kind, submodules=1)
    peft.save_pretrained(tmp_path / "peft")
    for task in range(3):
        prompt = load_peft(tmp_path / "peft", task).prompt
        assert_same_logits(backbone(kind), prompt, peft, task_ids=torch.tensor([task]))


def test_of_a_multitask_prompt_for_both_sides_the_encoders_is_taken_and_told(tmp_path):
    """Its reference is the prompt that PEFT makes; PEFT's logits also need the decoder's part."""
    peft = multitask("t5", submodules=2)
    peft.save_pretrained(tmp_path / "peft")
    expected = peft.get_prompt(1, task_ids=torch.tensor([2]))[0, :N]
    with pytest.warns(UserWarning, match="only the encoder's prompt is taken"):
        found = load_peft(tmp_path / "peft", 2).prompt
    torch.testing.assert_close(found, expected.detach())
