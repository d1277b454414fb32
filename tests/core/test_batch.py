"""Padding, slicing and cutting of rows, against the plain lists they were made from."""

from __future__ import annotations

import random

import pytest
import torch

from prompt_lab.core.batch import IGNORE, Batch, make_batch, micro_batches, spans

PAD = 9


def random_rows(count: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Inputs of 1 to 12 ids and targets of 1 to 6."""
    rng = random.Random(seed)
    inputs = [[rng.randrange(1, 8) for _ in range(rng.randint(1, 12))] for _ in range(count)]
    targets = [[rng.randrange(1, 8) for _ in range(rng.randint(1, 6))] for _ in range(count)]
    return inputs, targets


def make(inputs: list[list[int]], targets: list[list[int]] | None, left: bool) -> Batch:
    count = len(inputs)
    return make_batch(
        inputs,
        targets,
        [i % 3 for i in range(count)],
        pad_id=PAD,
        left_padded=left,
        weight=[i / 8 for i in range(count)],
        rows=[100 + i for i in range(count)],
    )


def unpadded(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of the rows, read from the tensors by their masks alone."""
    return [
        (ids[mask.bool()].tolist(), target[target != IGNORE].tolist())
        for ids, mask, target in zip(
            batch.input_ids, batch.input_mask, batch.target_ids, strict=True
        )
    ]


@pytest.mark.parametrize("left", [True, False])
def test_a_batch_holds_its_rows_longest_first(left: bool) -> None:
    inputs, targets = random_rows(20, seed=1)
    batch = make(inputs, targets, left)
    places = [row - 100 for row in batch.rows]
    lengths = [len(inputs[i]) + len(targets[i]) for i in places]
    assert sorted(places) == list(range(20))
    assert lengths == sorted(lengths, reverse=True)
    assert unpadded(batch) == [(inputs[i], targets[i]) for i in places]
    assert batch.prompts == batch.prompt_index.tolist() == [i % 3 for i in places]
    assert batch.weight.tolist() == [i / 8 for i in places]
    assert batch.input_lengths == [len(inputs[i]) for i in places]
    assert batch.target_lengths == [len(targets[i]) for i in places]
    assert len(batch) == 20


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 inputs, but .*'prompts': 1.*'weight': 3"):
        make_batch([[1], [2]], None, [0], pad_id=PAD, left_padded=True, weight=[1, 1, 1])


@pytest.mark.parametrize("left", [True, False])
def test_a_slice_equals_a_batch_of_its_rows(left: bool) -> None:
    """Reference: the batch made from these rows alone; so no padding is left over."""
    inputs, targets = random_rows(15, seed=2)
    batch = make(inputs, targets, left)
    part = batch.slice(4, 11)
    places = [row - 100 for row in part.rows]
    alone = make_batch(
        [inputs[i] for i in places],
        [targets[i] for i in places],
        [i % 3 for i in places],
        pad_id=PAD,
        left_padded=left,
        weight=[i / 8 for i in places],
        rows=part.rows,
    )
    assert vars(part).keys() == vars(alone).keys()
    for name, value in vars(alone).items():
        found = getattr(part, name)
        same = torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
        assert same, name


def test_a_batch_goes_to_a_gpu_over_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here: what is asked of torch is recorded."""
    asked: list[object] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append("pinned") or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, **more: asked.append((device, more)) or self
    )
    make(*random_rows(4, seed=3), left=True).to("cuda:1")
    assert asked == ["pinned", (torch.device("cuda:1"), {"non_blocking": True})] * 5


def test_micro_batches_are_no_smaller_than_they_must_be() -> None:
    """A slice and the first row of the next one together would break the bound, or be padding."""
    batch = make(*random_rows(40, seed=5), left=False)
    parts = micro_batches(batch, 60)
    start = 0
    for part in parts[:-1]:
        wider = batch.slice(start, start + len(part) + 1)
        width = wider.input_ids.shape[1] + wider.target_ids.shape[1]
        own = wider.input_lengths[-1] + wider.target_lengths[-1]
        assert len(wider) * width > 60 or 2 * own < width
        start += len(part)


def test_spans_take_rows_in_order_within_the_bound() -> None:
    def cut(lengths: list[int], tokens: int, extra: int = 0) -> list[tuple[int, int]]:
        return spans(lengths, [0] * len(lengths), tokens, extra)

    assert cut([], 10) == []
    assert cut([5, 5, 5], 10) == [(0, 2), (2, 3)]
    assert cut([5, 5, 5], 10, 1) == [(0, 1), (1, 2), (2, 3)]
    assert cut([50, 1, 1], 10) == [(0, 1), (1, 3)]
    assert cut([1, 9, 1], 10) == [(0, 1), (1, 2), (2, 3)]
    assert spans([4, 4], [1, 2], 11) == [(0, 1), (1, 2)]
    # Rows of less than half the width wait for the next span, if this one is a quarter full.
    assert cut([20, 20, 9, 9], 1000) == [(0, 4)]
    assert cut([20, 20, 10, 9], 240) == [(0, 3), (3, 4)]
    assert cut([20, 20, 10, 9], 240, 10) == [(0, 4)]


def test_micro_batches_need_a_positive_bound() -> None:
    batch = make([[1]], None, left=True)
    with pytest.raises(ValueError, match="tokens_per_forward is 0: give at least 1"):
        micro_batches(batch, 0)
