"""A look before training: what rows a fit will run, and what it would cost.

Memory is counted, not guessed: weights and what is trained by their bytes, activations as the bytes
that autograd keeps for the largest micro-batch of the first step, which is run once for that. Of
several processes it is the first one's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer

from prompt_lab.core.bank import bank_gradient
from prompt_lab.core.batch import Batch
from prompt_lab.core.packing import padded_tokens
from prompt_lab.core.run import Run
from prompt_lab.data.files import SplitName
from prompt_lab.data.sampling import Key, Rows
from prompt_lab.data.tasks import Task

if TYPE_CHECKING:
    from prompt_lab.core.backbone import Backbone
    from prompt_lab.data.datamodule import PromptDataModule
    from prompt_lab.methods.method import PromptMethod

ROLES = ("source_tasks", "validation_tasks", "unseen_tasks", "target_tasks")
"""Settings that name what tasks are for."""


def look_at_rows(method: PromptMethod, data: PromptDataModule, *splits: SplitName) -> list[str]:
    """What the model will not see, or cannot tell apart, of the rows of this process's runs.

    Test rows are only measured: those that will be refused are told.

    Raises:
        ValueError: rows of train or dev that do not fit, inputs without tokens, or equal labels.
    """
    keys = _own_keys(method, data)
    told = [
        said
        for task in dict.fromkeys(task for task, _ in keys)
        for said in _look_alikes(method, data.tasks[task])
    ]
    cut = defaultdict[str, list[int]](lambda: [0, 0])  # of so many rows
    lost = defaultdict[str, dict[str, list[int]]](lambda: defaultdict(lambda: [0, 0]))
    why = "" if method.max_new_tokens else ", the longest answer of train and dev"
    for task, sample in keys:
        most = method.max_new_tokens or data.longest_answer(task, sample)
        beyond = (
            f"task {task}: rows all of whose references are longer than the {most} tokens that "
            f"are generated (model.max_new_tokens{why}), so that no answer can match in full: "
        )
        for split in splits:
            rows = data.tokens(task, sample, split, keep=split != "test")
            long = sum(min(map(len, row)) > most for row in rows.targets)
            counted = [(cut[f"{task} {split}"], rows.cut)]
            if method.way(data.tasks[task]).labels is None:
                counted.append((lost[beyond][split], long))
            for count, new in counted:
                count[0] += new
                count[1] += len(rows)
            try:
                _check_length(method, rows)
            except ValueError as error:
                if split != "test":
                    raise
                told.append(f"test rows will be refused: {error}")
    told += [
        beyond + ", ".join(f"{split} {n} of {rows}" for split, (n, rows) in counts.items() if n)
        for beyond, counts in lost.items()
        if any(n for n, _ in counts.values())
    ]
    if found := [f"{name} {n} of {rows}" for name, (n, rows) in cut.items() if n]:
        end = "end" if data.truncation_side == "right" else "beginning"
        told.append(
            f"inputs of over {data.max_input_length} tokens lose their {end} "
            f"(data.max_input_length, data.truncation_side): {'; '.join(found)}"
        )
    return list(dict.fromkeys(told))


def check_lengths(method: PromptMethod, data: PromptDataModule, *splits: SplitName) -> None:
    """Refuse (``ValueError``) rows of this process's runs beyond the backbone's positions."""
    for key in _own_keys(method, data):
        for split in splits:
            _check_length(method, data.tokens(*key, split))


def _own_keys(method: PromptMethod, data: PromptDataModule) -> list[Key]:
    if not method.shares.divided:
        return data.keys
    return list(dict.fromkeys((run.task, run.sample) for run in method.runs))


def _look_alikes(method: PromptMethod, task: Task) -> list[str]:
    told, labels, name = [], task.labels or (), method.backbone.name
    if len({label.lower() for label in labels}) < len(labels):
        told = [f"task {task.name}: some labels differ by case alone: {', '.join(labels)}"]
    if alike := method.backbone.look_alikes(labels, method.datamodule.frame):
        groups = "; ".join(", ".join(map(repr, group)) for group in alike)
        if len(alike[0]) == len(labels):
            raise ValueError(
                f"task {task.name}: all labels have the same tokens for backbone {name!r} "
                f"({groups}), so that nothing can be learned: take a backbone whose tokenizer "
                "knows them, or other words for the labels"
            )
        told.append(
            f"task {task.name}: labels with the same tokens for backbone {name!r}, of which the "
            f"first is always answered: {groups}"
        )
    return told


def _check_length(method: PromptMethod, rows: Rows) -> None:
    positions, prompt = method.backbone.max_positions, method.num_virtual_tokens
    if positions is None:
        return
    made = (method.max_new_tokens or 0) if method.way(rows.task).labels is None else 0
    answer, longest = max(rows.longest_target, made), max(map(len, rows.inputs))
    after = 0 if method.backbone.is_encoder_decoder else answer
    if max(prompt + longest + after, answer) > positions:
        raise ValueError(
            f"task {rows.task.name}: {prompt} virtual tokens, inputs of up to {longest} tokens "
            f"and answers of up to {answer} do not fit the {positions} positions of backbone "
            f"{method.backbone.name!r}: lower data.max_input_length, model.num_virtual_tokens or "
            "model.max_new_tokens"
        )


def describe(method: PromptMethod, data: PromptDataModule, trainer: Trainer) -> str:
    """The text of ``fit --dry_run``; what is trained is made, and nothing is trained."""
    method.look(data, trainer)
    lines = [method.summary()]
    if not method.trains:
        return "\n".join(["nothing is trained; prompt-lab test evaluates:", *lines])
    axes = {field.name: [getattr(r, field.name) for r in method.all_runs] for field in fields(Run)}
    axes |= {name: getattr(method, name, []) for name in ROLES}
    lines += [
        f"  {k}: {', '.join(map(str, dict.fromkeys(v)))}"
        for k, v in axes.items()
        if v and v[0] != ""
    ]
    lines.append(f"backbone: {method.backbone.name}")
    lines.append(f"steps: {trainer.max_steps}, evaluation every {trainer.val_check_interval}")
    if (processes := trainer.world_size) > 1:
        shared = "the rows of every step shared"
        if method.shares.divided:
            shared = f"whole runs shared, {len(method.runs)} of them in the first"
        lines.append(f"processes: {processes}, {shared}; of the first process:")
    batch = method.draw(data).batch(0, method.progress.live)
    if not isinstance(batch, Batch):
        return "\n".join(lines)
    bank, backbone, count = method.bank().detach(), method.backbone, method.num_virtual_tokens
    parts = backbone.micro_batches(batch, method.tokens_per_forward, count)
    extra = count if backbone.is_encoder_decoder else 0
    sizes = [
        padded_tokens(part)
        if backbone.packs
        else len(part) * (part.input_ids.shape[1] + part.target_ids.shape[1] + extra)
        for part in parts
    ]
    padded = sum(sizes) + (0 if extra else len(bank) * (bank.shape[1] + len(batch.front)))
    largest = parts[sizes.index(max(sizes))]
    kept = saved_bytes(backbone, bank.requires_grad_(), largest, method.label_smoothing)
    held = method.held() | {"activations of the largest micro-batch": kept}
    memory = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in held.items())
    rows = f"{len(batch)} rows, {padded} padded tokens in {len(parts)} micro-batches"
    lines += [f"first step: {rows}", f"memory: {memory}"]
    if bank.numel():
        began = time.perf_counter()
        losses, _ = bank_gradient(
            *(backbone, bank.detach(), largest.to(backbone.device)),
            *(method.tokens_per_forward, method.label_smoothing),
        )
        losses.sum().item()  # the device is done
        step = (time.perf_counter() - began) * sum(sizes) / max(sizes)
        whole = f"{step * trainer.max_steps / 60:,.1f} minutes of steps"
        lines.append(
            f"time: {whole}, {step:.2g} s each by the largest micro-batch, and evaluations"
        )
    return "\n".join(lines)


def saved_bytes(
    backbone: Backbone, prompts: torch.Tensor, batch: Batch, label_smoothing: float = 0.0
) -> int:
    """Bytes that autograd keeps for rows under a bank (R, N, D), weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The loss is kept until the count is done, so that no storage is freed and used again.
        loss = backbone.loss(prompts, batch.to(backbone.device), label_smoothing)
    del loss
    return sum(seen.values())
