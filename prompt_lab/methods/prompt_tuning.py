"""``PromptTuning``: train a bank of soft prompts, each as if it were alone.

Prompt tuning (Lester et al. 2021, arXiv 2104.08691) trains an (N, D) prompt in front of a frozen
model. One fit trains a grid of runs in one (R, N, D) parameter: the loss of a step is the sum of
the runs' own mean losses, and optimizer, schedule, best prompt, early stop and failure belong to
the run. With a subspace, each run trains I numbers instead, its code, which the subspace's frozen
map turns into the prompt (intrinsic subspace tuning, Qin et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import with_gradient
from prompt_lab.core.batch import Batch
from prompt_lab.core.optim import OptimConfig
from prompt_lab.core.pretrained import weights_digest
from prompt_lab.core.run import Run, grid
from prompt_lab.core.subspace import Subspace
from prompt_lab.core.text import some
from prompt_lab.data.datamodule import PromptDataModule
from prompt_lab.files.prompts import PromptStore
from prompt_lab.files.tensors import read_metadata
from prompt_lab.methods.configs import as_config, as_list
from prompt_lab.methods.logs import warn_of_answers
from prompt_lab.methods.method import STATUS, TRAINING, PromptMethod
from prompt_lab.methods.starts import InitConfig, SubspaceConfig, initial_codes, scale_ratio


class PromptTuning(PromptMethod):
    """Trains a bank of prompts and keeps the best of each run by its dev score.

    The grid of runs is data.tasks x data.samples x init_seed x learning_rate x batch_size; with one
    value each it is ordinary prompt tuning. With ``init.source_tasks`` each of them is made once
    for every source task, from whose prompt it starts (SPoT, Vu et al. 2022). With
    ``trainer.num_sanity_val_steps`` -1 the initial prompts are scored too, as step 0.

    Args:
        optim: optimizer, schedule and clip of every run.
        init: how prompts are initialised; without effect in a subspace.
        subspace: tune inside this subspace, I numbers per run; null tunes the prompts themselves.
        init_seed: seed or seeds of the initial prompt.
        learning_rate: peak learning rate or rates.
        batch_size: rows per step and run, one value or several.
        patience: stop a run after so many evaluations without a better dev score; null for never.
        save_steps: evaluations, by their steps, whose prompts are kept as prompt stores
            ``steps/<step>`` of the run's folder, for task embeddings over the course of training.
        test_baselines: ``test`` also scores no prompt, the initial prompt, chance and majority.
        kwargs: the arguments of :class:`PromptMethod`.
    """

    shares_runs = True
    prompt: nn.Parameter | None
    code: nn.Parameter | None

    def __init__(
        self,
        *,
        optim: OptimConfig = OptimConfig(),  # noqa: B008
        init: InitConfig = InitConfig(),  # noqa: B008
        subspace: SubspaceConfig | None = None,
        init_seed: int | list[int] = 0,
        learning_rate: float | list[float] = 0.3,
        batch_size: int | list[int] = 8,
        patience: int | None = None,
        save_steps: list[int] = [],  # noqa: B006 - read only; a list so that the CLI shows it
        test_baselines: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.optim_config: OptimConfig = as_config(OptimConfig, optim)
        self.init_config: InitConfig = as_config(InitConfig, init)
        self.subspace_config: SubspaceConfig | None = as_config(SubspaceConfig, subspace)
        self.subspace: Subspace | None = None
        if self.subspace_config is not None:
            self.subspace_config.check()
        self.init_seeds, self.learning_rates = as_list(init_seed), as_list(learning_rate)
        self.batch_sizes, self.save_steps = as_list(batch_size), list(save_steps)
        self.patience, self.test_baselines = patience, test_baselines

    def setup(self, stage: str) -> None:
        """As every method's; refuse to keep the prompts of steps that are not evaluated."""
        super().setup(stage)
        every, steps = self.trainer.val_check_interval, self.trainer.max_steps
        never = [s for s in self.save_steps if isinstance(every, int) and s % every and s != steps]
        if stage == "fit" and (never or any(s < 1 or 0 < steps < s for s in self.save_steps)):
            raise ValueError(
                f"model.save_steps has {', '.join(map(str, never or self.save_steps))}, where "
                f"nothing is evaluated: give multiples of trainer.val_check_interval ({every}) up "
                f"to {steps}"
            )

    def make_runs(self, data: PromptDataModule) -> list[Run]:
        return grid(
            list(data.tasks),
            data.samples,
            self.init_seeds,
            self.learning_rates,
            self.batch_sizes,
            [""] if self.subspace_config is not None else self.init_config.sources,
        )

    def build(self, backbone: Backbone, runs: Sequence[Run]) -> None:
        """Make the bank, or codes in a subspace if it is there; the store has all a test needs."""
        config, size = self.subspace_config, (self.num_virtual_tokens, backbone.hidden_size)
        self.prompt = self.code = None
        if config is not None and config.is_there:
            self.subspace = config.load(backbone, self.num_virtual_tokens)
            self.code = nn.Parameter(torch.zeros(len(runs), self.subspace.intrinsic_dim))
        else:
            self.prompt = nn.Parameter(torch.zeros(len(runs), *size))
        self.register_buffer("init", torch.zeros(len(runs), *size))

    @torch.no_grad()
    def start(self, data: PromptDataModule) -> None:
        config = self.subspace_config
        if config is not None:
            subspace = config.load(self.backbone, self.num_virtual_tokens)
            self.starts = [config.start(run.init_seed) for run in self.runs]
            self.trained.copy_(initial_codes(self.runs, subspace.intrinsic_dim, config.std))
        else:
            init, self.starts = self.initial_prompts(data, self.runs)
            self.begin(init)
            self._warn_of_starts(data, init)
        self.init.copy_(self.bank())

    def begin(self, init: Tensor) -> None:
        """Put what is trained where it makes the initial prompts (R, N, D)."""
        self.trained.copy_(init)

    def own_parameters(self) -> list[nn.Parameter]:
        """What the optimizer changes, each (R, ...)."""
        return [self.trained]

    @property
    def trained(self) -> nn.Parameter:
        """The prompts (R, N, D), or their codes (R, I)."""
        trained = self.prompt if self.subspace is None else self.code
        assert trained is not None
        return trained

    def bank(self) -> Tensor:
        return self.trained if self.subspace is None else self.subspace.back_project(self.trained)

    def kept(self) -> dict[str, Tensor]:
        return super().kept() | ({} if self.subspace is None else {"code": self.trained})

    def configure_optimizers(self) -> Any:
        rates = [run.learning_rate for run in self.runs]
        own = self.own_parameters()
        return self.optim_config.build(own, rates, self.active, self.total_steps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of all live runs; one whose loss or gradient is not finite rests from here on."""
        bank = self.bank()
        losses, gradient = self.bank_gradient(bank, batch)
        finite = losses.isfinite() & gradient.flatten(1).isfinite().all(1)
        if self.joint:
            finite = finite.all(0, keepdim=True)
        self.active &= self.finite_everywhere(finite)
        losses = torch.where(self.active, losses, 0)
        gradient = torch.where(self.active[:, None, None], gradient, 0)
        self.loss_sum += losses
        self.loss_steps += 1
        world = self.row_share[1]
        loss = with_gradient(losses.sum() * world, bank, gradient * world)
        return loss + 0 * self.anchor if self.shares.divided else loss

    def after_evaluation(self, scores: Tensor, lines: list[int]) -> None:
        """Warn, and keep the prompts of the evaluated runs, if this is one of the steps to keep."""
        warn_of_answers(self, lines)
        step = self.trainer.global_step
        if step not in self.save_steps or not self.run_dir:
            return
        bank, dev, facts = self.bank().detach(), scores.tolist(), self.prompt_facts()
        now = {"steps": step, "status": STATUS[TRAINING], "code": None}
        kept = (
            self.stored_prompt(run, bank[i], self.init[i], dev[i], None, **(facts[i] | now))
            if i in lines
            else None
            for i, run in enumerate(self.runs)
        )
        self.save_prompts(PromptStore(self.file(f"steps/{step}")), kept)

    def prompt_facts(self) -> list[dict[str, Any]]:
        facts = super().prompt_facts()
        if "code" in self.keeper.names:
            codes = self.keeper["code"].detach().cpu()
            return [known | {"code": code} for known, code in zip(facts, codes, strict=True)]
        return facts

    def identity(self) -> dict[str, Any]:
        return {"subspace": self.subspace_digest()}

    def digests(self) -> dict[str, Any]:
        found = {**super().digests(), "subspace": self.subspace_digest()}
        if self.subspace_config is not None:  # where init is without effect
            found.pop("initial_prompts", None)
        return found

    def subspace_digest(self) -> str | None:
        """SHA-256 of the subspace's weights, or None where there is no subspace."""
        if self.subspace is None and self.subspace_config is not None:  # its file is gone
            return self.fit_record().get("digests", {}).get("subspace")
        return None if self.subspace is None else self._frozen_digest

    @cached_property
    def _frozen_digest(self) -> str:
        assert self.subspace is not None
        return weights_digest(self.subspace)

    @property
    def variant(self) -> str:
        """Name of what is trained, in the results."""
        return "tuned" if self.subspace_config is None else self.subspace_config.variant

    def result_facts(self, run: int) -> dict[str, Any]:
        has_code = "code" in self.keeper.names
        return {
            "variant": self.variant,
            "intrinsic_dim": self.keeper["code"].shape[1] if has_code else None,
            "optimizer": self.optim_config.name,
        }

    def _warn_of_starts(self, data: PromptDataModule, init: Tensor) -> None:
        ratio = scale_ratio(self.backbone, init)
        if not 1 / 3 <= ratio <= 3:
            self.warn_once(
                "scale",
                f"the initial prompts have {ratio:.3g} times the standard deviation of the "
                "backbone's embeddings; prompts off that scale often train badly (init.name vocab "
                "starts on it)",
            )
        files = {start.start_file for start in self.starts if start.start in ("meta", "multitask")}
        sources = {
            task for file in files for task in read_metadata(file, "prompt")["source_tasks"] or []
        }
        if both := [task for task in data.tasks if task in sources]:
            self.warn_once(
                "sources",
                f"the initial prompt was learned on {some(both)}, tuned here: their scores say "
                "nothing of new tasks",
            )
