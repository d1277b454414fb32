"""One step of a bank: gradient, or Hessian times a vector, of R runs at once, in bounded memory.

Loss of a step = sum over rows of weight x mean row loss; with weight 1 / batch size that is the sum
over runs of each run's own mean loss, and the gradient of a run's prompt is what it would be alone.
Rows run in micro-batches of at most ``tokens_per_forward`` padded tokens; a pass over the prompts
themselves (decoder-only models) is made once per prompt and shared by its micro-batches.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from prompt_lab.core.backbone import Backbone, Prefix
from prompt_lab.core.batch import Batch, index_tensor
from prompt_lab.core.forward import PlainAttention, twice_differentiable
from prompt_lab.core.packing import padded_tokens


def bank_gradient(
    backbone: Backbone,
    prompts: Tensor,
    batch: Batch,
    tokens_per_forward: int,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Weighted loss of every prompt and the gradient of their sum.

    Args:
        backbone: the frozen model.
        prompts: (R, N, D) bank, float32.
        batch: rows with targets, sorted by length, longest first.
        tokens_per_forward: most padded tokens of one forward pass.
        label_smoothing: passed to :meth:`Backbone.loss`.

    Returns:
        Losses (R,), 0 for a prompt without rows, and gradient (R, N, D), both float32, detached.
    """
    losses = prompts.new_zeros(len(prompts))
    gradient = torch.zeros_like(prompts)
    for group in _groups(backbone, prompts, batch, tokens_per_forward):
        used = sorted(set(group.prompts))
        at = index_tensor(used, prompts.device)
        leaf = prompts.detach().index_select(0, at).requires_grad_()
        group = renumber(group, used)
        group_losses, group_gradient = _group_gradient(
            backbone, leaf, group, tokens_per_forward, label_smoothing
        )
        losses = losses.index_add(0, at, group_losses)
        gradient = gradient.index_copy(0, at, group_gradient)
    return losses, gradient


def bank_product(
    backbone: Backbone,
    prompts: Tensor,
    vector: Tensor,
    batch: Batch,
    tokens_per_forward: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Hessian of the weighted losses' sum times a vector, by a double backward pass.

    The Hessian is block diagonal over prompts, so each gets its own product. A micro-batch of a
    decoder-only model runs the prompts that its rows name, besides its tokens.

    Args:
        backbone: the frozen model, with attention of ``sdpa`` or ``eager``, not compiled.
        prompts: (R, N, D) bank.
        vector: (R, N, D).
        batch: rows with targets, sorted by length, longest first.
        tokens_per_forward: most padded tokens of one forward pass.
        label_smoothing: passed to :meth:`Backbone.loss`.

    Returns:
        The product (R, N, D), 0 for a prompt without rows, detached.
    """
    product = torch.zeros_like(prompts)
    with torch.enable_grad(), twice_differentiable():
        for part in backbone.micro_batches(batch, tokens_per_forward, prompts.shape[1]):
            used = sorted(set(part.prompts))
            at = index_tensor(used, prompts.device)
            leaf = prompts.detach().index_select(0, at).requires_grad_()
            losses = backbone.loss(leaf, renumber(part, used), label_smoothing) * part.weight
            (gradient,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
            (made,) = torch.autograd.grad(gradient, leaf, vector.index_select(0, at))
            product.index_add_(0, at, made)
    return product


FLOAT16_SCALE = 2.0**7
"""What a loss is multiplied by for the backward pass through float16 weights, and gradients divided
by after it: both exact, and gradients below what float16 holds (6e-8) get through. A power more
would let losses near zero count, and the large gradients of early steps overflow (65504)."""


@dataclass
class BankObjective:
    """The weighted losses of a bank on one batch, as inner loops take them.

    Attributes:
        backbone: the frozen model.
        batch: rows with targets, sorted by length, longest first.
        tokens_per_forward: most padded tokens of one forward pass.
        label_smoothing: passed to :meth:`Backbone.loss`.
    """

    backbone: Backbone
    batch: Batch
    tokens_per_forward: int
    label_smoothing: float = 0.0

    def gradient(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """As :func:`bank_gradient`."""
        with torch.enable_grad():
            return bank_gradient(
                self.backbone, prompts, self.batch, self.tokens_per_forward, self.label_smoothing
            )

    def product(self, prompts: Tensor, vector: Tensor) -> Tensor:
        """As :func:`bank_product`."""
        return bank_product(
            self.backbone,
            prompts,
            vector,
            self.batch,
            self.tokens_per_forward,
            self.label_smoothing,
        )


def with_gradient(value: Tensor, prompts: Tensor, gradient: Tensor) -> Tensor:
    """A loss of the given value whose gradient with respect to ``prompts`` is ``gradient``.

    So a step that computed its gradient by micro-batches stays in Lightning's automatic loop:
    value + sum((p - p.detach()) * g), with value and gradient constants.
    """
    return value.detach() + ((prompts - prompts.detach()) * gradient.detach()).sum()


class Prefixes:
    """What rows need of the prompts of a bank, computed once and kept while it is in use.

    For evaluations: batches come grouped by prompt, so that each prompt of a decoder-only model is
    run once, and no more prompts are held than a batch names.

    Args:
        backbone: the frozen model.
        prompts: (R, N, D) bank; it does not change meanwhile.
    """

    def __init__(self, backbone: Backbone, prompts: Tensor) -> None:
        self.backbone, self.prompts = backbone, prompts
        self.used: list[int] = []
        self.front: tuple[int, ...] = ()
        self.prefix: Prefix = ()

    @torch.no_grad()
    def of(self, used: list[int], front: tuple[int, ...] = ()) -> Prefix:
        """The prefix of some of the prompts, in the order of ``used``, and of a batch's front."""
        if front != self.front:
            self.used, self.front = [], front
        if used == self.used:
            return self.prefix
        kept = [prompt for prompt in used if prompt in self.used]
        new = [prompt for prompt in used if prompt not in self.used]
        parts = []
        if kept:
            parts.append(_select(self.prefix, [self.used.index(prompt) for prompt in kept]))
        if new:
            parts.append(self.backbone.prefix(_select((self.prompts,), new)[0], front))
        joined = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        made = [*kept, *new]
        self.prefix = _select(joined, [made.index(prompt) for prompt in used])
        self.used = used
        return self.prefix


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _select(tensors: Prefix, places: list[int]) -> Prefix:
    """Some places of the first dimension of every tensor."""
    at = index_tensor(places, tensors[0].device)
    return tuple(tensor.index_select(0, at) for tensor in tensors)


def renumber(batch: Batch, used: list[int]) -> Batch:
    """The same rows with prompts numbered by their place in ``used``."""
    place = {prompt: at for at, prompt in enumerate(used)}
    prompts = [place[prompt] for prompt in batch.prompts]
    index = index_tensor(prompts, batch.prompt_index.device)
    return Batch(**{**vars(batch), "prompts": prompts, "prompt_index": index})


def _group_gradient(
    backbone: Backbone, leaf: Tensor, batch: Batch, tokens_per_forward: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Losses (R,) and gradient (R, N, D) of prompts that share one pass over themselves.

    Gradients of micro-batches are summed in float32 where the prefix is in half precision.
    """
    parts = backbone.micro_batches(batch, tokens_per_forward, leaf.shape[1])
    width = leaf.shape[1] + len(batch.front)
    joined = padded_tokens(batch) + len(leaf) * width <= tokens_per_forward
    prefix = backbone.prefix_for(leaf, batch) if joined else backbone.prefix(leaf, batch.front)
    cut = [part.detach().requires_grad_() for part in prefix]
    wide = [torch.promote_types(part.dtype, torch.float32) for part in prefix]
    total = [torch.zeros_like(part, dtype=dtype) for part, dtype in zip(prefix, wide, strict=True)]
    losses = leaf.new_zeros(len(leaf))
    dtype = backbone.model.dtype
    scale = FLOAT16_SCALE if dtype == torch.float16 else 1.0
    is_slow = dtype == torch.bfloat16 and leaf.device.type == "cpu"
    for part in parts:
        with PlainAttention() if is_slow else nullcontext():
            weighted = backbone.row_losses(tuple(cut), part, smoothing) * part.weight
            found = torch.autograd.grad(weighted.sum() * scale, cut)
        for sum_, new in zip(total, found, strict=True):
            sum_ += new
        losses = losses.index_add(0, part.prompt_index, weighted.detach())
    if len(total) == 1:  # not keys and values, but the bank itself in the weights' dtype
        return losses, total[0][:, : leaf.shape[1]].to(leaf.dtype) / scale
    rounded = [sum_.to(part.dtype) for sum_, part in zip(total, prefix, strict=True)]
    (gradient,) = torch.autograd.grad(prefix, leaf, rounded)
    return losses, gradient / scale


def _groups(
    backbone: Backbone, prompts: Tensor, batch: Batch, tokens_per_forward: int
) -> list[Batch]:
    """The batch cut by prompt, where prompts are run themselves and too many for one forward."""
    if len(batch) == 0:
        return []
    used = sorted(set(batch.prompts))
    size = max(1, tokens_per_forward // max(1, prompts.shape[1] + len(batch.front)))
    if backbone.is_encoder_decoder or len(used) <= size:
        return [batch]
    chunks = [set(used[at : at + size]) for at in range(0, len(used), size)]
    return [batch.take([i for i, p in enumerate(batch.prompts) if p in c]) for c in chunks]
