"""Studies by make: a killed one goes on where it was, and what is done is not done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def make(tmp_path):
    """Words that make one fit of a study, small, in a new place, and their environment."""
    target = tmp_path / "runs" / "fine_tuning" / "sandbox-sst" / "100" / "1e-3" / "results.csv"
    words = ["make", "-C", str(ROOT / "configs" / "prompt_tuning"), "SCALE=0.4"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"env": {**os.environ, "PATH": path}, "stdout": subprocess.DEVNULL}
    return target, [*words, f"RUNS={tmp_path / 'runs'}", str(target)], settings


def test_a_killed_study_goes_on_and_skips_what_is_done(make):
    target, words, settings = make
    first = subprocess.Popen(words, start_new_session=True, **settings)
    checkpoint, until = target.parent / "checkpoints" / "last.ckpt", time.monotonic() + 120
    while not checkpoint.is_file() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not target.exists()
    assert subprocess.run(words, timeout=120, **settings).returncode == 0
    lines = (target.parent / "curves.csv").read_text().splitlines()[1:]
    assert [line.partition(",")[0] for line in lines] == ["10", "20", "30", "40"]
    assert not (target.parent / "checkpoints").exists()
    assert subprocess.run([*words, "--question"], timeout=30, **settings).returncode == 0


def test_a_study_reads_copies_of_its_samples_with_cut_test_sets(tmp_path):
    files = tmp_path / "root" / "mine"
    files.mkdir(parents=True)
    rows = {"train": 300, "dev": 300, "test": 300}
    for split, count in rows.items():
        text = "".join(f"text {i}\tyes\n" for i in range(count))
        (files / f"mine_16_13_{split}.tsv").write_text(text)
        (files / f"mine_16_42_{split}.tsv").write_text(text)
    target = tmp_path / "runs" / "data" / "done"
    words = [
        "make",
        "-C",
        str(ROOT / "configs" / "meta"),
        "BACKBONE=x",
        f"ROOT={tmp_path / 'root'}",
    ]
    subprocess.run([*words, f"RUNS={tmp_path / 'runs'}", str(target)], check=True, timeout=30)
    for split, count in {**rows, "test": 200}.items():
        made = target.parent / "mine" / f"mine_16_13_{split}.tsv"
        whole = (files / made.name).read_text().splitlines()
        assert made.read_text().splitlines() == whole[:count]
    assert len([*made.parent.iterdir()]) == len(rows)  # not of sample 42
