"""What was best so far, for each run or for all of them together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Keeper(nn.Module):
    """Scores, steps and tensors of the best evaluation of each of U units.

    A unit is what is chosen by one score: a run, or all of the R runs that train something
    together. Tensors are (U, ...), or of any shape where U is 1.
    """

    score: Tensor  # (U,) float64, the best score; minus infinity before the first
    step: Tensor  # (U,) its step; -1 before the first
    bad: Tensor  # (U,) evaluations since then
    dev: Tensor  # (R,) float64, the scores of the runs at that step

    def __init__(self, units: int, runs: int, kept: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("score", torch.full((units,), -torch.inf, dtype=torch.float64))
        self.register_buffer("step", torch.full((units,), -1, dtype=torch.long))
        self.register_buffer("bad", torch.zeros(units, dtype=torch.long))
        self.register_buffer("dev", torch.full((runs,), torch.nan, dtype=torch.float64))
        self.names: list[str] = []
        for name, tensor in kept.items():
            self.add(name, tensor)

    def __getitem__(self, name: str) -> Tensor:
        """What is kept under a name."""
        return getattr(self, f"kept_{name}")

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep one more tensor, unless there is one of that name."""
        if name not in self.names:
            self.names.append(name)
            self.register_buffer(f"kept_{name}", tensor.detach().clone())

    @property
    def is_filled(self) -> bool:
        """Whether something was kept."""
        return bool((self.step >= 0).any())

    def reset(self) -> None:
        """Forget the scores, at the start of another fit."""
        self.score.fill_(-torch.inf)
        self.step.fill_(-1)
        self.bad.zero_()
        self.dev.fill_(torch.nan)

    def restore(self, unit: int, step: int | None, score: float | None) -> None:
        """Take what a file says of a unit's best evaluation."""
        self.step[unit] = -1 if step is None else step
        self.score[unit] = -torch.inf if score is None else score

    def update(
        self, units: Tensor, scores: Tensor, step: int, live: Tensor, always: bool = False
    ) -> Tensor:
        """Take an evaluation; ties keep the earlier, NaN counts as the worst.

        ``units`` (U,) decide where ``live`` (U,), or ``always``; ``scores`` (R,) are of the runs,
        those of a unit in a row. Returns which units are better now, (U,).
        """
        units = units.nan_to_num(nan=-torch.inf).to(self.score)
        better = live & ((units > self.score) | (self.step < 0) | always)
        self.score.copy_(torch.where(better, units, self.score))
        self.step.masked_fill_(better, step)
        self.bad.copy_(torch.where(live, torch.where(better, 0, self.bad + 1), self.bad))
        if len(self.dev):
            of_runs = better.repeat_interleave(len(self.dev) // len(units))
            self.dev.copy_(torch.where(of_runs, scores.to(self.dev), self.dev))
        return better

    def keep(self, better: Tensor, kept: Mapping[str, Tensor]) -> None:
        """Take what belongs to the better units."""
        for name, tensor in kept.items():
            own, shape = self[name], [-1] + [1] * (tensor.dim() - 1)
            mask = better if len(better) == 1 else better.view(shape)
            own.copy_(torch.where(mask.to(own.device), tensor.detach(), own))
