"""The auto-encoder of prompts against NumPy and PCA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from prompt_lab.core.subspace import Subspace, reconstruction_loss

N, D, H = 4, 6, 7
CODE = 3


def make(inner_size: int | None = H, seed: int = 0) -> Subspace:
    return Subspace(N, D, CODE, inner_size, seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the maps -----------------------------------------------------------------------------------


def test_maps_equal_the_formulas_of_the_paper() -> None:
    """Proj(p) = A p + a; Back(c) = W2 tanh(W1 c + b1) + b2; in NumPy."""
    subspace, prompts = make(), draw(5, N, D)
    weights = [tensor.double().numpy() for tensor in subspace.state_dict().values()]
    a, a0, w1, b1, w2, b2 = weights
    codes = prompts.double().numpy().reshape(5, N * D) @ a.T + a0
    expected = (np.tanh(codes @ w1.T + b1) @ w2.T + b2).reshape(5, N, D)
    with torch.no_grad():
        np.testing.assert_allclose(subspace.project(prompts), codes, atol=1e-5)
        np.testing.assert_allclose(subspace(prompts), expected, atol=1e-5)
        back = subspace.back_project(torch.from_numpy(codes).float())
    np.testing.assert_allclose(back, expected, atol=1e-5)


def test_without_an_inner_size_the_way_back_is_one_linear_layer() -> None:
    subspace = make(inner_size=None)
    a, b = draw(2, CODE), draw(2, CODE, seed=1)
    with torch.no_grad():
        zero, both = subspace.back_project(torch.zeros(2, CODE)), subspace.back_project(a + b)
        sum_ = subspace.back_project(a) + subspace.back_project(b)
    torch.testing.assert_close(both, sum_ - zero)
    assert sum(p.numel() for p in subspace.parameters()) == 2 * N * D * CODE + CODE + N * D


def test_the_papers_sizes_give_the_papers_number_of_parameters() -> None:
    """100 tokens of 768, I = 250, H = 768: 19.2, 0.19 and 59.06 million, with biases."""
    with torch.device("meta"):
        subspace = Subspace(100, 768, 250, seed=None)
    sizes = [p.numel() for p in subspace.parameters()]
    assert sizes == [250 * 76800, 250, 768 * 250, 768, 76800 * 768, 76800]
    assert all(p.dtype == torch.float32 for p in subspace.parameters())


def test_autocast_does_not_round_prompts() -> None:
    subspace, prompts = make(), draw(5, N, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = subspace(prompts)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, subspace(prompts))


def test_wrong_shapes_and_sizes_are_refused() -> None:
    subspace = make()
    for shape in ((5, D, N), (N, D), (5, N * D)):
        with pytest.raises(ValueError, match=r"this subspace takes \(R, 4, 6\)"):
            subspace.project(torch.zeros(shape))
    for shape in ((CODE,), (2, CODE + 1)):
        with pytest.raises(ValueError, match=r"this subspace takes \(R, 3\)"):
            subspace.back_project(torch.zeros(shape))
    with pytest.raises(ValueError, match="intrinsic_dim is 0"):
        Subspace(N, D, 0)
    with pytest.raises(ValueError, match="inner_size is 0"):
        Subspace(N, D, CODE, 0)


# ---- reconstruction -----------------------------------------------------------------------------


def test_reconstruction_loss_is_a_squared_norm_or_its_mean_per_prompt() -> None:
    a, b = draw(5, N, D), draw(5, N, D, seed=1)
    square = [((x - y).numpy() ** 2).sum() for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(reconstruction_loss(a, b), square, rtol=1e-5)
    mean = reconstruction_loss(a, b, "mean")
    np.testing.assert_allclose(mean, np.array(square) / (N * D), rtol=1e-5)


def test_reconstruction_loss_refuses_other_shapes_and_reductions() -> None:
    with pytest.raises(ValueError, match="must both be"):
        reconstruction_loss(draw(1, N, D), draw(5, N, D))
    with pytest.raises(ValueError, match="allowed: 'sum', 'mean'"):
        reconstruction_loss(draw(1, N, D), draw(1, N, D), "none")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1])
def test_linear_maps_reach_the_error_of_pca(seed: int) -> None:
    """24 prompts of 60 numbers, I = 5: within 1 % of the SVD of the centred prompts."""
    count, tokens, width, dim = 24, 10, 6, 5
    spread = torch.linspace(1, 0.2, tokens * width).double()
    mean = draw(tokens * width, seed=10)
    flat = 0.3 * (mean + draw(count, tokens * width, seed=seed).double() * spread)
    prompts = flat.view(count, tokens, width)
    subspace = Subspace(tokens, width, dim, inner_size=None, seed=seed).double()
    optimizer = torch.optim.LBFGS(
        subspace.parameters(),
        max_iter=300,
        history_size=100,
        tolerance_grad=1e-10,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = reconstruction_loss(subspace(prompts), prompts).sum()
        value.backward()
        return value

    optimizer.step(loss)
    singular = np.linalg.svd((flat - flat.mean(0)).numpy(), compute_uv=False)
    pca = (singular[dim:] ** 2).sum()
    reached = loss().item()
    assert pca * (1 - 1e-9) <= reached <= pca * 1.01
