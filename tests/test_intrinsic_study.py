"""The stages of intrinsic prompt tuning, one after another by the real command, and the report."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from prompt_lab.subspace import load_subspace

ROOT = Path(__file__).parents[1]
QUICK = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
TASKS = ["--data.tasks", "[sandbox-size, sandbox-day, sandbox-sst]"]


def run(folder: Path, *words: str) -> str:
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "prompt_lab", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def stage(folder: Path, name: str, run_dir: str, *words: str) -> list[dict[str, str]]:
    """Run the stage of a shipped config for two steps; returns its results."""
    config = str(ROOT / "configs" / "intrinsic" / f"sandbox_{name}.yaml")
    run(folder, "fit", "-c", config, "--run_dir", run_dir, *QUICK, *TASKS, *words)
    with (folder / run_dir / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_prompts_subspace_tuning_and_prompts_again_run_one_after_another(tmp_path: Path) -> None:
    stage(tmp_path, "prompts", "runs/prompts")
    unseen = ("--model.unseen_tasks", "[sandbox-sst]", "--model.intrinsic_dim", "[2, 3]")
    found = stage(tmp_path, "subspace", "runs/subspace", *unseen)
    assert [(row["task"], row["variant"]) for row in found][:3] == [
        ("sandbox-size", "reconstructed"),
        ("sandbox-day", "reconstructed"),
        ("sandbox-sst", "reconstructed_unseen"),
    ]
    path = "runs/subspace/subspace_3.safetensors"
    assert load_subspace(tmp_path / path).metadata["source_tasks"] == [
        "sandbox-size",
        "sandbox-day",
    ]
    tuned = stage(tmp_path, "tuning", "runs/tuning", "--model.subspace.path", path)
    assert {(row["variant"], row["intrinsic_dim"]) for row in tuned} == {("subspace", "3")}
    random = ("--model.subspace.path", "random", "--model.subspace.intrinsic_dim", "3")
    drawn = stage(tmp_path, "tuning", "runs/random", *random)
    assert {row["variant"] for row in drawn} == {"random_subspace"}
    start = ("--model.init.name", "file", "--model.init.path", "runs/tuning/prompts")
    again = stage(tmp_path, "prompts", "runs/again", *start)
    assert {row["initialised"] for row in again if row["variant"] == "tuned"} == {
        "file runs/tuning/prompts"
    }
    folders = [f"runs/{name}" for name in ("prompts", "subspace", "tuning", "random")]
    words = ("--out", "report", "--partition", "sandbox/12_to_4")
    printed = run(tmp_path, "report", *folders, *words)
    assert "E_rel" in printed
    assert "prompt tuning, random subspace, dim 3" in printed
    assert len(list((tmp_path / "report").glob("*.png"))) >= 2
    assert (tmp_path / "report" / "codes-prompt_tuning_subspace_dim_3.png").is_file()
