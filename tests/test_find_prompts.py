"""One look-up of prompts: whoever asks, the same places give the same prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import HIDDEN
from torch import Tensor

from prompt_lab.analysis.interpretation import find_tuned
from prompt_lab.analysis.select_command import check_prompts, load_banks
from prompt_lab.commands import offline
from prompt_lab.commands.mix_command import mix_prompts
from prompt_lab.commands.prompts import export_prompts
from prompt_lab.commands.vectors_command import apply_vectors
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.run import Run
from prompt_lab.files.peft import read_prompt, save_peft
from prompt_lab.files.prompts import (
    FoundPrompt,
    Prompt,
    PromptStore,
    best_found,
    find_prompts,
    load_prompt,
    save_prompt,
)
from prompt_lab.files.results import choose_by_dev
from prompt_lab.methods.initial_prompts import InitConfig, initial_prompts
from prompt_lab.methods.source_prompts import best_prompts, source_prompts
from prompt_lab.methods.task_vectors import find_vectors, load_source

TASK, N = "emotion", 4
RUN = Run(TASK, 13, 0, 0.3, 8)
PLACES = ("p.safetensors", "store", "fit", "peft", "last.ckpt")
"""One prompt in every kind of place."""


@pytest.fixture
def model(model_folder: Callable[[str], Path]) -> Backbone:
    return Backbone.load(str(model_folder("t5")))


@pytest.fixture
def prompt(model: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """The prompt, and the places that hold it, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    tensors = torch.randn(2, N, HIDDEN, generator=torch.Generator().manual_seed(0))
    digests = (model.name, model.digest, model.tokenizer_digest)
    made = Prompt(*tensors, RUN.name, *digests, task=TASK, sample=13, init_seed=0, dev_score=0.5)
    save_prompt("p.safetensors", made)
    PromptStore("store").save([made])
    PromptStore("fit/prompts").save([made])
    Path("fit/results.csv").write_text("not a place of prompts")
    save_peft("peft", made, "SEQ_2_SEQ_LM", 2, 4)
    saved = {
        "state_dict": {
            "best": made.prompt[None],
            "init": made.init[None],
            "best_score": torch.tensor([0.5]),
            "best_step": torch.tensor([3]),
        },
        "hyper_parameters": {"backbone": {"name": model.name}, "init": {"name": "vocab"}},
        "runs": [asdict(RUN)],
        "starts": [{"start": "vocab"}],
        "backbone_digest": model.digest,
        "tokenizer_digest": model.tokenizer_digest,
    }
    torch.save(saved, "last.ckpt")
    return made


def exported(place: str, _: Backbone) -> Tensor:
    (path,) = export_prompts(place, "out", format="tensor")
    return read_prompt(path).prompt


def init_path(place: str, model: Backbone) -> Tensor:
    return initial_prompts(InitConfig("file", path=place), model, [RUN], {}, N)[0][0]


def transfer(place: str, model: Backbone) -> Tensor:
    config = InitConfig("file", path=place, source_tasks=[TASK])
    run = Run("glue-sst2", 13, 0, 0.3, 8, source=TASK)
    return initial_prompts(config, model, [run], {}, N)[0][0]


def of_attempt(place: str, model: Backbone) -> Tensor:
    return source_prompts([place], [(TASK, 13)], model, N)[0].prompt


def vectors(place: str, _: Backbone) -> Tensor:
    return load_source(find_vectors([place])[13, 0][TASK]).prompt.prompt


def selected(place: str, _: Backbone) -> Tensor:
    files = best_prompts([place])
    check_prompts("feature", [TASK], [TASK], files, [place])
    return load_banks(files, [TASK], [TASK]).targets[0]


def mixed(place: str, _: Backbone) -> Tensor:
    other = replace(load_prompt("p.safetensors"), task="trec", name="trec")
    save_prompt("trec.safetensors", other)
    (path,) = mix_prompts("trec.safetensors", prompts=[place], out="out")
    return load_prompt(path).prompt


def interpreted(place: str, _: Backbone) -> Tensor:
    (one,) = find_tuned([place])["tuned"]
    return one.prompt


CALLERS: list[Callable[[str, Backbone], Tensor]] = [exported, init_path, interpreted]
BY_TASK = [transfer, of_attempt, vectors, selected, mixed]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("caller", [*CALLERS, *BY_TASK], ids=lambda caller: caller.__name__)
def test_every_caller_takes_every_place(
    prompt: Prompt, model: Backbone, caller: Callable[[str, Backbone], Tensor], place: str
) -> None:
    if place == "peft" and caller in BY_TASK:
        with pytest.raises((ValueError, FileNotFoundError), match=r"no.* peft|peft has no"):
            caller(place, model)
        return
    torch.testing.assert_close(caller(place, model), prompt.prompt, rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", [place for place in PLACES if place != "peft"])
def test_vectors_are_applied_to_the_initial_prompt_of_every_place(
    prompt: Prompt, place: str
) -> None:
    """But PEFT's, which keeps none, nor the weights that a prompt is for."""
    (path,) = apply_vectors("0 * emotion", prompts=["store"], out="out", init=place)
    assert load_prompt(path).prompt.equal(prompt.init)
    with pytest.raises(ValueError, match="do not combine: backbone"):
        apply_vectors("0 * emotion", prompts=["store"], out="other", init="peft")


@pytest.mark.parametrize("place", PLACES)
def test_predict_answers_from_every_place_as_from_the_file(
    prompt: Prompt, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in.txt").write_text("first text\nsecond text\n")
    more = ["--input=in.txt", "--labels", "joy", "fear", "--format=jsonl"]
    said = []
    for given in ("p.safetensors", place):
        assert offline.run(["predict", given, *more]) == 0
        said.append(capsys.readouterr().out.replace('"peft"', f'"{RUN.name}"'))
    assert said[0] == said[1]
    assert said[0].count("\n") == 2


@pytest.mark.parametrize("caller", [*CALLERS, *BY_TASK], ids=lambda caller: caller.__name__)
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("nowhere", "^no prompt file or folder nowhere: give a prompt file, a prompt store, the"),
        ("empty", "^empty holds no prompts: give a prompt file, a prompt store, the folder of a"),
    ],
)
def test_a_place_without_prompts_is_one_sentence(
    prompt: Prompt, model: Backbone, caller: Callable[..., Any], place: str, reason: str
) -> None:
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError, match=reason):
        caller(place, model)


@pytest.mark.parametrize("place", PLACES)
def test_a_place_gives_metadata_and_checks_the_backbone(
    prompt: Prompt, model: Backbone, backbone: Callable[[str], Backbone], place: str
) -> None:
    """PEFT does not say for which weights a prompt was made."""
    (found,) = find_prompts(place)
    assert found.load(model).prompt.equal(prompt.prompt)
    if place == "peft":
        assert found.load(backbone("gpt2")).backbone_digest == ""
        return
    assert (found.metadata["task"], found.dev, found.stem) == (
        *(TASK, 0.5),
        "p" if place == "p.safetensors" else RUN.name,
    )
    with pytest.raises(ValueError, match=rf"^{found.where}: made for backbone .* 'tiny-gpt2' has"):
        found.load(backbone("gpt2"))


def test_of_several_the_best_by_dev_is_taken_and_of_equal_ones_the_first() -> None:
    scores = [None, 0.5, math.nan, 0.7, 0.7]
    found = [
        FoundPrompt(Path(str(at)), {"task": "a", "dev_score": score})
        for at, score in enumerate(scores)
    ]
    assert best_found(found, lambda known: known["task"]) == {"a": found[3]}
    assert best_found(found[:1], lambda known: known["task"]) == {"a": found[0]}
    assert best_found(found, lambda _: None) == {}


def test_of_equal_dev_scores_the_earlier_of_the_grid_is_taken(tmp_path: Path) -> None:
    """B5: stores took the first file name, results the first of the grid."""
    made = [
        Prompt(torch.ones(2, 4), torch.ones(2, 4), name, "b", "d", "t", dev_score=dev, run=run)
        for name, dev, run in (("a", 0.5, 2), ("b", 0.5, 0), ("c", 0.5, 1), ("d", None, 3))
    ]
    PromptStore(tmp_path).save(made)
    (found,) = best_found(find_prompts(tmp_path), lambda known: "all").values()
    frame = pd.DataFrame({"dev": [0.5, 0.5, 0.5, None], "run": [2, 0, 1, 3], "key": 0})
    assert found.stem == "b" == ["a", "b", "c", "d"][choose_by_dev(frame, ["key"]).index[0]]
