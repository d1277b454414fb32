"""The intrinsic subspace of soft prompts: an auto-encoder of whole prompts; a map to adapters.

Intrinsic prompt tuning (Qin et al. 2021, arXiv 2110.07867, section 3.2) flattens a prompt (N, D),
projects it linearly to I numbers and maps these back through one hidden layer. Subspace finding
trains both maps on the prompts of many tasks; tuning in the subspace then keeps the way back and
trains I numbers per run. The language model loss, and what is trained when, belong to the method
and are not here.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn


class Subspace(nn.Module):
    """Prompts (R, N, D) to codes (R, I) and back.

    ``Proj`` is linear, N·D -> I; ``Back`` is linear, tanh, linear, I -> H -> N·D. Both have biases.
    A random subspace (baseline of the paper's section 4.3) is this module untrained.

    Args:
        num_virtual_tokens: N.
        hidden_size: D, width of the backbone.
        intrinsic_dim: I.
        inner_size: H; None makes the way back one linear layer, I -> N·D.
        seed: of the initial weights, drawn as ``torch.nn.Linear`` draws them but without touching
            torch's global generator; None leaves them without storage, to be assigned.

    Attributes:
        metadata: what a subspace file says about it; empty for a new one.

    Raises:
        ValueError: a size below 1.
    """

    KIND: ClassVar = "subspace"
    SIZES: ClassVar = ("num_virtual_tokens", "hidden_size", "intrinsic_dim", "inner_size")

    def __init__(
        self,
        num_virtual_tokens: int,
        hidden_size: int,
        intrinsic_dim: int,
        inner_size: int | None = 768,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.num_virtual_tokens, self.hidden_size = num_virtual_tokens, hidden_size
        self.intrinsic_dim, self.inner_size = intrinsic_dim, inner_size
        self.metadata: dict[str, Any] = {}
        for name, size in self.sizes().items():
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}: give a positive number")
        full = num_virtual_tokens * hidden_size
        with torch.device("meta"):
            self.proj = nn.Linear(full, intrinsic_dim)
            if inner_size is None:
                self.back = nn.Sequential(nn.Linear(intrinsic_dim, full))
            else:
                first, last = nn.Linear(intrinsic_dim, inner_size), nn.Linear(inner_size, full)
                self.back = nn.Sequential(first, nn.Tanh(), last)
        if seed is not None:
            self.to_empty(device="cpu")
            self._draw(seed)

    def sizes(self) -> dict[str, int | None]:
        """N, D, I and H by their names, or what else makes another of its kind."""
        return {name: getattr(self, name) for name in self.SIZES}

    def project(self, prompts: Tensor) -> Tensor:
        """Codes of prompts, the paper's Proj, in the weights' precision also under autocast.

        Args:
            prompts: (R, N, D).

        Returns:
            (R, I).

        Raises:
            ValueError: prompts of another shape.
        """
        shape = (self.num_virtual_tokens, self.hidden_size)
        if prompts.dim() != 3 or prompts.shape[1:] != shape:
            raise ValueError(
                f"prompts {tuple(prompts.shape)}; this subspace takes (R, {shape[0]}, {shape[1]})"
            )
        with torch.autocast(prompts.device.type, enabled=False):
            return self.proj(prompts.flatten(1))

    def back_project(self, codes: Tensor) -> Tensor:
        """Prompts of codes, the paper's Proj_b, in the weights' precision also under autocast.

        Args:
            codes: (R, I).

        Returns:
            (R, N, D).

        Raises:
            ValueError: codes of another shape.
        """
        if codes.dim() != 2 or codes.shape[1] != self.intrinsic_dim:
            raise ValueError(
                f"codes {tuple(codes.shape)}; this subspace takes (R, {self.intrinsic_dim})"
            )
        with torch.autocast(codes.device.type, enabled=False):
            flat = self.back(codes)
        return flat.view(len(codes), self.num_virtual_tokens, self.hidden_size)

    def forward(self, prompts: Tensor) -> Tensor:
        """Reconstruction P* = Back(Proj(P)).

        Args:
            prompts: (R, N, D).

        Returns:
            (R, N, D).

        Raises:
            ValueError: prompts of another shape.
        """
        return self.back_project(self.project(prompts))

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """Weights and biases of every layer uniform within 1 / sqrt(inputs), as nn.Linear's."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                limit = layer.in_features**-0.5
                layer.weight.uniform_(-limit, limit, generator=generator)
                layer.bias.uniform_(-limit, limit, generator=generator)


class AdapterMap(Subspace):
    """Codes (R, I) to sets of adapters (R, 1, P): a :class:`Subspace` without its projection.

    Args:
        size: P, numbers of a set of adapters.
        intrinsic_dim: I.
        inner_size: H of the layer between; None makes the map linear.
        seed: of the initial weights, as :class:`Subspace`; None leaves them without storage.

    Raises:
        ValueError: a size below 1.
    """

    KIND: ClassVar = "adapters"
    SIZES: ClassVar = ("size", "intrinsic_dim", "inner_size")

    def __init__(
        self, size: int, intrinsic_dim: int, inner_size: int | None = 768, seed: int | None = 0
    ) -> None:
        self.size = size
        super().__init__(1, size, intrinsic_dim, inner_size, seed=None)
        del self.proj
        if seed is not None:
            self.to_empty(device="cpu")
            self._draw(seed)


def reconstruction_loss(
    reconstructed: Tensor, prompts: Tensor, reduction: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """Squared error of every reconstructed prompt.

    Args:
        reconstructed: (R, N, D), P*.
        prompts: (R, N, D), P.
        reduction: over the N·D numbers of a prompt: ``sum`` is the squared norm of the
            paper (L_AE), ``mean`` the mean squared error of the authors' code.

    Returns:
        (R,) one loss per prompt.

    Raises:
        ValueError: shapes that differ, or another reduction.
    """
    if reconstructed.shape != prompts.shape or prompts.dim() != 3:
        raise ValueError(
            f"reconstructed {tuple(reconstructed.shape)} and prompts {tuple(prompts.shape)} must "
            "both be (R, N, D)"
        )
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; allowed: 'sum', 'mean'")
    square = (reconstructed - prompts).square().flatten(1)
    return square.sum(1) if reduction == "sum" else square.mean(1)
