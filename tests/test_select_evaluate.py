"""``prompt-lab select evaluate``: rankings against measured transfer; its tables and figures."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import bootstrap
from test_plots import assert_readable
from test_select_command import D, Encoder, N, command, data, prompt, rows, save

from prompt_lab.analysis import select_command
from prompt_lab.files.results import RESULT_COLUMNS, read_csv
from prompt_lab.files.tensors import write_csv


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store() -> str:
    """A target and three sources that share 3, 2 and 0 of its 3 directions."""
    return save(
        prompt("aim", rows(0, 1, 2)),
        prompt("near", rows(2, 1, 0, seed=1)),
        prompt("half", rows(0, 1, 5, seed=2)),
        prompt("far", rows(6, 7, 8, seed=3)),
    )


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an encoder that a stand-in for sentence-transformers has."""
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Encoder  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return "letters"


# ---- what is judged ------------------------------------------------------------------------------


def qualities(out: str) -> dict[str, list[str]]:
    """Cells of the printed table by method, without the standard deviations."""
    lines = out.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("method"))
    found = {}
    for line in lines[start:]:
        method, *cells = re.split(r"\s{2,}", line)
        found[method] = [cell.split(" ± ")[0] for cell in cells]
        if not cells:
            break
    return found


def test_the_published_table_is_evaluated_without_any_model(capsys):
    """Reference: the notes' figures for SIZE, and the exact mean for RANDOM."""
    assert command("evaluate", "paper", "--out", "found") == 0
    out = capsys.readouterr().out
    assert "130 pairs of 13 sources and 10 targets; percent" in out
    table = qualities(out)
    assert table["method"] == ["nDCG", "Regret@1", "Regret@3", "gain@1", "gain@3", "targets"]
    assert table["random"][:2] == ["86.54", "1.37"]
    assert table["size"][1:3] == ["1.92", "0.61"]
    assert table["size"][-1] == "10"
    assert "\nfound/methods.csv\nfound/targets.csv\nfound/transfer.csv\n" in out
    assert {path.name for path in Path("found").glob("*.svg")} >= {"transfer.svg", "top-k.svg"}
    for line in out.splitlines():
        if line.startswith("found/"):
            assert Path(line).stat().st_size > 0
    rows = read_csv(Path("found/targets.csv"))
    assert len(rows) == 20
    copa = next(row for row in rows if (row["method"], row["target"]) == ("size", "selection-copa"))
    assert copa["first"] == "selection-mnli"
    assert float(copa["gain@1"]) == pytest.approx(100 * 3 / 60)
    assert float(copa["score@3"]) == 67.33
    assert float(copa["Regret@3"]) == pytest.approx(100 * (68 - 67.33) / 68)
    assert rows[0]["first"] == "13 equal ones"
    summary = {row["method"]: row for row in read_csv(Path("found/methods.csv"))}
    own = [float(row["nDCG"]) for row in rows if row["method"] == "size"]
    assert float(summary["size"]["nDCG"]) == pytest.approx(np.mean(own))
    assert float(summary["size"]["nDCG std"]) == pytest.approx(np.std(own, ddof=1))


def test_a_table_is_evaluated_without_loading_torch():
    code = (
        "import sys\n"
        "from prompt_lab.commands import offline\n"
        "offline.run(['select', 'evaluate', 'paper'])\n"
        "print(sorted({'torch', 'matplotlib', 'lightning'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_rankings_come_from_prompts_and_from_files(store, capsys):
    """Prompts rank near, half, far; the table has the best source last."""
    Path("t.csv").write_text("source,aim\nnear,70\nhalf,75\nfar,80\n")
    Path("mine.csv").write_text("source,target,score\nnear,aim,1\nhalf,aim,2\nfar,aim,9\n")
    words = ("--prompts", store, "--similarity", "mine.csv", "--root", data(near=1, half=2, far=2))
    assert command("evaluate", "t.csv", *words) == 0
    table = qualities(capsys.readouterr().out)
    methods = get_args(select_command.PromptMethod)
    assert list(table)[1:] == ["random", "size", *methods, "mine"]
    assert table["method"] == ["nDCG", "Regret@1", "Regret@3", "targets"]
    assert table["mine"] == ["100.00", "0.00", "0.00", "1"]
    assert table["subspace"][1] == "12.50"
    assert table["size"][1] == f"{100 * 2.5 / 80:.2f}"  # half and far are equal


def test_semb_is_judged_too(encoder, capsys):
    Path("t.csv").write_text("source,aim\ncab,70\ndd,75\n")
    words = ("--root", data(aim=4, cab=3, dd=4), "--encoder", encoder)
    assert command("evaluate", "t.csv", *words) == 0
    assert list(qualities(capsys.readouterr().out)) == ["method", "random", "size", "semb"]


def test_seeds_are_judged_by_themselves_on_request(capsys):
    lines = ["source,target,score,seed", "a,x,70,1", "b,x,80,1", "a,x,80,2", "b,x,60,2"]
    Path("t.csv").write_text("\n".join(lines))
    Path("mine.csv").write_text("source,x\na,1\nb,0\n")
    regrets = []
    for seeds in ("mean", "each"):
        words = ("t.csv", "--similarity", "mine.csv", "--seeds", seeds)
        assert command("evaluate", *words) == 0
        out = capsys.readouterr().out
        assert "1 targets, 2 seeds (" in out
        regrets.append(qualities(out)["mine"][1])
    assert regrets == ["0.00", f"{100 * (10 / 80 + 0) / 2:.2f}"]


def result(task: str, start: str, test: float, **facts: Any) -> dict[str, Any]:
    """A line of results.csv."""
    given = {"fit_id": "f", "method": "PromptTuning", "variant": "tuned", "backbone": "tiny"}
    given |= {
        "task": task,
        "sample": 13,
        "shots": 16,
        "init_seed": 0,
        "order_seed": 0,
        "metric": "ACC",
    }
    given |= {"dev": 0.5, "num_virtual_tokens": N, "test": test}
    kind, _, of = start.partition(" ")
    given |= {"start": kind, "start_of": of}
    return given | facts


def save_results(*lines: dict[str, Any], folder: str = "fits") -> str:
    write_csv(Path(folder) / "results.csv", RESULT_COLUMNS, lines)
    return folder


def starts(*tasks: str) -> list[str]:
    """Where runs start that start from the prompts of tasks in the store."""
    save(*(prompt(task, torch.ones(N, D)) for task in tasks))
    return [f"prompt {task}" for task in tasks]


def test_runs_that_start_from_the_prompt_of_another_task_are_transfers(capsys, pictures):
    a, b, x = starts("a", "b", "x")
    lines = [
        result("x", a, 0.70, learning_rate=0.3, dev=0.9),
        result("x", a, 0.99, learning_rate=0.1, dev=0.1),  # dev chose the other
        result("x", a, 0.80, init_seed=1),
        result("x", b, 0.60),
        result("x", b, 0.70, init_seed=1),
        result("x", x, 0.95),  # its own prompt
        result("x", "vocab", 0.50),
        result("x", "vocab", 0.70, init_seed=1),
        result("a", "vocab", 0.9),  # how the sources were tuned
        result("x", "meta mpt/cls_to_cls/source", 0.9),
        result("x", "", 0.4, variant="no_prompt"),
        result("x", a, math.nan, init_seed=2),
    ]
    folder = save_results(*lines)
    assert command("evaluate", folder, "--out", "found") == 0
    out = capsys.readouterr().out
    assert "2 pairs of 2 sources and 1 targets, 2 seeds (their mean scores)" in out
    assert "left out, 2 tuned runs of other tasks or other starts" in out
    assert "left out, 1 runs without a test score" in out
    assert "left out, a task as its own source: x" in out
    (row,) = read_csv(Path("found/targets.csv"))
    assert float(row["no transfer"]) == pytest.approx(60)
    assert float(row["score@1"]) == pytest.approx(70)  # the mean of 75 and 65
    assert float(row["gain@1"]) == pytest.approx(100 * 10 / 60)
    assert command("evaluate", f"{folder}/results.csv") == 0


def test_results_and_tables_make_one_transfer_table(capsys):
    (a,) = starts("a")
    save_results(result("x", a, 0.5))
    Path("t.csv").write_text("source,x\nb,60\n")
    assert command("evaluate", "fits", "t.csv") == 0
    assert "2 pairs of 2 sources" in capsys.readouterr().out


def test_each_target_may_have_a_start_of_its_own_without_transfer(capsys):
    a, b = starts("a", "b")
    lines = [result("x", a, 0.7), result("x", b, 0.6), result("x", "text", 0.5)]
    lines += [result("y", a, 0.3), result("y", b, 0.2), result("y", "text", 0.1)]
    assert command("evaluate", save_results(*lines), "--out", "o") == 0
    (row,) = [row for row in read_csv(Path("o/targets.csv")) if row["target"] == "y"][:1]
    assert float(row["no transfer"]) == pytest.approx(10)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"backbone": "large"}, "the transfer runs differ in backbone: large, tiny; give the"),
        ({"shots": 64}, "the transfer runs of a task differ in shots: x (16, 64); give the result"),
        ({"metric_variant": "corrected"}, "the transfer runs differ in metric_variant"),
        (
            {"start": "text", "start_of": ""},
            "a task has several starts without transfer: x (text, vocab); give the",
        ),
    ],
)
def test_results_that_cannot_be_compared_are_refused(other, sentence, capsys):
    a, b = starts("a", "b")
    lines = [result("x", a, 0.7), result("x", b, 0.6), result("x", "vocab", 0.5)]
    assert command("evaluate", save_results(*lines)) == 0
    capsys.readouterr()
    assert command("evaluate", save_results(*lines, result("x", b, 0.5, init_seed=1) | other)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"prompt-lab: {sentence}")
    assert (captured.err.count("\n"), captured.out) == (1, "")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing.csv"], "no file nothing.csv: give a CSV table"),
        (["t.csv", "--similarity", "few.csv"], "few: no similarity of 1 of 2 pairs"),
        (["t.csv", "--similarity", "random.csv"], "random.csv: there is a method random already"),
        (["t.csv", "--prompts", "store"], "1 of 1 target tasks have no prompt in store: x"),
        (["t.csv", "--root", "nowhere"], "no folder nowhere: name the data root with --root"),
        (["t.csv", "--encoder", "e"], "size and semb read training files: name their folder"),
        (["t.csv", "--out", "t.csv"], "--out t.csv is a file: name a folder"),
        (["t.csv", "--steps", "fits"], "--steps needs prompts of the source tasks: give their"),
        (["t.csv", "t.csv"], "2 scores stand more than once, such as that of a for x"),
        (["store"], "no results.csv in store or below"),
        (["fits"], "no run starts from the prompt file of another task"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_sentence(words, sentence, capsys):
    starts("a")
    save_results(result("x", "vocab", 0.5))
    Path("t.csv").write_text("source,x\na,70\nb,75\n")
    Path("few.csv").write_text("source,x\na,1\n")
    Path("random.csv").write_text("source,x\na,1\nb,2\n")
    assert command("evaluate", *words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"prompt-lab: {sentence}")
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_targets_that_nothing_helps_are_named(capsys):
    Path("t.csv").write_text("source,x,y\na,0,70\nb,0,80\n")
    assert command("evaluate", "t.csv") == 0
    out = capsys.readouterr().out
    assert out.endswith("no source scores above 0, so not judged: x\n")
    assert qualities(out)["random"][-1] == "1"


# ---- what is written -----------------------------------------------------------------------------

SCORES = {"x": {"a": [70, 74, 72], "b": [80, 81, 88], "c": [71, 71, 71]}, "y": {"a": [50], "b": []}}
BASE = {"x": [68, 72], "y": [40]}


def seeded(name: str = "t.csv") -> str:
    """A long table with several seeds; one target has scores of one seed, and lacks a source."""
    lines = ["source,target,score,seed"]
    for target, of_source in {**SCORES, "y": {"a": [50], "c": [42]}}.items():
        for source, scores in {"no-transfer": BASE[target], **of_source}.items():
            lines += [f"{source},{target},{score},{seed}" for seed, score in enumerate(scores)]
    Path(name).write_text("\n".join(lines))
    return name


def interval(values: list[float]) -> tuple[float, float]:
    """Reference: SciPy's percentile bootstrap of the mean."""
    found = bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0)
    return tuple(found.confidence_interval)


def test_transfer_is_written_with_its_spread_and_relative_to_no_transfer(pictures):
    """Reference: NumPy and SciPy, pair by pair."""
    assert command("evaluate", seeded(), "--out", "found") == 0
    lines = {(row["target"], row["source"]): row for row in read_csv(Path("found/transfer.csv"))}
    assert list(lines) == [("x", "a"), ("x", "b"), ("x", "c"), ("y", "a"), ("y", "c")]
    row = lines["x", "b"]
    scores = np.array(SCORES["x"]["b"], dtype=float)
    relative = 100 * (scores - 70) / 70
    assert (row["seeds"], float(row["no transfer"])) == ("3", 70)
    for name, values in (("score", scores), ("relative", relative)):
        wanted = [values.mean(), values.std(ddof=1), *interval(values.tolist())]
        parts = ("mean", "std", "low", "high")
        assert [float(row[f"{name} {part}"]) for part in parts] == pytest.approx(wanted)
    assert [float(lines["x", "c"][f"score {part}"]) for part in ("std", "low", "high")] == [
        0,
        71,
        71,
    ]
    alone = lines["y", "a"]
    assert (alone["score mean"], alone["score std"], alone["score low"]) == ("50.0", "", "")
    assert float(alone["relative mean"]) == pytest.approx(25)


def test_relative_transfer_is_summed_up_by_source_and_by_target(pictures):
    """Reference: NumPy on the means of pairs."""
    assert command("evaluate", seeded(), "--out", "found") == 0
    rows = {(row["by"], row["task"]): row for row in read_csv(Path("found/relative_transfer.csv"))}
    assert list(rows) == [("source", name) for name in "abc"] + [("target", name) for name in "xy"]
    means = {name: 100 * (np.mean(own) / 70 - 1) for name, own in SCORES["x"].items()}
    wanted = {
        ("source", "a"): [means["a"], 25],
        ("source", "b"): [means["b"]],
        ("source", "c"): [means["c"], 5],
        ("target", "x"): list(means.values()),
        ("target", "y"): [25, 5],
    }
    for key, values in wanted.items():
        row = rows[key]
        assert int(row["pairs"]) == len(values)
        assert float(row["relative mean"]) == pytest.approx(np.mean(values))
        if len(values) > 1:
            assert float(row["relative std"]) == pytest.approx(np.std(values, ddof=1))
            ends = (float(row["relative low"]), float(row["relative high"]))
            assert ends == pytest.approx(interval(values))
        else:
            assert row["relative std"] == row["relative low"] == ""


@pytest.mark.parametrize("seeds", ["mean", "each"])
def test_the_best_of_the_first_k_is_the_mean_over_all_orders_of_equal_sources(seeds, pictures):
    """Reference: every order of the sources, and every seed."""
    scores = {"a": [70, 90], "b": [80, 60], "c": [75, 65], "d": [78, 92]}
    lines = [
        f"{source},x,{score},{seed}"
        for source, own in scores.items()
        for seed, score in enumerate(own)
    ]
    Path("t.csv").write_text("\n".join(["source,target,score,seed", "no-transfer,x,50,0", *lines]))
    likeness = {"a": 1, "b": 2, "c": 1, "d": 1}
    rated = [f"{source},{value}" for source, value in likeness.items()]
    Path("mine.csv").write_text("\n".join(["source,x", *rated]))
    words = ("t.csv", "--similarity", "mine.csv", "--seeds", seeds, "--out", "found")
    assert command("evaluate", *words) == 0
    judged = [np.mean(list(scores.values()), axis=1)]
    if seeds == "each":
        judged = list(np.array(list(scores.values()), dtype=float).T)
    every = list(itertools.permutations(range(4)))
    orders = {"random": every, "mine": [order for order in every if order[0] == 1]}
    rows = read_csv(Path("found/top_k.csv"))
    assert [(row["method"], int(row["k"])) for row in rows] == [
        (method, k) for method in ("random", "mine") for k in (1, 2, 3, 4)
    ]
    for row in rows:
        own = orders[row["method"]]
        best = [max(one[list(order[: int(row["k"])])]) for one in judged for order in own]
        assert float(row["score"]) == pytest.approx(np.mean(best))
        assert float(row["relative"]) == pytest.approx(100 * (np.mean(best) / 50 - 1))


def test_a_target_with_fewer_sources_keeps_the_best_of_all_in_the_mean(pictures):
    Path("t.csv").write_text("source,x,y\na,70,50\nb,80,60\nc,90,\n")
    assert command("evaluate", "t.csv", "--out", "found") == 0
    rows = [row for row in read_csv(Path("found/top_k.csv")) if row["method"] == "random"]
    assert [int(row["k"]) for row in rows] == [1, 2, 3]
    assert float(rows[2]["score"]) == pytest.approx((90 + 60) / 2)
    assert rows[2]["relative"] == ""


def test_figures_come_with_their_tables_and_need_what_they_show(store, pictures):
    Path("t.csv").write_text("source,aim\nnear,70\nhalf,75\nfar,80\n")
    assert command("evaluate", "t.csv", "--out", "plain") == 0
    assert list(pictures) == ["transfer", "top-k"]
    assert not Path("plain/relative_transfer.csv").exists()
    pictures.clear()
    Path("t.csv").write_text("source,aim\nno-transfer,72\nnear,70\nhalf,75\nfar,80\n")
    assert command("evaluate", "t.csv", "--prompts", store, "--out", "found") == 0
    by = [f"transfer-{what}by-{by}" for by in ("source", "target") for what in ("", "means-")]
    maps = [f"similarity-{method}" for method in get_args(select_command.PromptMethod)]
    assert list(pictures) == ["transfer", *by, *maps, "top-k", "tokens-aim"]
    assert [text.get_text() for text in pictures["transfer"].axes[0].texts] == [
        f"{100 * (score - 72) / 72:+.1f}" for score in (70, 75, 80)
    ]
    for figure in pictures.values():
        assert_readable(figure)


def test_maps_hatch_missing_pairs_and_own_sources(store, pictures):
    Path("t.csv").write_text("source,aim,near\nno-transfer,72,70\nnear,70,99\nhalf,,75\nfar,8,8\n")
    assert command("evaluate", "t.csv", "--prompts", store, "--out", "found") == 0
    for name in ("transfer", "similarity-max"):
        assert len(pictures[name].axes[0].texts) == 4
        assert "hatched: no value" in pictures[name].get_supxlabel()


def legend(figure: Figure) -> list[str]:
    """Names in the legend of a figure."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_rows_of_the_best_second_and_worst_source_are_drawn(store, pictures):
    Path("t.csv").write_text("source,aim\nnear,70\nhalf,75\nfar,80\nhalf-2,75\n")
    save(prompt("half-2", rows(3, 4, 5), sample=21))  # the target has sample 13
    assert command("evaluate", "t.csv", "--prompts", store, "--out", "found") == 0
    wanted = ["best: far (80.00)", "second: half (75.00)", "worst: near (70.00)"]
    assert legend(pictures["tokens-aim"]) == ["aim, no transfer", *wanted]
    assert [len(line.get_xdata()) for line in pictures["tokens-aim"].axes[0].lines] == [N] * 4


def test_two_sources_have_no_second_best_and_short_prompts_no_map(pictures):
    """N = 3: three prompts have nine rows; N = 1: only three."""
    Path("t.csv").write_text("source,aim\na,70\nb,75\n")
    save(*(prompt(task, rows(0, 1, at)) for at, task in enumerate(("a", "b", "aim"), 2)))
    assert command("evaluate", "t.csv", "--prompts", "store", "--out", "found") == 0
    assert legend(pictures["tokens-aim"])[1:] == ["best: b (75.00)", "worst: a (70.00)"]
    pictures.clear()
    short = torch.ones(1, D)
    save(*(prompt(task, short * at) for at, task in enumerate(("a", "b", "aim"), 2)), folder="few")
    assert command("evaluate", "t.csv", "--prompts", "few", "--out", "found") == 0
    assert "tokens-aim" not in pictures
