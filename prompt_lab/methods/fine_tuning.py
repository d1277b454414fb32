"""``FineTuning``: the baseline that trains all weights of the backbone.

Prompt tuning is measured against it (Qin et al. 2021, arXiv 2110.07867, table 1; its settings are
those of the CrossFit gym, Ye et al. 2021). Data order, loss, metrics, curves and results are those
of a run of :class:`PromptTuning`, with no prompt in front of the rows, so that reports compare the
two. One fit trains one run, since every run needs weights of its own; ``prompt-lab sweep`` runs a
grid of fits one after another.

With ``intrinsic_dim`` the weights move in a random subspace only: theta = theta_0 + P v, with d
trained numbers v that start at zero, and a fixed random P made by the Fastfood transform
(Aghajanyan et al. 2021, arXiv 2012.13255, equations 1 and 2).

Left out: dropout, which the papers' fine-tuning has on and which stays off here, as for prompts;
weights in half precision; baselines without training, which a fit of PromptTuning reports.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.batch import Batch, micro_batches
from prompt_lab.core.fastfood import FastfoodMap
from prompt_lab.core.optim import OptimConfig, schedule_factor
from prompt_lab.core.run import Run, grid
from prompt_lab.data.batches import EvaluationSteps, TrainSteps
from prompt_lab.data.crossfit import CrossFitDataModule
from prompt_lab.files.prompts import Prompt
from prompt_lab.files.results import append_curves, start_curves
from prompt_lab.files.tensors import load_tensors, save_tensors
from prompt_lab.methods.dry_run import saved_bytes
from prompt_lab.methods.evaluation import Evaluation
from prompt_lab.methods.prompt_method import BackboneConfig, PromptMethod, as_config
from prompt_lab.methods.prompt_tuning import FAILED, FINISHED, STATUS, STOPPED, TRAINING


class FineTuning(PromptMethod):
    """Trains all weights of the backbone on one task and keeps the best by the dev score.

    ``trainer.max_steps`` is the budget and ``trainer.val_check_interval`` the number of steps
    between evaluations on dev. The loss of a step is the mean of its rows' losses. Weight decay
    spares biases and norms. Dropout stays off.

    Memory: the weights, twice their size for the gradient (while micro-batches are summed), twice
    for AdamW's moments, and the best weights on the host. A subspace needs, beside weights and
    gradient, the initial weights and 8 to 16 bytes per weight for P.

    A checkpoint, which resumes a fit bit for bit, holds weights, best weights and the optimizer's
    moments: 16 bytes per weight with AdamW, 2.2 GB for bart-base. ``best.safetensors`` in the run
    folder, from which ``test`` reads in another process, holds the best weights: 4 bytes per
    weight. In a subspace both hold v instead, 16 and 4 bytes per dimension.

    Args:
        backbone: which model; float32 weights.
        optim: optimizer, schedule and clip; the clip is of the norm over all that is trained.
        intrinsic_dim: d, train so many numbers of a random subspace of all weights; null trains the
            weights themselves.
        init_seed: seed of the random subspace; without one it only names the run, since training
            starts from the backbone's weights (``data.order_seed`` is what makes runs differ).
        learning_rate: peak learning rate; one value.
        batch_size: rows per step; one value.
        label_smoothing: share of each target's probability spread over the vocabulary.
        patience: stop after so many evaluations without a better dev score; null for never.
        save_weights: write the best weights to ``best.safetensors`` at the end of a fit.
        tokens_per_forward: most padded tokens of one forward pass; bounds memory, not results; null
            for 2048 on a CPU and 16384 on a GPU.
        decoding: ``score`` chooses among the labels of tasks that have them by log-likelihood, and
            generates other answers; ``generate`` generates all answers.
        num_beams: beams of generated answers; 1 is greedy.
        max_new_tokens: longest generated answer; null for the longest answer in train and dev.
        metric_variant: ``crossfit`` computes metrics as CrossFit does, ``corrected`` without traps.

    Attributes:
        weights: the backbone's weights by name, tied ones once.
        trained: what the optimizer changes: the weights, or v alone.
        best: copy of ``trained`` on the host, of the step with the best dev score.
    """

    num_virtual_tokens = 0
    stores_prompts = False
    best_score: Tensor
    best_step: Tensor
    bad_evaluations: Tensor
    status: Tensor
    active: Tensor
    loss_sum: Tensor
    loss_steps: Tensor
    seconds: Tensor

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008
        optim: OptimConfig = OptimConfig(),  # noqa: B008
        intrinsic_dim: int | None = None,
        init_seed: int | list[int] = 0,
        learning_rate: float | list[float] = 2e-5,
        batch_size: int | list[int] = 8,
        label_smoothing: float = 0.0,
        patience: int | None = None,
        save_weights: bool = True,
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
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.label_smoothing is {label_smoothing}: give 0 up to below 1")
        for name, value in {"patience": patience, "intrinsic_dim": intrinsic_dim}.items():
            if value is not None and value < 1:
                raise ValueError(f"model.{name} is {value}: give at least 1, or null")
        self.optim_config: OptimConfig = as_config(OptimConfig, optim)
        if self.optim_config.name == "sgd":
            raise ValueError("FineTuning has no sgd: set model.optim.name to adamw or adafactor")
        self.intrinsic_dim, self.save_weights = intrinsic_dim, save_weights
        self.init_seeds = init_seed if isinstance(init_seed, list) else [init_seed]
        self.learning_rates = learning_rate if isinstance(learning_rate, list) else [learning_rate]
        self.batch_sizes = batch_size if isinstance(batch_size, list) else [batch_size]
        self.label_smoothing, self.patience = label_smoothing, patience
        self.frozen = () if intrinsic_dim is None else ("backbone.",)
        self.weights: dict[str, nn.Parameter] = {}
        self.trained: dict[str, nn.Parameter] = {}
        self.best: dict[str, Tensor] = {}

    # ---- set-up ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load the backbone, tokenise the data and let the weights be trained, once."""
        self.check_trainer()
        if stage == "fit":
            self.check_budget()
        self.prepare(self.datamodule)

    def check_trainer(self) -> None:
        """Refuse trainer settings that would quietly change the result.

        Raises:
            ValueError: the setting, and what to use instead.
        """
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision {self.trainer.precision} would round the weights: use 32-true "
                "or bf16-mixed"
            )
        super().check_trainer()

    def prepare(self, data: CrossFitDataModule) -> None:
        """As :meth:`setup`, without a trainer.

        Raises:
            ValueError: more than one run, or weights in half precision.
        """
        runs = self.runs or self._one_run(data)
        backbone = self.load_backbone(data)
        if self.runs:
            return
        backbone.unfreeze()
        self.runs = runs
        self.weights = dict(backbone.model.named_parameters())
        self.trained = self.weights if self.intrinsic_dim is None else self._make_subspace()
        self.best = {k: v.detach().to("cpu", copy=True) for k, v in self.trained.items()}
        self.register_buffer("init", torch.zeros(1, 0, backbone.hidden_size), persistent=False)
        for name, value in {
            "best_score": torch.tensor(-torch.inf, dtype=torch.float64),
            "best_step": torch.tensor(-1),
            "bad_evaluations": torch.tensor(0),
            "status": torch.tensor(TRAINING),
            "active": torch.tensor(True),
            "loss_sum": torch.tensor(0.0),
            "loss_steps": torch.tensor(0),
            "seconds": torch.tensor(0.0, dtype=torch.float64),
        }.items():
            self.register_buffer(name, value)
        self.keep_frozen_out_of_ddp()

    def _one_run(self, data: CrossFitDataModule) -> list[Run]:
        """The run of the settings.

        Raises:
            ValueError: the settings are of several runs.
        """
        axes = {
            "data.tasks": list(data.tasks),
            "data.samples": data.samples,
            "model.init_seed": self.init_seeds,
            "model.learning_rate": self.learning_rates,
            "model.batch_size": self.batch_sizes,
        }
        many = [f"{name} has {len(values)}" for name, values in axes.items() if len(values) > 1]
        if many:
            raise ValueError(
                f"FineTuning trains one run per fit, but {', '.join(many)} values: give one of "
                "each, and run the grid one after another with prompt-lab sweep"
            )
        return grid(*axes.values())

    def _make_subspace(self) -> dict[str, nn.Parameter]:
        """Make P and v; note the initial weights, which a checkpoint need not hold."""
        assert self.backbone is not None
        assert self.intrinsic_dim is not None
        sizes = {name: weight.numel() for name, weight in self.weights.items()}
        self.fastfood = FastfoodMap(sizes, self.intrinsic_dim, self.runs[0].init_seed)
        self.code = nn.Parameter(torch.zeros(self.intrinsic_dim, dtype=self.backbone.model.dtype))
        for at, weight in enumerate(self.weights.values()):
            self.register_buffer(f"initial_{at}", weight.detach().clone(), persistent=False)
        return {"code": self.code}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over all that is trained; its learning rate is set before each step."""
        rate = self.runs[0].learning_rate
        if self.optim_config.name == "adamw":
            return torch.optim.AdamW(self._groups(), lr=rate, fused=True)
        from transformers.optimization import Adafactor

        return Adafactor(self._groups(), lr=rate, scale_parameter=False, relative_step=False)

    def _groups(self) -> list[dict[str, Any]]:
        """What is trained with weight decay, and biases and norms without, and their settings."""
        config = self.optim_config
        common = {"betas": config.betas, "eps": config.eps} if config.name == "adamw" else {}
        spared = [name for name in self.trained if _is_bias_or_norm(name, self.trained[name])]
        groups = [
            {"params": [w for name, w in self.trained.items() if (name in spared) == is_spared]}
            | {"weight_decay": 0.0 if is_spared else config.weight_decay, **common}
            for is_spared in (False, True)
        ]
        return [group for group in groups if group["params"]]

    # ---- data -----------------------------------------------------------------------------------

    def train_steps(self) -> TrainSteps:
        """The batch of every step, the same rows as a run of PromptTuning has."""
        trainer = self.trainer
        self.check_lengths(self.datamodule.rows_of(self.runs, "train").values(), 0)
        return self.datamodule.train_steps(
            self.runs,
            trainer.max_steps,
            lambda: trainer.global_step,
            lambda: [0],
            trainer.global_rank,
            trainer.world_size,
        )

    def dev_steps(self) -> EvaluationSteps:
        """Dev rows."""
        return self.evaluation_steps("dev", lambda: [0])

    def test_steps(self) -> EvaluationSteps:
        """Test rows."""
        return self.evaluation_steps("test", lambda: [0])

    # ---- training -------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Take up the state of a checkpoint, if one was loaded; a larger budget revives the run."""
        if self.trainer.global_step < self.trainer.max_steps and int(self.status) == FINISHED:
            self.status.fill_(TRAINING)
            self.active.fill_(True)
        if int(self.status) != TRAINING:
            self.trainer.should_stop = True
        self._clock = time.monotonic()
        if self.trainer.is_global_zero:
            start_curves(self.run_dir / "curves.csv", self.trainer.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the rows; from a loss or gradient that is not finite on, no gradient."""
        backbone = self.backbone
        assert backbone is not None
        increments = {} if self.intrinsic_dim is None else self.move_weights()
        weights = list(self.weights.values())
        loss, gradients = self.within_memory(
            batch,
            lambda tokens: weights_gradient(backbone, weights, batch, tokens, self.label_smoothing),
        )
        if increments:
            flat = [gradient.flatten() for gradient in gradients]
            gradients = list(torch.autograd.grad(list(increments.values()), self.code, flat))
        finite = loss.isfinite() & nn.utils.get_total_norm(gradients).isfinite()
        world = self.trainer.world_size
        if world > 1:
            finite = self.trainer.strategy.reduce((~finite).float(), reduce_op="sum") == 0
        self.active &= finite
        loss = torch.where(self.active, loss, 0)
        for gradient in gradients:
            gradient.mul_(world).masked_fill_(~self.active, 0)
        self.loss_sum += loss
        self.loss_steps += 1
        return _GivenGradients.apply(loss * world, gradients, *self.trained.values())

    def move_weights(self) -> dict[str, Tensor]:
        """Put the weights at theta_0 + P v; returns P v by name, with gradient to v."""
        increments = self.fastfood(self.code)
        with torch.no_grad():
            for at, (name, weight) in enumerate(self.weights.items()):
                weight.copy_(getattr(self, f"initial_{at}") + increments[name].view_as(weight))
        return increments

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate of the step, and clip; as the optimizers of a bank do."""
        config, step = self.optim_config, self.trainer.global_step
        at = torch.tensor([float(step)])
        factor = schedule_factor(at, config.schedule, config.warmup_steps, self.trainer.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = self.runs[0].learning_rate * factor.item()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.trained.values(), config.clip)

    # ---- evaluation -----------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Begin an evaluation: of the current weights in a fit, else of the best ones."""
        if self.trainer.state.fn != "fit":
            self._restore_best()
        elif self.intrinsic_dim is not None:
            self.move_weights()
        self.evaluation = Evaluation(self, "dev", self.init)

    def on_validation_epoch_end(self) -> None:
        """Score dev; in a fit, keep better weights and stop when the run is done."""
        scores = self.evaluation.scores()
        if self.trainer.state.fn != "fit":
            self.evaluation.report(scores, "validate")
            return
        if self.trainer.sanity_checking:
            return
        self._keep_better(scores.item())
        self._end_run()
        self._log_evaluation(scores.item())
        self.loss_sum.zero_()
        self.loss_steps.zero_()
        if int(self.status) != TRAINING:
            self.trainer.should_stop = True

    def _keep_better(self, score: float) -> None:
        """Copy the weights if they are better; ties keep the earlier, NaN counts as the worst."""
        score = score if score == score else -torch.inf
        first = int(self.best_step) < 0
        if not bool(self.active) or not (first or score > float(self.best_score)):
            self.bad_evaluations += 1
            return
        self.best_score.fill_(score)
        self.best_step.fill_(self.trainer.global_step)
        self.bad_evaluations.zero_()
        for name, value in self.trained.items():
            self.best[name].copy_(value.detach())

    def _end_run(self) -> None:
        """End the run if it failed, lost patience or reached the budget."""
        step = self.trainer.global_step
        if not bool(self.active):
            self.status.fill_(FAILED)
            rank_zero_warn(
                f"loss or gradient not finite by step {step}: {self.runs[0].name}; the fit ends "
                "with its best weights so far. A lower learning_rate or optim.clip may help"
            )
        elif self.patience is not None and int(self.bad_evaluations) >= self.patience:
            self.status.fill_(STOPPED)
        elif step >= self.trainer.max_steps:
            self.status.fill_(FINISHED)
        self.active &= self.status == TRAINING

    def _log_evaluation(self, dev: float) -> None:
        """Log loss and scores, and write the line in ``curves.csv``."""
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now
        loss = (self.over_ranks(self.loss_sum) / self.loss_steps.clamp(min=1)).item()
        best = self.best_score.item()
        known = best if best > -torch.inf else None
        alive = float(int(self.status) == TRAINING)
        bar = {"runs_alive": alive, "train/loss": loss}
        bar["best/val_score"] = float("nan") if known is None else known
        self.log_dict(bar, prog_bar=True, rank_zero_only=False)
        if dev == dev:
            self.log(f"dev/{self.runs[0].task}/mean", dev, rank_zero_only=False)
        if self.trainer.is_global_zero:
            line = {
                "step": self.trainer.global_step,
                "run": self.runs[0].name,
                "train_loss": loss,
                "dev": dev,
                "best_dev": known,
                "best_step": int(self.best_step),
                "status": STATUS[int(self.status)],
            }
            append_curves(self.run_dir / "curves.csv", [line])

    def on_train_end(self) -> None:
        """Write the best weights."""
        if self.trainer.is_global_zero and self.save_weights:
            save_tensors(self.best_path, "weights", self.best, self._facts())
        self.trainer.strategy.barrier("weights written")

    # ---- test -----------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Take the best weights of this fit, of the checkpoint, or of the file."""
        self._restore_best()
        self.evaluation = Evaluation(self, "test", self.init)

    @torch.no_grad()
    def _restore_best(self) -> None:
        """Put the best weights in place; from the file, unless a fit or checkpoint has them."""
        if int(self.best_step) < 0 and int(self.status) == TRAINING:
            self._read_best()
        for name, value in self.trained.items():
            value.copy_(self.best[name])
        if self.intrinsic_dim is not None:
            self.move_weights()

    @property
    def best_path(self) -> Path:
        """The file of the best weights."""
        return self.run_dir / "best.safetensors"

    def _facts(self) -> dict[str, Any]:
        """What the file of the best weights says beside them."""
        assert self.backbone is not None
        return {
            **self._identity(),
            "backbone": self.backbone.name,
            "best_step": int(self.best_step),
            "dev_score": float(self.best_score) if int(self.best_step) >= 0 else None,
            "status": int(self.status),
            "seconds": float(self.seconds),
        }

    def _identity(self) -> dict[str, Any]:
        """What weights must have in common with the settings: for files and checkpoints."""
        assert self.backbone is not None
        run = self.runs[0]
        return {
            "backbone_digest": self.backbone.digest,
            "task": run.task,
            "sample": run.sample,
            "intrinsic_dim": self.intrinsic_dim,
            "subspace_seed": None if self.intrinsic_dim is None else run.init_seed,
        }

    def _read_best(self) -> None:
        """Take the best weights from their file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: not such a file, damaged, or of other settings.
        """
        if not self.best_path.is_file():
            raise FileNotFoundError(
                f"no best weights {self.best_path}: a fit that ends writes them unless "
                "model.save_weights is false; or give a checkpoint with --ckpt_path"
            )
        tensors, facts = load_tensors(self.best_path, "weights")
        self._check_identity(facts, str(self.best_path))
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in self.best.items()}:
            raise ValueError(f"{self.best_path}: damaged, its tensors are not those of the weights")
        for name, value in self.best.items():
            value.copy_(tensors[name])
        self.best_step.fill_(facts["best_step"])
        self.best_score.fill_(-torch.inf if facts["dev_score"] is None else facts["dev_score"])
        self.status.fill_(facts["status"])
        self.seconds.fill_(facts["seconds"])

    def _check_identity(self, saved: dict[str, Any], where: str) -> None:
        """Refuse weights of another backbone, task, sample or subspace.

        Raises:
            ValueError: naming both sides.
        """
        own = self._identity()
        other = [
            f"{name} {saved.get(name)} there and {value} here"
            for name, value in own.items()
            if saved.get(name) != value
        ]
        if other:
            raise ValueError(f"{where} is of another fit: {', '.join(other)}")

    def best_prompts(self, test_scores: Tensor | None = None) -> list[Prompt]:
        """The record of the run, as a prompt of no tokens; it is not stored."""
        backbone, run = self.backbone, self.runs[0]
        assert backbone is not None
        score = self.best_score.item()
        return [
            Prompt(
                prompt=self.init[0].cpu(),
                init=self.init[0].cpu(),
                name=run.name,
                backbone=backbone.name,
                backbone_digest=backbone.digest,
                tokenizer_digest=backbone.tokenizer_digest,
                start="weights" if self.intrinsic_dim is None else "codes",
                start_seed=None if self.intrinsic_dim is None else run.init_seed,
                steps=int(self.best_step),
                dev_score=score if score > -torch.inf else None,
                status=STATUS[int(self.status)],
                seconds=round(self.seconds.item(), 3),
            )
        ]

    # ---- checkpoints ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the best weights, and what they belong to."""
        assert self.backbone is not None
        checkpoint["best"] = self.best
        checkpoint["identity"] = self._identity()
        checkpoint["runs"] = [asdict(run) for run in self.runs]
        checkpoint["backbone_digest"] = self.backbone.digest
        checkpoint["tokenizer_digest"] = self.backbone.tokenizer_digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the best weights; the optimizer's settings are those given now.

        Raises:
            ValueError: a checkpoint of another method, other data or weights, or another optimizer.
        """
        if "identity" not in checkpoint or "best" not in checkpoint:
            raise ValueError("the checkpoint is not of FineTuning: resume with the method of it")
        self._check_identity(checkpoint["identity"], "the checkpoint")
        name = checkpoint["hyper_parameters"]["optim"]["name"]
        if name != self.optim_config.name:
            raise ValueError(
                f"the checkpoint is of optimizer {name}, the settings ask for "
                f"{self.optim_config.name}: resume with the optimizer of the fit"
            )
        for name, value in self.best.items():
            value.copy_(checkpoint["best"][name])
        for state in checkpoint.get("optimizer_states", []):
            for saved, own in zip(state["param_groups"], self._groups(), strict=True):
                saved.update({key: value for key, value in own.items() if key != "params"})

    # ---- identity -------------------------------------------------------------------------------

    def result_facts(self, run: int) -> dict[str, Any]:
        """What the results say of how the run was trained."""
        return {
            "variant": "tuned" if self.intrinsic_dim is None else "random_subspace",
            "intrinsic_dim": self.intrinsic_dim,
            "optimizer": self.optim_config.name,
        }

    def summary(self) -> str:
        """What is trained, in a few words."""
        count = sum(weight.numel() for weight in self.weights.values())
        if self.intrinsic_dim is None:
            return f"1 run of all {count:,} weights"
        return f"1 run of {self.intrinsic_dim:,} numbers for all {count:,} weights"

    def describe_fit(self, data: CrossFitDataModule, trainer: Trainer) -> str:
        """The text of ``fit --dry_run``: run, rows, and memory; activations are measured."""
        self.prepare(data)
        backbone, run = self.backbone, self.runs[0]
        assert backbone is not None
        self.to(trainer.strategy.root_device)
        steps = data.train_steps(self.runs, trainer.max_steps, lambda: 0, lambda: [0], 0, 1)
        parts = micro_batches(steps.batch(0, [0]), self.tokens_per_forward)
        weights = sum(weight.nbytes for weight in self.weights.values())
        trained = sum(value.nbytes for value in self.trained.values())
        moments = 2 * trained if self.optim_config.name == "adamw" else 0
        smoothing = self.label_smoothing
        kept = max(saved_bytes(backbone, self.init, part, smoothing) for part in parts)
        held = {"weights": weights, "gradient": 2 * weights, "optimizer": moments}
        held["activations of the largest micro-batch"] = kept
        if self.intrinsic_dim is not None:
            held["subspace"] = weights + sum(tensor.nbytes for tensor in self.fastfood.buffers())
        sizes = ", ".join(f"{name} {count / 1e6:,.1f} MB" for name, count in held.items())
        return "\n".join(
            [
                f"{self.summary()}: {run.name}",
                f"backbone: {backbone.name}",
                f"steps: {trainer.max_steps}, evaluation every {trainer.val_check_interval}",
                f"first step: {run.batch_size} rows in {len(parts)} micro-batches",
                f"memory: {sizes}",
                f"checkpoint: {(2 * trained + moments) / 1e6:,.1f} MB",
            ]
        )


def weights_gradient(
    backbone: Backbone,
    weights: Sequence[Tensor],
    batch: Batch,
    tokens_per_forward: int,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """Weighted loss of rows without a prompt and its gradient with respect to weights.

    Args:
        backbone: the model, unfrozen.
        weights: its weights, each once.
        batch: rows with targets, sorted by length, longest first.
        tokens_per_forward: most padded tokens of one forward pass.
        label_smoothing: passed to :meth:`Backbone.loss`.

    Returns:
        Loss (), and a gradient of the shape of each weight; detached.
    """
    none = torch.zeros(1, 0, backbone.hidden_size, device=backbone.device)
    total, loss = [torch.zeros_like(weight) for weight in weights], none.new_zeros(())
    for part in micro_batches(batch, tokens_per_forward):
        value = (backbone.loss(none, part, label_smoothing) * part.weight).sum()
        found = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
        for sum_, new in zip(total, found, strict=True):
            sum_ += new
        loss = loss + value.detach()
    return loss, total


class _GivenGradients(torch.autograd.Function):
    """A loss whose gradients were computed before, so that Lightning's automatic loop stays.

    As :func:`bank.with_gradient`, for many tensors and without copies of them; it can be
    differentiated once.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *trained: Tensor) -> Tensor:
        """The value; the gradients are kept."""
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times that of the value."""
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            gradient.mul_(outer[0])
        return None, None, *gradients


def _is_bias_or_norm(name: str, weight: Tensor) -> bool:
    """Whether weight decay spares a weight of the backbone; v is neither."""
    return name != "code" and (weight.dim() < 2 or "bias" in name)
