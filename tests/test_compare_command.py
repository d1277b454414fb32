"""``vectors compare``: cosines between tasks and initial prompts, norms, against NumPy."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from prompt_lab.commands import offline
from prompt_lab.commands.compare_command import compare_prompts, compare_vectors
from prompt_lab.files.prompts import FoundPrompt, Prompt, PromptStore
from prompt_lab.files.results import read_csv

N, D = 4, 6
TASKS = ("mnli", "qnli", "trec")


def draw(*seeds: int) -> Tensor:
    """A prompt (N, D) of normal numbers."""
    return torch.from_numpy(np.random.default_rng(seeds).normal(size=(N, D))).float()


def tuned(task: str, seed: int, sample: int | None = 13, **changes: Any) -> Prompt:
    """A prompt of a task that begins at the init of its seed."""
    init = draw(99, seed)
    made = Prompt(
        prompt=init + 2 * draw(TASKS.index(task), seed, sample or 0),
        init=init,
        name=f"{task}_{sample}_seed{seed}",
        backbone="someone/some-model",
        backbone_digest="0123456789abcdef",
        tokenizer_digest="fedcba",
        task=task,
        sample=sample,
        init_seed=seed,
        dev_score=0.5,
    )
    return replace(made, **changes)


def everything(seeds: int = 3) -> list[Prompt]:
    """Prompts of all tasks and some seeds."""
    return [tuned(task, seed) for seed in range(seeds) for task in TASKS]


def sources(*prompts: Prompt) -> list[FoundPrompt]:
    """Prompts as they come from files."""
    return [
        FoundPrompt(Path(f"{prompt.name}.safetensors"), prompt.metadata(), prompt)
        for prompt in prompts
    ]


def numbers(prompt: Prompt, what: str) -> NDArray[np.float64]:
    """A prompt or its vector as one row of NumPy."""
    flat = prompt.prompt.numpy().astype(np.float64).ravel()
    return flat if what == "prompts" else flat - prompt.init.numpy().astype(np.float64).ravel()


def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Reference: the cosine of two rows."""
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("what", ["prompts", "vectors"])
@pytest.mark.parametrize("which", ["different", "equal"])
def test_entries_are_means_over_pairs_as_in_a_plain_loop(what, which):
    prompts = everything()
    found = compare_prompts({13: sources(*prompts)}).cosines[what, which]
    for task in TASKS:
        for other in TASKS:
            values = [
                cosine(numbers(a, what), numbers(b, what))
                for a, b in combinations(prompts, 2)
                if {a.task, b.task} == {task, other}
                and (a.init_seed == b.init_seed) == (which == "equal")
            ]
            if not values:
                assert (task, other) not in found
                continue
            assert found[task, other].mean == pytest.approx(np.mean(values), rel=1e-9)
            assert found[task, other].std == pytest.approx(np.std(values, ddof=1), rel=1e-9)
            assert found[task, other].count == len(values)


def test_no_prompt_is_compared_with_itself_and_pairs_are_counted_once():
    found = compare_prompts({13: sources(*everything(4))})
    assert {one.count for one in found.cosines["prompts", "equal"].values()} == {4}
    different = found.cosines["prompts", "different"]
    assert different["mnli", "mnli"].count == 6
    assert different["mnli", "qnli"].count == 12
    assert different["mnli", "mnli"].mean < 0.99


def test_prompts_of_prompts_and_vectors_of_vectors_between_tasks():
    """The code of the paper has the same numbers in both figures between tasks."""
    found = compare_prompts({13: sources(*everything())}).cosines
    for pair in combinations(TASKS, 2):
        one, other = (found[what, "different"][pair].mean for what in ("prompts", "vectors"))
        assert one != pytest.approx(other, abs=1e-6)


def test_equal_initial_prompts_are_told_by_their_numbers_not_by_their_seeds():
    init = draw(99, 0)
    prompts = [tuned("mnli", 0), replace(tuned("mnli", 1), init=init), tuned("mnli", 2)]
    found = compare_prompts({13: sources(*prompts)})
    assert found.cosines["prompts", "equal"]["mnli", "mnli"].count == 1
    assert found.cosines["prompts", "different"]["mnli", "mnli"].count == 2
    assert found.initial.count == 1
    assert found.initial.mean == pytest.approx(
        cosine(*(x.double().numpy().ravel() for x in (init, draw(99, 2)))), rel=1e-9
    )


def test_samples_are_not_mixed():
    one, other = (sources(*(tuned("mnli", seed, k) for seed in (0, 1))) for k in (13, 42))
    found = compare_prompts({13: one, 42: other})
    assert found.cosines["vectors", "different"]["mnli", "mnli"].count == 2
    assert not found.cosines["vectors", "equal"]


def test_norms_are_those_of_numpy():
    prompts = everything()
    vector, init, ratio = compare_prompts({13: sources(*prompts)}).norms["qnli"]
    own = [prompt for prompt in prompts if prompt.task == "qnli"]
    vectors = np.array([np.linalg.norm(numbers(prompt, "vectors")) for prompt in own])
    inits = np.array([np.linalg.norm(prompt.init.double().numpy()) for prompt in own])
    assert vector.mean == pytest.approx(vectors.mean(), rel=1e-12)
    assert init.std == pytest.approx(inits.std(ddof=1), rel=1e-9)
    assert ratio.mean == pytest.approx((vectors / inits).mean(), rel=1e-12)


def test_a_vector_of_zeros_is_named_and_left_out(capsys):
    bare = tuned("mnli", 0, prompt=draw(99, 0))
    found = compare_prompts({13: sources(bare, *everything()[1:])})
    said = capsys.readouterr().err
    assert "vectors left out, as they are zero: mnli_13_seed0.safetensors" in said
    assert "prompts left out" not in said
    assert found.cosines["vectors", "different"]["mnli", "mnli"].count == 1
    assert found.cosines["prompts", "different"]["mnli", "mnli"].count == 3


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A prompt store of all tasks and three seeds."""
    PromptStore(tmp_path / "store").save(everything())
    return str(tmp_path / "store")


def test_the_command_writes_tables_and_heat_maps(store, tmp_path, capsys):
    out = tmp_path / "out"
    assert offline.run(["vectors", "compare", store, "--out", str(out)]) == 0
    names = [f"{a}-{b}" for a in ("prompts", "vectors") for b in ("different", "equal")]
    expected = {"similarities.csv", "norms.csv"} | {
        f"{n}.{k}" for n in names for k in ("png", "svg")
    }
    assert {path.name for path in out.iterdir()} == expected
    said = capsys.readouterr().out
    assert "cosines of vectors, different initial prompts" in said
    rows = read_csv(out / "similarities.csv")
    found = compare_prompts({13: sources(*everything())})
    (row,) = [
        x
        for x in rows
        if (x["what"], x["initial_prompts"], x["task"], x["other"])
        == ("vectors", "equal", "mnli", "trec")
    ]
    assert float(row["mean"]) == found.cosines["vectors", "equal"]["mnli", "trec"].mean
    assert row["pairs"] == "3"
    assert rows[-1]["what"] == "init"
    assert [row["task"] for row in read_csv(out / "norms.csv")] == list(TASKS)


def test_kinds_without_pairs_are_not_drawn(tmp_path):
    PromptStore(tmp_path / "store").save([tuned("mnli", 0), tuned("qnli", 0)])
    files = compare_vectors([str(tmp_path / "store")], out=str(tmp_path / "out"))
    assert {path.stem for path in files if path.suffix == ".svg"} == {
        "prompts-equal",
        "vectors-equal",
    }


def test_one_prompt_of_a_sample_is_refused(tmp_path):
    PromptStore(tmp_path / "store").save([tuned("mnli", 0), tuned("mnli", 0, 42)])
    with pytest.raises(ValueError, match="only one tuned prompt of each sample"):
        compare_vectors([str(tmp_path / "store")], out=str(tmp_path / "out"))


def test_prompts_of_two_backbones_are_refused(tmp_path):
    other = tuned("qnli", 0, backbone_digest="another")
    PromptStore(tmp_path / "store").save([tuned("mnli", 0), other])
    with pytest.raises(ValueError, match="do not combine"):
        compare_vectors([str(tmp_path / "store")], out=str(tmp_path / "out"))


def test_a_file_as_out_and_a_missing_store_are_refused(store, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file: name a folder"):
        compare_vectors([store], out=str(tmp_path / "file"))
    assert offline.run(["vectors", "compare", "nowhere", "--out", str(tmp_path / "o")]) == 1
    assert "no prompt file or folder nowhere" in capsys.readouterr().err
