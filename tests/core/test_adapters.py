"""Adapters of a bank, against copies of the model that carry one set of adapters each.

The reference wraps the sublayers of a copied model, named here by hand, in the formula of the
paper, and runs one row at a time without padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import HIDDEN, KINDS, make_backbone
from torch import Tensor

from prompt_lab.core.adapters import AdaptedBackbone, AdapterLayout, RowAdapters, adapters
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import bank_gradient
from prompt_lab.core.batch import Batch
from prompt_lab.core.pretrained import weights_digest

R = 3  # the bottleneck
TEXTS = ["the small dog", "a cat ran over the red field and no sea", "no", "she likes long books"]
TARGETS = ["yes", "no way", "maybe positive yes", "no"]
INDEX = [0, 2, 1, 2]
CANDIDATES = ["yes", "yes no maybe", "yes no positive", "no way", "no dog ran over"]

_T5 = [
    *(f"encoder.block.{i}.layer.{part}" for i in (0, 1) for part in (0, 1)),
    *(f"decoder.block.{i}.layer.{part}" for i in (0, 1) for part in (0, 2)),
]
_T5 = [f"{name}.{'SelfAttention' if name.endswith('.0') else 'DenseReluDense'}" for name in _T5]
_LLAMA = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")]
SUBLAYERS = {
    "t5": _T5,
    "mt5": _T5,
    "bart": [
        f"model.{side}.layers.{i}.{part}"
        for side in ("encoder", "decoder")
        for i in (0, 1)
        for part in ("self_attn", "fc2")
    ],
    "gpt2": [f"transformer.h.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")],
    "bloom": [  # its sublayers add the residual themselves
        f"transformer.h.{i}.{part}"
        for i in (0, 1)
        for part in ("self_attention.dense", "mlp.dense_4h_to_h")
    ],
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_window": _LLAMA,
}


def make_bank(kind: str, count: int = 3, seed: int = 3) -> Tensor:
    """Random sets of adapters (R, 1, P) that change answers."""
    size = len(SUBLAYERS[kind]) * 2 * HIDDEN * R
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, size, generator=generator) * 0.3


def carrying(model: Backbone, kind: str, flat: Tensor) -> Backbone:
    """A copy of the model with one set of adapters (P,) wrapped around its sublayers."""
    copied = copy.deepcopy(model)
    matrices = flat.view(-1, 2, HIDDEN, R)
    for at, name in enumerate(SUBLAYERS[kind]):
        module = copied.model.get_submodule(name)
        module.forward = _wrapped(module.forward, *matrices[at])
    return copied


def _wrapped(forward: Callable[..., Any], down: Tensor, up: Tensor) -> Callable[..., Any]:
    """h + W_up swish(W_down h) of a sublayer's output, one product of a vector at a time."""

    def adapted(*args: Any, **kwargs: Any) -> Any:
        made = forward(*args, **kwargs)
        hidden = made[0] if isinstance(made, tuple) else made
        inner = torch.einsum("btd,dr->btr", hidden, down)
        changed = hidden + torch.einsum("btr,dr->btd", inner * torch.sigmoid(inner), up)
        return (changed, *made[1:]) if isinstance(made, tuple) else changed

    return adapted


def rows_alone(model: Backbone, kind: str, bank: Tensor) -> list[tuple[Backbone, Batch]]:
    """Every row of ``TEXTS`` by itself, with a model that carries its adapters."""
    return [
        (carrying(model, kind, bank[INDEX[i], 0]), model.batch([TEXTS[i]], [TARGETS[i]]))
        for i in range(len(TEXTS))
    ]


def without(model: Backbone) -> Tensor:
    """A prompt of no tokens."""
    return torch.zeros(1, 0, HIDDEN, dtype=model.model.dtype)


@pytest.fixture
def adapted(backbone) -> Callable[[str], AdaptedBackbone]:
    """Factory of tiny backbones with adapters."""
    return lambda kind: AdaptedBackbone(backbone(kind), R)


def test_adapters_take_over_what_was_found_of_a_model(monkeypatch):
    """Nothing is checked again, not even where the model's settings have changed since."""
    plain = make_backbone("gpt2")
    plain.model.set_attn_implementation("eager")
    monkeypatch.setattr("prompt_lab.core.backbone.choose_way", pytest.fail)
    adapted = AdaptedBackbone(plain, R)
    assert (adapted.runner.way, adapted.packs) == ("causal", False)
    assert (plain.packs, plain.hidden_size) == (True, HIDDEN)


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_up_projection_is_the_plain_backbone(backbone, adapted, kind):
    plain, model = backbone(kind), adapted(kind)
    bank = make_bank(kind)
    bank.view(3, -1, 2, HIDDEN, R)[:, :, 1] = 0
    batch = plain.batch(TEXTS, TARGETS, INDEX)
    bare = plain.batch(TEXTS, TARGETS)
    none = without(plain)
    torch.testing.assert_close(model.loss(bank, batch), plain.loss(none, bare))
    scores = plain.score(none, bare, CANDIDATES)
    torch.testing.assert_close(model.score(bank, batch, CANDIDATES), scores)
    assert model.generate(bank, batch, 8) == plain.generate(none, bare, 8)
    torch.testing.assert_close(
        model.loss(bank[:, :0], batch), plain.loss(none, bare)
    )  # and no adapters


@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_of_adapters_is_as_many_models(backbone, adapted, kind):
    """Losses and the gradient with respect to the bank, against a loop over rows."""
    bank = make_bank(kind).requires_grad_()
    model = adapted(kind)
    batch = model.batch(TEXTS, TARGETS, INDEX)
    losses = model.loss(bank, batch)
    (found,) = torch.autograd.grad(losses.sum(), bank)
    alone = [m.loss(without(m), row)[0] for m, row in rows_alone(backbone(kind), kind, bank)]
    (expected,) = torch.autograd.grad(sum(alone), bank)
    torch.testing.assert_close(losses, torch.stack(alone)[batch.rows], rtol=2e-5, atol=1e-5)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-4
    assert expected.flatten(1).norm(dim=1).min() > 0.01
    plain = backbone(kind).loss(without(model), model.batch(TEXTS, TARGETS))
    assert (losses - plain).abs().min() > 1e-3  # the adapters do something to each row


@pytest.mark.parametrize("kind", ["t5", "bart", "llama"])
def test_answers_are_those_of_the_models_alone(backbone, adapted, kind):
    bank, model = make_bank(kind), adapted(kind)
    batch = model.batch(TEXTS, TARGETS, INDEX)
    alone = [rows_alone(backbone(kind), kind, bank)[i] for i in batch.rows]
    scores = model.score(bank, batch, CANDIDATES)
    expected = torch.cat([m.score(without(m), row, CANDIDATES) for m, row in alone])
    torch.testing.assert_close(scores, expected, rtol=2e-5, atol=1e-4)
    for beams in (1, 3):
        found = model.generate(bank, batch, 8, beams)
        assert found == [m.generate(without(m), row, 8, beams)[0] for m, row in alone]


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
def test_choosing_keeps_each_rows_adapters_while_rows_are_dropped(adapted, kind, monkeypatch):
    """Rows that are decided early are dropped; the scores of the choices stay exact."""
    alike = [f"yes{end}" for end in ("", " a", " a b", " no", " no b", " e", " e f", " g")]
    various = [*CANDIDATES, "maybe the dog", "a cat", "she likes", "long books by the sea", "red"]
    bank, model = make_bank(kind, count=5), adapted(kind)
    index = [i % 5 for i in range(20)]
    batch = model.batch([f"{TEXTS[i % 4]} {i}" for i in range(20)], None, index)
    kept: list[int] = []
    keep = RowAdapters.keep

    def noted(self: RowAdapters, places: Tensor) -> None:
        kept.append(len(places))
        keep(self, places)

    monkeypatch.setattr(RowAdapters, "keep", noted)
    for labels in (alike, various):
        expected = model.score(bank, batch, labels)
        answers = model._encode_candidates(tuple(labels))
        with torch.no_grad():
            found = model.scores_of(model.prefix(bank), batch, answers, exhaustive=False)
        torch.testing.assert_close(found.amax(1), expected.amax(1), rtol=1e-5, atol=1e-4)
        assert model.choose(bank, batch, labels) == expected.argmax(1).tolist()
    assert 0 < min(kept) < 20


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_micro_batches_give_the_gradient_of_one_batch(adapted, kind):
    bank, model = make_bank(kind), adapted(kind)
    batch = model.batch(TEXTS, TARGETS, INDEX)
    _, small = bank_gradient(model, bank, batch, tokens_per_forward=20)
    _, large = bank_gradient(model, bank, batch, tokens_per_forward=2000)
    leaf = bank.clone().requires_grad_()
    (whole,) = torch.autograd.grad(model.loss(leaf, batch).sum(), leaf)
    for found in (small, large):
        assert ((found - whole).norm() / whole.norm()).item() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_places_are_after_self_attention_and_feed_forward(backbone, kind):
    layout = AdapterLayout.of(backbone(kind), R)
    own = SUBLAYERS[kind]
    assert len(layout.names) == len(own)
    assert all(name.startswith(place) for name, place in zip(layout.names, own, strict=True))
    assert not any("EncDec" in name or "encoder_attn" in name for name in layout.names)
    assert layout.size == make_bank(kind).shape[2]


def test_the_backbone_is_as_before(adapted):
    plain = make_backbone("t5")
    before = weights_digest(plain.model)
    model = AdaptedBackbone(plain, R)
    batch = plain.batch(TEXTS, TARGETS)
    losses = plain.loss(without(plain), batch)
    model.loss(make_bank("t5"), model.batch(TEXTS, TARGETS, INDEX))
    with (
        pytest.raises(KeyError),
        adapters(plain, model.layout, make_bank("t5")[:, 0], torch.tensor([0])),
    ):
        raise KeyError
    assert weights_digest(plain.model) == before == model.digest
    assert not any(module._forward_hooks for module in plain.model.modules())
    assert torch.equal(plain.loss(without(plain), batch), losses)


def test_half_precision_weights_take_adapters(backbone):
    model = AdaptedBackbone(backbone("bart", torch.bfloat16), R)
    bank = make_bank("bart").requires_grad_()
    batch = model.batch(TEXTS, TARGETS, INDEX)
    losses = model.loss(bank, batch)
    (gradient,) = torch.autograd.grad(losses.sum(), bank)
    assert losses.dtype == gradient.dtype == torch.float32
    full = AdaptedBackbone(backbone("bart"), R).loss(make_bank("bart"), batch)
    torch.testing.assert_close(losses, full, rtol=0.1, atol=0.1)


def test_wrong_shapes_are_refused(backbone, adapted):
    model, bank = adapted("t5"), make_bank("t5")
    batch = model.batch(TEXTS, TARGETS, INDEX)
    for wrong in (bank[:, 0], bank[..., 1:], bank.repeat(1, 2, 1)):
        with pytest.raises(ValueError, match=r"bottleneck 3 takes \(R, 1, 1536\)"):
            model.loss(wrong, batch)
    with (
        pytest.raises(ValueError, match=r"takes \(R, 1536\)"),
        adapters(model, model.layout, bank, batch.prompt_index),
    ):
        pass
    with pytest.raises(ValueError, match="bottleneck is 0: give at least 1"):
        AdapterLayout.of(backbone("t5"), 0)
    with (
        pytest.raises(RuntimeError, match="4 rows for the adapters of 3"),
        adapters(model, model.layout, bank[:, 0], batch.prompt_index[:3]),
    ):
        backbone("t5").loss(without(model), model.batch(TEXTS, TARGETS))
