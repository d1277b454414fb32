"""The benchmarks run: tiny models, a few pairs; what they measure here means nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from prompt_lab.commands.fit import METHODS

FOLDER = Path(__file__).parent / "benchmarks"
GOALS = {
    f"G{number}" for number in (*range(1, 6), 7, 8, 9, *range(11, 15), *range(17, 28))
}  # G16 needs bf16 instructions


def test_a_quick_run_gives_a_line_for_every_goal_and_a_table(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    words = ["--quick", "--threads", "1", "--pairs", "1", "--out", str(out)]
    made = subprocess.run(
        [sys.executable, FOLDER / "run.py", *words], capture_output=True, text=True, timeout=280
    )
    assert made.returncode == 0, made.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["goal"] for line in lines} >= GOALS
    assert all(line["value"] > 0 and line["machine"] and line["versions"] for line in lines)
    assert made.stdout.count("\n| G") == len(lines)


def test_memory_of_meta_gradients_gives_a_table_and_a_figure(tmp_path: Path) -> None:
    words = ["--quick", "--threads", "1", "--models", "GPT-2-like", "--out", str(tmp_path)]
    made = subprocess.run(
        [sys.executable, FOLDER / "meta.py", *words], capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    assert "| GPT-2-like | 2 |" in made.stdout
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.svg"))) == 1


def test_the_profile_has_a_line_for_every_method_of_the_package() -> None:
    words = ["--quick", "--threads", "1", "--models", "T5-like"]
    made = subprocess.run(
        [sys.executable, FOLDER / "profile_step.py", *words],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert made.returncode == 0, made.stderr
    assert set(re.findall(r"^\| T5-like \| (\w+)", made.stdout, re.MULTILINE)) == set(METHODS)
    assert "## T5-like, B 8" in made.stdout


def test_precision_gives_both_tables_without_data_from_outside(tmp_path: Path) -> None:
    """Every model under every way of rounding, and fits that differ in nothing else."""
    out = tmp_path / "lines.jsonl"
    words = ["--quick", "--threads", "1", "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "PROMPT_LAB_TEST_DATA"}
    made = subprocess.run(
        [sys.executable, FOLDER / "precision.py", *words],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert made.returncode == 0, made.stderr
    assert "stories260K is left out" in made.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    refused = {line["model"].split(",")[0] for line in lines if "refused" in line}
    assert refused == {"T5-like", "sandbox"}
    exact = [line for line in lines if line.get("way") == "float64"]
    assert len(exact) == 7
    assert all(line["gradient"]["worst"] < 1e-3 for line in exact)
    assert made.stdout.count("| sandbox, sandbox-sst |") == 4
