"""Which rows runs, mixtures, episodes and evaluations see, against plain counting."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from prompt_lab.core.batch import IGNORE, Batch
from prompt_lab.core.run import Run
from prompt_lab.data.sampling import (
    Draw,
    EpisodeRows,
    Episodes,
    EvaluationBatch,
    EvaluationSteps,
    Key,
    Layout,
    Mixing,
    Rows,
    bank_draw,
    episode_draw,
    episode_rows,
    epoch_order,
    mixture_draw,
    mixture_rows,
    step_rows,
    task_weights,
)
from prompt_lab.data.tasks import Task

LEFT, RIGHT = Layout(0, True), Layout(0, False)
BOTH_LAYOUTS = pytest.mark.parametrize("layout", [LEFT, RIGHT], ids=["decoder", "encoder"])


def make_rows(key: Key, size: int, base: int, references: int = 1) -> Rows:
    """Rows of random lengths; a row's input and targets tell which row of which task they are."""
    rng = random.Random(f"{key}{base}")
    return Rows(
        task=Task(key[0], "custom", "EM", 32, None),
        inputs=[[base + row] * rng.randint(1, 9) for row in range(size)],
        targets=[
            [[base + 10 * row + k] * rng.randint(1, 4) for k in range(references)]
            for row in range(size)
        ],
    )


def contents(batch: Batch) -> Counter[tuple[Any, ...]]:
    """Prompt, row, weight, input and target of the rows of a batch, whatever order and padding."""
    masked = zip(batch.input_ids, batch.input_mask, strict=True)
    ids = [tuple(row[mask.bool()].tolist()) for row, mask in masked]
    targets = [tuple(row[row != IGNORE].tolist()) for row in batch.target_ids]
    weight = [round(value, 6) for value in batch.weight.tolist()]
    return Counter(zip(batch.prompts, batch.rows, weight, ids, targets, strict=True))


def rows_of(batch: Batch, place: int) -> Counter[int]:
    """The rows that stand under one prompt."""
    pairs = zip(batch.rows, batch.prompts, strict=True)
    return Counter(row for row, prompt in pairs if prompt == place)


# ---- a bank of runs ------------------------------------------------------------------------------

SIZE = 11
BANK = {
    key: make_rows(key, SIZE + at, 1000 * (at + 1))
    for at, key in enumerate([("a", 13), ("a", 42), ("b", 13)])
}


def run(task: str = "a", sample: int = 13, seed: int = 0, rate: float = 0.3, size: int = 4) -> Run:
    return Run(task, sample, seed, rate, size)


def bank(runs: Sequence[Run], **changes: Any) -> Draw:
    return bank_draw(runs, **{"rows": BANK, "order_seed": 0, "layout": LEFT, **changes})


def stream(some: Run, order_seed: int, count: int) -> list[int]:
    """The first rows that a run sees of 11, in order."""
    found: list[int] = []
    for step in range(-(-count // some.batch_size)):
        found += [row for row, _ in step_rows(some, order_seed, step, SIZE)]
    return found[:count]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 30])
def test_every_epoch_of_a_run_holds_every_row_once(batch_size: int) -> None:
    """Also where batches straddle epochs, or are larger than one."""
    rows = stream(run(size=batch_size), 0, 5 * SIZE)
    epochs = [rows[at : at + SIZE] for at in range(0, len(rows), SIZE)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5


def test_the_order_of_a_run_depends_on_order_seed_task_and_sample_alone() -> None:
    """Neither on learning rate, initial seed and batch size nor on global seeds."""
    first = stream(run(), 0, 40)
    random.seed(1)
    assert stream(run(rate=0.001, seed=9), 0, 40) == first
    assert [stream(run(size=size), 0, 40) for size in (1, 3, 8)] == [first] * 3
    others = [stream(run(), 1, 40), stream(run("b"), 0, 40), stream(run(sample=42), 0, 40)]
    assert len(set(map(tuple, [first, *others]))) == 4


def test_a_run_sees_in_a_bank_what_it_sees_alone() -> None:
    """Whatever other tasks, samples, rates and batch sizes stand beside it, or have finished."""
    runs = [run(), run("b", size=3), run(sample=42, rate=0.1), run(rate=0.01, size=2)]
    for step in (0, 1, 7):
        together = bank(runs).batch(step, range(4))
        for place, some in enumerate(runs):
            alone = rows_of(bank([some]).batch(step, [0]), 0)
            assert rows_of(together, place) == alone
            left = bank(runs).batch(step, [place])
            assert rows_of(left, place) == alone
            assert set(left.prompts) == {place}
    assert len(bank(runs).batch(4, [])) == 0


def test_rows_of_a_bank_carry_their_own_tokens_and_a_share_of_their_run() -> None:
    """Weight 1 / batch size; input and target of the row that is named."""
    runs = [run(), run("b", size=3)]
    expected = Counter(
        (place, row, round(1 / some.batch_size, 6), tuple(own.inputs[row]), tuple(targets))
        for place, some in enumerate(runs)
        for own in [BANK[some.task, some.sample]]
        for row, _ in step_rows(some, 0, 2, len(own))
        for targets in own.targets[row]
    )
    assert contents(bank(runs).batch(2, [0, 1])) == expected


# ---- mixtures ------------------------------------------------------------------------------------

SIZES: dict[Key, int] = {("a", 13): 32, ("a", 42): 32, ("b", 13): 7, ("c", 13): 96, ("d", 13): 1}
TOTAL = sum(SIZES.values())
MIXED = {key: make_rows(key, size, 1000 * (at + 1)) for at, (key, size) in enumerate(SIZES.items())}
EVERY_ROW = {(key, row) for key, size in SIZES.items() for row in range(size)}
MIXINGS: tuple[Mixing, ...] = ("examples", "tasks", "temperature")


def weights(mixing: Mixing) -> list[float]:
    return task_weights(list(SIZES.values()), mixing)


def drawn(mixing: Mixing, count: int, batch_size: int = 8, seed: int = 0) -> list[Any]:
    """The first draws of a mixture, in order."""
    found: list[tuple[Key, int, int]] = []
    for step in range(-(-count // batch_size)):
        found += mixture_rows(seed, step, batch_size, SIZES, weights(mixing))
    return found[:count]


def mixture(**changes: Any) -> Draw:
    given = {"rows": MIXED, "mixing": "examples", "batch_size": 8, "seed": 0, "layout": LEFT}
    return mixture_draw(**{**given, **changes})


def test_weights_are_by_size_equal_or_between_the_two() -> None:
    """Raffel et al. 2020, section 3.5.2, by hand."""
    assert task_weights([1, 4, 5], "examples") == pytest.approx([0.1, 0.4, 0.5])
    assert task_weights([1, 4, 5], "tasks") == pytest.approx([1 / 3] * 3)
    assert task_weights([1, 4, 16], "temperature") == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    with pytest.raises(ValueError, match="mixing is 'size': choose among examples, tasks, temper"):
        mixture(mixing="size")


def test_orders_are_fixed() -> None:
    """The same in every process and version: results are repeated from their seeds."""
    assert stream(run(), 0, SIZE) == [6, 10, 2, 8, 4, 1, 3, 7, 5, 0, 9]
    rows = mixture_rows(0, 0, 6, {("a", 13): 3, ("b", 13): 3}, [0.5, 0.5])
    assert "".join(f"{task}{row} " for (task, _), row, _ in rows) == "b1 b2 a0 a2 b0 a1 "


@pytest.mark.parametrize("batch_size", [1, 8, 64, 400])
def test_by_size_every_epoch_of_a_mixture_holds_every_row_once(batch_size: int) -> None:
    """Also where steps straddle epochs, or are larger than one."""
    rows = [(key, row) for key, row, _ in drawn("examples", 4 * TOTAL, batch_size)]
    epochs = [rows[at : at + TOTAL] for at in range(0, len(rows), TOTAL)]
    assert all(len(epoch) == TOTAL and set(epoch) == EVERY_ROW for epoch in epochs)
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
        found = Counter(mixture_rows(seed, place, 1, SIZES, shares)[0][0] for seed in range(500))
        observed = [found[key] for key in SIZES]
        assert chisquare(observed, 500 * np.array(shares)).pvalue > 0.001


def test_any_step_of_a_mixture_can_be_made_alone() -> None:
    """In any order, and for other batch sizes the draws are the same ones, cut otherwise."""
    whole = drawn("temperature", 640)
    for step in (79, 3, 40, 0):
        alone = mixture_rows(0, step, 8, SIZES, weights("temperature"))
        assert alone == whole[8 * step : 8 * step + 8]
    assert drawn("temperature", 640, batch_size=64) == whole
    assert drawn("temperature", 640, seed=1) != whole
    assert len(mixture_rows(0, 10**7, 8, SIZES, weights("tasks"))) == 8
    assert mixture_rows(0, 5, 8, SIZES, [7.0] * 5) == mixture_rows(0, 5, 8, SIZES, [1 / 5] * 5)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_rows_of_a_mixture_carry_their_own_tokens_under_their_tasks_prompt(mixing: Mixing) -> None:
    """Weight 1 / batch size, whichever runs are live; each sample has a prompt of its own."""
    expected = Counter(
        (list(SIZES).index(key), row, 1 / 16, tuple(MIXED[key].inputs[row]), tuple(target))
        for key, row, _ in mixture_rows(0, 2, 16, SIZES, weights(mixing))
        for target in MIXED[key].targets[row]
    )
    assert contents(mixture(mixing=mixing, batch_size=16).batch(2, [])) == expected


# ---- episodes ------------------------------------------------------------------------------------

SETS: dict[Key, tuple[int, int]] = {
    ("a", 13): (20, 20),
    ("a", 42): (20, 18),
    ("b", 13): (3, 2),
    ("c", 13): (12, 40),
    ("d", 13): (30, 7),
}
NUMBERS = {"episodes": 2, "inner_steps": 3, "support_size": 4, "query_size": 6}
SUPPORT = {key: make_rows(key, n, 1000 * at) for at, (key, (n, _)) in enumerate(SETS.items(), 1)}
QUERY = {key: make_rows(key, n, 100_000 * at) for at, (key, (_, n)) in enumerate(SETS.items(), 1)}


def made(step: int, seed: int = 0, **changes: int) -> list[EpisodeRows]:
    return episode_rows(seed, step, SETS, **{**NUMBERS, **changes})


def episodes(**changes: Any) -> Draw:
    given = {"support": SUPPORT, "query": QUERY, **NUMBERS, "seed": 0, "layout": LEFT}
    return episode_draw(**{**given, **changes})


def support_of(episode: EpisodeRows) -> list[int]:
    return [row for batch in episode.support for row, _ in batch]


def query_of(episode: EpisodeRows) -> list[int]:
    return [row for row, _ in episode.query]


def batches_of(parts: Any) -> list[Batch]:
    return [*parts.support, parts.query] if isinstance(parts, Episodes) else [parts]


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_every_pass_of_episodes_holds_every_task_and_sample_once(count: int) -> None:
    """In an order of its own; also where meta-batches straddle passes, or are larger than one."""
    keys = [episode.key for step in range(70) for episode in made(step, episodes=count)][:70]
    passes = [keys[at : at + 5] for at in range(0, 70, 5)]
    assert all(sorted(some) == sorted(SETS) for some in passes)
    assert len(set(map(tuple, passes))) > 5


def test_no_row_of_an_episode_comes_again_before_all_have_come() -> None:
    """3 steps of 4 from 12 rows or more repeat none, of 3 are 4 of each; 7 of 2 are 4 and 3."""
    for step in range(20):
        for episode in made(step, query_size=7):
            assert [len(batch) for batch in episode.support] == [4, 4, 4]
            sets = zip((support_of(episode), query_of(episode)), SETS[episode.key], strict=True)
            for rows, size in sets:
                assert set(rows) <= set(range(size))
                cuts = [rows[at : at + size] for at in range(0, len(rows), size)]
                assert all(len(set(cut)) == len(cut) for cut in cuts)


@pytest.mark.parametrize(("rows_of_visit", "count"), [(support_of, 12), (query_of, 6)])
def test_each_visit_to_a_task_draws_other_rows(
    rows_of_visit: Callable[[EpisodeRows], list[int]], count: int
) -> None:
    """Over the visits every row comes up, about as often as any other."""
    visits = [rows_of_visit(e) for step in range(500) for e in made(step) if e.key == ("a", 13)]
    assert len(visits) == len(set(map(tuple, visits))) == 200
    share = count / 20
    spread = (200 * share * (1 - share)) ** 0.5
    counts = Counter(row for rows in visits for row in rows)
    assert all(abs(counts[row] - 200 * share) < 5 * spread for row in range(20))


def test_query_rows_do_not_follow_the_support_rows() -> None:
    """Train and dev of one size are shuffled apart: equal row numbers are as rare as by chance."""
    visits = [e for step in range(500) for e in made(step) if e.key == ("a", 13)]
    shared = [len(set(support_of(episode)) & set(query_of(episode))) / 6 for episode in visits]
    assert sum(shared) / len(shared) == pytest.approx(12 / 20, abs=0.07)


def test_any_meta_step_can_be_made_alone() -> None:
    """And meta-batches of another size are the same episodes, cut otherwise."""
    forwards = [made(step) for step in range(12)]
    assert [made(step) for step in reversed(range(12))] == forwards[::-1]
    assert made(3, seed=1) != forwards[3]
    assert len(made(10**9)) == 2
    singles = [episode for step in range(12) for episode in made(step, episodes=1)]
    for count in (3, 4):
        cut = range(12 // count)
        assert [e for step in cut for e in made(step, episodes=count)] == singles


@pytest.mark.parametrize("step", [0, 7])
def test_batches_hold_the_rows_of_their_episodes(step: int) -> None:
    """Tokens of the named row, prompt = episode, weights of an episode sum to one."""
    parts, expected = episodes().batch(step, []), made(step)
    assert parts.keys == [episode.key for episode in expected]
    assert len(parts.support) == 3
    for k, batch in enumerate(batches_of(parts)):
        source, size = (SUPPORT, 4) if k < 3 else (QUERY, 6)
        rows = Counter(
            (place, row, round(1 / size, 6), tuple(source[e.key].inputs[row]), tuple(target))
            for place, e in enumerate(expected)
            for row, _ in (e.support[k] if k < 3 else e.query)
            for target in source[e.key].targets[row]
        )
        assert contents(batch) == rows


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_share_the_episodes_of_a_meta_step_between_them(world: int) -> None:
    """Each whole, in one of them, under a prompt of its own bank; some may have none."""
    whole = episodes(episodes=5).batch(4, [])
    parts = [episodes(episodes=5, share=(rank, world)).batch(4, []) for rank in range(world)]
    assert sum(len(part.keys) for part in parts) == 5
    for rank, part in enumerate(parts):
        assert part.keys == whole.keys[rank::world]
        assert len(part.support) == 3
        for own, everyone in zip(batches_of(part), batches_of(whole), strict=True):
            assert set(own.prompts) == set(range(len(part.keys)))
            assert own.weight.sum().item() == pytest.approx(len(part.keys))
            for place in range(len(part.keys)):
                assert rows_of(own, place) == rows_of(everyone, rank + place * world)


# ---- all three -----------------------------------------------------------------------------------

RUNS = [run(), run("b", size=3), run(rate=0.1, size=2)]
DRAWS: dict[str, Callable[..., Draw]] = {
    "bank": lambda **changes: bank(RUNS, **changes),
    "mixture": mixture,
    "episodes": episodes,
}
ANY_DRAW = pytest.mark.parametrize("kind", list(DRAWS))


@ANY_DRAW
def test_rows_are_padded_as_the_backbone_wants_and_sorted_by_length(kind: str) -> None:
    """So that a slice of a batch has little padding; the rows are the same for both sides."""
    left, right = (
        batches_of(DRAWS[kind](layout=layout).batch(2, [0, 1, 2])) for layout in (LEFT, RIGHT)
    )
    assert list(map(contents, left)) == list(map(contents, right))
    assert all(batch.left_padded for batch in left)
    assert not any(batch.left_padded for batch in right)
    for batch in [*left, *right]:
        lengths = np.add(batch.input_lengths, batch.target_lengths).tolist()
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("kind", ["bank", "mixture"])
@pytest.mark.parametrize("world", [2, 3, 11])
def test_processes_share_the_rows_of_a_step_between_them(kind: str, world: int) -> None:
    """Each row in one of them; shares differ by one row at most; some may have none."""
    whole = DRAWS[kind]().batch(5, [0, 1, 2])
    parts = [DRAWS[kind](share=(rank, world)).batch(5, [0, 1, 2]) for rank in range(world)]
    assert sum(map(contents, parts), Counter()) == contents(whole)
    counts = [len(part) for part in parts]
    assert max(counts) - min(counts) <= 1


@ANY_DRAW
def test_a_pass_ends_with_the_batch_in_which_the_last_row_was_seen(kind: str) -> None:
    """Of the run that needs most batches; of every task where there are episodes."""
    draw, seen = DRAWS[kind](), []
    for step in range(draw.one_pass):
        parts = draw.batch(step, [0, 1, 2])
        found = zip(parts.prompts, parts.rows, strict=True) if kind != "episodes" else parts.keys
        seen.append(set(found))
    every = {
        "bank": {(at, row) for at, r in enumerate(RUNS) for row in range(len(BANK[r.task, 13]))},
        "mixture": {(list(SIZES).index(key), row) for key, row in EVERY_ROW},
        "episodes": set(SETS),
    }
    assert set().union(*seen) == every[kind] > set().union(*seen[:-1])


@ANY_DRAW
def test_every_reference_of_a_row_is_trained_on_in_some_epoch(kind: str) -> None:
    """The one that is drawn is a function of the seeds; runs of a bank see the same."""
    key = ("a", 13)
    rows = {key: make_rows(key, 6, 1000, references=3)}
    draw = {
        "bank": lambda: bank([run(size=6), run(rate=0.1, size=6)], rows=rows),
        "mixture": lambda: mixture(rows=rows, batch_size=6),
        "episodes": lambda: episodes(support=rows, query=rows, episodes=1, query_size=6),
    }[kind]()
    seen: set[tuple[int, int]] = set()
    for step in range(40):
        batch = batches_of(draw.batch(step, [0, 1]))[-1]
        found: dict[int, set[tuple[int, int]]] = defaultdict(set)
        for prompt, row, target in zip(batch.prompts, batch.rows, batch.target_ids, strict=True):
            found[prompt].add((row, int(target[0])))
        assert all(of_run == found[0] for of_run in found.values())
        seen |= found[0]
    assert seen == {(row, 1000 + 10 * row + k) for row in range(6) for k in range(3)}


# ---- evaluation ----------------------------------------------------------------------------------

EVALUATED = [run(), run("b"), run(sample=42), run(rate=0.1), run("b", size=2)]


def evaluation(live: Sequence[int], **changes: Any) -> EvaluationSteps:
    given: dict[str, Any] = {"runs": EVALUATED, "rows": BANK, "layout": LEFT}
    given |= {"tokens_per_forward": 60, "longest_answer": dict.fromkeys(BANK, 4)}
    given |= {"extra_per_row": lambda task, longest: 3, "live": lambda: live}
    return EvaluationSteps(**{**given, **changes})


def expected_pairs(live: Sequence[int]) -> Counter[tuple[int, int]]:
    """Every row of a run's split, once for each run."""
    sizes = {place: len(BANK[EVALUATED[place].task, EVALUATED[place].sample]) for place in live}
    return Counter((place, row) for place, size in sizes.items() for row in range(size))


def pairs_of(parts: Sequence[EvaluationBatch]) -> Counter[tuple[int, int]]:
    return Counter(
        pair for part in parts for pair in zip(part.batch.prompts, part.batch.rows, strict=True)
    )


@BOTH_LAYOUTS
@pytest.mark.parametrize("tokens", [1, 60, 10**6])
def test_an_evaluation_holds_every_row_of_every_run_once(tokens: int, layout: Layout) -> None:
    parts = list(evaluation(range(5), tokens_per_forward=tokens, layout=layout))
    assert pairs_of(parts) == expected_pairs(range(5))
    for part in parts:
        width = part.batch.input_ids.shape[1] + 3
        assert len(part.batch) * width <= tokens or len(part.batch) == 1
        assert {EVALUATED[place].task for place in part.batch.prompts} == {part.task}
        for place, row, _, ids, target in contents(part.batch):
            assert list(ids) == BANK[EVALUATED[place].task, EVALUATED[place].sample].inputs[row]
            assert target == ()


@BOTH_LAYOUTS
@pytest.mark.parametrize("world", [1, 2, 3, 50])
@pytest.mark.parametrize("block", [None, 1, 2, 9])
def test_processes_share_the_rows_of_an_evaluation(
    world: int, layout: Layout, block: int | None
) -> None:
    """None is padded or repeated, also where there are more of them than rows.

    Those that have none still say a length of 1: a trainer leaves an evaluation of none out.
    """
    steps = [
        evaluation(range(5), layout=layout, share=(rank, world), block=block)
        for rank in range(world)
    ]
    assert pairs_of([part for own in steps for part in own]) == expected_pairs(range(5))
    assert [len(own) for own in steps] == [max(1, len(list(own))) for own in steps]


@BOTH_LAYOUTS
def test_a_block_of_runs_is_evaluated_before_the_next(layout: Layout) -> None:
    """So no more prompts than a block has are needed at a time."""
    parts = list(evaluation(range(5), layout=layout, block=2))
    blocks = [place // 2 for part in parts for place in part.batch.prompts]
    assert blocks == sorted(blocks)
    assert all(len({place // 2 for place in part.batch.prompts}) == 1 for part in parts)


def test_rows_that_finished_runs_would_have_are_not_evaluated() -> None:
    """Which runs they are is asked when an evaluation begins; its length follows."""
    live = [4, 2]
    steps = evaluation(live)
    assert pairs_of(list(steps)) == expected_pairs([4, 2])
    del live[0]
    assert pairs_of(list(steps)) == expected_pairs([2])
    assert len(steps) == len(list(steps))
    live.clear()
    assert list(steps) == []


@BOTH_LAYOUTS
@pytest.mark.parametrize("share", [(0, 1), (1, 2)])
def test_runs_that_finish_never_make_an_evaluation_longer(
    layout: Layout, share: tuple[int, int]
) -> None:
    """A trainer asks for the length once, and takes no more batches than that."""
    rng = random.Random(0)
    for _ in range(300):
        live = rng.sample(range(5), rng.randint(1, 5))
        given = {"layout": layout, "share": share, "tokens_per_forward": rng.randint(10, 200)}
        lengths = [len(evaluation(live[:count], **given)) for count in range(len(live) + 1)]
        assert lengths == sorted(lengths)


def test_a_decoders_rows_are_grouped_by_prompt() -> None:
    """So a batch runs few prompts; the first one's rows get shorter, the second's longer again.

    An encoder's rows are sorted by length alone.
    """
    parts = [part.batch for part in evaluation([0, 3], tokens_per_forward=1)]
    inputs = BANK["a", 13].inputs
    lengths = [len(inputs[row]) for part in parts for row in part.rows]
    assert [place for part in parts for place in part.prompts] == [0] * SIZE + [3] * SIZE
    assert lengths[:SIZE] == sorted(lengths[:SIZE], reverse=True)
    assert lengths[SIZE:] == lengths[:SIZE][::-1]
    parts = [part.batch for part in evaluation([0, 3], tokens_per_forward=200, layout=RIGHT)]
    lengths = [length for part in parts for length in part.input_lengths]
    assert lengths == sorted(lengths, reverse=True)


def test_answers_may_be_as_long_as_stated_for_their_task_and_sample() -> None:
    """Whatever other runs stand beside: a run in a bank is evaluated as if it were alone."""
    longest = {("a", 13): 3, ("a", 42): 9, ("b", 13): 7}
    for live in (range(5), [0], [0, 2]):
        for part in evaluation(live, longest_answer=longest):
            own = {(EVALUATED[place].task, EVALUATED[place].sample) for place in part.batch.prompts}
            assert [longest[key] for key in own] == [part.max_new_tokens]
