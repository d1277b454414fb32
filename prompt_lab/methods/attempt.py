"""``Attempt``: every input gets its own mixture of source prompts and a target prompt.

ATTEMPT (Asai et al. 2022, arXiv 2205.11961): the tuned prompts of source tasks stay as they are; a
target prompt for each task and a small attention G are trained, and the prompt of a row is
P_target + sum_j a_j(row) P_j (``attention_mixture.py`` has the formulas). Several target tasks in
one fit share G and are trained on mixed batches; one task alone is the single-task method.

A step gives the backbone a bank of one prompt per row. Its gradient comes in bounded memory from
``bank_gradient``, and one backward pass through the mixture takes it to G and the target prompts.

The authors' code is corrected in these places: the maximum over the input leaves padding out; G's
LayerNorm is trained; G has its own learning rate (there its parameter group is empty, since names
are compared without their ending ".weight", so that G learns at the prompts' rate); in an
evaluation each row has the target prompt of its task (there rows without a task's number take the
first); and each task has its own metric. Left out: G trained on the source tasks beforehand, other
scores than G's, and a learned temperature.

Cost: no two rows share a prompt, so in decoder-only models each row runs its own N virtual tokens,
in training and in evaluation, which is what sharing saves elsewhere. A fit is of one few-shot
sample, since samples that share G would not be independent.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from prompt_lab.core.attention_mixture import PromptAttention, max_pool, row_prompts
from prompt_lab.core.backbone import Prefix
from prompt_lab.core.bank import Prefixes, with_gradient
from prompt_lab.core.batch import Batch, index_tensor, micro_batches
from prompt_lab.core.optim import adamw_with_warmup, check_warmup_and_clip
from prompt_lab.core.pretrained import tensor_digest
from prompt_lab.core.run import Run
from prompt_lab.data.batches import EvaluationSteps
from prompt_lab.data.crossfit import CrossFitDataModule
from prompt_lab.data.mixtures import Key, Mixing, MixtureSteps
from prompt_lab.data.partitions import expand_sets
from prompt_lab.data.tasks import Task
from prompt_lab.files.prompts import TARGET_OF, Prompt, PromptStore, source_prompts
from prompt_lab.files.results import append_curves, start_curves
from prompt_lab.files.tensors import load_network, save_network, write_csv
from prompt_lab.methods.evaluation import Evaluation
from prompt_lab.methods.initial_prompts import InitConfig, initial_prompts
from prompt_lab.methods.prompt_method import BackboneConfig, PromptMethod, as_config, some

ATTENTION_COLUMNS = ("task", "sample", "source", "weight", "std")
TARGET = "target prompt"


class Attempt(PromptMethod):
    """Trains target prompts and one attention over them and frozen source prompts.

    The target tasks are those of ``data.tasks``. ``trainer.max_steps`` is the budget and
    ``trainer.val_check_interval`` the number of steps between evaluations on dev; the step with the
    best mean dev score over the tasks is kept.

    The fit leaves ``attention.safetensors`` and ``target_prompts/``, which answer together and with
    the source prompts only, so ``test`` needs these too. ``test`` also writes ``attention.csv``:
    the weight of each source prompt, as mean and standard deviation over the test rows of a task.
    With ``test_baselines`` the variant ``initial_prompt`` is the mixture before training.

    Args:
        prompts: prompt stores, folders of fits, prompt files or checkpoints, with the tuned prompts
            of the source tasks.
        source_tasks: the source tasks; sets of partitions stand for their tasks.
        source_sample: few-shot sample of the source prompts; null for that of the data.
        backbone: which frozen model.
        init: how target prompts are initialised; the authors take the first source prompt, which is
            ``file`` with the path of its prompt file.
        num_virtual_tokens: N, of source and target prompts.
        inner_size: r, width within G.
        temperature: T of the softmax; null for D * e.
        init_seed: seed of G, and of target prompts that are drawn.
        learning_rate: peak learning rate of the target prompts.
        attention_learning_rate: peak learning rate of G. The authors set 0.1 for several tasks, but
            their code trains G at the rate of the prompts.
        warmup: share of the steps in which learning rates rise; they then fall linearly to zero.
        clip: largest gradient norm over G and target prompts, or null for none.
        mixing: target tasks count alike (``tasks``), or by their rows (``examples``).
        batch_size: rows of a step, of all tasks together.
        label_smoothing: share of each target's probability spread over the vocabulary.
        test_baselines: ``test`` also scores no prompt, the initial mixture, chance and majority.
        tokens_per_forward: most padded tokens of one forward pass; bounds memory, not results.
        decoding: as for PromptTuning.
        num_beams: beams of generated answers; 1 is greedy.
        max_new_tokens: longest generated answer; null for the longest answer in train and dev.
        metric_variant: ``crossfit`` computes metrics as CrossFit does, ``corrected`` without traps.
    """

    frozen = ("backbone.", "initial_attention.")
    stores_prompts = False  # not where others look for prompts that answer by themselves
    prompt: nn.Parameter
    init: Tensor
    sources: Tensor
    best: Tensor
    best_score: Tensor
    best_step: Tensor
    dev: Tensor
    loss_sum: Tensor
    weight_sum: Tensor
    seconds: Tensor

    def __init__(
        self,
        prompts: str | list[str],
        source_tasks: list[str],
        source_sample: int | None = None,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008
        init: InitConfig = InitConfig(),  # noqa: B008
        num_virtual_tokens: int = 100,
        inner_size: int = 100,
        temperature: float | None = None,
        init_seed: int = 0,
        learning_rate: float = 0.3,
        attention_learning_rate: float = 0.1,
        warmup: float = 0.06,
        clip: float | None = None,
        mixing: Mixing = "tasks",
        batch_size: int = 32,
        label_smoothing: float = 0.0,
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
        self.folders = prompts if isinstance(prompts, list) else [prompts]
        if not source_tasks:
            raise ValueError("model.source_tasks is empty: name the tasks of the source prompts")
        self.source_tasks = list(dict.fromkeys(expand_sets(source_tasks)))
        self.source_sample = source_sample
        self.init_config: InitConfig = as_config(InitConfig, init)
        self.num_virtual_tokens, self.inner_size = num_virtual_tokens, inner_size
        self.temperature, self.init_seed = temperature, init_seed
        self.learning_rate, self.attention_learning_rate = learning_rate, attention_learning_rate
        self.warmup, self.clip, self.batch_size = warmup, clip, batch_size
        self.mixing: Mixing = mixing
        self.label_smoothing, self.test_baselines = label_smoothing, test_baselines
        self._current = True  # whether an evaluation is of the current state, or of the best
        self._check_settings()

    def _check_settings(self) -> None:
        """Refuse settings that make no sense.

        Raises:
            ValueError: naming the setting and what is allowed.
        """
        for name in ("num_virtual_tokens", "inner_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}: give at least 1")
        for name in ("learning_rate", "attention_learning_rate", "temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"model.{name} is {value}: give a positive number")
        check_warmup_and_clip(self.warmup, self.clip)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"model.label_smoothing is {self.label_smoothing}: give 0 up to below 1"
            )

    # ---- set-up ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load the backbone, the data and the source prompts, and make what is trained, once."""
        self.check_trainer()
        if stage == "fit":
            self.check_budget()
        self.prepare(self.datamodule)

    def prepare(self, data: CrossFitDataModule) -> None:
        """As :meth:`setup`, without a trainer.

        Raises:
            FileNotFoundError: source prompts that are not there, all named.
            ValueError: several samples, or prompts of another backbone or length.
        """
        if len(data.samples) > 1:
            raise ValueError(
                f"data.samples has {len(data.samples)} samples, which would share one attention "
                "and not be independent: give one, and a fit for each of the others"
            )
        backbone = self.load_backbone(data)
        if self.runs:
            return
        found = self._load_sources(data)
        self.register_buffer("sources", torch.stack([p.prompt for p in found]), persistent=False)
        self.runs = [
            Run(task, data.samples[0], self.init_seed, self.learning_rate, self.batch_size)
            for task in data.tasks
        ]
        init, self.starts = initial_prompts(
            self.init_config, backbone, self.runs, data.tasks, self.num_virtual_tokens
        )
        self.prompt = nn.Parameter(init.clone())
        self.attention = PromptAttention(
            backbone.hidden_size, self.inner_size, self.temperature, self.init_seed
        )
        self.initial_attention = copy.deepcopy(self.attention).requires_grad_(False)
        self.best_attention = copy.deepcopy(self.attention).requires_grad_(False)
        count = len(self.runs)
        for name, value in {
            "init": init,
            "best": init.clone(),
            "best_score": torch.tensor(-torch.inf, dtype=torch.float64),
            "best_step": torch.tensor(-1),
            "dev": torch.full((count,), torch.nan, dtype=torch.float64),
            "loss_sum": torch.zeros(count),
            "weight_sum": torch.zeros(count),
            "seconds": torch.zeros((), dtype=torch.float64),
        }.items():
            self.register_buffer(name, value)
        self.keep_frozen_out_of_ddp()
        both = [task for task in data.tasks if task in self.source_tasks]
        if both:
            self.warn_once(
                "sources",
                f"{some(both)}: a source task and a target task, so its target prompt is trained "
                "beside a prompt that was tuned for it",
            )

    def _load_sources(self, data: CrossFitDataModule) -> list[Prompt]:
        """The source prompts, in the order of their tasks."""
        assert self.backbone is not None
        sample = data.samples[0] if self.source_sample is None else self.source_sample
        keys = [(task, sample) for task in self.source_tasks]
        found = source_prompts(self.folders, keys, self.backbone, self.num_virtual_tokens)
        self.source_names = [prompt.name for prompt in found]
        digest = hashlib.sha256()
        for prompt in found:
            digest.update(prompt.prompt.numpy().tobytes())
        self.sources_digest = digest.hexdigest()
        return found

    @property
    def keys(self) -> list[Key]:
        """The (task, sample) of each target prompt."""
        return [(run.task, run.sample) for run in self.runs]

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over target prompts and G, each at its rate; it rises, then falls linearly to 0."""
        groups = [
            {"params": [self.prompt], "lr": self.learning_rate},
            {"params": list(self.attention.parameters()), "lr": self.attention_learning_rate},
        ]
        return adamw_with_warmup(groups, self.warmup, self.trainer.max_steps)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip the gradient of target prompts and G together."""
        if self.clip is not None:
            nn.utils.clip_grad_norm_([self.prompt, *self.attention.parameters()], self.clip)

    # ---- data -----------------------------------------------------------------------------------

    def train_steps(self) -> MixtureSteps:
        """The batch of every step: rows of all target tasks, mixed."""
        trainer = self.trainer
        rows = self.datamodule.rows_of(self.runs, "train")
        self.check_lengths(rows.values(), self.num_virtual_tokens)
        return self.datamodule.mixture_steps(
            self.keys,
            self.mixing,
            self.batch_size,
            self.datamodule.order_seed,
            trainer.max_steps,
            lambda: trainer.global_step,
            trainer.global_rank,
            trainer.world_size,
        )

    def dev_steps(self) -> EvaluationSteps:
        """Dev rows of all target tasks."""
        return self.evaluation_steps("dev", lambda: list(range(len(self.runs))))

    def test_steps(self) -> EvaluationSteps:
        """Test rows of all target tasks."""
        return self.evaluation_steps("test", lambda: list(range(len(self.runs))))

    # ---- the mixture ----------------------------------------------------------------------------

    def weights(self, batch: Batch, attention: PromptAttention, targets: Tensor) -> Tensor:
        """How much each source prompt, and the target prompt, counts for each row.

        Args:
            batch: rows whose ``prompt_index`` names their target prompt.
            attention: G.
            targets: (T, N, D) target prompts; gradients flow into them, and into G.

        Returns:
            (B, J + 1), the last column for the target prompt.
        """
        with torch.autocast(targets.device.type, enabled=False):
            pooled = self._pooled_inputs(batch).to(targets.dtype)
            own = targets.amax(1).index_select(0, batch.prompt_index)  # (B, D)
            return attention(pooled, self.sources.amax(1), own)

    def mixed(self, batch: Batch, attention: PromptAttention, targets: Tensor) -> Tensor:
        """The prompt of each row, (B, N, D); settings as for :meth:`weights`."""
        weights = self.weights(batch, attention, targets)
        with torch.autocast(targets.device.type, enabled=False):
            own = targets.index_select(0, batch.prompt_index)
            return row_prompts(weights, self.sources, own)

    @torch.no_grad()
    def _pooled_inputs(self, batch: Batch) -> Tensor:
        """Maximum of each row's input embeddings over its tokens: (B, D)."""
        backbone = self.backbone
        assert backbone is not None
        pooled = [
            max_pool(backbone.embed(part.input_ids), part.input_mask)
            for part in micro_batches(batch, self.tokens_per_forward)
        ]
        return torch.cat(pooled) if pooled else self.prompt.new_zeros(0, backbone.hidden_size)

    def prefix_of(self, prefixes: Prefixes, batch: Batch) -> tuple[Prefix, Batch]:
        """What the rows need of their own mixtures, one for each, and the rows that name them.

        The baseline without prompt has none; that of the initial prompts takes the initial G.
        """
        assert self.backbone is not None
        targets = prefixes.prompts
        if targets.shape[1] == 0:
            return super().prefix_of(prefixes, batch)
        trained = self.attention if self._current else self.best_attention
        attention = self.initial_attention if targets is self.init else trained
        with torch.no_grad():
            return self.backbone.prefix(self.mixed(batch, attention, targets)), _one_each(batch)

    def tokens_beside_input(self, num_virtual_tokens: int, task: Task, longest: int) -> int:
        """As the parent's, with the prompt that each row runs in decoder-only models too."""
        assert self.backbone is not None
        beside = super().tokens_beside_input(num_virtual_tokens, task, longest)
        return beside if self.backbone.is_encoder_decoder else beside + num_virtual_tokens

    # ---- training -------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Start the clock and the curves."""
        self._clock = time.monotonic()
        if self.trainer.is_global_zero:
            start_curves(self.run_dir / "curves.csv", self.trainer.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the rows, each under its own mixture."""
        made = self.mixed(batch, self.attention, self.prompt)
        losses, gradient = self.bank_gradient(made, _one_each(batch), self.label_smoothing)
        self.loss_sum.index_add_(0, batch.prompt_index, losses)
        self.weight_sum.index_add_(0, batch.prompt_index, batch.weight)
        world = self.trainer.world_size
        return with_gradient(losses.sum() * world, made, gradient * world)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the source prompts, the target tasks and the weights."""
        assert self.backbone is not None
        checkpoint["sources_digest"] = self.sources_digest
        checkpoint["source_prompts"] = self.source_names
        checkpoint["target_tasks"] = [f"{task} {sample}" for task, sample in self.keys]
        checkpoint["backbone_digest"] = self.backbone.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what was trained beside other prompts, for other tasks or on another backbone.

        Raises:
            ValueError: naming both sides.
        """
        own = [f"{task} {sample}" for task, sample in self.keys]
        for what, saved, here in (
            ("source prompts", checkpoint.get("source_prompts", []), self.source_names),
            ("target tasks", checkpoint.get("target_tasks", []), own),
        ):
            if saved != here:
                raise ValueError(
                    f"the checkpoint is of the {what} {some(saved)}, the settings give "
                    f"{some(here)}: resume with those of the fit"
                )
        if checkpoint.get("sources_digest") != self.sources_digest:
            raise ValueError(
                "the source prompts are not those of the checkpoint, though their names are: "
                "resume with the prompt files of the fit"
            )
        self.check_backbone_of(checkpoint)

    # ---- evaluation -----------------------------------------------------------------------------

    def _evaluate(self, split: Literal["dev", "test"], current: bool) -> None:
        """Begin an evaluation: of what is trained now, or of the best."""
        if not current:
            self._restore_best()
        self._current = current
        self.evaluation = Evaluation(self, split, self.prompt.detach() if current else self.best)

    def on_validation_start(self) -> None:
        """Begin an evaluation on dev: in a fit of the current state, else of the best."""
        self._evaluate("dev", current=self.trainer.state.fn == "fit")

    def on_validation_epoch_end(self) -> None:
        """Score dev; in a fit, keep the state if its mean score is better."""
        scores = self.evaluation.scores()
        if self.trainer.state.fn != "fit":
            self.evaluation.report(scores, "validate")
            return
        if self.trainer.sanity_checking:
            return
        mean = scores.mean().nan_to_num(nan=-torch.inf)
        if bool((mean > self.best_score) | (self.best_step < 0)):  # ties keep the earlier
            self.best.copy_(self.prompt.detach())
            self.best_attention.load_state_dict(self.attention.state_dict())
            self.best_score.copy_(mean)
            self.best_step.fill_(self.trainer.global_step)
            self.dev.copy_(scores)
        self._log(scores)

    def _log(self, scores: Tensor) -> None:
        """Log losses and dev scores since the last evaluation, and a line per task."""
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now
        sums, weights = self.over_ranks(self.loss_sum), self.over_ranks(self.weight_sum)
        mean = (sums.sum() / weights.sum()).item()
        if mean != mean:
            self.warn_once(
                "nan",
                f"the loss is not finite by step {self.trainer.global_step}; the best state so far "
                "is kept. A lower learning_rate or attention_learning_rate, or clip, may help",
            )
        best = self.best_score.item()
        bar = {"train/loss": mean, "best/val_score": best if best > -torch.inf else float("nan")}
        self.log("dev/mean", scores.mean().item(), rank_zero_only=False)
        self.log_dict(bar, prog_bar=True, rank_zero_only=False)
        if self.trainer.is_global_zero:
            rows = self._curve_rows((sums / weights).tolist(), scores.tolist())
            append_curves(self.run_dir / "curves.csv", rows)
        self.loss_sum.zero_()
        self.weight_sum.zero_()

    def _curve_rows(self, losses: list[float], dev: list[float]) -> Iterator[dict[str, Any]]:
        """A line per task; the loss is empty where none of its rows was drawn."""
        change = (self.prompt.detach() - self.init).flatten(1).norm(dim=1)
        moved = (change / self.init.flatten(1).norm(dim=1).clamp(min=1e-12)).tolist()
        best = self.dev.tolist()
        for i, run in enumerate(self.runs):
            yield {
                "step": self.trainer.global_step,
                "run": run.name,
                "train_loss": losses[i],
                "dev": dev[i],
                "best_dev": best[i],
                "best_step": int(self.best_step),
                "moved": moved[i],
                "status": "training",
            }

    def on_train_end(self) -> None:
        """Write the best attention and target prompts."""
        if self.trainer.is_global_zero:
            self._write()
        self.trainer.strategy.barrier("attention written")

    def _write(self, test_scores: Tensor | None = None) -> None:
        """Write both files."""
        backbone = self.backbone
        assert backbone is not None
        metadata = {
            "backbone": backbone.name,
            "backbone_digest": backbone.digest,
            "tokenizer_digest": backbone.tokenizer_digest,
            "source_tasks": self.source_tasks,
            "source_prompts": self.source_names,
            "sources_digest": self.sources_digest,
            "target_prompts": [run.name for run in self.runs],
            "steps": int(self.best_step),
            "dev_score": self.best_score.item(),
            "seconds": round(self.seconds.item(), 3),
        }
        save_network(self.attention_path, self.best_attention, metadata)
        self.target_store.save(self.best_prompts(test_scores))

    @property
    def attention_path(self) -> Any:
        """The file of G."""
        return self.run_dir / "attention.safetensors"

    @property
    def target_store(self) -> PromptStore:
        """The store of the target prompts."""
        return PromptStore(self.run_dir / "target_prompts")

    # ---- test -----------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Take the best state of this fit, of the checkpoint, or of the files."""
        self._evaluate("test", current=False)

    def on_test_epoch_end(self) -> None:
        """Score test; write results, predictions, target prompts and the attention's weights."""
        scores = self.evaluation.scores()
        self.evaluation.report(scores, "test")
        rows = self._attention_rows()
        if self.trainer.is_global_zero:
            self._write(scores)
            write_csv(self.run_dir / "attention.csv", ATTENTION_COLUMNS, rows)

    @torch.no_grad()
    def _attention_rows(self) -> list[dict[str, Any]]:
        """Mean weight of each source over the test rows of each task, and its spread (ddof 0)."""
        count, width = len(self.runs), len(self.sources) + 1
        sums = torch.zeros(count, 2, width, dtype=torch.float64, device=self.device)
        rows = torch.zeros(count, dtype=torch.float64, device=self.device)
        for step in self.test_steps():
            batch = step.batch.to(self.device)
            weights = self.weights(batch, self.best_attention, self.best).double()
            both = torch.stack([weights, weights.square()], 1)
            sums.index_add_(0, batch.prompt_index, both)
            rows.index_add_(0, batch.prompt_index, torch.ones_like(weights[:, 0]))
        means = self.over_ranks(sums) / self.over_ranks(rows)[:, None, None]
        weight, square = means.unbind(1)
        spread = (square - weight.square()).clamp(min=0).sqrt()
        names = [*self.source_tasks, TARGET]
        return [
            {"task": run.task, "sample": run.sample, "source": name, "weight": mean, "std": std}
            for run, own, stds in zip(self.runs, weight.tolist(), spread.tolist(), strict=True)
            for name, mean, std in zip(names, own, stds, strict=True)
        ]

    def _restore_best(self) -> None:
        """Read the best state from its files, unless a fit or checkpoint has filled it.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: files of another backbone, of other source prompts or of another shape.
        """
        if int(self.best_step) >= 0:
            return
        saved = load_network(self.attention_path, PromptAttention, self.backbone)
        known = saved.metadata
        if known.get("sources_digest") != self.sources_digest:
            raise ValueError(
                f"{self.attention_path} is of the source prompts {some(known['source_prompts'])}, "
                f"the settings give {some(self.source_names)}: use the config and the prompt files "
                "of the fit"
            )
        own = self.best_attention
        if (saved.inner_size, saved.temperature) != (own.inner_size, own.temperature):
            raise ValueError(
                f"{self.attention_path} has inner_size {saved.inner_size} and temperature "
                f"{saved.temperature:g}, the config asks for {own.inner_size} and "
                f"{own.temperature:g}: use the config of the fit"
            )
        own.load_state_dict(saved.state_dict())
        prompts = self.target_store.load([run.name for run in self.runs], self.backbone)
        for i, prompt in enumerate(prompts):
            self.best[i], self.init[i] = prompt.prompt, prompt.init
            self.dev[i] = torch.nan if prompt.dev_score is None else prompt.dev_score
        self.best_step.fill_(known["steps"])
        self.best_score.fill_(known["dev_score"])
        self.seconds.fill_(known["seconds"])

    def best_prompts(self, test_scores: Tensor | None = None) -> list[Prompt]:
        """The target prompt of every task, which answers only beside the others of the mixture."""
        dev = self.dev.tolist()
        return [
            self.stored_prompt(
                run,
                self.best[i],
                self.init[i],
                dev[i],
                None if test_scores is None else test_scores[i].item(),
                **asdict(self.starts[i]),
                order_seed=self.datamodule.order_seed,
                steps=int(self.best_step),
                source_tasks=self.source_tasks,
                made_from={TARGET_OF: self.attention_path.name, "sources": self.source_names},
            )
            for i, run in enumerate(self.runs)
        ]

    def digests(self) -> dict[str, Any]:
        """Digests of backbone weights, tokenizer, data files, source prompts and prompts read."""
        found = {**super().digests(), "source_prompts": self.sources_digest}
        if self.init_config.name == "file":
            found["initial_prompts"] = tensor_digest(self.init)
        return found

    def result_facts(self, run: int) -> dict[str, Any]:
        """What the results say of how a run was trained."""
        return {
            "variant": "attempt",
            "optimizer": "adamw",
            "prompt_file": f"{self.target_store.folder.name}/{self.runs[run].name}.safetensors",
        }

    def summary(self) -> str:
        """What is trained, in a few words."""
        return (
            f"attention over {len(self.source_tasks)} source prompts and {len(self.runs)} target "
            f"prompts of {self.num_virtual_tokens} virtual tokens"
        )

    def describe_fit(self, data: CrossFitDataModule, trainer: Trainer) -> str:
        """What would be trained, beside which prompts."""
        self.prepare(data)
        numbers = sum(weight.numel() for weight in self.attention.parameters())
        return "\n".join(
            [
                self.summary(),
                f"source tasks: {', '.join(self.source_tasks)}",
                f"target tasks: {', '.join(run.task for run in self.runs)}",
                f"trained: {numbers:,} numbers of the attention, {self.prompt.numel():,} of target "
                "prompts",
                f"steps: {trainer.max_steps} of {self.batch_size} rows, evaluation every "
                f"{trainer.val_check_interval}",
            ]
        )


def _one_each(batch: Batch) -> Batch:
    """The same rows, each naming a prompt of its own, in their order."""
    own = list(range(len(batch)))
    index = index_tensor(own, batch.prompt_index.device)
    return Batch(**{**vars(batch), "prompts": own, "prompt_index": index})
