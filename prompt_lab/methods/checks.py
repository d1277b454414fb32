"""What a Trainer must not do, since it would do nothing or quietly change the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from lightning.pytorch import callbacks
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

if TYPE_CHECKING:
    from prompt_lab.methods.method import PromptMethod

REFUSED_CALLBACKS = {
    "WeightAveraging": "prompts are kept by dev score, not averaged",
    "StochasticWeightAveraging": "prompts are kept by dev score, not averaged",
    "BaseFinetuning": "the backbone stays frozen",
    "ModelPruning": "the backbone stays as it is, and prompts have nothing to prune",
    "LearningRateFinder": "rates belong to runs: give several as model.learning_rate",
    "BatchSizeFinder": "model.tokens_per_forward bounds memory; a batch size changes the result",
}
"""Callbacks of Lightning that would do nothing, or change what is recorded, and why."""


def check_trainer(method: PromptMethod) -> None:
    """Refuse trainer settings that would quietly change the result.

    Raises:
        ValueError: the setting, and what to use instead.
    """
    trainer = method.trainer
    strategy, whole = trainer.strategy, (SingleDeviceStrategy, DDPStrategy)
    if not isinstance(strategy, whole) or isinstance(strategy, DeepSpeedStrategy):
        refuse_strategy(type(strategy).__name__)
    if trainer.precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision {trainer.precision} would round the prompts and their "
            "optimizer: use trainer.precision 32-true with model.backbone.dtype bfloat16"
        )
    if trainer.precision == "16-mixed":
        raise ValueError(
            "trainer.precision 16-mixed: a step makes its gradient before the trainer scales "
            "the loss, so small gradients are below what float16 holds: use bf16-mixed or "
            "32-true"
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
    refused = dict(REFUSED_CALLBACKS)
    if method.trains_a_bank:
        refused["GradientAccumulationScheduler"] = "a step is cut into micro-batches anyway"
    for given in getattr(trainer, "callbacks", []):
        for kind in type(given).__mro__:
            own = kind is getattr(callbacks, kind.__name__, None)
            idle = isinstance(given, callbacks.GradientAccumulationScheduler) and (
                given.scheduling == {0: 1}  # Lightning puts one into every trainer
            )
            if own and kind.__name__ in refused and not idle:
                raise ValueError(
                    f"the callback {type(given).__name__} does not go with "
                    f"{type(method).__name__}: {refused[kind.__name__]}; leave it out"
                )


def refuse_strategy(name: str) -> NoReturn:
    """Refuse a strategy that splits the backbone over devices (FSDP, DeepSpeed, tensor parallel).

    Each of its layers would wait for all processes, but those run different rows in different
    numbers of forward passes; some have none.

    Raises:
        ValueError: what to use instead.
    """
    raise ValueError(
        f"trainer.strategy {name} splits the backbone over devices, whose layers then wait for "
        "each other, while here every process runs rows or runs of its own: use ddp. For a "
        "backbone that is too large for a device use model.backbone.dtype bfloat16, "
        "model.backbone.gradient_checkpointing true and a smaller model.tokens_per_forward"
    )
