"""Initial soft prompts: vocabulary, text, class labels, noise.

Default: embeddings of ids drawn without replacement from the most frequent tokens, special tokens
left out (Lester et al. 2021, arXiv 2104.08691, section 3.2). Such a prompt starts where the model
knows its inputs; noise of another scale often does not train. A vocabulary or noise prompt is a
function of (seed, backbone, N) alone, never of the task, so that tuned prompts of different tasks
share their origins. Prompts from files are read by ``files/prompts.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def frequent_ids(vocab_size: int, special_ids: Sequence[int], top: int | None = 5000) -> Tensor:
    """The ids a vocabulary prompt is drawn from: the first ``top`` ids without specials.

    Tokenizers number their tokens by frequency or by order of merging, so low ids are frequent.

    Args:
        vocab_size: V.
        special_ids: ids that never enter a prompt.
        top: how many low ids to consider; null for the whole vocabulary.
    """
    special = set(special_ids)
    last = vocab_size if top is None else min(top, vocab_size)
    return torch.tensor([i for i in range(last) if i not in special], dtype=torch.long)


def vocabulary_sample(ids: Tensor, num_virtual_tokens: int, seed: int) -> Tensor:
    """N ids drawn without replacement, seeded: (N,).

    Raises:
        ValueError: fewer ids than virtual tokens.
    """
    if len(ids) < num_virtual_tokens:
        raise ValueError(
            f"{num_virtual_tokens} virtual tokens cannot be drawn without replacement from "
            f"{len(ids)} tokens: lower num_virtual_tokens or raise init.vocab_size"
        )
    generator = torch.Generator().manual_seed(seed)
    return ids[torch.randperm(len(ids), generator=generator)[:num_virtual_tokens]]


def text_ids(ids: Sequence[int], num_virtual_tokens: int) -> Tensor:
    """The ids of a text, cut to N or repeated from its start until there are N: (N,).

    Raises:
        ValueError: a text without tokens.
    """
    if not ids:
        raise ValueError("init.text has no tokens: give a text")
    return torch.tensor([ids[i % len(ids)] for i in range(num_virtual_tokens)], dtype=torch.long)


def label_prompt(labels: Sequence[Tensor], fill: Tensor) -> Tensor:
    """Class labels, one row each (the mean of a label's tokens), then vocabulary rows: (N, D).

    Args:
        labels: embeddings of the tokens of each label, (tokens, D); labels beyond the N-th are left
            out.
        fill: (N, D) a vocabulary prompt, for the rows that labels do not use.
    """
    rows = [label.mean(0) for label in labels[: len(fill)]]
    return torch.cat([torch.stack(rows), fill[: len(fill) - len(rows)]])


def normal_prompt(num_virtual_tokens: int, hidden_size: int, std: float, seed: int) -> Tensor:
    """Gaussian noise of the given standard deviation: (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_virtual_tokens, hidden_size, generator=generator) * std


def uniform_prompt(num_virtual_tokens: int, hidden_size: int, limit: float, seed: int) -> Tensor:
    """Uniform noise between -limit and limit: (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(num_virtual_tokens, hidden_size, generator=generator)
    return (noise * 2 - 1) * limit


def standard_deviation(parts: Iterable[Tensor]) -> float:
    """Standard deviation of numbers that come in parts, on the host; as that of all of them."""
    count, total, squares = 0, 0.0, 0.0
    for part in parts:
        count += part.numel()
        total += part.sum(dtype=torch.float64).item()
        squares += torch.linalg.vector_norm(part, dtype=torch.float64).item() ** 2
    return math.sqrt(max(0.0, squares - total**2 / count) / (count - 1))
