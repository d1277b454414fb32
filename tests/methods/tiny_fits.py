"""Tiny methods of every kind and their fits, which the tests of methods share.

Run as a script, it makes each fit once without a break and once interrupted and resumed, among
processes of one job; :func:`run_all` in one process is the reference.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from conftest import HIDDEN, make_backbone, make_data, make_method, make_store, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from prompt_lab.core.adapters import AdaptedBackbone
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.meta_gradient import InnerConfig
from prompt_lab.core.optim import OptimConfig
from prompt_lab.core.subspace import AdapterMap, Subspace
from prompt_lab.files.prompts import Prompt, PromptStore
from prompt_lab.files.tensors import save_network
from prompt_lab.methods.adapter_subspace import AdapterSubspace, AdapterTuning
from prompt_lab.methods.attempt import Attempt
from prompt_lab.methods.fine_tuning import FineTuning
from prompt_lab.methods.intrinsic_subspace import IntrinsicSubspace
from prompt_lab.methods.meta_prompt import AdaptationConfig, MetaPrompt
from prompt_lab.methods.method import PromptMethod
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.starts import SubspaceConfig
from prompt_lab.methods.vector_arithmetic import VectorArithmetic

Made = TypeVar("Made", bound=PromptMethod)
TOKENS = 5
DIM, INNER, BOTTLENECK = 3, 8, 2  # of maps to adapters
ALL_TASKS = ["glue-sst2", "glue-cola", "e2e_nlg_cleaned", "emotion"]


def fit_in(
    folder: Path,
    method: Made,
    root: Path,
    tasks: Sequence[str] = ("glue-sst2",),
    samples: Sequence[int] = (13,),
    ckpt: Path | None = None,
    **trainer: Any,
) -> Made:
    """Fit a method into a folder; returns it, its trainer attached."""
    data = make_data(root, [*tasks], [*samples])
    make_trainer(folder, **trainer).fit(method, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return method


def run_test(folder: Path, method: Made, data: Any, **trainer: Any) -> Made:
    """Test a method from a folder, quietly."""
    make_trainer(folder, **trainer).test(method, datamodule=data, verbose=False)
    return method


def loaded(method: Made, model: str | Backbone) -> Made:
    """The method on a tiny backbone, a new one unless it is given."""
    method.backbone = make_backbone(model) if isinstance(model, str) else model
    return method


class SaveAt(Callback):
    """Saves a checkpoint right after a step."""

    def __init__(self, path: Path, step: int = 4) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


# ---- what methods start from ---------------------------------------------------------------------


def drawn(*seeds: int, scale: float = 0.5) -> torch.Tensor:
    """Normal numbers (4, HIDDEN)."""
    numbers = np.random.default_rng(seeds).normal(scale=scale, size=(4, HIDDEN))
    return torch.from_numpy(numbers).float()


def tuned(model: Backbone, task: str, seed: int, sample: int = 13, **changes: Any) -> Prompt:
    """A prompt of a task that started from the initial prompt of the seed."""
    given = {
        "prompt": drawn(seed) + drawn(*map(ord, task), sample, seed, scale=1.0),
        "init": drawn(seed),
        "name": f"{task}_{sample}_seed{seed}",
        "backbone": model.name,
        "backbone_digest": model.digest,
        "tokenizer_digest": model.tokenizer_digest,
        "task": task,
        "sample": sample,
        "start": "vocab",
        "init_seed": seed,
        "dev_score": 0.5,
        "max_input_length": 512,
        **changes,
    }
    return Prompt(**given)


def make_tuned(
    folder: Path,
    model: Backbone,
    tasks: Iterable[str] = ("glue-sst2", "glue-cola", "emotion"),
    seeds: Iterable[int] = (0, 1),
) -> Path:
    """A store of tuned prompts."""
    PromptStore(folder).save([tuned(model, task, seed) for task in tasks for seed in seeds])
    return folder


def make_map(path: Path, model: Backbone, seed: int = 0) -> Path:
    """The file of a random map to adapters."""
    size = AdaptedBackbone(model, BOTTLENECK).hidden_size
    digests = {"backbone": model.name, "backbone_digest": model.digest, "bottleneck": BOTTLENECK}
    save_network(path, AdapterMap(size, DIM, INNER, seed=seed), digests)
    return path


def make_subspace(path: Path, model: Backbone) -> Path:
    """The file of a random subspace of prompts."""
    digests = {"backbone": model.name, "backbone_digest": model.digest}
    save_network(path, Subspace(TOKENS, model.hidden_size, 3, inner_size=16), digests)
    return path


def make_attempt(model: Backbone, folder: Path, **settings: Any) -> Attempt:
    """A method on a backbone that is loaded, beside a store of prompts that is made if needed."""
    store = folder / f"store-{model.name}"
    if not store.exists():
        make_store(store, model)
    given = {"prompts": str(store), "source_tasks": ["glue-cola", "e2e_nlg_cleaned"]}
    given |= {"num_virtual_tokens": TOKENS, "inner_size": 6, "batch_size": 7, "temperature": 2.0}
    given |= {"learning_rate": 0.03, "attention_learning_rate": 0.01, **settings}
    return loaded(Attempt(**given), model)


# ---- a fit of every method -----------------------------------------------------------------------

STEPS, EVERY, DIES_AT = 6, 2, 5
BREAK = "break.ckpt"
TASKS = ["glue-cola", "e2e_nlg_cleaned", "emotion"]


class InterruptedFit(Exception):
    """Ends a fit in the middle of a step, as a kill does."""


class Interrupt(Callback):
    """Raises when so many steps are done."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == DIES_AT:
            raise InterruptedFit


def make_files(folder: Path) -> None:
    """The prompts, the subspace and the map to adapters that methods start from."""
    model = make_backbone("gpt2")
    make_store(folder / "store", model, TASKS)
    make_store(folder / "store-gpt2", model)
    make_tuned(folder / "tuned", model)
    make_subspace(folder / "subspace.safetensors", model)
    make_map(folder / "map.safetensors", make_backbone("bart"))


def whole_runs(folder: Path) -> PromptMethod:
    """Nine runs, some of which stop early: more than there are processes."""
    rates = [0.1, 0.03, 0.01]
    given = {"learning_rate": rates, "batch_size": 3, "patience": 2, "save_steps": [4]}
    return make_method(make_backbone("gpt2"), **given)


def one_run(folder: Path) -> PromptMethod:
    """One run of one row a step, of which most processes have none."""
    given = {"learning_rate": 0.003, "batch_size": 1, "test_baselines": True}
    return make_method(make_backbone("t5"), **given)


def tuned_codes(folder: Path) -> PromptMethod:
    """Codes in a subspace: three runs."""
    subspace = SubspaceConfig(str(folder / "subspace.safetensors"))
    given = {"learning_rate": 0.1, "batch_size": 3, "init_seed": [0, 1, 2]}
    return make_method(make_backbone("gpt2"), subspace=subspace, **given)


def subspaces(folder: Path) -> PromptMethod:
    """Two maps at once, on five rows a step."""
    method = IntrinsicSubspace(
        str(folder / "store"),
        unseen_tasks=["emotion"],
        intrinsic_dim=[2, 3],
        inner_size=16,
        num_virtual_tokens=TOKENS,
        batch_size=5,
    )
    return loaded(method, "gpt2")


def meta_prompt(folder: Path, episodes: int = 4) -> PromptMethod:
    """MAML with a learned inner rate."""
    method = MetaPrompt(
        num_virtual_tokens=TOKENS,
        episodes=episodes,
        support_size=2,
        query_size=3,
        inner=InnerConfig(2, learning_rate=0.1, learned="shared"),
        adaptation=AdaptationConfig(2, 0.1, 3),
        validation_tasks=["emotion"],
        learning_rate=0.1,
    )
    return loaded(method, "gpt2")


def attempt(folder: Path) -> PromptMethod:
    """Two target prompts and the attention that they share."""
    return make_attempt(make_backbone("gpt2"), folder)


def fine_tuning(folder: Path) -> PromptMethod:
    """All weights in a random subspace."""
    given = {"intrinsic_dim": 20, "learning_rate": 0.1, "batch_size": 3}
    return loaded(FineTuning(optim=OptimConfig(clip=0.1), **given), "t5")


def adapter_map(folder: Path) -> PromptMethod:
    """A map to adapters and the codes of three tasks."""
    given = {"intrinsic_dim": DIM, "inner_size": INNER, "bottleneck": BOTTLENECK}
    return loaded(AdapterSubspace(**given, batch_size=7, learning_rate=0.003, clip=None), "bart")


def adapter_codes(folder: Path) -> PromptMethod:
    """Three runs in a map to adapters."""
    given = {"learning_rate": 0.1, "batch_size": 3, "std": 0.5}
    return loaded(AdapterTuning(str(folder / "map.safetensors"), **given), "bart")


FITS: dict[str, tuple[Callable[..., PromptMethod], list[str]]] = {
    "whole runs": (whole_runs, TASKS),
    "one run": (one_run, ["glue-sst2"]),
    "codes": (tuned_codes, ["glue-cola"]),
    "subspaces": (subspaces, TASKS),
    "four episodes": (meta_prompt, [*TASKS, "glue-sst2"]),
    "one episode": (lambda folder: meta_prompt(folder, 1), [*TASKS, "glue-sst2"]),
    "attempt": (attempt, ["glue-sst2", "emotion"]),
    "fine-tuning": (fine_tuning, ["glue-sst2"]),
    "adapter map": (adapter_map, TASKS),
    "adapter codes": (adapter_codes, TASKS),
}
"""For each fit the method, from a folder of files, and the tasks."""


def checkpoint(run_dir: Path) -> Path:
    """The last checkpoint of a fit."""
    return run_dir / "checkpoints" / "last.ckpt"


def fit(
    name: str, files: Path, run_dir: Path, root: str, ckpt: Path | None = None, **settings: Any
) -> None:
    """Fit and test."""
    make, tasks = FITS[name]
    last = ModelCheckpoint(checkpoint(run_dir).parent, "last", save_on_train_epoch_end=False)
    callbacks = [last, *settings.pop("callbacks", [])]
    trainer = make_trainer(
        run_dir, STEPS, EVERY, enable_checkpointing=True, callbacks=callbacks, **settings
    )
    method = make(files)
    data = make_data(Path(root), tasks, [13])
    trainer.fit(method, datamodule=data, ckpt_path=ckpt, weights_only=True)
    check_shares(method, name, trainer)
    trainer.test(method, datamodule=data, verbose=False)


def check_shares(method: PromptMethod, name: str, trainer: Any) -> None:
    """Where whole runs are shared, a process holds its own and nothing of the others."""
    many, world = len(method.all_runs), trainer.world_size
    shared = name in ("whole runs", "codes", "adapter codes") and 1 < world <= many
    assert method.shares.divided == shared
    if isinstance(method, PromptTuning) and method.shares_runs:
        (optimizer,) = trainer.optimizers
        (state,) = optimizer.state.values()
        held = {len(value) for value in [method.trained, method.best, method.init, *state.values()]}
        assert held == {len(method.runs)}
        assert len(method.runs) <= (-(-many // world) if shared else many)


def run_all(root: str, folder: str, **settings: Any) -> None:
    """Every fit without a break and, with several processes, one that is cut and resumed."""
    files = Path(folder).parent / "files"
    for name in FITS:
        run_dir = Path(folder) / name
        fit(name, files, run_dir / "whole", root, **settings)
        if settings:
            try:
                fit(name, files, run_dir / "cut", root, callbacks=[Interrupt()], **settings)
            except InterruptedFit:
                if os.environ["RANK"] == "0":
                    shutil.copy(checkpoint(run_dir / "cut"), run_dir / BREAK)
                last = checkpoint(run_dir / "cut")
                fit(name, files, run_dir / "cut", root, ckpt=last, **settings)
    method = loaded(VectorArithmetic(str(files / "tuned"), scales=[0.5, 1.0]), "gpt2")
    made = make_trainer(Path(folder) / "vectors" / "whole", **settings)
    tasks = ["glue-sst2", "glue-cola", "emotion"]
    made.test(method, datamodule=make_data(Path(root), tasks, [13]), verbose=False)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run_all(sys.argv[1], sys.argv[2], devices=int(sys.argv[3]), strategy="ddp")
