"""Gradients of a prompt that is to be adapted: MAML, FoMAML, Reptile and multi-task learning.

An episode adapts the prompt by K inner steps on support rows and is judged on query rows. What is
adapted is one small tensor, so the gradient of the query loss through the inner steps needs no
graph of them: the steps are made without one, only prompts, gradients and optimizer states are
kept, and a walk back multiplies by the Hessian of one support loss at a time. The result is the
unrolled graph's, exactly; its memory is that of one step, however many there are.

M episodes are a bank (M, N, D): no arithmetic crosses the first axis, and the Hessian of the bank's
loss is block diagonal, so one product serves all episodes. What is kept of an inner loop are
displacements from the start, not adapted prompts: with small steps a difference of prompts is lost
to rounding (at a learning rate of 3e-5 some per cent of it, in float32).

Losses come as an :class:`Objective`; nothing here knows a model. Left out: implicit gradients, and
products by finite differences (wrong for ReLU models).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]
"""State of an inner optimizer: nothing, a momentum, or Adam's two moments; each (M, N, D)."""


class Objective(Protocol):
    """A loss of every prompt of a bank, as one inner step or the query sees it."""

    def gradient(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (M,) at the prompts (M, N, D), and the gradient (M, N, D) of their sum."""
        ...

    def product(self, prompts: Tensor, vector: Tensor) -> Tensor:
        """Hessian of the sum of losses at the prompts, times a vector: (M, N, D) each."""
        ...


@dataclass
class InnerConfig:
    """How a prompt is adapted within an episode.

    Args:
        steps: inner steps, K.
        name: optimizer; its state begins anew in each episode.
        learning_rate: inner learning rate, or what it starts from where it is learned.
        momentum: of ``sgd``.
        betas: Adam's decay of the two moments.
        eps: Adam's term beside the root of the second moment.
        learned: whether the inner learning rate is ``fixed``, learned as one number (``shared``),
            or as one for each virtual token (``per_token``).
    """

    steps: int = 1
    name: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 3e-5
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    learned: Literal["fixed", "shared", "per_token"] = "fixed"

    def __post_init__(self) -> None:
        """Check the values, since they come from files and flags."""
        for field, allowed in (
            ("name", ("sgd", "adam")),
            ("learned", ("fixed", "shared", "per_token")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"inner.{field} is {getattr(self, field)!r}; allowed: {allowed}")
        if self.steps < 1:
            raise ValueError(f"inner.steps is {self.steps}: give at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"inner.learning_rate is {self.learning_rate}: give a positive number")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"inner.momentum is {self.momentum}: give 0 up to below 1")
        if self.momentum and self.name != "sgd":
            raise ValueError("inner.momentum is of sgd; adam has inner.betas")

    def start(self, prompts: Tensor) -> State:
        """The optimizer's state before the first step."""
        count = 2 if self.name == "adam" else int(self.momentum > 0)
        return tuple(torch.zeros_like(prompts) for _ in range(count))

    def update(
        self, step: int, gradient: Tensor, state: State, rate: Tensor
    ) -> tuple[Tensor, State]:
        """What one step adds to the prompts, and the new state; can be differentiated.

        As ``torch.optim.SGD`` and ``torch.optim.Adam`` (Kingma and Ba, arXiv 1412.6980).

        Args:
            step: steps before this one.
            gradient: (M, N, D).
            state: as :meth:`start` or an earlier step gave it.
            rate: learning rate, () or (N, 1).
        """
        if self.name == "sgd":
            moved = gradient + self.momentum * state[0] if state else gradient
            return -rate * moved, (moved,) if state else ()
        beta1, beta2 = self.betas
        first = beta1 * state[0] + (1 - beta1) * gradient
        second = beta2 * state[1] + (1 - beta2) * gradient * gradient
        root = _root(second) / (1 - beta2 ** (step + 1)) ** 0.5
        return -rate / (1 - beta1 ** (step + 1)) * first / (root + self.eps), (first, second)


@dataclass
class Trajectory:
    """An inner loop of K steps, without any graph.

    Attributes:
        start: (M, N, D) the prompts before the first step.
        displacements: K + 1 times (M, N, D), from the start to before step k, and after the last.
        gradients: K times (M, N, D), of the support loss at step k.
        states: K states, before step k.
        losses: (K, M) support losses before each step.
    """

    start: Tensor
    displacements: list[Tensor]
    gradients: list[Tensor]
    states: list[State]
    losses: Tensor

    def prompts(self, step: int) -> Tensor:
        """The prompts (M, N, D) after so many steps; -1 for all."""
        return self.start + self.displacements[step]


@dataclass
class MetaGradient:
    """What the episodes of a meta-step say.

    Attributes:
        gradient: (M, N, D) each episode's gradient with respect to its start.
        losses: (M,) the loss that is reported: of the query at the adapted prompts, of the last
            support batch (Reptile), or of all rows at the start (multi-task learning).
        rate_gradient: of the sum over episodes with respect to the learning rate, in its shape;
            None where there is none.
        support_losses: (K, M) before each inner step; K is 0 in multi-task learning.
        second_order: (M,) ||g - v|| / ||v||, with g the gradient and v the query's gradient at the
            adapted prompts: what MAML differs by from FoMAML. Zero where there is none.
        moved: (M,) ||displacement|| / ||start||, how far the inner loop goes.
    """

    gradient: Tensor
    losses: Tensor
    rate_gradient: Tensor | None
    support_losses: Tensor
    second_order: Tensor
    moved: Tensor

    def finite(self) -> Tensor:
        """Whether an episode has finite losses and a finite gradient: (M,) bool."""
        known = self.losses.isfinite() & self.gradient.flatten(1).isfinite().all(1)
        return known & self.support_losses.isfinite().all(0)


def adapt(
    start: Tensor, support: Sequence[Objective], inner: InnerConfig, rate: Tensor
) -> Trajectory:
    """Adapt prompts by one inner step for each support objective.

    Args:
        start: (M, N, D).
        support: K objectives.
        inner: the optimizer.
        rate: learning rate, () or (N, 1).
    """
    start, rate = start.detach(), rate.detach()
    state = inner.start(start)
    found = Trajectory(start, [torch.zeros_like(start)], [], [], start.new_zeros(0, len(start)))
    losses = []
    for step, objective in enumerate(support):
        loss, gradient = objective.gradient(found.prompts(-1))
        losses.append(loss)
        found.gradients.append(gradient)
        found.states.append(state)
        change, state = inner.update(step, gradient, state, rate)
        found.displacements.append(found.displacements[-1] + change)
    if losses:
        found.losses = torch.stack(losses)
    return found


def pull_back(
    path: Trajectory,
    support: Sequence[Objective],
    inner: InnerConfig,
    rate: Tensor,
    vector: Tensor,
    depth: int | None = None,
) -> tuple[Tensor, Tensor]:
    """From the gradient at the adapted prompts to that at the start, and of the learning rate.

    Step k makes (change, state') = U(g_k(phi_k), state, rate). Backwards from v, with the state's
    cotangent s = 0 at the end: (u, s', r) = the transposed derivative of U at (v, s), number by
    number, and v <- v + H_k(phi_k) u, s <- s', and r is summed. For plain SGD that is
    v <- v - rate H_k v.

    Args:
        path: what :func:`adapt` made.
        support: its K objectives.
        inner: its optimizer.
        rate: its learning rate, () or (N, 1).
        vector: (M, N, D) gradient with respect to the adapted prompts.
        depth: how many of the last steps to take Hessians of; None for all. Earlier gradients count
            as constants.

    Returns:
        The gradient (M, N, D) with respect to the start, and that with respect to the rate.
    """
    first = 0 if depth is None else max(0, len(support) - depth)
    lowest = 0 if inner.learned != "fixed" else first
    cotangents: list[Tensor] = [torch.zeros_like(part) for part in inner.start(vector)]
    of_rate = torch.zeros_like(rate)
    for step in range(len(support) - 1, lowest - 1, -1):
        leaves = [
            part.detach().requires_grad_()
            for part in (path.gradients[step], rate, *path.states[step])
        ]
        with torch.enable_grad():
            change, state = inner.update(step, leaves[0], tuple(leaves[2:]), leaves[1])
        back, of_step, *cotangents = torch.autograd.grad(
            [change, *state], leaves, [vector, *cotangents]
        )
        of_rate += of_step
        if step >= first:
            vector = vector + support[step].product(path.prompts(step), back)
    return vector, of_rate


def maml(
    start: Tensor,
    support: Sequence[Objective],
    query: Objective,
    inner: InnerConfig,
    rate: Tensor,
    depth: int | None = None,
) -> MetaGradient:
    """Gradient of the query loss after K inner steps (MAML, Finn et al. 2017, arXiv 1703.03400).

    With depth 0 it is FoMAML: the query's gradient at the adapted prompts, as it is (eq. 5 of
    Nichol et al. 2018, arXiv 1803.02999).

    Args:
        start: (M, N, D).
        support: K objectives, one for each inner step.
        query: the objective that judges the adapted prompts.
        inner: the inner optimizer.
        rate: its learning rate, () or (N, 1).
        depth: how many of the last inner steps are differentiated through; None for all.
    """
    path = adapt(start, support, inner, rate)
    losses, vector = query.gradient(path.prompts(-1))
    gradient, of_rate = pull_back(path, support, inner, rate, vector, depth)
    return MetaGradient(
        gradient=gradient,
        losses=losses,
        rate_gradient=None if inner.learned == "fixed" else of_rate,
        support_losses=path.losses,
        second_order=_share(gradient - vector, vector),
        moved=_share(path.displacements[-1], path.start),
    )


def reptile(
    start: Tensor, support: Sequence[Objective], inner: InnerConfig, rate: Tensor
) -> MetaGradient:
    """The way back from the adapted prompts (Reptile, Nichol et al. 2018, arXiv 1803.02999).

    start - adapted, as a gradient: a step of SGD along it with learning rate e moves the start a
    share e of the way to the mean of the adapted prompts.
    """
    path = adapt(start, support, inner, rate)
    moved = path.displacements[-1]
    return MetaGradient(
        gradient=-moved,
        losses=path.losses[-1],
        rate_gradient=None,
        support_losses=path.losses,
        second_order=moved.new_zeros(len(moved)),
        moved=_share(moved, path.start),
    )


def multitask(start: Tensor, objectives: Sequence[Objective]) -> MetaGradient:
    """Mean loss and gradient of support and query objectives at the start: no adaptation."""
    found = [objective.gradient(start.detach()) for objective in objectives]
    losses, gradient = (torch.stack(parts).mean(0) for parts in zip(*found, strict=True))
    nothing = losses.new_zeros(len(losses))
    return MetaGradient(
        gradient=gradient,
        losses=losses,
        rate_gradient=None,
        support_losses=losses.new_zeros(0, len(losses)),
        second_order=nothing,
        moved=nothing,
    )


def _root(square: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero, as a prompt without gradient needs it."""
    known = square > 0
    return torch.where(known, torch.where(known, square, 1).sqrt(), 0)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Norm of each prompt's part relative to the whole: (M,)."""
    size = torch.linalg.vector_norm(whole.flatten(1), dim=1)
    return torch.linalg.vector_norm(part.flatten(1), dim=1) / size.clamp(min=1e-30)
