"""``FineTuning``: gradients and steps against plain torch, what is kept, resume, refusals.

The references are transformers' own losses on the plain model, a naive training loop with torch's
optimizer and transformers' schedule, finite differences, and fits that nothing interrupted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import DECODER_ONLY, ENCODER_DECODER, KINDS, make_backbone
from safetensors import safe_open
from test_prompt_tuning import make_data, make_method, make_trainer
from transformers import get_scheduler

from prompt_lab import cli
from prompt_lab.backbone import Backbone
from prompt_lab.batch import IGNORE
from prompt_lab.data.batches import step_rows
from prompt_lab.methods.fine_tuning import FineTuning, weights_gradient
from prompt_lab.methods.prompt_method import BackboneConfig
from prompt_lab.methods.prompt_tuning import FAILED, FINISHED, STOPPED
from prompt_lab.optim import OptimConfig
from prompt_lab.results import read_csv, start_curves
from prompt_lab.run import Run

TEXTS = ["the dog ran", "a small red house", "the cat and the dog ran over the hill"]
ANSWERS = ["yes", "maybe no", "positive"]
SETTINGS = {"learning_rate": 1e-3, "batch_size": 4}

Fit = Callable[..., FineTuning]


def make(model: Backbone | None = None, **settings: Any) -> FineTuning:
    """The method on a backbone that is already loaded, which it will change."""
    method = FineTuning(**{**SETTINGS, **settings})
    method.backbone = model
    return method


@pytest.fixture
def fit(fewshot_root: Path, tmp_path: Path) -> Fit:
    """Function that trains a new tiny model and returns the method, its trainer attached."""

    def run(
        kind: str = "t5",
        run_dir: str = "run",
        model: Backbone | None = None,
        ckpt: str | None = None,
        tasks: tuple[str, ...] = ("glue-sst2",),
        trainer: dict[str, Any] | None = None,
        **settings: Any,
    ) -> FineTuning:
        method = make(model or make_backbone(kind), **settings)
        trainer_ = make_trainer(tmp_path / run_dir, **(trainer or {}))
        data = make_data(fewshot_root, list(tasks), [13])
        trainer_.fit(method, datamodule=data, ckpt_path=ckpt)
        return method

    return run


def weights_of(method: FineTuning) -> dict[str, torch.Tensor]:
    """A copy of the backbone's weights."""
    return {name: weight.detach().clone() for name, weight in method.weights.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []


# ---- the gradient --------------------------------------------------------------------------------


def plain_loss(model: Any, backbone: Backbone, text: str, answer: str) -> torch.Tensor:
    """Transformers' own loss of one row, given labels."""
    (ids,), (target,) = backbone.encode_inputs([text], 64), backbone.encode_targets([answer])
    if backbone.is_encoder_decoder:
        return model(input_ids=torch.tensor([ids]), labels=torch.tensor([target])).loss
    labels = [IGNORE] * len(ids) + target
    return model(input_ids=torch.tensor([ids + target]), labels=torch.tensor([labels])).loss


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_plain_model(kind):
    """Reference: transformers' loss with labels, row by row, on the model as it is; float64."""
    backbone = make_backbone(kind, torch.float64)
    plain = copy.deepcopy(backbone.model).requires_grad_(True)
    rows = zip(TEXTS, ANSWERS, strict=True)
    wanted = torch.stack([plain_loss(plain, backbone, *row) for row in rows]).mean()
    wanted.backward()
    backbone.unfreeze()
    weights = dict(backbone.model.named_parameters())
    batch = backbone.batch(TEXTS, ANSWERS)
    batch.weight.fill_(1 / 3)
    loss, gradients = weights_gradient(backbone, list(weights.values()), batch, 1000)
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-6, atol=0)
    expected = dict(plain.named_parameters())
    assert expected.keys() == weights.keys()
    assert max(gradient.abs().max() for gradient in gradients) > 1e-2
    for name, gradient in zip(weights, gradients, strict=True):
        other = expected[name].grad
        other = torch.zeros_like(gradient) if other is None else other
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["bart", "gpt2"])
def test_micro_batches_sum_to_the_gradient_of_the_batch(kind):
    """Reference: all rows in one forward pass."""
    backbone = make_backbone(kind, torch.float64)
    backbone.unfreeze()
    weights = list(backbone.model.parameters())
    batch = backbone.batch(TEXTS, ANSWERS)
    whole, cut = (weights_gradient(backbone, weights, batch, tokens, 0.1) for tokens in (1000, 1))
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-10)


def test_tied_weights_count_once(backbone):
    """Reference: T5 ties three matrices over the vocabulary."""
    method = make(make_backbone("t5"))
    method.prepare(make_ready("t5"))
    shared = method.backbone.model.get_input_embeddings().weight
    assert [weight is shared for weight in method.weights.values()].count(True) == 1
    assert not [w for w in method.weights.values() if w is not shared and w.shape == shared.shape]
    assert [id(w) for g in method._groups() for w in g["params"]].count(id(shared)) == 1


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
def test_weight_decay_spares_biases_and_norms(kind):
    """Reference: the kinds of the modules that own the weights."""
    method = make(make_backbone(kind), optim=OptimConfig(weight_decay=0.5))
    method.prepare(make_ready(kind))
    norms = {
        id(weight)
        for module in method.backbone.model.modules()
        if "norm" in type(module).__name__.lower()
        for weight in module.parameters(recurse=False)
    }
    biases = {id(weight) for name, weight in method.weights.items() if "bias" in name}
    assert norms
    decay = {id(w): group["weight_decay"] for group in method._groups() for w in group["params"]}
    assert decay == {
        id(w): 0.0 if id(w) in norms | biases else 0.5 for w in method.weights.values()
    }


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture
def make_ready(fewshot_root):
    """Function that gives data that were read, for a look without a trainer."""
    return None
