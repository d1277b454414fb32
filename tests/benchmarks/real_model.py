"""G23 to G27: a real language model on real rows, against PEFT; and how soon a fit starts.

The model is a folder, ``--model`` (SmolLM2-135M-Instruct for the goals), the rows are those of
CrossFit's files under ``PROMPT_LAB_TEST_DATA``. A quick run takes a tiny Llama and random rows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from answers import check_answers, check_tokens, our_answers, peft_answers, peft_tokens
from models import (
    DECODER,
    Row,
    make_backbone,
    make_model,
    make_prompts,
    make_rows,
    make_tokenizer,
    uniform_lengths,
)
from pairs import Settings, measure, pairs_of
from steps import Result, compare, in_turn, our_side, peft_side

from prompt_lab.core.backbone import Backbone

TREC = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


def short_rows(settings: Settings) -> Iterator[Result]:
    """G23: 8 rows of glue-sst2."""
    yield from _steps("glue-sst2", {20: 3.2, 100: 5.0}, settings)


def long_rows(settings: Settings) -> Iterator[Result]:
    """G24: 8 rows of superglue-cb."""
    yield from _steps("superglue-cb", {20: 2.0, 100: 3.0}, settings)


def bank(settings: Settings) -> Iterator[Result]:
    """G25: eight steps of PEFT against one step of a bank of eight, four rows each."""
    backbone = load(settings, "float32")
    prompts = make_prompts(backbone, 8, 20)
    rows = read(backbone, "glue-sst2", 32, settings)
    groups = [rows[at : at + 4] for at in range(0, 32, 4)]
    singles = [peft_side(backbone, prompts[r : r + 1], [one]) for r, one in enumerate(groups)]
    what = f"8 PEFT steps / 1 step of a bank of 8, {backbone.name}, N 20, B 4"
    goal = settings.goal(4.0, None)
    ours = our_side(backbone, prompts, groups)
    yield compare(what, in_turn(singles), ours, goal, settings, backbone)


def answers(settings: Settings) -> Iterator[Result]:
    """G26: 64 rows of trec, six labels."""
    backbone = load(settings, "float32")
    prompts = make_prompts(backbone, 1, 20)
    inputs = [ids for ids, _ in read(backbone, "trec", 16 if settings.quick else 64, settings)]
    check_tokens(backbone, prompts[0], inputs, peft_tokens(backbone, prompts, inputs)())
    ours = our_answers(backbone, prompts, inputs, TREC)
    agreement = check_answers(backbone, prompts[0], inputs, TREC, ours())
    found = measure(peft_answers(backbone, prompts, inputs), ours, settings)
    what = f"evaluation by generating with PEFT / ours, {backbone.name}, 64 rows of trec, 6 labels"
    yield what, {**found, "threshold": settings.goal(5.0, None), "agreement": agreement}


def first_step(settings: Settings) -> Iterator[Result]:
    """G27: from start to the first step of ``fit``, over imports and ``from_pretrained`` alone."""
    with tempfile.TemporaryDirectory() as folder:
        model = settings.model
        if settings.quick:
            model = folder
            load(settings, "float32").model.save_pretrained(folder)
            make_tokenizer("llama").save_pretrained(folder)
        elif model is None:
            raise RuntimeError("give the folder of a language model by --model")
        words = f"fit --model.backbone.name {model} --data.root sandbox --run_dir {folder}/run "
        words += (
            "--data.tasks [sandbox-sst] --model.num_virtual_tokens 20 --data.max_input_length 64"
        )
        fit = [sys.executable, "-c", FIRST_STEP, *words.split()]
        bare = [sys.executable, "-c", BARE, model]
        threads = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}

        def run(command: list[str]) -> None:
            subprocess.run(command, env=threads, check=True, capture_output=True)

        def start() -> None:
            shutil.rmtree(f"{folder}/run", ignore_errors=True)
            run(fit)

        found = pairs_of(start, lambda: run(bare), 1, settings)
    what = "start to the first step of fit / imports and from_pretrained"
    yield what, {**found, "threshold": settings.goal(1.3, None), "sense": "<="}


FIRST_STEP = """
import os, sys
from prompt_lab.methods.method import PromptMethod
PromptMethod.on_train_batch_start = lambda *args: os._exit(0)
from prompt_lab.commands import fit as cli
sys.argv = ["prompt-lab", *sys.argv[1:]]
sys.exit(cli.run() or 1)
"""
BARE = """
import sys, torch, lightning, transformers
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
"""


def _steps(task: str, goals: dict[int, float], settings: Settings) -> Iterator[Result]:
    """A PEFT step against ours, in float32 and bfloat16."""
    for dtype in ("float32", "bfloat16"):
        backbone = load(settings, dtype)
        groups = [read(backbone, task, 8, settings)]
        for count, goal in goals.items():
            prompts = make_prompts(backbone, 1, count)
            what = f"PEFT step / ours, {backbone.name}, 8 rows of {task}, N {count}, {dtype}"
            sides = peft_side(backbone, prompts, groups), our_side(backbone, prompts, groups)
            yield compare(what, *sides, settings.goal(goal, None), settings, backbone)


def load(settings: Settings, dtype: str) -> Backbone:
    """The real model, or a tiny one for a quick run.

    Raises:
        RuntimeError: neither ``--model`` nor ``--quick``.
    """
    if settings.quick:
        tiny = make_model("llama", DECODER["quick"], settings.device, getattr(torch, dtype))
        return make_backbone(tiny)
    if settings.model is None:
        raise RuntimeError("give the folder of a language model by --model")
    backbone = Backbone.load(settings.model, dtype)  # type: ignore[arg-type]
    backbone.name = Path(settings.model).name
    return backbone.to(settings.device)


def read(backbone: Backbone, task: str, count: int, settings: Settings) -> list[Row]:
    """The first rows of a task's training file, as token ids.

    Raises:
        RuntimeError: no ``PROMPT_LAB_TEST_DATA``.
    """
    if settings.quick:
        return make_rows(backbone, uniform_lengths(count, 5, 20))
    root = os.environ.get("PROMPT_LAB_TEST_DATA")
    if root is None:
        raise RuntimeError("set PROMPT_LAB_TEST_DATA to a folder that holds crossfit/")
    file = next((Path(root) / "crossfit" / task).glob(f"{task}_16_13_train.tsv"))
    pairs = [line.split("\t")[:2] for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = pairs[:count]
    inputs = backbone.encode_inputs([text for text, _ in pairs])
    targets = backbone.encode_targets([answer for _, answer in pairs])
    return list(zip(inputs, targets, strict=True))
