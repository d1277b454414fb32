"""AdamW, Adafactor and SGD over a bank: one learning rate, warm-up, step count and clip per run.

The first axis of every parameter is the run; no arithmetic crosses it. Each run follows
``torch.optim.AdamW`` or ``SGD``, or transformers' ``Adafactor`` with a given learning rate, step by
step, as if it were trained alone; a run that is not active does not move at all, its state
included. The learning rate schedule is part of the optimizer, because it differs from run to run.

Methods that train weights which no run owns alone, such as the map of a subspace, take torch's
AdamW with :func:`adamw_with_warmup`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prompt_lab.core.batch import to_device


@dataclass
class OptimConfig:
    """How the runs of a bank are optimised; learning rate and batch size belong to the run.

    Args:
        name: optimizer.
        weight_decay: decoupled weight decay, times the learning rate per step.
        betas: AdamW's decay of the two moments.
        eps: AdamW's term beside the root of the second moment.
        schedule: learning rate after the warm-up: constant, or linear or cosine to zero at
            ``trainer.max_steps``.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        clip: largest gradient norm of each run, or null for none.
    """

    name: Literal["adamw", "adafactor", "sgd"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    clip: float | None = None

    def __post_init__(self) -> None:
        """Check the values, since they come from files and flags."""
        for field, allowed in (
            ("name", ("adamw", "adafactor", "sgd")),
            ("schedule", ("constant", "linear", "cosine")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"optim.{field} is {getattr(self, field)!r}; allowed: {allowed}")
        if self.warmup_steps < 0 or not self.weight_decay >= 0:
            raise ValueError("optim.warmup_steps and optim.weight_decay must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas) or not self.eps >= 0:
            raise ValueError(
                f"optim.betas is {self.betas} and optim.eps {self.eps}: give betas from 0 up to "
                "below 1, and an eps that is not negative"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"optim.clip is {self.clip}: give a positive norm, or null for none")

    def build(
        self,
        parameters: Sequence[Tensor],
        learning_rates: Sequence[float],
        active: Tensor,
        total_steps: int,
        factors: Sequence[float] | None = None,
    ) -> BankOptimizer:
        """The optimizer of a bank.

        Args:
            parameters: tensors whose first axis is the run, (R, ...).
            learning_rates: R peak learning rates.
            active: (R,) bool tensor that is read at every step; runs where it is False rest.
            total_steps: steps at which a linear or cosine schedule reaches zero.
            factors: what each parameter's learning rate is multiplied by; 1 where left out.
        """
        kinds = {"adamw": BankAdamW, "adafactor": BankAdafactor, "sgd": BankSGD}
        kind = kinds[self.name]
        return kind(parameters, learning_rates, active, total_steps, self, factors)


class BankOptimizer(torch.optim.Optimizer):
    """What the optimizers share: per-run step counts, schedule, clip and rest."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        learning_rates: Sequence[float],
        active: Tensor,
        total_steps: int,
        config: OptimConfig,
        factors: Sequence[float] | None = None,
    ) -> None:
        runs = len(learning_rates)
        for parameter in parameters:
            if parameter.shape[0] != runs:
                raise ValueError(f"{runs} learning rates for a bank of {parameter.shape[0]} runs")
        if any(not rate > 0 for rate in learning_rates):
            raise ValueError(f"learning rates must be positive; given: {sorted(learning_rates)}")
        factors = [1.0] * len(parameters) if factors is None else factors
        groups = [
            {"params": [parameter], "factor": factor, "lr": max(learning_rates) * factor}
            for parameter, factor in zip(parameters, factors, strict=True)
        ]
        super().__init__(groups, {})
        self.learning_rates = list(learning_rates)
        self.active = active
        self.total_steps = total_steps
        self.config = config
        self._most_steps = 0  # of any run, or more; known to the host, so that none is asked for
        self._tables: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; torch would leave the steps, which it knows as one number, on the host.

        Its own optimizers count there; here the counts (R,) belong to the parameter's device.
        """
        super().load_state_dict(state_dict)
        self._tables.clear()
        for parameter, state in self.state.items():
            self._most_steps = max(self._most_steps, int(state["step"].max()))
            state["step"] = state["step"].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every active run whose parameter has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["lr"] = max(self.learning_rates) * group["factor"] * self.factor()
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    self._step(parameter, parameter.grad, state, group["factor"])
        self._most_steps += 1
        return loss

    def factor(self) -> float:
        """What the schedule makes of the peak rates of runs that never rested, at this step.

        It is for loggers, as is ``lr`` of the groups, the highest rate.
        """
        config, step = self.config, torch.tensor(float(self._most_steps))
        found = schedule_factor(step, config.schedule, config.warmup_steps, self.total_steps)
        return found.item()

    def _step(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], factor: float
    ) -> None:
        """Advance one parameter; resting runs keep parameter and state as they are."""
        if not state:
            state["step"] = torch.zeros(len(parameter), device=parameter.device)
            state.update(self._fresh_state(parameter))
        if self.config.clip is not None:
            norm = gradient.flatten(1).norm(dim=1)
            gradient = gradient * _align((self.config.clip / (norm + 1e-6)).clamp(max=1), gradient)
        rates, table = self._table(parameter, factor)
        factors, *numbers = table.index_select(1, state["step"].long()).unbind()
        moved, changed = self._update(parameter, gradient, rates * factors, numbers, state)
        state["step"] += self.active
        pairs = [(parameter, moved), *((state[name], new) for name, new in changed.items())]
        for old, new in pairs:
            torch.where(_align(self.active, new), new, old, out=old)

    def _table(self, parameter: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Peak learning rates (R,), and what depends on the step alone (K, steps from 0 on)."""
        found = self._tables.get(parameter)
        if found is None or found[1].shape[1] <= self._most_steps:
            steps = torch.arange(1024 + 2 * self._most_steps, dtype=torch.float64)
            config = self.config
            factors = schedule_factor(steps, config.schedule, config.warmup_steps, self.total_steps)
            table = torch.stack([factors, *self._of_step(steps + 1)])
            rates = torch.tensor(self.learning_rates, dtype=torch.float64) * factor
            rates, table = (
                to_device(made.to(parameter.dtype), parameter.device) for made in (rates, table)
            )
            found = self._tables[parameter] = rates, table
        return found

    def _of_step(self, steps: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`_update` takes of the step alone, by its number (T,), counted from 1."""
        return ()

    def _decayed(self, parameter: Tensor, rate: Tensor) -> Tensor:
        """The parameter less the decay of its weights."""
        decay = self.config.weight_decay
        if not decay:
            return parameter
        return torch.addcmul(parameter, parameter, _align(rate, parameter), value=-decay)

    def _fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """State before the first step."""
        raise NotImplementedError

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        rate: Tensor,
        numbers: Sequence[Tensor],
        state: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """New parameter and new state of all runs, as if all were active."""
        raise NotImplementedError


class BankAdamW(BankOptimizer):
    """``torch.optim.AdamW``, run by run (Loshchilov and Hutter, arXiv 1711.05101)."""

    def _fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}

    def _of_step(self, steps: Tensor) -> tuple[Tensor, ...]:
        """The corrections of the first moment, and of the root of the second."""
        beta1, beta2 = self.config.betas
        return 1 - beta1**steps, (1 - beta2**steps).sqrt()

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        rate: Tensor,
        numbers: Sequence[Tensor],
        state: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = self.config.betas
        correction, root = numbers
        first = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
        second = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        divisor = second.sqrt().div_(_align(root, second)).add_(self.config.eps)
        change = (first * _align(rate / correction, first)).div_(divisor)
        return self._decayed(parameter, rate) - change, {"exp_avg": first, "exp_avg_sq": second}


class BankSGD(BankOptimizer):
    """``torch.optim.SGD`` without momentum, run by run; weight decay is decoupled."""

    def _fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {}

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        rate: Tensor,
        numbers: Sequence[Tensor],
        state: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._decayed(parameter, rate) - gradient * _align(rate, parameter), {}


class BankAdafactor(BankOptimizer):
    """Adafactor with a given learning rate, run by run (Shazeer and Stern, arXiv 1804.04235).

    As transformers' ``Adafactor(scale_parameter=False, relative_step=False, beta1=None)`` with its
    defaults: decay ``1 - t^-0.8``, updates clipped to a root mean square of 1, where the mean is
    over one run. A (R, N, D) bank is factored over N and D; a (R, I) bank is not factored.
    """

    def _fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter.dim() < 3:
            return {"exp_avg_sq": torch.zeros_like(parameter)}
        return {
            "exp_avg_sq_row": torch.zeros_like(parameter[..., 0]),
            "exp_avg_sq_col": torch.zeros_like(parameter[..., 0, :]),
        }

    def _of_step(self, steps: Tensor) -> tuple[Tensor, ...]:
        """The shares of the old mean and of the new square."""
        new = steps**-0.8
        return 1 - new, new

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        rate: Tensor,
        numbers: Sequence[Tensor],
        state: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        old_share, new_share = numbers
        square = (gradient * gradient).add_(1e-30)
        new: dict[str, Tensor] = {}
        means = {
            "exp_avg_sq_row": lambda: square.mean(-1),
            "exp_avg_sq_col": lambda: square.mean(-2),
        }
        for name in state.keys() - {"step"}:
            now = means.get(name, lambda: square)()
            kept = state[name] * _align(old_share, now)
            new[name] = kept.addcmul_(now, _align(new_share, now))
        if "exp_avg_sq" in new:
            update = gradient * new["exp_avg_sq"].rsqrt()
        else:
            row, column = new["exp_avg_sq_row"], new["exp_avg_sq_col"]
            scale = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)
            update = (scale * column.rsqrt().unsqueeze(-2)).mul_(gradient)
        size = update.flatten(1).square().mean(1).sqrt()
        update.div_(_align(size.clamp(min=1.0), update)).mul_(_align(rate, update))
        return self._decayed(parameter, rate) - update, new


def schedule_factor(step: Tensor, schedule: str, warmup_steps: int, total_steps: int) -> Tensor:
    """What the learning rate is multiplied by at each step: float64, in the shape of ``step``.

    The formulas of transformers' ``get_scheduler``: a linear rise from 0 over the warm-up, then
    constant, or linear or half a cosine to 0 at ``total_steps``, where it stays.

    Args:
        step: numbers of steps, counted from 0, on the host.
        schedule: ``constant``, ``linear`` or ``cosine``.
        warmup_steps: steps of the rise.
        total_steps: steps at which the factor reaches 0.
    """
    step = step.double()
    rising = step / max(1, warmup_steps)
    done = ((step - warmup_steps) / max(1, total_steps - warmup_steps)).clamp(max=1)
    if schedule == "linear":
        falling = 1 - done
    elif schedule == "cosine":
        falling = 0.5 * (1 + torch.cos(math.pi * done))
    else:
        falling = torch.ones_like(step)
    return torch.where(step < warmup_steps, rising, falling)


# ---- weights that no run owns alone --------------------------------------------------------------


def adamw_with_warmup(
    groups: list[dict[str, Any]], warmup: float, total_steps: int
) -> dict[str, Any]:
    """AdamW whose learning rates rise linearly, then fall linearly to zero, without weight decay.

    With r steps of rise, at least 1, the rate at step s, counted from 0, is the peak rate times
    min((s + 1) / r, (total_steps - s) / (total_steps - r)).

    Args:
        groups: parameters (``params``) and their peak learning rate (``lr``).
        warmup: share of the steps in which the rates rise, 0 to 1.
        total_steps: steps at which the rates reach zero.

    Returns:
        Optimizer and schedule, as Lightning's ``configure_optimizers`` returns them.
    """
    rise = max(1, round(warmup * total_steps))
    fall = max(1, total_steps - rise)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, max(0.0, (total_steps - step) / fall))
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _align(values: Tensor, like: Tensor) -> Tensor:
    """(R,) values with trailing axes of length one, to combine with (R, ...) tensors."""
    return values.view(-1, *[1] * (like.dim() - 1))
