"""Which rows a bank sees: each run's own data order, and the rows of an evaluation.

A run reads an endless stream of its training rows: one seeded permutation after another, cut into
its batches. The stream is a function of (order seed, task, sample) alone, and the rows of a step a
function of the step's number, so nothing about it needs to be saved, and a bank of any size sees
what its runs would see alone. Runs that have finished ask for no rows. Ranks share the rows of a
step or of an evaluation; none is padded or repeated.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from prompt_lab.core.batch import Batch, make_batch, spans
from prompt_lab.core.run import Run
from prompt_lab.data.tasks import Task


@dataclass(frozen=True)
class Rows:
    """The tokenised rows of one split.

    Attributes:
        task: the task.
        inputs: token ids of each input.
        targets: token ids of each of a row's references; empty where they are not trained on.
        references: the accepted answers as text.
        longest_target: tokens of the longest reference.
        shortest_targets: tokens of each row's shortest reference.
        cut: how many inputs were longer than ``data.max_input_length`` and cut.
    """

    task: Task
    inputs: list[list[int]]
    targets: list[list[list[int]]]
    references: list[list[str]]
    longest_target: int
    shortest_targets: list[int] = field(default_factory=list)
    cut: int = 0

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Layout:
    """How the backbone wants its rows: padding id, and padding side."""

    pad_id: int
    left_padded: bool


@lru_cache(maxsize=4096)
def epoch_order(
    order_seed: int, task: str, sample: int, epoch: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Order of the rows in one epoch, and a draw per row that picks among its references.

    Returns:
        A permutation (size,) and non-negative integers (size,).
    """
    rng = np.random.default_rng([order_seed, zlib.crc32(task.encode()), sample, epoch])
    return rng.permutation(size), rng.integers(2**31, size=size)


def step_rows(run: Run, order_seed: int, step: int, size: int) -> list[tuple[int, int]]:
    """Row number and reference draw of a run's rows at one optimizer step, counted from 0."""
    start = step * run.batch_size
    picked = []
    for position in range(start, start + run.batch_size):
        epoch, at = divmod(position, size)
        order, draws = epoch_order(order_seed, run.task, run.sample, epoch, size)
        picked.append((int(order[at]), int(draws[at])))
    return picked


class TrainSteps:
    """The batch of every optimizer step; its length is the number of steps.

    A batch is made when it is asked for, from the step's number and the runs that are live then.

    Args:
        runs: all runs of the bank.
        rows: training rows by (task, sample).
        order_seed: seed of the data order.
        layout: padding.
        steps: number of steps.
        step: returns the number of the next step.
        live: returns the indices of the runs that still train.
        rank: this process.
        world: number of processes.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        rows: Mapping[tuple[str, int], Rows],
        order_seed: int,
        layout: Layout,
        steps: int,
        step: Callable[[], int],
        live: Callable[[], list[int]],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.runs, self.rows, self.order_seed, self.layout = runs, rows, order_seed, layout
        self.steps, self.step, self.live = steps, step, live
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch(self.step(), self.live())

    def batch(self, step: int, live: Sequence[int]) -> Batch:
        """This rank's rows of one step, every ``world``-th by length; weight 1/batch size."""
        inputs, targets, prompts, weight, numbers = [], [], [], [], []
        for index in live:
            run = self.runs[index]
            rows = self.rows[run.task, run.sample]
            for row, draw in step_rows(run, self.order_seed, step, len(rows)):
                references = rows.targets[row]
                inputs.append(rows.inputs[row])
                targets.append(references[draw % len(references)])
                prompts.append(index)
                weight.append(1 / run.batch_size)
                numbers.append(row)
        mine = _by_length(inputs, targets)[self.rank :: self.world]
        return make_batch(
            [inputs[i] for i in mine],
            [targets[i] for i in mine],
            [prompts[i] for i in mine],
            pad_id=self.layout.pad_id,
            left_padded=self.layout.left_padded,
            weight=[weight[i] for i in mine],
            rows=[numbers[i] for i in mine],
        )


@dataclass
class EvaluationBatch:
    """Rows of one task and sample (no targets), under prompts of its runs.

    Attributes:
        task: name of the task.
        batch: the rows; ``batch.prompts`` are indices of runs.
        max_new_tokens: longest answer to generate.
    """

    task: str
    batch: Batch
    max_new_tokens: int

    def to(self, device: torch.device | str) -> EvaluationBatch:
        """The same with its tensors on ``device``."""
        return EvaluationBatch(self.task, self.batch.to(device), self.max_new_tokens)


class EvaluationSteps:
    """All rows of a split under every live run of their task and sample, one after another.

    Args:
        runs: all runs of the bank.
        rows: rows by (task, sample).
        layout: padding.
        tokens_per_forward: most padded tokens of a batch.
        longest_answer: most tokens to generate, by (task, sample).
        extra_per_row: tokens of a task's row besides its input, given the longest answer.
        live: returns the indices of the runs to evaluate.
        rank: this process.
        world: number of processes.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        rows: Mapping[tuple[str, int], Rows],
        layout: Layout,
        tokens_per_forward: int,
        longest_answer: Mapping[tuple[str, int], int],
        extra_per_row: Callable[[Task, int], int],
        live: Callable[[], list[int]],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.runs, self.rows, self.layout, self.live = runs, rows, layout, live
        self.tokens_per_forward, self.extra_per_row = tokens_per_forward, extra_per_row
        self.longest_answer = longest_answer
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[EvaluationBatch]:
        live = self.live()
        keys = [(self.runs[index].task, self.runs[index].sample) for index in live]
        for key in dict.fromkeys(keys):
            members = [index for index, own in zip(live, keys, strict=True) if own == key]
            yield from self._batches(key, members)

    def _batches(self, key: tuple[str, int], members: list[int]) -> Iterator[EvaluationBatch]:
        """Batches of one task's sample: rows by length, grouped by prompt in decoder-only models.

        Every second prompt has its shortest row first, so that a batch that holds rows of two
        prompts joins rows of about one length.
        """
        rows, longest = self.rows[key], self.longest_answer[key]
        pairs = [(index, row) for index in members for row in range(len(rows))]
        pairs.sort(key=lambda pair: -len(rows.inputs[pair[1]]))
        if self.layout.left_padded:
            groups = [[pair for pair in pairs if pair[0] == index] for index in members]
            turned = [group[::-1] if at % 2 else group for at, group in enumerate(groups)]
            pairs = [pair for group in turned for pair in group]
        pairs = pairs[self.rank :: self.world]
        lengths = [len(rows.inputs[row]) for _, row in pairs]
        extra = self.extra_per_row(rows.task, longest)
        for start, stop in spans(lengths, [0] * len(pairs), self.tokens_per_forward, extra):
            part = pairs[start:stop]
            batch = make_batch(
                [rows.inputs[row] for _, row in part],
                None,
                [index for index, _ in part],
                pad_id=self.layout.pad_id,
                left_padded=self.layout.left_padded,
                rows=[row for _, row in part],
            )
            yield EvaluationBatch(rows.task.name, batch, longest)


def _by_length(inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[int]:
    """Row numbers, longest row first; equal lengths keep their order."""
    return sorted(range(len(inputs)), key=lambda i: -(len(inputs[i]) + len(targets[i])))
