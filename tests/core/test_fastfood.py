"""The Fastfood map against its explicit matrix, its gradient, and the scale it promises."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from prompt_lab.core.fastfood import FastfoodMap, walsh_hadamard

DIM = 5
SIZES = {"embedding": 37, "layer.weight": 16, "layer.bias": 3, "gain": 1, "head.bias": 8}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(mapping: FastfoodMap, name: str) -> Tensor:
    """P (n, dim) of one tensor, multiplied out from full L x L matrices of the definition."""
    at = list(SIZES).index(name)
    size, length = SIZES[name], mapping.lengths[at]
    places = mapping.permutation.split(mapping.lengths)[at].long()
    factors = mapping.gaussian.split(mapping.lengths)[at].double()
    transform = torch.from_numpy(hadamard(length)).double()
    signs = torch.zeros(length, mapping.dim, dtype=torch.float64)
    signs[torch.arange(mapping.dim), torch.arange(mapping.dim)] = mapping.signs[at].double()
    permute = torch.eye(length, dtype=torch.float64)[places]
    divisor = (length * factors.square().sum()).sqrt() * (size / length) ** 0.5
    product = transform @ torch.diag(factors) @ permute @ transform @ signs
    return product[:size] / divisor


# ---- Walsh-Hadamard transform -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 32, 256])
def test_transform_equals_scipys_matrix(size: int) -> None:
    x = draw(3, 2, size)
    expected = x @ torch.from_numpy(hadamard(size)).double() / size**0.5
    torch.testing.assert_close(walsh_hadamard(x), expected)


def test_transform_is_its_own_inverse_and_keeps_norms_and_its_input() -> None:
    x = draw(2, 64)
    kept = x.clone()
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), x)
    torch.testing.assert_close(walsh_hadamard(x).norm(), x.norm())
    assert torch.equal(x, kept)


def test_gradient_of_the_transform_is_the_transform_of_the_gradient() -> None:
    """Not that divided by its length, as in the original."""
    x, outer = draw(64).requires_grad_(), draw(64, seed=1)
    (gradient,) = torch.autograd.grad(walsh_hadamard(x), x, outer)
    torch.testing.assert_close(gradient, walsh_hadamard(outer))
    assert gradcheck(walsh_hadamard, draw(2, 8).requires_grad_())
    assert gradgradcheck(lambda y: walsh_hadamard(y) ** 3, draw(2, 8).requires_grad_())


def test_transform_refuses_lengths_that_are_no_powers_of_two() -> None:
    for x in (torch.zeros(6), torch.zeros(4, 0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="the last axis must be a power of two"):
            walsh_hadamard(x)


# ---- the map ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, DIM, 8, 21])
def test_map_and_gradient_equal_the_explicit_matrix(dim: int) -> None:
    """In float64, for tensors longer and shorter than v, of powers of two and not."""
    mapping = FastfoodMap(SIZES, dim, seed=3)
    v = draw(dim).requires_grad_()
    increments = mapping(v)
    assert {name: tensor.shape for name, tensor in increments.items()} == {
        name: (size,) for name, size in SIZES.items()
    }
    for name, found in increments.items():
        expected = matrix(mapping, name)
        outer = draw(SIZES[name], seed=1)
        (gradient,) = torch.autograd.grad(found, v, outer, retain_graph=True)
        torch.testing.assert_close(found, expected @ v, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected.t() @ outer, rtol=1e-12, atol=1e-12)


def test_gradcheck_through_all_tensors_at_once() -> None:
    mapping = FastfoodMap(SIZES, DIM, seed=3)
    assert gradcheck(lambda v: tuple(mapping(v).values()), draw(DIM).requires_grad_())


def test_autocast_does_not_round_the_map() -> None:
    mapping = FastfoodMap(SIZES, DIM, seed=3)
    v = draw(DIM).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = mapping(v)
    assert all(torch.equal(cast[name], found) for name, found in mapping(v).items())


# ---- scale --------------------------------------------------------------------------------------


def test_expected_squared_norm_is_that_of_v_for_every_size() -> None:
    """Mean over 500 seeds, within four standard errors."""
    v = 3 * draw(DIM) / draw(DIM).norm()
    maps = [FastfoodMap(SIZES, DIM, seed) for seed in range(500)]
    norms = torch.tensor([[x.square().sum().item() for x in m(v).values()] for m in maps])
    error = norms.std(0) / len(norms) ** 0.5
    assert ((norms.mean(0) - 9).abs() < 4 * error).all()


# ---- draws and memory ---------------------------------------------------------------------------


def test_autograd_keeps_no_activation_of_the_tensors_length() -> None:
    mapping = FastfoodMap({"a": 3000, "b": 4096}, 16, seed=0)
    own = {buffer.untyped_storage().data_ptr() for buffer in mapping.buffers()}
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mapping(torch.zeros(16, requires_grad=True))
    assert sum(kept) <= 2 * 16 * 4


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="dim is 0"):
        FastfoodMap(SIZES, 0, seed=0)
    with pytest.raises(ValueError, match=r"without elements: \['b'\]"):
        FastfoodMap({"a": 2, "b": 0}, DIM, seed=0)
    with pytest.raises(ValueError, match="0 tensors"):
        FastfoodMap({}, DIM, seed=0)
    with pytest.raises(ValueError, match=r"v is \(6,\); this map takes \(5,\)"):
        FastfoodMap(SIZES, DIM, seed=0)(torch.zeros(6))
