"""Episodes for meta-learning: adapt a prompt on support rows of a task, judge it on query rows.

An episode is one (task, sample): the support rows of K inner steps from its train split, and query
rows from its dev split. The meta-batch of a step has M of them. Passes over all (task, sample)
follow each other, each in a seeded order of its own, cut into meta-batches. Everything is a
function of the tasks, their order, the seed and the step, so nothing needs to be saved.

Within an episode no row stands twice before all rows of its split have been drawn. Then a new
order begins, so a split that is smaller than a batch gives rows again, as evenly as can be, where
CrossFit draws with replacement. The next visit to a (task, sample) begins with a new order.

It adapts nothing; it knows neither prompts nor gradients.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from prompt_lab.core.batch import Batch, make_batch
from prompt_lab.data.batches import Layout, Rows
from prompt_lab.data.mixtures import Key, check_targets, row_of_draw

Drawn = list[tuple[int, int]]
"""Rows, each with a number that picks among its references."""


@dataclass(frozen=True)
class EpisodeRows:
    """Which rows an episode has.

    Attributes:
        key: task and sample.
        support: the rows of each of K inner steps, from train.
        query: rows from dev.
    """

    key: Key
    support: list[Drawn]
    query: Drawn


@dataclass
class Episodes:
    """This process's episodes of a meta-batch.

    Row e of ``keys`` is episode e, and the rows of episode e run under prompt e of a bank with one
    prompt for each episode. A row weighs 1 / (rows of its episode in its batch), so the loss of a
    batch is the sum over episodes of their mean row losses. A process without episodes has batches
    without rows, as it has in training.

    Attributes:
        keys: task and sample of each episode.
        support: K batches, one for each inner step.
        query: the batch that judges the adapted prompts.
    """

    keys: list[Key]
    support: list[Batch]
    query: Batch

    def to(self, device: torch.device | str) -> Episodes:
        """The same with its tensors on ``device``."""
        support = [batch.to(device) for batch in self.support]
        return Episodes(self.keys, support, self.query.to(device))


@lru_cache(maxsize=8)
def _pass_order(seed: int, number: int, count: int) -> np.ndarray:
    """Order of the items (count,) in one pass over them."""
    return np.random.default_rng([seed, zlib.crc32(b"episodes"), number]).permutation(count)


def episode_rows(
    seed: int,
    step: int,
    sizes: Mapping[Key, tuple[int, int]],
    *,
    episodes: int,
    inner_steps: int,
    support_size: int,
    query_size: int,
) -> list[EpisodeRows]:
    """The episodes of one meta-step, counted from 0.

    Each (task, sample) stands once in a pass over all of them. A meta-batch that holds the end of
    a pass and the start of the next may have one twice, then with different rows.

    Args:
        seed: seed of the order.
        step: number of the meta-step.
        sizes: rows in train and in dev of each (task, sample).
        episodes: episodes of a meta-step, M.
        inner_steps: inner steps, K.
        support_size: train rows of an inner step.
        query_size: dev rows of an episode.

    Returns:
        M episodes.

    Raises:
        ValueError: a number below 1, no (task, sample), or one with an empty split.
    """
    _check(sizes, episodes, inner_steps, support_size, query_size)
    keys, found = list(sizes), []
    for position in range(step * episodes, (step + 1) * episodes):
        visit, at = divmod(position, len(keys))
        task, sample = key = keys[_pass_order(seed, visit, len(keys))[at]]
        train, dev = sizes[key]
        rows = _visit_rows(seed, task, sample, visit, inner_steps * support_size, train)
        cuts = range(0, len(rows), support_size)
        support = [rows[start : start + support_size] for start in cuts]
        # A stream of its own: with that of train, row i of dev would always go with row i of train.
        query = _visit_rows(seed, f"{task}/query", sample, visit, query_size, dev)
        found.append(EpisodeRows(key, support, query))
    return found


def _visit_rows(seed: int, task: str, sample: int, visit: int, count: int, size: int) -> Drawn:
    """The first rows of as many new permutations of a split as they need."""
    start = visit * -(-count // size) * size
    return [row_of_draw(seed, task, sample, start + at, size) for at in range(count)]


def _check(
    sizes: Mapping[Key, tuple[int, int]],
    episodes: int,
    inner_steps: int,
    support_size: int,
    query_size: int,
) -> None:
    """Check the numbers of :func:`episode_rows`."""
    numbers = {"episodes": episodes, "inner_steps": inner_steps}
    numbers |= {"support_size": support_size, "query_size": query_size}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}: give at least 1")
    if not sizes:
        raise ValueError("there is no (task, sample) to make episodes of: give at least one")
    empty = [key for key, both in sizes.items() if min(both) < 1]
    if empty:
        raise ValueError(f"no train or no dev rows for {empty}: leave them out")


class EpisodeSteps:
    """The episodes of every meta-step; its length is the number of meta-steps.

    Episodes are made when they are asked for, from the step's number. Process ``rank`` of ``world``
    has every ``world``-th episode of the meta-batch.

    Args:
        support: train rows by (task, sample).
        query: dev rows of the same, with targets.
        episodes: episodes of a meta-step over all processes, M.
        inner_steps: inner steps, K.
        support_size: train rows of an inner step.
        query_size: dev rows of an episode.
        seed: seed of the order.
        layout: padding.
        steps: number of meta-steps.
        step: returns the number of the next meta-step.
        rank: this process.
        world: number of processes.

    Raises:
        ValueError: as :func:`episode_rows`; support and query of different (task, sample); rows
            without targets.
    """

    def __init__(
        self,
        support: Mapping[Key, Rows],
        query: Mapping[Key, Rows],
        episodes: int,
        inner_steps: int,
        support_size: int,
        query_size: int,
        seed: int,
        layout: Layout,
        steps: int,
        step: Callable[[], int],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        alone = sorted(support.keys() ^ query.keys())
        if alone:
            raise ValueError(f"only one of support and query has {alone}: give both for each")
        self.sizes = {key: (len(support[key]), len(query[key])) for key in support}
        _check(self.sizes, episodes, inner_steps, support_size, query_size)
        check_targets(support)
        check_targets(query)
        self.support, self.query, self.episodes = support, query, episodes
        self.inner_steps, self.support_size = inner_steps, support_size
        self.query_size, self.seed, self.layout = query_size, seed, layout
        self.steps, self.step = steps, step
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Episodes]:
        while True:
            yield self.batch(self.step())

    def batch(self, step: int) -> Episodes:
        """This rank's episodes of one meta-step, every ``world``-th; there may be none.

        Args:
            step: number of the meta-step, counted from 0.

        Returns:
            The episodes; ``rows`` of the batches are numbers within their own split.
        """
        mine = episode_rows(
            self.seed,
            step,
            self.sizes,
            episodes=self.episodes,
            inner_steps=self.inner_steps,
            support_size=self.support_size,
            query_size=self.query_size,
        )[self.rank :: self.world]
        keys = [episode.key for episode in mine]
        inner = [[episode.support[k] for episode in mine] for k in range(self.inner_steps)]
        return Episodes(
            keys,
            [self._batch(self.support, keys, drawn) for drawn in inner],
            self._batch(self.query, keys, [episode.query for episode in mine]),
        )

    def _batch(
        self, source: Mapping[Key, Rows], keys: Sequence[Key], drawn: Sequence[Drawn]
    ) -> Batch:
        """One batch with the drawn rows of each episode, under the episode's prompt."""
        inputs, targets, prompts, weight, numbers = [], [], [], [], []
        for index, (key, picked) in enumerate(zip(keys, drawn, strict=True)):
            for row, draw in picked:
                references = source[key].targets[row]
                inputs.append(source[key].inputs[row])
                targets.append(references[draw % len(references)])
                prompts.append(index)
                weight.append(1 / len(picked))
                numbers.append(row)
        return make_batch(
            inputs,
            targets,
            prompts,
            pad_id=self.layout.pad_id,
            left_padded=self.layout.left_padded,
            weight=weight,
            rows=numbers,
        )
