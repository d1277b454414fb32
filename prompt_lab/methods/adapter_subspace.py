"""Intrinsic tuning of adapters: ``AdapterSubspace`` finds a map, ``AdapterTuning`` tunes in it.

As intrinsic prompt tuning, with the adapters of a model in place of a prompt (Qin et al. 2021,
arXiv 2110.07867, appendix D.2). Finding trains one map, shared by all tasks, and one code V_i of I
numbers per task on the language model loss of mixed batches; with A_i the adapters of task i,

    A_i = W_2 tanh(W_1 V_i + b_1) + b_2,    L = mean over tasks of L_LM(A_i),

so nothing is projected or reconstructed, and no adapters need to be trained before. Tuning keeps
the map and trains a code per run, from a random start. Both are :class:`PromptTuning` on an
:class:`AdaptedBackbone`, whose bank holds adapters.

The authors' code has one code for all tasks and a linear map without bias (``inner_size`` null is
that but for the bias); here every task has its own code, as in the paper. Left out: adapters
trained without a map, random maps, several I at once.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from prompt_lab.core.adapters import AdaptedBackbone
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.optim import OptimConfig, adamw_with_warmup, check_warmup_and_clip
from prompt_lab.core.subspace import AdapterMap, Subspace
from prompt_lab.data.crossfit import CrossFitDataModule
from prompt_lab.files.results import Start
from prompt_lab.files.tensors import load_network, save_network
from prompt_lab.methods.prompt_method import BackboneConfig, PromptMethod
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.subspace_tuning import initial_codes


class _AdapterMethod(PromptTuning):
    """What finding and tuning share: a map to adapters, codes, and a backbone that takes them."""

    std: float

    def plain_backbone(self) -> Backbone:
        """The backbone without adapters.

        Raises:
            ValueError: as :meth:`BackboneConfig.load`; or a way to run it that adapters do not fit.
        """
        config = self.backbone_config
        if config.gradient_checkpointing or config.compile:
            raise ValueError(
                "model.backbone.gradient_checkpointing and model.backbone.compile do not go with "
                "adapters, which are put into each forward pass: leave both false"
            )
        return self.backbone or config.load()

    @property
    def map(self) -> Subspace:
        """The map from codes to adapters."""
        assert self.subspace is not None
        return self.subspace

    @property
    def variant(self) -> str:
        """Name of what is trained, in the results."""
        return "adapter_subspace"

    def summary(self) -> str:
        """What is trained, in a few words."""
        return (
            f"{len(self.all_runs)} codes of {self.map.intrinsic_dim} numbers for "
            f"{self.map.hidden_size:,} adapter weights"
        )


class AdapterTuning(_AdapterMethod):
    """Trains a bank of codes in a map to adapters, and keeps the best of each run by its dev score.

    Grid, budget and evaluations are those of :class:`PromptTuning`; a run trains I numbers. Its
    prompt file holds a set of adapters, (1, P), and its code.

    Args:
        adapters: file that AdapterSubspace wrote.
        backbone: which frozen model.
        optim: optimizer, schedule and clip of every run.
        std: standard deviation of the initial codes, 0.02 in the authors' code.
        init_seed: seed or seeds of the initial code.
        learning_rate: peak learning rate or rates.
        batch_size: rows per step and run, one value or several.
        label_smoothing: share of each target's probability spread over the vocabulary.
        patience: stop a run after so many evaluations without a better dev score; null for never.
        test_baselines: ``test`` also scores no adapters, the initial ones, chance and majority.
        tokens_per_forward: most padded tokens of one forward pass; bounds memory, not results.
        decoding: as for PromptTuning.
        num_beams: beams of generated answers; 1 is greedy.
        max_new_tokens: longest generated answer; null for the longest answer in train and dev.
        metric_variant: ``crossfit`` computes metrics as CrossFit does, ``corrected`` without traps.
    """

    def __init__(
        self,
        adapters: str,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008
        optim: OptimConfig = OptimConfig(),  # noqa: B008
        std: float = 0.02,
        init_seed: int | list[int] = 0,
        learning_rate: float | list[float] = 0.03,
        batch_size: int | list[int] = 8,
        label_smoothing: float = 0.0,
        patience: int | None = None,
        test_baselines: bool = False,
        tokens_per_forward: int | None = None,
        decoding: Literal["score", "generate"] = "score",
        num_beams: int = 1,
        max_new_tokens: int | None = None,
        metric_variant: Literal["crossfit", "corrected"] = "crossfit",
    ) -> None:
        super().__init__(
            backbone=backbone,
            optim=optim,
            init_seed=init_seed,
            learning_rate=learning_rate,
            batch_size=batch_size,
            label_smoothing=label_smoothing,
            patience=patience,
            test_baselines=test_baselines,
            tokens_per_forward=tokens_per_forward,
            decoding=decoding,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            metric_variant=metric_variant,
        )
        _check_std(std)
        self.adapters, self.std = adapters, std
        self.num_virtual_tokens = 0

    def load_backbone(self, data: CrossFitDataModule) -> Backbone:
        """Load map and backbone, once, and let the data be tokenised by the backbone's rules."""
        if not isinstance(self.backbone, AdaptedBackbone):
            plain = self.plain_backbone()
            self.subspace = load_network(self.adapters, AdapterMap, plain)
            self.backbone = AdaptedBackbone(plain, self.subspace.metadata["bottleneck"])
        return super().load_backbone(data)

    def _make_bank(self, backbone: Backbone, data: CrossFitDataModule, anew: bool) -> Tensor:
        """Make the codes; returns the initial adapters (R, 1, P)."""
        self.prompt = None
        self.starts = [Start("codes", start_seed=run.init_seed) for run in self.runs]
        self.code = nn.Parameter(initial_codes(self.runs, self.map.intrinsic_dim, self.std))
        return self.bank().detach()


class AdapterSubspace(_AdapterMethod):
    """Trains a map to adapters, and a code per task and sample, on the data of many tasks.

    Every step takes rows of all tasks, each counting alike, each row under the adapters of its own
    task. The map with the best mean dev score over the tasks goes to ``adapters_<I>.safetensors``
    in the run folder, and ``test`` scores that step's adapters; unseen tasks have no code here, so
    their results come from :class:`AdapterTuning`. ``trainer.max_steps`` is the budget and
    ``trainer.val_check_interval`` the number of steps between evaluations.

    Memory: the map has P * (H + 1) + H * (I + 1) numbers, and training keeps five of each (weight,
    gradient, two moments, best). For bart-base with r = 16, P is 589,824, and H = 768 makes 9 GB of
    that; H = 64 makes 0.8 GB. A checkpoint holds four of the five; the file of the map one.

    Args:
        backbone: which frozen model.
        intrinsic_dim: I.
        inner_size: H, width of the layer within the map; null for none, a linear map.
        bottleneck: r of every adapter.
        std: standard deviation of the initial codes.
        learning_rate: peak learning rate of AdamW, for map and codes.
        warmup: share of the steps in which the learning rate rises; it then falls linearly to zero.
        clip: largest gradient norm over map and codes, or null for none.
        batch_size: rows of a step.
        label_smoothing: share of each target's probability spread over the vocabulary.
        seed: of the initial map and codes and of the order of rows.
        tokens_per_forward: most padded tokens of one forward pass; bounds memory, not results.
        decoding: as for PromptTuning.
        num_beams: beams of generated answers; 1 is greedy.
        max_new_tokens: longest generated answer; null for the longest answer in train and dev.
        metric_variant: ``crossfit`` computes metrics as CrossFit does, ``corrected`` without traps.
    """

    frozen = ("backbone.",)
    independent_runs = False

    def __init__(
        self,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008
        intrinsic_dim: int = 100,
        inner_size: int | None = 768,
        bottleneck: int = 16,
        std: float = 0.02,
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
            backbone=backbone,
            init_seed=seed,
            learning_rate=learning_rate,
            batch_size=batch_size,
            label_smoothing=label_smoothing,
            tokens_per_forward=tokens_per_forward,
            decoding=decoding,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            metric_variant=metric_variant,
        )
        sizes = {"intrinsic_dim": intrinsic_dim, "inner_size": inner_size, "bottleneck": bottleneck}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"model.{name} is {size}: give at least 1")
        check_warmup_and_clip(warmup, clip)
        _check_std(std)
        self.intrinsic_dim, self.inner_size, self.bottleneck = intrinsic_dim, inner_size, bottleneck
        self.std, self.warmup, self.clip, self.seed = std, warmup, clip, seed
        self.num_virtual_tokens = 0

    # ---- set-up ---------------------------------------------------------------------------------

    def describe_fit(self, data: CrossFitDataModule, trainer: Trainer) -> str:
        """There is no grid to tell of: see :meth:`PromptMethod.describe_fit`."""
        return PromptMethod.describe_fit(self, data, trainer)

    def load_backbone(self, data: CrossFitDataModule) -> Backbone:
        """Load the backbone, once, and let the data be tokenised by its rules."""
        if not isinstance(self.backbone, AdaptedBackbone):
            self.backbone = AdaptedBackbone(self.plain_backbone(), self.bottleneck)
        return super().load_backbone(data)

    def _make_bank(self, backbone: Backbone, data: CrossFitDataModule, anew: bool) -> Tensor:
        """Make map and codes; returns the initial adapters (R, 1, P)."""
        self.prompt = None
        self.starts = [Start("codes", start_seed=self.seed)] * len(self.runs)
        self.subspace = AdapterMap(
            backbone.hidden_size, self.intrinsic_dim, self.inner_size, self.seed
        )
        self.best_map = copy.deepcopy(self.subspace).requires_grad_(False)
        generator = torch.Generator().manual_seed(self.seed)
        codes = torch.randn(len(self.runs), self.intrinsic_dim, generator=generator)
        self.code = nn.Parameter(codes * self.std)
        return self.bank().detach()

    def configure_optimizers(self) -> Any:
        """AdamW over map and codes; the learning rate rises, then falls linearly to zero."""
        trained = [*self.map.parameters(), self.trained]
        groups = [{"params": trained, "lr": self.learning_rates[0]}]
        return adamw_with_warmup(groups, self.warmup, self.trainer.max_steps)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip the gradient over map and codes."""
        if self.clip is not None:
            nn.utils.clip_grad_norm_([*self.map.parameters(), self.trained], self.clip)

    def train_steps(self) -> Any:
        """The batch of every step: rows of all tasks, mixed."""
        trainer, data = self.trainer, self.datamodule
        rows = data.rows_of(self.runs, "train")
        self.check_lengths(rows.values(), self.num_virtual_tokens)
        return data.mixture_steps(
            list(rows),
            "tasks",
            self.batch_sizes[0],
            self.seed,
            trainer.max_steps,
            lambda: trainer.global_step,
            trainer.global_rank,
            trainer.world_size,
        )

    # ---- evaluation -----------------------------------------------------------------------------

    def _keep_better(self, scores: Tensor) -> None:
        """Keep map, codes and adapters of a better mean dev score; ties keep the earlier."""
        ranked = scores.nan_to_num(nan=-torch.inf)
        if int(self.best_step.max()) >= 0 and not bool(ranked.mean() > self.best_score.mean()):
            return
        self.best_score.copy_(ranked)
        self.best_step.fill_(self.trainer.global_step)
        self.best.copy_(self.bank().detach())
        assert self.best_code is not None
        self.best_code.copy_(self.trained.detach())
        self.best_map.load_state_dict(self.map.state_dict())

    def _log_evaluation(self, scores: Tensor) -> None:
        """Log as PromptTuning; a task has 1 / R of the rows, which its loss is scaled to."""
        self.loss_sum *= len(self.runs)
        super()._log_evaluation(scores)

    def on_train_end(self) -> None:
        """Write the best map, and the adapters of every task."""
        if self.trainer.is_global_zero:
            self._write_map()
        super().on_train_end()

    def _write_map(self) -> None:
        """Write the file of the best map."""
        backbone = self.backbone
        assert backbone is not None
        metadata = {
            "backbone": backbone.name,
            "backbone_digest": backbone.digest,
            "tokenizer_digest": backbone.tokenizer_digest,
            "bottleneck": self.bottleneck,
            "source_tasks": list(self.datamodule.tasks),
            "samples": self.datamodule.samples,
            "seed": self.seed,
            "steps": int(self.best_step[0]),
            "dev_score": float(self.best_score.mean()),
        }
        save_network(self.map_path, self.best_map, metadata)

    @property
    def map_path(self) -> Path:
        """The file of the map."""
        return self.run_dir / f"adapters_{self.intrinsic_dim}.safetensors"

    # ---- identity -------------------------------------------------------------------------------

    def _subspace_digest(self) -> None:
        """None: the map is what is trained."""


def _check_std(std: float) -> None:
    """Refuse a spread below 0.

    Raises:
        ValueError: naming it.
    """
    if std < 0:
        raise ValueError(f"model.std is {std}: give 0 or more")
