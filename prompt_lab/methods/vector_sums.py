"""Sums of task prompt vectors on an initial prompt, at a scale, which ``VectorArithmetic`` tries.

Their prompts are made when their turn comes and let go afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import Prefixes
from prompt_lab.core.run import Run
from prompt_lab.core.vectors import add_vectors, expression_name, parse_expression
from prompt_lab.files.prompts import FoundPrompt
from prompt_lab.files.results import Start

ROUNDING = 1e-9
"""Mean dev scores that differ by less are equal."""


@dataclass(frozen=True, eq=False)
class VectorSum:
    """A sum of task prompt vectors on an initial prompt; it has one scale for all its tasks."""

    variant: str  # vectors; single, a tuned prompt; initial_prompt; vector_alone, on zeros
    expression: str  # as it was asked for; empty for an initial prompt
    coefficients: Mapping[str, float]  # of each task's vector
    vectors: Mapping[str, FoundPrompt]  # the prompts that give them
    base: FoundPrompt | None  # the prompt that gives the initial prompt; None for zeros
    sample: int
    seed: int  # of the initial prompt that the vectors started from
    tasks: tuple[str, ...]  # what it is evaluated on
    scales: tuple[float, ...]  # values of lambda, rising
    crosses: bool = False  # whether the initial prompt is one of many

    def prompt(self, scale: float) -> Tensor:
        """The prompt init + scale * sum (N, D), float32."""
        vectors = torch.stack([self.vectors[task].vector for task in self.coefficients])
        init = torch.zeros_like(vectors[0]) if self.base is None else self.base.prompt.init
        return add_vectors(init, vectors, list(self.coefficients.values()), scale)

    @property
    def name(self) -> str:
        """A name that can be a file name, without the task and the scale."""
        is_sum = self.variant != "initial_prompt"
        place = f"_{expression_name(self.coefficients)}" if is_sum else ""
        place = f"{self.variant}{place}_{self.sample}_seed{self.seed}"
        return f"{place}_on_seed{self.init_seed}" if self.crosses else place

    @property
    def init_seed(self) -> int | None:
        """Seed of the initial prompt that it is applied to."""
        return None if self.base is None else self.base.prompt.init_seed

    @property
    def start(self) -> Start:
        """How the initial prompt was made; its seed is that of the prompt it is taken from."""
        if self.base is None:
            return Start("zeros")
        return replace(self.base.prompt.start_fields, start_seed=self.init_seed)

    @property
    def counted(self) -> tuple[str, ...]:
        """The tasks that choose the scale: all but those whose vector is taken away."""
        return tuple(task for task in self.tasks if self.coefficients.get(task, 0) >= 0)


@dataclass(frozen=True)
class Trial(Run):
    """A sum at one scale, lambda, on one task."""

    of: VectorSum
    scale: float

    @property
    def name(self) -> str:
        """A name that is unique among the chosen scales, and can be a file name."""
        own = self.of.variant != "initial_prompt" and list(self.of.coefficients) == [self.task]
        return self.of.name if own else f"{self.of.name}_for_{self.task}"

    @property
    def columns(self) -> dict[str, Any]:
        """What tells it apart from others of its task and sample, in columns of the results."""
        made = self.of
        told = {"variant": made.variant, "expression": made.expression or None}
        return told | {"init_seed": made.seed, **asdict(made.start), "scale": self.scale}


class MadePrefixes(Prefixes):
    """Prefixes of a bank whose prompts ``make`` makes, ``size`` at a time, in the order of places.

    Rows must come by block: none of a block that was left comes later, or it is made again.
    """

    def __init__(
        self,
        backbone: Backbone,
        places: Sequence[int],
        size: int,
        make: Callable[[Sequence[int]], Tensor],
    ) -> None:
        super().__init__(backbone, torch.empty(0))
        self.at = {place: at for at, place in enumerate(places)}
        self.places, self.size, self.make, self.block = places, size, make, -1

    def of(self, used: list[int], front: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
        block = self.at[used[0]] // self.size
        first = block * self.size
        if block != self.block:
            self.used, self.prefix, self.prompts = [], (), torch.empty(0)  # let go, then make
            self.prompts = self.make(self.places[first : first + self.size])
            self.block = block
        return super().of([self.at[place] - first for place in used], front)


def best_scale(means: Mapping[float, float]) -> float:
    """The scale of the best mean dev score; of equal ones, up to rounding, the smallest.

    NaN is the worst. That is the rule of the authors' code (``ArithmeticsEvaluator``), which goes
    up from the smallest and keeps strictly better ones.
    """
    best, top = min(means), -torch.inf
    for scale in sorted(means):
        if means[scale] > top + ROUNDING:
            best, top = scale, means[scale]
    return best


def written(task: str) -> str:
    """A task's name as an expression, in quotes where it needs them."""
    try:
        plain = parse_expression(task) == {task: 1.0}
    except ValueError:
        plain = False
    return task if plain else f"'{task}'"
