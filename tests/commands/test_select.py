"""``prompt-lab select`` and ``select evaluate``: what they rank, judge, tell, write and refuse."""

from __future__ import annotations

import itertools
import math
import re
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import CONFIGS
from matplotlib.figure import Figure
from scipy.linalg import subspace_angles
from scipy.stats import bootstrap

from prompt_lab.__main__ import main
from prompt_lab.analysis import data_rankings, plots
from prompt_lab.analysis.selection import PROMPT_RANKINGS, find_steps
from prompt_lab.commands.fit import ParseOnly
from prompt_lab.core import similarity
from prompt_lab.files.prompts import Prompt, PromptStore

pytestmark = pytest.mark.usefixtures("own_folder")

N, D = 3, 24
SOURCES = ["near", "half", "far"]


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
    return main(["select", *words])


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
        "----  ------  ----------  -------",
        "1     near    1.000       1      ",
        f"2     half    {math.sqrt(2 / 3):.3f}       1      ",
        "3     far     0.000       1      ",
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


def test_samples_are_compared_one_by_one_and_otherwise_all_with_all(capsys):
    """Reference: a loop over pairs of prompts."""
    samples = {"aim": (13, 21, 42), "both": (13, 42, 87), "other": (87, 100), "none": (None,)}
    keys = [(task, sample) for task, own in samples.items() for sample in own]
    drawn = torch.randn(len(keys), N, D, generator=torch.Generator().manual_seed(0))
    made = dict(zip(keys, drawn, strict=True))
    save(*(prompt(task, made[task, sample], sample) for task, sample in keys))

    def like(*pairs: tuple[int, int | None], task: str) -> np.ndarray:
        found = []
        for own, other in pairs:
            one, two = (
                similarity.subspaces(made[key][None])[0] for key in (("aim", own), (task, other))
            )
            found.append(np.sqrt(np.mean(np.cos(subspace_angles(one.numpy(), two.numpy())) ** 2)))
        return np.array(found)

    every = [(own, other) for own in (13, 21, 42) for other in (87, 100)]
    wanted = [
        ("both", like((13, 13), (42, 42), task="both"), "2"),
        ("other", like(*every, task="other"), "6 pairs"),
        ("none", like((13, None), (21, None), (42, None), task="none"), "3 pairs"),
    ]
    wanted.sort(key=lambda own: -own[1].mean())
    assert command("aim", "--prompts", "store", "--number", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("aim") + 3
    for line, (task, values, count) in zip(lines[start : start + 3], wanted, strict=True):
        numbers = f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
        assert line.split()[1:] == [task, *numbers.split(), *count.split()]
    assert lines[start + 3].startswith("pairs: no sample in common")


# ---- other methods -------------------------------------------------------------------------------


def ranking(out: str) -> dict[str, float]:
    """The first table of an output: similarity by source, in its order."""
    lines = out.splitlines()
    start = lines.index("aim") + 3
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
    monkeypatch.setattr(data_rankings, "CHUNK", 4)
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


# ---- evaluate ------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures by name, which are kept here instead of being written."""
    kept: dict[str, Figure] = {}

    def keep(figure: Figure, stem: Path) -> list[Path]:
        kept[stem.name] = figure
        return []

    monkeypatch.setattr(plots, "save_figure", keep)
    return kept


def qualities(out: str) -> dict[str, list[str]]:
    """Cells of the printed table by ranking, without the standard deviations."""
    lines = out.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("ranking"))
    found = {}
    for line in lines[start:]:
        name, *cells = re.split(r"\s{2,}", line.strip())
        found[name] = [cell.split(" ± ")[0] for cell in cells]
        if not cells:
            break
    return found


def write(name: str, *lines: str) -> str:
    Path(name).write_text("\n".join(lines))
    return name


def test_the_published_table_is_evaluated_without_any_model(capsys):
    assert command("evaluate", "paper", "--out", "found") == 0
    out = capsys.readouterr().out
    assert "130 pairs of 13 sources and 10 targets; percent" in out
    table = qualities(out)
    assert table["ranking"] == ["nDCG", "Regret@1", "Regret@3", "gain@1", "gain@3", "targets"]
    assert table["random"] == ["86.54", "1.37", "0.58", "1.14", "1.98", "10"]
    assert table["size"] == ["84.14", "1.92", "0.61", "0.53", "1.94", "10"]
    assert out.endswith("\nfound/report.md\nfound/report.html\n")
    named = re.findall(r'src="(.+?)"', Path("found/report.html").read_text())
    by = [f"transfer-{what}by-{by}" for by in ("source", "target") for what in ("", "means-")]
    assert named == [f"{x}.png" for x in ("transfer", *by, "top-k")]
    assert all(Path("found", x).stat().st_size > 1000 for x in named)
    rows = pd.read_csv("found/targets.csv").set_index(["ranking", "target"])
    copa = rows.loc["size", "selection-copa"]
    assert copa["first"] == "selection-mnli"
    assert copa["gain@1"] == pytest.approx(100 * 3 / 60)
    assert copa["score@3"] == 67.33
    assert copa["Regret@3"] == pytest.approx(100 * (68 - 67.33) / 68)
    assert rows["first"].iloc[0] == "13 equal ones"
    summary, own = pd.read_csv("found/rankings.csv", index_col=0), rows.loc["size", "nDCG"]
    wanted = [own.mean(), own.std(), *interval(own.tolist())]
    parts = ("nDCG", "nDCG std", "nDCG low", "nDCG high")
    assert [summary.loc["size", x] for x in parts] == pytest.approx(wanted)


def test_rankings_come_from_prompts_and_from_files(store, capsys):
    """Prompts rank near, half, far; the table has the best source last."""
    write("t.csv", "source,aim", "near,70", "half,75", "far,80")
    write("mine.csv", "source,target,score", "near,aim,1", "half,aim,2", "far,aim,9")
    words = ("--prompts", store, "--similarity", "mine.csv", "--root", data(near=1, half=2, far=2))
    assert command("evaluate", "t.csv", *words) == 0
    table = qualities(capsys.readouterr().out)
    assert list(table)[2:] == ["random", "size", *PROMPT_RANKINGS, "mine"]
    assert table["ranking"] == ["nDCG", "Regret@1", "Regret@3", "targets"]
    assert table["mine"] == ["100.00", "0.00", "0.00", "1"]
    assert table["subspace"][1] == "12.50"
    assert table["size"][1] == f"{100 * 2.5 / 80:.2f}"  # half and far are equal


# ---- the report ----------------------------------------------------------------------------------

SCORES = {
    "x": {"a": [70, 74, 72], "b": [80, 81, 88], "c": [71, 71, 71]},
    "y": {"a": [50], "c": [42]},
}
BASE = {"x": [68, 72], "y": [40]}


def interval(values: list[float]) -> tuple[float, float]:
    """Reference: SciPy's percentile bootstrap of the mean."""
    found = bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0)
    return tuple(found.confidence_interval)


def test_transfer_is_written_with_its_spread_and_relative_to_no_transfer(figures):
    """Reference: NumPy and SciPy, pair by pair, then by source and by target."""
    lines = ["source,target,score,seed"]
    for target, of_source in SCORES.items():
        for source, scores in {"no-transfer": BASE[target], **of_source}.items():
            lines += [f"{source},{target},{score},{seed}" for seed, score in enumerate(scores)]
    assert command("evaluate", write("t.csv", *lines), "--out", "found") == 0
    table = pd.read_csv("found/transfer.csv").set_index(["target", "source"])
    assert [*table.index] == [("x", "a"), ("x", "b"), ("x", "c"), ("y", "a"), ("y", "c")]
    row, scores = table.loc["x", "b"], np.array(SCORES["x"]["b"], float)
    assert (row["seeds"], row["no transfer"]) == (3, 70)
    for name, values in (("score", scores), ("relative", 100 * (scores - 70) / 70)):
        wanted = [values.mean(), values.std(ddof=1), *interval(values.tolist())]
        parts = ("mean", "std", "low", "high")
        assert [row[f"{name} {x}"] for x in parts] == pytest.approx(wanted)
    alone = table.loc["y", "a"]
    assert (alone["score mean"], alone["relative mean"]) == pytest.approx((50, 25))
    assert alone[["score std", "score low", "relative high"]].isna().all()
    means = {name: 100 * (np.mean(own) / 70 - 1) for name, own in SCORES["x"].items()}
    wanted = {
        ("source", "a"): [means["a"], 25],
        ("source", "b"): [means["b"]],
        ("source", "c"): [means["c"], 5],
        ("target", "x"): list(means.values()),
        ("target", "y"): [25, 5],
    }
    over = pd.read_csv("found/relative_transfer.csv").set_index(["by", "task"])
    assert [*over.index] == [*wanted]
    for key, values in wanted.items():
        assert over.loc[key, ["pairs", "mean"]].tolist() == pytest.approx(
            [len(values), np.mean(values)]
        )
        if len(values) > 1:
            spread = [np.std(values, ddof=1), *interval(values)]
            assert over.loc[key, ["std", "low", "high"]].tolist() == pytest.approx(spread)
    drawn = figures["transfer-means-by-source"].axes[0].lines
    assert [*drawn[1].get_xdata()] == pytest.approx([np.mean(wanted["source", x]) for x in "abc"])


@pytest.mark.parametrize("seeds", ["mean", "each"])
def test_the_best_of_the_first_k_is_the_mean_over_all_orders_of_equal_sources(seeds, figures):
    """Reference: every order of the sources, and every seed."""
    scores = {"a": [70, 90], "b": [80, 60], "c": [75, 65], "d": [78, 92]}
    rows = [f"{x},x,{score},{at}" for x, own in scores.items() for at, score in enumerate(own)]
    write("t.csv", "source,target,score,seed", "no-transfer,x,50,0", *rows)
    write("mine.csv", "source,x", "a,1", "b,2", "c,1", "d,1")
    words = ("t.csv", "--similarity", "mine.csv", "--seeds", seeds, "--out", "found")
    assert command("evaluate", *words) == 0
    judged = [np.mean([*scores.values()], axis=1)]
    if seeds == "each":
        judged = [*np.array([*scores.values()], dtype=float).T]
    every = [*itertools.permutations(range(4))]
    orders = {"random": every, "mine": [order for order in every if order[0] == 1]}
    table = pd.read_csv("found/top_k.csv").set_index(["ranking", "k"])
    assert [*table.index] == [(x, k) for x in ("random", "mine") for k in (1, 2, 3, 4)]
    for (name, k), row in table.iterrows():
        best = [max(one[[*order[:k]]]) for one in judged for order in orders[name]]
        assert row["score"] == pytest.approx(np.mean(best))
        assert row["gain"] == pytest.approx(100 * (np.mean(best) / 50 - 1))


def test_prompts_add_maps_of_similarities_and_of_the_rows_of_prompts(store, figures):
    """The target has sample 13; pairs that are missing stay empty."""
    save(prompt("half-2", rows(3, 4, 5), sample=21))
    write(
        "t.csv",
        "source,aim,near",
        "no-transfer,72,70",
        "near,70,",
        "half,75,7",
        "far,80,8",
        "half-2,75,",
    )
    assert command("evaluate", "t.csv", "--prompts", store, "--out", "found") == 0
    maps = [f"similarity-{name.replace('-', '_')}" for name in PROMPT_RANKINGS]
    assert [x for x in figures if not x.startswith("transfer")] == [
        *("top-k", *maps, "tokens-aim", "tokens-near")
    ]
    texts = [text.get_text() for text in figures["transfer"].axes[0].texts]
    gains = [(70, 72), (75, 72), (7, 70), (80, 72), (8, 70), (75, 72)]
    assert texts == [f"{100 * (score - base) / base:.2f}" for score, base in gains]
    assert len(figures["similarity-max"].axes[0].texts) == 6
    legend = [text.get_text() for text in figures["tokens-aim"].legends[0].get_texts()]
    named = ["best: far (80.00)", "second: half (75.00)", "worst: near (70.00)"]
    assert legend == ["aim, no transfer", *named]
    points = pd.read_csv("found/tokens.csv")
    assert points.groupby(["target", "prompt"], sort=False).size().tolist() == [N] * 7
    first = pd.read_csv("found/similarities.csv").query("ranking == 'subspace' and target == 'aim'")
    assert first["source"].tolist() == ["near", "half", "far", "half-2"]


# ---- over steps ----------------------------------------------------------------------------------

NAMES, TARGETS, STEPS, SAMPLES = "abc", "xy", (100, 20), (13, 21)
"""Step 20 comes before step 100, though not by name."""

FIT = "runs/fit"
GRID = {
    (source, target, sample, seed): 60.0 + (7 * at + 3 * sample * at**2 + seed) % 11
    for at, source in enumerate(NAMES)
    for target in TARGETS
    for sample in SAMPLES
    for seed in (0, 1)
}


def drawn(*seeds: int) -> torch.Tensor:
    """A prompt (N, D) of its own seeds."""
    seed = sum(100**at * (value + 1) for at, value in enumerate(seeds))
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def step_prompt(task: str, step: int, sample: int, **facts: Any) -> Prompt:
    """A target prompt at a step, as PromptTuning saves it."""
    tensor = facts.pop("tensor", drawn(step, sample, ord(task[0])))
    given = {"name": f"{task}_{sample}", "init_seed": 0, "order_seed": 0, "start": "vocab"}
    return prompt(task, tensor, sample, **(given | {"dev_score": None} | facts))


def fits() -> str:
    """A fit with all target prompts at all steps; returns its folder."""
    for step in STEPS:
        made = (step_prompt(task, step, sample) for task in TARGETS for sample in SAMPLES)
        save(*made, folder=f"{FIT}/steps/{step}")
    return FIT


def sources() -> str:
    """A store of source prompts, with a worse one that does not count."""
    return save(
        *(prompt(task, drawn(0, 0, ord(task))) for task in NAMES),
        prompt("a", drawn(9, 9, 9), dev_score=0.1, name="a-worse"),
    )


def table() -> str:
    lines = [f"{s},{t},{score},{k},{seed}" for (s, t, k, seed), score in GRID.items()]
    return write("t.csv", "source,target,score,sample,seed", *lines)


def cosine(target: torch.Tensor, source: str) -> float:
    """Reference: the cosine of all numbers of two prompts, by NumPy."""
    a, b = target.double().numpy().ravel(), drawn(0, 0, ord(source)).double().numpy().ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def quality(scores: np.ndarray, likeness: np.ndarray) -> list[float]:
    """Reference: nDCG and Regret@1 in percent, of a ranking without ties."""

    def dcg(values: np.ndarray) -> float:
        return sum((2**value - 1) / math.log2(at + 2) for at, value in enumerate(values))

    ranked = scores[np.argsort(likeness)[::-1]]
    ndcg = dcg(ranked) / dcg(np.sort(scores)[::-1])
    return [100 * ndcg, 100 * (max(scores) - ranked[0]) / max(scores)]


def wanted(step: int, target: str, seeds: str) -> list[float]:
    """Reference: a loop over the prompts of a target at a step."""
    likeness = np.array([[cosine(drawn(step, k, ord(target)), s) for s in NAMES] for k in SAMPLES])
    scores = np.array(
        [[(GRID[s, target, k, 0] + GRID[s, target, k, 1]) / 2 for s in NAMES] for k in SAMPLES]
    )
    if seeds == "mean":
        return quality(scores.mean(axis=0), likeness.mean(axis=0))
    own = [quality(a, b) for a, b in zip(scores, likeness, strict=True)]
    return np.mean(own, axis=0).tolist()


@pytest.mark.parametrize("seeds", ["mean", "each"])
def test_the_prompts_of_every_step_are_judged(seeds, capsys, figures):
    words = (table(), "--prompts", sources(), "--steps", fits(), "--seeds", seeds)
    assert command("evaluate", *words, "--out", "found") == 0
    out = capsys.readouterr().out
    rows = pd.read_csv("found/steps.csv").query("ranking == 'cosine'").set_index(["step", "target"])
    assert [*rows.index] == [(step, target) for step in (20, 100) for target in TARGETS]
    for key, row in rows.iterrows():
        assert row[["nDCG", "Regret@1"]].tolist() == pytest.approx(wanted(*key, seeds))
        assert row["Regret@3"] == 0
    means = [np.mean([wanted(step, x, seeds)[0] for x in TARGETS]) for step in (20, 100)]
    lines = out[out.index("\nnDCG ") :].splitlines()[1:]
    assert lines[0].split() == ["nDCG", "20", "100"]
    (shown,) = [line.split() for line in lines[:12] if line.startswith("cosine")]
    assert shown[1:] == [f"{x:.2f}" for x in means]
    curves = [[*line.get_ydata()] for line in figures["steps-ndcg"].axes[0].lines]
    assert any(curve == pytest.approx(means) for curve in curves)
    assert "without a final prompt, so judged at saved steps alone: x, y" in out
    assert not [x for x in figures if x.startswith("similarity")]


def test_transfers_and_other_tasks_are_left_out_and_missing_runs_are_told():
    folder = f"{fits()}/steps/20"
    save(step_prompt("z", 20, 13), folder=folder)
    save(step_prompt("x", 20, 13, name="x_a", start="prompt", start_of="a"), folder=folder)
    Path(FIT, "steps", "100", "x_21.safetensors").unlink()
    other = step_prompt("y", 20, 42, order_seed=7)
    save(other, folder="second/steps/20")
    steps, notes = find_steps([FIT, f"./{FIT}", "second"], [*TARGETS])
    assert steps.groupby("step").size().to_dict() == {20: 5, 100: 3}
    assert notes == [
        "left out, 2 saved prompts of other tasks or other starts",
        "not all of 5 target prompts were saved: 3 at step 100",
    ]


# ---- what is refused -----------------------------------------------------------------------------

ONE = ["aim", "--prompts", "store", "--number", "1"]
WITHOUT = ["aim", "--sources", "a", "b", "--number", "1", "--method"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lost", *ONE], "1 of 2 target tasks have no prompt in store: lost; tune them first"),
        ([*ONE, "--sources", "near", "aim"], "source and target at once: aim; take it out of one"),
        ([*SOURCES, "odd", *ONE], "store hold no task but the targets: name tasks with"),
        ([*ONE, "--number", "9"], "--number is 9, and there are 4 source tasks: give 1 to 4"),
        ([*ONE, "--rank=4"], "rank is 4, but a prompt spans 3 dimensions"),
        (
            [*ONE, "--method", "unigram"],
            "unigram compares prompts row by row, and these have several lengths (far 3, odd 5)",
        ),
        ([*ONE, "--energy=0"], "energy is 0.0: give a share above 0 and at most 1"),
        ([*ONE, "--out", "."], "--out . is a folder: name a file"),
        ([*WITHOUT, "max"], "max compares tuned prompts: give their stores with --prompts"),
        ([*WITHOUT, "size"], "size and semb read training files: name their folder with --root"),
        ([*WITHOUT, "size", "--root", "no"], "no folder no: name the data root with --root"),
        (
            [*WITHOUT, "size", "--root", "root"],
            "1 of 2 tasks have no training file in root: b; prompt-lab tasks build makes them",
        ),
        ([*WITHOUT, "semb", "--root", "root"], "semb needs a sentence encoder: give its id or"),
        (
            [*WITHOUT, "semb", "--root", "root", "--encoder", "x", "--sources", "a"],
            "semb needs the package sentence-transformers: pip install 'prompt-lab[semb]'",
        ),
        (["aim", "--method", "random"], "no source tasks: name tasks with --sources"),
        (["evaluate", "nothing.csv"], "no file nothing.csv: give a CSV table"),
        (["evaluate", "t.csv", "--similarity", "few.csv"], "few: no similarity of 1 of 2 pairs"),
        (
            ["evaluate", "t.csv", "--similarity", "random.csv"],
            "random.csv: there is a method random already",
        ),
        (["evaluate", "t.csv", "--prompts", "store"], "1 of 1 target tasks have no prompt in"),
        (["evaluate", "t.csv", "--out", "t.csv"], "--out t.csv is a file: name a folder"),
        (["evaluate", "t.csv", "--steps", "f"], "--steps needs prompts of the source tasks: give"),
        (["evaluate", "store"], "no results.csv in store or below"),
        (["evaluate", "s.csv", "--prompts", "store", "--steps", "f"], "no saved steps in f: give"),
        (
            ["evaluate", "s.csv", "--prompts", "store", "--steps", FIT],
            "not every saved step has all target tasks: step 20 lacks z, step 100 lacks z; fit all",
        ),
        (
            ["evaluate", "k.csv", "--prompts", "store", "--steps", FIT, "--seeds", "each"],
            "a prompt of x is judged by the transfer scores of its sample, 21, and near have none",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_sentence(store, words, sentence, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    data(a=1, aim=1)
    fits()
    save(prompt("odd", torch.ones(N + 2, D)))
    write("t.csv", "source,x", "near,70", "half,75")
    write("s.csv", "source,x,z", "near,70,70", "half,75,75")
    write("k.csv", "source,target,score,sample", "near,x,70,13", "half,x,70,13", "half,x,70,21")
    write("few.csv", "source,x", "near,1")
    write("random.csv", "source,x", "near,1", "half,2")
    assert command(*words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"prompt-lab: {sentence}")
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_a_prompt_of_zeros_is_named_and_what_was_not_asked_for_is_not_read(store, capsys):
    save(prompt("odd", torch.zeros(N, D)))
    assert command(*ONE) == 1
    assert "store/odd-13.safetensors is all zeros: tune it again or" in capsys.readouterr().err
    assert command(*ONE, "--sources", *SOURCES) == 0


def test_the_mean_over_several_targets_chooses(store, capsys):
    save(prompt("goal", rows(6, 7, 0)))
    assert command("aim", "goal", "--prompts", store, "--energy", "1", "--number", "1") == 0
    out = capsys.readouterr().out
    assert out.index("\naim\n") < out.index("\ngoal\n") < out.index("\nmean over 2 targets\n")
    both = np.sqrt((1, 1 / 3))
    text = f"1     near    {both.mean():.3f} ± {both.std(ddof=1):.3f}  2"
    assert text in out.partition("mean over")[2]
    assert out.endswith("--data.tasks '[near]'\n")
