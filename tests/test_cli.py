"""The real command line: settings, files, errors, and what a run leaves behind.

Most commands run in this process through ``cli.run``, the function behind ``prompt-lab``; what
depends on a fresh process (help without torch, ``python -m``, test from files) has one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prompt_lab import cli
from prompt_lab.callbacks import flag_names
from prompt_lab.prompt_file import PromptStore, load_prompt
from prompt_lab.results import read_csv

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))
TUNING = sorted((CONFIGS / "prompt_tuning").glob("*.yaml"))
RUN_VARIABLES = (cli.RUN_DIR_VARIABLE, "WANDB_RUN_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")

Command = Callable[..., int]


class ParseOnly(cli.PromptLabCLI):
    """Parses, and stops before anything is made."""

    def before_instantiate_classes(self):
        pass

    def instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, without variables that name a run, as from a shell."""
    monkeypatch.chdir(tmp_path)
    for name in RUN_VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a command sets is taken back
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny(model_folder: Callable[[str], Path], fewshot_root: Path) -> dict[str, Any]:
    """Settings of a small fit: one GPT-2 prompt, two steps, an evaluation after each."""
    return {
        "model": {
            "class_path": "PromptTuning",
            "init_args": {
                "backbone": {"name": str(model_folder("gpt2"))},
                "num_virtual_tokens": 4,
                "learning_rate": 0.05,
                "batch_size": 4,
            },
        },
        "data": {"root": str(fewshot_root), "tasks": ["glue-sst2"], "samples": [13]},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "val_check_interval": 1,
            "logger": False,
        },
    }


@pytest.fixture(scope="session")
def tiny_file(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The settings as a YAML file."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return str(path)


@pytest.fixture
def fit(tiny_file: str) -> Command:
    """Function that runs ``fit`` on the small settings with more words."""
    return lambda *words: cli.run(["fit", "-c", tiny_file, *words])


def shell(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m prompt_lab`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "prompt_lab", *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def only_prompt(folder: Path) -> torch.Tensor:
    (path,) = (folder / "prompts").glob("*.safetensors")
    return load_prompt(path).prompt
