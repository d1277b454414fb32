"""Fits of every method, each once without a break and once interrupted and resumed.

Processes of one job run :func:`run_all` side by side; one process runs it for the reference.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import make_backbone, make_data, make_method, make_store, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from test_adapter_subspace import BOTTLENECK, DIM, INNER
from test_attempt import make_attempt
from test_vector_arithmetic import make_store as make_tuned_store

from prompt_lab.core.adapters import AdaptedBackbone
from prompt_lab.core.meta_gradient import InnerConfig
from prompt_lab.core.optim import OptimConfig
from prompt_lab.core.subspace import AdapterMap, Subspace
from prompt_lab.files.tensors import save_network
from prompt_lab.methods.adapter_subspace import AdapterSubspace, AdapterTuning
from prompt_lab.methods.fine_tuning import FineTuning
from prompt_lab.methods.intrinsic_subspace import IntrinsicSubspace
from prompt_lab.methods.meta_prompt import AdaptationConfig, MetaPrompt
from prompt_lab.methods.method import PromptMethod
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.starts import SubspaceConfig
from prompt_lab.methods.vector_arithmetic import VectorArithmetic

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


def loaded(method: PromptMethod, kind: str) -> PromptMethod:
    """The method on a tiny backbone of its own."""
    method.backbone = make_backbone(kind)
    return method


def make_files(folder: Path) -> None:
    """The prompts, the subspace and the map to adapters that methods start from."""
    model = make_backbone("gpt2")
    make_store(folder / "store", model, TASKS)
    make_store(folder / "store-gpt2", model)
    make_tuned_store(folder / "tuned", model)
    digests = {"backbone": model.name, "backbone_digest": model.digest}
    torch.manual_seed(0)
    made = Subspace(5, model.hidden_size, 3, inner_size=16)
    save_network(folder / "subspace.safetensors", made, digests)
    bart = make_backbone("bart")
    size = AdaptedBackbone(bart, BOTTLENECK).hidden_size
    digests = {"backbone": bart.name, "backbone_digest": bart.digest, "bottleneck": BOTTLENECK}
    save_network(folder / "map.safetensors", AdapterMap(size, DIM, INNER), digests)


def whole_runs(folder: Path) -> PromptMethod:
    """Nine runs, some of which stop early: more than there are processes."""
    rates = [0.1, 0.03, 0.01]
    given = {"learning_rate": rates, "batch_size": 3, "patience": 2, "save_steps": [4]}
    return make_method(make_backbone("gpt2"), **given)


def one_run(folder: Path) -> PromptMethod:
    """One run of one row a step, of which most processes have none."""
    return make_method(make_backbone("t5"), learning_rate=0.003, batch_size=1)


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
        num_virtual_tokens=5,
        batch_size=5,
    )
    return loaded(method, "gpt2")


def meta_prompt(folder: Path, episodes: int = 4) -> PromptMethod:
    """MAML with a learned inner rate."""
    method = MetaPrompt(
        num_virtual_tokens=5,
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
