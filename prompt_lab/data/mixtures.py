"""Batches that mix the rows of many tasks, each row under its own task's prompt.

An epoch is as many draws as the tasks have rows in total. Each task has its share of the draws,
spread evenly over the epoch, and its draws read an endless stream of its rows: one seeded
permutation after another, the stream that a run of it alone reads. The draws of a step are a
function of the tasks, their order, the seed and the step, so nothing about them needs to be saved,
and a step costs the same wherever it stands. A "task" here is one (task, sample): a task with two
samples is two.

The law: every draw is of a task with the probability of its share in that epoch. The draws of a
task up to the end of any epoch differ from its share by at most one, and up to any draw by a few.
With weights by size each epoch holds every row once. A shuffled pool, as Qin et al. (IPT) draw
from, has the same shares, but batches with less even ones.

It caps no sizes (the "artificial limit" of T5) and learns no weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from prompt_lab.core.batch import Batch, make_batch
from prompt_lab.data.batches import Layout, Rows, _by_length, epoch_order

Key = tuple[str, int]
"""Task and few-shot sample."""

Mixing = Literal["examples", "tasks", "temperature"]


def task_weights(sizes: Sequence[int], mixing: Mixing, temperature: float = 2.0) -> list[float]:
    """Share of each task in a mixture (Raffel et al. 2020, section 3.5.2).

    Args:
        sizes: rows of each task, n_t.
        mixing: "examples" for n_t / sum n; "tasks" for the same share each; "temperature" for
            n_t^(1/T) / sum n^(1/T).
        temperature: T of "temperature", at least 1; 1 is "examples", infinity is "tasks".

    Returns:
        A share for each task; they sum to 1.

    Raises:
        ValueError: no task, an empty task, an unknown mixing, or a temperature below 1.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"the tasks have {list(sizes)} rows: give at least one task, none empty")
    if not temperature >= 1:
        raise ValueError(f"temperature is {temperature}: give at least 1")
    powers = {"examples": 1.0, "tasks": 0.0, "temperature": 1 / temperature}
    if mixing not in powers:
        raise ValueError(f"mixing is {mixing!r}: choose among {', '.join(powers)}")
    scaled = np.asarray(sizes, dtype=np.float64) ** powers[mixing]
    return (scaled / scaled.sum()).tolist()


def mixture_rows(
    seed: int, step: int, batch_size: int, sizes: Mapping[Key, int], weights: Sequence[float]
) -> list[tuple[Key, int, int]]:
    """The draws of one optimizer step, counted from 0.

    Args:
        seed: seed of the order.
        step: number of the step.
        batch_size: draws of a step, B.
        sizes: rows of each task.
        weights: positive weight of each task, in the order of ``sizes``; only ratios count.

    Returns:
        B times (task and sample, row, a number that picks among the row's references).

    Raises:
        ValueError: as :func:`check_weights`.
    """
    keys, length, shares = list(sizes), sum(sizes.values()), tuple(weights)
    check_weights(sizes, shares)
    drawn = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, at = divmod(position, length)
        tasks, numbers = _epoch_draws(seed, epoch, shares, length)
        task, sample = key = keys[tasks[at]]
        row, draw = row_of_draw(seed, task, sample, int(numbers[at]), sizes[key])
        drawn.append((key, row, draw))
    return drawn


def row_of_draw(seed: int, task: str, sample: int, number: int, size: int) -> tuple[int, int]:
    """What a task's draw with this number, counted from 0, reads from its endless stream.

    Args:
        seed: seed of the order.
        task: name of the stream.
        sample: few-shot sample.
        number: draws of this task before this one.
        size: rows of the task.

    Returns:
        The row, and a number that picks among its references.
    """
    epoch, at = divmod(number, size)
    order, draws = epoch_order(seed, task, sample, epoch, size)
    return int(order[at]), int(draws[at])


def check_weights(sizes: Mapping[Key, int], weights: Sequence[float]) -> None:
    """Check that each task has a weight that gives it at least one draw an epoch.

    Raises:
        ValueError: numbers of tasks and weights differ, a task is empty, a weight is not positive
            and finite, or one is so small that its task has less than one draw an epoch.
    """
    if len(weights) != len(sizes) or not sizes:
        raise ValueError(f"{len(weights)} weights for {len(sizes)} tasks: give one for each task")
    empty = [key for key, size in sizes.items() if size < 1]
    if empty:
        raise ValueError(f"tasks without rows: {empty}; leave them out")
    if not all(0 < weight < np.inf for weight in weights):
        raise ValueError(f"weights must be positive and finite; given: {list(weights)}")
    least = min(weights) / sum(weights) * sum(sizes.values())
    if least < 1 - 1e-9:
        raise ValueError(
            f"the smallest weight, {min(weights)}, gives its task {least:.2g} draws in an epoch of "
            f"{sum(sizes.values())}: give weights that make it at least 1"
        )


@lru_cache(maxsize=8)
def _epoch_draws(
    seed: int, epoch: int, weights: tuple[float, ...], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The draws of one epoch.

    With W_t the shares of tasks 0 to t summed, the draws of tasks 0 to t in e epochs of L are
    round(W_t L e), so those of task t differ from w_t L e by at most one, and those in one epoch
    are not negative where w_t L is at least 1. Draw j of a task's c in the epoch is due at a random
    time in [j / c, (j + 1) / c). The tasks in the order of these times, moved round the epoch by a
    random number of places, are its draws; so each place is task t's with probability c / L.

    Args:
        seed: seed of the order.
        epoch: number of the epoch.
        weights: weight of each task.
        length: draws of an epoch, L.

    Returns:
        The task of each draw (L,), and how many draws of it came before, in all epochs (L,).
    """
    edges = np.cumsum(weights)
    edges /= edges[-1]
    ends = np.floor(np.multiply.outer([length * epoch, length * (epoch + 1)], edges) + 0.5)
    before, after = np.diff(ends.astype(np.int64), axis=1, prepend=0)
    counts = after - before
    tasks = np.repeat(np.arange(len(weights)), counts)
    within = np.arange(length) - np.repeat(np.cumsum(counts) - counts, counts)
    rng = np.random.default_rng([seed, zlib.crc32(b"mixture"), epoch])
    due = np.argsort((within + rng.random(length)) / counts[tasks], kind="stable")
    drawn = np.roll(tasks[due], rng.integers(length))
    numbers = np.empty_like(within)
    numbers[np.argsort(drawn, kind="stable")] = before[tasks] + within
    return drawn, numbers


class MixtureSteps:
    """The mixed batch of every optimizer step; its length is the number of steps.

    A batch is made when it is asked for, from the step's number.

    Args:
        rows: training rows by (task, sample).
        prompts: the prompt that the rows of each (task, sample) run under; several may share one.
        weights: positive weight of each (task, sample), in the order of ``rows``.
        batch_size: rows of a step over all processes; each weighs 1 / batch_size.
        seed: seed of the order.
        layout: padding.
        steps: number of steps.
        step: returns the number of the next step.
        rank: this process.
        world: number of processes.

    Raises:
        ValueError: as :func:`check_weights`; a batch size below 1; a (task, sample) without a
            prompt or without targets.
    """

    def __init__(
        self,
        rows: Mapping[Key, Rows],
        prompts: Mapping[Key, int],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        layout: Layout,
        steps: int,
        step: Callable[[], int],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sizes = {key: len(own) for key, own in rows.items()}
        check_weights(self.sizes, weights)
        check_targets(rows)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give at least 1")
        missing = [key for key in rows if key not in prompts]
        if missing:
            raise ValueError(f"no prompt is named for {missing}: give one for each (task, sample)")
        self.rows, self.prompts, self.weights = rows, prompts, tuple(weights)
        self.batch_size, self.seed, self.layout = batch_size, seed, layout
        self.steps, self.step = steps, step
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch(self.step())

    def batch(self, step: int) -> Batch:
        """This rank's rows of one step, every ``world``-th by length; weight 1/batch size.

        Args:
            step: number of the step, counted from 0.

        Returns:
            The rows; ``rows`` of the batch are numbers within their own (task, sample).
        """
        drawn = mixture_rows(self.seed, step, self.batch_size, self.sizes, self.weights)
        inputs = [self.rows[key].inputs[row] for key, row, _ in drawn]
        answers = [(self.rows[key].targets[row], draw) for key, row, draw in drawn]
        targets = [references[draw % len(references)] for references, draw in answers]
        mine = _by_length(inputs, targets)[self.rank :: self.world]
        return make_batch(
            [inputs[i] for i in mine],
            [targets[i] for i in mine],
            [self.prompts[drawn[i][0]] for i in mine],
            pad_id=self.layout.pad_id,
            left_padded=self.layout.left_padded,
            weight=[1 / self.batch_size] * len(mine),
            rows=[drawn[i][1] for i in mine],
        )


def check_targets(rows: Mapping[Key, Rows]) -> None:
    """Check that rows can be trained on.

    Raises:
        ValueError: naming every (task, sample) without rows, or without targets for each of them.
    """
    wrong = [key for key, own in rows.items() if not own.inputs or len(own.targets) != len(own)]
    if wrong:
        raise ValueError(f"rows without targets: {wrong}; give rows that are tokenised with them")
