"""The benchmarks run: tiny models, one pair; what they measure here means nothing.

All run in one process, which pays for the imports once, without data from outside.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prompt_lab.commands.fit import METHODS

FOLDER = Path(__file__).parent / "benchmarks"
GOALS = {f"G{n}" for n in (*range(1, 6), 7, 8, 9, *range(11, 15), *range(17, 27))}
"""Without G16, which needs bf16 instructions, and G27, which starts commands as many tests do."""

SCRIPT = """
import json, sys
import run, meta, precision, profile_step
for name, words in json.loads(sys.argv[1]).items():
    sys.argv = [name, *words]
    sys.stdout = open(f"{name}.out", "w")
    assert not globals()[name].main(), name
    sys.stdout.close()
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """What a file of the folder holds in which the benchmarks ran."""
    folder = tmp_path_factory.mktemp("benchmarks")
    own = {
        "run": ["--pairs", "1", "--out", "goals.jsonl", "--goals", *sorted(GOALS)],
        "meta": ["--models", "GPT-2-like", "--out", "."],
        "precision": ["--out", "precision.jsonl"],
        "profile_step": ["--models", "T5-like"],
    }
    words = {name: ["--quick", "--threads", "1", *given] for name, given in own.items()}
    environment = {k: v for k, v in os.environ.items() if k != "PROMPT_LAB_TEST_DATA"}
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *sys.path])
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert made.returncode == 0, made.stderr
    assert "stories260K is left out" in made.stderr
    return lambda name: (folder / name).read_text()


def test_a_quick_run_gives_a_line_for_every_goal_and_a_table(printed):
    lines = [json.loads(line) for line in printed("goals.jsonl").splitlines()]
    assert {line["goal"] for line in lines} == GOALS
    assert all(line["value"] > 0 and line["machine"] and line["versions"] for line in lines)
    assert printed("run.out").count("\n| G") == len(lines)


def test_memory_of_meta_gradients_gives_a_table_and_a_figure(printed):
    assert "| GPT-2-like | 2 |" in printed("meta.out")
    assert printed("meta.out").count("wrote meta_memory_GPT-2-like") == 2


def test_the_profile_has_a_line_for_every_method_of_the_package(printed):
    lines = printed("profile_step.out")
    assert set(re.findall(r"^\| T5-like \| (\w+)", lines, re.MULTILINE)) == set(METHODS)
    assert "## T5-like, B 8" in lines


def test_precision_gives_both_tables_without_data_from_outside(printed):
    """Every model under every way of rounding, and fits that differ in nothing else."""
    lines = [json.loads(line) for line in printed("precision.jsonl").splitlines()]
    refused = {line["model"].split(",")[0] for line in lines if "refused" in line}
    assert refused == {"T5-like", "sandbox"}
    exact = [line for line in lines if line.get("way") == "float64"]
    assert len(exact) == 7
    assert all(line["gradient"]["worst"] < 1e-3 for line in exact)
    assert printed("precision.out").count("| sandbox, sandbox-sst |") == 4
