"""Packs of rows: how they are shared out, cut and laid out, against plain loops over the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prompt_lab.core.batch import Batch, make_batch
from prompt_lab.core.packing import PADDING, cut, lay_out, pack, tokens_of


def batch_of(seed: int, left_padded: bool = True, count: int = 25, prompts: int = 3) -> Batch:
    """Rows of random ids and lengths."""
    rng = np.random.default_rng(seed)
    inputs = [rng.integers(5, 90, rng.integers(1, 30)).tolist() for _ in range(count)]
    targets = [rng.integers(5, 90, rng.integers(1, 5)).tolist() for _ in range(count)]
    named = rng.integers(0, prompts, count).tolist()
    return make_batch(inputs, targets, named, pad_id=0, left_padded=left_padded)


@pytest.mark.parametrize("bound", [1, 20, 64, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_packs_hold_every_row_once_of_one_prompt_within_the_bound(seed, bound):
    batch = batch_of(seed)
    lengths = tokens_of(batch, batch.target_lengths)
    packs = pack(lengths, batch.prompts, bound)
    assert sorted(row for rows in packs for row in rows) == list(range(len(batch)))
    assert all(len({batch.prompts[row] for row in rows}) == 1 for rows in packs)
    widest = max(sum(lengths[row] for row in rows) for rows in packs)
    # Rows are shared out evenly, not to the last token: a pack is over by less than a row.
    assert widest <= max(bound, max(lengths)) + max(lengths)
    assert pack(lengths, batch.prompts, bound) == packs
    padded = len(packs) * widest
    assert bound < max(lengths) or padded <= 1.7 * sum(lengths) + widest


def test_rows_of_one_prompt_are_one_pack_where_they_fit():
    assert pack([5, 4, 3], [0, 0, 0], 12) == [[0, 1, 2]]
    assert pack([], [], 12) == []
    assert len(pack([6, 6, 6, 6], [0, 0, 0, 0], 12)) == 2


@pytest.mark.parametrize("tokens", [1, 30, 100, 10_000])
def test_slices_hold_every_row_in_order_within_the_bound(tokens):
    batch = batch_of(1)
    parts = cut(batch, tokens)
    assert [row for part in parts for row in part.rows] == batch.rows
    for part in parts:
        lengths = tokens_of(part, part.target_lengths)
        packs = pack(lengths, part.prompts, 512)
        padded = len(packs) * max(sum(lengths[row] for row in rows) for rows in packs)
        assert len(part) == 1 or padded <= tokens
    assert cut(batch.slice(0, 0), 10) == []
    with pytest.raises(ValueError, match="tokens_per_forward is 0: give at least 1"):
        cut(batch, 0)


@pytest.mark.parametrize("left_padded", [True, False])
def test_tokens_stand_behind_one_another_row_by_row(left_padded):
    batch = batch_of(2, left_padded)
    packs = pack(tokens_of(batch, batch.target_lengths), batch.prompts, 60)
    laid = lay_out(batch, batch.target_lengths, packs)
    ids = torch.cat([batch.input_ids, batch.target_ids], 1).flatten().numpy()[laid.source]
    before = iter(laid.before.tolist())
    firsts = {}
    for at, rows in enumerate(packs):
        column = 0
        for row in rows:
            own = batch.input_ids[row][batch.input_mask[row] > 0].tolist()
            answer = batch.target_ids[row, : batch.target_lengths[row]].tolist()
            whole = own + answer[:-1]
            here = slice(column, column + len(whole))
            assert ids[at, here].tolist() == whole
            assert laid.row[at, here].tolist() == [row] * len(whole)
            assert laid.place[at, here].tolist() == list(range(len(whole)))
            firsts[row] = at * laid.row.shape[1] + column + len(own) - 1
            column += len(whole)
        assert (laid.row[at, column:] == PADDING).all()
    for row in range(len(batch)):
        for step in range(batch.target_lengths[row]):
            assert next(before) == firsts[row] + step
