"""Mixtures of prompts against formulas in NumPy, loops over rows, and central differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from prompt_lab.core.attention_mixture import (
    PromptAttention,
    max_pool,
    mix,
    row_prompts,
    similarity_weights,
)

ROWS, LENGTH, TOKENS, WIDTH, SOURCES = 3, 7, 4, 6, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_attention(**settings) -> PromptAttention:
    """G in float64, its LayerNorm away from where it starts."""
    attention = PromptAttention(WIDTH, 3, **settings).double()
    with torch.no_grad():
        attention.norm.weight.copy_(drawn(WIDTH, seed=8))
        attention.norm.bias.copy_(drawn(WIDTH, seed=9))
    return attention


def reference_weights(attention: PromptAttention, row: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The paper's formula for one input (S, D) and the keys (J + 1, D) of its prompts."""
    down, up, scale, shift = (
        tensor.detach().numpy()
        for tensor in (
            attention.down.weight,
            attention.up.weight,
            attention.norm.weight,
            attention.norm.bias,
        )
    )
    inner = down @ row.max(axis=0)
    inner = up @ (inner / (1 + np.exp(-inner)))
    inner = (inner - inner.mean()) / np.sqrt(inner.var() + 1e-5) * scale + shift
    raised = np.exp(keys @ inner / attention.temperature)
    return raised / raised.sum()


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_weights_are_those_of_the_formula_row_by_row(temperature):
    attention = make_attention(temperature=temperature)
    inputs, lengths = drawn(ROWS, LENGTH, WIDTH), [7, 3, 1]
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    sources, targets = drawn(SOURCES, TOKENS, WIDTH, seed=1), drawn(ROWS, TOKENS, WIDTH, seed=2)
    found = attention(max_pool(inputs, mask), sources.amax(1), targets.amax(1))
    for row, length in enumerate(lengths):
        keys = torch.cat([sources, targets[row : row + 1]]).amax(1).numpy()
        expected = reference_weights(attention, inputs[row, :length].numpy(), keys)
        np.testing.assert_allclose(found[row].detach().numpy(), expected, rtol=1e-12)


def test_padding_on_either_side_changes_nothing():
    inputs = drawn(1, 3, WIDTH)
    junk = 100 + drawn(1, 4, WIDTH, seed=1)
    own = max_pool(inputs, torch.ones(1, 3))
    right = max_pool(torch.cat([inputs, junk], 1), torch.tensor([[1, 1, 1, 0, 0, 0, 0]]))
    left = max_pool(torch.cat([junk, inputs], 1), torch.tensor([[0, 0, 0, 0, 1, 1, 1]]))
    assert torch.equal(own, right)
    assert torch.equal(own, left)


def test_the_prompt_of_a_row_counts_the_target_once_more():
    weights = torch.softmax(drawn(ROWS, SOURCES + 1), 1)
    sources, targets = drawn(SOURCES, TOKENS, WIDTH, seed=1), drawn(ROWS, TOKENS, WIDTH, seed=2)
    found = row_prompts(weights, sources, targets).numpy()
    for row in range(ROWS):
        expected = targets[row].numpy().copy()
        for source in range(SOURCES):
            expected += weights[row, source].item() * sources[source].numpy()
        expected += weights[row, SOURCES].item() * targets[row].numpy()
        np.testing.assert_allclose(found[row], expected, rtol=1e-12)


def test_gradients_are_those_of_central_differences():
    """Of the prompts of rows with respect to the target prompts, and to all weights of G."""
    attention, pooled = make_attention(temperature=2.0), drawn(ROWS, WIDTH)
    sources = drawn(SOURCES, TOKENS, WIDTH, seed=1)
    names, values = zip(*attention.named_parameters(), strict=True)

    def made(targets: Tensor, *weights: Tensor) -> Tensor:
        """The prompts of rows, as a function of what is trained."""
        given = (pooled, sources.amax(1), targets.amax(1))
        parts = torch.func.functional_call(attention, dict(zip(names, weights, strict=True)), given)
        return row_prompts(parts, sources, targets)

    targets = drawn(ROWS, TOKENS, WIDTH, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(made, (targets, *values))


def test_no_rows_have_no_weights_and_reach_all_parameters():
    attention = make_attention()
    empty = drawn(0, WIDTH)
    weights = attention(empty, drawn(SOURCES, WIDTH), empty)
    assert weights.shape == (0, SOURCES + 1)
    gradients = torch.autograd.grad(weights.sum(), list(attention.parameters()))
    assert not any(gradient.any() for gradient in gradients)


def test_similarity_weights_are_cosines_of_mean_rows_over_their_sum():
    target, sources = drawn(TOKENS, WIDTH), drawn(SOURCES, 2, WIDTH, seed=1)
    own, others = target.numpy().mean(0), sources.numpy().mean(1)
    cosines = others @ own / np.linalg.norm(others, axis=1) / np.linalg.norm(own)
    assert cosines.min() < 0 < cosines.max()
    expected = np.maximum(cosines, 0)
    found = similarity_weights(target, sources)
    np.testing.assert_allclose(found.numpy(), expected / expected.sum(), rtol=1e-12)
    scaled = similarity_weights(
        3 * target, sources * torch.tensor([1, 2, 3, 4, 5.0])[:, None, None]
    )
    torch.testing.assert_close(found, scaled)


def test_a_mixture_is_the_weighted_sum():
    weights, prompts = drawn(SOURCES), drawn(SOURCES, TOKENS, WIDTH, seed=1)
    expected = np.einsum("j,jnd->nd", weights.numpy(), prompts.numpy())
    np.testing.assert_allclose(mix(weights, prompts).numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: PromptAttention(0), "hidden_size is 0"),
        (lambda: PromptAttention(4, 0), "inner_size is 0"),
        (lambda: PromptAttention(4, temperature=0.0), "temperature is 0.0"),
        (lambda: max_pool(drawn(2, 3, 4), torch.ones(2, 4)), r"embeddings \(2, 3, 4\)"),
        (lambda: max_pool(drawn(2, 0, 4), torch.ones(2, 0)), "no positions"),
        (lambda: make_attention()(drawn(2, 6), drawn(5, 4), drawn(2, 6)), r"\(5, 4\)"),
        (lambda: make_attention()(drawn(2, 6), drawn(5, 6), drawn(3, 6)), r"\(3, 6\)"),
        (lambda: row_prompts(drawn(2, 5), drawn(5, 3, 4), drawn(2, 3, 4)), r"weights \(2, 5\)"),
        (lambda: row_prompts(drawn(2, 6), drawn(5, 3, 4), drawn(2, 2, 4)), r"targets \(2, 2, 4\)"),
        (lambda: mix(drawn(4), drawn(5, 3, 4)), r"weights \(4,\)"),
        (lambda: similarity_weights(drawn(3, 4), drawn(2, 3, 5)), "width 4 and sources"),
        (lambda: similarity_weights(drawn(3, 4), torch.zeros(2, 3, 4)), "2 mean rows"),
        (lambda: similarity_weights(drawn(3, 4), -drawn(3, 4)[None]), "none of 1 source prompts"),
    ],
)
def test_what_does_not_fit_is_refused(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()
