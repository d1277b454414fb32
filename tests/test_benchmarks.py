"""The benchmarks run: tiny models, a few pairs; what they measure here means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "benchmarks"
GOALS = {
    f"G{number}" for number in (1, 2, 3, 4, 5, 7, 8, 12, 13, 14, 17, 18, 19)
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
