"""Which rows runs see: order, epochs, ranks, and evaluations, against plain counting."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLES
from conftest import TASKS as FEWSHOT_TASKS

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.batch import IGNORE, Batch
from prompt_lab.core.run import Run
from prompt_lab.data.sampling import EvaluationSteps, Layout, Rows, TrainSteps, step_rows
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.data.tasks import Task

Factory = Callable[..., Backbone]
Key = tuple[str, int]

LEFT, RIGHT = Layout(0, True), Layout(0, False)
SIZE = 11
KEYS: list[Key] = [("a", 13), ("a", 42), ("b", 13)]


def make_rows(task: str, size: int, seed: int, references: int = 1) -> Rows:
    """Rows of random lengths; a row's input and targets tell which row they are of."""
    rng = random.Random(seed)
    inputs = [[100 + row] * rng.randint(1, 9) for row in range(size)]
    targets = [
        [[1000 + 10 * row + k] * rng.randint(1, 4) for k in range(references)]
        for row in range(size)
    ]
    return Rows(
        task=Task(task, "custom", "EM", 32, None),
        inputs=inputs,
        targets=targets,
        references=[[f"{row}"] for row in range(size)],
        longest_target=max(len(ids) for answers in targets for ids in answers),
    )


ROWS = {key: make_rows(key[0], SIZE + at, at) for at, key in enumerate(KEYS)}


def run(task: str = "a", sample: int = 13, seed: int = 0, rate: float = 0.3, size: int = 4) -> Run:
    return Run(task, sample, seed, rate, size)


def steps(runs: Sequence[Run], **changes: Any) -> TrainSteps:
    """Training steps of a bank, all of whose runs live unless said otherwise."""
    given: dict[str, Any] = {"rows": ROWS, "order_seed": 0, "layout": LEFT, "steps": 100}
    given |= {"step": lambda: 0, "live": lambda: list(range(len(runs)))}
    return TrainSteps(runs, **{**given, **changes})


def rows_of(batch: Batch, index: int) -> Counter[int]:
    """The rows that one run sees in a batch."""
    pairs = zip(batch.rows, batch.prompts, strict=True)
    return Counter(row for row, prompt in pairs if prompt == index)


def stream(some: Run, order_seed: int, count: int, size: int = SIZE) -> list[int]:
    """The first rows that a run sees, in order."""
    found = []
    for step in range(-(-count // some.batch_size)):
        found += [row for row, _ in step_rows(some, order_seed, step, size)]
    return found[:count]


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 5, 30])
def test_every_epoch_holds_every_row_once(batch_size: int) -> None:
    """Also where batches straddle epochs, or are larger than one."""
    rows = stream(run(size=batch_size), 0, 5 * SIZE)
    epochs = [rows[at : at + SIZE] for at in range(0, len(rows), SIZE)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5


def test_the_order_depends_on_order_seed_task_and_sample_alone() -> None:
    """Decision 6: neither on learning rate, initial seed and batch size nor on global seeds."""
    first = stream(run(), 0, 40)
    random.seed(1)
    assert stream(run(rate=0.001, seed=9), 0, 40) == first
    assert [stream(run(size=size), 0, 40) for size in (1, 3, 8)] == [first] * 3
    others = [stream(run(), 1, 40), stream(run("b"), 0, 40), stream(run(sample=42), 0, 40)]
    assert all(other != first for other in others)
    assert len(set(map(tuple, others))) == 3


def test_the_order_is_fixed() -> None:
    """The same in every process and version: results are repeated from their seeds."""
    assert stream(run(), 0, SIZE) == [6, 10, 2, 8, 4, 1, 3, 7, 5, 0, 9]


def test_a_run_sees_in_a_bank_what_it_sees_alone() -> None:
    """Whatever other tasks, samples, learning rates and batch sizes stand beside it."""
    runs = [run(), run("b", size=3), run(sample=42, rate=0.1), run(rate=0.01, size=2)]
    for step in (0, 1, 7):
        together = steps(runs).batch(step, range(4))
        for index, some in enumerate(runs):
            alone = steps([some]).batch(step, [0])
            assert rows_of(together, index) == rows_of(alone, 0)


def test_rows_carry_their_own_tokens_and_a_share_of_their_run() -> None:
    """Weight 1 / batch size; input and target of the row that is named."""
    runs = [run(), run("b", size=3)]
    batch = steps(runs).batch(2, [0, 1])
    assert len(batch) == 7
    for at, (index, row) in enumerate(zip(batch.prompts, batch.rows, strict=True)):
        rows = ROWS[runs[index].task, runs[index].sample]
        target = batch.target_ids[at][batch.target_ids[at] != IGNORE].tolist()
        assert batch.input_ids[at][batch.input_mask[at].bool()].tolist() == rows.inputs[row]
        assert target == rows.targets[row][0]
        assert batch.weight[at].item() == pytest.approx(1 / runs[index].batch_size)
    assert batch.left_padded
    assert not steps(runs, layout=RIGHT).batch(2, [0, 1]).left_padded


def test_every_reference_of_a_row_is_trained_on_in_some_epoch() -> None:
    """The one that is drawn is a function of the same seeds; a bank changes nothing about it."""
    rows = {("a", 13): make_rows("a", 6, 0, references=3)}
    seen: dict[int, set[int]] = {row: set() for row in range(6)}
    made = steps([run(size=6), run(rate=0.1, size=6)], rows=rows)
    for epoch in range(30):
        batch = made.batch(epoch, [0, 1])
        drawn: dict[int, set[int]] = {0: set(), 1: set()}
        for at, (index, row) in enumerate(zip(batch.prompts, batch.rows, strict=True)):
            first = int(batch.target_ids[at, 0])
            assert first // 10 == 100 + row
            drawn[index].add(first)
            seen[row].add(first % 10)
        assert drawn[0] == drawn[1]
    assert all(picked == {0, 1, 2} for picked in seen.values())


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_the_rows_of_a_step_between_them(world: int) -> None:
    """Each row at one rank; shares differ by one row at most; some ranks may have none."""
    runs = [run(), run("b", size=3)]
    whole = steps(runs).batch(5, [0, 1])
    parts = [steps(runs, rank=rank, world=world).batch(5, [0, 1]) for rank in range(world)]

    def held(batch: Batch) -> Counter[tuple[int, int, float]]:
        return Counter(zip(batch.prompts, batch.rows, batch.weight.tolist(), strict=True))

    assert sum(map(held, parts), Counter()) == held(whole)
    counts = [len(part) for part in parts]
    assert max(counts) - min(counts) <= 1


def test_finished_runs_ask_for_no_rows() -> None:
    """And the others go on undisturbed."""
    runs = [run(), run("b", size=3), run(rate=0.1)]
    everyone = steps(runs).batch(4, [0, 1, 2])
    batch = steps(runs).batch(4, [1])
    assert set(batch.prompts) == {1}
    assert rows_of(batch, 1) == rows_of(everyone, 1)
    assert len(steps(runs).batch(4, [])) == 0


def test_iterating_asks_for_step_and_live_runs_each_time() -> None:
    """So a resumed fit goes on at its step, and a stopped run drops out at once."""
    state = {"step": 6, "live": [0, 1]}
    runs = [run(), run("b", size=3)]
    made = steps(runs, step=lambda: state["step"], live=lambda: state["live"], steps=20)
    batches = iter(made)
    assert len(made) == 20
    assert next(batches).rows == made.batch(6, [0, 1]).rows
    state |= {"step": 7, "live": [1]}
    assert next(batches).rows == made.batch(7, [1]).rows
    assert len(list(islice(batches, 3))) == 3


# ---- evaluation ---------------------------------------------------------------------------------


def evaluate(runs: Sequence[Run], live: Sequence[int], **changes: Any) -> list[Any]:
    """The batches of an evaluation."""
    given: dict[str, Any] = {"rows": ROWS, "layout": LEFT, "tokens_per_forward": 60}
    given |= {"longest_answer": dict.fromkeys(KEYS, 4), "extra_per_row": lambda task, longest: 3}
    return list(EvaluationSteps(runs, live=lambda: list(live), **{**given, **changes}))


EVALUATED = [run(), run("b"), run(sample=42), run(rate=0.1), run("b", size=2)]


def expected_pairs(live: Sequence[int]) -> Counter[tuple[int, int]]:
    """Every row of a run's split, once for each run."""
    return Counter(
        (index, row)
        for index in live
        for row in range(len(ROWS[EVALUATED[index].task, EVALUATED[index].sample]))
    )


def test_prompts_of_a_decoder_meet_at_rows_of_one_length() -> None:
    """The first prompt's rows get shorter, the second's longer again."""
    parts = [part.batch for part in evaluate(EVALUATED, [0, 3], tokens_per_forward=1)]
    inputs = ROWS["a", 13].inputs
    lengths = [len(inputs[row]) for part in parts for row in part.rows]
    half = len(inputs)
    assert [index for part in parts for index in part.prompts] == [0] * half + [3] * half
    assert lengths[:half] == sorted(lengths[:half], reverse=True)
    assert lengths[half:] == lengths[:half][::-1]


def pairs_of(parts: list[Any]) -> Counter[tuple[int, int]]:
    return Counter(
        pair for part in parts for pair in zip(part.batch.prompts, part.batch.rows, strict=True)
    )


@pytest.mark.parametrize("layout", [LEFT, RIGHT], ids=["decoder", "encoder"])
@pytest.mark.parametrize("tokens", [1, 60, 10**6])
def test_an_evaluation_holds_every_row_of_every_run_once(tokens: int, layout: Layout) -> None:
    parts = evaluate(EVALUATED, range(5), tokens_per_forward=tokens, layout=layout)
    assert pairs_of(parts) == expected_pairs(range(5))
    for part in parts:
        width = part.batch.input_ids.shape[1] + 3
        assert len(part.batch) * width <= tokens or len(part.batch) == 1
        assert {EVALUATED[index].task for index in part.batch.prompts} == {part.task}
        assert part.batch.target_ids.shape[1] == 0
        for at, (index, row) in enumerate(zip(part.batch.prompts, part.batch.rows, strict=True)):
            inputs = ROWS[EVALUATED[index].task, EVALUATED[index].sample].inputs[row]
            assert part.batch.input_ids[at][part.batch.input_mask[at].bool()].tolist() == inputs


def test_rows_that_finished_runs_would_have_are_not_evaluated() -> None:
    assert pairs_of(evaluate(EVALUATED, [4, 2])) == expected_pairs([4, 2])
    assert evaluate(EVALUATED, []) == []


@pytest.mark.parametrize("layout", [LEFT, RIGHT], ids=["decoder", "encoder"])
@pytest.mark.parametrize("world", [2, 3, 50])
def test_ranks_share_the_rows_of_an_evaluation(world: int, layout: Layout) -> None:
    """None is padded or repeated, also where there are more ranks than rows."""
    parts = [
        evaluate(EVALUATED, range(5), layout=layout, rank=rank, world=world)
        for rank in range(world)
    ]
    assert pairs_of([part for of_rank in parts for part in of_rank]) == expected_pairs(range(5))


def test_a_decoders_rows_are_grouped_by_prompt() -> None:
    """So a batch runs few prompts themselves; an encoder's rows are sorted by length alone."""
    parts = evaluate(EVALUATED, [0, 3], tokens_per_forward=200)
    order = [prompt for part in parts for prompt in sorted(set(part.batch.prompts))]
    assert order == sorted(order)
    parts = evaluate(EVALUATED, [0, 3], tokens_per_forward=200, layout=RIGHT)
    lengths = [length for part in parts for length in part.batch.input_lengths]
    assert lengths == sorted(lengths, reverse=True)


def test_answers_may_be_as_long_as_stated_for_their_task() -> None:
    longest = {("a", 13): 3, ("a", 42): 3, ("b", 13): 7}
    parts = evaluate(EVALUATED, range(5), longest_answer=longest)
    assert {(part.task, part.max_new_tokens) for part in parts} == {("a", 3), ("b", 7)}


def test_the_length_of_a_runs_answers_does_not_depend_on_other_runs() -> None:
    """A run in a bank is evaluated as if it were alone."""
    longest = {("a", 13): 3, ("a", 42): 9, ("b", 13): 7}
    (alone,) = {part.max_new_tokens for part in evaluate(EVALUATED, [0], longest_answer=longest)}
    for part in evaluate(EVALUATED, [0, 2], longest_answer=longest):
        assert 0 not in part.batch.prompts or part.max_new_tokens == alone


# ---- from files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_files_of_several_tasks_make_one_step(
    backbone: Factory, fewshot_root: Path, kind: str
) -> None:
    """The tokens are those that the backbone's own rules make of the files' texts."""
    model = backbone(kind)
    data = CrossFitDataModule(list(FEWSHOT_TASKS), str(fewshot_root), list(SAMPLES))
    data.setup()
    data.connect(model)
    runs = [Run(task, sample, 0, 0.3, 2) for task in FEWSHOT_TASKS for sample in SAMPLES]
    batch = data.train_steps(runs, 10, lambda: 3, lambda: list(range(8)), 0, 1).batch(3, range(8))
    assert Counter(batch.prompts) == Counter({index: 2 for index in range(8)})
    assert batch.left_padded == (kind == "gpt2")
    for at, (index, row) in enumerate(zip(batch.prompts, batch.rows, strict=True)):
        split = data.splits[runs[index].task, runs[index].sample]["train"]
        ids = batch.input_ids[at][batch.input_mask[at].bool()].tolist()
        target = batch.target_ids[at][batch.target_ids[at] != IGNORE].tolist()
        assert ids == model.encode_inputs([split.inputs[row]])[0]
        assert target in model.encode_targets(split.references[row])
