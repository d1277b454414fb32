"""The keys and values of prompts, as decoder-only models of transformers take them.

Two differences from the cache that transformers makes by itself: a prompt's keys and values are
never copied or changed by the rows behind them, and running a layer twice does no harm, which
gradient checkpointing needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class PromptLayer(DynamicLayer):
    """One layer: either takes up the keys and values of prompts, or stands in front of rows.

    Args:
        keys: (B, heads, N, head size) of each row's prompt; None to take up the first that come.
        values: likewise.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self.in_front = keys is not None and values is not None
        if keys is not None and values is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to: the prompt's, then the given ones."""
        if self.in_front and self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, key_states], dim=-2)
            return keys, torch.cat([self.values, value_states], dim=-2)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        return key_states, value_states


def prompt_cache() -> Any:
    """An empty cache that takes up the keys and values of prompts, layer by layer."""
    cache: Any = DynamicCache()
    cache.layer_class_to_replicate = PromptLayer
    return cache


def row_cache(parts: list[Tensor]) -> Any:
    """A fixed cache of keys and values, alternating by layer; None where there are none."""
    if not parts:
        return None
    cache: Any = DynamicCache()
    cache.layers = [PromptLayer(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return cache


def growing_cache(parts: list[Tensor]) -> Any:
    """A cache of the given keys and values that grows with what is run behind it."""
    return DynamicCache(list(zip(parts[::2], parts[1::2], strict=True)) or None)
