"""``CrossFitDataModule``: K of the files, and which rows have the tokens of their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLES, TASKS
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from prompt_lab.core.backbone import Backbone
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.data.files import DataError, read_split
from prompt_lab.data.tasks import Task
from prompt_lab.files.results import read_csv
from prompt_lab.methods.prompt_tuning import PromptTuning

Factory = Callable[..., Backbone]


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


def test_a_k_without_files_is_told_with_those_that_have_some(
    renamed_root: Callable[..., Path],
) -> None:
    root = str(renamed_root(64))
    with pytest.raises(DataError, match=r"no file .*glue-sst2_8_13_train\.tsv; .* K = 64 train"):
        CrossFitDataModule(["glue-sst2"], root, [13], shots=8).setup()
    with pytest.raises(DataError, match=r"no file .*sst2_16_13_train\.tsv.*data.shots chooses K"):
        CrossFitDataModule(["glue-sst2"], root, [13]).setup()


@pytest.mark.parametrize("shots", [0, -1, True, "64", "every", 1.5])
def test_a_k_that_no_file_can_have_is_refused(shots: Any) -> None:
    with pytest.raises(ValueError, match=rf"data\.shots is {shots!r}: give a whole number above 0"):
        CrossFitDataModule(["glue-sst2"], "data", shots=shots)


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


@pytest.mark.parametrize(
    ("shots", "reason"), [(513, "has 512 training rows"), ("all", "has 512"), (3, "all 4 labels")]
)
def test_a_k_that_the_sandbox_cannot_draw_is_refused(shots: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CrossFitDataModule(["sandbox-count-food"], shots=shots).setup()


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
    method = PromptTuning(num_virtual_tokens=3, learning_rate=0.03, batch_size=4)
    method.backbone = backbone("gpt2")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=2,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path / "run",
    )
    trainer.fit(method, datamodule=data)
    trainer.test(method, datamodule=data, verbose=False)
    lines = read_csv(tmp_path / "run" / "results.csv")
    assert {line["shots"] for line in lines} == {column}


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
def test_train_and_dev_have_the_tokens_of_their_answers_and_test_has_not(
    backbone: Factory, fewshot_root: Path, kind: str
) -> None:
    """Reference: every answer tokenised alone; the longest answer is known of all three."""
    model = backbone(kind)
    data = CrossFitDataModule(list(TASKS), str(fewshot_root), list(SAMPLES))
    data.setup()
    data.connect(model)
    for (task, sample), splits in data.splits.items():
        for name, split in splits.items():
            rows = data.rows(task, sample, name)
            alone = [[model.encode_targets([text])[0] for text in row] for row in split.references]
            assert rows.targets == ([] if name == "test" else alone)
            assert rows.longest_target == max(len(ids) for row in alone for ids in row)
            assert rows.inputs == [model.encode_inputs([text])[0] for text in split.inputs]
            assert rows.references == split.references


@pytest.mark.parametrize(("word", "value"), [("64", 64), ("all", "all"), ("null", None)])
def test_the_command_line_takes_a_number_or_the_word_all(word: str, value: Any) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(CrossFitDataModule, "data")
    words = ["--data.tasks=[glue-sst2]", "--data.root=x", f"--data.shots={word}"]
    assert parser.parse_args(words).data.shots == value
