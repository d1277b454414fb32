"""Which rows a step sees, and the batches that training and evaluation iterate over.

Every draw is a pure function of seeds and the number of the batch, so nothing about it needs to be
saved, and a resumed fit sees what an uninterrupted one would: each run of a bank reads its own
endless stream of rows (`bank_draw`), the rows of many tasks are mixed (`mixture_draw`), episodes of
meta-learning have support and query rows (`episode_draw`). Finished runs ask for no rows. Processes
have every n-th row or episode of a batch (``share``: which, and n); none is padded or repeated.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from prompt_lab.core.batch import Batch, make_batch, spans
from prompt_lab.core.run import Run
from prompt_lab.data.tasks import Task

Key = tuple[str, int]
"""Task and few-shot sample."""

Drawn = list[tuple[int, int]]
"""Rows, each with a number that picks among its references; or runs, each with a row."""

Mixing = Literal["examples", "tasks", "temperature"]


@dataclass(frozen=True)
class Rows:
    """The tokenised rows of one split."""

    task: Task
    inputs: list[list[int]]  # token ids
    targets: list[list[list[int]]]  # of each of a row's references
    cut: int = 0  # how many inputs were longer than data.max_input_length

    @cached_property
    def longest_target(self) -> int:
        """Tokens of the longest reference."""
        return max(len(ids) for row in self.targets for ids in row)

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Layout:
    """How the backbone wants its rows: padding id and side, and what it runs once per prompt."""

    pad_id: int
    left_padded: bool
    front: tuple[int, ...] = ()


@dataclass
class Progress:
    """Where a fit is; its loaders read it when they are asked for a batch."""

    batches: int = 0  # of training, since the fit began
    live: list[int] = field(default_factory=list)  # places of the runs that still train


@dataclass(frozen=True)
class Draw:
    """What a batch of training holds."""

    batch: Callable[[int, Sequence[int]], Any]  # by its number, from 0, and the live runs' places
    one_pass: int  # batches until every row was seen once, on the longest way


@dataclass(eq=False)
class TrainSteps:
    """The batches of a fit, ``length`` in an epoch, each made when it is asked for."""

    draw: Draw
    progress: Progress
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.draw.batch(self.progress.batches, self.progress.live)


@lru_cache(maxsize=4096)
def epoch_order(
    order_seed: int, task: str, sample: int, epoch: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Order of the rows in one epoch (size,), and a number per row that picks a reference."""
    rng = np.random.default_rng([order_seed, zlib.crc32(task.encode()), sample, epoch])
    return rng.permutation(size), rng.integers(2**31, size=size)


def _stream(seed: int, task: str, sample: int, size: int, numbers: Sequence[int]) -> Drawn:
    """Draws of a stream by their numbers, from 0: one permutation of the rows after another."""
    drawn = []
    for number in numbers:
        order, draws = epoch_order(seed, task, sample, number // size, size)
        drawn.append((int(order[number % size]), int(draws[number % size])))
    return drawn


def _batch(
    picked: Sequence[tuple[Rows, int, int, int, float]],
    layout: Layout,
    share: tuple[int, int] = (0, 1),
) -> Batch:
    """Rows with draw, prompt and weight as a batch; this process's are every n-th by length."""
    made = []
    for rows, row, draw, prompt, weight in picked:
        references = rows.targets[row]
        made.append((rows.inputs[row], references[draw % len(references)], prompt, weight, row))
    made.sort(key=lambda one: -(len(one[0]) + len(one[1])))
    own = made[share[0] :: share[1]]
    inputs, targets, prompts, weights, numbers = zip(*own, strict=True) if own else ((),) * 5
    return make_batch(inputs, targets, prompts, **vars(layout), weight=weights, rows=numbers)


def step_rows(run: Run, order_seed: int, step: int, size: int) -> Drawn:
    """A run's rows at one step, counted from 0."""
    numbers = range(step * run.batch_size, (step + 1) * run.batch_size)
    return _stream(order_seed, run.task, run.sample, size, numbers)


def bank_draw(
    runs: Sequence[Run],
    rows: Mapping[Key, Rows],
    order_seed: int,
    layout: Layout,
    share: tuple[int, int] = (0, 1),
) -> Draw:
    """The rows of all live runs, each with its own order and batch size; weight 1/batch size."""
    sources = [rows[run.task, run.sample] for run in runs]

    def batch(step: int, live: Sequence[int]) -> Batch:
        picked = [
            (sources[place], row, draw, place, 1 / runs[place].batch_size)
            for place in live
            for row, draw in step_rows(runs[place], order_seed, step, len(sources[place]))
        ]
        return _batch(picked, layout, share)

    passes = [-(-len(own) // run.batch_size) for run, own in zip(runs, sources, strict=True)]
    return Draw(batch, max(passes, default=1))


def task_weights(sizes: Sequence[int], mixing: Mixing) -> list[float]:
    """Share of each task in a mixture (Raffel et al. 2020, section 3.5.2); they sum to 1.

    Of a task of n_t rows it is n_t / sum n by "examples", the same for each by "tasks", and
    n_t^(1/T) / sum n^(1/T) by "temperature", with T = 2.

    Raises:
        ValueError: an unknown mixing.
    """
    powers = {"examples": 1.0, "tasks": 0.0, "temperature": 1 / 2}
    if mixing not in powers:
        raise ValueError(f"mixing is {mixing!r}: choose among {', '.join(powers)}")
    scaled = np.asarray(sizes, dtype=np.float64) ** powers[mixing]
    return (scaled / scaled.sum()).tolist()


def mixture_draw(
    rows: Mapping[Key, Rows],
    mixing: Mixing,
    batch_size: int,
    seed: int,
    layout: Layout,
    share: tuple[int, int] = (0, 1),
) -> Draw:
    """Rows of many tasks mixed, those of the t-th (task, sample) under prompt t.

    A step has ``batch_size`` rows over all processes, of weight 1 / batch_size each.

    Raises:
        ValueError: as :func:`task_weights`.
    """
    sizes = {key: len(own) for key, own in rows.items()}
    weights = task_weights(list(sizes.values()), mixing)
    places = {key: place for place, key in enumerate(rows)}

    def batch(step: int, live: Sequence[int]) -> Batch:
        drawn = mixture_rows(seed, step, batch_size, sizes, weights)
        picked = [(rows[key], row, n, places[key], 1 / batch_size) for key, row, n in drawn]
        return _batch(picked, layout, share)

    return Draw(batch, -(-sum(sizes.values()) // batch_size))


def mixture_rows(
    seed: int, step: int, batch_size: int, sizes: Mapping[Key, int], weights: Sequence[float]
) -> list[tuple[Key, int, int]]:
    """The B draws of one step of a mixture, counted from 0: key, row, and draw of a reference.

    An epoch is as many draws as the tasks have rows in total. Each task has its share of them by
    ``weights``, whose ratios count, spread evenly, and reads the stream that a run of it alone
    reads. Its draws up to the end of any epoch differ from its share by at most one; with weights
    by size each epoch holds every row once.
    """
    keys, length, shares, drawn = list(sizes), sum(sizes.values()), tuple(weights), []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, at = divmod(position, length)
        tasks, numbers = _epoch_draws(seed, epoch, shares, length)
        task, sample = key = keys[tasks[at]]
        ((row, draw),) = _stream(seed, task, sample, sizes[key], [int(numbers[at])])
        drawn.append((key, row, draw))
    return drawn


@lru_cache(maxsize=8)
def _epoch_draws(
    seed: int, epoch: int, weights: tuple[float, ...], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The task of each draw of an epoch (L,), and how many of it came before, in all epochs (L,).

    With W_t the shares of tasks 0 to t summed, the draws of tasks 0 to t in e epochs of L are
    round(W_t L e), so those of task t differ from w_t L e by at most one. Draw j of a task's c in
    the epoch is due at a random time in [j / c, (j + 1) / c). The tasks in the order of these
    times, moved round the epoch by a random number of places, are its draws; so each place is task
    t's with probability c / L.
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


class EpisodeRows(NamedTuple):
    """Which rows an episode has: of train in each of K inner steps, and of dev to judge by."""

    key: Key
    support: list[Drawn]
    query: Drawn


@dataclass
class Episodes:
    """This process's episodes of a meta-batch: K support batches, and the query.

    The rows of episode e run under prompt e of a bank with one prompt for each episode, and weigh
    1 / (rows of the episode in the batch), so the loss of a batch is the sum over episodes of their
    mean row losses. A process without episodes has batches without rows.
    """

    keys: list[Key]
    support: list[Batch]
    query: Batch

    def to(self, device: torch.device | str) -> Episodes:
        """The same with its tensors on ``device``."""
        support = [batch.to(device) for batch in self.support]
        return Episodes(self.keys, support, self.query.to(device))


def episode_draw(
    support: Mapping[Key, Rows],
    query: Mapping[Key, Rows],
    episodes: int,
    inner_steps: int,
    support_size: int,
    query_size: int,
    seed: int,
    layout: Layout,
    share: tuple[int, int] = (0, 1),
) -> Draw:
    """The episodes of :func:`episode_rows`, of which a process has every n-th."""
    sizes = {key: (len(support[key]), len(query[key])) for key in support}
    counts = (episodes, inner_steps, support_size, query_size)

    def batch(step: int, live: Sequence[int]) -> Episodes:
        mine = episode_rows(seed, step, sizes, *counts)[share[0] :: share[1]]

        def part(source: Mapping[Key, Rows], drawn: Sequence[Drawn]) -> Batch:
            picked = [
                (source[mine[place].key], row, draw, place, 1 / len(rows))
                for place, rows in enumerate(drawn)
                for row, draw in rows
            ]
            return _batch(picked, layout)

        inner = [part(support, [own.support[k] for own in mine]) for k in range(inner_steps)]
        return Episodes([own.key for own in mine], inner, part(query, [own.query for own in mine]))

    return Draw(batch, -(-len(sizes) // episodes))


def episode_rows(
    seed: int,
    step: int,
    sizes: Mapping[Key, tuple[int, int]],
    episodes: int,
    inner_steps: int,
    support_size: int,
    query_size: int,
) -> list[EpisodeRows]:
    """The M episodes of one meta-step, counted from 0, with K inner steps each.

    Passes over all (task, sample) follow each other, each in a seeded order, cut into meta-batches.
    Within an episode no row stands twice before all rows of its split have been drawn; then a new
    order begins, so a split that is smaller than a batch gives rows again, as evenly as can be,
    where CrossFit draws with replacement. The next visit begins with a new order. ``sizes`` has the
    rows in train and in dev of each (task, sample).
    """
    keys, found = list(sizes), []
    for position in range(step * episodes, (step + 1) * episodes):
        visit, at = divmod(position, len(keys))
        order = np.random.default_rng([seed, zlib.crc32(b"episodes"), visit]).permutation(len(keys))
        task, sample = key = keys[order[at]]
        train, query = (
            _stream(seed, stream, sample, size, range(first, first + count))
            for stream, count, size in (
                (task, inner_steps * support_size, sizes[key][0]),
                # A stream of its own: else row i of dev would always go with row i of train.
                (f"{task}/query", query_size, sizes[key][1]),
            )
            for first in [visit * -(-count // size) * size]
        )
        cuts = range(0, len(train), support_size)
        support = [train[start : start + support_size] for start in cuts]
        found.append(EpisodeRows(key, support, query))
    return found


@dataclass
class EvaluationBatch:
    """Rows of one task and sample (no targets), under prompts of its runs, named by place."""

    task: str
    batch: Batch
    max_new_tokens: int

    def to(self, device: torch.device | str) -> EvaluationBatch:
        """The same with its tensors on ``device``."""
        return replace(self, batch=self.batch.to(device))


@dataclass(eq=False)
class EvaluationSteps:
    """All rows of a split under every live run of their task and sample, one after another.

    Where runs stop in a fit, later evaluations are of those that ``live`` gives when they begin.
    """

    runs: Sequence[Run]
    rows: Mapping[Key, Rows]
    layout: Layout
    tokens_per_forward: int  # most padded tokens of a batch
    longest_answer: Mapping[Key, int]  # most tokens to generate
    extra_per_row: Callable[[Task, int], int]  # tokens besides the input, by the longest answer
    live: Callable[[], Sequence[int]]  # places of the runs to evaluate
    share: tuple[int, int] = (0, 1)  # this process, and how many share the rows
    block: int | None = None  # most runs whose rows come before those of others; None for all
    _made: tuple[list[int], list[tuple[Key, Drawn]]] = field(default=([], []), init=False)

    def __len__(self) -> int:
        return max(1, len(self._parts()))  # Lightning skips what has none

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for key, part in self._parts():
            rows, (prompts, numbers) = self.rows[key], zip(*part, strict=True)
            inputs = [rows.inputs[row] for row in numbers]
            batch = make_batch(inputs, None, prompts, **vars(self.layout), rows=numbers)
            yield EvaluationBatch(rows.task.name, batch, self.longest_answer[key])

    def _parts(self) -> list[tuple[Key, Drawn]]:
        """Places of runs and rows of each batch: rows by length, in decoders by prompt first.

        Every second prompt has its shortest row first, so that a batch that holds rows of two
        prompts joins rows of about one length.
        """
        live = list(self.live())
        if live == self._made[0]:
            return self._made[1]
        parts, block = [], self.block or len(live) or 1
        for start in range(0, len(live), block):
            members: dict[Key, list[int]] = {}
            for place in live[start : start + block]:
                run = self.runs[place]
                members.setdefault((run.task, run.sample), []).append(place)
            for key, places in members.items():
                rows = self.rows[key]
                order = sorted(range(len(rows)), key=lambda row: -len(rows.inputs[row]))
                turns = (order, order[::-1] if self.layout.left_padded else order)
                pairs = [(place, row) for at, place in enumerate(places) for row in turns[at % 2]]
                if not self.layout.left_padded:
                    pairs.sort(key=lambda pair: -len(rows.inputs[pair[1]]))
                pairs = pairs[self.share[0] :: self.share[1]]
                lengths = [len(rows.inputs[row]) for _, row in pairs]
                extra = self.extra_per_row(rows.task, self.longest_answer[key])
                cuts = spans(lengths, [0] * len(pairs), self.tokens_per_forward, extra)
                parts += [(key, pairs[a:b]) for a, b in cuts]
        self._made = live, parts
        return parts
