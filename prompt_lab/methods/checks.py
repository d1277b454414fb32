"""Values that a setting may have, and what a Trainer must not do.

What is refused would do nothing, or quietly change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from lightning.pytorch import callbacks
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from prompt_lab.methods.configs import flag_names

if TYPE_CHECKING:
    from prompt_lab.methods.method import PromptMethod

COUNTS = (
    *("tokens_per_forward", "num_beams", "max_new_tokens", "num_virtual_tokens", "batch_size"),
    *("intrinsic_dim", "inner_size", "bottleneck", "episodes", "support_size", "query_size"),
)
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(COUNTS, (lambda value: value >= 1, "at least 1")),
    "patience": (lambda value: value >= 1, "at least 1, or null"),
    **dict.fromkeys(("alpha", "std"), (lambda value: value >= 0, "0 or more")),
    **dict.fromkeys(
        ("learning_rate", "attention_learning_rate", "rate_factor", "temperature"),
        (lambda value: value > 0, "a positive number"),
    ),
    "label_smoothing": (lambda value: 0 <= value < 1, "0 up to below 1"),
    "warmup": (lambda value: 0 <= value <= 1, "a share of the steps, 0 to 1"),
    "clip": (lambda value: value > 0, "a positive norm, or null for none"),
}
"""What settings of one number may be, whichever method has them."""

BY_DEV = "prompts are kept by dev score, not averaged"
REFUSED_CALLBACKS = {
    callbacks.WeightAveraging: BY_DEV,
    callbacks.StochasticWeightAveraging: BY_DEV,
    callbacks.BaseFinetuning: "the backbone stays frozen",
    callbacks.ModelPruning: "the backbone stays as it is, and prompts have nothing to prune",
    callbacks.LearningRateFinder: "rates belong to runs: give several as model.learning_rate",
    callbacks.BatchSizeFinder: "model.tokens_per_forward bounds memory; a batch size is a result's",
    callbacks.GradientAccumulationScheduler: "a step is cut into micro-batches anyway",
}
"""Callbacks of Lightning that would do nothing, or change what is recorded, and why."""


def check_settings(given: Mapping[str, Any]) -> None:
    """Refuse (``ValueError``) a number out of its setting's range, also of nested settings."""
    for name, value in flag_names(dict(given)).items():
        is_allowed, allowed = LIMITS.get(name.rpartition(".")[2], (None, ""))
        if is_allowed and isinstance(value, (int, float)) and not is_allowed(value):
            raise ValueError(f"model.{name} is {value}: give {allowed}")


def check_trainer(method: PromptMethod) -> None:
    """Refuse (``ValueError``) trainer settings that would quietly change the result."""
    trainer: Any = method.trainer
    strategy, whole = trainer.strategy, (SingleDeviceStrategy, DDPStrategy)
    if not isinstance(strategy, whole) or isinstance(strategy, DeepSpeedStrategy):
        refuse_strategy(type(strategy).__name__)
    if trainer.precision in ("bf16-true", "16-true", "16-mixed"):
        raise ValueError(
            f"trainer.precision {trainer.precision} would round prompts and optimizer, or small "
            "gradients, which a step makes before the trainer scales the loss: use bf16-mixed, or "
            "32-true with model.backbone.dtype bfloat16"
        )
    if trainer.gradient_clip_val and method.trains_a_bank:
        raise ValueError(
            "trainer.gradient_clip_val clips over all runs of the bank together and so couples "
            "them: use model.optim.clip (some methods have model.clip), which clips each alone"
        )
    if trainer.accumulate_grad_batches != 1 and method.trains_a_bank:
        raise ValueError(
            "trainer.accumulate_grad_batches is not needed: a step is cut into micro-batches "
            "of model.tokens_per_forward tokens; set model.batch_size instead"
        )
    for given in trainer.callbacks:
        for kind, why in REFUSED_CALLBACKS.items():
            accumulates = kind is callbacks.GradientAccumulationScheduler
            if isinstance(given, kind) and (method.trains_a_bank or not accumulates):
                raise ValueError(
                    f"the callback {type(given).__name__} does not go with "
                    f"{type(method).__name__}: {why}; leave it out"
                )


def refuse_strategy(name: str) -> NoReturn:
    """Refuse (``ValueError``) a strategy that splits the backbone (FSDP, DeepSpeed and the like).

    Each of its layers would wait for all processes, but those run different rows in different
    numbers of forward passes; some have none.
    """
    raise ValueError(
        f"trainer.strategy {name} splits the backbone over devices, whose layers then wait for "
        "each other, while here every process runs rows or runs of its own: use ddp. For a "
        "backbone that is too large for a device use model.backbone.dtype bfloat16, "
        "model.backbone.gradient_checkpointing true and a smaller model.tokens_per_forward"
    )


def hold_out(tasks: Iterable[str], setting: str, held_out: Sequence[str]) -> list[str]:
    """The tasks left to learn from; a ``ValueError`` for none, or for held out ones not there."""
    if strange := [task for task in held_out if task not in tasks]:
        raise ValueError(
            f"model.{setting} has {', '.join(strange)}, which data.tasks has not: add them there, "
            "since their rows are needed"
        )
    if left := [task for task in tasks if task not in held_out]:
        return left
    raise ValueError(f"model.{setting} has every task of data.tasks: leave some to learn from")
