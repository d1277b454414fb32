"""G14: a step of ``PromptTuning`` under Lightning's Trainer against a bare Python loop.

The bare loop does the same work: rows of the step, their transfer, the gradient in micro-batches,
the checks for failed runs, backward, the optimizer. It runs within the fit: after every block of
Lightning's steps a callback stops the clock, runs as many bare steps on a prompt and an optimizer
of its own, and starts the clock again; start-up and evaluation of the fit are not timed. Both
sides start from one prompt and see the same rows, and must end with the same prompt.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from models import T5, TINY, Size, make_backbone, make_model
from pairs import WARM_UP, Settings, ratios, seconds
from steps import Result, virtual_tokens

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import bank_gradient, with_gradient
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.methods.prompt_tuning import PromptTuning

T5_SMALL = Size(6, 512, 8, feed_forward=2048)
TASK = "sandbox-review"


def lightning_steps(settings: Settings) -> Iterator[Result]:
    """G14: T5-small's size, and for information the tiny model of the sandbox."""
    goal = settings.goal(1.05, 1.05)
    size = {"quick": TINY, "cpu": T5_SMALL, "cuda": T5["cuda"]}[settings.size]
    backbone = make_backbone(make_model("t5", size, settings.device, settings.dtype))
    name = {"quick": "tiny T5", "cpu": "T5-small's size", "cuda": "T5-base's size"}[settings.size]
    yield _measure(name, backbone, 4, goal, settings)
    sandbox = Backbone.load("sandbox").to(settings.device)
    yield _measure("sandbox", sandbox, 4 if settings.quick else 20, None, settings)


def _measure(
    name: str, backbone: Backbone, block: int, goal: float | None, settings: Settings
) -> Result:
    """Blocks of steps of one model."""
    blocks = (1 if settings.quick else WARM_UP) + settings.pairs
    clock = BareSteps(block, settings.device)
    method = PromptTuning(num_virtual_tokens=virtual_tokens(settings), batch_size=8)
    method.backbone = backbone
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if settings.device == "cuda" else "cpu",
            devices=1,
            max_epochs=-1,
            max_steps=block * blocks,
            val_check_interval=block * blocks,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            inference_mode=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            logger=CSVLogger(folder, name="logs"),
            default_root_dir=folder,
            callbacks=[clock],
        )
        trainer.fit(method, datamodule=CrossFitDataModule([TASK]))
    difference = clock.difference(method)
    found = ratios(clock.pairs[blocks - settings.pairs :])
    return (
        f"step under Lightning / step of a bare loop, {name}, B 8",
        {
            **found,
            "threshold": goal,
            "sense": "<=",
            "steps_per_block": block,
            "agreement": {"prompt": difference},
        },
    )


class BareSteps(Callback):
    """Times blocks of Lightning's steps, and after each as many steps of a bare loop."""

    def __init__(self, block: int, device: str) -> None:
        self.block, self.device = block, device
        self.pairs: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: PromptTuning) -> None:
        method = pl_module
        self.prompt = method.prompt.detach().clone().requires_grad_()
        self.active = torch.ones_like(method.active)
        self.loss_sum = torch.zeros_like(method.loss_sum)
        rates = [run.learning_rate for run in method.runs]
        self.optimizer = method.optim_config.build(
            [self.prompt], rates, self.active, trainer.max_steps
        )
        self.draw = method.draw(method.datamodule)
        self.done = 0
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: PromptTuning, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.block:
            return
        lightning = seconds(lambda: None, self.device)  # waits for the device
        lightning += time.perf_counter() - self.start
        self.pairs.append((lightning, seconds(lambda: self.run(pl_module), self.device)))
        self.start = time.perf_counter()

    def run(self, method: PromptTuning) -> None:
        """A block of bare steps, with the arithmetic of ``training_step``."""
        assert method.backbone is not None
        for _ in range(self.block):
            batch = self.draw.batch(self.done, [0]).to(self.device)
            losses, gradient = bank_gradient(
                method.backbone, self.prompt, batch, method.tokens_per_forward
            )
            finite = losses.isfinite() & gradient.flatten(1).isfinite().all(1)
            self.active &= finite
            losses = torch.where(self.active, losses, 0)
            gradient = torch.where(self.active[:, None, None], gradient, 0)
            self.loss_sum += losses
            loss = with_gradient(losses.sum(), self.prompt, gradient)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.done += 1

    def difference(self, method: PromptTuning) -> float:
        """Largest difference of the two prompts after all steps.

        Raises:
            RuntimeError: they are not equal, so the two sides did not do the same work.
        """
        found = (self.prompt - method.prompt.to(self.prompt.device)).abs().max().item()
        if not found <= (0 if self.device == "cpu" else 1e-3):
            raise RuntimeError(f"the two loops end with prompts that differ by {found:.2g}")
        return found
