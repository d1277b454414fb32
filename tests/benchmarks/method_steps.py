"""One step of every method, to be timed, counted and profiled by ``profile_step.py``.

A step is the method's own ``training_step``, the backward pass and the optimizer's step, called
from within a fit under Lightning's Trainer (whose own part is G14's business); where gradients are
clipped, that is left out. ``VectorArithmetic`` trains nothing: its step is the answers to one batch
of an evaluation, by the likelihoods of labels. Rows are those of sandbox tasks as the small
tokenizer of the tests cuts them, at most 40 tokens, 8 rows to a step (episodes: 2 of 4 support and
4 query rows). The models are random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from models import make_prompts

from prompt_lab.core.adapters import AdapterLayout
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.meta_gradient import InnerConfig
from prompt_lab.core.subspace import AdapterMap
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.files.prompts import Prompt, PromptStore
from prompt_lab.files.tensors import save_network
from prompt_lab.methods.adapter_subspace import AdapterSubspace, AdapterTuning
from prompt_lab.methods.attempt import Attempt
from prompt_lab.methods.fine_tuning import FineTuning
from prompt_lab.methods.intrinsic_subspace import IntrinsicSubspace
from prompt_lab.methods.meta_prompt import Algorithm, MetaPrompt
from prompt_lab.methods.method import PromptMethod
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.starts import SubspaceConfig
from prompt_lab.methods.vector_arithmetic import VectorArithmetic

TASKS = ["sandbox-sst", "sandbox-gender", "sandbox-daytime"]
ROWS, LONGEST, SAMPLE = 8, 40, 100


@dataclass(frozen=True)
class Bench:
    """What methods are made of.

    Attributes:
        backbone: a model of their own.
        count: N.
        folder: for the files that they read and write.
    """

    backbone: Backbone
    count: int
    folder: Path

    @property
    def store(self) -> str:
        """A store with a prompt of every task, all from one initial prompt."""
        path, backbone = self.folder / "store", self.backbone
        first, *others = make_prompts(backbone, len(TASKS) + 1, self.count).cpu()
        prompts = [
            Prompt(
                prompt=prompt,
                init=first,
                name=task,
                backbone=backbone.name,
                backbone_digest=backbone.digest,
                tokenizer_digest=backbone.tokenizer_digest,
                task=task,
                sample=SAMPLE,
                init_seed=0,
                start="vocab",
                dev_score=0.5,
            )
            for task, prompt in zip(TASKS, others, strict=True)
        ]
        PromptStore(path).save(prompts)
        return str(path)

    @property
    def adapters(self) -> str:
        """The file of a random map to adapters."""
        path, layout = self.folder / "map.safetensors", AdapterLayout.of(self.backbone)
        metadata = {"backbone": self.backbone.name, "backbone_digest": self.backbone.digest}
        made = AdapterMap(layout.size, 5, 64)
        save_network(path, made, {**metadata, "bottleneck": layout.bottleneck})
        return str(path)


def _prompt(bench: Bench, **settings: Any) -> PromptTuning:
    """Prompt tuning of one prompt."""
    return PromptTuning(batch_size=ROWS, num_virtual_tokens=bench.count, **settings)


def _subspace(bench: Bench) -> IntrinsicSubspace:
    """Subspace finding with one map."""
    return IntrinsicSubspace(bench.store, batch_size=ROWS, num_virtual_tokens=bench.count)


def _meta(bench: Bench, algorithm: Algorithm) -> MetaPrompt:
    """One inner step of two episodes."""
    inner = InnerConfig(learning_rate=0.1)
    return MetaPrompt(algorithm, inner=inner, episodes=2, num_virtual_tokens=bench.count)


def _attempt(bench: Bench) -> Attempt:
    """Two source prompts."""
    return Attempt(bench.store, TASKS[1:], batch_size=ROWS, num_virtual_tokens=bench.count)


METHODS: dict[str, Callable[[Bench], PromptMethod]] = {
    "PromptTuning": _prompt,
    "PromptTuning in a subspace": lambda b: _prompt(b, subspace=SubspaceConfig("random", 10)),
    "IntrinsicSubspace": _subspace,
    "MetaPrompt, MAML": lambda b: _meta(b, "maml"),
    "MetaPrompt, FoMAML": lambda b: _meta(b, "fomaml"),
    "MetaPrompt, Reptile": lambda b: _meta(b, "reptile"),
    "Attempt": _attempt,
    "AdapterSubspace": lambda b: AdapterSubspace(inner_size=64, batch_size=ROWS),
    "AdapterTuning": lambda b: AdapterTuning(b.adapters, batch_size=ROWS),
    "FineTuning": lambda b: FineTuning(batch_size=ROWS),
    "VectorArithmetic": lambda b: VectorArithmetic(b.store, study="singles"),
}


class Measured(Exception):
    """A step was measured, and no more is wanted of the trainer."""


class AtFirstStep(Callback):
    """Hands the step of a method to a function, in the middle of a fit or an evaluation."""

    def __init__(self, look: Callable[[PromptMethod, Callable[[], Any]], None]) -> None:
        self.look = look

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        optimizer = trainer.optimizers[0]

        def step() -> None:
            optimizer.zero_grad()
            pl_module.training_step(batch, batch_idx).backward()
            optimizer.step()

        self.look(pl_module, step)
        raise Measured

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, *_: int
    ) -> None:
        prefixes = pl_module.prefixes(current=False)
        self.look(pl_module, lambda: pl_module.answer(prefixes, batch))
        raise Measured


def with_step(
    name: str,
    bench: Bench,
    device: str,
    look: Callable[[PromptMethod, Callable[[], Any]], None],
) -> None:
    """Give a method and its step to ``look``, which may call the step as often as it likes."""
    method = METHODS[name](bench)
    method.backbone = bench.backbone
    one_task = name.startswith(("PromptTuning", "AdapterTuning", "FineTuning"))
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=-1,
        max_steps=2,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
        default_root_dir=bench.folder / "run",
        callbacks=[AtFirstStep(look)],
    )
    data = CrossFitDataModule(
        TASKS[:1] if one_task else TASKS, samples=[SAMPLE], max_input_length=LONGEST
    )
    run = trainer.validate if isinstance(method, VectorArithmetic) else trainer.fit
    try:
        run(method, datamodule=data)
    except Measured:
        torch.set_grad_enabled(True)  # as it was before an evaluation
