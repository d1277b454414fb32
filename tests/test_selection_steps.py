"""``prompt-lab select evaluate --steps``: rankings by target prompts over their training."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_select_command import D, N, command, prompt, save

from prompt_lab.analysis.selection_steps import StepPrompt, find_steps, own_scores
from prompt_lab.files.prompts import Prompt
from prompt_lab.files.results import read_csv

SOURCES, TARGETS, STEPS, SEEDS = "abc", "xy", (100, 20), (0, 1)
"""Step 20 comes before step 100, though not by name."""

FIT = "runs/fit"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def drawn(*seeds: int) -> torch.Tensor:
    """A prompt (N, D) of its own seeds."""
    seed = sum(100**at * (value + 1) for at, value in enumerate(seeds))
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def step_prompt(task: str, step: int, seed: int, **facts: Any) -> Prompt:
    """A target prompt at a step, as PromptTuning saves it."""
    tensor = facts.pop("tensor", drawn(step, seed, ord(task[0])))
    given = {"name": f"{task}_13_seed{seed}", "init_seed": seed, "order_seed": 0, "steps": step}
    given |= {"start": "vocab", "dev_score": None}
    return prompt(task, tensor, 13, **(given | facts))


def fits(folder: str = FIT) -> str:
    """A fit with all target prompts at all steps; returns its folder."""
    for step in STEPS:
        save(
            *(step_prompt(task, step, seed) for task in TARGETS for seed in SEEDS),
            folder=f"{folder}/steps/{step}",
        )
    return folder


def sources() -> str:
    """A store of source prompts, with a worse one that does not count."""
    return save(
        *(prompt(task, drawn(0, 0, ord(task))) for task in SOURCES),
        prompt("a", drawn(9, 9, 9), dev_score=0.1, name="a-worse"),
    )


SCORES = {
    (source, target, seed): 60.0 + (7 * at + 3 * seed * at**2) % 11 + 2 * (target == "y")
    for at, source in enumerate(SOURCES)
    for target in TARGETS
    for seed in SEEDS
}


def table(*, labels: str = "13/{}/0") -> str:
    """A transfer table of two seeds."""
    lines = [f"{s},{t},{score},{labels.format(seed)}" for (s, t, seed), score in SCORES.items()]
    Path("t.csv").write_text("\n".join(["source,target,score,seed", *lines]))
    return "t.csv"


def cosine(target: torch.Tensor, source: str) -> float:
    """Reference: the cosine of all numbers of two prompts, by NumPy."""
    a, b = target.double().numpy().ravel(), drawn(0, 0, ord(source)).double().numpy().ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def quality(scores: list[float], likeness: list[float]) -> tuple[float, float]:
    """Reference: nDCG and Regret@1 in percent, of a ranking without ties."""
    order = np.argsort(likeness)[::-1]

    def dcg(values: np.ndarray) -> float:
        return sum((2**value - 1) / math.log2(at + 2) for at, value in enumerate(values))

    ranked = np.array(scores)[order]
    ndcg = dcg(ranked) / dcg(np.sort(scores)[::-1])
    return 100 * ndcg, 100 * (max(scores) - ranked[0]) / max(scores)


def wanted(step: int, target: str, seeds: str, own: bool = True) -> tuple[float, float]:
    """Reference: a loop over the prompts of a target at a step."""
    likeness = np.array(
        [[cosine(drawn(step, seed, ord(target)), s) for s in SOURCES] for seed in SEEDS]
    )
    scores = np.array([[SCORES[s, target, seed] for s in SOURCES] for seed in SEEDS])
    if seeds == "mean":
        return quality(scores.mean(axis=0).tolist(), likeness.mean(axis=0).tolist())
    judges = scores if own else np.stack([scores.mean(axis=0)] * len(SEEDS))
    pairs = [quality(a.tolist(), b.tolist()) for a, b in zip(judges, likeness, strict=True)]
    first, second = np.mean(pairs, axis=0)
    return float(first), float(second)


@pytest.mark.parametrize(
    ("seeds", "labels", "own"),
    [("mean", "13/{}/0", True), ("each", "13/{}/0", True), ("each", "seed {}", False)],
)
def test_the_prompts_of_every_step_are_judged(seeds, labels, own, capsys, pictures):
    words = (table(labels=labels), "--prompts", sources(), "--steps", fits(), "--seeds", seeds)
    assert command("evaluate", *words, "--out", "found") == 0
    out = capsys.readouterr().out
    rows = [row for row in read_csv(Path("found/steps_targets.csv")) if row["method"] == "cosine"]
    keys = [(int(row["step"]), row["target"]) for row in rows]
    assert keys == [(step, target) for step in (20, 100) for target in TARGETS]
    for row, (step, target) in zip(rows, keys, strict=True):
        found = float(row["nDCG"]), float(row["Regret@1"])
        assert found == pytest.approx(wanted(step, target, seeds, own))
        assert float(row["Regret@3"]) == 0
    means = {
        row["step"]: row for row in read_csv(Path("found/steps.csv")) if row["method"] == "cosine"
    }
    values = [wanted(100, target, seeds, own)[0] for target in TARGETS]
    assert float(means["100"]["nDCG"]) == pytest.approx(np.mean(values))
    assert float(means["100"]["nDCG std"]) == pytest.approx(np.std(values, ddof=1))
    (line,) = [line for line in out.splitlines() if line.startswith("nDCG ")]
    assert line.split() == ["nDCG", "20", "100"]
    start = out.splitlines().index(line)
    (shown,) = [row.split() for row in out.splitlines()[start : start + 10] if "cosine" in row]
    assert shown[-1] == f"{np.mean(values):.2f}"
    curves = [list(line.get_ydata()) for line in pictures["steps-ndcg"].axes[0].lines]
    judged = [[wanted(step, target, seeds, own)[0] for target in TARGETS] for step in (20, 100)]
    assert any(curve == pytest.approx(np.mean(judged, axis=1).tolist()) for curve in curves)
    assert "without a final prompt, so judged at saved steps alone: x, y" in out
    told = "their sample and both seeds" if own else "all seeds together"
    assert (f"4 target prompts are judged by transfer scores: 4 by those of {told}" in out) == (
        seeds == "each"
    )


def test_final_prompts_of_the_targets_are_ranked_too_where_they_are_there(capsys):
    save(*(step_prompt(task, 100, 0) for task in TARGETS), folder="final")
    words = (table(), "--prompts", sources(), "final", "--steps", fits())
    assert command("evaluate", *words) == 0
    out = capsys.readouterr().out
    assert "\ncosine" in out.partition("by step of")[0]
    assert "without a final prompt" not in out
    assert command("evaluate", *words[:3], *words[4:]) == 0
    assert "\ncosine" not in capsys.readouterr().out.partition("by step of")[0]


def test_a_source_may_be_a_target_as_well(pictures):
    """Its saved prompt ranks; its best prompt is what others are compared with."""
    Path("t.csv").write_text("source,x,a\na,70,\nb,75,60\nc,60,70\n")
    store = sources()
    both = {"x": drawn(5, 0, 0), "a": drawn(6, 0, 0)}
    save(*(step_prompt(task, 5, 0, tensor=own) for task, own in both.items()), folder="f/steps/5")
    assert command("evaluate", "t.csv", "--prompts", store, "--steps", "f", "--out", "o") == 0
    rows = {
        row["target"]: row
        for row in read_csv(Path("o/steps_targets.csv"))
        if row["method"] == "cosine"
    }
    scores = {"x": {"a": 70, "b": 75, "c": 60}, "a": {"b": 60, "c": 70}}
    for target, of_source in scores.items():
        likeness = [cosine(both[target], source) for source in of_source]
        assert float(rows[target]["nDCG"]) == pytest.approx(
            quality(list(map(float, of_source.values())), likeness)[0]
        )


def test_of_a_grid_the_run_with_the_best_dev_score_at_any_step_counts_at_all():
    for step, devs in ((1, (0.4, 0.9)), (2, (0.8, 0.3)), (3, (math.nan, None))):
        made = [
            step_prompt("x", step, 0, name=f"x_{rate}", learning_rate=rate, dev_score=dev)
            for rate, dev in zip((0.1, 0.3), devs, strict=True)
        ]
        save(*made, folder=f"f/steps/{step}")
    steps, notes = find_steps(["f"], ["x"])
    assert [[own.found.stem for own in steps[step]] for step in (1, 2, 3)] == [["x_0.3"]] * 3
    assert notes == []


def test_transfers_and_other_tasks_are_left_out_and_missing_runs_are_told():
    folder = fits()
    save(step_prompt("z", 20, 0), folder=f"{folder}/steps/20")
    save(
        step_prompt("x", 20, 0, name="x_from_a", start="prompt", start_of="a"),
        folder=f"{folder}/steps/20",
    )
    Path(folder, "steps", "100", "x_13_seed1.safetensors").unlink()
    steps, notes = find_steps([folder, f"./{folder}"], list(TARGETS))
    assert {step: len(own) for step, own in steps.items()} == {20: 4, 100: 3}
    assert notes == [
        "left out, 2 saved prompts of other tasks or other starts",
        "not all of 4 target prompts were saved: 3 at step 100",
    ]


def test_several_fits_share_the_targets_and_seeds():
    for at, task in enumerate(TARGETS):
        save(step_prompt(task, 5, 0, order_seed=at), folder=f"fit-{task}/steps/5")
    steps, _ = find_steps(["fit-x", "fit-y"], list(TARGETS))
    assert [(own.task, own.order_seed) for own in steps[5]] == [("x", 0), ("y", 1)]


def test_scores_are_those_of_the_closest_seeds():
    found = StepPrompt(Path("p"), "x", 13, 1, 2, 0.0)

    def scores(*labels: str) -> tuple[list[float], int]:
        own = {label: float(at) for at, label in enumerate(labels)}
        return own_scores({"a": own, "b": {label: 10 + at for label, at in own.items()}}, found)

    assert scores("13/1/2", "13/0/2", "21/1/2") == ([0, 10], 0)
    assert scores("13/0/2", "13/3/2", "13/1/9") == ([0.5, 10.5], 1)
    assert scores("13/0/0", "13/1/1", "21/1/2") == ([0.5, 10.5], 2)
    assert scores("21/1/2", "", "1", "13") == ([1.5, 11.5], 3)
    uneven = {"a": {"13/1/2": 1.0, "13/0/2": 3.0}, "b": {"13/0/2": 5.0}}
    assert own_scores(uneven, found) == ([2, 5], 1)  # every source needs one


def drop(step: int, task: str) -> None:
    """Remove the prompts of a task from a step of the fit."""
    for path in Path(FIT, "steps", str(step)).glob(f"{task}_*"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda: shutil.rmtree(FIT), "no folder runs/fit: give folders of fits of the target"),
        (
            lambda: shutil.rmtree(f"{FIT}/steps"),
            "no saved steps in runs/fit: give folders of fits of the target tasks with model.save",
        ),
        (
            lambda: [shutil.rmtree(path) for path in Path(FIT, "steps").iterdir()],
            "runs/fit/steps holds no saved step: fit the target tasks with model.save_steps",
        ),
        (
            lambda: drop(100, "y"),
            "not every saved step has all target tasks: step 100 lacks y; save the same steps",
        ),
        (
            lambda: [drop(step, "x") for step in STEPS],
            "1 of 2 target tasks have no saved step in runs/fit: x; fit them with model.save_steps",
        ),
        (
            lambda: save(
                step_prompt("x", 20, 0, tensor=torch.ones(N + 1, D)), folder=f"{FIT}/steps/20"
            ),
            "runs/fit/steps/20/x_13_seed0.safetensors is 4 x 24, but",
        ),
        (
            lambda: Path(FIT, "steps/20/x_13_seed0.safetensors").write_text("junk"),
            "runs/fit/steps/20/x_13_seed0.safetensors: damaged or not a safetensors file",
        ),
        (
            lambda: shutil.rmtree("store"),
            "no prompt file or folder store: give",
        ),
        (
            lambda: Path("store/c-13.safetensors").unlink(),
            "1 of 3 source tasks have no prompt in store: c; tune them first",
        ),
    ],
)
def test_what_steps_lack_is_one_sentence(spoil, sentence, capsys):
    fits()
    sources()
    spoil()
    assert command("evaluate", table(), "--prompts", "store", "--steps", FIT) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"prompt-lab: {sentence}")
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_many_steps_are_shown_in_part(capsys):
    for step in range(1, 31):
        save(*(step_prompt(task, step, 0) for task in TARGETS), folder=f"f/steps/{step}")
    assert command("evaluate", table(), "--prompts", sources(), "--steps", "f") == 0
    out = capsys.readouterr().out
    assert "by step of the target prompts (10 of 30); percent" in out
    (line,) = [line for line in out.splitlines() if line.startswith("nDCG ")]
    shown = list(map(int, line.split()[1:]))
    assert (len(shown), shown[0], shown[-1]) == (10, 1, 30)
    assert shown == sorted(set(shown))
