"""``PromptMethod``: the life cycle that all methods share.

A method says what is trained, what the best evaluation keeps (``kept``) and what a checkpoint must
agree in (``identity``). Here stand, once: loading the backbone, making what is trained when data or
a checkpoint bring the runs, the clock, keeping the best, patience, answers, files, and checkpoints
without the backbone.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from prompt_lab.core.backbone import Backbone, Prefix
from prompt_lab.core.bank import Prefixes, bank_gradient, is_out_of_memory, renumber
from prompt_lab.core.batch import Batch, default_tokens_per_forward
from prompt_lab.core.candidates import LabelScore, check_label_score
from prompt_lab.core.optim import OptimConfig
from prompt_lab.core.pretrained import tensor_digest
from prompt_lab.core.run import Run
from prompt_lab.core.text import some
from prompt_lab.data.datamodule import PromptDataModule
from prompt_lab.data.files import SplitName
from prompt_lab.data.sampling import Draw, EvaluationBatch, Key, Progress, Rows, bank_draw
from prompt_lab.data.tasks import Task
from prompt_lab.files.prompts import Prompt, PromptStore, source_prompts
from prompt_lab.files.results import Start, summary_table
from prompt_lab.files.tensors import write_atomically
from prompt_lab.methods.checkpoints import change_runs, check_identity, fill_checkpoint, kind_of
from prompt_lab.methods.checks import check_settings, check_trainer
from prompt_lab.methods.configs import BackboneConfig, as_config, plain
from prompt_lab.methods.evaluation import Evaluation, Report, Way, answers
from prompt_lab.methods.identity import trainer_settings
from prompt_lab.methods.keeper import Keeper
from prompt_lab.methods.logs import begin_curves, log_evaluation, log_rates, log_settings
from prompt_lab.methods.look import check_lengths, look_at_rows
from prompt_lab.methods.sharing import RunShares, left_out_of_ddp, share_runs
from prompt_lab.methods.starts import InitConfig, initial_prompts

Made = TypeVar("Made")

TRAINING, STOPPED, FAILED, FINISHED = range(4)
STATUS = ("training", "stopped early", "failed: loss not finite", "finished")

FIT_RECORD = "fit.json"
"""The file of a run's folder that keeps what a test cannot know of its fit."""


class PromptMethod(LightningModule):
    """Parent of the methods; trains R runs on a frozen backbone, and answers under the best.

    ``trainer.max_steps`` is the budget and ``trainer.val_check_interval`` the number of steps
    between evaluations on dev; the last step is always evaluated.

    Args:
        backbone: which frozen model.
        tokens_per_forward: most padded tokens of one forward pass; bounds memory, not results; null
            for 2048 on a CPU and 16384 on a GPU.
        decoding: ``score`` chooses among the labels of tasks that have them by log-likelihood, and
            generates other answers; ``generate`` generates all answers.
        num_beams: beams of generated answers; 1 is greedy.
        max_new_tokens: longest generated answer; null for the longest answer in train and dev.
        metric_variant: ``crossfit`` computes metrics as CrossFit does, ``corrected`` without traps.
        num_virtual_tokens: N, the rows of a prompt.
        label_smoothing: share of each target's probability spread over the vocabulary.
        dev_loss: also log the mean loss on dev at each evaluation, as ``dev/loss``.
        label_score: what the score of a label is: the ``sum`` of the log-likelihoods of its tokens,
            end token included, or their ``mean``, which does not favour short labels.

    Attributes:
        runs: what each prompt of the bank is for; empty before data or a checkpoint bring them.
            Where processes share whole runs, those of this process; ``all_runs`` are everyone's.
        evaluated: places of the runs that an evaluation answers for.
        keeper: the best of each run, or of all together where ``joint``.
    """

    init: Tensor  # (R, N, D) the prompts that the runs start from; `starts` says what these are
    sources: Tensor  # (J, N, D) the tuned prompts that a fit builds on, of `source_keys`
    status: Tensor  # (R,) how each run stands, an index of STATUS
    active: Tensor  # (R,) runs that may move; the optimizer reads it
    loss_sum: Tensor
    loss_steps: Tensor
    keeper: Keeper
    anchor: torch.nn.Parameter
    joint: bool = False  # whether runs train something together: one score chooses for all
    shares_runs: bool = False  # whether processes may divide whole runs among them
    test_baselines: bool = False  # whether test also scores no prompt and other baselines
    prompt_baselines: tuple[str, ...] = ("no_prompt", "initial_prompt")
    guess_baselines: bool = True
    trains_a_bank: bool = True  # whether several runs train side by side, each with its own clip
    stores_prompts: bool = True  # whether there are prompts to keep as files, and in which folder
    prompt_folder: str = "prompts"
    trains: bool = True  # whether there is a fit
    frozen: tuple[str, ...] = ("backbone.", "subspace.")  # weights that no checkpoint holds
    fixed: tuple[str, ...] = ()  # arguments of its parents that a class sets itself
    prompts_at_once: int | None = None  # most that an evaluation holds side by side; None for all
    patience: int | None = None
    clip: float | None = None  # largest gradient norm over all that is trained together
    init_config: InitConfig | None = None
    optim_config: OptimConfig | None = None
    folders: Sequence[str] = ()
    source_digest: str | None = None

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008
        tokens_per_forward: int | None = None,
        decoding: Literal["score", "generate"] = "score",
        num_beams: int = 1,
        max_new_tokens: int | None = None,
        metric_variant: Literal["crossfit", "corrected"] = "crossfit",
        num_virtual_tokens: int = 100,
        label_smoothing: float = 0.0,
        dev_loss: bool = False,
        label_score: LabelScore = "sum",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        for name in [*self.hparams]:
            if name in self.fixed:
                del self.hparams[name]
            else:  # plain values, which checkpoints can hold
                self.hparams[name] = plain(self.hparams[name])
        check_settings(self.hparams)
        check_label_score(label_score, decoding == "generate", "model.")
        self.backbone_config = as_config(BackboneConfig, backbone)
        self._tokens_per_forward = tokens_per_forward
        self.decoding, self.num_beams = decoding, num_beams
        self.max_new_tokens, self.metric_variant = max_new_tokens, metric_variant
        self.num_virtual_tokens, self.label_smoothing = num_virtual_tokens, label_smoothing
        self.dev_loss = dev_loss
        self.label_score: LabelScore = label_score
        self.backbone: Backbone = None  # pyright: ignore - set up before anything needs it
        self.runs: list[Run] = []
        self.all_runs: list[Run] = []
        self.starts: list[Start] = []
        self.evaluated: list[int] = []
        self.source_names: list[str] = []
        self.shares = RunShares([[]])
        self.progress = Progress()
        self.seconds = 0.0
        self.is_built = False
        self._run_dir: Path | None = None
        self._named_run_dir: Path | None = None
        self._fit_record: dict[str, Any] = {}
        self._warned: set[str] = set()
        self._seen_splits: set[SplitName] = set()
        self._start_scores: list[float] = []
        self._evaluated_at = -1

    @property
    def best(self) -> Tensor:
        """The best prompts, (R, N, D)."""
        return self.keeper["bank"]

    # ---- what a method says ---------------------------------------------------------------------

    def make_runs(self, data: PromptDataModule) -> list[Run]:
        """The runs that settings and data ask for."""
        raise NotImplementedError

    def build(self, backbone: Backbone, runs: Sequence[Run]) -> None:
        """Make parameters and buffers, from runs and shapes alone, on the CPU."""
        raise NotImplementedError

    def start(self, data: PromptDataModule) -> None:
        """Put what is trained where a new fit starts, with ``init`` and ``starts``."""

    def bank(self) -> Tensor:
        """The prompts (R, N, D) that are scored now, with gradient to what is trained."""
        raise NotImplementedError

    def kept(self) -> dict[str, Tensor]:
        """What the best evaluation keeps; ``bank`` is what answers later."""
        return {"bank": self.bank()}

    def source_keys(self) -> list[Key]:
        """The tasks, each with its sample, whose tuned prompts a fit builds on."""
        return []

    def draw(self, data: PromptDataModule) -> Draw:
        """What a training batch holds; here each run reads its own rows."""
        return bank_draw(
            self.runs, self.train_rows(data), data.order_seed, data.layout, self.row_share
        )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in, beside the backbone's weights and the runs."""
        if not self.source_keys():
            return {}
        digest = {"digest of source prompts": self.source_digest} if self.source_digest else {}
        return {"source_prompts": self.source_names, **digest}

    def curve(self) -> dict[str, list[Any]]:
        """Further columns of ``curves.csv``, a value for each run; here how far prompts moved."""
        return {"moved": self.moved()}

    def logged(self, scores: Tensor) -> dict[str, float]:
        """Further numbers that an evaluation logs."""
        return {}

    def write(self) -> None:
        """Write the best prompts, and what else the fit leaves, into ``run_dir``."""
        self.save_prompts(self.store, self.best_prompts())

    def restore(self) -> None:
        """Read the best from ``run_dir``, where neither a fit nor a checkpoint has filled it."""
        keeper, store = self.keeper, self.store
        for i, saved in enumerate(store.load([run.name for run in self.runs], self.backbone)):
            self.check_shape(saved, store.path(saved.name))
            keeper["bank"][i], self.init[i] = saved.prompt, saved.init
            self.starts[i] = saved.start_fields
            if saved.code is not None:
                keeper.add("code", saved.code.new_zeros(len(self.runs), len(saved.code)))
                keeper["code"][i] = saved.code
            unit = 0 if self.joint else i
            keeper.restore(unit, saved.steps, saved.dev_score)
            keeper.dev[i] = torch.nan if saved.dev_score is None else saved.dev_score
            if saved.status in STATUS:
                self.status[unit] = STATUS.index(saved.status)
            self.seconds = saved.seconds or 0.0

    def check_shape(self, saved: Prompt, file: Path) -> None:
        """Refuse a prompt of another shape than the settings'."""
        here, there = tuple(self.init.shape[1:]), tuple(saved.prompt.shape)
        if here != there:
            raise ValueError(
                f"{file} has shape {there}, the config asks for {here}: use the config of the fit"
            )

    def best_prompts(self, test_scores: Tensor | None = None) -> Iterable[Prompt]:
        """The prompt of every run in ``evaluated`` that ``test`` scores, ready to be stored."""
        dev, made = self.keeper.dev.tolist(), self.best
        test = [None] * len(dev) if test_scores is None else test_scores.tolist()
        facts = self.prompt_facts()
        return [
            self.stored_prompt(self.runs[i], made[i], self.init[i], dev[i], test[i], **facts[i])
            for i in self.evaluated
        ]

    def prompt_facts(self) -> list[dict[str, Any]]:
        """What the file of each run's prompt says besides, or instead."""
        each = len(self.runs) // max(1, len(self.status))  # runs of a unit
        units = zip(self.keeper.step.tolist(), self.status.tolist(), strict=True)
        known = [{"steps": step, "status": STATUS[status]} for step, status in units]
        return [asdict(start) | known[i // each] for i, start in enumerate(self.starts)]

    def result_facts(self, run: int) -> dict[str, Any]:
        """What the results say of how a run was trained, beside or instead of its prompt's word."""
        raise NotImplementedError

    def summary(self) -> str:
        """What is trained, in a few words."""
        return f"{len(self.all_runs)} runs of {self.num_virtual_tokens} virtual tokens"

    def score_table(self, rows: list[dict[str, Any]]) -> str:
        """The table that an evaluation prints, from its lines of results."""
        return summary_table(rows)

    def held(self) -> dict[str, int]:
        """Bytes that a fit holds beside activations, by what they are of."""
        weights = sum(weight.nbytes for weight in self.backbone.parameters())
        trained = sum(p.nbytes for p in self.parameters() if p.requires_grad)
        moments = 2 if self.optim_config is None or self.optim_config.name == "adamw" else 0
        return {
            "weights": weights,
            "trained with gradient and best copy": 3 * trained,
            "optimizer": moments * trained,
        }

    # ---- the Trainer's set-up -------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self.check_trainer()
        self._run_dir = self._find_run_dir()
        self.backbone = self.load_backbone()
        self.datamodule.connect(self.backbone)

    def configure_model(self) -> None:
        if self._trainer is None or self.backbone is None:
            return
        self.check_trainer()  # some callbacks call this before setup
        data, fitting = self.datamodule, self._fitting
        with torch.device("cpu"):  # not on the GPU that Lightning makes tensors on here
            self.take(data, fitting)
        if fitting:
            check_lengths(self, data, "train", "dev")
        data.feed(
            self.progress,
            self.draw(data) if fitting else None,
            lambda: self.progress.live if fitting else self.evaluated,
            runs=self.runs,
            tokens_per_forward=self.tokens_per_forward,
            extra_per_row=self.tokens_beside_input,
            share=self.row_share,
            block=self.prompts_at_once,
        )

    def take(self, data: PromptDataModule, fitting: bool = True) -> None:
        """Take the runs that settings and data ask for, and make what they train, once.

        A fit on other data than before takes fresh runs. An evaluation is of those runs that the
        data have rows of.

        Raises:
            ValueError: an evaluation of tasks that no run was trained for.
        """
        asked = self.make_runs(data)
        if fitting and self.is_built and asked != self.all_runs:
            rank_zero_info(f"other data than before: {len(asked)} fresh runs")
            self.is_built = False
        if not self.is_built:
            self._build(asked, data)
            if fitting:
                self.read_sources()
            if fitting and not self.trainer.ckpt_path:
                self.start(data)
                self.keeper.keep(torch.ones_like(self.status, dtype=torch.bool), self.kept())
        self.evaluated = list(range(len(self.runs)))
        if fitting:
            self.progress.live = self.evaluated_in_fit()
            return
        own, known = (
            list(dict.fromkeys(f"{r.task} (sample {r.sample})" for r in runs))
            for runs in (asked, self.all_runs)
        )
        if strange := [name for name in own if name not in known]:
            raise ValueError(
                f"no run was trained for {some(strange)}; there are runs for {some(known)}: test "
                "the tasks of the fit, or fit these"
            )
        keys = {(run.task, run.sample) for run in asked}
        self.evaluated = [i for i, r in enumerate(self.runs) if (r.task, r.sample) in keys]

    def initial_prompts(
        self, data: PromptDataModule, runs: Sequence[Run]
    ) -> tuple[Tensor, list[Start]]:
        """The prompts (R, N, D) that runs start from, by ``init_config``, and whence they are."""
        assert self.init_config is not None
        size = self.num_virtual_tokens
        return initial_prompts(self.init_config, self.backbone, runs, data.tasks, size, data.frame)

    def read_sources(self) -> None:
        """Read the tuned prompts that a fit builds on; errors as :func:`source_prompts`."""
        if keys := self.source_keys():
            found = source_prompts(self.folders, keys, self.backbone, self.num_virtual_tokens)
            self.source_names = [prompt.name for prompt in found]
            self.sources.copy_(torch.stack([prompt.prompt for prompt in found]))
            self.source_digest = tensor_digest(self.sources)

    def _build(self, runs: list[Run], data: PromptDataModule | None) -> None:
        trainer, self.all_runs = self._trainer, list(runs)
        world = 1 if trainer is None else trainer.world_size
        self.shares = RunShares([list(range(len(runs)))])
        if trainer and data is not None and self.shares_runs and 1 < world <= len(runs):
            length = {}  # a step of a run costs about what its rows are long
            for key, splits in data.splits.items():
                inputs = splits["train"].inputs
                length[key] = 1 + sum(map(len, inputs)) / max(1, len(inputs))
            costs = [run.batch_size * length[run.task, run.sample] for run in runs]
            self.shares = RunShares(share_runs(costs, world), trainer.global_rank)
        self.runs = [runs[place] for place in self.shares.own]
        self.starts = [Start("")] * len(self.runs)
        self.build(self.backbone, self.runs)
        units = len(self.kept_units())
        self.register_buffer("status", torch.full((units,), TRAINING, dtype=torch.long))
        self.register_buffer("active", torch.ones(units, dtype=torch.bool))
        self.register_buffer("loss_sum", torch.zeros(len(self.line_names())))
        self.register_buffer("loss_steps", torch.zeros((), dtype=torch.long))
        self.keeper = Keeper(units, len(self.runs), self.kept())
        self.is_built = True
        self.progress.live = self.evaluated_in_fit()
        self._ddp_params_and_buffers_to_ignore = left_out_of_ddp(self)

    def evaluated_in_fit(self) -> list[int]:
        """Places of the runs that a fit evaluates at first."""
        return list(range(len(self.runs)))

    def line_names(self) -> list[str]:
        """What has a line of its own in ``curves.csv``, and a loss of its own."""
        return [run.name for run in self.runs]

    def kept_units(self) -> list[str]:
        """Names of what is chosen by one score: the runs, or all of them together."""
        return ["all"] if self.joint else [run.name for run in self.runs]

    def train_rows(self, data: PromptDataModule) -> dict[Key, Rows]:
        """The training rows of the runs' tasks and samples."""
        keys = dict.fromkeys((run.task, run.sample) for run in self.runs)
        return {key: data.tokens(*key, "train") for key in keys}

    def look(self, data: PromptDataModule, trainer: Trainer) -> None:
        """Make what a fit would train, for a look at it before training."""
        self.trainer = trainer
        setattr(trainer, "datamodule", data)  # noqa: B010 - Lightning makes the attribute later
        self.backbone = self.load_backbone()
        data.connect(self.backbone)
        self.take(data)
        self.to(trainer.strategy.root_device)

    def load_backbone(self) -> Backbone:
        """The backbone, loaded once."""
        return self.backbone or self.backbone_config.load()

    @property
    def datamodule(self) -> PromptDataModule:
        """The trainer's data."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PromptDataModule):
            raise ValueError(
                f"{type(self).__name__} draws the rows of each run itself: pass datamodule= a "
                "CrossFitDataModule, a RowsDataModule or another PromptDataModule to the trainer"
            )
        return data

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but leave float64 where it is if the device has none, as Apple's."""

        def moved(tensor: Tensor) -> Tensor:
            if tensor.dtype != torch.float64:
                return fn(tensor)
            there = fn(torch.empty(0, dtype=torch.float32, device=tensor.device))
            return tensor if there.device.type == "mps" else fn(tensor)

        return super()._apply(moved, recurse)

    @property
    def tokens_per_forward(self) -> int:
        """Most padded tokens of one forward pass."""
        trainer = self._trainer
        device = self.device if trainer is None else trainer.strategy.root_device
        return self._tokens_per_forward or default_tokens_per_forward(device)

    @property
    def run_dir(self) -> Path | None:
        """Where the outputs go; None where nothing is written (``fast_dev_run``).

        By default the folder of a CSV or TensorBoard logger, else
        ``<default_root_dir>/prompt_lab_runs/<time>``. Set it to name another.
        """
        if getattr(self._trainer, "fast_dev_run", False):
            return None
        return self._run_dir or self._named_run_dir

    @run_dir.setter
    def run_dir(self, folder: str | Path) -> None:
        self._named_run_dir = Path(folder)

    @property
    def store(self) -> PromptStore:
        """The runs' prompts in the run's folder."""
        return PromptStore(self.file(self.prompt_folder))

    def file(self, name: str) -> Path:
        """A file or folder of the run's folder."""
        assert self.run_dir is not None
        return self.run_dir / name

    def _find_run_dir(self) -> Path | None:
        trainer = self.trainer
        if getattr(trainer, "fast_dev_run", False) or self._named_run_dir is not None:
            return self._named_run_dir
        logs = [x for x in trainer.loggers if isinstance(x, (CSVLogger, TensorBoardLogger))]
        if logs:
            return Path(trainer.strategy.broadcast(str(logs[0].log_dir)))
        name = f"{trainer.default_root_dir}/prompt_lab_runs/{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path(trainer.strategy.broadcast(name))
        rank_zero_info(f"outputs go to {folder}")
        return folder

    def check_trainer(self) -> None:
        """Refuse (``ValueError``) a trainer under which the fit would not be what it says."""
        check_trainer(self)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the fit, at which schedules end."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError("the fit has no end: give trainer.max_steps or trainer.max_epochs")
        return int(steps)

    # ---- processes ------------------------------------------------------------------------------

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

    # ---- answers --------------------------------------------------------------------------------

    def way(self, task: Task) -> Way:
        """How answers to a task are made."""
        scored = self.decoding == "score" and task.labels is not None
        labels, frame = list(task.labels or ()) if scored else None, self.datamodule.frame
        return Way(labels, self.max_new_tokens, self.num_beams, self.label_score, frame)

    def way_of_answering(self, task: str, sample: int) -> dict[str, Any]:
        """How answers to a task are made, as prompt files keep it for ``prompt-lab predict``."""
        data = self.datamodule
        way = self.way(data.tasks[task])
        return {
            "decoding": "generate" if way.labels is None else "score",
            "labels": way.labels,
            "max_new_tokens": way.max_new_tokens or data.longest_answer(task, sample),
            "truncation_side": data.truncation_side,
            "num_beams": self.num_beams,
            "max_input_length": data.max_input_length,
            "task_prefix": data.task_prefix,
            "label_score": self.label_score,
            "template": data.template,
            "system": data.system,
        }

    def prefix_of(self, prefixes: Prefixes, batch: Batch) -> tuple[Prefix, Batch]:
        """What the rows of a batch need of their prompts, and the rows numbered by its order."""
        used = sorted(set(batch.prompts))
        return prefixes.of(used, batch.front), renumber(batch, used)

    def answer(self, prefixes: Prefixes, step: EvaluationBatch) -> list[str]:
        """One answer per row of an evaluation batch, under the prompts that the rows name."""
        way = self.way(self.datamodule.tasks[step.task])
        return answers(self.backbone, lambda batch: self.prefix_of(prefixes, batch), step, way)

    def answer_all(
        self, split: SplitName, chosen: list[int], prefixes: Prefixes, keep: bool = True
    ) -> Evaluation:
        """An evaluation of some runs outside Lightning's loop, in the trainer's precision."""
        made = Evaluation(self, split)
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for step in self.datamodule.evaluation_steps(split, lambda: chosen):
                step = step.to(self.device)
                made.add(step, self.answer(prefixes, step), keep)
        return made

    def tokens_beside_input(self, task: Task, longest: int) -> int:
        """Tokens that an evaluated row costs besides its input, for cutting batches."""
        prompt = self.num_virtual_tokens if self.backbone.is_encoder_decoder else 0
        if self.way(task).labels is not None:
            return prompt + longest
        return prompt + self.num_beams * (self.max_new_tokens or longest)

    # ---- a look at the rows ---------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self._is_written = False
        self._tell_of_rows("train", "dev", "test")
        log_settings(self)

    def _tell_of_rows(self, *splits: SplitName) -> None:  # all processes call it
        if not self._seen_splits.issuperset(splits):
            self._seen_splits.update(splits)
            for said in self.shares.gather(look_at_rows(self, self.datamodule, *splits)):
                self.warn_once(said, said)

    # ---- training -------------------------------------------------------------------------------

    def configure_gradient_clipping(self, optimizer: Any, *given: Any, **named: Any) -> None:
        if self.clip is None:
            super().configure_gradient_clipping(optimizer, *given, **named)
        else:  # not Lightning's clipping, which refuses fused optimizers under bf16-mixed
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.clip)

    def bank_gradient(self, bank: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses (R,) and gradient (R, N, D); micro-batches are halved when memory runs out."""
        of, smoothing = self.backbone, self.label_smoothing
        return self.within_memory(batch, lambda n: bank_gradient(of, bank, batch, n, smoothing))

    def within_memory(self, batch: Batch, step: Callable[[int], Made]) -> Made:
        """What ``step`` makes, given the tokens of a forward pass; fewer when memory runs out."""
        while True:
            try:
                return step(self.tokens_per_forward)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Here the failed step's tensors are gone.
            lengths = zip(batch.input_lengths, batch.target_lengths, strict=True)
            if self.tokens_per_forward <= max(map(sum, lengths)):
                raise ValueError(
                    "memory runs out with a single row in a forward pass: use a smaller "
                    "data.max_input_length or model.num_virtual_tokens, model.backbone.dtype "
                    "bfloat16 or model.backbone.gradient_checkpointing true"
                )
            self._tokens_per_forward = self.tokens_per_forward // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            rank_zero_warn(
                f"memory ran out: model.tokens_per_forward is {self.tokens_per_forward} from step "
                f"{self.trainer.global_step} on; give that to start with it"
            )

    def on_train_start(self) -> None:
        """Take up the clock, the progress and the curves; a larger budget revives finished runs."""
        trainer, step = self.trainer, self.trainer.global_step
        if step == 0 and not trainer.ckpt_path:
            self._evaluated_at = 0
            self.keeper.reset()
            self.status.fill_(TRAINING)
            self.active.fill_(True)
            self.seconds = 0.0
        if step < self.total_steps:
            finished = self.status == FINISHED
            self.status.masked_fill_(finished, TRAINING)
            self.active |= finished
        self.progress.batches = step * trainer.accumulate_grad_batches
        self._set_live()
        if not self.count_live():
            trainer.should_stop = True
        self._clock = time.monotonic()
        begin_curves(self, self._start_scores)
        self._start_scores = []
        every = trainer.val_check_interval
        if step and self._evaluated_at < step and isinstance(every, int) and step % every == 0:
            self._evaluate()  # the checkpoint was written between the step and its evaluation

    def _evaluate(self) -> None:
        trainer = self.trainer
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.progress.batches += 1
        runs = 1 if self.joint else max(1, len(self.progress.live))
        batches = self.trainer.accumulate_grad_batches
        self.log("train/loss", outputs["loss"].detach() * (batches / runs), rank_zero_only=False)
        every: int = getattr(self.trainer, "log_every_n_steps", 50) or 50
        if self.progress.batches % every == 0 and self.progress.live:
            log_rates(self)

    def finite_everywhere(self, finite: Tensor) -> Tensor:
        """Which units are finite in all processes that share rows."""
        return self.over_ranks((~finite).float()) == 0

    def count_live(self) -> int:
        """How many runs of all processes still train."""
        return sum(self.shares.gather([int((self.status == TRAINING).sum())]))

    # ---- evaluation -----------------------------------------------------------------------------

    @property
    def _fitting(self) -> bool:
        return self.trainer.state.fn == "fit"

    def prefixes(self, current: bool) -> Prefixes:
        """What answers: the current prompts, or the best."""
        return Prefixes(self.backbone, self.bank().detach() if current else self.best)

    def _begin(self, split: SplitName) -> None:
        if not self._fitting:
            self.restore_best()
            self._tell_of_rows(split)
            check_lengths(self, self.datamodule, split)
        self.evaluation = Evaluation(self, split)
        self._prefixes = self.prefixes(self._fitting)

    def restore_best(self) -> None:
        """Read the best from files, unless a fit or checkpoint has filled it."""
        if self.keeper.is_filled or bool((self.status != TRAINING).any()):
            return
        if self.run_dir is None:
            raise ValueError(
                "trainer.fast_dev_run has no run folder to read prompts from: give "
                "trainer.limit_test_batches instead, or a checkpoint"
            )
        self.restore()
        self.status.masked_fill_(self.status == TRAINING, FINISHED)

    def on_validation_start(self) -> None:
        self._begin("dev")

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        self.evaluation.add(batch, self.answer(self._prefixes, batch))

    def on_validation_epoch_end(self) -> None:
        """Score dev; in a fit, keep what is better and stop runs that are done."""
        scores = self.evaluation.scores()
        if not self._fitting:
            Report(self, self.evaluation, "validate").write(scores)
            return
        if self.trainer.sanity_checking:
            whole = self.trainer.num_sanity_val_steps == float("inf")
            self._start_scores = scores.tolist() if whole and not self.joint else []
            return
        self._evaluated_at = step = self.trainer.global_step
        units, live = self.unit_scores(scores), self.active & (self.status == TRAINING)
        self.keep(self.keeper.update(units, scores, step, live, always=not self.runs))
        lines = list(self.progress.live)
        self._stop_runs()
        self._log_evaluation(scores, lines)
        self.after_evaluation(scores, lines)
        self.loss_sum.zero_()
        self.loss_steps.zero_()
        if not self.count_live():
            self.trainer.should_stop = True

    def unit_scores(self, scores: Tensor) -> Tensor:
        """What chooses the best: the score of each run, or their mean where they are joint."""
        if not self.joint:
            return scores
        return scores.nan_to_num(nan=-torch.inf).mean().reshape(1)

    def keep(self, better: Tensor) -> None:
        """Keep what belongs to the better units."""
        self.keeper.keep(better, self.kept())

    def after_evaluation(self, scores: Tensor, lines: list[int]) -> None:
        """What a method does besides, after an evaluation in a fit."""

    def _stop_runs(self) -> None:
        failed = (self.status == TRAINING) & ~self.active
        self.status.masked_fill_(failed, FAILED)
        if self.patience is not None:
            impatient = (self.status == TRAINING) & (self.keeper.bad >= self.patience)
            self.status.masked_fill_(impatient, STOPPED)
        if self.trainer.global_step >= self.total_steps:
            self.status.masked_fill_(self.status == TRAINING, FINISHED)
        self.active &= self.status == TRAINING
        names = zip(self.kept_units(), failed.tolist(), strict=True)
        if told := self.shares.gather([name for name, has_failed in names if has_failed]):
            rank_zero_warn(
                f"loss or gradient not finite by step {self.trainer.global_step}: "
                f"{', '.join(told)}; these runs stop, with their best prompt so far. A lower "
                "learning_rate or optim.clip may help"
            )
        self._set_live()

    def _set_live(self) -> None:
        if not self.joint:  # which are evaluated to the end
            self.progress.live = [i for i, s in enumerate(self.status.tolist()) if s == TRAINING]

    def mean_losses(self) -> Tensor:
        """Mean loss of each run since the last evaluation."""
        return self.over_ranks(self.loss_sum) / self.loss_steps.clamp(min=1)

    def _log_evaluation(self, scores: Tensor, lines: list[int]) -> None:
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        log_evaluation(self, scores, lines)

    def curve_lines(
        self, losses: list[float], scores: Tensor, lines: list[int]
    ) -> list[dict[str, Any]]:
        """A line of ``curves.csv`` for each run that was evaluated."""
        dev, best, further = scores.tolist(), self.keeper.dev.tolist(), self.curve()
        names = self.line_names()
        each = len(names) // max(1, len(self.status))
        steps, status = self.keeper.step.tolist(), self.status.tolist()
        return [
            {
                "step": self.trainer.global_step,
                "run": names[i],
                "train_loss": losses[i],
                "dev": dev[i],
                "best_dev": best[i] if best[i] == best[i] else None,
                "best_step": steps[i // each],
                "status": STATUS[status[i // each]],
                **{name: values[i] for name, values in further.items()},
            }
            for i in lines
        ]

    def moved(self) -> list[float]:
        """Distance of each prompt from its start, relative to the start's norm: R numbers."""
        change = (self.bank().detach() - self.init).flatten(1).norm(dim=1)
        return (change / self.init.flatten(1).norm(dim=1).clamp(min=1e-12)).tolist()

    def on_train_end(self) -> None:
        """Evaluate the last step if it was not, and write the best."""
        trainer = self.trainer
        if self._evaluated_at != trainer.global_step and trainer.enable_validation:
            self._evaluate()
        self.status.masked_fill_((self.status == TRAINING) & ~self.active, FAILED)
        self.status.masked_fill_(self.status == TRAINING, FINISHED)
        unseen = (self.status == FINISHED) & (self.keeper.step < 0)
        if unseen.any():  # a fit without any evaluation: what it ends with
            self.keeper.step.masked_fill_(unseen, trainer.global_step)
            self.keep(unseen)
        self._write_all()

    def _write_all(self) -> None:
        if self.run_dir:
            self.write()
        self._is_written = True
        self.trainer.strategy.barrier("best prompts written")

    # ---- test and predict -----------------------------------------------------------------------

    test_step = validation_step

    def on_test_start(self) -> None:
        self._begin("test")

    def on_test_epoch_end(self) -> None:
        scores = self.evaluation.scores()
        self.log("test/mean", scores[self.evaluated].nanmean().float(), rank_zero_only=False)
        self.report_test(scores)

    def report_test(self, scores: Tensor) -> None:
        """Write results, predictions and, where there are any, prompts."""
        Report(self, self.evaluation, "test").write(scores)

    def on_predict_start(self) -> None:
        self.restore_best()
        self._prefixes = self.prefixes(current=False)

    def predict_step(self, batch: EvaluationBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Answers to test rows under each run's best prompt: run, task, sample, row, answer."""
        texts = self.answer(self._prefixes, batch)
        runs = [self.runs[i] for i in batch.batch.prompts]
        return [
            {"run": r.name, "task": r.task, "sample": r.sample, "row": row, "answer": text}
            for r, row, text in zip(runs, batch.batch.rows, texts, strict=True)
        ]

    # ---- identity, warnings ---------------------------------------------------------------------

    def digests(self) -> dict[str, Any]:
        """Digests of all that a fit reads; no path is in it. All processes call it."""
        files = {
            f"{task}/{sample}/{name}": split.digest
            for (task, sample), splits in self.datamodule.splits.items()
            for name, split in splits.items()
        }
        found: dict[str, Any] = {"backbone": self.backbone.digest, "data": files}
        found["tokenizer"] = self.backbone.tokenizer_digest
        if template := self.datamodule.frame.digest:
            found["template"] = template
        if self.source_keys():
            found["source_prompts"] = tensor_digest(self.sources)
        if self.init_config is not None and self.init_config.name == "file":
            own = self.shares.join([tensor_digest(init) for init in self.init])
            found["initial_prompts"] = hashlib.sha256(" ".join(own).encode()).hexdigest()
        return found

    def fit_record(self) -> dict[str, Any]:
        """What the fit kept for tests to come; empty where there is none."""
        if not self._fit_record and self.run_dir and self.file(FIT_RECORD).is_file():
            self._fit_record = json.loads(self.file(FIT_RECORD).read_text())
        return self._fit_record

    def on_fit_end(self) -> None:
        if not self._is_written:  # a fit that was killed after its last step had none left
            self._write_all()
        self._fit_record = {"trainer": trainer_settings(self.trainer), "digests": self.digests()}
        if self.trainer.is_global_zero and self.run_dir:
            write_atomically(self.file(FIT_RECORD), json.dumps(self._fit_record, indent=1).encode())

    def warn_once(self, key: str, message: str) -> None:
        """Warn about one thing once per fit."""
        if key not in self._warned:
            self._warned.add(key)
            rank_zero_warn(message)

    def stored_prompt(
        self, run: Run, prompt: Tensor, init: Tensor, dev: float, test: float | None, **facts: Any
    ) -> Prompt:
        """A run's prompt (N, D) with all that its file says.

        ``init`` (N, D) is what it was trained from, ``dev`` the score that chose it, NaN for none;
        ``facts`` are further fields of :class:`Prompt`, or other values than the run's.
        """
        from prompt_lab import __version__

        fields = {
            "prompt": prompt.detach().cpu(),
            "init": init.detach().cpu(),
            **self.origin(),
            "name": run.name,
            "task": run.task,
            "sample": run.sample,
            "init_seed": run.init_seed,
            "order_seed": self.datamodule.order_seed,
            "learning_rate": run.learning_rate,
            "batch_size": run.batch_size,
            "dev_score": dev if math.isfinite(dev) else None,
            "test_score": test,
            "metric": self.datamodule.tasks[run.task].metric,
            "status": "finished",
            "run": self.all_runs.index(run),
            "version": __version__,
            **self.way_of_answering(run.task, run.sample),
        }
        return Prompt(**fields | facts)

    def origin(self, unit: int | None = None) -> dict[str, Any]:
        """What every file says of where it is from; with a unit, of its best evaluation too."""
        backbone = self.backbone
        found: dict[str, Any] = {"backbone": backbone.name, "backbone_digest": backbone.digest}
        found |= {"tokenizer_digest": backbone.tokenizer_digest, "seconds": round(self.seconds, 3)}
        if unit is not None:
            score = self.keeper.score[unit].item()
            found["dev_score"] = score if math.isfinite(score) else None
            found["steps"] = int(self.keeper.step[unit])
        return found

    # ---- checkpoints ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fill_checkpoint(self, checkpoint)
        checkpoint["seconds"], checkpoint["evaluated_at"] = self.seconds, self._evaluated_at

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take this process's runs; refuse other data, seeds or weights, which may look like these.

        Without a trainer, as in ``load_from_checkpoint``, the runs are those of the checkpoint.
        """
        if any(name not in checkpoint for name in ("runs", "starts", "identity", "seconds")):
            raise ValueError("the checkpoint is not of a method of prompt_lab")
        if not self.source_names:
            self.source_names = checkpoint["identity"].get("source_prompts", [])
            self.source_digest = checkpoint["identity"].get("digest of source prompts")
        if not self.is_built:
            self.backbone = self.load_backbone()
            self._build([Run(**run) for run in checkpoint["runs"]], None)
        check_identity(self, checkpoint["identity"])
        starts = [Start(**start) for start in checkpoint["starts"]]
        self.starts = [starts[i] for i in self.shares.own] if self.shares.divided else starts
        self.seconds, self._evaluated_at = checkpoint["seconds"], checkpoint["evaluated_at"]
        change_runs(self, checkpoint, self.shares.take)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The method of a checkpoint, of the class that was saved, with what it has trained."""
        kwargs.setdefault("weights_only", True)
        if cls is PromptMethod:
            return kind_of(checkpoint_path).load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        for name in [name for name in state if name.startswith(self.frozen)]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load everything but what is frozen, which must not be there; all the rest must fit."""
        own = self.state_dict()
        wrong = [
            f"{name} has shape {tuple(given.shape)} there and {tuple(own[name].shape)} here"
            for name, given in state_dict.items()
            if name in own and given.shape != own[name].shape
        ]
        missing = [name for name in own if name not in state_dict]
        unexpected = [name for name in state_dict if name not in own]
        if strict and (missing or unexpected):
            wrong.append(f"missing {missing}, unexpected {unexpected}")
        if wrong:
            raise ValueError(
                f"the checkpoint does not fit: {wrong[0]}; was it made with other settings, with "
                "other data or by another method?"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)
