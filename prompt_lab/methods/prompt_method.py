"""``PromptMethod``: what every method shares, whatever it trains.

It owns the frozen backbone, turns rows into answers, makes gradients of a bank in bounded memory,
and keeps the backbone out of checkpoints and out of DDP. It neither trains nor chooses a prompt;
the methods do.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prompt_lab.core.backbone import Backbone, Prefix
from prompt_lab.core.bank import Prefixes, bank_gradient, is_out_of_memory, renumber
from prompt_lab.core.batch import Batch, default_tokens_per_forward
from prompt_lab.core.run import Run
from prompt_lab.data.batches import EvaluationBatch, EvaluationSteps, Rows
from prompt_lab.data.crossfit import CrossFitDataModule
from prompt_lab.data.files import SplitName
from prompt_lab.data.tasks import Task
from prompt_lab.files.prompts import Prompt, PromptStore
from prompt_lab.files.results import summary_table
from prompt_lab.files.tensors import write_atomically
from prompt_lab.methods.evaluation import Evaluation
from prompt_lab.methods.run_shares import RunShares
from prompt_lab.sandbox import SANDBOX

Made = TypeVar("Made")

FIT_RECORD = "fit.json"
"""The file of a run's folder that keeps what a test cannot know of its fit."""

TRAINER_SETTINGS = (
    *("max_steps", "max_epochs", "val_check_interval", "check_val_every_n_epoch"),
    *("limit_train_batches", "limit_val_batches", "precision"),
    *("accumulate_grad_batches", "gradient_clip_val"),
)
DATA_SETTINGS = ("samples", "max_input_length", "truncation_side", "task_prefix", "order_seed")

NO_NUMBER = (
    *("model.backbone.name", "model.init.path", "model.subspace.path"),
    *("model.prompts", "model.source_prompts", "model.adapters", "model.attention"),
    *("model.tokens_per_forward", "model.test_baselines", "model.save_steps"),
    *("model.backbone.compile", "model.backbone.gradient_checkpointing"),
)
"""Settings that name files, whose digests count instead, or that change nothing but rounding."""


@dataclass
class BackboneConfig:
    """Which frozen model, and how it runs.

    Args:
        name: hub id, folder, or ``sandbox`` for the tiny model that ships with the package.
        dtype: dtype of the frozen weights; prompts, optimizer and losses stay float32. bfloat16 is
            the fast one. float16 is for GPUs without it: T5 and mT5 are refused, since they
            overflow, and a run of another model that overflows stops and says so.
        attention: attention implementation of transformers.
        gradient_checkpointing: keep the activations of one layer at a time; exact but slower, for
            backbones whose activations do not fit.
        compile: run training steps through ``torch.compile``; exact up to rounding, and the first
            steps take minutes.
    """

    name: str = SANDBOX
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False

    def load(self) -> Backbone:
        """The backbone, frozen.

        Raises:
            ValueError: as :meth:`Backbone.load`; or both checkpointing and compiling.
        """
        if self.gradient_checkpointing and self.compile:
            raise ValueError(
                "model.backbone.gradient_checkpointing and model.backbone.compile do not go "
                "together: use checkpointing where memory is short, compile where it is not"
            )
        backbone = Backbone.load(self.name, self.dtype, self.attention)
        if self.gradient_checkpointing:
            backbone.recompute_layers()
        if self.compile:
            backbone.compile_training()
        return backbone


class PromptMethod(LightningModule):
    """Parent of the methods: a frozen backbone, answers, and checkpoints without it.

    Args:
        backbone: which frozen model.
        tokens_per_forward: most padded tokens of one forward pass; bounds memory, not results; null
            for 2048 on a CPU and 16384 on a GPU.
        decoding: ``score`` chooses among the labels of tasks that have them by log-likelihood, and
            generates other answers; ``generate`` generates all answers.
        num_beams: beams of generated answers; 1 is greedy.
        max_new_tokens: longest generated answer; null for the longest answer in train and dev.
        metric_variant: ``crossfit`` computes metrics as CrossFit does, ``corrected`` without traps.

    Attributes:
        runs: what each prompt of the bank is for; empty before :meth:`setup`. Where processes share
            whole runs, those of this process.
        evaluation: the pass over dev or test that is going on.
        init: (R, N, D) the prompts that the runs start from.
        seconds: () wall-clock seconds of the fit so far.
        num_virtual_tokens: N.
        test_baselines: whether ``test`` also scores no prompt and other baselines.
        trains_a_bank: whether several runs train side by side.
        stores_prompts: whether there are prompts to keep as files.
        trains: whether there is a fit.
        frozen: beginnings of the names of weights that do not change, and no checkpoint holds.
    """

    evaluation: Evaluation
    init: Tensor
    seconds: Tensor
    num_virtual_tokens: int
    test_baselines: bool = False
    trains_a_bank: bool = True
    stores_prompts: bool = True
    trains: bool = True
    frozen: tuple[str, ...] = ("backbone.", "subspace.")

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008
        tokens_per_forward: int | None = None,
        decoding: Literal["score", "generate"] = "score",
        num_beams: int = 1,
        max_new_tokens: int | None = None,
        metric_variant: Literal["crossfit", "corrected"] = "crossfit",
    ) -> None:
        super().__init__()
        given = {"tokens_per_forward": tokens_per_forward, "num_beams": num_beams}
        for name, value in {**given, "max_new_tokens": max_new_tokens}.items():
            if value is not None and value < 1:
                raise ValueError(f"model.{name} is {value}: give at least 1")
        self.backbone_config = as_config(BackboneConfig, backbone)
        self._tokens_per_forward = tokens_per_forward
        self.decoding, self.num_beams = decoding, num_beams
        self.max_new_tokens, self.metric_variant = max_new_tokens, metric_variant
        self.backbone: Backbone | None = None
        self.runs: list[Run] = []
        self._warned: set[str] = set()
        self._seen_splits: set[SplitName] = set()

    def best_prompts(self, test_scores: Tensor | None = None) -> Iterable[Prompt]:
        """The prompt of every run that ``test`` is to score, ready to be stored."""
        raise NotImplementedError

    def summary(self) -> str:
        """What is trained, in a few words."""
        return f"{len(self.all_runs)} runs of {self.num_virtual_tokens} virtual tokens"

    def result_facts(self, run: int) -> dict[str, Any]:
        """What the results say of how a run was trained, beside or instead of its prompt's word."""
        raise NotImplementedError

    def score_table(self, rows: list[dict[str, Any]]) -> str:
        """The table that an evaluation prints, from its lines of results."""
        return summary_table(rows)

    def describe_fit(self, data: CrossFitDataModule, trainer: Trainer) -> str:
        """The text of ``fit --dry_run``.

        Raises:
            ValueError: a method that has none.
        """
        raise ValueError(
            f"{type(self).__name__} has no --dry_run: for a look use a small trainer.max_steps"
        )

    # ---- processes ------------------------------------------------------------------------------

    @property
    def shares(self) -> RunShares:
        """Which process has which runs: here, each has all of them."""
        return RunShares([list(range(len(self.runs)))])

    @property
    def all_runs(self) -> list[Run]:
        """The runs of all processes."""
        return self.runs

    @property
    def row_share(self) -> tuple[int, int]:
        """Which share of the rows is this process's, and how many there are."""
        if self.shares.divided:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def over_ranks(self, values: Tensor) -> Tensor:
        """Sum over the processes that share rows."""
        if self.row_share[1] == 1:
            return values
        return self.trainer.strategy.reduce(values.clone(), reduce_op="sum")

    def save_prompts(self, store: PromptStore, prompts: Iterable[Prompt | None]) -> None:
        """Write the prompts of all processes, by the first one; None leaves a run out."""
        joined = (prompt for prompt in self.shares.stream(prompts) if prompt is not None)
        if self.trainer.is_global_zero:
            store.save(joined)
        elif self.shares.divided:
            list(joined)  # empty: sends them

    # ---- set-up ---------------------------------------------------------------------------------

    @property
    def datamodule(self) -> CrossFitDataModule:
        """The trainer's data.

        Raises:
            ValueError: the trainer was not given a ``CrossFitDataModule``.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, CrossFitDataModule):
            raise ValueError(
                f"{type(self).__name__} needs a CrossFitDataModule: pass datamodule= to the trainer"
            )
        return data

    @property
    def tokens_per_forward(self) -> int:
        """Most padded tokens of one forward pass."""
        return self._tokens_per_forward or default_tokens_per_forward(self.device)

    def load_backbone(self, data: CrossFitDataModule) -> Backbone:
        """Load the backbone, once, and let the data be tokenised by its rules."""
        backbone = self.backbone or self.backbone_config.load()
        data.connect(backbone)
        self.backbone = backbone
        return backbone

    def keep_frozen_out_of_ddp(self) -> None:
        """Frozen weights are neither broadcast nor reduced; call when all parameters are made.

        Buffers are not broadcast either: each rank has its own sums, and the others are equal.
        """
        names = [name for name, _ in self.named_parameters(remove_duplicate=False)]  # tied ones too
        frozen = [name for name in names if name.startswith(self.frozen)]
        buffers = [name for name, _ in self.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = frozen + buffers

    def check_trainer(self) -> None:
        """Refuse trainer settings that would quietly change the result.

        Raises:
            ValueError: the setting, and what to use instead.
        """
        trainer = self.trainer
        strategy, whole = trainer.strategy, (SingleDeviceStrategy, DDPStrategy)
        if not isinstance(strategy, whole) or isinstance(strategy, DeepSpeedStrategy):
            refuse_strategy(type(strategy).__name__)
        if trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision {trainer.precision} would round the prompts and their "
                "optimizer: use trainer.precision 32-true with model.backbone.dtype bfloat16"
            )
        if trainer.precision == "16-mixed":
            raise ValueError(
                "trainer.precision 16-mixed: a step makes its gradient before the trainer scales "
                "the loss, so small gradients are below what float16 holds: use bf16-mixed or "
                "32-true"
            )
        if trainer.gradient_clip_val and self.trains_a_bank:
            raise ValueError(
                "trainer.gradient_clip_val clips over all runs of the bank together and so couples "
                "them: use model.optim.clip (some methods have model.clip), which clips each alone"
            )
        share = trainer.limit_val_batches  # 1 is one batch, 1.0 are all
        if getattr(trainer, "fast_dev_run", False) or isinstance(share, int) or share != 1.0:
            raise ValueError(
                "trainer.fast_dev_run and limit_val_batches would score part of the rows: for a "
                "quick look use --dry_run, or a small trainer.max_steps"
            )
        if trainer.accumulate_grad_batches != 1 and self.trains_a_bank:
            raise ValueError(
                "trainer.accumulate_grad_batches is not needed: a step is cut into micro-batches "
                "of model.tokens_per_forward tokens; set model.batch_size instead"
            )

    # ---- answers --------------------------------------------------------------------------------

    def scored(self, task: Task) -> bool:
        """Whether answers of a task are chosen by score (else generated)."""
        return self.decoding == "score" and task.labels is not None

    def describe_decoding(self, task: Task) -> str:
        """The way of answering, for the results."""
        if self.scored(task):
            return "score"
        length = self.max_new_tokens or "longest"
        return f"generate beams={self.num_beams} tokens={length}"

    def way_of_answering(self, task: str, sample: int) -> dict[str, Any]:
        """How answers to a task are made, as prompt files keep it for ``prompt-lab predict``."""
        data = self.datamodule
        scored, labels = self.scored(data.tasks[task]), data.tasks[task].labels
        return {
            "decoding": "score" if scored else "generate",
            "labels": list(labels) if scored and labels else None,
            "max_new_tokens": self.max_new_tokens or data.longest_answer(task, sample),
            "truncation_side": data.truncation_side,
            "num_beams": self.num_beams,
            "max_input_length": data.max_input_length,
            "task_prefix": data.task_prefix,
        }

    def answers(self, prefixes: Prefixes, step: EvaluationBatch) -> list[str]:
        """One answer per row of an evaluation batch; a batch too large for memory is halved."""
        task, batch = self.datamodule.tasks[step.task], step.batch
        try:
            return self._answers(*self.prefix_of(prefixes, batch), task, step)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(batch) < 2:
                raise
        half = len(batch) // 2
        parts = (batch.slice(0, half), batch.slice(half, len(batch)))
        return [
            text for part in parts for text in self.answers(prefixes, replace(step, batch=part))
        ]

    def prefix_of(self, prefixes: Prefixes, batch: Batch) -> tuple[Prefix, Batch]:
        """What the rows of a batch need of their prompts, and the rows numbered by its order."""
        used = sorted(set(batch.prompts))
        return prefixes.of(used), renumber(batch, used)

    def _answers(
        self, prefix: Prefix, batch: Batch, task: Task, step: EvaluationBatch
    ) -> list[str]:
        """One answer per row of a batch whose prompts are those of the prefix."""
        assert self.backbone is not None
        if self.scored(task):
            labels = list(task.labels or [])
            return [labels[choice] for choice in self.backbone.choose(prefix, batch, labels)]
        length = self.max_new_tokens or step.max_new_tokens
        return self.backbone.generate(prefix, batch, length, self.num_beams)

    def tokens_beside_input(self, num_virtual_tokens: int, task: Task, longest: int) -> int:
        """Tokens that an evaluated row costs besides its input, for cutting batches."""
        assert self.backbone is not None
        prompt = num_virtual_tokens if self.backbone.is_encoder_decoder else 0
        if self.scored(task):
            return prompt + longest
        return prompt + self.num_beams * (self.max_new_tokens or longest)

    def on_fit_start(self) -> None:
        """Look at all rows that the fit and its test will run, before anything is computed."""
        self._tell_of_rows("train", "dev", "test")

    def _tell_of_rows(self, *splits: SplitName) -> None:
        """Warn of what :meth:`look_at_rows` finds, once for a split; all processes call it."""
        if self._seen_splits.issuperset(splits):
            return
        self._seen_splits.update(splits)
        for said in self.shares.gather(self.look_at_rows(self.datamodule, *splits)):
            self.warn_once(said, said)

    def look_at_rows(self, data: CrossFitDataModule, *splits: SplitName) -> list[str]:
        """What the model will not see, or cannot tell apart, of the rows of this process's runs.

        A sentence each for inputs that are cut, labels of equal tokens, references longer than the
        answers that are generated, and test rows that will be refused. Test rows are only measured.

        Raises:
            ValueError: rows of train or dev that do not fit the backbone's positions, inputs
                without tokens, or a task all of whose labels have the same tokens.
        """
        told: list[str] = []
        keys = [(task, sample) for task in data.tasks for sample in data.samples]
        if self.shares.divided:
            keys = list(dict.fromkeys((run.task, run.sample) for run in self.runs))
        for task in dict.fromkeys(task for task, _ in keys):
            told += self._look_alikes(data.tasks[task])
        cut: dict[str, tuple[int, int]] = {}
        too_long: dict[tuple[str, int], dict[str, str]] = {}
        for task, sample in keys:
            longest = self.longest_generated(data, task, sample)
            for split in splits:
                rows = data.rows(task, sample, split, keep=split != "test")
                name = f"{task} {split}"
                known = cut.get(name, (0, 0))
                cut[name] = known[0] + rows.cut, known[1] + len(rows)
                try:
                    self.check_lengths([rows], self.num_virtual_tokens)
                except ValueError as error:
                    if split != "test":
                        raise
                    told.append(f"test rows will be refused: {error}")
                lost = 0 if longest is None else sum(n > longest for n in rows.shortest_targets)
                if lost:
                    known_lost = too_long.setdefault((task, longest or 0), {})
                    known_lost[split] = f"{split} {lost} of {len(rows)}"
        why = "" if self.max_new_tokens else ", the longest answer of train and dev"
        told += [
            f"task {task}: rows all of whose references are longer than the {longest} tokens that "
            f"are generated (model.max_new_tokens{why}), so that no answer can match in full: "
            f"{', '.join(lost.values())}"
            for (task, longest), lost in too_long.items()
        ]
        found = [f"{name} {some_} of {of}" for name, (some_, of) in cut.items() if some_]
        if found:
            end = "end" if data.truncation_side == "right" else "beginning"
            told.append(
                f"inputs of over {data.max_input_length} tokens lose their {end} "
                f"(data.max_input_length, data.truncation_side): {'; '.join(found)}"
            )
        return list(dict.fromkeys(told))

    def _look_alikes(self, task: Task) -> list[str]:
        """A sentence about labels that have the same tokens; refuses a task of no other labels."""
        assert self.backbone is not None
        told, labels = [], task.labels or ()
        if len({label.lower() for label in labels}) < len(labels):
            told = [f"task {task.name}: some labels differ by case alone: {', '.join(labels)}"]
        alike = self.backbone.look_alikes(labels)
        if not alike:
            return told
        groups = "; ".join(", ".join(map(repr, group)) for group in alike)
        if len(alike[0]) == len(labels):
            raise ValueError(
                f"task {task.name}: all labels have the same tokens for backbone "
                f"{self.backbone.name!r} ({groups}), so that nothing can be learned: take a "
                "backbone whose tokenizer knows them, or other words for the labels"
            )
        return [
            *told,
            f"task {task.name}: labels with the same tokens for backbone {self.backbone.name!r}, "
            f"of which the first is always answered: {groups}",
        ]

    def longest_generated(self, data: CrossFitDataModule, task: str, sample: int) -> int | None:
        """Most tokens of a generated answer; None where answers are chosen by score."""
        if self.scored(data.tasks[task]):
            return None
        return self.max_new_tokens or data.longest_answer(task, sample)

    def check_lengths(self, rows: Iterable[Rows], num_virtual_tokens: int) -> None:
        """Refuse rows that do not fit the backbone's positions, before anything is computed.

        Raises:
            ValueError: naming the task, the lengths and what to lower.
        """
        assert self.backbone is not None
        positions = self.backbone.max_positions
        if positions is None:
            return
        for part in rows:
            made = 0 if self.scored(part.task) else self.max_new_tokens or 0
            answer = max(part.longest_target, made)
            longest = max(map(len, part.inputs))
            after = 0 if self.backbone.is_encoder_decoder else answer
            if max(num_virtual_tokens + longest + after, answer) > positions:
                raise ValueError(
                    f"task {part.task.name}: {num_virtual_tokens} virtual tokens, inputs of up to "
                    f"{longest} tokens and answers of up to {answer} do not fit the {positions} "
                    f"positions of backbone {self.backbone.name!r}: lower data.max_input_length, "
                    "model.num_virtual_tokens or model.max_new_tokens"
                )

    # ---- steps ----------------------------------------------------------------------------------

    def check_budget(self) -> None:
        """Refuse a budget that is missing, or whose last step would not be evaluated.

        Raises:
            ValueError: naming both settings.
        """
        steps, interval = self.trainer.max_steps, self.trainer.val_check_interval
        if steps < 1:
            raise ValueError("trainer.max_steps is not set: give the number of optimizer steps")
        if steps % self.steps_between_evaluations:
            raise ValueError(
                f"trainer.max_steps {steps} is not a multiple of trainer.val_check_interval "
                f"{interval}, so the last steps would not be evaluated: change one of them"
            )

    @property
    def steps_between_evaluations(self) -> int:
        """The interval of evaluations in steps; as a share it is one of the whole budget."""
        steps, interval = self.trainer.max_steps, self.trainer.val_check_interval
        return interval if isinstance(interval, int) else max(1, int(steps * interval))

    def evaluation_steps(self, split: SplitName, live: Callable[[], list[int]]) -> EvaluationSteps:
        """Evaluation batches on one split."""
        rows = self.datamodule.rows_of(self.runs, split)
        self._tell_of_rows(split)
        self.check_lengths(rows.values(), self.num_virtual_tokens)
        return self.datamodule.evaluation_steps(
            self.runs,
            split,
            self.tokens_per_forward,
            lambda task, longest: self.tokens_beside_input(self.num_virtual_tokens, task, longest),
            live,
            *self.row_share,
        )

    def bank_gradient(
        self, bank: Tensor, batch: Batch, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """Losses (R,) and gradient (R, N, D); micro-batches are halved when memory runs out."""
        backbone = self.backbone
        assert backbone is not None
        return self.within_memory(
            batch,
            lambda tokens: bank_gradient(backbone, bank, batch, tokens, label_smoothing),
        )

    def within_memory(self, batch: Batch, step: Callable[[int], Made]) -> Made:
        """What ``step`` makes, given the tokens of a forward pass; fewer when memory runs out."""
        while True:
            try:
                return step(self.tokens_per_forward)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._halve_tokens_per_forward(batch)  # here the failed step's tensors are gone

    def _halve_tokens_per_forward(self, batch: Batch) -> None:
        """Let micro-batches be smaller from here on.

        Raises:
            ValueError: they hold one row each already.
        """
        lengths = zip(batch.input_lengths, batch.target_lengths, strict=True)
        if self.tokens_per_forward <= max(map(sum, lengths)):
            raise ValueError(
                "memory runs out with a single row in a forward pass: use a smaller "
                "data.max_input_length or model.num_virtual_tokens, model.backbone.dtype bfloat16 "
                "or model.backbone.gradient_checkpointing true"
            )
        self._tokens_per_forward = self.tokens_per_forward // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rank_zero_warn(
            f"memory ran out: model.tokens_per_forward is {self.tokens_per_forward} from step "
            f"{self.trainer.global_step} on; give that to start with it"
        )

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Answer a batch of dev rows."""
        self.evaluation.add(batch)

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Answer a batch of test rows."""
        self.evaluation.add(batch)

    def on_test_epoch_end(self) -> None:
        """Score test, and write results, predictions and, where there are any, prompts."""
        self.evaluation.report(self.evaluation.scores(), "test")

    # ---- identity, warnings ---------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        """Where everything of this fit lands."""
        return Path(self.trainer.default_root_dir)

    def digests(self) -> dict[str, Any]:
        """Digests of what a fit reads: backbone weights, tokenizer, data files; no path is in it.

        All processes call it.
        """
        assert self.backbone is not None
        files = {
            f"{task}/{sample}/{name}": split.digest
            for (task, sample), splits in self.datamodule.splits.items()
            for name, split in splits.items()
        }
        return {
            "backbone": self.backbone.digest,
            "tokenizer": self.backbone.tokenizer_digest,
            "data": files,
        }

    def settings(self) -> dict[str, Any]:
        """What can change a number, by the names of the flags; instead of paths see `digests`.

        Of the trainer those of the fit, also in a later test by another trainer.
        """
        data = self.datamodule
        given = {k: v for k, v in self.hparams.items() if not k.startswith("_")}
        for name in given:  # a dict that leaves out fields stands for their defaults
            own = getattr(self, f"{name}_config", getattr(self, name, None))
            given[name] = plain(own) if is_dataclass(own) else given[name]
        found = {f"model.{k}": v for k, v in flag_names(given).items()}
        found |= {f"data.{name}": getattr(data, name) for name in DATA_SETTINGS}
        found["data.tasks"] = list(data.tasks)
        found["data.shots"] = [task.shots for task in data.tasks.values()]
        own = self._trainer_settings()
        if self.trainer.state.fn != "fit" and self.trains:
            own = self.fit_record().get("trainer", own)
        found |= {f"trainer.{k}": v for k, v in own.items() if self.trains}
        found["test.precision"] = self.trainer.precision
        found["test.limit_test_batches"] = self.trainer.limit_test_batches
        return {name: found[name] for name in sorted(found) if name not in NO_NUMBER}

    def unusual(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Those of the settings that are not at their defaults, and the trainer's."""
        kinds = {"model": type(self), "data": type(self.datamodule)}
        usual = {}
        for group, kind in kinds.items():
            known = inspect.signature(kind.__init__).parameters
            defaults = {name: plain(parameter.default) for name, parameter in known.items()}
            usual |= {f"{group}.{k}": v for k, v in flag_names(defaults).items()}
        usual["test.limit_test_batches"] = 1.0
        return {k: v for k, v in settings.items() if k not in usual or plain(v) != usual[k]}

    def _trainer_settings(self) -> dict[str, Any]:
        """The trainer's settings that can change what is trained."""
        return {name: getattr(self.trainer, name) for name in TRAINER_SETTINGS}

    def fit_record(self) -> dict[str, Any]:
        """What the fit of the run's folder kept for tests to come; empty where there is none."""
        file = self.run_dir / FIT_RECORD
        return json.loads(file.read_text()) if file.is_file() else {}

    def on_fit_end(self) -> None:
        """Record the trainer's settings, and what the fit read, for tests to come."""
        record = {"trainer": self._trainer_settings(), "digests": self.digests()}
        if self.trainer.is_global_zero:
            text = json.dumps(record, indent=1)
            write_atomically(self.run_dir / FIT_RECORD, text.encode())

    def identity(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """A name for this fit, its settings and the digests of what it read.

        Equal settings, weights and data give equal names, whoever runs it and wherever its files
        lie. All processes call it.
        """
        settings, digests = self.settings(), self.digests()
        identity = {"method": type(self).__name__, "settings": settings, "digests": digests}
        identity["runs"] = [run.name for run in self.all_runs]
        text = json.dumps(identity, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12], settings, digests

    def warn_once(self, key: str, message: str) -> None:
        """Warn about one thing once per fit."""
        if key not in self._warned:
            self._warned.add(key)
            rank_zero_warn(message)

    def stored_prompt(
        self, run: Run, prompt: Tensor, init: Tensor, dev: float, test: float | None, **facts: Any
    ) -> Prompt:
        """A run's prompt with all that its file says.

        Args:
            run: what the prompt is of.
            prompt: (N, D).
            init: (N, D) what it was trained from.
            dev: dev score that chose it; NaN or infinite where there is none.
            test: test score.
            facts: further fields of :class:`Prompt`, and those that differ from the run's.
        """
        from prompt_lab import __version__

        assert self.backbone is not None
        fields = {
            "name": run.name,
            "backbone": self.backbone.name,
            "backbone_digest": self.backbone.digest,
            "tokenizer_digest": self.backbone.tokenizer_digest,
            "task": run.task,
            "sample": run.sample,
            "init_seed": run.init_seed,
            "learning_rate": run.learning_rate,
            "batch_size": run.batch_size,
            "dev_score": dev if math.isfinite(dev) else None,
            "test_score": test,
            "metric": self.datamodule.tasks[run.task].metric,
            "status": "finished",
            "seconds": round(self.seconds.item(), 3),
            "run": self.all_runs.index(run),
            "version": __version__,
            **self.way_of_answering(run.task, run.sample),
        }
        kept = {"prompt": prompt.detach().cpu(), "init": init.detach().cpu()}
        return Prompt(**kept, **(fields | facts))

    # ---- checkpoints ----------------------------------------------------------------------------

    def check_backbone_of(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume on other weights.

        Raises:
            ValueError: naming both sides.
        """
        assert self.backbone is not None
        weights = checkpoint.get("backbone_digest", "")
        if weights != self.backbone.digest:
            raise ValueError(
                f"the checkpoint is of a backbone with other weights ({weights[:12]}) than "
                f"{self.backbone.name!r} has ({self.backbone.digest[:12]}): resume with the "
                "backbone of the fit"
            )

    def simplify_settings(self) -> None:
        """Make the saved constructor arguments plain values, which checkpoints can hold."""
        for name in list(self.hparams):
            self.hparams[name] = plain(self.hparams[name])

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The state without the frozen backbone."""
        state = super().state_dict(*args, **kwargs)
        for name in [name for name in state if name.startswith(self.frozen)]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load everything but the backbone, which must not be there.

        Raises:
            ValueError: anything else is missing or left over, or has another shape.
        """
        for name, own in self.state_dict().items():
            given = state_dict.get(name, own)
            if given.shape != own.shape:
                raise ValueError(
                    f"the checkpoint does not fit: {name} has shape {tuple(given.shape)} there and "
                    f"{tuple(own.shape)} here; resume with the settings and the data of the fit"
                )
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in result.missing_keys if not name.startswith(self.frozen)]
        if strict and (missing or result.unexpected_keys):
            raise ValueError(
                f"the checkpoint does not fit: missing {missing}, unexpected "
                f"{result.unexpected_keys}; was it made with other settings or by another method?"
            )
        return type(result)(missing, result.unexpected_keys)


def refuse_strategy(name: str) -> NoReturn:
    """Refuse a strategy that splits the backbone over devices (FSDP, DeepSpeed, tensor parallel).

    Each of its layers would wait for all processes, but those run different rows in different
    numbers of forward passes; some have none.

    Raises:
        ValueError: what to use instead.
    """
    raise ValueError(
        f"trainer.strategy {name} splits the backbone over devices, whose layers then wait for "
        "each other, while here every process runs rows or runs of its own: use ddp. For a "
        "backbone that is too large for a device use model.backbone.dtype bfloat16, "
        "model.backbone.gradient_checkpointing true and a smaller model.tokens_per_forward"
    )


def flag_names(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under the names of their flags: ``{"model.optim.name": "adamw", ...}``.

    A class becomes its short name under the key itself, its arguments ``key.argument``.
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "class_path" in value:
            flat[name] = value["class_path"].rsplit(".", 1)[-1]
            flat |= flag_names(value.get("init_args") or {}, f"{name}.")
        elif isinstance(value, dict):
            flat |= flag_names(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def as_config(kind: Any, value: Any) -> Any:
    """A dataclass from itself or from the dict that a checkpoint keeps of it."""
    return kind(**value) if isinstance(value, dict) else value


def plain(value: Any) -> Any:
    """Dataclasses and namespaces as dicts and lists of simple values, fit for a checkpoint."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def some(names: list[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
