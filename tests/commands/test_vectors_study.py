"""The stages of the study of task prompt vectors, one after another by the command line.

Two families of the sandbox, two seeds, two steps: what is tested is that each stage takes what the
one before left, that the shipped sweeps' starts are the shipped sources, and that the report tells
all starts at every K.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import CONFIGS

from prompt_lab.commands import fit as cli
from prompt_lab.commands.prompts import apply_vectors
from prompt_lab.commands.report import report_command
from prompt_lab.files.prompts import load_prompt
from prompt_lab.files.results import read_csv
from prompt_lab.sandbox.tasks import SPLIT_ROWS

QUICK = ("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu")
SOURCES = "--data.tasks=[sandbox/sorting/source]"
SEEDS = "--model.init_seed=[0, 1]"
MULTITASK = (
    *("--model.algorithm=multitask", "--model.inner.steps=1", "--model.validation_tasks=[]"),
    *("--model.target_tasks=[sandbox/6_to_6/target]", "--data.samples=[100]"),
)


def run(verb: str, config: str, run_dir: str, *words: str) -> list[dict[str, str]]:
    """Run a shipped config; returns its results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cli.RUN_DIR_VARIABLE, "")  # taken back after the fit
        assert cli.run([verb, f"--config={CONFIGS / config}", f"--run_dir={run_dir}", *words]) == 0
    results = Path(run_dir) / "results.csv"
    return read_csv(results) if results.is_file() else []


@pytest.fixture(scope="module", autouse=True)
def few_rows() -> Iterator[None]:
    """The sandbox's tasks with few dev and test rows, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPLIT_ROWS, "test", 24)
        patch.setitem(SPLIT_ROWS, "dev", 8)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the source tasks were tuned, and their vectors summed."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("fit", "quickstart.yaml", "runs/vectors", *QUICK, SOURCES, SEEDS)
        apply_vectors("sandbox-review + sandbox-day", prompts=["runs/vectors"], out="runs/sums")
        for seed in (0, 1):
            words = (*QUICK, SOURCES, *MULTITASK, f"--model.init_seed={seed}")
            run("fit", "meta/sandbox.yaml", f"runs/multitask_sorting_{seed}", *words)
    return folder


def test_vectors_are_evaluated_on_every_initial_prompt_and_in_pairs(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sources)
    crossed = run("test", "vectors/sandbox_arithmetic.yaml", "runs/cross", SOURCES)
    variants = [row["variant"] for row in crossed]
    assert {name: variants.count(name) for name in ("single", "vectors", "vector_alone")} == {
        "single": 4,  # two tasks, two seeds
        "vectors": 4,
        "vector_alone": 4,
    }
    summed = (SOURCES, "--model.study=pairs", "--model.scales=[0.5, 1.0]")
    pairs = run("test", "vectors/sandbox_arithmetic.yaml", "runs/pairs", *summed)
    assert {row["expression"] for row in pairs if row["variant"] == "vectors"} == {
        "sandbox-review + sandbox-day"
    }
    report_command(["runs/vectors", "runs/cross", "runs/pairs"], out="report")
    assert {"vectors-cross.png", "vectors-pairs.png"} <= {p.name for p in Path("report").iterdir()}


def test_every_start_of_the_study_is_tuned_and_compared_over_k(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sources)
    starts = [
        {"name": "vocab"},
        {"name": "file", "path": "runs/vectors", "source_tasks": ["sandbox/sorting/source"]},
        {"name": "file", "path": "runs/sums", "source_tasks": ["sandbox-review + sandbox-day"]},
        {"name": "file", "path": "runs/multitask_sorting_{init_seed}/prompt.safetensors"},
    ]
    trials: list[dict[str, Any]] = [
        {"data.tasks": ["sandbox/sorting/target"], "data.shots": shots, "model.init": start}
        for shots, start in [*((8, start) for start in starts), (64, starts[0])]
    ]
    folders = []
    for number, settings in enumerate(trials):
        words = [f"--{name}={json.dumps(value)}" for name, value in settings.items()]
        folders.append(f"runs/start{number}")
        rows = run("fit", "quickstart.yaml", folders[-1], *QUICK, SEEDS, *words)
        sources_of = settings["model.init"].get("source_tasks") or [""]
        tuned = [row for row in rows if row["variant"] == "tuned"]
        starts = 2 if sources_of == ["sandbox/sorting/source"] else 1
        assert len(tuned) == 2 * 2 * starts  # targets, seeds, starts
        assert {row["shots"] for row in tuned} == {str(settings["data.shots"])}
    prompt = next((sources / "runs/start2/prompts").glob("sandbox-sst_100_seed1_*"))
    summed = next((sources / "runs/sums").glob("*seed1*"))
    assert torch.equal(load_prompt(prompt).init, load_prompt(summed).prompt)
    report_command(folders, out="starts")
    assert "start4" in capsys.readouterr().out
    table = pd.read_csv("starts/tasks.csv")
    assert {"vocab", "prompt"} <= {*table["start"]}
    assert table["shots"].nunique() > 1
