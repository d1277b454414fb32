"""``vectors compare``: cosines between tasks and initial prompts, norms, against NumPy."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from prompt_lab.__main__ import main
from prompt_lab.analysis.vectors import cosine_sections, norm_table
from prompt_lab.files.prompts import FoundPrompt, Prompt, PromptStore

N, D = 4, 6
TASKS = ("mnli", "qnli", "trec")


def draw(*seeds: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seeds).normal(size=(N, D))).float()


def tuned(task: str, seed: int, sample: int | None = 13, **changes: Any) -> Prompt:
    """A prompt of a task that begins at the init of its seed."""
    init = draw(99, seed)
    prompt = init + 2 * draw(TASKS.index(task), seed, sample or 0)
    name = f"{task}_{sample}_seed{seed}"
    made = Prompt(prompt, init, name, "someone/some-model", "0123456789abcdef", "fedcba", task)
    return replace(made, sample=sample, init_seed=seed, dev_score=0.5, **changes)


def everything(seeds: int = 3) -> list[Prompt]:
    return [tuned(task, seed) for seed in range(seeds) for task in TASKS]


def sources(*prompts: Prompt) -> list[FoundPrompt]:
    """Prompts as they come from files."""
    return [
        FoundPrompt(Path(f"{prompt.name}.safetensors"), prompt.metadata(), prompt)
        for prompt in prompts
    ]


def flat(prompt: Prompt, what: str) -> NDArray[np.float64]:
    """A prompt or its vector as one row of NumPy."""
    tuned, init = (x.numpy().astype(float).ravel() for x in (prompt.prompt, prompt.init))
    return tuned if what == "prompts" else tuned - init


def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("what", ["prompts", "vectors"])
@pytest.mark.parametrize("same", [True, False])
def test_entries_are_means_over_pairs_as_in_a_plain_loop(what, same):
    """No prompt is paired with itself, and each pair counts once."""
    prompts = everything(4)
    (section, _) = cosine_sections({13: sources(*prompts)})
    table = section.table[(section.table["what"] == what) & (section.table["same_init"] == same)]
    table = table.set_index(["task", "other"])
    for task, other in [*combinations(TASKS, 2), *zip(TASKS, TASKS, strict=True)]:
        values = [
            cosine(flat(a, what), flat(b, what))
            for a, b in combinations(prompts, 2)
            if {a.task, b.task} == {task, other} and (a.init_seed == b.init_seed) == same
        ]
        assert ((task, other) in table.index) == bool(values)
        if values:
            row = table.loc[(task, other)]
            assert row["mean"] == pytest.approx(np.mean(values), rel=1e-9)
            assert row["std"] == pytest.approx(np.std(values, ddof=1), rel=1e-9)
            assert row["pairs"] == len(values)


def test_norms_are_those_of_numpy():
    prompts = everything()
    row = norm_table({13: sources(*prompts)}).set_index("task").loc["qnli"]
    own = [prompt for prompt in prompts if prompt.task == "qnli"]
    vectors = np.array([np.linalg.norm(flat(prompt, "vectors")) for prompt in own])
    inits = np.array([np.linalg.norm(prompt.init.double().numpy()) for prompt in own])
    assert row["prompts"] == 3
    assert row["vector"] == pytest.approx(vectors.mean(), rel=1e-12)
    assert row["init_std"] == pytest.approx(inits.std(ddof=1), rel=1e-9)
    assert row["ratio"] == pytest.approx((vectors / inits).mean(), rel=1e-12)


def test_a_vector_of_zeros_is_named_and_left_out():
    bare = tuned("mnli", 0, prompt=draw(99, 0))
    section, _ = cosine_sections({13: sources(bare, *everything()[1:])})
    assert "zero: vector of mnli_13_seed0.safetensors." in section.legend
    pairs = section.table.set_index(["what", "same_init", "task", "other"])["pairs"]
    assert pairs["vectors", False, "mnli", "mnli"] == 1
    assert pairs["prompts", False, "mnli", "mnli"] == 3


def test_the_command_writes_a_report_with_tables_and_heat_maps(tmp_path, capsys):
    PromptStore(tmp_path / "store").save(everything())
    out = tmp_path / "out"
    assert main(["vectors", "compare", str(tmp_path / "store"), "--out", str(out)]) == 0
    stems = [f"{a}-{b}" for a in ("prompts", "vectors") for b in ("different", "equal")]
    expected = {"report.md", "report.html", "similarities.csv", "norms.csv"}
    assert {x.name for x in out.iterdir()} == expected | {
        f"{x}.{k}" for x in stems for k in ("png", "svg")
    }
    rows = pd.read_csv(out / "similarities.csv").set_index(["what", "same_init", "task", "other"])
    row = rows.loc[("vectors", True, "mnli", "trec")]
    assert row["pairs"] == 3
    printed = capsys.readouterr().out
    assert f"{row['mean']:.3f} ± {row['std']:.3f} (3)" in printed
    (between,) = rows.loc["init", "mean"]
    assert f"Different initial prompts themselves: {between:.3f}" in printed


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (tuned("mnli", 0, 42), "only one tuned prompt of each sample"),
        (tuned("qnli", 0, backbone_digest="another"), "do not combine: backbone"),
        (tuned("qnli", 0, prompt=draw(1)[:2], init=draw(2)[:2]), "do not combine: shape"),
    ],
)
def test_prompts_that_cannot_be_compared_are_refused_in_a_sentence(other, said, tmp_path, capsys):
    PromptStore(tmp_path / "store").save([tuned("mnli", 0), other])
    words = [str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    assert main(["vectors", "compare", *words]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
