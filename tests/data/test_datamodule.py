"""The data modules: K of files, pairs of texts, tokens of answers, and loaders with a length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLES, TASKS, make_method, make_trainer

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.batch import IGNORE
from prompt_lab.core.run import Run
from prompt_lab.data.datamodule import (
    CrossFitDataModule,
    Pairs,
    PromptDataModule,
    RowsDataModule,
    as_split,
)
from prompt_lab.data.files import SPLITS, SplitName, read_split
from prompt_lab.data.sampling import Progress, bank_draw
from prompt_lab.data.tasks import Task
from prompt_lab.files.results import read_csv

Factory = Callable[..., Backbone]

ROWS: dict[SplitName, list[tuple[str, str]]] = {
    "train": [("it was lovely", "great"), ("we left early", "bad"), ("one more time", "great")],
    "dev": [("not for me", "bad"), ("a joy", "great")],
    "test": [("what a film", "great")],
}


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture
def renamed_root(fewshot_root: Path, tmp_path: Path) -> Callable[..., Path]:
    """Function that makes a folder with the files of two tasks under other K."""

    def make(*shots: object) -> Path:
        for task in ("glue-sst2", "e2e_nlg_cleaned"):
            (tmp_path / task).mkdir()
            for path in (fewshot_root / task).iterdir():
                for k in shots:
                    name = path.name.replace(f"{task}_{TASKS[task][0]}_", f"{task}_{k}_")
                    (tmp_path / task / name).write_bytes(path.read_bytes())
        return tmp_path

    return make


@pytest.mark.parametrize("shots", [64, "all"])
def test_files_of_another_k_are_read_where_it_is_asked_for(
    renamed_root: Callable[..., Path], shots: Any
) -> None:
    """Reference: `read_split` with a row of the table that has this K."""
    root = renamed_root(shots, 8)
    data = CrossFitDataModule(
        ["glue-sst2", "e2e_nlg_cleaned"], str(root), list(SAMPLES), shots=shots
    )
    data.setup()
    for (name, sample), splits in data.splits.items():
        row = Task(name, "custom", "EM", shots, None)
        assert splits == {split: read_split(root, row, sample, split) for split in splits}
    assert {task.shots for task in data.tasks.values()} == {shots}


@pytest.mark.parametrize(
    ("task", "shots", "reason"),
    [
        *[
            ("glue-sst2", shots, f"data.shots is {shots!r}: give a")
            for shots in (0, True, "64", 1.5)
        ],
        ("glue-sst2", 8, r"no file .*glue-sst2_8_13_train\.tsv; .* K = 64 train"),
        ("glue-sst2", None, r"no file .*sst2_16_13_train\.tsv.*data.shots chooses K"),
        ("sandbox-count-food", 513, "has 512 training rows"),
        ("sandbox-count-food", "all", "has 512"),
        ("sandbox-count-food", 3, "all 4 labels"),
    ],
)
def test_a_k_that_is_not_there_is_refused(
    renamed_root: Callable[..., Path], task: str, shots: Any, reason: str
) -> None:
    root = "sandbox" if task.startswith("sandbox") else str(renamed_root(64))
    with pytest.raises(ValueError, match=reason):
        CrossFitDataModule([task], root, [13], shots=shots).setup()


@pytest.mark.parametrize("task", ["sandbox-count-food", "sandbox-what-foreign"])
def test_k_rows_of_the_sandbox_are_some_of_its_own_with_the_shares_of_the_labels(task: str) -> None:
    few, whole = (CrossFitDataModule([task], samples=[13], shots=k) for k in (40, None))
    few.setup(), whole.setup()
    own, all_of = few.splits[task, 13], whole.splits[task, 13]
    pairs = set(zip(all_of["train"].inputs, map(tuple, all_of["train"].references), strict=True))
    drawn = set(zip(own["train"].inputs, map(tuple, own["train"].references), strict=True))
    assert len(drawn) == 40
    assert drawn < pairs
    assert own["dev"] == replace(all_of["dev"], path=own["dev"].path)
    assert own["train"].digest != all_of["train"].digest
    if few.tasks[task].labels:
        share = Counter(answers[0] for answers in all_of["train"].references)
        for label, count in Counter(answers[0] for answers in own["train"].references).items():
            assert abs(count - 40 * share[label] / 512) < 1


@pytest.mark.parametrize(("shots", "column"), [(64, "64"), ("all", "all"), (None, "64")])
def test_results_tell_the_k_that_was_read(
    backbone: Factory, renamed_root: Callable[..., Path], tmp_path: Path, shots: Any, column: str
) -> None:
    """Also where the row of the table leaves it open."""
    root = renamed_root(column)
    if shots is None:
        (tmp_path / "mine.yaml").write_text("open: {metric: ACC, labels: [negative, positive]}")
        for path in list((root / "glue-sst2").iterdir()):
            path.rename(path.with_name(path.name.replace("glue-sst2", "open")))
        (root / "glue-sst2").rename(root / "open")
    name, rows = ("open", str(tmp_path / "mine.yaml")) if shots is None else ("glue-sst2", None)
    data = CrossFitDataModule([name], str(root), [13], rows, shots=shots)
    method, trainer = make_method(backbone("gpt2")), make_trainer(tmp_path / "run", 2, 2)
    trainer.fit(method, datamodule=data)
    trainer.test(method, datamodule=data, verbose=False)
    lines = read_csv(tmp_path / "run" / "results.csv")
    assert {line["shots"] for line in lines} == {column}


# ---- pairs of texts ------------------------------------------------------------------------------


def test_pairs_of_texts_are_the_rows_of_a_task() -> None:
    """Labels make a task whose answers are scored; without them answers are generated."""
    open_rows = {split: [("two and two", ("4", " four ")), (" one ", "1")] for split in SPLITS}
    tasks: dict[str, Any] = {"film": ROWS, "sum": open_rows, "hate": ROWS}
    chosen = {"hate": "Classification-F1"}
    data = RowsDataModule(tasks, {"film": ["great", "bad"], "hate": ["bad", "great"]}, chosen)
    data.setup()
    assert data.keys == [("film", 0), ("sum", 0), ("hate", 0)]
    assert [task.metric for task in data.tasks.values()] == ["ACC", "EM", "Classification-F1"]
    labels = [task.labels for task in data.tasks.values()]
    assert labels == [("great", "bad"), None, ("bad", "great")]
    for split in SPLITS:
        own = data.splits["film", 0][split]
        assert list(zip(own.inputs, own.references, strict=True)) == [
            (text, [answer]) for text, answer in ROWS[split]
        ]
        assert data.splits["sum", 0][split].inputs == ["two and two", "one"]
        assert data.splits["sum", 0][split].references == [["4", "four"], ["1"]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": {}}, "data.tasks is empty: name at least one task"),
        ({"labels": {"flim": ["great", "bad"]}}, "flim is none of the tasks film"),
        ({"metrics": {"flim": "ACC"}}, "flim is none of the tasks film"),
        ({"metrics": {"film": "acc"}}, "metric acc of film: choose among ACC, EM, QA-F1"),
        ({"tasks": {"film": {"train": ROWS["train"]}}}, "task film has no dev, test: give train"),
        ({"tasks": {"film": ROWS | {"dev": []}}}, "film 0 dev: no rows: give at least one"),
        (
            {"labels": {"film": ["great", "good"]}},
            "film 0 train, line 2: not a label of film: 'bad'; ",
        ),
        ({"max_input_length": 0}, "data.max_input_length is 0: give at least 1"),
        ({"samples": [1, 1]}, r"data.samples must be distinct and at least one: \[1, 1\]"),
        ({"truncation_side": "up"}, "data.truncation_side is 'up'; allowed: right, left"),
        ({"labels": {"film": "yes"}}, "labels of film are 'yes': give a list"),
        *[
            (
                {"tasks": {"film": ROWS | {"train": [("a", "b"), pair]}}},
                "train, row 2: .* no pair of",
            )
            for pair in [("x", []), ("x", ""), ("x", 3), (3, "yes"), ("x", "y", "n"), "xy"]
        ],
    ],
)
def test_pairs_that_make_no_task_are_refused_in_one_sentence(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        RowsDataModule(**{"tasks": {"film": ROWS}, **given}).setup()
    assert "\n" not in str(refused.value)


class Numbers(PromptDataModule):
    """A task whose rows are made up, of its own for each sample and split."""

    def rows(self, task: str, sample: int, split: SplitName) -> Pairs:
        """Sums with the sample's number."""
        size = {"train": 5, "dev": 3, "test": 2}[split]
        return [(f"{task} {split} {n} + {sample}", str(n + sample)) for n in range(size)]


def test_a_subclass_says_its_rows_by_task_sample_and_split(backbone: Factory) -> None:
    model, task = backbone("gpt2"), Task("sum", "custom", "EM", None, None)
    data = Numbers([task], samples=[1, 2])
    data.setup()
    data.connect(model)
    for sample in (1, 2):
        for split in SPLITS:
            pairs = data.rows("sum", sample, split)
            assert data.tokens("sum", sample, split).inputs == model.encode_inputs(
                [text for text, _ in pairs]
            )
            assert data.splits["sum", sample][split] == as_split(
                pairs, Path(f"sum {sample} {split}")
            )
    with pytest.raises(NotImplementedError, match="PromptDataModule says no rows: give it a meth"):
        PromptDataModule([task]).setup()


def test_a_method_trains_and_answers_on_pairs(backbone: Factory, tmp_path: Path) -> None:
    """An epoch is one pass of the run that needs most batches: 3 of one row."""
    data = RowsDataModule({"film": ROWS}, {"film": ["great", "bad"]})
    method = make_method(backbone("gpt2"), batch_size=[1, 2])
    trainer = make_trainer(tmp_path / "run", -1, 3, max_epochs=2)
    trainer.fit(method, datamodule=data)
    assert trainer.global_step == 6
    trainer.test(method, datamodule=data, verbose=False)
    tuned, other, *_ = read_csv(tmp_path / "run" / "results.csv")
    for line in (tuned, other):
        assert (line["task"], line["metric"], line["test_rows"]) == ("film", "ACC", "1")


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
def test_rows_are_the_tokens_of_their_texts_cut_and_of_each_answer(
    backbone: Factory, fewshot_root: Path, kind: str, prefix: bool
) -> None:
    """Reference: every answer tokenised alone; the longest answer is known of all three."""
    model = backbone(kind)
    data = CrossFitDataModule(
        list(TASKS), str(fewshot_root), list(SAMPLES), task_prefix=prefix, max_input_length=20
    )
    data.setup()
    data.connect(model)
    for (task, sample), splits in data.splits.items():
        front = f" [{task}] " if prefix else ""
        for name, split in splits.items():
            rows = data.tokens(task, sample, name)
            alone = [[model.encode_targets([text])[0] for text in row] for row in split.references]
            assert rows.targets == alone
            assert rows.longest_target == max(len(ids) for row in alone for ids in row)
            whole = [model.encode_inputs([front + text])[0] for text in split.inputs]
            assert [len(ids) for ids in rows.inputs] == [min(20, len(ids)) for ids in whole]
            assert rows.cut == sum(len(ids) > 20 for ids in whole)
            pairs = zip(rows.inputs, whole, strict=True)
            assert all(ids[:19] == full[:19] for ids, full in pairs)


# ---- loaders -------------------------------------------------------------------------------------


Fed = Callable[..., PromptDataModule]


@pytest.fixture
def fed(backbone: Factory, fewshot_root: Path, tmp_path: Path) -> Fed:
    """Function that makes a module with a trainer, fed with runs of 1, 5 and 7 rows a step."""

    def make(kind: str = "gpt2", share: tuple[int, int] = (0, 1), **trainer: Any) -> Any:
        data = CrossFitDataModule(["glue-sst2", "e2e_nlg_cleaned"], str(fewshot_root), [13])
        data.setup()
        data.connect(backbone(kind))
        runs = [Run(task, 13, 0, 0.3, size) for task in data.tasks for size in (7, 5, 1)]
        rows = {key: data.tokens(*key, "train") for key in data.keys}
        progress = Progress(0, list(range(len(runs))))
        draw = bank_draw(runs, rows, data.order_seed, data.layout)
        steps = {"tokens_per_forward": 200, "extra_per_row": lambda task, longest: longest}
        data.feed(progress, draw, lambda: progress.live, runs=runs, share=share, **steps)
        data.trainer = make_trainer(tmp_path, **trainer)
        return data

    return make


@pytest.mark.parametrize(
    ("trainer", "length"),
    [
        ({"max_steps": 9}, 9),
        ({"max_steps": 9, "accumulate_grad_batches": 4}, 36),
        ({"max_steps": -1, "max_epochs": 3}, 12),
        ({"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": 4}, 12),
    ],
)
def test_an_epoch_is_all_steps_or_one_pass(fed: Fed, trainer: dict[str, Any], length: int) -> None:
    """All batches of the optimizer's steps; else 12 rows one by one, the longest way."""
    assert len(fed(**trainer).train_dataloader()) == length


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_the_fits_progress_decides_which_batch_comes_next(fed: Fed, kind: str) -> None:
    """The tokens are those that the backbone's own rules make of the files' texts."""
    data = fed(kind)
    model, progress, batches = data._backbone, data.progress, iter(data.train_dataloader())
    for progress.batches, progress.live in ((3, [0, 1, 2, 3, 4, 5]), (8, [1, 5])):
        batch = next(batches)
        sizes = {place: (7, 5, 1)[place % 3] for place in progress.live}
        assert Counter(batch.prompts) == Counter(sizes)
        assert batch.rows == data.draw.batch(progress.batches, progress.live).rows
        assert batch.left_padded == (kind == "gpt2")
        for at, (place, row) in enumerate(zip(batch.prompts, batch.rows, strict=True)):
            split = data.splits[list(data.tasks)[place // 3], 13]["train"]
            ids = batch.input_ids[at][batch.input_mask[at].bool()].tolist()
            target = batch.target_ids[at][batch.target_ids[at] != IGNORE].tolist()
            assert ids == model.encode_inputs([split.inputs[row]])[0]
            assert target in model.encode_targets(split.references[row])


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader", "predict_dataloader"])
@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_loaders_have_the_length_of_what_they_give(
    fed: Fed, loader: str, world: int
) -> None:
    """Also for a share of the rows, and after runs have finished."""
    made = [fed(share=(rank, world)) for rank in range(world)]
    steps = [getattr(data, loader)() for data in made]
    before = 0
    for live in ([4], [0, 4], [0, 1, 2, 3, 4, 5]):
        for data in made:
            data.progress.live = live
        parts = [part for own in steps for part in own]
        assert sum(map(len, steps)) == len(parts) > before
        before = len(parts)
        pairs = Counter(
            pair for p in parts for pair in zip(p.batch.prompts, p.batch.rows, strict=True)
        )
        assert pairs == Counter((place, row) for place in live for row in range(12))
