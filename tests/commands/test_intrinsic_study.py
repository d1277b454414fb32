"""The stages of intrinsic prompt tuning, one after another by the command line, and the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from prompt_lab.commands import fit as cli
from prompt_lab.commands.report import report_command
from prompt_lab.core.subspace import Subspace
from prompt_lab.files.results import read_csv
from prompt_lab.files.tensors import load_network
from prompt_lab.sandbox.tasks import SPLIT_ROWS

CONFIGS = Path(__file__).parents[2] / "configs" / "intrinsic"
QUICK = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu"]
TASKS = ["--data.tasks=[sandbox-size, sandbox-day, sandbox-sst]"]


def stage(name: str, run_dir: str, *words: str) -> list[dict[str, str]]:
    """Run the stage of a shipped config for two steps; returns its results."""
    config = str(CONFIGS.parent / "quickstart.yaml")
    if name == "prompts":
        words = (*words, "--model.init_seed=0")
    else:
        config = str(CONFIGS / f"sandbox_{name}.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cli.RUN_DIR_VARIABLE, "")  # taken back after the fit
        given = ["fit", f"--config={config}", f"--run_dir={run_dir}", *QUICK, *TASKS, *words]
        assert cli.run(given) == 0
    return read_csv(Path(run_dir) / "results.csv")


def test_prompts_subspace_tuning_and_prompts_again_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SPLIT_ROWS, "test", 24)  # to save time
    monkeypatch.setitem(SPLIT_ROWS, "dev", 8)
    stage("prompts", "runs/prompts")
    unseen = ("--model.unseen_tasks=[sandbox-sst]", "--model.intrinsic_dim=[2, 3]")
    found = stage("subspace", "runs/subspace", *unseen)
    assert [(row["task"], row["variant"]) for row in found][:3] == [
        ("sandbox-size", "reconstructed"),
        ("sandbox-day", "reconstructed"),
        ("sandbox-sst", "reconstructed_unseen"),
    ]
    path = "runs/subspace/subspace_3.safetensors"
    assert load_network(tmp_path / path, Subspace).metadata["source_tasks"] == [
        "sandbox-size",
        "sandbox-day",
    ]
    tuned = stage("tuning", "runs/tuning", f"--model.subspace.path={path}")
    assert {(row["variant"], row["intrinsic_dim"]) for row in tuned} == {("subspace", "3")}
    random = ("--model.subspace.path=random", "--model.subspace.intrinsic_dim=3")
    drawn = stage("tuning", "runs/random", *random)
    assert {row["variant"] for row in drawn} == {"random_subspace"}
    start = (
        "--model.init.name=file",
        "--model.init.path=runs/tuning/prompts",
        "--model.test_baselines=false",
    )
    again = stage("prompts", "runs/again", *start)
    for row in again:
        if row["variant"] == "tuned":
            assert (row["start"], row["start_of"]) == ("prompt", row["task"])
            assert row["start_file"].startswith("runs/tuning/prompts/")
    folders = [f"runs/{name}" for name in ("prompts", "subspace", "tuning", "random")]
    report_command(folders, out="report", reference=["prompts"], partition="sandbox/12_to_4")
    assert "random" in capsys.readouterr().out
    assert "E_rel" in (tmp_path / "report" / "report.md").read_text()
    assert len(list((tmp_path / "report").glob("*.png"))) >= 2
    assert (tmp_path / "report" / "codes-tuning.png").is_file()
