"""Which rows of a data set become the train, dev and test of a few-shot sample."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from prompt_lab.data.few_shot import draw_all, draw_few_shot, draw_stratified, take_part
from prompt_lab.data.files import DataError

LABELS = ["a"] * 50 + ["b"] * 30 + ["c"] * 3


def shuffled(items: list, seed: int) -> list:
    """What CrossFit does: seed the global generator, shuffle the list in place."""
    np.random.seed(seed)
    items = list(items)
    np.random.shuffle(items)
    return items


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ((0.0, 0.8), slice(0, 9)),
        ((0.8, 1.0), slice(9, 12)),
        ((0.99, 1.0), slice(11, 12)),
        ((0, 5), slice(0, 5)),
        ((5, 99), slice(5, 12)),
    ],
)
def test_a_part_is_cut_after_a_shuffle_with_seed_42(part: tuple, expected: slice):
    rows = list("abcdefghijkl")
    assert take_part(rows, part) == shuffled(rows, 42)[expected]
    assert take_part(rows, None) == rows


@pytest.mark.parametrize("size", [3, 10, 40, 83])
def test_stratified_rows_keep_the_labels_shares(size: int):
    train, dev = draw_stratified(LABELS, size, 20, 42)
    counts = Counter(LABELS[row] for row in train)
    assert len(train) == len(set(train)) == size
    for label, count in Counter(LABELS).items():
        assert abs(counts[label] - size * count / len(LABELS)) < 1
    assert len(dev) == min(20, 83 - size)
    assert not set(train) & set(dev)


def test_stratified_refuses_fewer_rows_than_labels_and_more_than_there_are():
    with pytest.raises(DataError, match="2 rows cannot hold all 3 labels"):
        draw_stratified(LABELS, 2, 5, 1)
    with pytest.raises(DataError, match="84 rows of 83"):
        draw_stratified(LABELS, 84, 5, 1)


@pytest.mark.parametrize("seed", [100, 13])
@pytest.mark.parametrize("labels", [LABELS, [()] * 9], ids=["labels", "open"])
def test_few_shot_takes_the_first_and_the_next_k_of_each_label_in_shuffled_order(seed, labels):
    train, dev = draw_few_shot(labels, 2, seed)
    groups: dict = {}
    for row in shuffled(range(len(labels)), seed):
        groups.setdefault(labels[row], []).append(row)
    assert train == [row for rows in groups.values() for row in rows[:2]]
    assert dev == [row for rows in groups.values() for row in rows[2:4]]


def test_all_holds_out_a_tenth_with_the_labels_shares_and_a_thousand_at_most():
    train, dev = draw_all(LABELS, 42)
    assert sorted(train + dev) == list(range(83))
    assert train == sorted(train)
    assert Counter(LABELS[row] for row in dev) == {"a": 5, "b": 3}
    assert len(draw_all(["a"] * 20_000, 42)[1]) == 1000
