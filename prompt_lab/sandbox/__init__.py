"""The embedded sandbox: a tiny pretrained T5 and small tasks, for runs without any download.

`ASSETS` is an ordinary Hugging Face folder, `rows` makes the data of a task. It says nothing about
real models or real text.
"""

from __future__ import annotations

from pathlib import Path

from prompt_lab.sandbox.tasks import SPLIT_ROWS, TASKS, SandboxTask, rows

ASSETS: Path = Path(__file__).parent / "assets"
SANDBOX = "sandbox"
"""Reserved name of the backbone and of the data root that ship with the package."""

__all__ = ["ASSETS", "SANDBOX", "SPLIT_ROWS", "TASKS", "SandboxTask", "rows"]
