"""What a fit would cost: the grid, rows and tokens per step, memory; nothing is trained.

Memory is counted, not guessed: weights and bank by their bytes, activations as the bytes that
autograd keeps for the largest micro-batch of the first step, which is run once for that. Of several
processes it is the first one's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer

from prompt_lab.core.batch import Batch, micro_batches

if TYPE_CHECKING:
    from prompt_lab.core.backbone import Backbone
    from prompt_lab.data.datamodule import PromptDataModule
    from prompt_lab.methods.prompt_tuning import PromptTuning


def describe_grid(method: PromptTuning, data: PromptDataModule, trainer: Trainer) -> str:
    """The text of ``fit --dry_run``."""
    processes = trainer.world_size
    method.look(data, trainer)
    assert method.backbone is not None
    batch = method.draw(data).batch(0, method.progress.live)
    extra = method.num_virtual_tokens if method.backbone.is_encoder_decoder else 0
    parts = micro_batches(batch, method.tokens_per_forward, extra)
    prompt_tokens = 0 if extra else len(method.runs) * method.num_virtual_tokens
    padded = sum(_tokens(part, extra) for part in parts) + prompt_tokens
    weights = sum(p.numel() * p.element_size() for p in method.backbone.parameters())
    bank = method.init.numel() * 4
    trained = method.trained.numel() * 4
    optimizer = trained * (2 if method.optim_config.name == "adamw" else 0)
    smoothing = method.label_smoothing
    prompts = method.bank().detach().requires_grad_()
    activations = max(saved_bytes(method.backbone, prompts, p, smoothing) for p in parts)
    axes = (
        ("tasks", list(data.tasks)),
        ("samples", data.samples),
        ("init_seed", method.init_seeds),
        ("learning_rate", method.learning_rates),
        ("batch_size", method.batch_sizes),
        ("source_tasks", method.init_config.source_tasks or []),
    )
    axes = tuple((name, values) for name, values in axes if values)
    lines = [
        f"{len(method.all_runs)} runs = " + " x ".join(f"{len(v)} {name}" for name, v in axes),
        *(f"  {name}: {', '.join(map(str, values))}" for name, values in axes),
        f"prompt: {method.num_virtual_tokens} x {method.backbone.hidden_size}, "
        f"starting from {', '.join(_starts(method))}",
        f"backbone: {method.backbone.name}",
        f"steps: {trainer.max_steps}, evaluation every {trainer.val_check_interval}",
        *_sharing(method, processes),
        f"first step: {len(batch)} rows, {padded} padded tokens in {len(parts)} micro-batches",
        f"memory: weights {_size(weights)}, bank {_size(3 * bank)} and optimizer "
        f"{_size(optimizer)}, activations of the largest micro-batch {_size(activations)}",
    ]
    return "\n".join(lines)


def _starts(method: PromptTuning) -> list[str]:
    """The kinds of starts, each once."""
    found = (" ".join(filter(None, (s.start, s.start_of))) for s in method.starts)
    return list(dict.fromkeys(found))


def _sharing(method: PromptTuning, processes: int) -> list[str]:
    """What several processes share, in a line; the lines after it are of the first of them."""
    if processes == 1:
        return []
    shared = "the rows of every step shared"
    if method.shares.divided:
        shared = f"whole runs shared, {len(method.runs)} of them in the first"
    return [f"processes: {processes}, {shared}; of the first process:"]


def _tokens(part: Batch, extra: int) -> int:
    """Padded tokens of a micro-batch."""
    return len(part) * (part.input_ids.shape[1] + part.target_ids.shape[1] + extra)


def saved_bytes(
    backbone: Backbone, prompts: torch.Tensor, batch: Batch, label_smoothing: float = 0.0
) -> int:
    """Bytes that autograd keeps for rows under a bank (R, N, D), weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor's storage, once, unless it is a weight's."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The loss is kept until the count is done, so that no storage is freed and used again.
        loss = backbone.loss(prompts, batch.to(backbone.device), label_smoothing)
    del loss
    return sum(seen.values())


def _size(count: int) -> str:
    """Bytes in a readable unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
