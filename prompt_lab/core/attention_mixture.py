"""Mixtures of source prompts: ATTEMPT's attention for each input, and SPoT's by similarity.

ATTEMPT (Asai et al. 2022, arXiv 2205.11961, section 3.2) gives every input a prompt of its own. A
small network G turns the input, pooled by the maximum over its positions, into a query; the keys
are the prompts, pooled by the maximum over their tokens; the softmax of their products, over a
temperature, weighs the source prompts and the target prompt:

    a = softmax_j( max_n P_j . LayerNorm(up(SiLU(down(max_s x)))) / T ),   j = sources, target
    P(x) = P_target + sum_j a_j P_j

So the target prompt counts once by itself and once in the sum. Where this differs from the
authors' code: the maximum leaves padding out (there it counts, so that an input's prompt depends on
the longest input beside it), and the LayerNorm is trained (there it is not; the paper counts its
numbers to G's). Weights are drawn as ``torch.nn.Linear`` draws them, in their code with a standard
deviation of 0.01; the LayerNorm undoes most of the difference.

SPoT (Vu et al. 2022, arXiv 2110.07904, section 3) starts prompt tuning from a sum of source prompts
weighted by how alike they are to a prompt of the target task. Left out: the other scores of the
authors of ATTEMPT (dot, linear, token, constant) and a learned temperature.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prompt_lab.core.similarity import feature_similarities


def max_pool(embeddings: Tensor, mask: Tensor) -> Tensor:
    """The maximum of every dimension over the positions that are no padding.

    Args:
        embeddings: (B, S, D).
        mask: (B, S), 0 for padding.

    Returns:
        (B, D).

    Raises:
        ValueError: shapes that do not fit, or rows of no positions.
    """
    if embeddings.dim() != 3 or embeddings.shape[:2] != mask.shape:
        raise ValueError(
            f"embeddings {tuple(embeddings.shape)} and mask {tuple(mask.shape)}: give (B, S, D) "
            "and (B, S)"
        )
    if embeddings.shape[1] == 0:
        raise ValueError("rows of no positions have no maximum: give each input a token")
    return embeddings.masked_fill(mask.unsqueeze(2) == 0, -torch.inf).amax(1)


class PromptAttention(nn.Module):
    """G: weights of prompts for inputs.

    Args:
        hidden_size: D, width of the backbone.
        inner_size: r, width between the two layers; 100 in the authors' code.
        temperature: T; None for D * e, as in the paper (2087 for a width of 768).
        seed: of the initial weights; torch's global generator is not touched. None leaves them
            without storage, to be assigned.

    Attributes:
        metadata: what a file says about it; empty for a new one.

    Raises:
        ValueError: a size below 1, or a temperature that is not positive.
    """

    KIND: ClassVar = "attention"
    SIZES: ClassVar = ("hidden_size", "inner_size", "temperature")

    def __init__(
        self,
        hidden_size: int,
        inner_size: int = 100,
        temperature: float | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.hidden_size, self.inner_size = hidden_size, inner_size
        self.temperature = hidden_size * math.e if temperature is None else temperature
        self.metadata: dict[str, Any] = {}
        for name in ("hidden_size", "inner_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: give a positive number")
        device = "meta" if seed is None else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            self.down = nn.Linear(hidden_size, inner_size, bias=False, device=device)
            self.up = nn.Linear(inner_size, hidden_size, bias=False, device=device)
        self.norm = nn.LayerNorm(hidden_size, device=device)

    def forward(self, pooled: Tensor, source_keys: Tensor, target_keys: Tensor) -> Tensor:
        """How much each prompt counts for each input, a of the module's formula.

        Args:
            pooled: (B, D) inputs, as from :func:`max_pool`.
            source_keys: (J, D) maximum of each source prompt over its tokens.
            target_keys: (B, D) the same of each row's own target prompt.

        Returns:
            (B, J + 1), each row of sum 1; the last column is the target prompt.

        Raises:
            ValueError: shapes that do not fit.
        """
        width = self.hidden_size
        shapes = [tuple(keys.shape) for keys in (pooled, source_keys, target_keys)]
        if shapes != [(len(pooled), width), (len(source_keys), width), (len(pooled), width)]:
            raise ValueError(
                f"inputs, source keys and target keys are {', '.join(map(str, shapes))}: give "
                f"(B, {width}), (J, {width}) and (B, {width})"
            )
        query = self.norm(self.up(nn.functional.silu(self.down(pooled))))
        scores = torch.cat([query @ source_keys.T, (query * target_keys).sum(1, keepdim=True)], 1)
        return torch.softmax(scores / self.temperature, 1)


def row_prompts(weights: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """The prompt of each row: its target prompt plus the weighted sum of all, the target's too.

    Args:
        weights: (B, J + 1), the last column for the target prompt.
        sources: (J, N, D).
        targets: (B, N, D) each row's own target prompt.

    Returns:
        (B, N, D).

    Raises:
        ValueError: shapes that do not fit.
    """
    expected = (len(targets), len(sources) + 1)
    if weights.shape != expected or sources.shape[1:] != targets.shape[1:]:
        raise ValueError(
            f"weights {tuple(weights.shape)}, sources {tuple(sources.shape)} and targets "
            f"{tuple(targets.shape)}: give (B, J + 1), (J, N, D) and (B, N, D)"
        )
    own = weights[:, -1, None, None]
    return mix(weights[:, :-1], sources) + (1 + own) * targets


def mix(weights: Tensor, prompts: Tensor) -> Tensor:
    """Weighted sums of prompts.

    Args:
        weights: (J,) for one sum, or (B, J) for several.
        prompts: (J, N, D).

    Returns:
        (N, D), or (B, N, D).

    Raises:
        ValueError: shapes that do not fit.
    """
    if prompts.dim() != 3 or weights.dim() not in (1, 2) or weights.shape[-1] != len(prompts):
        raise ValueError(
            f"weights {tuple(weights.shape)} and prompts {tuple(prompts.shape)}: give (J,) or "
            "(B, J), and (J, N, D)"
        )
    return torch.tensordot(weights, prompts, dims=1)


def similarity_weights(target: Tensor, sources: Tensor) -> Tensor:
    """How much each source prompt counts in the start of a target task, after SPoT.

    The similarity is the cosine of the mean rows of two prompts; weights are similarities over
    their sum (Vu et al. 2022, section 3, "weighted average"). Negative similarities count as 0, so
    that no source is subtracted. The code of ATTEMPT's authors sums the cosines of row n with row n
    instead, which depends on the order of rows, and keeps negative ones.

    Args:
        target: (N, D) a prompt that was tuned, briefly or to the end, on the target task.
        sources: (J, N, D); the N may differ.

    Returns:
        (J,) float64, at least 0, of sum 1.

    Raises:
        ValueError: as :func:`prompt_lab.core.similarity.feature_similarities`, or no source with a
            positive similarity.
    """
    similar = feature_similarities(target.unsqueeze(0), sources)[0].clamp(min=0)
    if not similar.any():
        raise ValueError(
            f"none of {len(sources)} source prompts has a positive similarity to the target: give "
            "others, or start from one of them"
        )
    return similar / similar.sum()
