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
