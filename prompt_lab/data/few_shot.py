"""Which rows of a data set become train, dev and test: CrossFit's procedure, and other sizes.

CrossFit (Ye et al. 2021, section 3.2 and its task builders): test is one part of the data for all
samples; train and dev of a sample are drawn from another part, the pool, by a shuffle seeded with
the number of the sample. Tasks of the kind "classification" take the first K rows of each label as
train and the next K as dev, labels in the order in which they first come up; the others take the
first K rows, and the next K. Shuffles are those of NumPy's legacy generator, so that the files are
the published ones to the byte.

Besides: subsamples of N rows that keep the shares of the labels (task prompt vectors, Belanec et
al. 2024), and the whole pool. All get the labels of the pool's rows, equal ones where labels do not
count, and give the row numbers of train and of dev.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

from prompt_lab.data.files import DataError
from prompt_lab.data.tasks import Part

CUT_SEED = 42
"""Seed of the shuffle that parts a data set, for all tasks and samples."""

DEV_ROWS = 1000
"""Most dev rows beside a whole pool (Belanec et al. 2024 hold out as many)."""

Item = TypeVar("Item")
Labels = Sequence[Hashable]


def take_part(rows: Sequence[Item], part: Part | None) -> list[Item]:
    """Rows of a part after the shuffle with `CUT_SEED`; all, as they are, where part is None.

    Ends are shares (floats) or row numbers (ints). The row of a share is rounded down; 1.0 is the
    end.
    """
    if part is None:
        return list(rows)
    start, stop = (int(end * len(rows)) if isinstance(end, float) else end for end in part)
    return [rows[place] for place in _shuffle(len(rows), CUT_SEED)[start:stop]]


def draw_few_shot(labels: Labels, shots: int, seed: int) -> tuple[list[int], list[int]]:
    """K rows of each label as CrossFit draws them; a label with less than 2 K rows has fewer."""
    groups: dict[Hashable, list[int]] = {}
    for row in _shuffle(len(labels), seed):
        groups.setdefault(labels[row], []).append(row)
    train = [row for rows in groups.values() for row in rows[:shots]]
    dev = [row for rows in groups.values() for row in rows[shots : 2 * shots]]
    return train, dev


def draw_stratified(
    labels: Labels, size: int, dev_size: int, seed: int
) -> tuple[list[int], list[int]]:
    """N rows in all, in which every label keeps its share, and dev rows from what is left.

    Shares are kept to the row by largest remainders: each label gets its share of ``size`` rounded
    down, and the rows left go to the labels with the largest remainders, ties to the label that
    comes first in the text order. Belanec et al. 2024 (section 4.3) draw theirs with scikit-learn's
    shuffles through `datasets`; the law is the same, the rows are others.

    Raises:
        DataError: The pool has fewer than N rows, or N is less than the number of labels.
    """
    kinds = len(set(labels))
    if size < kinds:
        raise DataError(f"{size} rows cannot hold all {kinds} labels: ask for {kinds} or more")
    if size > len(labels):
        raise DataError(f"{size} rows of {len(labels)}: the data set has no more, ask for less")
    order = _shuffle(len(labels), seed)
    train = _keep_shares(order, labels, size)
    taken = set(train)
    rest = [row for row in order if row not in taken]
    return train, _keep_shares(rest, labels, min(dev_size, len(rest)))


def draw_all(labels: Labels, seed: int) -> tuple[list[int], list[int]]:
    """The whole pool in its order: a tenth as dev, but no more than `DEV_ROWS`, the rest as train.

    The labels keep their shares, as in `draw_stratified`.
    """
    dev_size = min(DEV_ROWS, len(labels) // 10)
    dev = _keep_shares(_shuffle(len(labels), seed), labels, dev_size)
    return sorted(set(range(len(labels))).difference(dev)), dev


def _keep_shares(order: Sequence[int], labels: Labels, size: int) -> list[int]:
    """The first rows of an order such that each label has its share of ``size``."""
    counts = Counter(labels[row] for row in order)
    exact = {label: size * count / len(order) for label, count in counts.items()}
    quota = {label: int(share) for label, share in exact.items()}
    by_rest = sorted(exact, key=lambda label: (quota[label] - exact[label], str(label)))
    for label in by_rest[: size - sum(quota.values())]:
        quota[label] += 1
    kept = []
    for row in order:
        if quota[labels[row]]:
            quota[labels[row]] -= 1
            kept.append(row)
    return kept


def _shuffle(count: int, seed: int) -> list[int]:
    """Row numbers in the order of NumPy's legacy shuffle, which CrossFit's files depend on."""
    return np.random.RandomState(seed).permutation(count).tolist()
