"""``IntrinsicSubspace``: find a subspace that holds the prompts of many tasks.

Multi-task subspace finding (Qin et al. 2021, arXiv 2110.07867, section 3.2): a map to I numbers and
back is trained so that the reconstructed prompts P* = Back(Proj(P)) of the training tasks still do
their tasks and stay near the tuned prompts P:

    L = mean over tasks of ( L_LM(P*) + alpha * |P* - P|^2 )

with backbone and tuned prompts fixed. Several I are trained side by side on the same batches, each
as if it were alone. The best map by the mean dev score of the training tasks goes to a subspace
file, in which :class:`PromptTuning` tunes; ``test`` scores reconstructed prompts of the training
tasks, and of tasks that the map has never seen. The authors' code sums L_LM over tokens and rows,
takes the mean over the numbers of a prompt in the second term, and counts tasks by their rows;
``lm_reduction``, ``reconstruction_reduction`` and ``mixing`` say so.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import renumber, with_gradient
from prompt_lab.core.batch import IGNORE, Batch, index_tensor
from prompt_lab.core.optim import adamw_with_warmup
from prompt_lab.core.run import Run
from prompt_lab.core.subspace import Subspace, reconstruction_loss
from prompt_lab.data.datamodule import PromptDataModule
from prompt_lab.data.partitions import expand_sets
from prompt_lab.data.sampling import Draw, Key, Mixing, mixture_draw
from prompt_lab.files.results import Start
from prompt_lab.files.tensors import save_network
from prompt_lab.methods.checks import hold_out
from prompt_lab.methods.configs import as_list
from prompt_lab.methods.method import PromptMethod
from prompt_lab.methods.starts import load_subspace


class IntrinsicSubspace(PromptMethod):
    """Trains maps between prompts and I numbers on the tuned prompts of many tasks.

    Args:
        prompts: prompt stores, folders of fits, prompt files or checkpoints, with the tuned prompts
            of all of ``data.tasks``.
        unseen_tasks: those of ``data.tasks`` that the map is not trained on but tested on; sets of
            partitions stand for their tasks.
        intrinsic_dim: I, one value or several.
        inner_size: width of the layer on the way back; null for none, a linear map.
        alpha: weight of the reconstruction.
        lm_reduction: ``mean`` over the tokens of a row and the rows (paper), or ``sum`` of both
            (the authors' code).
        reconstruction_reduction: ``sum`` over the numbers of a prompt (paper), or ``mean`` (code).
        mixing: tasks count alike (``tasks``, paper), or by their rows (``examples``, code).
        learning_rate: peak learning rate of AdamW.
        warmup: share of the steps in which the learning rate rises; it then falls linearly to zero.
        clip: largest gradient norm of each map, or null for none.
        batch_size: rows of a step.
        seed: of the initial maps and of the order of rows.
        kwargs: the arguments of :class:`PromptMethod`.
    """

    joint = True
    subspaces: Any
    best_subspaces: Any
    reconstruction_sum: Tensor

    def __init__(
        self,
        prompts: str | list[str],
        unseen_tasks: list[str] = [],  # noqa: B006 - read only
        intrinsic_dim: int | list[int] = 100,
        inner_size: int | None = 768,
        alpha: float = 200.0,
        lm_reduction: Literal["mean", "sum"] = "mean",
        reconstruction_reduction: Literal["sum", "mean"] = "sum",
        mixing: Mixing = "tasks",
        learning_rate: float = 1e-3,
        warmup: float = 0.06,
        clip: float | None = 0.1,
        batch_size: int = 64,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.folders, self.dims = as_list(prompts), as_list(intrinsic_dim)
        if not self.dims or min(self.dims) < 1 or len({*self.dims}) < len(self.dims):
            given = f"model.intrinsic_dim is {self.dims}"
            raise ValueError(f"{given}: give distinct numbers of 1 or more")
        self.unseen_tasks = expand_sets(unseen_tasks)
        self.inner_size, self.alpha = inner_size, alpha
        self.mixing: Mixing = mixing
        self.lm_reduction = lm_reduction
        self.reconstruction_reduction: Literal["sum", "mean"] = reconstruction_reduction
        self.learning_rate, self.warmup, self.clip = learning_rate, warmup, clip
        self.batch_size, self.seed = batch_size, seed
        self.keys: list[Key] = []
        self.unseen: list[Key] = []

    def make_runs(self, data: PromptDataModule) -> list[Run]:
        """A run for each map and task, first those to train on; it is only scored."""
        seen = hold_out(data.tasks, "unseen_tasks", self.unseen_tasks)
        return [
            Run(task, sample, self.seed, self.learning_rate, self.batch_size)
            for _ in self.dims
            for task in (*seen, *self.unseen_tasks)
            for sample in data.samples
        ]

    def build(self, backbone: Backbone, runs: Sequence[Run]) -> None:
        own = [(run.task, run.sample) for run in runs[: len(runs) // len(self.dims)]]
        self.keys = [key for key in own if key[0] not in self.unseen_tasks]
        self.unseen = own[len(self.keys) :]
        size = (self.num_virtual_tokens, backbone.hidden_size)
        maps = [Subspace(*size, dim, self.inner_size, self.seed) for dim in self.dims]
        self.subspaces = nn.ModuleList(maps)
        self.best_subspaces = copy.deepcopy(self.subspaces).requires_grad_(False)
        self.register_buffer("sources", torch.zeros(len(own), *size))
        self.register_buffer("reconstruction_sum", torch.zeros(len(self.dims)))

    def source_keys(self) -> list[Key]:
        return [*self.keys, *self.unseen]

    def read_sources(self) -> None:
        super().read_sources()
        self.starts = [
            Start("codes", run.task, start_file=name)
            for run, name in zip(self.runs, self.source_names * len(self.dims), strict=True)
        ]

    def start(self, data: PromptDataModule) -> None:
        if max(self.dims) > len(self.keys):
            self.warn_once(
                "dim",
                f"intrinsic_dim {max(self.dims)} is larger than the number of prompts to learn "
                f"from, {len(self.keys)}: the map can hold each of them without finding what they "
                "share",
            )

    @property
    def init(self) -> Tensor:
        """The tuned prompts, (R, N, D)."""
        return self.sources.repeat(len(self.dims), 1, 1)

    def kept_units(self) -> list[str]:
        return [f"dim{dim}" for dim in self.dims]

    def line_names(self) -> list[str]:
        return self.kept_units()

    def kept(self) -> dict[str, Tensor]:
        return {}

    def keep(self, better: Tensor) -> None:
        for at, is_better in enumerate(better.tolist()):
            if is_better:
                self.best_subspaces[at].load_state_dict(self.subspaces[at].state_dict())

    def configure_optimizers(self) -> dict[str, Any]:
        groups = [{"params": list(self.subspaces.parameters()), "lr": self.learning_rate}]
        return adamw_with_warmup(groups, self.warmup, self.total_steps)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if self.clip is not None:
            for subspace in self.subspaces:
                nn.utils.clip_grad_norm_(subspace.parameters(), self.clip)

    def draw(self, data: PromptDataModule) -> Draw:
        rows = {key: data.tokens(*key, "train") for key in self.keys}
        share = self.row_share
        return mixture_draw(rows, self.mixing, self.batch_size, self.seed, data.layout, share)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum over the maps of the joint loss, on the same rows."""
        used = sorted(set(batch.prompts))
        source = self.sources.index_select(0, index_tensor(used, self.sources.device))
        batch = renumber(batch, used)
        share = source.new_zeros(len(used)).index_add(0, batch.prompt_index, batch.weight)
        if self.lm_reduction == "sum":  # of a row's tokens and of the rows, not the mean of both
            tokens = (batch.target_ids != IGNORE).sum(1).to(batch.weight.dtype)
            batch = replace(batch, weight=tokens)
        world = self.trainer.world_size
        total = source.new_zeros(())
        for at, subspace in enumerate(self.subspaces):
            made = subspace(source)
            losses, gradient = self.bank_gradient(made, batch)
            distance = reconstruction_loss(made, source, self.reconstruction_reduction)
            reconstruction = (share * distance).sum()
            total = total + with_gradient(losses.sum() * world, made, gradient * world)
            total = total + self.alpha * reconstruction * world
            self.loss_sum[at] += losses.sum()
            self.reconstruction_sum[at] += reconstruction.detach()
        self.loss_steps += 1
        return total

    @torch.no_grad()
    def reconstructed(self, subspaces: nn.ModuleList) -> Tensor:
        """Reconstructed prompts (R, N, D) of all tasks under every map, in the order of runs."""
        return torch.cat([subspace(self.sources) for subspace in subspaces])

    def bank(self) -> Tensor:
        return self.reconstructed(self.subspaces)

    @property
    def each(self) -> int:
        """Runs of a map."""
        return len(self.keys) + len(self.unseen)

    def evaluated_in_fit(self) -> list[int]:
        return [at * self.each + i for at in range(len(self.dims)) for i in range(len(self.keys))]

    def unit_scores(self, scores: Tensor) -> Tensor:
        return scores.view(len(self.dims), -1)[:, : len(self.keys)].mean(1)

    def logged(self, scores: Tensor) -> dict[str, float]:
        lm, made = self.mean_losses().tolist(), self._mean_reconstruction()
        logged: dict[str, float] = {}
        for at, (dim, mean) in enumerate(zip(self.dims, self.unit_scores(scores), strict=True)):
            logged[f"train/lm_loss/{dim}"] = lm[at]
            logged[f"train/reconstruction/{dim}"] = made[at]
            logged[f"dev/mean/{dim}"] = mean.item()
        return logged

    def _mean_reconstruction(self) -> list[float]:
        steps = self.loss_steps.clamp(min=1)
        return (self.over_ranks(self.reconstruction_sum) / steps).tolist()

    def curve_lines(
        self, losses: list[float], scores: Tensor, lines: list[int]
    ) -> list[dict[str, Any]]:
        return super().curve_lines(losses, self.unit_scores(scores), [*range(len(self.dims))])

    def curve(self) -> dict[str, list[Any]]:
        best = [score if score > -torch.inf else None for score in self.keeper.score.tolist()]
        return {"best_dev": best, "reconstruction": self._mean_reconstruction()}

    def after_evaluation(self, scores: Tensor, lines: list[int]) -> None:
        self.reconstruction_sum.zero_()

    def write(self) -> None:
        for at, dim in enumerate(self.dims if self.trainer.is_global_zero else ()):
            metadata = {
                **self.origin(at),
                "source_tasks": list(dict.fromkeys(task for task, _ in self.keys)),
                "samples": self.datamodule.samples,
                "source_prompts": self.source_names[: len(self.keys)],
                "alpha": self.alpha,
                "lm_reduction": self.lm_reduction,
                "reconstruction_reduction": self.reconstruction_reduction,
                "mixing": self.mixing,
                "seed": self.seed,
            }
            save_network(self.subspace_path(dim), self.best_subspaces[at], metadata)
        super().write()

    def subspace_path(self, dim: int) -> Path:
        """The file of a map."""
        return self.file(f"subspace_{dim}.safetensors")

    def restore(self) -> None:
        self.read_sources()
        for at, dim in enumerate(self.dims):
            path = self.subspace_path(dim)
            saved = load_subspace(path, self.backbone, self.num_virtual_tokens)
            self.best_subspaces[at].load_state_dict(saved.state_dict())
            self.keeper.restore(at, saved.metadata["steps"], saved.metadata["dev_score"])
        made = {row["name"]: row for row in self.store.index()}
        for i, facts in enumerate(self.prompt_facts()):
            known = made.get(facts["name"], {})
            dev = known.get("dev_score")
            self.keeper.dev[i] = torch.nan if dev is None else dev
            self.seconds = known.get("seconds") or self.seconds

    @property
    def best(self) -> Tensor:
        return self.reconstructed(self.best_subspaces)

    @torch.no_grad()
    def prompt_facts(self) -> list[dict[str, Any]]:
        codes = [code for one in self.best_subspaces for code in one.project(self.sources).cpu()]
        facts = super().prompt_facts()
        for i, run in enumerate(self.runs):
            name = f"{run.task}_{run.sample}_dim{self.dims[i // self.each]}"
            facts[i] |= {"name": name, "code": codes[i], "order_seed": None}
        return facts

    def result_facts(self, run: int) -> dict[str, Any]:
        is_unseen = run % self.each >= len(self.keys)
        return {
            "variant": "reconstructed_unseen" if is_unseen else "reconstructed",
            "intrinsic_dim": self.dims[run // self.each],
            "optimizer": "adamw",
        }

    def summary(self) -> str:
        return (
            f"subspaces of {', '.join(map(str, self.dims))} dimensions from {len(self.keys)} "
            f"prompts of {self.num_virtual_tokens} virtual tokens"
        )
