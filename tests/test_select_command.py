"""``prompt-lab select``: what it ranks, tells, writes and refuses."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_cli import CONFIGS, ParseOnly

from prompt_lab.analysis import select_command
from prompt_lab.analysis.select_command import (
    Likeness,
    choose_sources,
    mean_over_targets,
    rank_sources,
)
from prompt_lab.commands import offline
from prompt_lab.core import similarity
from prompt_lab.core.similarity import prompt_subspace, subspace_similarity
from prompt_lab.data.partitions import partition
from prompt_lab.files.prompts import Prompt, PromptStore

N, D = 3, 24
SOURCES = ["near", "half", "far"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(*places: int, seed: int = 0) -> torch.Tensor:
    """A prompt (N, D) that spans the axes of those places."""
    mixed = torch.randn(N, N, generator=torch.Generator().manual_seed(seed))
    return mixed @ torch.eye(D)[list(places)]


def prompt(task: str, tensor: torch.Tensor, sample: int | None = 13, **facts: Any) -> Prompt:
    given = {"backbone": "tiny", "backbone_digest": "a" * 64, "tokenizer_digest": "b", **facts}
    given = {"name": f"{task}-{sample}", "dev_score": 0.5, **given}
    return Prompt(prompt=tensor, init=tensor, task=task, sample=sample, **given)


def save(*prompts: Prompt, folder: str = "store") -> str:
    PromptStore(folder).save(prompts)
    return folder


@pytest.fixture
def store() -> str:
    """A target and three sources that share 3, 2 and 0 of its 3 directions."""
    return save(
        prompt("aim", rows(0, 1, 2)),
        prompt("near", rows(2, 1, 0, seed=1)),
        prompt("half", rows(0, 1, 5, seed=2)),
        prompt("far", rows(6, 7, 8, seed=3)),
    )


def command(*words: str) -> int:
    """Exit status of ``prompt-lab select``."""
    return offline.run(["select", *words])


# ---- the command ---------------------------------------------------------------------------------


def test_sources_are_ranked_and_the_chosen_ones_are_told(store, capsys):
    words = ("aim", "--prompts", store, "--energy", "1", "--number", "2")
    assert command(*words) == 0
    out = capsys.readouterr().out
    chance = math.sqrt(3 / D)
    assert out.splitlines() == [
        "similarity of prompt subspaces, 0 to 1: 3 of 24 dimensions; between random subspaces of "
        f"these sizes about {chance:.3f}",
        "",
        "aim",
        "rank  source  similarity  samples",
        "1     near    1.000       1",
        f"2     half    {math.sqrt(2 / 3):.3f}       1",
        "3     far     0.000       1",
        "",
        "2 of 3 source tasks, highest, for aim",
        "  near: rank 1, similarity 1.000",
        "  half: rank 2, similarity 0.816",
        "--data.tasks '[near, half]'",
    ]
    assert command(*words, "--choose", "lowest") == 0
    assert capsys.readouterr().out.endswith("--data.tasks '[far, half]'\n")


def test_the_written_file_is_a_further_config_of_a_fit(store, capsys):
    """Reference: what LightningCLI makes of it, and of the printed flag."""
    config = str(CONFIGS / "quickstart.yaml")
    assert command("aim", "--prompts", store, "--number", "3", "--out", "new/chosen.yaml") == 0
    *_, flag, path = capsys.readouterr().out.splitlines()
    assert path == "new/chosen.yaml"
    parsed = ParseOnly(["fit", "--config", config, "--config", path]).config.fit
    assert parsed.data.tasks == SOURCES
    assert parsed.data.root == "sandbox"  # the rest is of the first
    name, value = flag.split(" ", 1)
    parsed = ParseOnly(["fit", "--config", config, f"{name}={value[1:-1]}"]).config.fit
    assert parsed.data.tasks == SOURCES
    text = Path(path).read_text()
    assert text.startswith("# 3 of 3 source tasks, highest, for aim\n")
    assert yaml.safe_load(text) == {"data": {"tasks": SOURCES}}


def test_several_targets_have_their_tables_and_the_mean_of_them_chooses(store, capsys):
    save(prompt("goal", rows(6, 7, 0)))
    assert command("aim", "goal", "--prompts", store, "--energy", "1", "--number", "1") == 0
    out = capsys.readouterr().out
    assert out.index("\naim\n") < out.index("\ngoal\n") < out.index("\nmean over 2 targets\n")
    table = out[out.index("mean over") :].splitlines()[1:5]
    shares = {"near": (1, 1 / 3), "half": (2 / 3, 1 / 3), "far": (0, 2 / 3)}
    wanted = {task: np.sqrt(both) for task, both in shares.items()}
    assert [line.split()[1:] for line in table] == [
        ["source", "similarity", "targets"],
        *(
            [task, f"{values.mean():.3f}", "±", f"{values.std(ddof=1):.3f}", "2"]
            for task, values in wanted.items()
        ),
    ]
    assert out.endswith("--data.tasks '[near]'\n")


def test_random_sources_come_with_their_similarities_and_depend_on_the_seed_alone(store, capsys):
    words = ("aim", "--prompts", store, "--energy", "1", "--number", "2", "--choose", "random")
    drawn = set()
    for seed in map(str, range(8)):
        assert command(*words, "--seed", seed) == 0
        out = capsys.readouterr().out
        assert f"2 of 3 source tasks, random with seed {seed}, for aim\n" in out
        assert command(*words, "--seed", seed, "--sources", *SOURCES[::-1]) == 0
        assert capsys.readouterr().out == out
        drawn.add(out.splitlines()[-1])
        for line in out.splitlines()[-3:-1]:
            assert line in (
                "  near: rank 1, similarity 1.000",
                "  half: rank 2, similarity 0.816",
                "  far: rank 3, similarity 0.000",
            )
    assert len(drawn) > 1


def test_the_best_prompt_of_a_task_and_sample_counts_over_all_stores(store, capsys):
    save(prompt("far", rows(0, 1, 2), dev_score=0.9), folder="run/prompts")
    save(prompt("near", rows(9, 10, 11), dev_score=0.1), folder="run/prompts")
    assert command("aim", "--prompts", store, "run", "--energy", "1", "--number", "2") == 0
    assert capsys.readouterr().out.endswith("--data.tasks '[far, near]'\n")


def test_prompts_without_a_task_are_no_sources(store, capsys):
    save(prompt("", rows(0, 1, 2), name="nameless"))
    assert command("aim", "--prompts", store, "--number", "3") == 0
    assert "3 of 3 source tasks" in capsys.readouterr().out


def test_samples_are_compared_one_by_one_and_otherwise_all_with_all(capsys):
    """Reference: a loop over pairs of prompts."""
    samples = {"aim": (13, 21, 42), "both": (13, 42, 87), "other": (87, 100), "none": (None,)}
    keys = [(task, sample) for task, own in samples.items() for sample in own]
    drawn = torch.randn(len(keys), N, D, generator=torch.Generator().manual_seed(0))
    made = dict(zip(keys, drawn, strict=True))
    save(*(prompt(task, made[task, sample], sample) for task, sample in keys))

    def like(*pairs: tuple[int, int | None], task: str) -> np.ndarray:
        bases = [[prompt_subspace(made[key]) for key in (("aim", a), (task, b))] for a, b in pairs]
        return np.array([subspace_similarity(*both) for both in bases])

    every = [(own, other) for own in (13, 21, 42) for other in (87, 100)]
    wanted = [
        ("both", like((13, 13), (42, 42), task="both"), "2"),
        ("other", like(*every, task="other"), "6 pairs"),
        ("none", like((13, None), (21, None), (42, None), task="none"), "3 pairs"),
    ]
    wanted.sort(key=lambda own: -own[1].mean())
    assert command("aim", "--prompts", "store", "--number", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("aim") + 2
    for line, (task, values, count) in zip(lines[start : start + 3], wanted, strict=True):
        numbers = f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
        assert line.split()[1:] == [task, *numbers.split(), *count.split()]
    assert lines[start + 3].startswith("pairs: no sample in common")


def test_sets_of_partitions_stand_for_their_tasks(capsys):
    found = partition("sandbox/12_to_4")
    tensors = [rows(at, at + 1, at + 2) for at in range(16)]
    tasks = [*found.source, *found.target]
    save(*(prompt(task, own) for task, own in zip(tasks, tensors, strict=True)))
    both = [f"sandbox/12_to_4/{which}" for which in ("source", "target")]
    assert command(both[1], "--prompts", "store", "--sources", both[0], "--number", "12") == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line in found.target] == list(found.target)
    chosen = yaml.safe_load(out.splitlines()[-1].split(" ", 1)[1].strip("'"))
    assert sorted(chosen) == sorted(found.source)


def test_a_given_rank_stands_for_the_energy(store, capsys):
    assert command("aim", "--prompts", store, "--rank", "2", "--number", "1") == 0
    assert "0 to 1: 2 of 24 dimensions" in capsys.readouterr().out


def test_neither_transformers_nor_lightning_is_loaded(store):
    """Reading prompts needs no model; the command starts as fast as torch does."""
    code = (
        "import sys\n"
        "from prompt_lab.commands import offline\n"
        "offline.run(['select', 'aim', '--prompts', 'store', '--number', '1'])\n"
        "print(sorted({'transformers', 'lightning', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


# ---- ranking and choosing ------------------------------------------------------------------------


def test_equal_similarities_are_ranked_by_name():
    keys = [("c", 1), ("a", 1), ("b", 1)]
    (ranking,) = rank_sources([("t", 1)], keys, [[0.5, 0.5, 0.7]]).values()
    assert [likeness.task for likeness in ranking] == ["b", "a", "c"]
    assert all(math.isnan(likeness.std) and likeness.same_samples for likeness in ranking)


def test_the_mean_over_targets_is_of_the_means_of_each_target():
    rankings = {
        "s": [Likeness("a", 0.8, 0.1, 5), Likeness("b", 0.6, 0.2, 1)],
        "t": [Likeness("b", 0.5, 0.1, 6, False), Likeness("a", 0.2, math.nan, 1)],
    }
    first, second = mean_over_targets(rankings)
    assert (first.task, first.count, second.task) == ("b", 2, "a")
    assert (first.mean, second.mean) == (pytest.approx(0.55), pytest.approx(0.5))
    assert second.std == pytest.approx(np.std([0.8, 0.2], ddof=1))


def test_highest_lowest_and_random_are_parts_of_the_ranking():
    ranking = [Likeness(name, 1 - at / 10, math.nan, 1) for at, name in enumerate("badce")]
    assert choose_sources(ranking, 2, "highest") == ["b", "a"]
    assert choose_sources(ranking, 2, "lowest") == ["e", "c"]
    drawn = choose_sources(ranking, 3, "random", 4)
    assert drawn == choose_sources(ranking[::-1], 3, "random", 4)
    assert len(set(drawn)) == 3
    for choose in ("highest", "lowest", "random"):
        assert sorted(choose_sources(ranking, 5, choose)) == list("abcde")
    for number in (0, 6):
        with pytest.raises(ValueError, match=f"number is {number}: give 1 to 5"):
            choose_sources(ranking, number, "highest")
    with pytest.raises(ValueError, match=r"choose is 'best'; allowed: highest, lowest, random"):
        choose_sources(ranking, 1, "best")  # pyright: ignore[reportArgumentType]


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["aim", "lost"], "1 of 2 target tasks have no prompt in store: lost; tune them first"),
        (
            ["aim", "--sources", "near", "gone", "lost"],
            "2 of 3 source tasks have no prompt in store: gone, lost; tune them first",
        ),
        (["aim", "--sources", "near", "aim"], "source and target at once: aim; take it out of one"),
        (["aim", *SOURCES], "store hold no task but the targets: give further stores"),
        (["aim"], "--number is 5, and there are 3 source tasks: give 1 to 3"),
        (["aim", "--number", "0"], "--number is 0, and there are 3 source tasks"),
        (["aim", "--number=1", "--rank=4"], "rank is 4: prompts of 3 x 24 allow 1 to 3"),
        (["aim", "--number=1", "--energy=0"], "energy is 0.0: give a share above 0 and at most 1"),
        (["aim/x", "--number=1"], "'aim/x' is neither a task nor a set of a partition"),
        (["aim", "--number=1", "--out", "."], "--out . is a folder: name a file"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused_in_one_sentence(store, words, sentence, capsys):
    assert command(*words, "--prompts", store) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            {"tensor": torch.full((N, D), math.nan)},
            "store/odd-13.safetensors holds NaN or infinite numbers",
        ),
        ({"tensor": torch.zeros(N, D)}, "store/odd-13.safetensors is all zeros"),
        (
            {"tensor": torch.ones(N + 1, D)},
            "store/aim-13.safetensors is 3 x 24, but store/odd-13.safetensors is 4 x 24",
        ),
        (
            {"tensor": torch.ones(N, D), "backbone": "large", "backbone_digest": "c" * 64},
            "store/aim-13.safetensors was made for backbone 'tiny' with weights aaaaaaaaaaaa, but "
            "store/odd-13.safetensors for 'large' with weights cccccccccccc",
        ),
    ],
)
def test_prompts_that_cannot_be_compared_are_named(store, other, sentence, capsys):
    save(prompt("odd", **other))
    assert command("aim", "--prompts", store, "--number", "1") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"prompt-lab: {sentence}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    words = ("aim", "--prompts", store, "--sources", *SOURCES, "--number", "1")
    assert command(*words) == 0  # prompts that were not asked for are not read


def test_a_folder_that_is_not_there_and_one_without_prompts_are_refused(capsys):
    assert command("aim", "--prompts", "nowhere") == 1
    assert capsys.readouterr().err.startswith("prompt-lab: no prompt file or folder nowhere")
    Path("empty").mkdir()
    assert command("aim", "--prompts", "empty") == 1
    assert "empty holds no prompts: give" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--energy", "much"], "--energy is 'much'; allowed: a number"),
        (["--number", "few"], "--number is 'few'; allowed: a whole number"),
        (["--choose", "best"], "--choose is 'best'; allowed: highest, lowest, random"),
    ],
)
def test_wrong_flags_are_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit):
        command("aim", "--prompts", "store", *words)
    assert capsys.readouterr().err == f"prompt-lab: {sentence}\n"


# ---- other methods -------------------------------------------------------------------------------


def ranking(out: str) -> dict[str, float]:
    """The first table of an output: similarity by source, in its order."""
    lines = out.splitlines()
    start = lines.index("aim") + 2
    cells = (line.split() for line in lines[start : lines.index("", start)])
    return {row[1]: float(row[2]) for row in cells}


@pytest.mark.parametrize(
    ("method", "function"),
    [
        ("feature", similarity.feature_similarities),
        ("feature-unit", partial(similarity.feature_similarities, unit_rows=True)),
        ("unigram", similarity.unigram_similarities),
        ("unigram-unit", partial(similarity.unigram_similarities, unit_rows=True)),
        ("max", similarity.max_similarities),
        ("max-source", partial(similarity.max_similarities, over="source")),
        ("cosine", similarity.cosine_similarities),
        ("frobenius", lambda a, b: -similarity.frobenius_distances(a, b)),
    ],
)
def test_every_measure_of_prompts_ranks_the_sources(method, function, capsys):
    tasks = ["aim", "c", "b", "a"]
    drawn = torch.randn(4, N, D, generator=torch.Generator().manual_seed(1))
    save(*(prompt(task, own) for task, own in zip(tasks, drawn, strict=True)))
    assert command("aim", "--prompts", "store", "--number", "1", "--method", method) == 0
    out = capsys.readouterr().out
    wanted = dict(zip("cba", function(drawn[:1], drawn[1:])[0].tolist(), strict=True))
    assert list(ranking(out)) == sorted(wanted, key=lambda task: -wanted[task])
    assert ranking(out) == {task: float(f"{value:.3f}") for task, value in wanted.items()}
    assert out.endswith(f"--data.tasks '[{max(wanted, key=lambda task: wanted[task])}]'\n")


def data(**sizes: int) -> str:
    """A data root with training files of so many rows, and a smaller K of each."""
    for task, size in sizes.items():
        (Path("root") / task).mkdir(parents=True, exist_ok=True)
        for name, rows_ in ((f"{task}_all_13", size), (f"{task}_16_13", 1), (f"{task}_4_7", 30)):
            lines = [f"{task} {row}\tyes\n" for row in range(rows_)]
            (Path("root") / task / f"{name}_train.tsv").write_text("".join(lines))
    return "root"


def test_size_ranks_by_the_rows_of_the_whole_training_sets_without_prompts(capsys):
    root = data(small=2, large=12, middle=7)
    words = ("aim", "--method", "size", "--root", root, "--number", "2")
    assert command(*words, "--sources", "small", "middle", "large") == 0
    out = capsys.readouterr().out
    assert ranking(out) == {"large": 12, "middle": 7, "small": 2}
    assert "1     large   12          1\n" in out
    assert out.endswith("--data.tasks '[large, middle]'\n")


def test_size_and_random_take_the_other_tasks_of_the_stores_as_sources(store, capsys):
    words = ("aim", "--prompts", store, "--number", "1", "--method")
    assert command(*words, "size", "--root", data(near=1, half=2, far=3)) == 0
    assert capsys.readouterr().out.endswith("--data.tasks '[far]'\n")
    seen = set()
    for seed in map(str, range(6)):
        assert command(*words, "random", "--seed", seed) == 0
        out = capsys.readouterr().out
        assert command(*words, "random", "--seed", seed, "--sources", *SOURCES[::-1]) == 0
        assert capsys.readouterr().out == out
        seen.add(tuple(ranking(out)))
    assert len(seen) > 1


def test_the_embedded_sandbox_is_a_root(capsys):
    words = ("--method", "size", "--root", "sandbox", "--number", "1")
    assert command("aim", "--sources", "sandbox-sst", "sandbox-gender", *words) == 0
    assert ranking(capsys.readouterr().out) == {"sandbox-gender": 512, "sandbox-sst": 512}
    assert command("aim", "--sources", "sandbox-sst", "other", *words) == 1
    assert "1 of 2 tasks have no training file in sandbox: other" in capsys.readouterr().err


class Encoder:
    """Stands in for a sentence encoder: counts letters."""

    largest = 0

    def __init__(self, name: str) -> None:
        assert name == "letters"

    def encode(self, texts: list[str], show_progress_bar: bool) -> np.ndarray:
        assert not show_progress_bar
        Encoder.largest = max(Encoder.largest, len(texts))
        return np.array([[text.count(c) for c in "abcd 1"] for text in texts], dtype=np.float32)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an encoder that a stand-in for sentence-transformers has."""
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Encoder  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return "letters"


def test_semb_is_the_cosine_of_the_mean_embeddings_of_all_inputs(encoder, capsys, monkeypatch):
    """Reference: NumPy on all rows at once."""
    monkeypatch.setattr(select_command, "_CHUNK", 4)
    sizes = {"aim": 11, "abacus": 3, "cab": 9, "dd": 4}
    words = ("--method", "semb", "--root", data(**sizes), "--encoder", encoder, "--number", "1")
    assert command("aim", *words, "--sources", "abacus", "cab", "dd") == 0
    out = capsys.readouterr().out
    assert Encoder.largest == 4
    means = {
        task: Encoder("letters").encode([f"{task} {i}" for i in range(size)], False).mean(axis=0)
        for task, size in sizes.items()
    }
    wanted = {
        task: float(means["aim"] @ mean / np.linalg.norm(means["aim"]) / np.linalg.norm(mean))
        for task, mean in means.items()
        if task != "aim"
    }
    assert ranking(out) == pytest.approx(wanted, abs=6e-4)
    assert list(ranking(out)) == sorted(wanted, key=lambda task: -wanted[task])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--method", "max"], "max compares tuned prompts: give their stores with --prompts"),
        (["--method", "size"], "size and semb read training files: name their folder with --root"),
        (["--method", "size", "--root", "no"], "no folder no: name the data root with --root"),
        (
            ["--method", "size", "--root", "root"],
            "1 of 2 tasks have no training file in root: b; prompt-lab tasks build makes them",
        ),
        (["--method", "semb", "--root", "root"], "semb needs a sentence encoder: give its id or"),
        (
            ["--method", "semb", "--root", "root", "--encoder", "x", "--sources", "c"],
            "semb needs the package sentence-transformers: pip install 'prompt-lab[semb]'",
        ),
        (["--method", "random", "--sources", "aim"], "source and target at once: aim"),
    ],
)
def test_what_a_method_lacks_is_one_sentence(words, sentence, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    data(a=1, aim=1, c=2)
    given = [] if "--sources" in words else ["--sources", "a", "b"]
    assert command("aim", *words, *given, "--number", "1") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"prompt-lab: {sentence}")
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_sources_are_needed_from_somewhere(capsys):
    assert command("aim", "--method", "random") == 1
    assert "no source tasks: name them with --sources, or give --prompts" in capsys.readouterr().err
