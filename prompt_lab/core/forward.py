"""How a frozen model is run: caches of prompts, masks, layers recomputed or compiled.

All leave the model as it is where no gradient is asked for, and all are exact. Gradient
checkpointing keeps one layer's activations at a time and runs each layer's forward pass twice;
transformers' own switch does not fit here, since it acts on models in training mode only and drops
the prompt's keys and values. Compiling serves all lengths by a few graphs with dynamic shapes.
Fused attention kernels have no second derivative on any device, so Hessian products choose the one
that is made of plain operations; bf16 steps on CPUs have a faster one written out here.

Given which tokens are padding, transformers looks at the values to see whether a mask is needed,
and the host waits for the device. It does not look at a mask that is made already, as here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


def recompute_layers(model: nn.Module) -> None:
    """Let every layer of a transformers model forget its activations and make them anew."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = wraps(layer.forward)(partial(_recomputed, layer.forward))


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def twice_differentiable() -> AbstractContextManager[Any]:
    """Within it, attention by ``sdpa`` is made of operations that can be differentiated twice.

    Both backward passes belong inside, since layers that are recomputed run in them.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


class PlainAttention(TorchFunctionMode):
    """Within it attention by ``sdpa`` is written out: two products and a softmax in float32.

    On CPUs the fused backward pass in bfloat16 is several times slower at the lengths of rows.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            func = _written_out
        return func(*args, **(kwargs or {}))


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (one.repeat_interleave(groups, -3) for one in (key, value))
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scale is None else scale), key.mT)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(scores.softmax(-1, torch.float32).to(value.dtype), value)


def compile_training(modules: Iterable[nn.Module]) -> None:
    """Compile the forward pass of modules for training; evaluation stays as it is."""
    for module in modules:
        module.forward = wraps(module.forward)(
            partial(_compiled, module.forward, torch.compile(module.forward))
        )


def _compiled(
    eager: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)


@contextmanager
def head_at(model: Any, places: Tensor | None) -> Iterator[None]:
    """Within it the model makes logits (1, M, V) of M of its (P, L) tokens, of all for None.

    So each model scales, caps or shifts its logits itself, and none is made in vain.
    """
    if places is None:
        yield
        return

    def pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1).index_select(0, places)[None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


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


def _like(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Embeddings (B, S, 0), which tell transformers shape, dtype and device."""
    return mask.new_empty(*mask.shape, 0, dtype=dtype)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds: 0 where a query sees a key, else the least number: (P, 1, Q, K).

    Eager attention adds its mask, so one of truth values would be silently wrong.

    Args:
        seen: (P, Q, K) truth values.
        dtype: of the model's weights.
    """
    mask = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[:, None]
