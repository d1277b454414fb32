"""The prompts inside a Lightning checkpoint of ``PromptTuning``.

A checkpoint holds the bank of a fit, its runs, and the digests of backbone and tokenizer. It is
read without unpickling anything but tensors and plain values.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from prompt_lab.core.run import Run
from prompt_lab.files.prompt_file import Prompt

_TENSORS = ("init", "best", "best_score", "best_step")
_DAMAGE = (UnpicklingError, OSError, RuntimeError, EOFError)
_DAMAGE += (ValueError, LookupError, TypeError, AttributeError)


def load_checkpoint(path: str | Path) -> list[Prompt]:
    """The prompt of every run of a checkpoint, in the order of its bank.

    The best one by dev; of a run that was never scored, the one of the last step.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, damaged, or of another method.
    """
    saved = read_pickle(path)
    saved = saved if isinstance(saved, dict) else {}
    try:
        state, settings = saved["state_dict"], saved["hyper_parameters"]
        init, best, score, step = (state[name] for name in _TENSORS)
        prompt = state.get("prompt", best)  # in a subspace there are codes instead
        backbone, starts = str(settings["backbone"]["name"]), saved["starts"]
        digest, tokenizer = str(saved["backbone_digest"]), str(saved["tokenizer_digest"])
        runs = [Run(**run) for run in saved["runs"]]
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a checkpoint of PromptTuning of this package "
            f"({type(error).__name__}: {error})"
        ) from error
    if not len(runs) == len(starts) == len(prompt) == len(best) == len(init):
        raise ValueError(f"{path}: damaged checkpoint: {len(runs)} runs, {len(best)} prompts")
    prompts = []
    for i, run in enumerate(runs):
        scored = int(step[i]) >= 0
        prompts.append(
            Prompt(
                prompt=(best if scored else prompt)[i].float(),
                init=init[i].float(),
                name=run.name,
                backbone=backbone,
                backbone_digest=digest,
                tokenizer_digest=tokenizer,
                task=run.task,
                sample=run.sample,
                **starts[i],
                init_seed=run.init_seed,
                learning_rate=run.learning_rate,
                batch_size=run.batch_size,
                steps=int(step[i]) if scored else int(saved.get("global_step", 0)),
                dev_score=float(score[i]) if score[i].isfinite() else None,
            )
        )
    return prompts


def read_pickle(path: str | Path) -> Any:
    """What ``torch.save`` wrote, if it is made of tensors and plain values alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, another kind of file, or one that would run code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise ValueError(
            f"{path}: not a file of tensors and plain values by torch.save, or damaged "
            f"({type(error).__name__}): give another file"
        ) from error
