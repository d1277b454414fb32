"""``Attempt``: every input gets its own mixture of source prompts and a target prompt.

ATTEMPT (Asai et al. 2022, arXiv 2205.11961): the tuned prompts of source tasks stay as they are; a
target prompt for each task and a small attention G are trained, and the prompt of a row is
P_target + sum_j a_j(row) P_j (``attention_mixture.py`` has the formulas).

The authors' code is corrected in these places: the maximum over the input leaves padding out; G's
LayerNorm is trained; G has its own learning rate (there its parameter group is empty, since names
are compared without their ending ".weight", so that G learns at the prompts' rate); in an
evaluation each row has the target prompt of its task (there rows without a task's number take the
first); and each task has its own metric. Left out: G trained on the source tasks beforehand, other
scores than G's, and a learned temperature.

No two rows share a prompt, so in decoder-only models each row runs its own N virtual tokens, in
training and in evaluation. A fit is of one few-shot sample, since samples that share G would not be
independent.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from prompt_lab.core.attention_mixture import PromptAttention, max_pool, row_prompts
from prompt_lab.core.backbone import Backbone, Prefix
from prompt_lab.core.bank import Prefixes, with_gradient
from prompt_lab.core.batch import Batch, index_tensor, micro_batches
from prompt_lab.core.optim import adamw_with_warmup
from prompt_lab.core.pretrained import tensor_digest
from prompt_lab.core.run import Run
from prompt_lab.data.datamodule import PromptDataModule
from prompt_lab.data.partitions import expand_sets
from prompt_lab.data.sampling import Draw, Mixing, mixture_draw
from prompt_lab.data.tasks import Task
from prompt_lab.files.prompts import TARGET_OF, Prompt, PromptStore, source_prompts
from prompt_lab.files.tensors import load_network, save_network, write_csv
from prompt_lab.methods.checks import some
from prompt_lab.methods.configs import as_config, as_list
from prompt_lab.methods.method import PromptMethod
from prompt_lab.methods.starts import InitConfig, initial_prompts

ATTENTION_FILE, TARGET_FOLDER = "attention.safetensors", "target_prompts"
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
        kwargs: the arguments of :class:`PromptMethod`.
    """

    frozen = ("backbone.", "initial_attention.")
    joint = True
    stores_prompts = False  # not where others look for prompts that answer by themselves
    prompt: nn.Parameter
    sources: Tensor
    weight_sum: Tensor

    def __init__(
        self,
        prompts: str | list[str],
        source_tasks: list[str],
        source_sample: int | None = None,
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.folders = as_list(prompts)
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
        self.source_names: list[str] = []
        self._is_read = False

    # ---- what is trained ------------------------------------------------------------------------

    def make_runs(self, data: PromptDataModule) -> list[Run]:
        """A target prompt for each task of one sample."""
        if len(data.samples) > 1:
            raise ValueError(
                f"data.samples has {len(data.samples)} samples, which would share one attention "
                "and not be independent: give one, and a fit for each of the others"
            )
        own = (data.samples[0], self.init_seed, self.learning_rate, self.batch_size)
        return [Run(task, *own) for task in data.tasks]

    def build(self, backbone: Backbone, runs: Sequence[Run]) -> None:
        """Make target prompts and attention, and room for the source prompts."""
        size = (self.num_virtual_tokens, backbone.hidden_size)
        self.prompt = nn.Parameter(torch.zeros(len(runs), *size))
        self.attention = PromptAttention(
            backbone.hidden_size, self.inner_size, self.temperature, self.init_seed
        )
        self.initial_attention = copy.deepcopy(self.attention).requires_grad_(False)
        self.best_attention = copy.deepcopy(self.attention).requires_grad_(False)
        self.register_buffer("sources", torch.zeros(len(self.source_tasks), *size))
        self.register_buffer("init", torch.zeros(len(runs), *size))
        self.register_buffer("weight_sum", torch.zeros(len(runs)))

    def take(self, data: PromptDataModule, fitting: bool = True, anew: bool | None = None) -> None:
        """As every method's, with the source prompts, which a checkpoint is compared with."""
        super().take(data, fitting, anew)
        if fitting and not self.source_names:
            self._read_sources()

    @torch.no_grad()
    def start(self, data: PromptDataModule) -> None:
        """Read the source prompts, and put target prompts where they start."""
        assert self.backbone is not None
        self._read_sources()
        init, self.starts = initial_prompts(
            self.init_config,
            self.backbone,
            self.runs,
            data.tasks,
            self.num_virtual_tokens,
            data.frame,
        )
        self.prompt.copy_(init)
        self.init.copy_(init)
        both = [task for task in data.tasks if task in self.source_tasks]
        if both:
            self.warn_once(
                "sources",
                f"{some(both)}: a source task and a target task, so its target prompt is trained "
                "beside a prompt that was tuned for it",
            )

    def _read_sources(self) -> None:
        assert self.backbone is not None
        own = self.all_runs[0].sample
        sample = own if self.source_sample is None else self.source_sample
        keys = [(task, sample) for task in self.source_tasks]
        found = source_prompts(self.folders, keys, self.backbone, self.num_virtual_tokens)
        self.source_names = [prompt.name for prompt in found]
        self.sources.copy_(torch.stack([prompt.prompt for prompt in found]))
        self._is_read = True

    def bank(self) -> Tensor:
        """The target prompts, (R, N, D)."""
        return self.prompt

    def keep(self, better: Tensor) -> None:
        """Keep target prompts and attention."""
        super().keep(better)
        if bool(better):
            self.best_attention.load_state_dict(self.attention.state_dict())

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over target prompts and G, each at its rate; it rises, then falls linearly to 0."""
        groups = [
            {"params": [self.prompt], "lr": self.learning_rate},
            {"params": list(self.attention.parameters()), "lr": self.attention_learning_rate},
        ]
        return adamw_with_warmup(groups, self.warmup, self.total_steps)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip the gradient of target prompts and G together."""
        if self.clip is not None:
            nn.utils.clip_grad_norm_([self.prompt, *self.attention.parameters()], self.clip)

    def draw(self, data: PromptDataModule) -> Draw:
        """Rows of all target tasks, mixed."""
        rows = {(r.task, r.sample): data.tokens(r.task, r.sample, "train") for r in self.runs}
        given = (self.mixing, self.batch_size, data.order_seed)
        return mixture_draw(rows, *given, data.layout, self.row_share)

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
        backbone = self.backbone
        assert backbone is not None
        with torch.autocast(targets.device.type, enabled=False):
            with torch.no_grad():  # the maximum of each row's embeddings over its tokens, (B, D)
                pooled = [
                    max_pool(backbone.embed(part.input_ids), part.input_mask)
                    for part in micro_batches(batch, self.tokens_per_forward)
                ] or [targets.new_zeros(0, backbone.hidden_size)]
                inputs = torch.cat(pooled).to(targets.dtype)
            own = targets.amax(1).index_select(0, batch.prompt_index)  # (B, D)
            return attention(inputs, self.sources.amax(1), own)

    def mixed(self, batch: Batch, attention: PromptAttention, targets: Tensor) -> Tensor:
        """The prompt of each row, (B, N, D); settings as for :meth:`weights`."""
        weights = self.weights(batch, attention, targets)
        with torch.autocast(targets.device.type, enabled=False):
            own = targets.index_select(0, batch.prompt_index)
            return row_prompts(weights, self.sources, own)

    def prefixes(self, current: bool) -> Prefixes:
        """The target prompts, which each row mixes with the sources by the attention of now."""
        self._current = current
        return super().prefixes(current)

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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the rows, each under its own mixture."""
        made = self.mixed(batch, self.attention, self.prompt)
        losses, gradient = self.bank_gradient(made, _one_each(batch), self.label_smoothing)
        self.loss_sum.index_add_(0, batch.prompt_index, losses)
        self.weight_sum.index_add_(0, batch.prompt_index, batch.weight)
        world = self.trainer.world_size
        return with_gradient(losses.sum() * world, made, gradient * world)

    # ---- evaluation -----------------------------------------------------------------------------

    def mean_losses(self) -> Tensor:
        """Mean loss of each task; NaN where none of its rows was drawn."""
        return self.over_ranks(self.loss_sum) / self.over_ranks(self.weight_sum)

    def curve(self) -> dict[str, list[Any]]:
        """How far the target prompts moved."""
        return {"moved": self.moved()}

    def after_evaluation(self, scores: Tensor, lines: list[int]) -> None:
        """Warn of a loss that is not finite, and begin the sums anew."""
        if not self.over_ranks(self.loss_sum).sum().isfinite():
            self.warn_once(
                "nan",
                f"the loss is not finite by step {self.trainer.global_step}; the best state so far "
                "is kept. A lower learning_rate or attention_learning_rate, or clip, may help",
            )
        self.weight_sum.zero_()

    # ---- files ----------------------------------------------------------------------------------

    def write(self, test_scores: Tensor | None = None) -> None:
        """Write the best attention and target prompts."""
        backbone, folder = self.backbone, self.run_dir
        assert backbone is not None
        assert folder is not None
        if not self.trainer.is_global_zero:
            return
        metadata = {
            "backbone": backbone.name,
            "backbone_digest": backbone.digest,
            "tokenizer_digest": backbone.tokenizer_digest,
            "source_tasks": self.source_tasks,
            "source_prompts": self.source_names,
            "sources_digest": tensor_digest(self.sources),
            "target_prompts": [run.name for run in self.runs],
            "steps": int(self.keeper.step),
            "dev_score": self.keeper.score.item(),
            "seconds": round(self.seconds, 3),
        }
        save_network(folder / ATTENTION_FILE, self.best_attention, metadata)
        PromptStore(folder / TARGET_FOLDER).save(self.best_prompts(test_scores))

    # ---- test -----------------------------------------------------------------------------------

    def report_test(self, scores: Tensor) -> None:
        """Write results, predictions, target prompts and the attention's weights.

        Those are the mean over the test rows of each task, and the spread (ddof 0).
        """
        super().report_test(scores)
        sums = torch.zeros(
            *(len(self.runs), 3, len(self.sources) + 1), dtype=torch.float64, device=self.device
        )
        with torch.no_grad():
            for step in self.datamodule.test_dataloader():
                batch = step.batch.to(self.device)
                weights = self.weights(batch, self.best_attention, self.best).double()
                parts = torch.stack([weights, weights.square(), torch.ones_like(weights)], 1)
                sums.index_add_(0, batch.prompt_index, parts)
        weight, square, rows = self.over_ranks(sums).unbind(1)
        weight, square = weight / rows, square / rows
        spread = (square - weight.square()).clamp(min=0).sqrt()
        if self.run_dir:
            self.write(scores)
        if self.run_dir and self.trainer.is_global_zero:
            lines = [
                {"task": run.task, "sample": run.sample, "source": name, "weight": mean, "std": std}
                for run, own, stds in zip(self.runs, weight.tolist(), spread.tolist(), strict=True)
                for name, mean, std in zip([*self.source_tasks, TARGET], own, stds, strict=True)
            ]
            write_csv(self.run_dir / "attention.csv", ATTENTION_COLUMNS, lines)

    def restore(self) -> None:
        """Read sources and best state from their files."""
        assert self.run_dir is not None
        self._read_sources()
        file = self.run_dir / ATTENTION_FILE
        saved = load_network(file, PromptAttention, self.backbone)
        known = saved.metadata
        if known.get("sources_digest") != tensor_digest(self.sources):
            raise ValueError(
                f"{file} is of the source prompts {some(known['source_prompts'])}, "
                f"the settings give {some(self.source_names)}: use the config and the prompt files "
                "of the fit"
            )
        own = self.best_attention
        if (saved.inner_size, saved.temperature) != (own.inner_size, own.temperature):
            raise ValueError(
                f"{file} has inner_size {saved.inner_size} and temperature "
                f"{saved.temperature:g}, the config asks for {own.inner_size} and "
                f"{own.temperature:g}: use the config of the fit"
            )
        own.load_state_dict(saved.state_dict())
        store = PromptStore(self.run_dir / TARGET_FOLDER)
        names = [run.name for run in self.runs]
        for i, prompt in enumerate(store.load(names, self.backbone)):
            self.best[i], self.init[i] = prompt.prompt, prompt.init
            self.starts[i] = prompt.start_fields
            self.keeper.dev[i] = torch.nan if prompt.dev_score is None else prompt.dev_score
        self.keeper.step.fill_(known["steps"])
        self.keeper.score.fill_(known["dev_score"])
        self.seconds = known["seconds"]

    def best_prompts(self, test_scores: Tensor | None = None) -> list[Prompt]:
        """The target prompt of every task, which answers only beside the others of the mixture."""
        dev = self.keeper.dev.tolist()
        return [
            self.stored_prompt(
                self.runs[i],
                self.best[i],
                self.init[i],
                dev[i],
                None if test_scores is None else test_scores[i].item(),
                **asdict(self.starts[i]),
                order_seed=self.datamodule.order_seed,
                steps=int(self.keeper.step),
                source_tasks=self.source_tasks,
                made_from={TARGET_OF: ATTENTION_FILE, "sources": self.source_names},
            )
            for i in self.evaluated
        ]

    # ---- identity -------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """The source prompts, by name and digest."""
        known = {"source_prompts": self.source_names}
        return known | (
            {"digest of source prompts": tensor_digest(self.sources)} if self._is_read else {}
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every method's; without a trainer the source prompts are the checkpoint's."""
        if not self.source_names:
            self.source_names = checkpoint.get("identity", {}).get("source_prompts", [])
        super().on_load_checkpoint(checkpoint)

    def digests(self) -> dict[str, Any]:
        """Digests of backbone weights, tokenizer, data files, source prompts and prompts read."""
        found = {**super().digests(), "source_prompts": tensor_digest(self.sources)}
        if self.init_config.name == "file":
            found["initial_prompts"] = tensor_digest(self.init)
        return found

    def result_facts(self, run: int) -> dict[str, Any]:
        """What the results say of how a run was trained."""
        return {
            "variant": "attempt",
            "optimizer": "adamw",
            "prompt_file": f"{TARGET_FOLDER}/{self.runs[run].name}.safetensors",
        }

    def summary(self) -> str:
        """What is trained, in a few words."""
        return (
            f"attention over {len(self.source_tasks)} source prompts and {len(self.runs)} target "
            f"prompts of {self.num_virtual_tokens} virtual tokens"
        )

    def described(self, data: PromptDataModule) -> list[str]:
        """What is trained, beside which prompts."""
        numbers = sum(weight.numel() for weight in self.attention.parameters())
        return [
            self.summary(),
            f"source tasks: {', '.join(self.source_tasks)}",
            f"target tasks: {', '.join(run.task for run in self.runs)}",
            f"trained: {numbers:,} numbers of the attention, {self.prompt.numel():,} of target "
            f"prompts, on {self.batch_size} rows a step",
        ]


def _one_each(batch: Batch) -> Batch:
    """The same rows, each naming a prompt of its own, in their order."""
    own = list(range(len(batch)))
    index = index_tensor(own, batch.prompt_index.device)
    return Batch(**{**vars(batch), "prompts": own, "prompt_index": index})
