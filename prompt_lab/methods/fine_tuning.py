"""``FineTuning``: the baseline that trains all weights of the backbone.

Prompt tuning is measured against it (Qin et al. 2021, arXiv 2110.07867, table 1; its settings are
those of the CrossFit gym, Ye et al. 2021). Data order, loss, metrics, curves and results are those
of a run of :class:`PromptTuning`, with no prompt in front of the rows, so that reports compare the
two. One fit trains one run, since every run needs weights of its own; ``prompt-lab sweep`` runs a
grid of fits one after another.

With ``intrinsic_dim`` the weights move in a random subspace only: theta = theta_0 + P v, with d
trained numbers v that start at zero, and a fixed random P made by the Fastfood transform
(Aghajanyan et al. 2021, arXiv 2012.13255, equations 1 and 2).

Dropout stays off, as for prompts, where the papers' fine-tuning has it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import Prefixes
from prompt_lab.core.batch import Batch
from prompt_lab.core.fastfood import FastfoodMap
from prompt_lab.core.optim import OptimConfig, schedule_factor
from prompt_lab.core.run import Run, grid
from prompt_lab.data.datamodule import PromptDataModule
from prompt_lab.files.results import Start
from prompt_lab.files.tensors import load_tensors, save_tensors
from prompt_lab.methods.configs import as_config, as_list
from prompt_lab.methods.method import PromptMethod


class FineTuning(PromptMethod):
    """Trains all weights of the backbone on one task and keeps the best by the dev score.

    Weight decay spares biases and norms. Memory: the weights, twice their size for the gradient
    (while micro-batches are summed), twice for AdamW's moments, and the best weights on the host; a
    checkpoint holds all but the gradient, ``best.safetensors``, from which ``test`` reads, the best
    weights. In a subspace these hold v instead, and memory, beside weights and gradient, the
    initial weights and 8 to 16 bytes per weight for P.

    Args:
        optim: optimizer, schedule and clip; the clip is of the norm over all that is trained.
        intrinsic_dim: d, train so many numbers of a random subspace of all weights; null trains the
            weights themselves.
        init_seed: seed of the random subspace; without one it only names the run, since training
            starts from the backbone's weights (``data.order_seed`` is what makes runs differ).
        learning_rate: peak learning rate; one value.
        batch_size: rows per step; one value.
        patience: stop after so many evaluations without a better dev score; null for never.
        kwargs: the arguments of :class:`PromptMethod`; the backbone has float32 weights.
    """

    stores_prompts = False
    fixed = ("num_virtual_tokens",)

    def __init__(
        self,
        *,
        optim: OptimConfig = OptimConfig(),  # noqa: B008
        intrinsic_dim: int | None = None,
        init_seed: int | list[int] = 0,
        learning_rate: float | list[float] = 2e-5,
        batch_size: int | list[int] = 8,
        patience: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_virtual_tokens=0, **kwargs)
        self.optim_config: OptimConfig = as_config(OptimConfig, optim)
        if self.optim_config.name == "sgd":
            raise ValueError("FineTuning has no sgd: set model.optim.name to adamw or adafactor")
        self.intrinsic_dim = intrinsic_dim
        self.init_seeds, self.learning_rates = as_list(init_seed), as_list(learning_rate)
        self.batch_sizes = as_list(batch_size)
        self.patience = patience
        self.frozen = () if intrinsic_dim is None else ("backbone.",)
        self.weights: dict[str, nn.Parameter] = {}  # the backbone's, tied ones once
        self.trained: dict[str, nn.Parameter] = {}  # what the optimizer changes
        self.best_weights: dict[str, Tensor] = {}  # a copy of that on the host, at the best step

    def make_runs(self, data: PromptDataModule) -> list[Run]:
        axes = {
            "data.tasks": list(data.tasks),
            "data.samples": data.samples,
            "model.init_seed": self.init_seeds,
            "model.learning_rate": self.learning_rates,
            "model.batch_size": self.batch_sizes,
        }
        if many := [f"{name} has {len(own)}" for name, own in axes.items() if len(own) > 1]:
            raise ValueError(
                f"FineTuning trains one run per fit, but {', '.join(many)} values: give one of "
                "each, and run the grid one after another with prompt-lab sweep"
            )
        return grid(*axes.values())

    def build(self, backbone: Backbone, runs: Sequence[Run]) -> None:
        backbone.unfreeze()
        self.weights = dict(backbone.model.named_parameters())
        self.trained = self.weights
        if self.intrinsic_dim is not None:
            sizes = {name: weight.numel() for name, weight in self.weights.items()}
            self.fastfood = FastfoodMap(sizes, self.intrinsic_dim, runs[0].init_seed)
            self.code = nn.Parameter(torch.zeros(self.intrinsic_dim, dtype=backbone.model.dtype))
            for at, weight in enumerate(self.weights.values()):  # no checkpoint need hold these
                self.register_buffer(f"initial_{at}", weight.detach().clone(), persistent=False)
            self.trained = {"code": self.code}
        self.best_weights = {
            name: value.detach().to("cpu", copy=True) for name, value in self.trained.items()
        }
        self.register_buffer("init", torch.zeros(1, 0, backbone.hidden_size), persistent=False)
        seed = runs[0].init_seed
        self.starts = [Start("weights") if self.intrinsic_dim is None else Start("codes", "", seed)]

    def bank(self) -> Tensor:
        return self.init

    def kept(self) -> dict[str, Tensor]:
        return {}  # nothing on the device: `keep` copies to the host

    def curve(self) -> dict[str, list[Any]]:
        return {}

    def keep(self, better: Tensor) -> None:
        for name, value in self.trained.items() if bool(better) else ():
            self.best_weights[name].copy_(value.detach())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rate = self.runs[0].learning_rate
        if self.optim_config.name == "adamw":
            return torch.optim.AdamW(self._groups(), lr=rate, fused=True)
        from transformers.optimization import Adafactor

        return Adafactor(self._groups(), lr=rate, scale_parameter=False, relative_step=False)

    def _groups(self) -> list[dict[str, Any]]:
        config = self.optim_config
        common = {"betas": config.betas, "eps": config.eps} if config.name == "adamw" else {}
        decayed, spared = [], []  # biases and norms; v is neither
        for name, weight in self.trained.items():
            is_spared = name != "code" and (weight.dim() < 2 or "bias" in name)
            (spared if is_spared else decayed).append(weight)
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay, **common},
            {"params": spared, "weight_decay": 0.0, **common},
        ]
        return [group for group in groups if group["params"]]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the rows; from a loss or gradient that is not finite on, no gradient."""
        increments = {} if self.intrinsic_dim is None else self.move_weights()
        known = (self.backbone, list(self.weights.values()), batch)
        loss, gradients = self.within_memory(
            batch, lambda tokens: weights_gradient(*known, tokens, self.label_smoothing)
        )
        if increments:
            flat = [gradient.flatten() for gradient in gradients]
            gradients = list(torch.autograd.grad(list(increments.values()), self.code, flat))
        finite = loss.isfinite() & nn.utils.get_total_norm(gradients).isfinite()
        self.active &= self.finite_everywhere(finite.reshape(1))
        world, loss = self.row_share[1], torch.where(self.active[0], loss, 0)
        for gradient in gradients:
            gradient.mul_(world).masked_fill_(~self.active[0], 0)
        self.loss_sum += loss
        self.loss_steps += 1
        return _GivenGradients.apply(loss * world, gradients, *self.trained.values())

    def move_weights(self) -> dict[str, Tensor]:
        """Put the weights at theta_0 + P v; returns P v by name, with gradient to v."""
        increments = self.fastfood(self.code)
        with torch.no_grad():
            for at, (name, weight) in enumerate(self.weights.items()):
                weight.copy_(getattr(self, f"initial_{at}") + increments[name].view_as(weight))
        return increments

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        config, step = self.optim_config, self.trainer.global_step
        at = torch.tensor([float(step)])
        factor = schedule_factor(at, config.schedule, config.warmup_steps, self.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = self.runs[0].learning_rate * factor.item()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.trained.values(), config.clip)

    def prefixes(self, current: bool) -> Prefixes:
        if current and self.intrinsic_dim is not None:
            self.move_weights()
        return Prefixes(self.backbone, self.init)

    @torch.no_grad()
    def restore_best(self) -> None:
        super().restore_best()
        for name, value in self.trained.items():
            value.copy_(self.best_weights[name])
        if self.intrinsic_dim is not None:
            self.move_weights()

    def write(self) -> None:
        if self.trainer.is_global_zero:
            facts = {**self.origin(0), **self._belongs_to(), "status": int(self.status)}
            facts["best_step"] = facts.pop("steps")
            save_tensors(self.best_path, "weights", self.best_weights, facts)

    @property
    def best_path(self) -> Path:
        """The file of the best weights."""
        return self.file("best.safetensors")

    def _belongs_to(self) -> dict[str, Any]:
        run = self.runs[0]
        return {
            "backbone_digest": self.backbone.digest,
            "task": run.task,
            "sample": run.sample,
            "intrinsic_dim": self.intrinsic_dim,
            "subspace_seed": None if self.intrinsic_dim is None else run.init_seed,
        }

    def restore(self) -> None:
        if not self.best_path.is_file():
            raise FileNotFoundError(
                f"no best weights {self.best_path}: a fit that ends writes them; or give a "
                "checkpoint with --ckpt_path"
            )
        tensors, facts = load_tensors(self.best_path, "weights")
        if other := [
            f"{name} {facts.get(name)} there and {value} here"
            for name, value in self._belongs_to().items()
            if facts.get(name) != value
        ]:
            raise ValueError(f"{self.best_path} is of another fit: {', '.join(other)}")
        shapes, own = ({n: t.shape for n, t in x.items()} for x in (tensors, self.best_weights))
        if shapes != own:
            raise ValueError(f"{self.best_path}: damaged, its tensors are not those of the weights")
        for name, value in self.best_weights.items():
            value.copy_(tensors[name])
        self.keeper.restore(0, facts["best_step"], facts["dev_score"])
        self.keeper.dev.copy_(self.keeper.score)
        self.status.fill_(facts["status"])
        self.seconds = facts["seconds"]

    @property
    def best(self) -> Tensor:
        """No prompt; the record of the run is kept as one of no tokens, and not stored."""
        return self.init

    def identity(self) -> dict[str, Any]:
        own = {k: v for k, v in self._belongs_to().items() if k not in ("task", "sample")}
        return {**own, "optimizer": self.optim_config.name}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["best"] = self.best_weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every method's; the optimizer's settings are those given now."""
        super().on_load_checkpoint(checkpoint)
        for name, value in self.best_weights.items():
            value.copy_(checkpoint["best"][name])
        for state in checkpoint.get("optimizer_states", []):
            for saved, own in zip(state["param_groups"], self._groups(), strict=True):
                saved.update({key: value for key, value in own.items() if key != "params"})

    def result_facts(self, run: int) -> dict[str, Any]:
        return {
            "variant": "tuned" if self.intrinsic_dim is None else "random_subspace",
            "intrinsic_dim": self.intrinsic_dim,
            "optimizer": self.optim_config.name,
        }

    def summary(self) -> str:
        count = sum(weight.numel() for weight in self.weights.values())
        if self.intrinsic_dim is None:
            return f"1 run of all {count:,} weights"
        return f"1 run of {self.intrinsic_dim:,} numbers for all {count:,} weights"

    def held(self) -> dict[str, int]:
        weights = sum(weight.nbytes for weight in self.weights.values())
        moments = 2 if self.optim_config.name == "adamw" else 0
        optimizer = moments * sum(value.nbytes for value in self.trained.values())
        held = {"weights": weights, "gradient": 2 * weights, "optimizer": optimizer}
        if self.intrinsic_dim is not None:
            held["subspace"] = weights + sum(tensor.nbytes for tensor in self.fastfood.buffers())
        return held


def weights_gradient(
    backbone: Backbone,
    weights: Sequence[Tensor],
    batch: Batch,
    tokens_per_forward: int,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """Weighted loss of rows without a prompt and its gradient with respect to weights.

    ``batch`` has the longest rows first. Returns the loss () and a gradient of the shape of each of
    the weights, detached.
    """
    none = torch.zeros(1, 0, backbone.hidden_size, device=backbone.device)
    total, loss = [torch.zeros_like(weight) for weight in weights], none.new_zeros(())
    for part in backbone.micro_batches(batch, tokens_per_forward, 0):
        value = (backbone.loss(none, part, label_smoothing) * part.weight).sum()
        found = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
        for sum_, new in zip(total, found, strict=True):
            sum_ += new
        loss = loss + value.detach()
    return loss, total


class _GivenGradients(torch.autograd.Function):
    """As :func:`bank.with_gradient`, for many tensors and without copies of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *trained: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            gradient.mul_(outer[0])
        return None, None, *gradients
