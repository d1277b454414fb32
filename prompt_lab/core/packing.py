"""Rows laid out as sequences: several rows of one prompt behind one another, without padding.

Rows of a prompt need not be rows of a batch. Laid one behind the other, each with positions of its
own, and with a mask that lets a token see the prompt and the earlier tokens of its own row, they
share the prompt's keys and values, and nothing is padded but the shorter of several sequences. The
result is exact. Attention grows with the length of a sequence, linear layers do not, so sequences
have a bound. All here is NumPy on the host; lengths are known there, and the device never waits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

import numpy as np

from prompt_lab.core.batch import Batch

PACK_TOKENS = 256
"""Most tokens of a pack of several rows; chosen by ``tests/benchmarks/pack_bound.py`` on a CPU."""

PADDING = -1
"""The row that tokens of padding belong to."""


@dataclass(frozen=True)
class Sequences:
    """P sequences of at most L tokens, made of the rows of a batch.

    Attributes:
        rows: the rows of each sequence, in the order in which they stand in it.
        source: (P, L) the place of each token among the flattened (B, S + T) ids of inputs and
            targets; 0 for padding.
        row: (P, L) the row of each token, ``PADDING`` for none.
        place: (P, L) the place of each token within its row, from 0.
        before: (M,) the places among the P * L tokens from which targets are predicted, row by row
            in the order of the batch.
    """

    rows: list[list[int]]
    source: np.ndarray
    row: np.ndarray
    place: np.ndarray
    before: np.ndarray


def pack(lengths: Sequence[int], prompts: Sequence[int], bound: int) -> list[list[int]]:
    """Share rows out into packs of one prompt each, of about equal length.

    Args:
        lengths: tokens of each row.
        prompts: the prompt of each row.
        bound: most tokens of a pack; a longer row is a pack of its own.

    Returns:
        The rows of each pack.
    """
    totals: dict[int, int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        totals[prompt] = totals.get(prompt, 0) + length
    longest, most = max(lengths, default=0), max(totals.values(), default=0)
    fewest = ceil(most / bound) or 1
    sizes = [max(longest, ceil(most / parts)) for parts in range(fewest, fewest + 3)]
    size = min(sizes, key=lambda one: one * sum(ceil(total / one) for total in totals.values()))
    packs: dict[int, list[list[int]]] = {}
    loads: dict[int, list[int]] = {}
    for prompt, total in totals.items():
        count = ceil(total / size) or 1
        packs[prompt], loads[prompt] = [[] for _ in range(count)], [0] * count
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        load = loads[prompts[row]]
        at = load.index(min(load))
        load[at] += lengths[row]
        packs[prompts[row]][at].append(row)
    return [rows for parts in packs.values() for rows in parts if rows]


def tokens_of(batch: Batch, targets: Sequence[int]) -> list[int]:
    """Tokens of each row that are run: its input, and its targets but for the last."""
    pairs = zip(batch.input_lengths, targets, strict=True)
    return [own + max(0, more - 1) for own, more in pairs]


def packs_of(batch: Batch, targets: Sequence[int]) -> list[list[int]]:
    """The rows of each pack of a batch, given how many targets of each row are predicted."""
    return pack(tokens_of(batch, targets), batch.prompts, PACK_TOKENS)


def padded_tokens(batch: Batch) -> int:
    """Tokens of the packs of a batch, padding counted."""
    tokens, packs = tokens_of(batch, batch.target_lengths), packs_of(batch, batch.target_lengths)
    return len(packs) * max((sum(tokens[row] for row in rows) for rows in packs), default=0)


def is_one_each(batch: Batch) -> bool:
    """Whether the rows of each prompt are one pack."""
    return len(packs_of(batch, batch.target_lengths)) == len({*batch.prompts})


def cut(batch: Batch, tokens_per_forward: int) -> list[Batch]:
    """Cut a batch into slices whose packs hold at most so many tokens, padding counted.

    One row is always taken, however long.

    Raises:
        ValueError: ``tokens_per_forward`` is not positive.
    """
    if tokens_per_forward < 1:
        raise ValueError(f"tokens_per_forward is {tokens_per_forward}: give at least 1")
    if len(batch) < 2 or padded_tokens(batch) <= tokens_per_forward:
        return [batch] if len(batch) else []
    tokens = tokens_of(batch, batch.target_lengths)
    half = bisect_left(list(accumulate(tokens)), sum(tokens) / 2) + 1
    half = min(half, len(batch) - 1)
    parts = batch.slice(0, half), batch.slice(half, len(batch))
    return [piece for part in parts for piece in cut(part, tokens_per_forward)]


def lay_out(batch: Batch, targets: Sequence[int], packs: Sequence[Sequence[int]]) -> Sequences:
    """Lay rows out as sequences: the input of a row, then its targets but for the last.

    Args:
        batch: rows; their ids are not looked at.
        targets: how many targets of each row are predicted; the last is not run.
        packs: the rows of each sequence.
    """
    width, depth = batch.input_ids.shape[1], batch.target_ids.shape[1]
    tokens = tokens_of(batch, targets)
    length = max((sum(tokens[row] for row in rows) for rows in packs), default=0)
    source = np.zeros((len(packs), length), dtype=np.int64)
    place = np.zeros_like(source)
    row_of = np.full_like(source, PADDING)
    first = [0] * len(batch)
    for at, rows in enumerate(packs):
        column = 0
        for row in rows:
            own, count = batch.input_lengths[row], tokens[row]
            here = slice(column, column + count)
            steps = np.arange(count)
            gap = width - own if batch.left_padded else 0
            behind = np.where(steps < own, steps + gap, steps - own + width)
            source[at, here] = row * (width + depth) + behind
            place[at, here], row_of[at, here] = steps, row
            first[row] = at * length + column + own - 1
            column += count
    before = [first[row] + step for row, count in enumerate(targets) for step in range(count)]
    return Sequences([[*rows] for rows in packs], source, row_of, place, np.array(before, np.int64))
