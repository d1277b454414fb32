"""Rounding: gradients in bfloat16 against float32, what stays float32, and what is refused.

The reference is the same step in float32. How near other models and whole fits come is measured by
``benchmarks/precision.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_backbone, make_model, make_tokenizer, make_trainer
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import FLOAT16_SCALE, bank_gradient, with_gradient
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.methods.configs import BackboneConfig
from prompt_lab.methods.method import FAILED
from prompt_lab.methods.prompt_tuning import PromptTuning

KINDS = ("t5", "bart", "gpt2", "bloom", "llama")
WAYS = {
    "bfloat16 weights": {"dtype": torch.bfloat16},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


class Watch(Callback):
    """Keeps the loss and the prompts' gradient of every step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(pl_module.trained.grad.clone())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"])


Fit = Callable[..., tuple[PromptTuning, Watch]]


def mild_model(kind: str) -> Any:
    """The tests' model with weights of a third: their widest ones take any rounding far."""
    model = make_model(kind)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.div_(3)
    return model


@pytest.fixture
def fit(fewshot_root: Path, tmp_path: Path) -> Fit:
    """Function that trains two prompts and returns the method and what was watched."""

    def run(
        kind: str, dtype: torch.dtype = torch.float32, model: Any = None, **trainer: Any
    ) -> tuple[PromptTuning, Watch]:
        name: Any = str(dtype).removeprefix("torch.")
        method = PromptTuning(
            backbone=BackboneConfig(dtype=name),
            num_virtual_tokens=5,
            batch_size=4,
            init_seed=[0, 1],
        )
        loaded = (model or mild_model(kind)).to(dtype)
        method.backbone = Backbone(loaded, make_tokenizer(kind), f"tiny-{kind}")
        watch = Watch()
        data = CrossFitDataModule(["glue-sst2"], root=str(fewshot_root), samples=[13])
        make_trainer(tmp_path, 1, 1, callbacks=[watch], **trainer).fit(method, datamodule=data)
        return method, watch

    return run


# ---- bfloat16 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_keeps_the_gradient_of_a_training_step(fit: Fit, kind: str) -> None:
    """Reference: float32; both ways to have bfloat16, in a real trainer."""
    (plain,) = fit(kind)[1].gradients
    for name, way in WAYS.items():
        (found,) = fit(kind, **way)[1].gradients
        assert found.dtype == torch.float32
        assert not found.equal(plain)
        cosines = torch.cosine_similarity(found.flatten(1), plain.flatten(1))
        assert cosines.min() > 0.99, (name, cosines)


@pytest.mark.parametrize("way", [*WAYS.values(), {"dtype": torch.float16}], ids=str)
def test_what_is_trained_stays_in_float32(fit: Fit, way: dict[str, Any]) -> None:
    """Prompts, what is kept of them, optimizer state, losses; only the weights are rounded."""
    for kind in ("bart", "gpt2"):
        method, watch = fit(kind, **way)
        assert method.backbone is not None
        assert method.backbone.model.dtype == way.get("dtype", torch.float32)
        state = method.trainer.optimizers[0].state[method.trained]
        kept = [method.trained, method.init, method.best, method.loss_sum, *watch.losses]
        assert {tensor.dtype for tensor in [*kept, *state.values()]} == {torch.float32}
        assert not method.trained.equal(method.init)


# ---- float16 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_float16_weights_of_t5_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="overflow in float16: use dtype bfloat16 or float32"):
        make_backbone(kind, torch.float16)


@pytest.mark.parametrize("kind", ["bart", "gpt2", "bloom", "llama"])
def test_float16_weights_of_other_models_keep_the_gradient(fit: Fit, kind: str) -> None:
    """Reference: float32, at losses as they are early in a training."""
    (plain,), (found,) = fit(kind)[1].gradients, fit(kind, torch.float16)[1].gradients
    assert torch.cosine_similarity(found.flatten(1), plain.flatten(1)).min() > 0.999


@pytest.mark.parametrize("kind", ["bart", "gpt2", "bloom", "llama"])
def test_gradients_of_small_losses_get_through_float16_weights(kind: str) -> None:
    """Reference: float32, at losses of a thousandth; and without the scale they would be lost."""
    weights = mild_model(kind)
    models = [weights, copy.deepcopy(weights).to(torch.float16)]
    plain, half = (Backbone(model, make_tokenizer(kind), kind) for model in models)
    prompts = torch.randn(2, 5, plain.hidden_size, generator=torch.Generator().manual_seed(0))
    batch = plain.batch(["a dog", "the sea by the house"], ["yes", "no"], [0, 1])

    def gradient(model: Backbone, weight: float) -> Tensor:
        batch.weight.fill_(weight)
        return bank_gradient(model, prompts, batch, 2048)[1].flatten(1)

    true, found = gradient(plain, 2.0**-10), gradient(half, 2.0**-10)
    assert torch.cosine_similarity(found, true).min() > 0.99
    lost = gradient(half, 2.0**-10 / FLOAT16_SCALE)
    assert torch.cosine_similarity(lost, true).min() < torch.cosine_similarity(found, true).min()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.bfloat16) for kind in ("t5", "bart", "gpt2", "llama")),
        *((kind, torch.float16) for kind in ("bart", "gpt2", "llama")),
    ],
)
def test_more_micro_batches_do_not_round_the_gradient_more(kind: str, dtype: torch.dtype) -> None:
    """Reference: the same rounded weights in float32; 128 rows in one pass, up to one pass each."""
    weights = mild_model(kind).to(dtype)
    models = [copy.deepcopy(weights).float(), weights]
    plain, half = (Backbone(model, make_tokenizer(kind), kind) for model in models)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(1, 4, plain.hidden_size, generator=generator).to(dtype).float()
    words = ("no", "a", "the", "sea", "by", "red", "is", "it")
    texts = [f"the {word} dog {i} ran" for i in range(16) for word in words]
    batch = half.batch(texts, ["yes", "no", "maybe", "a dog"] * 32)
    batch.weight.fill_(1 / 128)
    _, true = bank_gradient(plain, prompts, batch, 10**6)
    errors = []
    for tokens in (10**6, 128, 1):
        _, found = bank_gradient(half, prompts, batch, tokens)
        assert found.dtype == torch.float32
        errors.append(((found - true).norm() / true.norm()).item())
    assert errors[0] <= 2 * torch.finfo(dtype).eps
    assert max(errors) <= 1.3 * errors[0]


def test_a_run_that_overflows_in_float16_stops_and_says_so(fit: Fit) -> None:
    """A float32 model whose activations are beyond 65504 trains, in float16 it does not."""
    made = []
    for dtype in (torch.float32, torch.float16):
        model = mild_model("gpt2")
        model.transformer.h[0].mlp.c_proj.weight.data.mul_(1e6)
        if dtype == torch.float32:
            method, _ = fit("gpt2", dtype, model)
        else:
            model.transformer.h[0].mlp.c_proj.weight.data.clamp_(-6e4, 6e4)
            with pytest.warns(UserWarning, match="loss or gradient not finite by step 1"):
                method, _ = fit("gpt2", dtype, model)
        made.append((method.status == FAILED).tolist())
        assert method.trained.isfinite().all()
    assert made == [[False, False], [True, True]]


def test_scaling_the_loss_of_a_step_comes_too_late(backbone: Callable[..., Backbone]) -> None:
    """Why 16-mixed is refused: gradients that float16 lost are lost, whatever the trainer scales.

    Reference: float32, and the same rows with the scale within the step, where it would help.
    """
    model, scale, small = backbone("gpt2"), 2.0**16, 2.0**-24
    prompts = torch.randn(1, 5, model.hidden_size, generator=torch.Generator().manual_seed(0))
    prompts.requires_grad_()
    batch = model.batch(["a dog", "the sea by the house"], ["yes", "no"])

    def gradient(weight: float, autocast: bool, outer: float = 1.0) -> Tensor:
        """Gradient of a loss that is scaled by ``outer`` as Lightning's scaler does it."""
        batch.weight.fill_(weight)
        with torch.autocast("cpu", torch.float16, autocast):
            losses, inner = bank_gradient(model, prompts, batch, 2048)
            loss = with_gradient(losses.sum(), prompts, inner)
        (made,) = torch.autograd.grad(loss * outer, prompts)
        return made.flatten() / outer

    true = gradient(small, autocast=False)
    late, early = gradient(small, True, scale), gradient(small * scale, True) / scale
    assert torch.cosine_similarity(true, early, dim=0) > 0.999
    assert torch.cosine_similarity(true, late, dim=0) < 0.9
