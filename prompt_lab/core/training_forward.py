"""Ways to run a frozen model in training: layers recomputed, compiled, or differentiated twice.

And masks that are made before the model runs. All leave the model as it is where no gradient is
asked for, and all are exact. Gradient checkpointing keeps one layer's activations at a time and
runs each layer's forward pass twice; transformers' own switch does not fit here, since it acts on
models in training mode only and drops the prompt's keys and values. Compiling serves all lengths by
a few graphs with dynamic shapes. Fused attention kernels have no second derivative on any device,
so Hessian products choose the one that is made of plain operations, and only they do.

Given which tokens are padding, transformers looks at the values to see whether a mask is needed,
and the host waits for the device. It does not look at a mask that is made already, as here. Where
attention is a package of kernels of its own (``flash_attention_2``), it looks all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_layers(model: nn.Module) -> None:
    """Let every layer of a transformers model forget its activations and make them anew."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = wraps(layer.forward)(partial(_recomputed, layer.forward))


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's output, whose backward pass runs the layer again."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def twice_differentiable() -> AbstractContextManager[Any]:
    """Within it, attention by ``sdpa`` is made of operations that can be differentiated twice.

    Both backward passes belong inside, since layers that are recomputed run in them.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def compile_training(modules: Iterable[nn.Module]) -> None:
    """Compile the forward pass of modules for training; evaluation stays as it is."""
    for module in modules:
        module.forward = wraps(module.forward)(
            partial(_compiled, module.forward, torch.compile(module.forward))
        )


def _compiled(
    eager: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The compiled pass where a gradient is asked for."""
    return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)


def tokens_mask(config: Any, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of attention to tokens from anywhere, as the model's attention takes it.

    Args:
        config: of the transformers model.
        mask: (B, S), 1 for tokens and 0 for padding.
        dtype: of the model's activations.

    Returns:
        (B, 1, 1, S); for packages of fused kernels (B, S).
    """
    from transformers.masking_utils import create_bidirectional_mask

    made = create_bidirectional_mask(
        config, _like(mask[:, :1], dtype), mask, allow_is_bidirectional_skip=False
    )
    return mask if made is None else made


def causal_mask(config: Any, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of attention to tokens from themselves and from later ones; arguments as above.

    Returns:
        (B, 1, S, S); for packages of fused kernels (B, S).
    """
    from transformers.masking_utils import create_causal_mask

    made = create_causal_mask(config, _like(mask, dtype), mask, None, allow_is_causal_skip=False)
    return mask if made is None else made


def attention_window(config: Any) -> int | None:
    """How many keys the windowed layers of a model see; None for a model without such layers."""
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return config.sliding_window if windowed else None


def position_masks(
    config: Any, places: Tensor, known: Tensor, positions: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Additive masks for each kind of layer of a model with windows, which count positions.

    transformers' own count keys, and so the padding between a prompt and its text.

    Args:
        config: of the transformers model.
        places: (B, K) the position of each key.
        known: (B, K) 1 for keys that are tokens and 0 for padding.
        positions: (B, Q) the position of each query.
        dtype: of the model's weights.

    Returns:
        (B, 1, Q, K) for ``full_attention`` and ``sliding_attention``.
    """
    back = positions[:, :, None] - places[:, None]  # (B, Q, K)
    seen = (back >= 0) & (known[:, None] > 0)
    kinds = {"full_attention": seen, "sliding_attention": seen & (back < config.sliding_window)}
    return {
        kind: torch.zeros_like(back, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[
            :, None
        ]
        for kind, seen in kinds.items()
    }


def _like(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Embeddings (B, S, 0), which tell transformers shape, dtype and device."""
    return mask.new_empty(*mask.shape, 0, dtype=dtype)
