"""The name of a fit: equal for equal work, whoever does it and wherever, and else another.

And what a finished fit needs: not the files that it started from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HIDDEN, make_method, make_trainer
from lightning.pytorch import Trainer

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.subspace import Subspace
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.files.prompts import find_prompts
from prompt_lab.files.results import read_csv
from prompt_lab.files.tensors import save_network
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.starts import SubspaceConfig

MODEL = {"num_virtual_tokens": 3, "learning_rate": 0.03, "batch_size": 4}
TASK = "glue-sst2"


@pytest.fixture
def tested(backbone: Callable[..., Backbone], fewshot_root: Path, tmp_path: Path) -> Any:
    """Function that fits and tests, and returns the lines of results."""

    def run(
        folder: str = "run", root: Path = fewshot_root, trainer: Any = None, **given: Any
    ) -> list[dict[str, str]]:
        data = CrossFitDataModule([TASK], str(root), [13], **given.pop("data", {}))
        method = make_method(backbone("gpt2"), **{**MODEL, **given})
        made = make_trainer(tmp_path / folder, 2, 2, **(trainer or {}))
        made.fit(method, datamodule=data)
        made.test(method, datamodule=data, verbose=False)
        return read_csv(tmp_path / folder / "results.csv")

    return run


def ids(lines: list[dict[str, str]]) -> str:
    """The one name that all lines have."""
    (found,) = {line["fit_id"] for line in lines}
    return found


CHANGES: dict[str, dict[str, Any]] = {
    "patience": {"patience": 3},
    "schedule": {"optim": {"schedule": "linear"}},
    "weight_decay": {"optim": {"weight_decay": 0.1}},
    "label_smoothing": {"label_smoothing": 0.1},
    "vocab_size": {"init": {"name": "vocab", "vocab_size": 50}},
    "decoding": {"decoding": "generate"},
    "label_score": {"label_score": "mean"},
    "max_input_length": {"data": {"max_input_length": 9}},
    "truncation_side": {"data": {"truncation_side": "left"}},
    "task_prefix": {"data": {"task_prefix": True}},
    "order_seed": {"data": {"order_seed": 1}},
    "max_steps": {"trainer": {"steps": 4}},
    "val_check_interval": {"trainer": {"every": 1}},
    "precision": {"trainer": {"precision": "bf16-mixed"}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_fits_that_differ_in_a_setting_have_different_names(tested: Any, change: str) -> None:
    """B1: schedules, lengths, orders, intervals and precisions were one name."""
    given = dict(CHANGES[change])
    trainer = given.pop("trainer", {})
    for short, name in (("steps", "max_steps"), ("every", "val_check_interval")):
        if short in trainer:
            trainer[name] = trainer.pop(short)
    plain, other = tested("plain"), tested("other", trainer=trainer, **given)
    assert ids(plain) != ids(other)
    if change not in ("order_seed", "decoding"):  # which are columns, too
        assert plain[0]["settings"] != other[0]["settings"]


def test_what_changes_no_number_changes_no_name(tested: Any, tmp_path: Path) -> None:
    again = {"tokens_per_forward": 40, "save_steps": [2]}
    assert ids(tested("one")) == ids(tested("two")) == ids(tested("three", **again))


def test_moved_data_make_the_same_name_and_other_rows_another(
    tested: Any, fewshot_root: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(fewshot_root, moved)
    before = ids(tested("one"))
    assert ids(tested("two", root=moved)) == before
    file = moved / TASK / f"{TASK}_16_13_train.tsv"
    file.write_text(file.read_text().replace("house", "hut"))
    assert ids(tested("three", root=moved)) != before


def test_a_later_test_by_another_trainer_has_the_name_of_the_fit(
    tested: Any, backbone: Callable[..., Backbone], fewshot_root: Path, tmp_path: Path
) -> None:
    before = tested("run")
    (tmp_path / "run").rename(tmp_path / "moved")
    method = make_method(backbone("gpt2"), **MODEL)
    method.run_dir = tmp_path / "moved"
    plain = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    data = CrossFitDataModule([TASK], str(fewshot_root), [13])
    plain.test(method, datamodule=data, verbose=False)
    assert read_csv(tmp_path / "moved" / "results.csv") == before


def test_the_command_line_and_python_make_the_same_name(
    model_folder: Callable[[str], Path],
    fewshot_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prompt_lab.commands.fit import run

    monkeypatch.chdir(tmp_path)
    words = ["fit", f"--model.backbone.name={model_folder('gpt2')}", "--run_dir=cli"]
    words += [f"--model.{name}={value}" for name, value in MODEL.items()]
    words += [f"--data.tasks=[{TASK}]", f"--data.root={fewshot_root}", "--data.samples=[13]"]
    words += ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    assert run([*words, "--trainer.accelerator=cpu", "--test_after_fit=true"]) == 0
    method = PromptTuning(backbone={"name": str(model_folder("gpt2"))}, **MODEL)  # type: ignore[arg-type]
    data = CrossFitDataModule([TASK], str(fewshot_root), [13])
    trainer = make_trainer(tmp_path / "python", 2, 2)
    trainer.fit(method, datamodule=data)
    trainer.test(method, datamodule=data, verbose=False)
    one, other = (read_csv(tmp_path / folder / "results.csv") for folder in ("cli", "python"))
    assert [line["settings"] for line in one] == [line["settings"] for line in other]
    assert ids(one) == ids(other)


# ---- files that a fit started from ---------------------------------------------------------------


@pytest.mark.parametrize("place", ["store", "file"])
def test_a_finished_fit_is_tested_and_moved_without_the_files_it_started_from(
    tested: Any, backbone: Callable[..., Backbone], fewshot_root: Path, tmp_path: Path, place: str
) -> None:
    """B6."""
    tested("source")
    store = tmp_path / "source" / "prompts"
    path = store if place == "store" else next(store.glob("*.safetensors"))
    settings = {"init": {"name": "file", "path": str(path)}}
    before = tested("run", **settings)
    assert {(line["start"], line["start_of"]) for line in before} == {("prompt", TASK)}
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "run").rename(tmp_path / "moved")
    method = make_method(backbone("gpt2"), **{**MODEL, **settings})
    data = CrossFitDataModule([TASK], str(fewshot_root), [13])
    trainer = make_trainer(tmp_path / "moved", 2, 2)
    trainer.test(method, datamodule=data, verbose=False)
    assert read_csv(tmp_path / "moved" / "results.csv") == before


def test_a_finished_fit_in_a_subspace_is_tested_without_its_map(
    tested: Any, backbone: Callable[..., Backbone], fewshot_root: Path, tmp_path: Path
) -> None:
    model, path = backbone("gpt2"), tmp_path / "map.safetensors"
    facts = {"backbone": model.name, "backbone_digest": model.digest}
    save_network(path, Subspace(3, HIDDEN, 4), facts)
    settings = {"subspace": SubspaceConfig(str(path))}
    before = tested("run", **settings)
    assert {line["intrinsic_dim"] for line in before} == {"4"}
    codes = [found.load().code for found in find_prompts(tmp_path / "run")]
    path.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    method = make_method(backbone("gpt2"), **{**MODEL, **settings})
    data = CrossFitDataModule([TASK], str(fewshot_root), [13])
    make_trainer(tmp_path / "moved", 2, 2).test(method, datamodule=data, verbose=False)
    assert read_csv(tmp_path / "moved" / "results.csv") == before
    after = [found.load().code for found in find_prompts(tmp_path / "moved")]
    assert all(one.equal(other) for one, other in zip(codes, after, strict=True))


def test_settings_are_those_that_are_not_at_their_defaults(tested: Any) -> None:
    (line, *_) = tested("run", optim={"schedule": "linear"})
    found = json.loads(line["settings"])
    assert found["model.optim.schedule"] == "linear"
    assert not [name for name in found if name.startswith("data.") or "label_smoothing" in name]
    assert found["trainer.max_steps"] == 2


def test_a_resumed_fit_has_the_name_of_one_without_a_break(
    tested: Any, backbone: Callable[..., Backbone], fewshot_root: Path, tmp_path: Path
) -> None:
    before = tested("whole", trainer={"val_check_interval": 1})
    data = CrossFitDataModule([TASK], str(fewshot_root), [13])
    first = make_trainer(tmp_path / "run", 1, 1)
    first.fit(make_method(backbone("gpt2"), **MODEL), datamodule=data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    method, second = make_method(backbone("gpt2"), **MODEL), make_trainer(tmp_path / "run", 2, 1)
    second.fit(method, datamodule=data, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    second.test(method, datamodule=data, verbose=False)
    assert ids(read_csv(tmp_path / "run" / "results.csv")) == ids(before)
