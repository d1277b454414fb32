"""A look before training: what rows a fit will run, and what it would cost.

Memory is counted, not guessed: weights and bank by their bytes, activations as the bytes that
autograd keeps for the largest micro-batch of the first step, which is run once for that. Of several
processes it is the first one's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer

from prompt_lab.core.batch import Batch, micro_batches
from prompt_lab.data.files import SplitName
from prompt_lab.data.sampling import Rows
from prompt_lab.data.tasks import Task

if TYPE_CHECKING:
    from prompt_lab.core.backbone import Backbone
    from prompt_lab.data.datamodule import PromptDataModule
    from prompt_lab.methods.method import PromptMethod
    from prompt_lab.methods.prompt_tuning import PromptTuning


def look_at_rows(method: PromptMethod, data: PromptDataModule, *splits: SplitName) -> list[str]:
    """What the model will not see, or cannot tell apart, of the rows of this process's runs.

    A sentence each for inputs that are cut, labels of equal tokens, references longer than the
    answers that are generated, and test rows that will be refused. Test rows are only measured.

    Raises:
        ValueError: rows of train or dev that do not fit the backbone's positions, inputs
            without tokens, or a task all of whose labels have the same tokens.
    """
    told: list[str] = []
    keys = [(task, sample) for task in data.tasks for sample in data.samples]
    if method.shares.divided:
        keys = list(dict.fromkeys((run.task, run.sample) for run in method.runs))
    for task in dict.fromkeys(task for task, _ in keys):
        told += _look_alikes(method, data.tasks[task])
    cut: dict[str, tuple[int, int]] = {}
    too_long: dict[tuple[str, int], dict[str, str]] = {}
    for task, sample in keys:
        longest = longest_generated(method, data, task, sample)
        for split in splits:
            rows = data.tokens(task, sample, split, keep=split != "test")
            name = f"{task} {split}"
            known = cut.get(name, (0, 0))
            cut[name] = known[0] + rows.cut, known[1] + len(rows)
            try:
                check_lengths(method, [rows], method.num_virtual_tokens)
            except ValueError as error:
                if split != "test":
                    raise
                told.append(f"test rows will be refused: {error}")
            lost = 0 if longest is None else sum(n > longest for n in rows.shortest_targets)
            if lost:
                known_lost = too_long.setdefault((task, longest or 0), {})
                known_lost[split] = f"{split} {lost} of {len(rows)}"
    why = "" if method.max_new_tokens else ", the longest answer of train and dev"
    told += [
        f"task {task}: rows all of whose references are longer than the {longest} tokens that "
        f"are generated (model.max_new_tokens{why}), so that no answer can match in full: "
        f"{', '.join(lost.values())}"
        for (task, longest), lost in too_long.items()
    ]
    found = [f"{name} {some_} of {of}" for name, (some_, of) in cut.items() if some_]
    if found:
        end = "end" if data.truncation_side == "right" else "beginning"
        told.append(
            f"inputs of over {data.max_input_length} tokens lose their {end} "
            f"(data.max_input_length, data.truncation_side): {'; '.join(found)}"
        )
    return list(dict.fromkeys(told))


def _look_alikes(method: PromptMethod, task: Task) -> list[str]:
    """A sentence about labels that have the same tokens; refuses a task of no other labels."""
    assert method.backbone is not None
    told, labels = [], task.labels or ()
    if len({label.lower() for label in labels}) < len(labels):
        told = [f"task {task.name}: some labels differ by case alone: {', '.join(labels)}"]
    alike = method.backbone.look_alikes(labels)
    if not alike:
        return told
    groups = "; ".join(", ".join(map(repr, group)) for group in alike)
    if len(alike[0]) == len(labels):
        raise ValueError(
            f"task {task.name}: all labels have the same tokens for backbone "
            f"{method.backbone.name!r} ({groups}), so that nothing can be learned: take a "
            "backbone whose tokenizer knows them, or other words for the labels"
        )
    return [
        *told,
        f"task {task.name}: labels with the same tokens for backbone {method.backbone.name!r}, "
        f"of which the first is always answered: {groups}",
    ]


def longest_generated(
    method: PromptMethod, data: PromptDataModule, task: str, sample: int
) -> int | None:
    """Most tokens of a generated answer; None where answers are chosen by score."""
    if method.scored(data.tasks[task]):
        return None
    return method.max_new_tokens or data.longest_answer(task, sample)


def check_lengths(method: PromptMethod, rows: Iterable[Rows], num_virtual_tokens: int) -> None:
    """Refuse rows that do not fit the backbone's positions, before anything is computed.

    Raises:
        ValueError: naming the task, the lengths and what to lower.
    """
    assert method.backbone is not None
    positions = method.backbone.max_positions
    if positions is None:
        return
    for part in rows:
        made = 0 if method.scored(part.task) else method.max_new_tokens or 0
        answer = max(part.longest_target, made)
        longest = max(map(len, part.inputs))
        after = 0 if method.backbone.is_encoder_decoder else answer
        if max(num_virtual_tokens + longest + after, answer) > positions:
            raise ValueError(
                f"task {part.task.name}: {num_virtual_tokens} virtual tokens, inputs of up to "
                f"{longest} tokens and answers of up to {answer} do not fit the {positions} "
                f"positions of backbone {method.backbone.name!r}: lower data.max_input_length, "
                "model.num_virtual_tokens or model.max_new_tokens"
            )


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
