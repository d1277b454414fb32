"""``MetaPrompt``: learn a prompt on many source tasks, as a start for prompt tuning on new ones.

Meta prompt tuning (Qin et al. 2023, arXiv 2302.08143): in each step a few episodes, (task, sample)
each, adapt the prompt on support rows and judge it on query rows; MAML, FoMAML, Reptile or
multi-task learning says how to move the prompt (``meta_gradient.py``). The loss of a step has the
meta-gradient as its gradient, so Lightning clips, accumulates and shares episodes as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import BankObjective, Prefixes, with_gradient
from prompt_lab.core.batch import Batch
from prompt_lab.core.meta_gradient import InnerConfig, MetaGradient, maml, multitask, reptile
from prompt_lab.core.optim import OptimConfig
from prompt_lab.core.run import Run
from prompt_lab.core.text import some
from prompt_lab.data.datamodule import PromptDataModule
from prompt_lab.data.partitions import expand_sets
from prompt_lab.data.sampling import Draw, Episodes, Key, episode_draw
from prompt_lab.files.prompts import Prompt, load_prompt, save_prompt
from prompt_lab.files.results import Start
from prompt_lab.methods.checks import hold_out
from prompt_lab.methods.configs import as_config
from prompt_lab.methods.method import STATUS, PromptMethod
from prompt_lab.methods.starts import InitConfig

Algorithm = Literal["maml", "fomaml", "reptile", "multitask"]

MOST_SKIPPED = 10
"""So many skipped steps in a row end a fit."""

MOST_MOVED = 100.0
"""Norms of the prompt by which an inner loop may move it; beyond that it has diverged."""

SUMS = ("loss", "second_order", "inner_moved", "improved", "batches", "skipped")
"""What is summed over the steps between two evaluations."""


@dataclass
class AdaptationConfig:
    """How held-out tasks are adapted to, as prompt tuning would.

    Args:
        steps: steps on the train rows of each task; 0 scores the prompt as it is.
        learning_rate: peak learning rate.
        batch_size: rows of a step.
        optim: optimizer and schedule.
    """

    steps: int = 20
    learning_rate: float = 0.3
    batch_size: int = 8
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        self.optim = as_config(OptimConfig, self.optim)
        if self.steps < 0:
            raise ValueError(f"model.adaptation.steps is {self.steps}: give 0 or more")


class MetaPrompt(PromptMethod):
    """Learns one prompt from episodes of source tasks.

    The source tasks are those of ``data.tasks`` without ``validation_tasks``; every sample of a
    task is an item that episodes are made of. ``trainer.max_steps`` is the number of meta-steps.
    Validation adapts the prompt to held-out tasks, few-shot, and scores dev. The fit leaves
    ``prompt.safetensors``: the prompt of the best evaluation, or the last one where there are no
    validation tasks.

    An episode has K = ``inner.steps`` support batches of ``support_size`` train rows, and a query
    of ``query_size`` dev rows. ``maml`` and ``fomaml`` read both: the loss of an episode is that of
    the query at the adapted prompt. ``multitask`` takes the mean over the same rows at the prompt
    as it is. ``reptile``, which has no query, reads the support alone: K + ``query_size`` /
    ``support_size`` inner steps make it read as many rows. The loss of a step is the mean over its
    episodes.

    Args:
        algorithm: ``maml``, ``fomaml``, ``reptile``, or ``multitask`` learning.
        inner: how an episode adapts the prompt; of multi-task learning only ``steps`` counts, for
            the rows of an episode.
        optim: the outer optimizer.
        init: how the prompt is initialised.
        adaptation: how validation adapts it to held-out tasks.
        validation_tasks: those of ``data.tasks`` that are held out for validation; sets of
            partitions stand for their tasks.
        target_tasks: tasks that the prompt is meant for; named so that no source task is among
            them.
        source_name: what results call the source tasks; null for the set in ``data.tasks``, or
            their number.
        depth: inner steps that ``maml`` differentiates through, from the last; null for all.
        episodes: episodes of a meta-step over all processes, M.
        support_size: rows of an inner step.
        query_size: rows that judge the adapted prompt; without effect in Reptile.
        init_seed: seed of the initial prompt.
        learning_rate: peak outer learning rate.
        rate_factor: times ``learning_rate``, it is the outer learning rate of the logarithm of the
            inner one, where that is learned; logged, and kept by the checkpoint alone.
        seed: of the episodes.
        kwargs: the arguments of :class:`PromptMethod`.
    """

    joint = True
    trains_a_bank = False
    prompt: nn.Parameter
    log_rate: nn.Parameter | None
    adapted: Tensor
    moves: Tensor
    sums: Tensor
    skipped: Tensor
    skipped_in_row: Tensor

    def __init__(
        self,
        algorithm: Algorithm = "maml",
        inner: InnerConfig = InnerConfig(),  # noqa: B008
        optim: OptimConfig = OptimConfig(),  # noqa: B008
        init: InitConfig = InitConfig(),  # noqa: B008
        adaptation: AdaptationConfig = AdaptationConfig(),  # noqa: B008
        validation_tasks: list[str] = [],  # noqa: B006 - read only
        target_tasks: list[str] = [],  # noqa: B006 - read only
        source_name: str | None = None,
        depth: int | None = None,
        episodes: int = 4,
        support_size: int = 4,
        query_size: int = 4,
        init_seed: int = 0,
        learning_rate: float = 0.3,
        rate_factor: float = 0.1,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.algorithm: Algorithm = algorithm
        self.inner: InnerConfig = as_config(InnerConfig, inner)
        self.optim_config: OptimConfig = as_config(OptimConfig, optim)
        self.init_config: InitConfig = as_config(InitConfig, init)
        self.adaptation: AdaptationConfig = as_config(AdaptationConfig, adaptation)
        self.validation_tasks = expand_sets(validation_tasks) if validation_tasks else []
        self.target_tasks = expand_sets(target_tasks) if target_tasks else []
        self.source_name, self.depth = source_name, depth
        self.episodes, self.support_size, self.query_size = episodes, support_size, query_size
        self.learning_rate, self.rate_factor = learning_rate, rate_factor
        self.init_seed, self.seed = init_seed, seed
        self.keys: list[Key] = []
        if algorithm not in get_args(Algorithm):
            raise ValueError(
                f"model.algorithm is {algorithm!r}; allowed: {', '.join(get_args(Algorithm))}"
            )
        if depth is not None and (depth < 0 or algorithm != "maml"):
            raise ValueError(
                f"model.depth is {depth} for {algorithm}: it is of maml, 0 or more inner steps, or "
                "null for all"
            )
        if self.inner.learned != "fixed" and algorithm not in ("maml", "fomaml"):
            raise ValueError(
                f"model.inner.learned is {self.inner.learned}, but {algorithm} has no query loss "
                "to learn an inner learning rate from: use maml or fomaml, or fixed"
            )
        config = self.backbone_config
        given = (config.attention != "flash_attention_2", not config.compile, config.dtype)
        if self.second_order and given != (True, True, "float32"):
            raise ValueError(
                f"maml differentiates the backbone twice, but model.backbone has attention "
                f"{config.attention}, compile {config.compile} and dtype {config.dtype}, which is "
                "not exact enough or not possible: use sdpa or eager, no compile and float32, or "
                "model.algorithm fomaml"
            )

    @property
    def second_order(self) -> bool:
        """Whether Hessians are taken."""
        return self.algorithm == "maml" and self.depth != 0

    # ---- what is trained ------------------------------------------------------------------------

    def check_trainer(self) -> None:
        super().check_trainer()
        if self.trainer.precision == "bf16-mixed" and self.second_order:
            self.warn_once(
                "bf16",
                "maml with trainer.precision bf16-mixed: exact enough for small inner learning "
                "rates; with large ones the second-order part may point elsewhere",
            )
        if self._fitting and self.trainer.world_size > self.episodes:
            self.warn_once(
                "ranks",
                f"model.episodes is {self.episodes} on {self.trainer.world_size} processes: some "
                "have nothing to do; give at least as many episodes",
            )
        interval, batches = self.trainer.val_check_interval, self.trainer.accumulate_grad_batches
        if isinstance(interval, int) and interval % batches:
            raise ValueError(
                f"trainer.val_check_interval {interval} counts meta-batches: it must be a multiple "
                f"of trainer.accumulate_grad_batches ({batches})"
            )

    def take(self, data: PromptDataModule, fitting: bool = True) -> None:
        """As every method's; the prompt is learned on other tasks than it is scored on."""
        keys = [(task, sample) for task in self._sources(data) for sample in data.samples]
        if fitting and self.is_built and keys != self.keys:
            self.is_built = False
        if fitting or not self.keys:
            self.keys = keys
        super().take(data, fitting)
        if not fitting and not self.runs:
            raise ValueError(
                "there is nothing to score without model.validation_tasks: name some of "
                "data.tasks there, or tune prompts from prompt.safetensors with PromptTuning"
            )

    def make_runs(self, data: PromptDataModule) -> list[Run]:
        config = self.adaptation
        return [
            Run(task, sample, self.init_seed, config.learning_rate, config.batch_size)
            for task in self.validation_tasks
            for sample in data.samples
        ]

    def build(self, backbone: Backbone, runs: Sequence[Run]) -> None:
        size = (self.num_virtual_tokens, backbone.hidden_size)
        self.prompt = nn.Parameter(torch.zeros(1, *size))
        width = {"fixed": 0, "shared": 1, "per_token": self.num_virtual_tokens}[self.inner.learned]
        self.log_rate = nn.Parameter(torch.zeros(1, width)) if width else None
        self.register_buffer("init", torch.zeros(1, *size))
        self.register_buffer("moves", torch.ones(1, dtype=torch.bool))
        self.register_buffer("sums", torch.zeros(len(SUMS), dtype=torch.float64))
        self.register_buffer("skipped", torch.tensor(0))
        self.register_buffer("skipped_in_row", torch.tensor(0))
        self.register_buffer("adapted", torch.zeros(len(runs), *size), persistent=False)
        self.starts = [Start("")]

    @torch.no_grad()
    def start(self, data: PromptDataModule) -> None:
        alone = Run("", 0, self.init_seed, self.learning_rate, 1)
        made, self.starts = self.initial_prompts(data, [alone])
        self.prompt.copy_(made)
        self.init.copy_(made)

    def bank(self) -> Tensor:
        return self.prompt

    def _sources(self, data: PromptDataModule) -> list[str]:
        sources = hold_out(data.tasks, "validation_tasks", self.validation_tasks)
        if both := [task for task in data.tasks if task in self.target_tasks]:
            raise ValueError(
                f"{some(both)}: in data.tasks and in model.target_tasks; a target task is not "
                "learned from, so leave it out of one of them"
            )
        return sources

    @property
    def rate(self) -> Tensor:
        """The inner learning rate: () or (N, 1)."""
        if self.log_rate is None:
            return self.prompt.new_full((), self.inner.learning_rate)
        rate = self.inner.learning_rate * self.log_rate.detach().exp()
        return rate[0, 0] if rate.numel() == 1 else rate[0, :, None]

    def configure_optimizers(self) -> Any:
        learned = [] if self.log_rate is None else [self.log_rate]
        factors = [1.0, *[self.rate_factor] * len(learned)]
        given = ([self.learning_rate], self.moves, self.total_steps, factors)
        return self.optim_config.build([self.prompt, *learned], *given)

    def draw(self, data: PromptDataModule) -> Draw:
        support = {key: data.tokens(*key, "train") for key in self.keys}
        query = {key: data.tokens(*key, "dev") for key in self.keys}
        sides = (("train", support, self.support_size), ("dev", query, self.query_size))
        if small := [
            f"{task} {sample} ({len(rows[task, sample])} {split} rows)"
            for task, sample in self.keys
            for split, rows, size in sides
            if len(rows[task, sample]) < size
        ]:
            raise ValueError(
                f"too few rows for model.support_size {self.support_size} and model.query_size "
                f"{self.query_size}: {some(small)}; lower them, or leave these tasks out"
            )
        sizes = (self.episodes, self.inner.steps, self.support_size, self.query_size)
        return episode_draw(support, query, *sizes, self.seed, data.layout, self.row_share)

    # ---- training -------------------------------------------------------------------------------

    def training_step(self, batch: Episodes, batch_idx: int) -> Tensor:
        """A loss whose gradient is the mean meta-gradient over all episodes of the step.

        A step with an episode whose loss or gradient is not finite, or whose inner loop runs far
        away, is skipped: neither the prompt nor the optimizer's state moves.
        """
        rate, scale = self.rate, self.trainer.world_size / self.episodes
        found, finite = None, self.moves.new_ones(1)
        gradient, value = torch.zeros_like(self.prompt), self.prompt.new_zeros(())
        of_rate = None if self.log_rate is None else torch.zeros_like(self.log_rate)
        if batch.keys:
            found = self.meta_gradient(batch, rate)
            finite = (found.finite() & (found.moved <= MOST_MOVED)).all(0, keepdim=True)
            gradient = found.gradient.sum(0, keepdim=True) * scale
            value = found.losses.sum() * scale
            if of_rate is not None and found.rate_gradient is not None:
                finite = finite & found.rate_gradient.isfinite().all()
                of_rate = (found.rate_gradient * rate).reshape(of_rate.shape) * scale
        finite = self.finite_everywhere(finite)
        place = batch_idx % self.trainer.accumulate_grad_batches
        self.moves.copy_(self.moves & finite if place else finite)
        self._count(found, finite, is_last=place + 1 == self.trainer.accumulate_grad_batches)
        loss = with_gradient(value, self.prompt, torch.where(finite, gradient, 0))
        if self.log_rate is not None and of_rate is not None:
            of_rate = torch.where(finite, of_rate, 0)
            loss = loss + with_gradient(value.new_zeros(()), self.log_rate, of_rate)
        return loss

    def meta_gradient(self, episodes: Episodes, rate: Tensor) -> MetaGradient:
        """Meta-gradients of this process's episodes, at an inner rate of () or (N, 1)."""
        backbone, parts = self.backbone, [*episodes.support, episodes.query]
        start = self.prompt.detach().expand(len(episodes.keys), -1, -1).contiguous()
        if self.algorithm == "multitask":  # the mean of the parts' losses is that over all rows
            mean = sum(map(len, parts)) / len(parts)
            parts = [replace(part, weight=part.weight * (len(part) / mean)) for part in parts]

        def made(tokens: int) -> MetaGradient:
            told = [BankObjective(backbone, part, tokens, self.label_smoothing) for part in parts]
            *support, query = told
            if self.algorithm == "multitask":
                return multitask(start, told)
            if self.algorithm == "reptile":
                return reptile(start, support, self.inner, rate)
            depth = 0 if self.algorithm == "fomaml" else self.depth
            return maml(start, support, query, self.inner, rate, depth)

        def longest(part: Batch) -> int:
            return part.input_lengths[0] + part.target_lengths[0]

        return self.within_memory(max(parts, key=longest), made)

    def _count(self, found: MetaGradient | None, finite: Tensor, is_last: bool) -> None:
        values = self.sums.new_zeros(len(SUMS))
        if found is not None:
            improved = found.losses.new_zeros(())
            if len(found.support_losses) > 1:
                improved = (found.support_losses[-1] < found.support_losses[0]).sum()
            episodes = [found.losses.sum(), found.second_order.sum(), found.moved.sum(), improved]
            values[:4] = torch.stack([value.double() for value in episodes]) / self.episodes
        values = torch.where(finite, values, 0)
        skipped = ~self.moves[0] & is_last  # the step, that is all its meta-batches
        if self.trainer.is_global_zero:
            values[4] += finite[0]
            values[5] += skipped
        self.sums += values
        self.skipped += skipped
        if is_last:
            self.skipped_in_row.copy_(torch.where(skipped, self.skipped_in_row + 1, 0))

    def on_train_batch_end(self, outputs: Any, batch: Episodes, batch_idx: int) -> None:
        """As every method's; end a fit whose steps are skipped one after another."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        batches = self.trainer.accumulate_grad_batches
        if (batch_idx + 1) % (MOST_SKIPPED * batches) or int(self.skipped_in_row) < MOST_SKIPPED:
            return
        message = (
            f"step {self.trainer.global_step}: the last {int(self.skipped_in_row)} steps "
            "were skipped, since a loss or gradient was not finite or the inner loop ran far away "
            f"(over {MOST_MOVED:.0f} times the prompt's norm); training ends. The inner loop "
            f"diverges at model.inner.learning_rate {self.inner.learning_rate:g}: lower it, or "
            "model.inner.steps"
        )
        never = int(self.skipped) * batches > batch_idx
        if int(self.keeper.step) < 0 or never:
            raise ValueError(message)
        rank_zero_warn(f"{message}; the prompt of step {int(self.keeper.step)} is kept")
        self.trainer.should_stop = True

    # ---- validation -----------------------------------------------------------------------------

    def adapt(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt (1, N, D), tuned on the train rows of every validation run, side by side.

        Returns the prompts (R, N, D), and how far each moved relative to its start (R,).
        """
        runs, config, trainer = self.runs, self.adaptation, self.trainer
        if not runs:
            return prompt.new_zeros(0, *prompt.shape[1:]), prompt.new_zeros(0)
        with torch.inference_mode(False), torch.enable_grad():
            bank = nn.Parameter(prompt.detach().clone().expand(len(runs), -1, -1).contiguous())
            active = torch.ones(len(runs), dtype=torch.bool, device=bank.device)
            rates = [config.learning_rate] * len(runs)
            optimizer = config.optim.build([bank], rates, active, max(1, config.steps))
            everyone, drawn = list(range(len(runs))), super().draw(self.datamodule)
            for step in range(config.steps):
                batch = drawn.batch(step, everyone).to(bank.device)
                with trainer.precision_plugin.forward_context():
                    _, gradient = self.bank_gradient(bank, batch)
                gradient = self.over_ranks(gradient)
                active &= gradient.flatten(1).isfinite().all(1)
                bank.grad = torch.where(active[:, None, None], gradient, 0)
                optimizer.step()
            made = bank.detach()
        moved = (made - prompt).flatten(1).norm(dim=1) / prompt.norm().clamp(min=1e-12)
        return made, moved

    def prefixes(self, current: bool) -> Prefixes:
        if not self.trainer.sanity_checking:
            made, self._moved = self.adapt(self.prompt if current else self.best)
            self.adapted.copy_(made)
        return Prefixes(self.backbone, self.adapted)

    def _means(self) -> dict[str, float]:
        sums = dict(zip(SUMS, self.over_ranks(self.sums).tolist(), strict=True))
        count = max(1.0, sums["batches"])
        return {name: sums[name] / count for name in SUMS[:4]} | {n: sums[n] for n in SUMS[4:]}

    def mean_losses(self) -> Tensor:
        return torch.full((len(self.line_names()),), self._means()["loss"], dtype=torch.float64)

    def line_names(self) -> list[str]:
        """A line per validation run, or one for the prompt where there are none."""
        return super().line_names() or [self.algorithm]

    def logged(self, scores: Tensor) -> dict[str, float]:
        means, step = self._means(), self.trainer.global_step
        if means["skipped"]:
            rank_zero_warn(
                f"step {step}: skipped {means['skipped']:.0f} of the steps since the last "
                f"evaluation, {int(self.skipped)} in all: a loss or gradient was not finite, or "
                "the inner loop ran far away. A lower model.inner.learning_rate may help"
            )
        has_loop = self.algorithm != "multitask" and means["batches"] > 0
        if has_loop and self.inner.steps > 1 and means["improved"] < 0.25:
            self.warn_once(
                "worse",
                f"step {step}: in {1 - means['improved']:.0%} of the episodes the support loss "
                "rose within the inner loop; a lower model.inner.learning_rate may help",
            )
        if has_loop and means["inner_moved"] < 1e-4:
            rows = "support" if self.algorithm == "reptile" else "query"
            self.warn_once(
                "still",
                f"step {step}: the inner loop moves the prompt by {means['inner_moved']:.1e} of "
                f"its norm, so {self.algorithm} is hardly different from multi-task learning on "
                f"the {rows} rows; prompts usually need inner learning rates of 0.1 and more "
                "(model.inner.learning_rate)",
            )
        return {
            **{f"meta/{name}": means[name] for name in ("second_order", "inner_moved")},
            "meta/skipped": float(self.skipped),
            "meta/inner_learning_rate": self.rate.mean().item(),
            "meta/moved": self.moved()[0],
        }

    def curve(self) -> dict[str, list[Any]]:
        return {"moved": self._moved.tolist()}

    def curve_lines(
        self, losses: list[float], scores: Tensor, lines: list[int]
    ) -> list[dict[str, Any]]:
        means = self._means()
        more = {name: means[name] for name in ("second_order", "inner_moved")}
        more["skipped"] = int(self.skipped)
        if self.runs:
            return [row | more for row in super().curve_lines(losses, scores, lines)]
        line = {"step": self.trainer.global_step, "run": self.algorithm, "train_loss": losses[0]}
        line |= {"best_step": int(self.keeper.step), "moved": self.moved()[0]}
        return [{**line, **more, "status": STATUS[int(self.status)]}]

    def after_evaluation(self, scores: Tensor, lines: list[int]) -> None:
        self.sums.zero_()

    # ---- files ----------------------------------------------------------------------------------

    def write(self) -> None:
        if self.trainer.is_global_zero:
            save_prompt(self.prompt_path, self.learned_prompt())

    @property
    def prompt_path(self) -> Path:
        """The file of the learned prompt."""
        return self.file("prompt.safetensors")

    @property
    def source_set(self) -> str:
        """What to call the source tasks."""
        if self.source_name is not None:
            return self.source_name
        given = [name for name in self.datamodule.given_tasks if name not in self.validation_tasks]
        sets = [name for name in given if expand_sets([name]) != self.validation_tasks]
        count = len(self.source_tasks)
        if len(sets) != 1:
            return f"{count} tasks"
        part = "" if count == len(expand_sets(sets)) else f"{count} of "
        return f"{part}{sets[0]}"

    @property
    def role(self) -> str:
        """What the learned prompt is to others that start from it."""
        return "multitask" if self.algorithm == "multitask" else "meta"

    @property
    def source_tasks(self) -> list[str]:
        """The tasks that the prompt is learned on."""
        return list(dict.fromkeys(task for task, _ in self.keys))

    def learned_prompt(self) -> Prompt:
        """The prompt of the best evaluation, ready to be stored."""
        from prompt_lab import __version__

        diverged = int(self.skipped_in_row) >= MOST_SKIPPED
        return Prompt(
            prompt=self.best[0].detach().cpu(),
            init=self.init[0].detach().cpu(),
            name="prompt",
            **self.origin(0),
            **asdict(self.starts[0]),
            init_seed=self.init_seed,
            order_seed=self.seed,
            learning_rate=self.learning_rate,
            batch_size=self.episodes,
            status="stopped: diverged" if diverged else "finished",
            max_input_length=self.datamodule.max_input_length,
            task_prefix=self.datamodule.task_prefix,
            template=self.datamodule.template,
            system=self.datamodule.system,
            version=__version__,
            role=self.role,
            source_tasks=self.source_tasks,
            source_set=self.source_set,
        )

    def restore(self) -> None:
        saved = load_prompt(self.prompt_path, self.backbone)
        self.check_shape(saved, self.prompt_path)
        self.best[0], self.init[0] = saved.prompt, saved.init
        self.keeper.restore(0, saved.steps or 0, saved.dev_score)
        self.seconds = saved.seconds or 0.0

    def on_test_start(self) -> None:
        super().on_test_start()
        if self.keeper.dev.isnan().all():  # the learned prompt is from its file
            found = self.answer_all("dev", self.evaluated, self._prefixes)
            self.keeper.dev.copy_(found.scores())

    def best_prompts(self, test_scores: Tensor | None = None) -> list[Prompt]:
        dev = self.keeper.dev.tolist()
        return [
            self.stored_prompt(
                self.runs[i],
                self.adapted[i],
                self.best[0],
                dev[i],
                None if test_scores is None else test_scores[i].item(),
                start=self.role,
                start_of=self.source_set,
                start_seed=self.init_seed,
                start_file=self.prompt_path.name if self.run_dir else "",
                steps=int(self.keeper.step),
            )
            for i in self.evaluated
        ]

    # ---- identity -------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        return {"items": [f"{task} {sample}" for task, sample in self.keys]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.keys:
            items = checkpoint.get("identity", {}).get("items", [])
            pairs = [item.rsplit(" ", 1) for item in items]
            self.keys = [(task, int(sample)) for task, sample in pairs]
        super().on_load_checkpoint(checkpoint)

    def result_facts(self, run: int) -> dict[str, Any]:
        return {"variant": "adapted", "optimizer": self.adaptation.optim.name}

    def summary(self) -> str:
        return (
            f"{self.algorithm} of one prompt of {self.num_virtual_tokens} virtual tokens on "
            f"{len(self.keys)} items of {len(self.source_tasks)} source tasks"
        )
