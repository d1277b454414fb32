"""G1 to G5 and G16: one training step, forward and backward, against PEFT or against single runs.

Both sides run on the same weights and the same rows with the same loss, the mean over the target
tokens of a prompt; losses and gradients are compared before they are timed. The optimizer is left
out on both sides. Our side is what ``PromptTuning.training_step`` does and the backward after it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from models import (
    DECODER,
    T5,
    TINY,
    Row,
    Size,
    make_backbone,
    make_model,
    make_prompts,
    make_rows,
    our_batch,
    peft_inputs,
    peft_model,
    uniform_lengths,
)
from pairs import Settings, Step, check_steps, cpu_field, measure
from torch import Tensor

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import bank_gradient, with_gradient
from prompt_lab.core.batch import Batch, default_tokens_per_forward

G1 = {"gpt2": 5.0, "bloom": 8.0, "llama": 4.5, "qwen2": None}
BF16_LIMITS = {"loss_limit": 0.1, "gradient_limit": 0.2}  # weights and activations are rounded
# Of sixteen runs one may have a hidden unit of the random T5 that rounding takes over ReLU's kink.
KINK_LIMITS = {"gradient_limit": 1e-2}
BF16_FLAGS = ("avx512_bf16", "amx_bf16")

Result = tuple[str, dict[str, Any]]


def causal_steps(settings: Settings) -> Iterator[Result]:
    """G1: decoder-only models, texts of 15 to 40 tokens."""
    for kind, wanted in G1.items():
        goal = settings.goal(wanted, 3.0)
        yield from _peft_step(kind, DECODER[settings.size], 8, (15, 40), goal, settings)


def long_causal_step(settings: Settings) -> Iterator[Result]:
    """G2: the same with texts of 60 to 160 tokens."""
    goal = settings.goal(3.0, 2.0)
    yield from _peft_step("gpt2", DECODER[settings.size], 8, (60, 160), goal, settings)


def t5_steps(settings: Settings) -> Iterator[Result]:
    """G3: T5, where nothing is to be won but nothing may be lost."""
    for rows in (8, 32):
        goal = settings.goal(1.0, 1.0)
        yield from _peft_step("t5", T5[settings.size], rows, (15, 40), goal, settings)


def causal_bank(settings: Settings) -> Iterator[Result]:
    """G4: eight steps of PEFT against one step of a bank of eight prompts, four rows each."""
    runs, rows = 8, 4
    backbone = make_backbone(
        make_model("gpt2", DECODER[settings.size], settings.device, settings.dtype)
    )
    prompts = make_prompts(backbone, runs, virtual_tokens(settings))
    groups = make_groups(backbone, runs, rows, (15, 40))
    singles = [peft_side(backbone, prompts[r : r + 1], [group]) for r, group in enumerate(groups)]
    what = f"{runs} PEFT steps / 1 step of a bank of {runs}, GPT-2-like, B {rows}"
    goal = settings.goal(2.9, 12.0)
    yield compare(
        what, in_turn(singles), our_side(backbone, prompts, groups), goal, settings, backbone
    )


def t5_banks(settings: Settings) -> Iterator[Result]:
    """G5: single runs of ours against one bank; no PEFT in it."""
    runs, rows = 16, 8
    cases = [
        ("T5-like", T5[settings.size], virtual_tokens(settings), (40, 100), (1.0, 8.0)),
        ("tiny T5 (d 64)", TINY, 20, (15, 40), (2.0, None)),
    ]
    for name, size, count, lengths, goals in cases:
        backbone = make_backbone(make_model("t5", size, settings.device, settings.dtype))
        prompts = make_prompts(backbone, runs, count)
        groups = make_groups(backbone, runs, rows, lengths)
        singles = [
            our_side(backbone, prompts[r : r + 1], [group]) for r, group in enumerate(groups)
        ]
        what = f"{runs} single steps / 1 step of a bank of {runs}, {name}, N {count}, "
        what += f"B {rows}, S {lengths[1]}"
        bank, goal = our_side(backbone, prompts, groups), settings.goal(*goals)
        yield compare(what, in_turn(singles), bank, goal, settings, backbone, KINK_LIMITS)


def bf16_step(settings: Settings) -> Iterator[Result]:
    """G16: PEFT in float32 against ours with bfloat16 weights, on a CPU that has instructions."""
    flags = cpu_field("flags").split()
    if settings.device != "cpu" or not any(flag in flags for flag in BF16_FLAGS):
        print(f"G16 left out: it is for CPUs with {' or '.join(BF16_FLAGS)}")
        return
    backbone = make_backbone(make_model("t5", T5[settings.size]))
    rounded = make_backbone(copy.deepcopy(backbone.model).to(torch.bfloat16))
    prompts = make_prompts(backbone, 1, virtual_tokens(settings))
    groups = make_groups(backbone, 1, 8, (15, 40))
    yield compare(
        "PEFT step in float32 / ours with bfloat16 weights, T5-like, B 8",
        peft_side(backbone, prompts, groups),
        our_side(rounded, prompts, groups),
        settings.goal(2.0, None),
        settings,
        rounded,
    )


# ---- the two sides -------------------------------------------------------------------------------


def virtual_tokens(settings: Settings) -> int:
    """N: as in the papers, or few."""
    return 10 if settings.quick else 100


def _peft_step(
    kind: str,
    size: Size,
    rows: int,
    lengths: tuple[int, int],
    goal: float | None,
    settings: Settings,
) -> Iterator[Result]:
    """A PEFT step against ours, one prompt."""
    backbone = make_backbone(make_model(kind, size, settings.device, settings.dtype))
    prompts = make_prompts(backbone, 1, virtual_tokens(settings))
    groups = make_groups(backbone, 1, rows, lengths)
    name = {"gpt2": "GPT-2", "bloom": "BLOOM", "llama": "Llama", "qwen2": "Qwen2", "t5": "T5"}[kind]
    what = f"PEFT step / ours, {name}-like, B {rows}, S {lengths[1]}"
    theirs, ours = peft_side(backbone, prompts, groups), our_side(backbone, prompts, groups)
    yield compare(what, theirs, ours, goal, settings, backbone)


def compare(
    what: str,
    first: Step,
    second: Step,
    goal: float | None,
    settings: Settings,
    ours: Backbone,
    limits: dict[str, float] | None = None,
) -> Result:
    """Check agreement, then time; what rounds to bfloat16 agrees less."""
    if ours.model.dtype == torch.bfloat16:
        limits = BF16_LIMITS
    agreement = check_steps(first, second, **(limits or {}))
    return what, {**measure(first, second, settings), "threshold": goal, "agreement": agreement}


def make_groups(
    backbone: Backbone, runs: int, rows: int, lengths: tuple[int, int]
) -> list[list[Row]]:
    """Rows of every run, different for each."""
    return [
        make_rows(backbone, uniform_lengths(rows, *lengths, seed=run), seed=100 + run)
        for run in range(runs)
    ]


def peft_side(backbone: Backbone, prompts: Tensor, groups: list[list[Row]]) -> Step:
    """One PEFT step of one prompt: losses (1,) and gradient (1, N, D)."""
    model, weight = peft_model(backbone, prompts[0])
    inputs, count = peft_inputs(backbone, groups[0]), prompts.shape[1]

    def step() -> tuple[Tensor, Tensor]:
        weight.grad = None
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()[None].float(), weight.grad[None, :count]

    return step


def our_side(backbone: Backbone, prompts: Tensor, groups: list[list[Row]]) -> Step:
    """One step of a bank: losses (R,) and gradient (R, N, D)."""
    batch: Batch = our_batch(backbone, groups)
    tokens = default_tokens_per_forward(backbone.device)
    bank = prompts.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        bank.grad = None
        losses, gradient = bank_gradient(backbone, bank, batch, tokens)
        with_gradient(losses.sum(), bank, gradient).backward()
        assert bank.grad is not None
        return losses, bank.grad

    return step


def in_turn(steps: list[Step]) -> Step:
    """Several steps one after the other, as one."""

    def run() -> tuple[Tensor, Tensor]:
        losses, gradients = zip(*[step() for step in steps], strict=True)
        return torch.cat(losses), torch.cat(gradients)

    return run
