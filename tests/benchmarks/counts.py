"""G12 and G13: what can be counted exactly, padded tokens and bytes of files. Nothing is timed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import task_lengths
from pairs import Settings
from steps import Result

from prompt_lab.core.batch import Batch, make_batch, micro_batches
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.methods.prompt_tuning import PromptTuning

MEDIANS = (12, 18, 25, 35, 50, 70, 90, 110)  # tokens of an input, by task
ROWS, STEPS = 8, 50
BUDGETS = (16384, 2048)  # the defaults on a GPU and on a CPU
KILOBYTE = 1024


def padded_tokens(settings: Settings) -> Iterator[Result]:
    """G12: a bank of 8 tasks, 8 rows each, 50 steps; prompts are not counted on either side.

    The baseline pads all rows of a step to the longest one, ours pads within each micro-batch.
    """
    batches = [_mixed_batch(step) for step in range(STEPS)]
    real = sum(sum(batch.input_lengths) + sum(batch.target_lengths) for batch in batches)
    baseline = sum(_tokens(batch) for batch in batches)
    for limit in BUDGETS:
        parts = [part for batch in batches for part in micro_batches(batch, limit)]
        ours = sum(map(_tokens, parts))
        yield (
            f"padded tokens of mixed batches, one batch / micro-batches of {limit} tokens",
            {
                "value": baseline / ours,
                "threshold": settings.goal(1.3, 1.3),
                "tokens": {"real": real, "one batch": baseline, "ours": ours},
                "forwards_per_step": len(parts) / STEPS,
            },
        )


def _mixed_batch(step: int) -> Batch:
    """The rows of one step of the bank, answers of 2 to 4 tokens."""
    rng = np.random.default_rng(step)
    lengths = [
        length
        for task, median in enumerate(MEDIANS)
        for length in task_lengths(ROWS, median, seed=STEPS * task + step)
    ]
    targets = [[1] * int(rng.integers(2, 5)) for _ in lengths]
    prompts = [row // ROWS for row in range(len(lengths))]
    inputs = [[1] * length for length in lengths]
    return make_batch(inputs, targets, prompts, pad_id=0, left_padded=True)


def _tokens(batch: Batch) -> int:
    """Tokens of a batch, padding included."""
    return len(batch) * (batch.input_ids.shape[1] + batch.target_ids.shape[1])


def file_bytes(settings: Settings) -> Iterator[Result]:
    """G13: the checkpoint of a fit with AdamW on the sandbox, and a prompt exported for PEFT."""
    for runs, count in ((1, 100), (40, 20)):
        with tempfile.TemporaryDirectory() as folder:
            method = _fit(Path(folder), runs, count)
            yield _checkpoint(Path(folder), method)
            if runs == 1:
                yield from _exported(Path(folder), method)


def _checkpoint(folder: Path, method: PromptTuning) -> Result:
    """Bytes of the checkpoint, in bytes of the prompts."""
    runs, count, _ = method.prompt.shape
    prompts = method.prompt.numel() * 4
    size = (folder / "checkpoints" / "last.ckpt").stat().st_size
    allowed = 5 * prompts + 64 * KILOBYTE + 256 * runs
    return (
        f"checkpoint bytes / prompt bytes, R {runs}, N {count}, D {method.prompt.shape[2]}",
        {
            "value": size / prompts,
            "threshold": allowed / prompts,
            "sense": "<=",
            "bytes": {"file": size, "prompts": prompts, "allowed": allowed},
        },
    )


def _exported(folder: Path, method: PromptTuning) -> Iterator[Result]:
    """Bytes of the file with the tensor, in bytes of the prompt."""
    try:
        from prompt_lab.commands.prompts import export_prompts
    except ImportError:
        print("G13: no prompt_lab.commands.prompts yet, so no exported prompt")
        return
    source = folder / "prompts" / f"{method.runs[0].name}.safetensors"
    export_prompts(str(source), str(folder / "peft"), format="peft")
    size = (folder / "peft" / "adapter_model.safetensors").stat().st_size
    prompt = method.prompt[0].numel() * 4
    yield (
        "bytes of a prompt exported for PEFT / prompt bytes",
        {
            "value": size / prompt,
            "threshold": 1.01,
            "sense": "<=",
            "bytes": {"file": size, "prompts": prompt},
        },
    )


def _fit(folder: Path, runs: int, count: int) -> PromptTuning:
    """A short fit with the files that the command line writes."""
    torch.manual_seed(0)
    grid: dict[str, Any] = {"init_seed": list(range(runs // min(runs, 4)))}
    grid["learning_rate"] = [0.3, 0.1, 0.03, 0.01][:runs]
    method = PromptTuning(num_virtual_tokens=count, batch_size=2, **grid)
    method.run_dir = folder
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=2,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=CSVLogger(str(folder), name="logs"),
        default_root_dir=folder,
        callbacks=[
            ModelCheckpoint(
                dirpath=folder / "checkpoints", filename="last", save_on_train_epoch_end=False
            )
        ],
    )
    trainer.fit(method, datamodule=CrossFitDataModule(["sandbox-review"]))
    assert len(method.runs) == runs
    return method
