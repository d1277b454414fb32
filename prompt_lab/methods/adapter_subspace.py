"""Intrinsic tuning of adapters: ``AdapterSubspace`` finds a map, ``AdapterTuning`` tunes in it.

As intrinsic prompt tuning, with the adapters of a model in place of a prompt (Qin et al. 2021,
arXiv 2110.07867, appendix D.2). Finding trains one map, shared by all tasks, and one code V_i of I
numbers per task on the language model loss of mixed batches; with A_i the adapters of task i,

    A_i = W_2 tanh(W_1 V_i + b_1) + b_2,    L = mean over tasks of L_LM(A_i),

so no adapters need to be trained before. Tuning keeps the map and trains a code per run, from a
random start. Both are :class:`PromptTuning` on an :class:`AdaptedBackbone`, whose bank holds
adapters. The authors' code has one code for all tasks and a linear map without bias (``inner_size``
null is that but for the bias); here every task has its own code, as in the paper.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prompt_lab.core.adapters import AdaptedBackbone
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.optim import OptimConfig, adamw_with_warmup
from prompt_lab.core.run import Run
from prompt_lab.core.subspace import AdapterMap, Subspace
from prompt_lab.data.datamodule import PromptDataModule
from prompt_lab.data.sampling import Draw, mixture_draw
from prompt_lab.files.results import Start
from prompt_lab.files.tensors import load_network, save_network
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.starts import InitConfig, initial_codes


class _AdapterMethod(PromptTuning):
    """What finding and tuning share: a map to adapters, codes, and a backbone that takes them."""

    std: float
    intrinsic_dim: int

    def plain_backbone(self) -> Backbone:
        """The backbone without adapters; a ``ValueError`` for a way to run it that does not fit."""
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

    def build(self, backbone: Backbone, runs: Sequence[Run]) -> None:
        self.prompt = None
        self.code = nn.Parameter(torch.zeros(len(runs), self.map.intrinsic_dim))
        self.register_buffer("init", torch.zeros(len(runs), 1, backbone.hidden_size))

    @property
    def variant(self) -> str:
        return "adapter_subspace"

    def summary(self) -> str:
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
        std: standard deviation of the initial codes, 0.02 in the authors' code.
        learning_rate: peak learning rate or rates.
        kwargs: optim, init_seed, batch_size, patience and test_baselines, as
            :class:`PromptTuning`, and the arguments of :class:`PromptMethod`.
    """

    fixed = ("init", "subspace", "num_virtual_tokens", "save_steps")

    def __init__(
        self,
        adapters: str,
        std: float = 0.02,
        learning_rate: float | list[float] = 0.03,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            init=InitConfig(),
            subspace=None,
            num_virtual_tokens=1,
            save_steps=[],
            learning_rate=learning_rate,
            **kwargs,
        )
        self.adapters, self.std, self.num_virtual_tokens = adapters, std, 0

    def load_backbone(self) -> Backbone:
        if not isinstance(self.backbone, AdaptedBackbone):
            plain = self.plain_backbone()
            self.subspace = load_network(self.adapters, AdapterMap, plain)
            return AdaptedBackbone(plain, self.subspace.metadata["bottleneck"])
        return self.backbone

    @torch.no_grad()
    def start(self, data: PromptDataModule) -> None:
        self.starts = [Start("codes", start_seed=run.init_seed) for run in self.runs]
        self.trained.copy_(initial_codes(self.runs, self.map.intrinsic_dim, self.std))
        self.init.copy_(self.bank())


class AdapterSubspace(_AdapterMethod):
    """Trains a map to adapters, and a code per task and sample, on the data of many tasks.

    Every step takes rows of all tasks, each counting alike, each row under the adapters of its own
    task. The map with the best mean dev score over the tasks goes to ``adapters_<I>.safetensors``
    in the run folder, and ``test`` scores that step's adapters; unseen tasks have no code here, so
    their results come from :class:`AdapterTuning`. The map has P * (H + 1) + H * (I + 1) numbers,
    and training keeps five of each: for bart-base with r = 16, H = 768 takes 9 GB, H = 64 0.8 GB.

    Args:
        intrinsic_dim: I.
        inner_size: H, width of the layer within the map; null for none, a linear map.
        bottleneck: r of every adapter.
        std: standard deviation of the initial codes.
        learning_rate: peak learning rate of AdamW, for map and codes.
        warmup: share of the steps in which the learning rate rises; it then falls linearly to zero.
        clip: largest gradient norm over map and codes, or null for none.
        batch_size: rows of a step.
        seed: of the initial map and codes and of the order of rows.
        kwargs: the arguments of :class:`PromptMethod`.
    """

    frozen = ("backbone.",)
    joint = True
    shares_runs = False
    fixed = (
        *("optim", "init", "subspace", "num_virtual_tokens", "init_seed", "patience"),
        *("save_steps", "test_baselines"),
    )

    def __init__(
        self,
        intrinsic_dim: int = 100,
        inner_size: int | None = 768,
        bottleneck: int = 16,
        std: float = 0.02,
        learning_rate: float = 1e-3,
        warmup: float = 0.06,
        clip: float | None = 0.1,
        batch_size: int = 64,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            optim=OptimConfig(),
            init=InitConfig(),
            subspace=None,
            num_virtual_tokens=1,
            init_seed=seed,
            learning_rate=learning_rate,
            batch_size=batch_size,
            patience=None,
            save_steps=[],
            test_baselines=False,
            **kwargs,
        )
        self.std, self.num_virtual_tokens = std, 0
        self.intrinsic_dim, self.inner_size, self.bottleneck = intrinsic_dim, inner_size, bottleneck
        self.warmup, self.clip, self.seed = warmup, clip, seed

    def load_backbone(self) -> Backbone:
        if isinstance(self.backbone, AdaptedBackbone):
            return self.backbone
        return AdaptedBackbone(self.plain_backbone(), self.bottleneck)

    def build(self, backbone: Backbone, runs: Sequence[Run]) -> None:
        self.subspace = AdapterMap(
            backbone.hidden_size, self.intrinsic_dim, self.inner_size, self.seed
        )
        self.best_map = copy.deepcopy(self.subspace).requires_grad_(False)
        super().build(backbone, runs)

    @torch.no_grad()
    def start(self, data: PromptDataModule) -> None:
        self.starts = [Start("codes", start_seed=self.seed)] * len(self.runs)
        generator = torch.Generator().manual_seed(self.seed)
        codes = torch.randn(len(self.runs), self.intrinsic_dim, generator=generator)
        self.trained.copy_(codes * self.std)
        self.init.copy_(self.bank())

    def keep(self, better: Tensor) -> None:
        super().keep(better)
        if bool(better):
            self.best_map.load_state_dict(self.map.state_dict())

    def configure_optimizers(self) -> Any:
        trained = [*self.map.parameters(), self.trained]
        groups = [{"params": trained, "lr": self.learning_rates[0]}]
        return adamw_with_warmup(groups, self.warmup, self.total_steps)

    def draw(self, data: PromptDataModule) -> Draw:
        given = ("tasks", self.batch_sizes[0], self.seed)
        return mixture_draw(self.train_rows(data), *given, data.layout, self.row_share)

    def mean_losses(self) -> Tensor:
        """A task has 1 / R of the rows, which its loss is scaled to."""
        return super().mean_losses() * len(self.runs)

    def write(self) -> None:
        if self.trainer.is_global_zero:
            metadata = {
                **self.origin(0),
                "bottleneck": self.bottleneck,
                "source_tasks": list(self.datamodule.tasks),
                "samples": self.datamodule.samples,
                "seed": self.seed,
            }
            save_network(self.map_path, self.best_map, metadata)
        super().write()

    @property
    def map_path(self) -> Path:
        """The file of the map."""
        return self.file(f"adapters_{self.intrinsic_dim}.safetensors")

    def subspace_digest(self) -> None:
        """None: the map is what is trained."""
