"""A training step asks the device for no value, so a GPU is never waited for.

There may be no GPU here. What stands in for one: every operator of a step, and the few methods that
copy a tensor to the host without one, are watched. ``index_tensor`` alone may bring numbers to the
device, since it does so from pinned memory.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ENCODER_DECODER, KINDS, make_backbone
from lightning.pytorch import Callback
from tiny_fits import FITS, fit_in, loaded, make_files
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from prompt_lab.core.adapters import AdaptedBackbone
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import bank_gradient, bank_product, renumber
from prompt_lab.core.batch import Batch, make_batch
from prompt_lab.core.optim import OptimConfig
from prompt_lab.methods.fine_tuning import FineTuning, weights_gradient
from prompt_lab.methods.meta_prompt import MetaPrompt
from prompt_lab.methods.prompt_tuning import PromptTuning

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")
"""Operators whose result, or its size, the host must know."""

COPIES = ("tolist", "numpy", "cpu", "__array__")
"""Methods that copy a tensor to the host."""

FROM_LISTS = ("tensor", "as_tensor")
"""Functions that make a tensor of numbers of the host, in memory that is not pinned."""


ON_THE_HOST = ("/torch/optim/", "index_tensor", "on_before_optimizer_step")
"""Where numbers are the host's: torch's counts of steps, pinned numbers, FineTuning's schedule."""


def note(found: list[str], what: str) -> None:
    """Note something with the innermost places on the stack, unless it is the host's own."""
    stack = [f for f in traceback.extract_stack() if f.filename != __file__]
    if any(word in f"{f.filename} {f.name}" for f in stack for word in ON_THE_HOST):
        return
    inside = [f for f in stack if "prompt_lab" in f.filename or "site-packages" in f.filename]
    places = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in inside[-5:]]
    found.append(f"{what}: {' > '.join(places)}")


class Operators(TorchDispatchMode):
    """Notes the operators, backward pass included, that the host waits for."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(at, torch.Tensor) and at.dtype in (torch.bool, torch.uint8)
            for at in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if by_mask or name.startswith(READS):
            note(self.found, name)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Notes copies between host and device that are no operators on a CPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        given = func(*args, **(kwargs or {}))
        if name in COPIES or (name in FROM_LISTS and given.numel()):
            note(self.found, name)
        return given


@contextmanager
def watched() -> Iterator[list[str]]:
    """Gives what the host waits for inside it."""
    found: list[str] = []
    with Methods(found), Operators(found):
        yield found


class WatchSteps(Callback):
    """Watches the steps of a fit, optimizer and trainer included, from the second on."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.modes = (Methods(self.found), Operators(self.found))
        for mode in self.modes:
            mode.__enter__()

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.steps += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)


def rows(model: Backbone, padded: bool) -> Batch:
    """Three rows under two prompts."""
    inputs = [[5, 6, 7, 8, 9, 10], [5, 6, 7], [11, 12, 13]]
    targets = [[7, 8, 2], [9, 2], [10, 2]]
    if not padded:
        inputs, targets = [ids[:3] for ids in inputs], [ids[-2:] for ids in targets]
    sides = {"pad_id": model.pad_id, "left_padded": not model.is_encoder_decoder}
    return make_batch(inputs, targets, [0, 1, 1], **sides)


def test_the_stand_in_sees_what_a_device_would_wait_for():
    x = torch.tensor([1.0, 2.0])
    with watched() as found:
        assert x.sum() > 0
        x.tolist()
        x[x > 1]
        torch.tensor([1])
    assert len(found) >= 4


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_prompts_ask_for_nothing(backbone, kind, padded):
    model = backbone(kind)
    batch, bank = rows(model, padded), torch.randn(2, 5, model.hidden_size)
    with watched() as found:
        bank_gradient(model, bank, batch, 40)
        bank_product(model, bank, bank, batch, 40)
    assert not found, sorted(set(found))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_adapters_and_weights_ask_for_nothing(backbone, kind, padded):
    """Without a prompt the mask of decoder-only models is another."""
    model = backbone(kind)
    adapted, batch = AdaptedBackbone(model, 2), rows(model, padded)
    alone = renumber(replace(batch, prompts=[0] * 3), [0])
    bank = torch.randn(2, 1, adapted.hidden_size)
    embeddings = model.model.get_input_embeddings().weight
    with watched() as found:
        bank_gradient(adapted, bank, batch, 40)
        embeddings.requires_grad_(True)
        weights_gradient(model, [embeddings], alone, 40)
        embeddings.requires_grad_(False)
    assert not found, sorted(set(found))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ENCODER_DECODER)
def test_masks_made_beforehand_change_nothing(kind, attention, monkeypatch):
    """Reference: the same losses where transformers makes its masks of the tokens' mask."""
    model = make_backbone(kind)
    model.model.set_attn_implementation(attention)
    banks = [torch.randn(2, count, model.hidden_size) for count in (0, 5)]
    batches = [rows(model, padded) for padded in (True, False)]

    def losses() -> torch.Tensor:
        return torch.stack([model.loss(bank, batch) for bank in banks for batch in batches])

    found = losses()
    for name in ("tokens_mask", "causal_mask"):
        monkeypatch.setattr(
            f"prompt_lab.core.encoder_decoder.{name}", lambda config, mask, dtype: mask
        )
    assert found.equal(losses())


METHODS = {
    **{name: FITS[name][0] for name in ("codes", "four episodes", "subspaces", "attempt")},
    "adapter map": FITS["adapter map"][0],
    "clipped": lambda _: loaded(PromptTuning(optim=OptimConfig(clip=1.0)), "t5"),
    "reptile": lambda _: loaded(MetaPrompt("reptile", num_virtual_tokens=4), "t5"),
    "weights": lambda _: loaded(FineTuning(), "t5"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_each_method_asks_for_nothing(name, fewshot_root, tmp_path):
    """The whole step: batch to loss, backward pass, clipping, optimizer, and Lightning's part."""
    make_files(tmp_path)
    method, watch = METHODS[name](tmp_path), WatchSteps()
    tasks = FITS[name][1] if name in FITS else ["glue-sst2"]
    fit_in(tmp_path / "run", method, fewshot_root, tasks, steps=3, callbacks=[watch])
    assert watch.steps == 3
    assert not watch.found, sorted(set(watch.found))


def test_a_process_of_another_job_is_refused_and_of_the_same_goes_on(tmp_path):
    """Processes that SLURM or torchrun starts do not wait for a first one that was refused."""
    from prompt_lab.files.tensors import held

    with held(tmp_path, "another fit", "job 1"):
        with held(tmp_path, "another fit", "job 1", first=False):
            pass
        for first in (True, False):
            refused = pytest.raises(ValueError, match=r"is in use by another fit \(process \d+\)")
            with refused, held(tmp_path, "another fit", "job 2", first=first):
                pass
    with held(tmp_path, "another fit", "job 2", first=False):
        pass  # what a job that is over left behind holds nobody
