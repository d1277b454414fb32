"""A random subspace of all parameters of a model, by the Fastfood transform.

One vector v of ``dim`` numbers moves every parameter tensor: theta = theta_0 + P v with a fixed
random P (Aghajanyan et al. 2021, arXiv 2012.13255, eq. 1 and 2). P would be dense and huge.
Fastfood (Le et al. 2013, arXiv 1408.3060) replaces it by random signs B, a Walsh-Hadamard
transform H, a permutation Pi, Gaussian factors G and H again, in O(n log n) time and O(n) memory
for a tensor of n numbers. Here is the map only; applying the increments to a model belongs to the
method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class FastfoodMap(nn.Module):
    """v (dim,) to one increment per parameter tensor: P = S H G Pi H B, independent per tensor.

    v is filled with zeros up to L, the lowest power of two that holds both the tensor's n numbers
    and v; the first n numbers of the result are kept. S is the one factor
    1 / (sqrt(L sum(G^2)) sqrt(n / L)) before unnormalised H, as in Aghajanyan et al.'s code.

    Scale: for |v| = 1 the increment of **each** tensor has an expected squared norm of 1, whatever
    its size (root mean square 1 / sqrt(n) per number), so that of all T tensors together has T.
    v = 0 is the model as it was.

    Memory: 8 bytes per number of L (Pi int32, G float32), so 8 to 16 bytes per parameter of a
    tensor with n >= dim, and dim bytes per tensor (B int8). They are drawn from ``seed`` on the
    CPU, are the same on every device, and are not part of the state dict. A call needs at most 4
    numbers per number of the largest L for a moment, beside the increments; autograd keeps no
    activation of that size, since the map is linear.

    Where this departs from the authors' code: the gradient is exact (theirs is scaled by 1 / L per
    tensor), and tensors shorter than v still see all of it (theirs see its first numbers only).

    Args:
        sizes: number of elements of every tensor, by name; the draws follow this order.
        dim: length of v.
        seed: of B, Pi and G; torch's global generator is not touched.

    Raises:
        ValueError: no tensor, or a size or dim below 1.
    """

    signs: Tensor
    permutation: Tensor
    gaussian: Tensor

    def __init__(self, sizes: Mapping[str, int], dim: int, seed: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}: give a positive number")
        empty = [name for name, size in sizes.items() if size < 1]
        if empty or not sizes:
            raise ValueError(f"{len(sizes)} tensors, without elements: {empty}; leave those out")
        self.sizes, self.dim = dict(sizes), dim
        self.lengths = [_power_of_two(max(size, dim)) for size in sizes.values()]
        generator = torch.Generator("cpu").manual_seed(seed)
        total = sum(self.lengths)
        signs = torch.empty(len(sizes), dim, dtype=torch.int8)
        permutation = torch.empty(total, dtype=torch.int32)
        gaussian = torch.empty(total)
        self.scales = []
        parts = zip(permutation.split(self.lengths), gaussian.split(self.lengths), strict=True)
        for at, (size, (places, factors)) in enumerate(zip(sizes.values(), parts, strict=True)):
            signs[at].random_(0, 2, generator=generator).mul_(2).sub_(1)
            torch.randperm(len(places), generator=generator, out=places)
            factors.normal_(generator=generator)
            self.scales.append(_scale(factors, size, dim))
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("permutation", permutation, persistent=False)
        self.register_buffer("gaussian", gaussian, persistent=False)

    def forward(self, v: Tensor) -> dict[str, Tensor]:
        """Increments of all tensors: P v, flat.

        Args:
            v: (dim,).

        Returns:
            Name -> (n,), differentiable with respect to v, in its floating point type.

        Raises:
            ValueError: v of another shape.
        """
        if v.shape != (self.dim,):
            raise ValueError(f"v is {tuple(v.shape)}; this map takes ({self.dim},)")
        padding = _power_of_two(self.dim) - self.dim
        mixed = walsh_hadamard(nn.functional.pad(v * self.signs, (0, padding)))
        permutations = self.permutation.split(self.lengths)
        gaussians = self.gaussian.split(self.lengths)
        return {
            name: _increment(mixed[at], permutations[at], gaussians[at], self.scales[at], size)
            for at, (name, size) in enumerate(self.sizes.items())
        }


def walsh_hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform of the last axis, in Sylvester's order, in O(n log n).

    Normalised by 1 / sqrt(n), so that the matrix is orthogonal, symmetric and its own inverse: the
    gradient is the same transform of the gradient.

    Args:
        x: (..., n), n a power of two.

    Returns:
        (..., n), differentiable any number of times.

    Raises:
        ValueError: a last axis that is not a power of two.
    """
    if x.dim() < 1 or x.shape[-1] < 1 or x.shape[-1] != _power_of_two(x.shape[-1]):
        raise ValueError(f"x is {tuple(x.shape)}: the last axis must be a power of two")
    return _WalshHadamard.apply(x)


class _WalshHadamard(torch.autograd.Function):
    """The transform as one node of the graph, with no tensor kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Passes of sums and differences between two buffers, log2(n) of them.

        No matrix products: autocast and reduced-precision products do not change the result.
        """
        size = x.shape[-1]
        now, other = x * size**-0.5, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        now = now.contiguous()
        step = 1
        while step < size:
            first, second = now.view(-1, 2, step).unbind(1)
            plus, minus = other.view(-1, 2, step).unbind(1)
            torch.add(first, second, out=plus)
            torch.sub(first, second, out=minus)
            now, other = other, now
            step *= 2
        return now

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The matrix is symmetric: the gradient's own transform."""
        return walsh_hadamard(gradients[0])


def _increment(mixed: Tensor, places: Tensor, factors: Tensor, scale: float, size: int) -> Tensor:
    """S H G Pi of one tensor, given H B v.

    Args:
        mixed: (M,) transform of B v over M numbers, the lowest power of two that holds v. Over L
            numbers, all but the first M zero, the transform is M's repeated L / M times.
        places: (L,) int32, Pi.
        factors: (L,) G.
        scale: S for orthonormal transforms.
        size: n.
    """
    repeated = mixed.repeat(len(places) // len(mixed))
    # places hold no number twice, so the backward pass adds nothing in a varying order
    return walsh_hadamard(repeated.index_select(0, places) * factors)[:size] * scale


def _scale(factors: Tensor, size: int, dim: int) -> float:
    """S for transforms normalised over L and over M numbers: sqrt(L M) / sqrt(n sum(G^2))."""
    factors = factors.double()
    squares = factors.dot(factors).item()
    return (len(factors) * _power_of_two(dim) / (size * squares)) ** 0.5


def _power_of_two(size: int) -> int:
    """The lowest power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()
