"""A run: one prompt that is trained, and the grid of runs that one fit trains side by side.

A run is (task, sample, initialisation seed, learning rate, batch size), and where prompts are
transferred the source task whose prompt it starts from. Its data order depends on the order seed,
the task and the sample alone, so runs that differ otherwise see the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product


@dataclass(frozen=True)
class Run:
    """What makes one prompt of a bank different from the others.

    Attributes:
        task: name of the task.
        sample: few-shot sample (in CrossFit 100, 13, 21, 42 or 87).
        init_seed: seed of the initial prompt.
        learning_rate: peak learning rate.
        batch_size: rows per optimizer step.
        source: task, or sum of vectors, whose prompt it starts from; empty where prompts are not
            transferred.
    """

    task: str
    sample: int
    init_seed: int
    learning_rate: float
    batch_size: int
    source: str = field(default="", kw_only=True)

    @property
    def name(self) -> str:
        """A name that is unique within a grid and can be a file name."""
        source = re.sub(r"[^\w.-]+", "_", self.source)
        return (
            f"{self.task}_{self.sample}_seed{self.init_seed}"
            f"_lr{self.learning_rate:g}_bs{self.batch_size}{source and f'_from_{source}'}"
        )


def grid(
    tasks: Sequence[str],
    samples: Sequence[int],
    init_seeds: Sequence[int],
    learning_rates: Sequence[float],
    batch_sizes: Sequence[int],
    sources: Sequence[str] = ("",),
) -> list[Run]:
    """All runs of tasks x samples x seeds x learning rates x batch sizes x sources, in that order.

    Raises:
        ValueError: an axis that is empty, has a value twice, or a value out of range.
    """
    axes = {
        "tasks": tasks,
        "samples": samples,
        "init_seed": init_seeds,
        "learning_rate": learning_rates,
        "batch_size": batch_sizes,
        "source_tasks": sources,
    }
    for name, values in axes.items():
        if not values:
            raise ValueError(f"{name} is empty: give at least one value")
        if len(set(values)) < len(values):
            raise ValueError(f"{name} has a value twice: {list(values)}")
    if min(batch_sizes) < 1:
        raise ValueError(f"batch_size must be at least 1; given: {list(batch_sizes)}")
    if not min(learning_rates) > 0:
        raise ValueError(f"learning_rate must be positive; given: {list(learning_rates)}")
    runs = [Run(*values, source=source) for *values, source in product(*axes.values())]
    if len({run.name for run in runs}) < len(runs):
        given = list(learning_rates) + [source for source in sources if source]
        raise ValueError(f"learning rates or sources too close to tell apart by name: {given}")
    return runs
