"""``PromptTuning``: train a bank of soft prompts, each as if it were alone.

Prompt tuning (Lester et al. 2021, arXiv 2104.08691) trains an (N, D) prompt in front of a frozen
model. One fit trains a grid of runs, tasks x samples x seeds x learning rates x batch sizes (x
source tasks, where prompts are transferred), in one (R, N, D) parameter: the loss of a step is the
sum of the runs' own mean losses, and optimizer, schedule, best prompt, early stop and failure
belong to the run. Which rows a run sees at step t is a function of (order seed, task, sample, t),
so a bank follows its single runs, and a resumed fit the uninterrupted one.

With a subspace, each run trains I numbers instead, its code, which the subspace's frozen map turns
into the prompt (intrinsic subspace tuning, Qin et al. 2021).

On several processes, whole runs are shared where there are at least as many runs as processes, and
the rows of each step where there are fewer.

Test data is never looked at before ``test``, and then only under each run's best prompt by dev.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import with_gradient
from prompt_lab.core.batch import Batch
from prompt_lab.core.optim import BankOptimizer, OptimConfig
from prompt_lab.core.pretrained import tensor_digest, weights_digest
from prompt_lab.core.run import Run, grid
from prompt_lab.core.subspace import Subspace
from prompt_lab.data.batches import EvaluationSteps, TrainSteps
from prompt_lab.data.crossfit import CrossFitDataModule
from prompt_lab.files.prompts import Prompt, PromptStore
from prompt_lab.files.results import Start, append_curves, start_curves
from prompt_lab.files.tensors import read_metadata
from prompt_lab.methods.dry_run import describe_grid
from prompt_lab.methods.evaluation import Evaluation
from prompt_lab.methods.initial_prompts import InitConfig, initial_prompts, scale_ratio
from prompt_lab.methods.prompt_method import BackboneConfig, PromptMethod, as_config, some
from prompt_lab.methods.run_shares import RunShares, share_runs
from prompt_lab.methods.subspace_tuning import SubspaceConfig, initial_codes

TRAINING, STOPPED, FAILED, FINISHED = range(4)
STATUS = ("training", "stopped early", "failed: loss not finite", "finished")
PER_RUN = ("prompt", "code", "init", "best", "best_code", "best_score", "best_step")
PER_RUN += ("bad_evaluations", "status", "active", "loss_sum")
"""What the state holds of each run, (R, ...)."""


class PromptTuning(PromptMethod):
    """Trains a bank of prompts and keeps the best of each run by its dev score.

    The grid of runs is data.tasks x data.samples x init_seed x learning_rate x batch_size; with one
    value each it is ordinary prompt tuning. With ``init.source_tasks`` each of them is made once
    for every source task, from whose prompt it starts (SPoT, Vu et al. 2022).
    ``trainer.max_steps`` is the budget of every run and ``trainer.val_check_interval`` the number
    of steps between evaluations on dev; with ``trainer.num_sanity_val_steps`` -1 the initial
    prompts are scored too, as step 0 of the curves.

    Args:
        backbone: which frozen model.
        optim: optimizer, schedule and clip of every run.
        init: how prompts are initialised; without effect in a subspace.
        subspace: tune inside this subspace, I numbers per run; null tunes the prompts themselves.
        num_virtual_tokens: N, the rows of a prompt.
        init_seed: seed or seeds of the initial prompt.
        learning_rate: peak learning rate or rates.
        batch_size: rows per step and run, one value or several.
        label_smoothing: share of each target's probability spread over the vocabulary.
        patience: stop a run after so many evaluations without a better dev score; null for never.
        save_steps: evaluations, by their steps, whose prompts are kept as prompt stores
            ``steps/<step>`` of the run's folder, for task embeddings over the course of training.
        test_baselines: ``test`` also scores no prompt, the initial prompt, chance and majority.
        tokens_per_forward: most padded tokens of one forward pass; bounds memory, not results; null
            for 2048 on a CPU and 16384 on a GPU.
        decoding: ``score`` chooses among the labels of tasks that have them by log-likelihood, and
            generates other answers; ``generate`` generates all answers.
        num_beams: beams of generated answers; 1 is greedy.
        max_new_tokens: longest generated answer; null for the longest answer in train and dev.
        metric_variant: ``crossfit`` computes metrics as CrossFit does, ``corrected`` without traps.
    """

    independent_runs = True
    """Whether runs have nothing in common that is trained, so that processes can share them."""

    prompt: nn.Parameter | None
    code: nn.Parameter | None
    anchor: nn.Parameter | None
    init: Tensor
    best: Tensor
    best_code: Tensor | None
    best_score: Tensor
    best_step: Tensor
    bad_evaluations: Tensor
    status: Tensor
    active: Tensor
    loss_sum: Tensor
    loss_steps: Tensor
    starts: list[Start]
    seconds: Tensor

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008
        optim: OptimConfig = OptimConfig(),  # noqa: B008
        init: InitConfig = InitConfig(),  # noqa: B008
        subspace: SubspaceConfig | None = None,
        num_virtual_tokens: int = 100,
        init_seed: int | list[int] = 0,
        learning_rate: float | list[float] = 0.3,
        batch_size: int | list[int] = 8,
        label_smoothing: float = 0.0,
        patience: int | None = None,
        save_steps: list[int] = [],  # noqa: B006 - read only; a list so that the CLI shows it
        test_baselines: bool = False,
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
        if num_virtual_tokens < 1:
            raise ValueError(f"model.num_virtual_tokens is {num_virtual_tokens}: give at least 1")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.label_smoothing is {label_smoothing}: give 0 up to below 1")
        if patience is not None and patience < 1:
            raise ValueError(f"model.patience is {patience}: give at least 1, or null")
        self.optim_config = as_config(OptimConfig, optim)
        self.init_config = as_config(InitConfig, init)
        self.subspace_config = as_config(SubspaceConfig, subspace)
        self.subspace: Subspace | None = None
        if self.subspace_config is not None:
            self.subspace_config.check()
        self.num_virtual_tokens, self.label_smoothing = num_virtual_tokens, label_smoothing
        self.init_seeds = init_seed if isinstance(init_seed, list) else [init_seed]
        self.learning_rates = learning_rate if isinstance(learning_rate, list) else [learning_rate]
        self.batch_sizes = batch_size if isinstance(batch_size, list) else [batch_size]
        self.patience, self.test_baselines = patience, test_baselines
        self.save_steps = list(save_steps)
        self._grid: list[Run] = []
        self._shares = RunShares([[]])
        self._live: list[int] = []
        self._start_scores: list[float] = []

    # ---- set-up ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load the backbone, tokenise the data and make the bank, once."""
        self.check_trainer()
        if stage == "fit":
            self.check_budget()
            self._check_save_steps()
        anew = stage == "fit" and not self.trainer.ckpt_path
        self.prepare(self.datamodule, self.trainer.global_rank, self.trainer.world_size, anew)

    def prepare(
        self, data: CrossFitDataModule, rank: int = 0, world: int = 1, anew: bool = True
    ) -> None:
        """As :meth:`setup`, without a trainer: for a look at the grid before training.

        Args:
            data: the data.
            rank: this process.
            world: number of processes.
            anew: whether the runs start now; else their initial prompts come from the checkpoint or
                the store, and the files that they were read from may be gone.
        """
        backbone = self.load_backbone(data)
        if self.runs:
            return
        self._grid = grid(
            list(data.tasks),
            data.samples,
            self.init_seeds,
            self.learning_rates,
            self.batch_sizes,
            [""] if self.subspace_config is not None else self.init_config.sources,
        )
        self._share(data, rank, world)
        init = self._make_bank(backbone, data, anew)
        count = len(self.runs)
        for name, value in {
            "init": init,
            "best": init.clone(),
            "best_code": None if self.code is None else self.code.detach().clone(),
            "best_score": torch.full((count,), -torch.inf, dtype=torch.float64),
            "best_step": torch.full((count,), -1, dtype=torch.long),
            "bad_evaluations": torch.zeros(count, dtype=torch.long),
            "status": torch.full((count,), TRAINING, dtype=torch.long),
            "active": torch.ones(count, dtype=torch.bool),
            "loss_sum": torch.zeros(count),
            "loss_steps": torch.zeros((), dtype=torch.long),
            "seconds": torch.zeros((), dtype=torch.float64),
        }.items():
            self.register_buffer(name, value)
        self._live = list(range(count))
        self._leave_to_ddp()
        if self.subspace is None and anew:
            self._warn_of_scale(init)
            self._warn_of_source_tasks(data)

    def _share(self, data: CrossFitDataModule, rank: int, world: int) -> None:
        """Choose this process's runs; a step of a run costs about what its rows are long."""
        if world == 1 or len(self._grid) < world or not self.independent_runs:
            self._shares = RunShares([list(range(len(self._grid)))])
        else:
            length = {}
            for key, splits in data.splits.items():
                inputs = splits["train"].inputs
                length[key] = 1 + sum(map(len, inputs)) / max(1, len(inputs))
            costs = [run.batch_size * length[run.task, run.sample] for run in self._grid]
            self._shares = RunShares(share_runs(costs, world), rank)
        self.runs = [self._grid[place] for place in self._shares.own]

    @property
    def shares(self) -> RunShares:
        """Which process has which runs."""
        return self._shares

    @property
    def all_runs(self) -> list[Run]:
        """The runs of all processes."""
        return self._grid

    def _leave_to_ddp(self) -> None:
        """Keep out of DDP what is frozen, and own runs, whose gradients no other process has.

        Then DDP is left with a number that nothing depends on, since it refuses to have nothing.
        """
        self.keep_frozen_out_of_ddp()
        self.anchor = None
        if self.shares.divided:
            name = "prompt" if self.subspace is None else "code"
            # DDP broadcasts and checks by the first name, and reduces by the second.
            self._ddp_params_and_buffers_to_ignore += [name, f".{name}"]
            self.anchor = nn.Parameter(torch.zeros(()))
            self.frozen = (*self.frozen, "anchor")

    def _check_save_steps(self) -> None:
        """Refuse to keep the prompts of steps that are not evaluated.

        Raises:
            ValueError: naming them.
        """
        steps, every = self.trainer.max_steps, self.steps_between_evaluations
        never = [step for step in self.save_steps if step % every or not 0 < step <= steps]
        if never:
            raise ValueError(
                f"model.save_steps has {', '.join(map(str, never))}, where nothing is evaluated: "
                f"give multiples of trainer.val_check_interval ({every}) up to {steps}"
            )

    def _make_bank(self, backbone: Backbone, data: CrossFitDataModule, anew: bool) -> Tensor:
        """Make what is trained; returns the initial prompts (R, N, D)."""
        self.prompt = self.code = None
        self.starts = [Start("")] * len(self.runs)
        if self.subspace_config is None:
            if anew or self.init_config.name != "file":
                init, self.starts = initial_prompts(
                    self.init_config, backbone, self.runs, data.tasks, self.num_virtual_tokens
                )
            else:  # filled by the checkpoint, or by _restore_best
                init = torch.zeros(len(self.runs), self.num_virtual_tokens, backbone.hidden_size)
            self.prompt = nn.Parameter(init.clone())
            return init
        self.starts = [self.subspace_config.start(run.init_seed) for run in self.runs]
        tests = not anew and self.trainer.state.fn != "fit"
        if tests and not self.subspace_config.is_there:  # the store has all that a test needs
            init = torch.zeros(len(self.runs), self.num_virtual_tokens, backbone.hidden_size)
            self.prompt = nn.Parameter(init.clone())
            return init
        subspace = self.subspace_config.load(backbone, self.num_virtual_tokens)
        codes = initial_codes(self.runs, subspace.intrinsic_dim, self.subspace_config.std)
        self.subspace, self.code = subspace, nn.Parameter(codes)
        return self.bank().detach()

    @property
    def trained(self) -> nn.Parameter:
        """What the optimizer changes: the prompts (R, N, D), or their codes (R, I)."""
        trained = self.prompt if self.subspace is None else self.code
        assert trained is not None
        return trained

    def bank(self) -> Tensor:
        """The runs' prompts (R, N, D), with gradient to what is trained."""
        return self.trained if self.subspace is None else self.subspace.back_project(self.trained)

    def configure_optimizers(self) -> BankOptimizer:
        """The bank's optimizer; it holds the prompts, or their codes, and nothing else."""
        rates = [run.learning_rate for run in self.runs]
        return self.optim_config.build([self.trained], rates, self.active, self.trainer.max_steps)

    def live(self) -> list[int]:
        """Indices of the runs that still train."""
        return self._live

    # ---- data -----------------------------------------------------------------------------------

    def train_steps(self) -> TrainSteps:
        """The batch of every step, made from the trainer's step count when it is asked for."""
        trainer = self.trainer
        rows = self.datamodule.rows_of(self.runs, "train")
        self.check_lengths(rows.values(), self.num_virtual_tokens)
        return self.datamodule.train_steps(
            self.runs, trainer.max_steps, lambda: trainer.global_step, self.live, *self.row_share
        )

    def dev_steps(self) -> EvaluationSteps:
        """Dev rows of the live runs, or of all runs outside a fit."""
        fitting = self.trainer.state.fn == "fit"
        everyone = list(range(len(self.runs)))
        return self.evaluation_steps("dev", lambda: self._live if fitting else everyone)

    def test_steps(self) -> EvaluationSteps:
        """Test rows of all runs."""
        return self.evaluation_steps("test", lambda: list(range(len(self.runs))))

    # ---- training -------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Take up the state of a checkpoint, if one was loaded; a larger budget revives runs."""
        if self.trainer.global_step < self.trainer.max_steps:
            finished = self.status == FINISHED
            self.status.masked_fill_(finished, TRAINING)
            self.active |= finished
        self._live = [i for i, s in enumerate(self.status.tolist()) if s == TRAINING]
        self._clock = time.monotonic()
        scores = self.shares.join(self._start_scores) if self._start_scores else []
        if self.trainer.is_global_zero:
            curves = self.run_dir / "curves.csv"
            start_curves(curves, self.trainer.global_step)
            names = [run.name for run in self.all_runs]
            scored = zip(names, scores, strict=False)  # none, or one for each run
            append_curves(curves, ({"step": 0, "run": n, "dev": dev} for n, dev in scored))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Join the runs of all processes, and note what they are trained on, weights, tokenizer."""
        assert self.backbone is not None
        self._convert_runs(checkpoint, self.shares.join_tensor)
        checkpoint["runs"] = [asdict(run) for run in self.all_runs]
        checkpoint["starts"] = [asdict(start) for start in self.shares.join(self.starts)]
        checkpoint["backbone_digest"] = self.backbone.digest
        checkpoint["tokenizer_digest"] = self.backbone.tokenizer_digest
        checkpoint["subspace_digest"] = self._subspace_digest()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take this process's runs; refuse other data, seeds or weights, which may look like these.

        Raises:
            ValueError: naming both sides.
        """
        assert self.backbone is not None
        saved = _trained_on(checkpoint.get("runs", []))
        own = _trained_on(map(asdict, self.all_runs))
        if saved != own:
            raise ValueError(
                f"the checkpoint is of {len(saved)} runs ({some(saved)}), the settings ask for "
                f"{len(own)} ({some(own)}): resume with the tasks, samples and seeds of the fit"
            )
        if checkpoint.get("subspace_digest") != self._subspace_digest():
            raise ValueError(
                "the checkpoint was tuned in another subspace, or in none: resume with the "
                "model.subspace of the fit"
            )
        self.check_backbone_of(checkpoint)
        self.starts = [Start(**checkpoint["starts"][place]) for place in self.shares.own]
        self._convert_runs(checkpoint, self.shares.take)

    def _convert_runs(
        self, checkpoint: dict[str, Any], convert: Callable[[Tensor], Tensor]
    ) -> None:
        """Put what ``convert`` makes of it in the place of what a checkpoint holds of each run."""
        if not self.shares.divided:
            return
        state = checkpoint["state_dict"]
        found = {name: convert(state[name]) for name in PER_RUN if name in state}
        checkpoint["state_dict"] = {**state, **found}
        for of_optimizer in checkpoint.get("optimizer_states", []):
            of_optimizer["state"] = {
                parameter: {name: convert(value) for name, value in values.items()}
                for parameter, values in of_optimizer["state"].items()
            }

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of all live runs; a run whose loss or gradient is not finite rests from here on."""
        assert self.backbone is not None
        bank = self.bank()
        losses, gradient = self.bank_gradient(bank, batch, self.label_smoothing)
        finite = losses.isfinite() & gradient.flatten(1).isfinite().all(1)
        _, world = self.row_share
        if world > 1:
            failures = self.trainer.strategy.reduce((~finite).float(), reduce_op="sum")
            finite = failures == 0
        self.active &= finite
        losses = torch.where(self.active, losses, 0)
        gradient = torch.where(self.active[:, None, None], gradient, 0)
        self.loss_sum += losses
        self.loss_steps += 1
        loss = with_gradient(losses.sum() * world, bank, gradient * world)
        return loss if self.anchor is None else loss + 0 * self.anchor

    def on_validation_start(self) -> None:
        """Begin an evaluation: of the current prompts in a fit, else of the best ones."""
        fitting = self.trainer.state.fn == "fit"
        if not fitting:
            self._restore_best()
        self.evaluation = Evaluation(self, "dev", self.bank().detach() if fitting else self.best)

    def on_validation_epoch_end(self) -> None:
        """Score dev; in a fit, keep better prompts and stop runs that are done."""
        scores = self.evaluation.scores()
        if self.trainer.state.fn != "fit":
            self.evaluation.report(scores, "validate")
            return
        if self.trainer.sanity_checking:
            whole = self.trainer.num_sanity_val_steps == float("inf")
            self._start_scores = scores.tolist() if whole else []
            return
        self._keep_better(scores)
        self._stop_runs()
        self._warn_of_answers()
        self._log_evaluation(scores)
        self._save_step(scores.tolist())
        self.loss_sum.zero_()
        self.loss_steps.zero_()
        if not self._count_live():
            self.trainer.should_stop = True

    def _count_live(self) -> int:
        """How many runs of all processes still train."""
        return sum(self.shares.gather([len(self._live)]))

    def _keep_better(self, scores: Tensor) -> None:
        """Update each live run's best prompt; ties keep the earlier, NaN counts as the worst."""
        live = torch.zeros_like(self.active)
        live[self._live] = True
        scores = scores.nan_to_num(nan=-torch.inf)
        better = live & self.active & ((scores > self.best_score) | (self.best_step < 0))
        self.best_score.copy_(torch.where(better, scores, self.best_score))
        self.best_step.masked_fill_(better, self.trainer.global_step)
        self.best.copy_(torch.where(better[:, None, None], self.bank().detach(), self.best))
        if self.best_code is not None:
            self.best_code.copy_(
                torch.where(better[:, None], self.trained.detach(), self.best_code)
            )
        bad = torch.where(better, 0, self.bad_evaluations + 1)
        self.bad_evaluations.copy_(torch.where(live, bad, self.bad_evaluations))

    def _stop_runs(self) -> None:
        """End runs that failed, lost patience or reached the budget."""
        training = self.status == TRAINING
        self.status.masked_fill_(training & ~self.active, FAILED)
        if self.patience is not None:
            stopped = training & self.active & (self.bad_evaluations >= self.patience)
            self.status.masked_fill_(stopped, STOPPED)
        if self.trainer.global_step >= self.trainer.max_steps:
            self.status.masked_fill_(self.status == TRAINING, FINISHED)
        self.active &= self.status == TRAINING
        status = self.status.tolist()
        failed = self.shares.gather([self.runs[i].name for i in self._live if status[i] == FAILED])
        if failed:
            rank_zero_warn(
                f"loss or gradient not finite by step {self.trainer.global_step}: "
                f"{', '.join(failed)}; these runs stop, with their best prompt so far. A lower "
                "learning_rate or optim.clip may help"
            )
        self._evaluated, self._live = self._live, [i for i in self._live if status[i] == TRAINING]

    def _log_evaluation(self, scores: Tensor) -> None:
        """Log the spread over runs, and each run's own line in ``curves.csv``."""
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now
        losses = (self.over_ranks(self.loss_sum) / self.loss_steps.clamp(min=1)).tolist()
        rows = self._joined_rows(losses, scores.tolist())
        best = self.shares.join(self.best_score.tolist())
        tasks = {run.name: run.task for run in self.all_runs}
        logged: dict[str, float] = {"runs_alive": float(self._count_live())}
        for task in self.datamodule.tasks:
            values = [row["dev"] for row in rows if tasks[row["run"]] == task]
            known = [value for value in values if value == value]
            if known:
                logged[f"dev/{task}/min"] = min(known)
                logged[f"dev/{task}/mean"] = sum(known) / len(known)
                logged[f"dev/{task}/max"] = max(known)
        alive = [row["train_loss"] for row in rows]
        logged["train/loss"] = sum(alive) / max(1, len(alive))
        finite = [value for value in best if value > -torch.inf]
        logged["best/val_score"] = sum(finite) / len(finite) if finite else float("nan")
        bar = ("runs_alive", "train/loss", "best/val_score")
        self.log_dict({k: v for k, v in logged.items() if k not in bar}, rank_zero_only=False)
        self.log_dict({k: logged[k] for k in bar}, prog_bar=True, rank_zero_only=False)
        if self.trainer.is_global_zero:
            append_curves(self.run_dir / "curves.csv", rows)

    def _save_step(self, dev: list[float]) -> None:
        """Keep the prompts of the evaluated runs, if this is one of the steps to keep."""
        step = self.trainer.global_step
        if step not in self.save_steps:
            return
        bank, order_seed = self.bank().detach(), self.datamodule.order_seed
        evaluated = set(self._evaluated)
        kept = (
            self.stored_prompt(
                self.runs[i],
                bank[i],
                self.init[i],
                dev[i],
                None,
                **asdict(self.starts[i]),
                order_seed=order_seed,
                steps=step,
                status=STATUS[TRAINING],
            )
            if i in evaluated
            else None
            for i in range(len(self.runs))
        )
        self.save_prompts(PromptStore(self.run_dir / "steps" / str(step)), kept)

    def _joined_rows(self, losses: list[float], dev: list[float]) -> list[dict[str, Any]]:
        """A line of the curves for every evaluated run of all processes, on each of them."""
        own: list[dict[str, Any] | None] = [None] * len(self.runs)
        for i, row in zip(self._evaluated, self._curve_rows(losses, dev), strict=True):
            own[i] = row
        return [row for row in self.shares.join(own) if row is not None]

    def _curve_rows(self, losses: list[float], dev: list[float]) -> Iterator[dict[str, Any]]:
        """A line per evaluated run."""
        moved, best, steps = (
            self._moved().tolist(),
            self.best_score.tolist(),
            self.best_step.tolist(),
        )
        status = self.status.tolist()
        for i in self._evaluated:
            yield {
                "step": self.trainer.global_step,
                "run": self.runs[i].name,
                "train_loss": losses[i],
                "dev": dev[i],
                "best_dev": best[i] if best[i] > -torch.inf else None,
                "best_step": steps[i],
                "moved": moved[i],
                "status": STATUS[status[i]],
            }

    def _moved(self) -> Tensor:
        """Distance of each prompt from its start, relative to the start's norm: (R,)."""
        change = (self.bank().detach() - self.init).flatten(1).norm(dim=1)
        return change / self.init.flatten(1).norm(dim=1).clamp(min=1e-12)

    def on_train_end(self) -> None:
        """Write the best prompt of every run to the store."""
        self.save_prompts(PromptStore(self.run_dir / "prompts"), self.best_prompts())
        self.trainer.strategy.barrier("prompts written")

    # ---- test -----------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Take each run's best prompt from this fit, the checkpoint, or the prompt store."""
        self._restore_best()
        self.evaluation = Evaluation(self, "test", self.best)

    def _restore_best(self) -> None:
        """Fill the buffers from the prompt store, unless a fit or checkpoint has filled them."""
        if int(self.best_step.max()) >= 0:
            return
        assert self.backbone is not None
        store = PromptStore(self.run_dir / "prompts")
        for i, saved in enumerate(store.load([run.name for run in self.runs], self.backbone)):
            if saved.prompt.shape != self.best[i].shape:
                raise ValueError(
                    f"{store.path(saved.name)} has shape {tuple(saved.prompt.shape)}, the config "
                    f"asks for {tuple(self.best[i].shape)}: use the config of the fit"
                )
            self.best[i], self.init[i] = saved.prompt, saved.init
            self.starts[i] = saved.start_fields
            if saved.code is not None:
                if self.best_code is None:
                    self.best_code = saved.code.new_zeros(len(self.runs), len(saved.code))
                self.best_code[i] = saved.code
            self.best_step[i] = -1 if saved.steps is None else saved.steps
            self.best_score[i] = -torch.inf if saved.dev_score is None else saved.dev_score
            self.status[i] = STATUS.index(saved.status) if saved.status in STATUS else FINISHED
            self.seconds.fill_(saved.seconds or 0)

    def best_prompts(self, test_scores: Tensor | None = None) -> list[Prompt]:
        """The best prompt of every run, ready to be stored."""
        score, step = self.best_score.tolist(), self.best_step.tolist()
        status, order_seed = self.status.tolist(), self.datamodule.order_seed
        return [
            self.stored_prompt(
                run,
                self.best[i],
                self.init[i],
                score[i],
                None if test_scores is None else test_scores[i].item(),
                code=None if self.best_code is None else self.best_code[i].detach().cpu(),
                **asdict(self.starts[i]),
                order_seed=order_seed,
                steps=step[i],
                status=STATUS[status[i]],
            )
            for i, run in enumerate(self.runs)
        ]

    # ---- identity, warnings ---------------------------------------------------------------------

    def digests(self) -> dict[str, Any]:
        """Digests of backbone weights, tokenizer, data files, subspace, and initial prompts.

        These are of prompts that were read, and stand for their files.
        """
        found = {**super().digests(), "subspace": self._subspace_digest()}
        if self.init_config.name == "file" and self.subspace_config is None:
            own = self.shares.join([tensor_digest(init) for init in self.init])
            found["initial_prompts"] = hashlib.sha256(" ".join(own).encode()).hexdigest()
        return found

    def _subspace_digest(self) -> str | None:
        """SHA-256 of the subspace's weights, or None where there is no subspace."""
        if self.subspace is None and self.subspace_config is not None:  # its file is gone
            return self.fit_record().get("digests", {}).get("subspace")
        return None if self.subspace is None else self._frozen_digest

    @cached_property
    def _frozen_digest(self) -> str:
        """The same of a subspace that is there; it does not change, so it is hashed once."""
        assert self.subspace is not None
        return weights_digest(self.subspace)

    @property
    def variant(self) -> str:
        """Name of what is trained, in the results."""
        return "tuned" if self.subspace_config is None else self.subspace_config.variant

    def describe_fit(self, data: CrossFitDataModule, trainer: Trainer) -> str:
        """The grid of runs, its cost and memory."""
        return describe_grid(self, data, trainer)

    def result_facts(self, run: int) -> dict[str, Any]:
        """What the results say of how a run was trained."""
        return {
            "variant": self.variant,
            "intrinsic_dim": None if self.best_code is None else self.best_code.shape[1],
            "optimizer": self.optim_config.name,
        }

    def _warn_of_scale(self, init: Tensor) -> None:
        """Warn of initial prompts off the scale of the embeddings."""
        assert self.backbone is not None
        ratio = scale_ratio(self.backbone, init)
        if not 1 / 3 <= ratio <= 3:
            self.warn_once(
                "scale",
                f"the initial prompts have {ratio:.3g} times the standard deviation of the "
                "backbone's embeddings; prompts off that scale often train badly (init.name vocab "
                "starts on it)",
            )

    def _warn_of_source_tasks(self, data: CrossFitDataModule) -> None:
        """Warn of tasks that the initial prompt was already learned on."""
        files = {start.start_file for start in self.starts if start.start in ("meta", "multitask")}
        sources = {
            task for file in files for task in read_metadata(file, "prompt")["source_tasks"] or []
        }
        both = [task for task in data.tasks if task in sources]
        if both:
            self.warn_once(
                "sources",
                f"the initial prompt was learned on {some(both)}, tuned here: their scores say "
                "nothing of new tasks",
            )

    def _warn_of_answers(self) -> None:
        """Warn of runs that answer every dev row alike, and of prompts that do not move."""
        constant = self.shares.gather([self.runs[i].name for i in self.evaluation.constant_runs()])
        if constant and self.trainer.global_step > self.trainer.max_steps // 4:
            self.warn_once(
                "constant",
                f"step {self.trainer.global_step}: the same answer to every dev row from "
                f"{some(constant)}; the score is that of a constant. Try another learning_rate",
            )
        moved = self._moved().tolist()
        still = self.shares.gather([self.runs[i].name for i in self._evaluated if moved[i] < 1e-3])
        if still:
            self.warn_once(
                "still",
                f"step {self.trainer.global_step}: prompts within 0.1 % of their start: "
                f"{some(still)}. Soft prompts need large learning rates (0.3 is usual for T5)",
            )


def _trained_on(runs: Iterable[dict[str, Any]]) -> list[str]:
    """Task, sample, initial seed, and source if there is one, of every run."""
    return [
        f"{run['task']} {run['sample']} seed {run['init_seed']}"
        + (f" from {run['source']}" if run.get("source") else "")
        for run in runs
    ]
