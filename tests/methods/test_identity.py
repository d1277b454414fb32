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
from conftest import make_method, make_trainer
from tiny_fits import fit_in, make_subspace, run_test

from prompt_lab.commands.fit import run
from prompt_lab.core.backbone import Backbone
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.files.prompts import find_prompts
from prompt_lab.files.results import read_csv
from prompt_lab.methods.identity import fit_id, unusual
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.starts import SubspaceConfig

MODEL = {"num_virtual_tokens": 5, "learning_rate": 0.03, "batch_size": 4}
TASK = "glue-sst2"
SHORT = {"max_steps": 2, "val_check_interval": 2}


@pytest.fixture
def tested(backbone: Callable[..., Backbone], fewshot_root: Path, tmp_path: Path) -> Any:
    """Function that fits and tests, or only tests, and returns the lines of results."""

    def run(folder: str = "run", fits: bool = True, **given: Any) -> list[dict[str, str]]:
        method = make_method(backbone("gpt2"), **{**MODEL, **given})
        data = CrossFitDataModule([TASK], str(fewshot_root), [13])
        if fits:
            fit_in(tmp_path / folder, method, fewshot_root, **SHORT)
        run_test(tmp_path / folder, method, data, **SHORT)
        return read_csv(tmp_path / folder / "results.csv")

    return run


@pytest.fixture
def named(backbone: Callable[..., Backbone], fewshot_root: Path, tmp_path: Path) -> Any:
    """Function that gives the name of a fit, and its settings off their defaults."""

    def name(root: Path = fewshot_root, trainer: Any = None, **given: Any) -> tuple[str, Any]:
        data = CrossFitDataModule([TASK], str(root), [13], **given.pop("data", {}))
        data.setup()
        method = make_method(backbone("gpt2"), **{**MODEL, **given})
        method.look(data, make_trainer(tmp_path, **{**SHORT, **(trainer or {})}))
        found, settings, _ = fit_id(method)
        return found, unusual(method, settings)

    return name


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
    "max_steps": {"trainer": {"max_steps": 4}},
    "val_check_interval": {"trainer": {"val_check_interval": 1}},
    "precision": {"trainer": {"precision": "bf16-mixed"}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_fits_that_differ_in_a_setting_have_different_names_and_tell_it(
    named: Any, change: str
) -> None:
    (plain, usual), (other, told) = named(), named(**CHANGES[change])
    assert plain != other
    assert {name.split(".")[-1] for name in told if usual.get(name) != told[name]} == {change}


def test_what_changes_no_number_and_moved_data_change_no_name(
    named: Any, fewshot_root: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(fewshot_root, moved)
    before = named()
    assert named(tokens_per_forward=40, save_steps=[2]) == before == named(root=moved)
    file = moved / TASK / f"{TASK}_16_13_train.tsv"
    file.write_text(file.read_text().replace("house", "hut"))
    assert named(root=moved)[0] != before[0]


def test_the_command_line_and_python_make_the_same_name_and_settings(
    model_folder: Callable[[str], Path], fewshot_root: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", f"--model.backbone.name={model_folder('gpt2')}", "--run_dir=cli"]
    words += [f"--model.{name}={value}" for name, value in MODEL.items()]
    words += [f"--data.tasks=[{TASK}]", f"--data.root={fewshot_root}", "--data.samples=[13]"]
    words += [f"--trainer.{name}={value}" for name, value in SHORT.items()]
    assert run([*words, "--trainer.accelerator=cpu", "--test_after_fit=true"]) == 0
    method = PromptTuning(backbone={"name": str(model_folder("gpt2"))}, **MODEL)  # type: ignore[arg-type]
    fit_in(tmp_path / "python", method, fewshot_root, **SHORT)
    method.trainer.test(method, datamodule=method.datamodule, verbose=False)
    one, other = (read_csv(tmp_path / folder / "results.csv") for folder in ("cli", "python"))
    for name in ("settings", "fit_id"):
        assert [line[name] for line in one] == [line[name] for line in other]
    found = json.loads(one[0]["settings"])
    assert found["trainer.max_steps"] == 2
    assert not [name for name in found if name.startswith("data.") or "label_smoothing" in name]


@pytest.mark.parametrize("place", ["store", "file", "subspace"])
def test_a_finished_fit_is_tested_and_moved_without_the_files_it_started_from(
    tested: Any, backbone: Callable[..., Backbone], tmp_path: Path, place: str
) -> None:
    source, settings = tmp_path / "source", {}
    if place == "subspace":
        source.mkdir()
        path = make_subspace(source / "map.safetensors", backbone("gpt2"))
        settings["subspace"] = SubspaceConfig(str(path))
    else:
        tested("source")
        path = source / "prompts"
        path = path if place == "store" else next(path.glob("*.safetensors"))
        settings["init"] = {"name": "file", "path": str(path)}
    before = tested("run", **settings)
    wanted = ("codes", "", "3") if place == "subspace" else ("prompt", TASK, "")
    assert {(x["start"], x["start_of"], x["intrinsic_dim"]) for x in before} == {wanted}
    codes = [found.load().code for found in find_prompts(tmp_path / "run")]
    shutil.rmtree(source)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert tested("moved", fits=False, **settings) == before
    for found, code in zip(find_prompts(tmp_path / "moved"), codes, strict=True):
        after = found.load().code
        assert (after is None and code is None) or after.equal(code)
