"""``Attempt``: every input gets its own mixture of source prompts and a target prompt.

ATTEMPT (Asai et al. 2022, arXiv 2205.11961): the tuned prompts of source tasks stay as they are; a
target prompt for each task and a small attention G are trained, and the prompt of a row is
P_target + sum_j a_j(row) P_j (``attention_mixture.py`` has the formulas). Corrected of the authors'
code: the maximum over the input leaves padding out, G's LayerNorm is trained, G has its own
learning rate, each row is evaluated under the target prompt of its own task, by its own metric. A
fit is of one few-shot sample, since samples that share G would not be independent.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prompt_lab.core.attention_mixture import PromptAttention, max_pool, row_prompts
from prompt_lab.core.backbone import Backbone, Prefix
from prompt_lab.core.bank import Prefixes, with_gradient
from prompt_lab.core.batch import Batch, index_tensor, micro_batches
from prompt_lab.core.optim import adamw_with_warmup
from prompt_lab.core.run import Run
from prompt_lab.core.text import some
from prompt_lab.data.datamodule import PromptDataModule
from prompt_lab.data.partitions import expand_sets
from prompt_lab.data.sampling import Draw, Key, Mixing, mixture_draw
from prompt_lab.data.tasks import Task
from prompt_lab.files.prompts import TARGET_OF
from prompt_lab.files.tensors import load_network, save_network, write_csv
from prompt_lab.methods.configs import as_config, as_list
from prompt_lab.methods.method import PromptMethod
from prompt_lab.methods.starts import InitConfig

ATTENTION_FILE = "attention.safetensors"
ATTENTION_COLUMNS = ("task", "sample", "source", "weight", "std")
TARGET = "target prompt"


class Attempt(PromptMethod):
    """Trains target prompts and one attention over them and frozen source prompts.

    The target tasks are those of ``data.tasks``; the step with the best mean dev score over them is
    kept. The fit leaves ``attention.safetensors`` and ``target_prompts/``, which answer together
    and with the source prompts only, so ``test`` needs these too. It also writes
    ``attention.csv``: the weight of each source prompt, as mean and standard deviation over the
    test rows of a task. ``initial_prompt`` of the baselines is the mixture before training.

    Args:
        prompts: prompt stores, folders of fits, prompt files or checkpoints, with the tuned prompts
            of the source tasks.
        source_tasks: the source tasks; sets of partitions stand for their tasks.
        source_sample: few-shot sample of the source prompts; null for that of the data.
        init: how target prompts are initialised; the authors take the first source prompt, which is
            ``file`` with the path of its prompt file.
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
        test_baselines: ``test`` also scores no prompt, the initial mixture, chance and majority.
        kwargs: the arguments of :class:`PromptMethod`.
    """

    frozen = ("backbone.", "initial_attention.")
    joint = True
    prompt_folder = "target_prompts"  # not where others look for prompts that answer alone
    prompt: nn.Parameter
    weight_sum: Tensor

    def __init__(
        self,
        prompts: str | list[str],
        source_tasks: list[str],
        source_sample: int | None = None,
        init: InitConfig = InitConfig(),  # noqa: B008
        inner_size: int = 100,
        temperature: float | None = None,
        init_seed: int = 0,
        learning_rate: float = 0.3,
        attention_learning_rate: float = 0.1,
        warmup: float = 0.06,
        clip: float | None = None,
        mixing: Mixing = "tasks",
        batch_size: int = 32,
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
        self.inner_size, self.temperature, self.init_seed = inner_size, temperature, init_seed
        self.learning_rate, self.attention_learning_rate = learning_rate, attention_learning_rate
        self.warmup, self.clip, self.batch_size = warmup, clip, batch_size
        self.mixing: Mixing = mixing
        self.test_baselines = test_baselines

    def make_runs(self, data: PromptDataModule) -> list[Run]:
        if len(data.samples) > 1:
            raise ValueError(
                f"data.samples has {len(data.samples)} samples, which would share one attention "
                "and not be independent: give one, and a fit for each of the others"
            )
        own = (data.samples[0], self.init_seed, self.learning_rate, self.batch_size)
        return [Run(task, *own) for task in data.tasks]

    def build(self, backbone: Backbone, runs: Sequence[Run]) -> None:
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

    def source_keys(self) -> list[Key]:
        given = self.source_sample
        sample = self.all_runs[0].sample if given is None else given
        return [(task, sample) for task in self.source_tasks]

    @torch.no_grad()
    def start(self, data: PromptDataModule) -> None:
        init, self.starts = self.initial_prompts(data, self.runs)
        self.prompt.copy_(init)
        self.init.copy_(init)
        if both := [task for task in data.tasks if task in self.source_tasks]:
            self.warn_once(
                "sources",
                f"{some(both)}: a source task and a target task, so its target prompt is trained "
                "beside a prompt that was tuned for it",
            )

    def bank(self) -> Tensor:
        return self.prompt

    def keep(self, better: Tensor) -> None:
        super().keep(better)
        if bool(better):
            self.best_attention.load_state_dict(self.attention.state_dict())

    def configure_optimizers(self) -> dict[str, Any]:
        groups = [
            {"params": [self.prompt], "lr": self.learning_rate},
            {"params": list(self.attention.parameters()), "lr": self.attention_learning_rate},
        ]
        return adamw_with_warmup(groups, self.warmup, self.total_steps)

    def draw(self, data: PromptDataModule) -> Draw:
        given = (self.mixing, self.batch_size, data.order_seed)
        return mixture_draw(self.train_rows(data), *given, data.layout, self.row_share)

    def weights(self, batch: Batch, attention: PromptAttention, targets: Tensor) -> Tensor:
        """How much each source prompt, and the target prompt, counts for each row: (B, J + 1).

        ``targets`` are (T, N, D), named by the rows; gradients flow into them and into G.
        """
        backbone = self.backbone
        with torch.autocast(targets.device.type, enabled=False):
            with torch.no_grad():  # the maximum of each row's embeddings over its tokens, (B, D)
                pooled = [
                    max_pool(backbone.embed(part.input_ids), part.input_mask)
                    for part in micro_batches(batch, self.tokens_per_forward)
                ] or [targets.new_zeros(0, backbone.hidden_size)]
                inputs = torch.cat(pooled).to(targets.dtype)
                if batch.front:
                    front = backbone.embed(index_tensor(batch.front, inputs.device))
                    inputs = inputs.maximum(front.amax(0).to(inputs.dtype))
            own = targets.amax(1).index_select(0, batch.prompt_index)  # (B, D)
            return attention(inputs, self.sources.amax(1), own)

    def mixed(self, batch: Batch, attention: PromptAttention, targets: Tensor) -> Tensor:
        """The prompt of each row, (B, N, D); settings as for :meth:`weights`."""
        weights = self.weights(batch, attention, targets)
        with torch.autocast(targets.device.type, enabled=False):
            own = targets.index_select(0, batch.prompt_index)
            return row_prompts(weights, self.sources, own)

    def prefixes(self, current: bool) -> Prefixes:
        self._current = current
        return super().prefixes(current)

    def prefix_of(self, prefixes: Prefixes, batch: Batch) -> tuple[Prefix, Batch]:
        """What the rows need of their own mixtures, one for each, and the rows that name them.

        The baseline without prompt has none; that of the initial prompts takes the initial G.
        """
        targets = prefixes.prompts
        if targets.shape[1] == 0:
            return super().prefix_of(prefixes, batch)
        trained = self.attention if self._current else self.best_attention
        attention = self.initial_attention if targets is self.init else trained
        with torch.no_grad():
            made = self.mixed(batch, attention, targets)
            return self.backbone.prefix(made, batch.front), _one_each(batch)

    def tokens_beside_input(self, task: Task, longest: int) -> int:
        """As the parent's, with the prompt that each row runs in decoder-only models too."""
        beside = super().tokens_beside_input(task, longest)
        return beside + (0 if self.backbone.is_encoder_decoder else self.num_virtual_tokens)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        made = self.mixed(batch, self.attention, self.prompt)
        losses, gradient = self.bank_gradient(made, _one_each(batch))
        self.loss_sum.index_add_(0, batch.prompt_index, losses)
        self.weight_sum.index_add_(0, batch.prompt_index, batch.weight)
        world = self.trainer.world_size
        return with_gradient(losses.sum() * world, made, gradient * world)

    def mean_losses(self) -> Tensor:
        return self.over_ranks(self.loss_sum) / self.over_ranks(self.weight_sum)

    def after_evaluation(self, scores: Tensor, lines: list[int]) -> None:
        self.weight_sum.zero_()

    def write(self) -> None:
        if self.trainer.is_global_zero:
            metadata = {
                **self.origin(0),
                "source_tasks": self.source_tasks,
                "source_prompts": self.source_names,
                "sources_digest": self.source_digest,
                "target_prompts": [run.name for run in self.runs],
            }
            save_network(self.file(ATTENTION_FILE), self.best_attention, metadata)
        super().write()

    def report_test(self, scores: Tensor) -> None:
        super().report_test(scores)
        size = (len(self.runs), 3, len(self.sources) + 1)
        sums = torch.zeros(size, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for step in self.datamodule.test_dataloader():
                batch = step.batch.to(self.device)
                weights = self.weights(batch, self.best_attention, self.best).double()
                parts = torch.stack([weights, weights.square(), torch.ones_like(weights)], 1)
                sums.index_add_(0, batch.prompt_index, parts)
        weight, square, rows = self.over_ranks(sums).unbind(1)
        weight, square = weight / rows, square / rows
        spread = (square - weight.square()).clamp(min=0).sqrt()
        if self.run_dir and self.trainer.is_global_zero:
            lines = [
                {"task": run.task, "sample": run.sample, "source": name, "weight": mean, "std": std}
                for run, own, stds in zip(self.runs, weight.tolist(), spread.tolist(), strict=True)
                for name, mean, std in zip([*self.source_tasks, TARGET], own, stds, strict=True)
            ]
            write_csv(self.file("attention.csv"), ATTENTION_COLUMNS, lines)

    def restore(self) -> None:
        self.read_sources()
        file, own = self.file(ATTENTION_FILE), self.best_attention
        saved = load_network(file, PromptAttention, self.backbone)
        known = saved.metadata
        if known.get("sources_digest") != self.source_digest:
            raise ValueError(
                f"{file} is of the source prompts {some(known['source_prompts'])}, "
                f"the settings give {some(self.source_names)}: use the config and the prompt files "
                "of the fit"
            )
        if (saved.inner_size, saved.temperature) != (own.inner_size, own.temperature):
            raise ValueError(
                f"{file} has inner_size {saved.inner_size} and temperature "
                f"{saved.temperature:g}, the config asks for {own.inner_size} and "
                f"{own.temperature:g}: use the config of the fit"
            )
        own.load_state_dict(saved.state_dict())
        super().restore()
        self.keeper.restore(0, known["steps"], known["dev_score"])

    def prompt_facts(self) -> list[dict[str, Any]]:
        """Target prompts answer only beside the others of the mixture."""
        made_from = {TARGET_OF: ATTENTION_FILE, "sources": self.source_names}
        own = {"source_tasks": self.source_tasks, "made_from": made_from}
        return [known | own for known in super().prompt_facts()]

    def result_facts(self, run: int) -> dict[str, Any]:
        return {"variant": "attempt", "optimizer": "adamw"}

    def summary(self) -> str:
        return (
            f"attention over {len(self.source_tasks)} source prompts and {len(self.runs)} target "
            f"prompts of {self.num_virtual_tokens} virtual tokens"
        )


def _one_each(batch: Batch) -> Batch:
    """The same rows, each naming a prompt of its own, in their order."""
    own = list(range(len(batch)))
    return replace(batch, prompts=own, prompt_index=index_tensor(own, batch.prompt_index.device))
