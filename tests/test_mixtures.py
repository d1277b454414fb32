"""Batches that mix tasks: shares, passes through each task, ranks and resume, by plain counting."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from prompt_lab.core.batch import IGNORE, Batch
from prompt_lab.data.sampling import Layout, Rows, epoch_order
from prompt_lab.data.sampling import Key, Mixing, MixtureSteps, mixture_rows, task_weights
from prompt_lab.data.tasks import Task

LEFT, RIGHT = Layout(0, True), Layout(0, False)
SIZES: dict[Key, int] = {("a", 13): 32, ("a", 42): 32, ("b", 13): 7, ("c", 13): 96, ("d", 13): 1}
TOTAL = sum(SIZES.values())
PROMPTS = {key: (0 if key[0] == "a" else at) for at, key in enumerate(SIZES)}
MIXINGS: tuple[Mixing, ...] = ("examples", "tasks", "temperature")
Draw = tuple[Key, int, int]


def weights(mixing: Mixing) -> list[float]:
    return task_weights(list(SIZES.values()), mixing)


def drawn(mixing: Mixing, count: int, batch_size: int = 8, seed: int = 0) -> list[Draw]:
    """The first draws, in order."""
    found: list[Draw] = []
    for step in range(-(-count // batch_size)):
        found += mixture_rows(seed, step, batch_size, SIZES, weights(mixing))
    return found[:count]


def make_rows(key: Key, size: int, references: int = 1) -> Rows:
    """Rows of random lengths; a row's input and targets tell which row of which task they are."""
    task, sample = key
    rng, base = random.Random(f"{task}{sample}"), 1000 * (1 + list(SIZES).index(key))
    targets = [
        [[base + 10 * row + k] * rng.randint(1, 4) for k in range(references)]
        for row in range(size)
    ]
    return Rows(
        task=Task(task, "custom", "EM", 32, None),
        inputs=[[base + row] * rng.randint(1, 9) for row in range(size)],
        targets=targets,
        references=[[f"{row}"] for row in range(size)],
        longest_target=4,
    )


ROWS = {key: make_rows(key, size) for key, size in SIZES.items()}


def steps(**changes: Any) -> MixtureSteps:
    given: dict[str, Any] = {"rows": ROWS, "prompts": PROMPTS, "weights": weights("examples")}
    given |= {"batch_size": 8, "seed": 0, "layout": LEFT, "steps": 100, "step": lambda: 0}
    return MixtureSteps(**{**given, **changes})


def contents(batch: Batch) -> Counter[tuple[Any, ...]]:
    """The rows of a batch, whatever their order and padding."""
    columns = (batch.prompts, batch.rows, batch.weight.tolist())
    masked = zip(batch.input_ids, batch.input_mask, strict=True)
    ids = [row[mask.bool()].tolist() for row, mask in masked]
    targets = [row[row != IGNORE].tolist() for row in batch.target_ids]
    return Counter(zip(*columns, map(tuple, ids), map(tuple, targets), strict=True))


# ---- weights ------------------------------------------------------------------------------------


def test_weights_are_by_size_equal_or_between_the_two() -> None:
    """Raffel et al. 2020, section 3.5.2, by hand."""
    assert task_weights([1, 4, 5], "examples") == pytest.approx([0.1, 0.4, 0.5])
    assert task_weights([1, 4, 5], "tasks") == pytest.approx([1 / 3] * 3)
    assert task_weights([1, 4, 16], "temperature", 2) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    by_size, equal = task_weights([3, 8], "examples"), task_weights([3, 8], "tasks")
    assert task_weights([3, 8], "temperature", 1) == pytest.approx(by_size)
    assert task_weights([3, 8], "temperature", float("inf")) == pytest.approx(equal)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([], "examples"), "at least one task"),
        (([3, 0], "examples"), "none empty"),
        (([3], "size"), "choose among examples, tasks, temperature"),
        (([3], "temperature", 0.5), "temperature is 0.5: give at least 1"),
        (([3], "temperature", float("nan")), "temperature is nan"),
    ],
)
def test_weights_that_cannot_be_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_weights(*given)


# ---- the law ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 8, 64, 400])
def test_by_size_every_epoch_holds_every_row_once(batch_size: int) -> None:
    """Also where steps straddle epochs, or are larger than one."""
    rows = [(key, row) for key, row, _ in drawn("examples", 4 * TOTAL, batch_size)]
    every = {(key, row) for key, size in SIZES.items() for row in range(size)}
    epochs = [rows[at : at + TOTAL] for at in range(0, len(rows), TOTAL)]
    assert all(len(epoch) == TOTAL and set(epoch) == every for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_by_size_an_epoch_is_exact_for_any_sizes() -> None:
    """Shares are fractions, yet none of them rounds a row away, in early and in late epochs."""
    rng = random.Random(0)
    for seed in range(30):
        sizes = {(f"{at}", 13): rng.randint(1, 40) for at in range(rng.randint(1, 30))}
        shares = task_weights(list(sizes.values()), "examples")
        for epoch in (0, 1, 7, 10**6):
            made = mixture_rows(seed, epoch, sum(sizes.values()), sizes, shares)
            every = {(key, row) for key, size in sizes.items() for row in range(size)}
            assert {(key, row) for key, row, _ in made} == every


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_task_has_its_share_of_the_draws_of_each_epoch(mixing: Mixing) -> None:
    """Off by at most one draw in all, however many epochs have passed."""
    keys = [key for key, _, _ in drawn(mixing, 12 * TOTAL)]
    for end in range(TOTAL, len(keys) + 1, TOTAL):
        counts = Counter(keys[:end])
        for key, share in zip(SIZES, weights(mixing), strict=True):
            assert abs(counts[key] - share * end) <= 1 + 1e-9


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_tasks_draws_are_spread_over_the_epoch(mixing: Mixing) -> None:
    """Its share of the draws up to any draw, within three; a shuffled pool is further off."""

    def furthest(keys: list[Key]) -> float:
        made = np.array([[key == own for own in SIZES] for key in keys]).cumsum(0)
        return np.abs(made - np.outer(np.arange(1, len(keys) + 1), weights(mixing))).max()

    keys = [key for key, _, _ in drawn(mixing, 5 * TOTAL)]
    epochs = [keys[at : at + TOTAL] for at in range(0, len(keys), TOTAL)]
    pool = [key for epoch in epochs for key in random.Random(0).sample(epoch, TOTAL)]
    assert furthest(keys) < 3 < furthest(pool)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_tasks_draws_are_one_permutation_of_its_rows_after_another(mixing: Mixing) -> None:
    """Those that a run of the task alone sees, with the same draws among references."""
    streams: dict[Key, list[tuple[int, int]]] = defaultdict(list)
    for key, row, draw in drawn(mixing, 6 * TOTAL, seed=3):
        streams[key].append((row, draw))
    assert streams.keys() == SIZES.keys()
    for (task, sample), found in streams.items():
        size = SIZES[task, sample]
        expected: list[tuple[int, int]] = []
        for epoch in range(-(-len(found) // size)):
            order, draws = epoch_order(3, task, sample, epoch, size)
            expected += [(int(order[at]), int(draws[at])) for at in range(size)]
        assert found == expected[: len(found)]


def test_which_task_comes_where_is_by_chance() -> None:
    """Over seeds, the tasks of any place in an epoch follow their weights (chi-square)."""
    shares = weights("temperature")
    for place in (0, 20, 90, 167):
        found = Counter(mixture_rows(seed, place, 1, SIZES, shares)[0][0] for seed in range(2000))
        observed = [found[key] for key in SIZES]
        assert chisquare(observed, 2000 * np.array(shares)).pvalue > 0.001


def test_any_step_can_be_made_alone() -> None:
    """In any order, and for other batch sizes the draws are the same ones, cut otherwise."""
    whole = drawn("temperature", 640)
    for step in (79, 3, 40, 0):
        alone = mixture_rows(0, step, 8, SIZES, weights("temperature"))
        assert alone == whole[8 * step : 8 * step + 8]
    assert drawn("temperature", 640, batch_size=64) == whole
    assert drawn("temperature", 640, seed=1) != whole
    assert len(mixture_rows(0, 10**7, 8, SIZES, weights("tasks"))) == 8


def test_only_ratios_of_weights_count() -> None:
    assert mixture_rows(0, 5, 8, SIZES, [7.0] * 5) == mixture_rows(0, 5, 8, SIZES, [1 / 5] * 5)


def test_the_order_is_fixed() -> None:
    """The same in every process and version: results are repeated from their seeds."""
    rows = mixture_rows(0, 0, 6, {("a", 13): 3, ("b", 13): 3}, [0.5, 0.5])
    assert [(task, row) for (task, _), row, _ in rows] == [
        ("b", 1),
        ("b", 2),
        ("a", 0),
        ("a", 2),
        ("b", 0),
        ("a", 1),
    ]


# ---- batches ------------------------------------------------------------------------------------


def test_rows_carry_their_own_tokens_under_their_tasks_prompt() -> None:
    """Weight 1 / batch size; samples of one task share a prompt here."""
    batch = steps(batch_size=16).batch(2)
    made = mixture_rows(0, 2, 16, SIZES, weights("examples"))
    expected = Counter(
        (
            PROMPTS[key],
            row,
            1 / 16,
            tuple(ROWS[key].inputs[row]),
            tuple(ROWS[key].targets[row][0]),
        )
        for key, row, _ in made
    )
    assert contents(batch) == expected
    lengths = [a + b for a, b in zip(batch.input_lengths, batch.target_lengths, strict=True)]
    assert lengths == sorted(lengths, reverse=True)
    assert batch.left_padded
    assert not steps(layout=RIGHT).batch(2).left_padded


def test_one_shared_prompt_is_a_prompt_index_of_zeros() -> None:
    batch = steps(prompts=dict.fromkeys(SIZES, 0)).batch(1)
    assert batch.prompts == [0] * 8


def test_every_reference_of_a_row_is_trained_on_in_some_epoch() -> None:
    key = ("b", 13)
    made = steps(rows={key: make_rows(key, 7, references=3)}, weights=[1.0], batch_size=7)
    seen: dict[int, set[int]] = defaultdict(set)
    for epoch in range(30):
        batch = made.batch(epoch)
        for at, row in enumerate(batch.rows):
            seen[row].add(int(batch.target_ids[at, 0]) % 10)
    assert seen == {row: {0, 1, 2} for row in range(7)}


@pytest.mark.parametrize("world", [2, 3, 11])
def test_ranks_share_the_rows_of_a_step_between_them(world: int) -> None:
    """Each row at one rank; shares differ by one row at most; some ranks may have none."""
    whole = steps().batch(5)
    parts = [steps(rank=rank, world=world).batch(5) for rank in range(world)]
    assert sum(map(contents, parts), Counter()) == contents(whole)
    counts = [len(part) for part in parts]
    assert max(counts) - min(counts) <= 1
    assert torch.stack([part.weight.sum() for part in parts]).sum().item() == pytest.approx(1)


def test_a_resumed_fit_goes_on_at_its_step() -> None:
    state = {"step": 6}
    made = steps(step=lambda: state["step"], steps=20)
    batches = iter(made)
    assert len(made) == 20
    assert contents(next(batches)) == contents(steps().batch(6))
    state["step"] = 13
    assert contents(next(batches)) == contents(steps().batch(13))
    assert len(list(islice(batches, 3))) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [1.0]}, "1 weights for 5 tasks"),
        ({"rows": {}, "weights": []}, "0 weights for 0 tasks"),
        ({"weights": [1, 1, 0, 1, 1]}, "positive and finite"),
        ({"weights": [1, 1, float("nan"), 1, 1]}, "positive and finite"),
        ({"weights": [1, 1, 1e-6, 1, 1]}, "gives its task 4.2e-05 draws in an epoch of 168"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prompts": {("a", 13): 0}}, "no prompt is named for .*'c', 13"),
        ({"rows": ROWS | {("c", 13): Rows(ROWS["c", 13].task, [[1]] * 96, [], [], 1)}}, "targets"),
        ({"rows": ROWS | {("c", 13): Rows(ROWS["c", 13].task, [], [], [], 1)}}, "without rows"),
    ],
)
def test_what_cannot_be_mixed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps(**changes)
