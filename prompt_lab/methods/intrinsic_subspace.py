"""``IntrinsicSubspace``: find a subspace that holds the prompts of many tasks.

Multi-task subspace finding (Qin et al. 2021, arXiv 2110.07867, section 3.2): a map to I numbers and
back is trained so that the reconstructed prompts P* = Back(Proj(P)) of the training tasks still do
their tasks and stay near the tuned prompts P:

    L = mean over tasks of ( L_LM(P*) + alpha * |P* - P|^2 )

with backbone and tuned prompts fixed. Several I are trained side by side on the same batches, each
as if it were alone. A batch mixes rows of many tasks, each row under its own task's prompt; every
distinct prompt is reconstructed once per step, and its gradient comes from the bank. The best map
by the mean dev score of the training tasks goes to a subspace file; ``test`` scores reconstructed
prompts of the training tasks, and of tasks that the map has never seen.

The authors' code sums L_LM over tokens and rows, takes the mean over the numbers of a prompt in the
second term, and counts tasks by their rows; ``lm_reduction``, ``reconstruction_reduction`` and
``mixing`` say so. Tuning in the subspace is :class:`PromptTuning` with ``subspace``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from prompt_lab.core.bank import renumber, with_gradient
from prompt_lab.core.batch import IGNORE, Batch, index_tensor
from prompt_lab.core.optim import adamw_with_warmup, check_warmup_and_clip
from prompt_lab.core.pretrained import tensor_digest
from prompt_lab.core.run import Run
from prompt_lab.core.subspace import Subspace, reconstruction_loss
from prompt_lab.data.batches import EvaluationSteps
from prompt_lab.data.crossfit import CrossFitDataModule
from prompt_lab.data.mixtures import Key, Mixing, MixtureSteps
from prompt_lab.data.partitions import expand_sets
from prompt_lab.files.prompts import Prompt, PromptStore, source_prompts
from prompt_lab.files.results import append_curves, start_curves
from prompt_lab.files.tensors import load_network, save_network
from prompt_lab.methods.evaluation import Evaluation
from prompt_lab.methods.prompt_method import BackboneConfig, PromptMethod, some


class IntrinsicSubspace(PromptMethod):
    """Trains maps between prompts and I numbers on the tuned prompts of many tasks.

    ``trainer.max_steps`` is the budget and ``trainer.val_check_interval`` the number of steps
    between evaluations on dev.

    Args:
        prompts: prompt stores, folders of fits, prompt files or checkpoints, with the tuned prompts
            of all of ``data.tasks``.
        backbone: which frozen model.
        unseen_tasks: those of ``data.tasks`` that the map is not trained on but tested on; sets of
            partitions stand for their tasks.
        intrinsic_dim: I, one value or several.
        inner_size: width of the layer on the way back; null for none, a linear map.
        alpha: weight of the reconstruction.
        lm_reduction: ``mean`` over the tokens of a row and the rows (paper), or ``sum`` of both
            (the authors' code).
        reconstruction_reduction: ``sum`` over the numbers of a prompt (paper), or ``mean`` (code).
        mixing: tasks count alike (``tasks``, paper), or by their rows (``examples``, code).
        num_virtual_tokens: N of the prompts.
        learning_rate: peak learning rate of AdamW.
        warmup: share of the steps in which the learning rate rises; it then falls linearly to zero.
        clip: largest gradient norm of each map, or null for none.
        batch_size: rows of a step.
        label_smoothing: share of each target's probability spread over the vocabulary.
        seed: of the initial maps and of the order of rows.
        tokens_per_forward: most padded tokens of one forward pass; bounds memory, not results.
        decoding: as for PromptTuning.
        num_beams: beams of generated answers; 1 is greedy.
        max_new_tokens: longest generated answer; null for the longest answer in train and dev.
        metric_variant: ``crossfit`` computes metrics as CrossFit does, ``corrected`` without traps.
    """

    subspaces: Any
    best_subspaces: Any
    source: Tensor
    best_score: Tensor
    best_step: Tensor
    dev: Tensor
    lm_sum: Tensor
    reconstruction_sum: Tensor
    loss_steps: Tensor
    seconds: Tensor

    def __init__(
        self,
        prompts: str | list[str],
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008
        unseen_tasks: list[str] = [],  # noqa: B006 - read only
        intrinsic_dim: int | list[int] = 100,
        inner_size: int | None = 768,
        alpha: float = 200.0,
        lm_reduction: Literal["mean", "sum"] = "mean",
        reconstruction_reduction: Literal["sum", "mean"] = "sum",
        mixing: Mixing = "tasks",
        num_virtual_tokens: int = 100,
        learning_rate: float = 1e-3,
        warmup: float = 0.06,
        clip: float | None = 0.1,
        batch_size: int = 64,
        label_smoothing: float = 0.0,
        seed: int = 0,
        tokens_per_forward: int | None = None,
        decoding: Literal["score", "generate"] = "score",
        num_beams: int = 1,
        max_new_tokens: int | None = None,
        metric_variant: Literal["crossfit", "corrected"] = "crossfit",
    ) -> None:
        super().__init__(
            backbone, tokens_per_forward, decoding, num_beams, max_new_tokens, metric_variant
        )
        self.save_hyperparameters(logger=False)
        self.simplify_settings()
        self.folders = prompts if isinstance(prompts, list) else [prompts]
        self.dims = intrinsic_dim if isinstance(intrinsic_dim, list) else [intrinsic_dim]
        _check(self.dims, alpha, learning_rate)
        check_warmup_and_clip(warmup, clip)
        self.unseen_tasks = expand_sets(unseen_tasks)
        self.inner_size, self.alpha = inner_size, alpha
        self.mixing: Mixing = mixing
        self.lm_reduction = lm_reduction
        self.reconstruction_reduction: Literal["sum", "mean"] = reconstruction_reduction
        self.num_virtual_tokens, self.learning_rate = num_virtual_tokens, learning_rate
        self.warmup, self.clip, self.batch_size = warmup, clip, batch_size
        self.label_smoothing, self.seed = label_smoothing, seed
        self.keys: list[Key] = []
        self.unseen: list[Key] = []

    # ---- set-up ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load the backbone, the data and the tuned prompts, and make the maps, once."""
        self.check_trainer()
        if stage == "fit":
            self.check_budget()
        self.prepare(self.datamodule)

    def prepare(self, data: CrossFitDataModule) -> None:
        """As :meth:`setup`, without a trainer.

        Raises:
            FileNotFoundError: tuned prompts that are not there, all named.
            ValueError: an unseen task that the data do not have, no task to train on, or prompts
                of another backbone or length.
        """
        backbone = self.load_backbone(data)
        if self.runs:
            return
        self.keys, self.unseen = self._part(data)
        found = source_prompts(
            self.folders, [*self.keys, *self.unseen], backbone, self.num_virtual_tokens
        )
        self.source_names = [prompt.name for prompt in found]
        self.register_buffer("source", torch.stack([p.prompt for p in found]), persistent=False)
        size = (self.num_virtual_tokens, backbone.hidden_size)
        maps = [Subspace(*size, dim, self.inner_size, self.seed) for dim in self.dims]
        self.subspaces = nn.ModuleList(maps)
        self.best_subspaces = copy.deepcopy(self.subspaces).requires_grad_(False)
        self.runs = [
            Run(task, sample, self.seed, self.learning_rate, self.batch_size)
            for _ in self.dims
            for task, sample in (*self.keys, *self.unseen)
        ]
        count = len(self.dims)
        for name, value in {
            "init": self.source.repeat(count, 1, 1),
            "best_score": torch.full((count,), -torch.inf, dtype=torch.float64),
            "best_step": torch.full((count,), -1, dtype=torch.long),
            "dev": torch.full((len(self.runs),), torch.nan, dtype=torch.float64),
            "lm_sum": torch.zeros(count),
            "reconstruction_sum": torch.zeros(count),
            "loss_steps": torch.zeros((), dtype=torch.long),
            "seconds": torch.zeros((), dtype=torch.float64),
        }.items():
            self.register_buffer(name, value, persistent=name != "init")
        self.keep_frozen_out_of_ddp()
        if max(self.dims) > len(self.keys):
            self.warn_once(
                "dim",
                f"intrinsic_dim {max(self.dims)} is larger than the number of prompts to learn "
                f"from, {len(self.keys)}: the map can hold each of them without finding what they "
                "share",
            )

    def _part(self, data: CrossFitDataModule) -> tuple[list[Key], list[Key]]:
        """The tasks to train on and the unseen ones, each with every sample."""
        strange = [task for task in self.unseen_tasks if task not in data.tasks]
        if strange:
            raise ValueError(
                f"model.unseen_tasks has {', '.join(strange)}, which data.tasks has not: add them "
                "there, since their rows are tested"
            )
        seen = [task for task in data.tasks if task not in self.unseen_tasks]
        if not seen:
            raise ValueError("every task of data.tasks is unseen: leave some to train on")
        keys = [(task, sample) for task in seen for sample in data.samples]
        return keys, [(task, sample) for task in self.unseen_tasks for sample in data.samples]

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the maps; the learning rate rises, then falls linearly to zero."""
        groups = [{"params": list(self.subspaces.parameters()), "lr": self.learning_rate}]
        return adamw_with_warmup(groups, self.warmup, self.trainer.max_steps)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip the gradient of each map by itself."""
        if self.clip is not None:
            for subspace in self.subspaces:
                nn.utils.clip_grad_norm_(subspace.parameters(), self.clip)

    # ---- data -----------------------------------------------------------------------------------

    def train_steps(self) -> MixtureSteps:
        """The batch of every step: rows of all training tasks, mixed."""
        trainer = self.trainer
        rows = {key: self.datamodule.rows(*key, "train") for key in self.keys}
        self.check_lengths(rows.values(), self.num_virtual_tokens)
        return self.datamodule.mixture_steps(
            self.keys,
            self.mixing,
            self.batch_size,
            self.seed,
            trainer.max_steps,
            lambda: trainer.global_step,
            trainer.global_rank,
            trainer.world_size,
        )

    def dev_steps(self) -> EvaluationSteps:
        """Dev rows of the training tasks under every map; of the unseen ones too outside a fit."""
        fitting = self.trainer.state.fn == "fit"
        return self.evaluation_steps("dev", lambda: self._chosen(with_unseen=not fitting))

    def test_steps(self) -> EvaluationSteps:
        """Test rows of all tasks under every map."""
        return self.evaluation_steps("test", lambda: self._chosen(with_unseen=True))

    def _chosen(self, with_unseen: bool) -> list[int]:
        """Runs of the training tasks, and of the unseen ones if asked for."""
        each = len(self.keys) + len(self.unseen)
        wanted = each if with_unseen else len(self.keys)
        return [at * each + i for at in range(len(self.dims)) for i in range(wanted)]

    # ---- training -------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Start the clock and the curves."""
        self._clock = time.monotonic()
        if self.trainer.is_global_zero:
            start_curves(self.run_dir / "curves.csv", self.trainer.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum over the maps of the joint loss, on the same rows."""
        used = sorted(set(batch.prompts))
        source = self.source.index_select(0, index_tensor(used, self.source.device))
        batch = renumber(batch, used)
        share = source.new_zeros(len(used)).index_add(0, batch.prompt_index, batch.weight)
        batch = self._reduced(batch)
        world = self.trainer.world_size
        total = source.new_zeros(())
        for at, subspace in enumerate(self.subspaces):
            made = subspace(source)
            losses, gradient = self.bank_gradient(made, batch, self.label_smoothing)
            distance = reconstruction_loss(made, source, self.reconstruction_reduction)
            reconstruction = (share * distance).sum()
            total = total + with_gradient(losses.sum() * world, made, gradient * world)
            total = total + self.alpha * reconstruction * world
            self.lm_sum[at] += losses.sum()
            self.reconstruction_sum[at] += reconstruction.detach()
        self.loss_steps += 1
        return total

    def _reduced(self, batch: Batch) -> Batch:
        """The batch with the weights of the reduction: 1/B of a row's mean, or its sum."""
        if self.lm_reduction == "mean":
            return batch
        tokens = (batch.target_ids != IGNORE).sum(1).to(batch.weight.dtype)
        return Batch(**{**vars(batch), "weight": tokens})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which prompts the maps are trained on, and under which weights."""
        checkpoint["source_prompts"] = self.source_names[: len(self.keys)]
        assert self.backbone is not None
        checkpoint["backbone_digest"] = self.backbone.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse maps of other prompts or of another backbone.

        Raises:
            ValueError: naming both sides.
        """
        saved, own = checkpoint.get("source_prompts", []), self.source_names[: len(self.keys)]
        if saved != own:
            raise ValueError(
                f"the checkpoint is of a subspace of the prompts {some(saved)}, the settings give "
                f"{some(own)}: resume with the prompts and tasks of the fit"
            )
        self.check_backbone_of(checkpoint)

    # ---- evaluation -----------------------------------------------------------------------------

    @torch.no_grad()
    def reconstructed(self, subspaces: nn.ModuleList) -> Tensor:
        """Reconstructed prompts (R, N, D) of all tasks under every map, in the order of runs."""
        return torch.cat([subspace(self.source) for subspace in subspaces])

    def on_validation_start(self) -> None:
        """Begin an evaluation: of the current maps in a fit, else of the best ones."""
        fitting = self.trainer.state.fn == "fit"
        if not fitting:
            self._restore_best()
        chosen = self.subspaces if fitting else self.best_subspaces
        self.evaluation = Evaluation(self, "dev", self.reconstructed(chosen))

    def on_validation_epoch_end(self) -> None:
        """Score dev; in a fit, keep better maps."""
        scores = self.evaluation.scores()
        if self.trainer.state.fn != "fit":
            self.evaluation.report(scores, "validate")
            return
        if self.trainer.sanity_checking:
            return
        means = self._by_dim(scores)[:, : len(self.keys)].mean(1)
        self._keep_better(scores, means)
        self._log(means.tolist())

    def _by_dim(self, values: Tensor) -> Tensor:
        """Values of the runs as (dims, tasks)."""
        return values.view(len(self.dims), -1)

    def _keep_better(self, scores: Tensor, means: Tensor) -> None:
        """Keep each map whose mean dev score is better; ties keep the earlier, NaN is the worst."""
        ranked = means.nan_to_num(nan=-torch.inf)
        better = (ranked > self.best_score) | (self.best_step < 0)
        self.best_score.copy_(torch.where(better, ranked, self.best_score))
        self.best_step.masked_fill_(better, self.trainer.global_step)
        kept = torch.where(better[:, None], self._by_dim(scores), self._by_dim(self.dev))
        self.dev.copy_(kept.flatten())
        for at, is_better in enumerate(better.tolist()):
            if is_better:
                self.best_subspaces[at].load_state_dict(self.subspaces[at].state_dict())

    def _log(self, means: list[float]) -> None:
        """Log both losses and the mean dev score of every map, and write them to the curves."""
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now
        steps = self.loss_steps.clamp(min=1)
        lm = (self.over_ranks(self.lm_sum) / steps).tolist()
        reconstruction = (self.over_ranks(self.reconstruction_sum) / steps).tolist()
        logged: dict[str, float] = {}
        for at, dim in enumerate(self.dims):
            logged[f"train/lm_loss/{dim}"] = lm[at]
            logged[f"train/reconstruction/{dim}"] = reconstruction[at]
            logged[f"dev/mean/{dim}"] = means[at]
            if not (lm[at] == lm[at] and reconstruction[at] == reconstruction[at]):
                self.warn_once(
                    f"nan {dim}",
                    f"the loss of intrinsic_dim {dim} is not finite by step "
                    f"{self.trainer.global_step}; its best map so far is kept. A lower "
                    "learning_rate may help",
                )
        self.log_dict(logged, rank_zero_only=False)
        finite = [value for value in self.best_score.tolist() if value > -torch.inf]
        best = sum(finite) / len(finite) if finite else float("nan")
        bar = {"train/loss": sum(lm) / len(lm), "best/val_score": best}
        self.log_dict(bar, prog_bar=True, rank_zero_only=False)
        if self.trainer.is_global_zero:
            append_curves(self.run_dir / "curves.csv", self._curve_rows(lm, reconstruction, means))
        for total in (self.lm_sum, self.reconstruction_sum, self.loss_steps):
            total.zero_()

    def _curve_rows(
        self, lm: list[float], reconstruction: list[float], means: list[float]
    ) -> Iterator[dict[str, Any]]:
        """A line per map."""
        best, steps = self.best_score.tolist(), self.best_step.tolist()
        for at, dim in enumerate(self.dims):
            yield {
                "step": self.trainer.global_step,
                "run": f"dim{dim}",
                "train_loss": lm[at],
                "reconstruction": reconstruction[at],
                "dev": means[at],
                "best_dev": best[at] if best[at] > -torch.inf else None,
                "best_step": steps[at],
                "status": "training",
            }

    def on_train_end(self) -> None:
        """Write the best maps, and the prompts that they reconstruct."""
        if self.trainer.is_global_zero:
            self._write_subspaces()
            PromptStore(self.run_dir / "prompts").save(self.best_prompts())
        self.trainer.strategy.barrier("subspaces written")

    def _write_subspaces(self) -> None:
        """Write a file per map."""
        backbone = self.backbone
        assert backbone is not None
        for at, dim in enumerate(self.dims):
            metadata = {
                "backbone": backbone.name,
                "backbone_digest": backbone.digest,
                "tokenizer_digest": backbone.tokenizer_digest,
                "source_tasks": list(dict.fromkeys(task for task, _ in self.keys)),
                "samples": self.datamodule.samples,
                "source_prompts": self.source_names[: len(self.keys)],
                "alpha": self.alpha,
                "lm_reduction": self.lm_reduction,
                "reconstruction_reduction": self.reconstruction_reduction,
                "mixing": self.mixing,
                "seed": self.seed,
                "steps": int(self.best_step[at]),
                "dev_score": float(self.best_score[at]),
            }
            save_network(self.subspace_path(dim), self.best_subspaces[at], metadata)

    def subspace_path(self, dim: int) -> Any:
        """The file of a map."""
        return self.run_dir / f"subspace_{dim}.safetensors"

    # ---- test -----------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Take the best maps of this fit, of the checkpoint, or of the files."""
        self._restore_best()
        self.evaluation = Evaluation(self, "test", self.reconstructed(self.best_subspaces))

    def _restore_best(self) -> None:
        """Read the maps from their files, unless a fit or checkpoint has filled them."""
        if int(self.best_step.max()) >= 0:
            return
        for at, dim in enumerate(self.dims):
            saved = load_network(self.subspace_path(dim), Subspace, self.backbone)
            if saved.num_virtual_tokens != self.num_virtual_tokens:
                raise ValueError(
                    f"{self.subspace_path(dim)}: a subspace of prompts of "
                    f"{saved.num_virtual_tokens} virtual tokens, but num_virtual_tokens is "
                    f"{self.num_virtual_tokens}"
                )
            self.best_subspaces[at].load_state_dict(saved.state_dict())
            self.best_step[at] = saved.metadata["steps"]
            self.best_score[at] = saved.metadata["dev_score"]

    def best_prompts(self, test_scores: Tensor | None = None) -> list[Prompt]:
        """The reconstructed prompt of every task under every map, ready to be stored."""
        made = self.reconstructed(self.best_subspaces).cpu()
        with torch.no_grad():
            codes = [subspace.project(self.source).cpu() for subspace in self.best_subspaces]
        dev, each = self.dev.tolist(), len(self.keys) + len(self.unseen)
        return [
            self.stored_prompt(
                run,
                made[i],
                self.init[i],
                dev[i],
                None if test_scores is None else test_scores[i].item(),
                code=codes[i // each][i % each],
                name=f"{run.task}_{run.sample}_dim{self.dims[i // each]}",
                start="codes",
                start_of=run.task,
                start_file=self.source_names[i % each],
                steps=int(self.best_step[i // each]),
            )
            for i, run in enumerate(self.runs)
        ]

    def summary(self) -> str:
        """What is trained, in a few words."""
        return (
            f"subspaces of {', '.join(map(str, self.dims))} dimensions from {len(self.keys)} "
            f"prompts of {self.num_virtual_tokens} virtual tokens"
        )

    def describe_fit(self, data: CrossFitDataModule, trainer: Trainer) -> str:
        """What would be trained, on which tasks, and its memory."""
        self.prepare(data)
        numbers = sum(weight.numel() for weight in self.subspaces.parameters())
        return "\n".join(
            [
                self.summary(),
                f"source tasks: {', '.join(dict.fromkeys(task for task, _ in self.keys))}",
                f"unseen tasks: {', '.join(self.unseen_tasks) or 'none'}",
                f"steps: {trainer.max_steps} of {self.batch_size} rows, evaluation every "
                f"{trainer.val_check_interval}",
                f"memory: {numbers} numbers in the maps, {numbers * 20 / 2**20:.0f} MB with their "
                "gradient, moments and best copy",
            ]
        )

    def digests(self) -> dict[str, Any]:
        """Digests of backbone weights, tokenizer, data files and source prompts."""
        return {**super().digests(), "source_prompts": tensor_digest(self.source)}

    def result_facts(self, run: int) -> dict[str, Any]:
        """What the results say of how a run was trained."""
        each = len(self.keys) + len(self.unseen)
        is_unseen = run % each >= len(self.keys)
        return {
            "variant": "reconstructed_unseen" if is_unseen else "reconstructed",
            "intrinsic_dim": self.dims[run // each],
            "optimizer": "adamw",
        }


def _check(dims: list[int], alpha: float, learning_rate: float) -> None:
    """Refuse settings that make no sense.

    Raises:
        ValueError: naming the setting and what is allowed.
    """
    if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
        raise ValueError(f"model.intrinsic_dim is {dims}: give distinct numbers of 1 or more")
    if alpha < 0:
        raise ValueError(f"model.alpha is {alpha}: give 0 or more")
    if learning_rate <= 0:
        raise ValueError(f"model.learning_rate is {learning_rate}: give a positive number")
