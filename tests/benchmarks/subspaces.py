"""G18 and G19: tuning in a subspace, and finding one, against the ways without a bank.

G18 is a training step of codes (intrinsic subspace tuning): the frozen map makes the prompts, the
bank gives their gradients, AdamW moves the codes. Baseline are our own single runs, one after the
other, on the same rows. Both sides are what ``PromptTuning`` does with a subspace.

G19 is a step of multi-task subspace finding, forward and backward without optimizer, as
``IntrinsicSubspace`` does it: every prompt is reconstructed once, and rows run in micro-batches.
The baseline does as the authors' code (Qin et al. 2021): it reconstructs the prompt of every row
anew, and runs all rows in one forward pass and one graph of autograd. It runs on our backbone and
so has its savings, such as logits at targets only. The maps take a few percent of a step at most,
so what is to be won in time is a decoder-only model's pass over its prompts, once each instead of
once per row; and in memory, the graph of a micro-batch instead of all rows.

Memory of a step is the largest sum of bytes of the tensors that live at once, beside those that
were there before, weights and rows. On a CPU it is counted, so a shared machine does not matter;
what an operator needs within itself is left out. On CUDA the allocator gives it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from models import DECODER, T5, make_backbone, make_model, make_prompts, our_batch
from pairs import Settings, Step, check_steps, measure
from steps import BF16_LIMITS, KINK_LIMITS, Result, in_turn, make_groups, virtual_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import bank_gradient, with_gradient
from prompt_lab.core.batch import Batch, default_tokens_per_forward
from prompt_lab.core.optim import OptimConfig
from prompt_lab.core.subspace import Subspace, reconstruction_loss

DIM, INNER, ALPHA = 100, 768, 200.0  # the paper's I, H and weight of the reconstruction
CODE_STD = 0.02
RUNS, ROWS_PER_RUN = 16, 4
TASKS, ROWS_PER_TASK = 8, 8
LENGTHS = (15, 40)


def subspace_bank(settings: Settings) -> Iterator[Result]:
    """G18: sixteen single runs in a subspace against one bank of them."""
    codes = torch.randn(RUNS, DIM, generator=torch.Generator().manual_seed(1)) * CODE_STD
    codes = codes.to(settings.device)
    for name, backbone, subspace in _models(settings):
        subspace.requires_grad_(False)
        groups = make_groups(backbone, RUNS, ROWS_PER_RUN, LENGTHS)
        batches = [our_batch(backbone, [group]) for group in groups]
        singles = [
            tuning_side(backbone, subspace, codes[run : run + 1], batch)
            for run, batch in enumerate(batches)
        ]
        bank = tuning_side(backbone, subspace, codes, our_batch(backbone, groups))
        agreement = check_steps(in_turn(singles), bank, **_limits(backbone))
        what = f"{RUNS} single steps / 1 step of a bank of {RUNS} in a subspace, {name}, I {DIM}, "
        what += f"N {subspace.num_virtual_tokens}, B {ROWS_PER_RUN}, S {LENGTHS[1]}"
        yield what, {**measure(in_turn(singles), bank, settings), "agreement": agreement}


def subspace_finding(settings: Settings) -> Iterator[Result]:
    """G19: prompts reconstructed for every row against once each; time and memory."""
    for name, backbone, subspace in _models(settings):
        source = make_prompts(backbone, TASKS, virtual_tokens(settings))
        batch = our_batch(backbone, make_groups(backbone, TASKS, ROWS_PER_TASK, LENGTHS))
        batch = replace(batch, weight=torch.full_like(batch.weight, 1 / len(batch)))
        case = (backbone, subspace, source, batch)
        agreement = {}
        for alpha in (0.0, ALPHA):  # the reconstruction alone could hide the model's part
            first = _with_gradients(row_by_row(*case, alpha), subspace)
            second = _with_gradients(once_each(*case, alpha), subspace)
            agreement[f"alpha {alpha:g}"] = check_steps(first, second, **_limits(backbone))
        theirs, ours = row_by_row(*case, ALPHA), once_each(*case, ALPHA)
        words = f"prompts decoded for every row / once each, {name}, I {DIM}, "
        words += f"N {source.shape[1]}, {len(batch)} rows of {TASKS} tasks, S {LENGTHS[1]}"
        yield f"time, {words}", {**measure(theirs, ours, settings), "agreement": agreement}
        baseline, own = (peak_bytes(side, subspace, settings.device) for side in (theirs, ours))
        yield (
            f"memory, {words}",
            {"value": baseline / own, "bytes": {"baseline": baseline, "ours": own}},
        )


def _models(settings: Settings) -> Iterator[tuple[str, Backbone, Subspace]]:
    """A T5-like and a GPT-2-like model, each with an untrained map of the paper's I and H."""
    for kind, name, sizes in (("t5", "T5-like", T5), ("gpt2", "GPT-2-like", DECODER)):
        model = make_model(kind, sizes[settings.size], settings.device, settings.dtype)
        backbone = make_backbone(model)
        size = (virtual_tokens(settings), backbone.hidden_size, DIM, INNER)
        yield name, backbone, Subspace(*size, seed=0).to(settings.device)


# ---- the sides -----------------------------------------------------------------------------------


def tuning_side(backbone: Backbone, subspace: Subspace, codes: Tensor, batch: Batch) -> Step:
    """One step of codes (R, I) with AdamW: losses (R,) and the codes' gradient (R, I)."""
    code = codes.clone().requires_grad_()
    active = torch.ones(len(code), dtype=torch.bool, device=code.device)
    optimizer = OptimConfig().build([code], [1e-4] * len(code), active, 1)
    tokens = default_tokens_per_forward(backbone.device)

    def step() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        made = subspace.back_project(code)
        losses, gradient = bank_gradient(backbone, made, batch, tokens)
        with_gradient(losses.sum(), made, gradient).backward()
        optimizer.step()
        assert code.grad is not None
        return losses, code.grad

    return step


def once_each(
    backbone: Backbone, subspace: Subspace, source: Tensor, batch: Batch, alpha: float
) -> Callable[[], Tensor]:
    """A step of subspace finding as ``IntrinsicSubspace``; its loss without reconstruction (1,)."""
    tokens = default_tokens_per_forward(backbone.device)

    def step() -> Tensor:
        subspace.zero_grad()
        made = subspace(source)
        losses, gradient = bank_gradient(backbone, made, batch, tokens)
        distance = reconstruction_loss(made, source).mean()  # every task has as many rows
        (with_gradient(losses.sum(), made, gradient) + alpha * distance).backward()
        return losses.sum()[None]

    return step


def row_by_row(
    backbone: Backbone, subspace: Subspace, source: Tensor, batch: Batch, alpha: float
) -> Callable[[], Tensor]:
    """The same as the authors' code: a prompt reconstructed for each row, all in one graph."""
    numbers = list(range(len(batch)))
    index = torch.arange(len(batch), device=source.device)
    alone = replace(batch, prompts=numbers, prompt_index=index)

    def step() -> Tensor:
        subspace.zero_grad()
        own = source[batch.prompt_index]
        made = subspace(own)
        loss = (backbone.loss(made, alone) * alone.weight).sum()
        (loss + alpha * reconstruction_loss(made, own).mean()).backward()
        return loss.detach()[None]

    return step


def _with_gradients(step: Callable[[], Tensor], subspace: Subspace) -> Step:
    """A step that also gives the gradient of all weights of the map, as one row."""

    def run() -> tuple[Tensor, Tensor]:
        loss = step()
        gradients = [weight.grad for weight in subspace.parameters() if weight.grad is not None]
        return loss, torch.cat([gradient.flatten() for gradient in gradients])[None]

    return run


def _limits(backbone: Backbone) -> dict[str, float]:
    """How far the sides may differ."""
    return BF16_LIMITS if backbone.model.dtype == torch.bfloat16 else KINK_LIMITS


# ---- memory --------------------------------------------------------------------------------------


def peak_bytes(step: Callable[[], Any], subspace: Subspace, device: str) -> int:
    """Most bytes of tensors that a step holds at once, beside those that were there before."""
    subspace.zero_grad()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as counter:
        step()
    return counter.peak


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make while it is on, and takes off those freed.

    Attributes:
        peak: largest sum so far, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count what it made; views and what it wrote into are not new."""
        given = {storage._cdata for storage in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            key, size = storage._cdata, storage.nbytes()
            if key not in given | self._alive:
                self._alive.add(key)
                self._now += size
                weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self._now)
        return made

    def _free(self, key: int, size: int) -> None:
        """A storage is gone."""
        self._alive.discard(key)
        self._now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """The storages of all tensors in arguments or results."""
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
