"""One look-up of prompts: whichever command asks, the same places give the same prompts."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import HIDDEN
from torch import Tensor

from prompt_lab.__main__ import main
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.run import Run
from prompt_lab.files.peft import save_peft
from prompt_lab.files.prompts import (
    FoundPrompt,
    Prompt,
    PromptStore,
    best_found,
    find_prompts,
    save_prompt,
    source_prompts,
)
from prompt_lab.files.results import choose_by_dev
from prompt_lab.files.tensors import read_safetensors
from prompt_lab.methods.starts import InitConfig, initial_prompts

TASK, N = "emotion", 4
RUN = Run(TASK, 13, 0, 0.3, 8)
NAME = RUN.name
PLACES = {
    "file": f"files/{NAME}.safetensors",
    "store": "store",
    "fit": "fit",
    "checkpoint": "last.ckpt",
    "peft": f"peft/{NAME}",
}
"""One prompt in every kind of place."""

COMMANDS = {
    "export": "export PLACE --out out --format tensor",
    "predict": "predict PLACE --input in.txt --labels joy fear --format jsonl",
    "interpret": "interpret PLACE --out out",
    "show": "vectors show PLACE",
    "apply": "vectors apply emotion --prompts PLACE --out out",
    "apply on": "vectors apply 0*emotion --prompts store --init PLACE --out out",
    "mix": "vectors mix trec.safetensors --prompts PLACE --out out",
    "mix for": "vectors mix PLACE --prompts trec.safetensors --out out",
    "select": "select trec --prompts trec.safetensors PLACE --sources emotion --number 1",
}
REFUSALS = {
    "show": "no tuned prompt of a task in PLACE: give stores of fits",
    "apply": "no tuned prompt of a task in PLACE: give stores of fits",
    "apply on": "do not combine: backbone",
    "mix": "no source prompt of sample 13 in PLACE for any task",
    "mix for": "no source prompt of sample none in trec.safetensors for any task",
    "select": "1 of 1 source tasks have no prompt in trec.safetensors, PLACE: emotion",
}
"""What is said of a PEFT folder, which names no task, sample and weights."""


@pytest.fixture
def model(model_folder: Callable[[str], Path]) -> Backbone:
    return Backbone.load(str(model_folder("t5")))


@pytest.fixture
def prompt(model: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """The prompt, and the places that hold it, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    tensors = torch.randn(2, N, HIDDEN, generator=torch.Generator().manual_seed(0))
    digests = (model.name, model.digest, model.tokenizer_digest)
    made = Prompt(*tensors, NAME, *digests, task=TASK, sample=13, init_seed=0, dev_score=0.5)
    save_prompt(PLACES["file"], made)
    PromptStore("store").save([made])
    PromptStore("fit/prompts").save([made])
    Path("fit/results.csv").write_text("not a place of prompts")
    save_peft(PLACES["peft"], made, "SEQ_2_SEQ_LM", 2, 4)
    state = {"keeper.kept_bank": made.prompt[None], "init": made.init[None]}
    state |= {"keeper.score": torch.tensor([0.5]), "keeper.step": torch.tensor([3])}
    settings = {"backbone": {"name": model.name}, "init": {"name": "vocab"}, "label_score": "sum"}
    saved = {"state_dict": state, "hyper_parameters": settings, "template": "plain"}
    saved |= {"system": None, "runs": [asdict(RUN)], "starts": [{"start": "vocab"}]}
    saved |= {"backbone_digest": model.digest, "tokenizer_digest": model.tokenizer_digest}
    torch.save(saved, PLACES["checkpoint"])
    save_prompt("trec.safetensors", replace(made, task="trec", name="trec"))
    Path("in.txt").write_text("first text\nsecond text\n")
    return made


Done = tuple[int, str, str, list[dict[str, Tensor]]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str], Done]:
    """Run a command on a place: status, output and errors, and the tensors that it wrote."""
    monkeypatch.setattr("prompt_lab.analysis.plots.save_figure", lambda *_: [])  # takes long

    def run(words: str, place: str) -> Done:
        shutil.rmtree("out", ignore_errors=True)
        given = words.replace("PLACE", place).split()
        monkeypatch.setattr(sys, "argv", ["prompt-lab", *given])
        status, said = main(), capsys.readouterr()
        files = sorted(Path("out").glob("*.safetensors"))
        out, err = (text.replace(place, "PLACE") for text in (said.out, said.err))
        return status, out, err, [read_safetensors(file)[0] for file in files]

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_every_place_and_refuses_one_without_prompts(prompt, command, name):
    """Reference: what it says and writes of the prompt file."""
    status, expected, err, tensors = command(COMMANDS[name], PLACES["file"])
    assert (status, bool(expected)) == (0, True), err
    for place in ("store", "fit", "checkpoint"):
        status, out, err, found = command(COMMANDS[name], PLACES[place])
        assert (status, out) == (0, expected), err
        for own, other in zip(found, tensors, strict=True):
            assert own.keys() == other.keys()
            assert all(own[key].equal(other[key]) for key in own)
    status, out, err, found = command(COMMANDS[name], PLACES["peft"])
    assert status == (name in REFUSALS), err
    assert REFUSALS.get(name, "") in err
    assert err.count("\n") <= 1
    Path("empty").mkdir()
    more = "give a prompt file, a prompt store, the folder of a fit, a PEFT folder or a checkpoint"
    for place, reason in (
        ("nowhere", "no prompt file or folder PLACE"),
        ("empty", "PLACE holds no prompts"),
    ):
        status, out, err, _ = command(COMMANDS[name], place)
        assert (status, out) == (1, "")
        assert err == f"prompt-lab: {reason}: {more} (.ckpt)\n"


@pytest.mark.parametrize("place", PLACES)
def test_prompts_are_tuned_from_every_place(prompt, model, place):
    """``init.path``: of the run's task, of its source, and as sources of other methods."""
    where, other = PLACES[place], Run("glue-sst2", 13, 0, 0.3, 8, source=TASK)
    made, _ = initial_prompts(InitConfig("file", path=where), model, [RUN], {}, N)
    assert made[0].equal(prompt.prompt)
    config = InitConfig("file", path=where, source_tasks=[TASK])
    if place == "peft":
        with pytest.raises(ValueError, match=r"peft/.* has no prompt for 1 runs"):
            initial_prompts(config, model, [other], {}, N)
        with pytest.raises(FileNotFoundError, match=r"source prompts are not in peft"):
            source_prompts([where], [(TASK, 13)], model, N)
        return
    assert initial_prompts(config, model, [other], {}, N)[0][0].equal(prompt.prompt)
    assert source_prompts([where], [(TASK, 13)], model, N)[0].prompt.equal(prompt.prompt)


@pytest.mark.parametrize("place", PLACES)
def test_a_place_gives_metadata_and_checks_the_backbone(prompt, model, backbone, place):
    """PEFT does not say for which weights a prompt was made."""
    (found,) = find_prompts(PLACES[place])
    assert found.load(model).prompt.equal(prompt.prompt)
    if place == "peft":
        assert found.load(backbone("gpt2")).backbone_digest == ""
        return
    assert (found.metadata["task"], found.dev, found.stem) == (TASK, 0.5, NAME)
    with pytest.raises(ValueError, match=rf"^{found.where}: made for backbone .* 'tiny-gpt2' has"):
        found.load(backbone("gpt2"))


def test_of_several_the_best_by_dev_is_taken_and_no_score_is_the_worst():
    scores = [None, 0.5, math.nan, 0.7, 0.7]
    facts = [{"task": "a", "dev_score": score} for score in scores]
    found = [FoundPrompt(Path(str(at)), known) for at, known in enumerate(facts)]
    assert best_found(found, lambda known: known["task"]) == {"a": found[3]}
    assert best_found(found[:1], lambda known: known["task"]) == {"a": found[0]}
    assert best_found(found, lambda _: None) == {}


def test_of_equal_dev_scores_the_earlier_of_the_grid_is_taken(tmp_path):
    """B5: stores took the first file name, results the first of the grid."""
    made = [
        Prompt(torch.ones(2, 4), torch.ones(2, 4), name, "b", "d", "t", dev_score=dev, run=run)
        for name, dev, run in (("a", 0.5, 2), ("b", 0.5, 0), ("c", 0.5, 1), ("d", None, 3))
    ]
    PromptStore(tmp_path).save(made)
    (found,) = best_found(find_prompts(tmp_path), lambda known: "all").values()
    frame = pd.DataFrame({"dev": [0.5, 0.5, 0.5, None], "run": [2, 0, 1, 3], "key": 0})
    assert found.stem == "b" == ["a", "b", "c", "d"][choose_by_dev(frame, ["key"]).index[0]]
