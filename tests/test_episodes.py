"""Episodes for meta-learning: passes, support and query rows, ranks and resume, by counting."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from prompt_lab.core.batch import IGNORE, Batch
from prompt_lab.data.sampling import Layout, Rows
from prompt_lab.data.sampling import EpisodeRows, Episodes, EpisodeSteps, episode_rows
from prompt_lab.data.sampling import Key
from prompt_lab.data.tasks import Task

LEFT, RIGHT = Layout(0, True), Layout(0, False)
SIZES: dict[Key, tuple[int, int]] = {
    ("a", 13): (20, 20),
    ("a", 42): (20, 18),
    ("b", 13): (3, 2),
    ("c", 13): (12, 40),
    ("d", 13): (30, 7),
}
NUMBERS = {"episodes": 2, "inner_steps": 3, "support_size": 4, "query_size": 6}


def made(step: int, seed: int = 0, **changes: int) -> list[EpisodeRows]:
    return episode_rows(seed, step, SIZES, **{**NUMBERS, **changes})


def make_rows(key: Key, size: int, base: int, references: int = 1) -> Rows:
    """Rows of random lengths; a row's input and targets tell which row of which task they are."""
    task, sample = key
    rng = random.Random(f"{task}{sample}")
    return Rows(
        task=Task(task, "custom", "EM", 32, None),
        inputs=[[base + row] * rng.randint(1, 9) for row in range(size)],
        targets=[
            [[base + 10 * row + k] * rng.randint(1, 4) for k in range(references)]
            for row in range(size)
        ],
        references=[[f"{row}"] for row in range(size)],
        longest_target=4,
    )


SUPPORT = {
    key: make_rows(key, train, 1000 * at) for at, (key, (train, _)) in enumerate(SIZES.items(), 1)
}
QUERY = {
    key: make_rows(key, dev, 100_000 * at) for at, (key, (_, dev)) in enumerate(SIZES.items(), 1)
}


def steps(**changes: Any) -> EpisodeSteps:
    given: dict[str, Any] = {"support": SUPPORT, "query": QUERY, **NUMBERS}
    given |= {"seed": 0, "layout": LEFT, "steps": 50, "step": lambda: 0}
    return EpisodeSteps(**{**given, **changes})


def contents(batch: Batch) -> list[tuple[Any, ...]]:
    """The rows of a batch, sorted, whatever their padding."""
    masked = zip(batch.input_ids, batch.input_mask, strict=True)
    ids = [row[mask.bool()].tolist() for row, mask in masked]
    targets = [row[row != IGNORE].tolist() for row in batch.target_ids]
    columns = (batch.prompts, batch.rows, batch.weight.tolist(), ids, targets)
    return sorted(zip(*columns, strict=True))


def of_episode(batch: Batch, index: int) -> Counter[int]:
    pairs = zip(batch.rows, batch.prompts, strict=True)
    return Counter(row for row, prompt in pairs if prompt == index)


def all_batches(parts: Episodes) -> list[Batch]:
    return [*parts.support, parts.query]


# ---- which tasks --------------------------------------------------------------------------------


@pytest.mark.parametrize("episodes", [1, 2, 5, 7])
def test_every_pass_holds_every_task_and_sample_once(episodes: int) -> None:
    """In an order of its own; also where meta-batches straddle passes, or are larger than one."""
    keys = [episode.key for step in range(70) for episode in made(step, episodes=episodes)][:70]
    passes = [keys[at : at + 5] for at in range(0, 70, 5)]
    assert all(sorted(some) == sorted(SIZES) for some in passes)
    assert len(set(map(tuple, passes))) > 5


def test_the_first_task_of_a_pass_is_any_of_them() -> None:
    """Over 2,000 seeds each of 5 is first 400 times, give or take 5 standard deviations (18)."""
    first = Counter(made(0, seed, episodes=1)[0].key for seed in range(2000))
    assert first.keys() == SIZES.keys()
    assert all(abs(count - 400) < 90 for count in first.values())


# ---- which rows ---------------------------------------------------------------------------------


def test_support_rows_are_drawn_without_replacement_over_the_inner_steps() -> None:
    """3 steps of 4 from 12 rows or more repeat none; 12 of 12 are all of them."""
    for step in range(20):
        for episode in made(step):
            sizes = [len(batch) for batch in episode.support]
            assert sizes == [4, 4, 4]
            rows = [row for batch in episode.support for row, _ in batch]
            train, _ = SIZES[episode.key]
            assert set(rows) <= set(range(train))
            assert len(set(rows)) == min(train, 12)


def test_a_set_smaller_than_what_is_drawn_gives_its_rows_again_evenly() -> None:
    """One permutation after another: 12 draws of 3 rows are 4 of each, 7 of 2 are 4 and 3."""
    found = [e for step in range(20) for e in made(step, query_size=7) if e.key == ("b", 13)]
    assert len(found) == 8
    for episode in found:
        rows = [row for batch in episode.support for row, _ in batch]
        assert all(sorted(rows[at : at + 3]) == [0, 1, 2] for at in range(0, 12, 3))
        query = [row for row, _ in episode.query]
        assert all(sorted(query[at : at + 2]) == [0, 1] for at in range(0, 6, 2))


def test_each_visit_to_a_task_draws_other_rows() -> None:
    """Over the visits every row comes up, about as often as any other."""
    visits = [e for step in range(500) for e in made(step) if e.key == ("a", 13)]
    assert len(visits) == 200
    for name, per_visit in (("support", 12), ("query", 6)):
        groups = [
            [pair for batch in e.support for pair in batch] if name == "support" else e.query
            for e in visits
        ]
        rows = [[row for row, _ in group] for group in groups]
        assert len(set(map(tuple, rows))) == 200
        counts = Counter(row for group in rows for row in group)
        share = per_visit / 20
        spread = (200 * share * (1 - share)) ** 0.5
        assert all(abs(counts[row] - 200 * share) < 5 * spread for row in range(20))


def test_query_rows_do_not_follow_the_support_rows() -> None:
    """Train and dev of one size are shuffled apart: equal row numbers are as rare as by chance."""
    shared = total = 0
    for step in range(500):
        for episode in made(step):
            if episode.key == ("a", 13):
                support = {row for batch in episode.support for row, _ in batch}
                shared += len(support & {row for row, _ in episode.query})
                total += 6
    assert total == 1200
    assert shared / total == pytest.approx(12 / 20, abs=0.07)


def test_any_meta_step_can_be_made_alone() -> None:
    forwards = [made(step) for step in range(12)]
    assert [made(step) for step in reversed(range(12))] == forwards[::-1]
    assert made(3, seed=1) != forwards[3]
    assert len(made(10**9)) == 2


def test_the_rows_of_an_episode_do_not_depend_on_the_meta_batch() -> None:
    """Meta-batches of another size are the same episodes, cut otherwise."""
    singles = [episode for step in range(12) for episode in made(step, episodes=1)]
    for episodes in (3, 4):
        cut = range(12 // episodes)
        assert [e for step in cut for e in made(step, episodes=episodes)] == singles


# ---- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 7])
def test_batches_hold_the_rows_of_their_episodes(step: int) -> None:
    """Tokens of the named row, prompt = episode, weights of an episode sum to one."""
    parts = steps().batch(step)
    expected = made(step)
    assert parts.keys == [episode.key for episode in expected]
    assert len(parts.support) == 3
    for k, batch in enumerate(all_batches(parts)):
        source, size = (SUPPORT, 4) if k < 3 else (QUERY, 6)
        rows = [
            (index, row, pytest.approx(1 / size), source[e.key].inputs[row], target)
            for index, e in enumerate(expected)
            for row, _ in (e.support[k] if k < 3 else e.query)
            for target in source[e.key].targets[row]
        ]
        assert contents(batch) == sorted(rows, key=lambda row: (row[0], row[1]))
        lengths = [a + b for a, b in zip(batch.input_lengths, batch.target_lengths, strict=True)]
        assert lengths == sorted(lengths, reverse=True)
        assert batch.left_padded
        assert not all_batches(steps(layout=RIGHT).batch(step))[k].left_padded


def test_a_batchs_loss_is_the_sum_over_episodes_of_their_mean() -> None:
    """With made-up row losses, against a loop over the episodes."""
    for batch in all_batches(steps(episodes=4).batch(2)):
        losses = torch.rand(len(batch), generator=torch.Generator().manual_seed(0))
        expected = sum(losses[batch.prompt_index == index].mean() for index in range(4))
        torch.testing.assert_close((losses * batch.weight).sum(), expected)


def test_every_reference_is_drawn_in_some_visit() -> None:
    rows = {("a", 13): make_rows(("a", 13), 20, 1000, references=3)}
    some = steps(support=rows, query=rows, episodes=1, query_size=20)
    starts = {
        (b.rows[at], int(b.target_ids[at, 0]))
        for step in range(40)
        for b in [some.batch(step).query]
        for at in range(20)
    }
    assert starts == {(row, 1000 + 10 * row + k) for row in range(20) for k in range(3)}


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_the_episodes_of_a_meta_step_between_them(world: int) -> None:
    """Each whole, at one rank, under a prompt of that rank's own bank; some may have none."""
    whole = steps(episodes=5).batch(4)
    parts = [steps(episodes=5, rank=rank, world=world).batch(4) for rank in range(world)]
    assert sum(len(part.keys) for part in parts) == 5
    for rank, part in enumerate(parts):
        assert part.keys == whole.keys[rank::world]
        assert len(part.support) == 3
        for own, everyone in zip(all_batches(part), all_batches(whole), strict=True):
            assert set(own.prompts) == set(range(len(part.keys)))
            assert own.weight.sum().item() == pytest.approx(len(part.keys))
            for index in range(len(part.keys)):
                assert of_episode(own, index) == of_episode(everyone, rank + index * world)


def test_a_resumed_fit_goes_on_at_its_step() -> None:
    state = {"step": 6}
    some = steps(step=lambda: state["step"], steps=20)
    batches = iter(some)
    assert len(some) == 20
    for step in (6, 6, 13):
        state["step"] = step
        found, expected = next(batches), steps().batch(step)
        assert found.keys == expected.keys
        for one, other in zip(all_batches(found), all_batches(expected), strict=True):
            assert contents(one) == contents(other)


def test_episodes_move_to_a_device_with_all_their_batches() -> None:
    parts = steps().batch(1)
    moved = parts.to(torch.device("meta"))
    assert moved.keys == parts.keys
    assert all(batch.input_ids.device.type == "meta" for batch in all_batches(moved))
    assert all(batch.input_ids.device.type == "cpu" for batch in all_batches(parts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 0}, "episodes is 0: give at least 1"),
        ({"inner_steps": 0}, "inner_steps is 0"),
        ({"support_size": 0}, "support_size is 0"),
        ({"query_size": -1}, "query_size is -1"),
        ({"support": {}, "query": {}}, "there is no"),
        ({"query": {}}, "only one of support and query has .*'a', 13"),
        ({"query": QUERY | {("b", 13): Rows(QUERY["b", 13].task, [], [], [], 1)}}, "'b', 13"),
        (
            {"query": QUERY | {("b", 13): Rows(QUERY["b", 13].task, [[1]], [], [["x"]], 1)}},
            "without targets: .*'b', 13",
        ),
    ],
)
def test_what_makes_no_episodes_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps(**changes)
