"""Predictions and results name a variant alike, whatever the method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_data, make_trainer
from ddp_fits import FITS, loaded, make_files

from prompt_lab.files.results import read_csv
from prompt_lab.methods.method import PromptMethod
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.vector_arithmetic import VectorArithmetic


def vectors(folder: Path) -> PromptMethod:
    """Sums of tuned prompts, which only a test runs."""
    return loaded(VectorArithmetic(str(folder / "tuned"), scales=[0.5, 1.0]), "gpt2")


METHODS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    **{name: FITS[name] for name in ("one run", "codes", "subspaces", "one episode", "attempt")},
    **{name: FITS[name] for name in ("fine-tuning", "adapter map", "adapter codes")},
    "vectors": (vectors, ["glue-sst2", "glue-cola", "emotion"]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the methods start from."""
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_every_prediction_has_its_line_of_results(
    files: Path, fewshot_root: Path, tmp_path: Path, name: str
) -> None:
    """By variant and run where a line names the run's file, else by variant and task."""
    make, tasks = METHODS[name]
    method, data = make(files), make_data(fewshot_root, tasks, [13])
    trainer = make_trainer(tmp_path, 1, 1)
    if name != "vectors":
        trainer.fit(method, datamodule=data)
    method.test_baselines = isinstance(method, PromptTuning)  # variants of their own
    trainer.test(method, datamodule=data, verbose=False)

    rows = read_csv(tmp_path / "results.csv")
    stems = {(row["variant"], Path(row["prompt_file"]).stem) for row in rows if row["prompt_file"]}
    told = {(row["variant"], row["task"]) for row in rows}
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert lines
    assert {(line["variant"], line["task"]) for line in lines} <= told
    of_runs = {variant for variant, _ in stems}
    found = {(line["variant"], line["run"]) for line in lines if line["variant"] in of_runs}
    assert found == stems
