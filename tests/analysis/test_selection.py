"""nDCG, Regret@k and tables of transfer: hand-made cases, scikit-learn, all orders, the paper."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import result_line
from sklearn.metrics import ndcg_score

from prompt_lab.analysis.selection import (
    best_of_top_k,
    evaluate,
    judge,
    ndcg,
    read_table,
    read_transfer,
)
from prompt_lab.data.partitions import partition
from prompt_lab.files.results import RESULT_COLUMNS
from prompt_lab.files.tensors import write_csv


def orders(similarities: list[float]) -> list[tuple[int, ...]]:
    """All orders of the sources that put no higher similarity after a lower one."""
    every = itertools.permutations(range(len(similarities)))
    pairs = ((order, itertools.pairwise(order)) for order in every)
    return [
        order for order, own in pairs if all(similarities[a] >= similarities[b] for a, b in own)
    ]


def paper_dcg(scores: list[float]) -> float:
    """The sum of the authors' code over scores in ranking order."""
    return sum((2**score - 1) / math.log2(i + 2) for i, score in enumerate(scores))


def regret(scores: list[float], likeness: list[float], k: int) -> float:
    return judge(scores, likeness)[f"Regret@{k}"] / 100


# ---- measures ------------------------------------------------------------------------------------


def test_measures_of_cases_by_hand():
    """Gains 7, 3 and 0 at places 2, 1 and 3; the best order has 7 first."""
    found = (3 + 7 / math.log2(3)) / (7 + 3 / math.log2(3))
    assert ndcg([3, 2, 0], [0.1, 0.9, -1]) == pytest.approx(found)
    assert ndcg([3, 2, 0], [9, 5, 1]) == 1
    scores, likeness = [80, 60, 75, 70], [0.1, 0.9, 0.8, 0.2]
    judged = judge(scores, likeness, 50)
    assert [judged[f"score@{k}"] for k in (1, 2, 3, 4)] == [60, 75, 75, 80]
    assert [judged[f"Regret@{k}"] for k in (1, 2, 3, 4)] == pytest.approx([25, 6.25, 6.25, 0])
    assert [judged[f"gain@{k}"] for k in (1, 2, 3, 4)] == pytest.approx([20, 50, 50, 60])


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # its check of the gains
@pytest.mark.parametrize("seed", range(5))
def test_ndcg_is_that_of_scikit_learn_on_the_papers_gains(seed):
    """With and without equal similarities; both share the gain of equal ones."""
    draw = np.random.default_rng(seed)
    scores = draw.uniform(0, 100, 8)
    for likeness in (draw.normal(size=8), draw.integers(0, 3, 8).astype(float), np.zeros(8)):
        wanted = ndcg_score((2**scores - 1)[None], likeness[None])
        assert ndcg(scores, likeness) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    "likeness", [[0] * 6, [2, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 2], [3, 3, 3, 3, 1, 2], range(6)]
)
@pytest.mark.parametrize("low", [64.25, -40.5])
def test_equal_similarities_have_the_exact_mean_over_their_orders(likeness, low):
    """Reference: every order, one by one; scores may be negative, as correlations are."""
    scores = [71.5, 70.0, 73.0, 73.0, low, 72.0]
    found = [[scores[at] for at in order] for order in orders(list(likeness))]
    wanted = np.mean([paper_dcg(own) for own in found]) / paper_dcg(sorted(scores)[::-1])
    assert ndcg(scores, likeness) == pytest.approx(wanted, rel=1e-12)
    for k in range(1, 7):
        best = np.mean([max(own[:k]) for own in found])
        assert best_of_top_k(scores, likeness, k) == pytest.approx(best, rel=1e-12)
        assert regret(scores, likeness, k) == pytest.approx((73 - best) / 73, abs=1e-14)


def test_extreme_scores_and_a_single_source_have_their_right_values():
    assert ndcg([100, 99, 0], [1, 2, 3]) == pytest.approx(
        paper_dcg([0, 99, 100]) / paper_dcg([100, 99, 0])
    )
    low = [-3.0, 1.0, -0.5]  # the worst order loses more than all is worth
    assert ndcg(low, [3, 1, 2]) == pytest.approx(
        paper_dcg([-3, -0.5, 1]) / paper_dcg([1, -0.5, -3])
    )
    assert judge([40], [7], 50) == {"nDCG": 100, "score@1": 40, "Regret@1": 0, "gain@1": -20}
    for scores in ([0, 0], [-5, 0], [0]):
        assert math.isnan(ndcg(scores, [1, 2][: len(scores)]))
        assert math.isnan(regret(scores, [1, 2][: len(scores)], 1))
    assert math.isnan(judge([70, 60], [1, 2])["gain@1"])
    with pytest.raises(ValueError, match="k is 3, and there are 2 sources: give 1 to 2"):
        best_of_top_k([1, 2], [1, 2], 3)


# ---- evaluation ----------------------------------------------------------------------------------


def drawn(*without: tuple[str, str, str]) -> pd.DataFrame:
    """Scores of 5 sources for 2 targets and 3 seeds, one of them with a baseline."""
    draw = np.random.default_rng(1)
    keys = [*itertools.product("abcde", "xy", "012")]
    rows = [(*key, draw.uniform(60, 90)) for key in keys]
    table = pd.DataFrame(rows, columns=["source", "target", "seed", "score"]).assign(sample="")
    table["baseline"] = table["target"].map({"x": 72.0})
    return table[[key not in without for key in keys]]


RATING = pd.DataFrame(
    [("mine", "x", name, at) for at, name in enumerate("abcde")]
    + [("mine", "y", name, 0) for name in "abcde"],
    columns=["ranking", "target", "source", "similarity"],
)


def test_seeds_are_averaged_before_or_after_the_ranking():
    """Reference: a loop over targets and seeds."""
    table = drawn()
    mean, each = (evaluate(table, RATING, x).set_index("target") for x in ("mean", "each"))
    for target, likeness in (("x", range(5)), ("y", [0] * 5)):
        own = table[table["target"] == target].set_index(["source", "seed"])["score"]
        scores = np.array([[own[source, seed] for seed in "012"] for source in "abcde"])
        base = 72 if target == "x" else math.nan
        whole = judge(scores.mean(axis=1), likeness, base)
        apart = pd.DataFrame([judge(scores[:, at], likeness, base) for at in range(3)]).mean()
        for name in whole:
            assert mean.loc[target, name] == pytest.approx(whole[name], nan_ok=True)
            assert each.loc[target, name] == pytest.approx(apart[name], nan_ok=True)
    assert mean["first"].tolist() == ["e", "5 equal ones"]


def test_a_seed_counts_where_all_sources_have_it():
    found = evaluate(drawn(("b", "x", "1")), RATING, "each").set_index("target").loc["x"]
    own = drawn().set_index(["target", "seed", "source"])["score"]["x"]
    assert found["nDCG"] == pytest.approx(100 * np.mean([ndcg(own[s], range(5)) for s in "02"]))
    apart = drawn(*(("b", "x", seed) for seed in "12"), *(("a", "x", seed) for seed in "0"))
    with pytest.raises(ValueError, match="x: no seed that all its sources have"):
        evaluate(apart, RATING, "each")
    few = evaluate(drawn().query("source in ('a', 'b')"), RATING)  # fewer sources than k
    assert few[["sources", "Regret@2"]].to_numpy().tolist() == [[2, 0], [2, 0]]
    assert few["Regret@3"].isna().all()


def test_similarities_that_are_missing_are_named():
    lacking = RATING.assign(similarity=RATING["similarity"].mask(RATING.index == 6))[:-1]
    with pytest.raises(ValueError, match=r"mine: no similarity of 2 of 10 pairs .*: b for y, e fo"):
        evaluate(drawn(), lacking)


# ---- tables --------------------------------------------------------------------------------------


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def scores_of(table: pd.DataFrame) -> set[tuple[Any, ...]]:
    return {
        *table.dropna(subset="score")[["source", "target", "seed", "score"]].itertuples(False, None)
    }


def test_long_and_wide_tables_are_the_same(tmp_path):
    wide = "\ufeff# a comment, 'quoted\nfrom,x,size,y\nA,70,100, 80\n\nno-transfer,60,,\nB,71.5,,\n"
    long = "target,source,score,size\nx,A,70,100\ny,A,80,100\nx,no-transfer,60,\nx,B,71.5,\ny,B,,\n"
    tables = [read_table(write(tmp_path / "t.csv", text)) for text in (wide, long)]
    wanted = {("A", "x", "", 70.0), ("A", "y", "", 80.0), ("B", "x", "", 71.5)}
    for table in tables:
        assert scores_of(table) == wanted | {("no-transfer", "x", "", 60.0)}
        assert {*table.dropna(subset="size")["source"]} == {"A"}
    seeded = "source,target,score,seed\nA,x,70,1\nA,x,71,2\nB,x,60,1\nB,x,61,2\n"
    transfer, notes = read_transfer([write(tmp_path / "t.csv", seeded)])
    wanted = {("A", "x", "1", 70.0), ("A", "x", "2", 71.0), ("B", "x", "1", 60.0)}
    assert scores_of(transfer) == wanted | {("B", "x", "2", 61.0)}
    assert notes == []


def test_own_tasks_missing_pairs_and_missing_seeds_are_told(tmp_path):
    text = "source,a,b,c\na,50,50,50\nb,50,,50\nc,50,50,\nd,50,,\nno-transfer,40,,60\n"
    transfer, notes = read_transfer([write(tmp_path / "t.csv", text)])
    assert len(transfer) == 7
    assert transfer.groupby("target")["baseline"].first().dropna().to_dict() == {"a": 40, "c": 60}
    assert notes == [
        "left out, a task as its own source: a",
        "not measured, so not ranked for that target: d for b, d for c",
    ]
    seeds = "source,target,score,seed\nA,x,70,1\nA,x,71,2\nB,x,60,1\n"
    _, notes = read_transfer([write(tmp_path / "t.csv", seeds)])
    assert notes == ["measured with fewer than 2 seeds: B for x"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "t.csv is no CSV table: No columns to parse from file"),
        ("source,x\n\udcff,1\n", "t.csv is no CSV table"),
        ("source,x\n", "no source has a score for any target"),
        ("source,x\nA,good\n", "t.csv: score of A for x is 'good', not a finite number"),
        ("source,x\nA,nan\nB,inf\n", "t.csv: score of A for x is 'nan', not a finite number"),
        ("source,x\nA,1,2\n", "t.csv is no CSV table: .* Expected 2 fields in line 2, saw 3"),
        ("source,x\n,1\n", "t.csv: a row without source or target; no-transfer stands for none"),
        ("source,x,x\nA,1,2\n", "t.csv has the columns source, x, x: give source, target, score"),
        ("source,\nA,1\n", "has the columns source, : give"),
        ("source,size\nA,1\n", "has the columns source, size: give"),
        ("source,target,score,std\nA,x,1,2\n", "has the columns source, target, score, std: give"),
        ("source,target,score\nA,,1\n", "a row without source or target"),
        ("source,target,score,size\nA,x,10,2\nA,y,1,3\n", "several sizes of A: give one number"),
        ("source,x\na,0.7\nb,0.8\n", "all scores are at most 1: give percent"),
        ("source,x\na,700\nb,8\n", "scores such as 700: give percent, at most 100"),
        ("source,x,y\na,70,\nno-transfer,60,50\n", "no source has a score for y: add one"),
        ("source,x\na,70\na,71\n", "1 scores stand more than once, such as that of a for x"),
    ],
)
def test_tables_that_are_no_transfer_are_refused(tmp_path, text, reason):
    (tmp_path / "t.csv").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=reason):
        read_transfer([str(tmp_path / "t.csv")])
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing.csv: give a CSV table"):
        read_transfer([str(tmp_path / "nothing.csv")])


# ---- results of fits -----------------------------------------------------------------------------


def results(folder: Path, *lines: dict[str, Any]) -> str:
    """A results.csv of lines, each with ``of``: the source, or a plain start."""
    rows = []
    for line in lines:
        own = line | {"start": "prompt", "start_of": line["of"], "task": line.get("task", "x")}
        if line["of"] in ("vocab", "text", "meta"):
            own |= {"start": line["of"], "start_of": ""}
        rows.append(result_line(**own))
    write_csv(folder / "results.csv", RESULT_COLUMNS, rows)
    return str(folder)


def test_runs_that_start_from_the_prompt_of_another_task_are_transfers(tmp_path):
    lines = [
        {"of": "a", "test": 0.70, "learning_rate": 0.3, "dev": 0.9},
        {"of": "a", "test": 0.99, "learning_rate": 0.1, "dev": 0.1},  # dev chose the other
        {"of": "a", "test": 0.80, "init_seed": 1},
        {"of": "b", "test": 0.60},
        {"of": "b", "test": 0.70, "init_seed": 1},
        {"of": "x", "test": 0.95},  # its own prompt
        {"of": "vocab", "test": 0.50},
        {"of": "vocab", "test": 0.70, "init_seed": 1},
        {"of": "vocab", "test": 0.9, "task": "a"},  # how a source was tuned
        {"of": "meta", "test": 0.9},
        {"of": "vocab", "test": 0.4, "variant": "no_prompt"},
        {"of": "a", "test": None, "init_seed": 2},
    ]
    folder = results(tmp_path / "fits", *lines)
    transfer, notes = read_transfer([folder])
    wanted = {("a", "x", "0/0", 70.0), ("a", "x", "1/0", 80.0), ("b", "x", "0/0", 60.0)}
    assert scores_of(transfer.round(9)) == wanted | {("b", "x", "1/0", 70.0)}
    assert (transfer["baseline"].round(9).unique(), transfer["sample"].unique()) == ([60], ["100"])
    assert notes == [
        "left out, 2 tuned runs of other tasks or other starts",
        "left out, 1 runs without a test score",
        "left out, a task as its own source: x",
    ]
    again, _ = read_transfer([f"{folder}/results.csv", folder])  # each file once
    pd.testing.assert_frame_equal(again, transfer)
    table = write(tmp_path / "t.csv", "source,x\nc,60\n")
    both, _ = read_transfer([folder, table])
    assert {*both["source"]} == {"a", "b", "c"}


def test_the_files_that_transfers_started_from_are_not_read(tmp_path, monkeypatch):
    """B15: their paths are as the fits named them, in folders that may be gone."""
    lines = [{"of": of, "test": 0.5 + 0.1 * at} for at, of in enumerate(("vocab", "a", "b"))]
    here, _ = read_transfer([results(tmp_path / "one", *lines)])
    gone = [{**line, "start_file": f"runs/gone/prompts/{line['of']}.st"} for line in lines]
    results(tmp_path / "two", *gone)
    monkeypatch.chdir(tmp_path / "two")
    pd.testing.assert_frame_equal(read_transfer(["results.csv"])[0], here)


def test_each_target_may_have_a_start_of_its_own_without_transfer(tmp_path):
    lines = [{"of": of, "test": 0.7} for of in ("a", "b", "text")]
    lines += [{"of": of, "test": 0.1, "task": "y"} for of in ("a", "b", "vocab")]
    transfer, _ = read_transfer([results(tmp_path, *lines)])
    assert transfer.groupby("target")["baseline"].first().to_dict() == {"x": 70, "y": 10}


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"backbone": "large"}, r"all tasks differ in backbone \(large, t5-base\): give the res"),
        ({"shots": 64}, r"the transfer runs of x differ in shots \(16, 64\): give the result f"),
        ({"metric_variant": "corrected"}, "differ in metric_variant"),
        ({"of": "text"}, r"the transfer runs of x differ in start \(text, vocab\)"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(tmp_path, other, sentence):
    lines = [{"of": of, "test": 0.7} for of in ("a", "b", "vocab")]
    lines.append({"of": "b", "test": 0.5, "init_seed": 1} | other)
    with pytest.raises(ValueError, match=sentence):
        read_transfer([results(tmp_path, *lines)])


# ---- the paper -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper() -> pd.DataFrame:
    """Table 7 as it ships with the package."""
    transfer, notes = read_transfer(["paper"])
    assert notes == []
    return transfer


def test_the_typed_table_has_the_papers_tasks_means_and_best_sources(paper):
    tasks = partition("selection/13_to_10")
    grid = paper.pivot(index="source", columns="target", values="score")
    grid = grid.loc[[*tasks.source], [*tasks.target]]
    assert len(paper) == grid.size == 130
    assert '"data/*.csv"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    base = paper.groupby("target")["baseline"].first()
    assert base.mean() == pytest.approx(77.204)  # Table 4: 77.2
    assert grid.loc["selection-mnli"].mean() == pytest.approx(77.584)  # Table 4: 77.58
    assert grid.loc["selection-cxc", "selection-copa"] - 60 == 8  # appendix C
    best = {x[10:]: " ".join(s[10:] for s in grid.index[grid[x] == grid[x].max()]) for x in grid}
    wanted = {"boolq": "qnli squad", "cola": "hellaswag", "stsb": "hellaswag", "wic": "cosmosqa"}
    wanted |= {"cr": "qnli", "mrpc": "drop", "rte": "cosmosqa", "wsc": "qqp", "cb": "record"}
    assert best == wanted | {"copa": "cxc multirc race"}
    sizes = paper.groupby("source", sort=False)["size"].first()
    assert (*sizes.sort_values(ascending=False, kind="stable").index,) == tasks.source  # Table 2


def test_size_and_random_on_the_published_means(paper):
    """Reference: the authors' sum over their fixed order, and the mean over all sources."""
    code = "mnli qqp qnli record squad cxc drop sst2 winogrande hellaswag multirc race cosmosqa"
    ranks = {f"selection-{name}": -place for place, name in enumerate(code.split())}
    pairs = paper[["target", "source"]].assign(ranking="size")
    sizes = evaluate(paper, pairs.assign(similarity=pairs["source"].map(ranks)))
    chance = evaluate(paper, pairs.assign(similarity=0))
    scores = paper.pivot(index="source", columns="target", values="score").loc[[*ranks]]
    wanted = {x: paper_dcg([*scores[x]]) / paper_dcg(sorted(scores[x])[::-1]) for x in scores}
    assert sizes.set_index("target")["nDCG"].to_dict() == pytest.approx(
        {x: 100 * value for x, value in wanted.items()}, rel=1e-12
    )
    means = sizes[["nDCG", "Regret@1", "Regret@3"]].mean().tolist()
    assert means == pytest.approx([84.09, 1.92, 0.61], abs=0.005)
    assert chance["nDCG"].mean() == pytest.approx(86.54, abs=0.005)
    regrets = 100 * (1 - scores.mean() / scores.max())
    assert chance.set_index("target")["Regret@1"].to_dict() == pytest.approx(regrets.to_dict())
