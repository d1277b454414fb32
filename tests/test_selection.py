"""nDCG, Regret@k and tables of transfer: hand-made cases, scikit-learn, all orders, the paper."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from prompt_lab.analysis.selection import best_of_top_k, evaluate, ndcg, regret_at_k
from prompt_lab.analysis.transfer_table import (
    NO_TRANSFER,
    PAPER_TABLE,
    Entry,
    make_table,
    read_table,
)
from prompt_lab.data.partitions import partition


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


# ---- measures ------------------------------------------------------------------------------------


def test_ndcg_of_a_case_by_hand():
    """Gains 7, 3 and 0 at places 2, 1 and 3; the best order has 7 first."""
    found = (3 + 7 / math.log2(3)) / (7 + 3 / math.log2(3))
    assert ndcg([3, 2, 0], [0.1, 0.9, -1]) == pytest.approx(found)
    assert ndcg([3, 2, 0], [9, 5, 1]) == 1
    assert ndcg([3, 2, 0], [0.1, 0.9, -1], k=1) == pytest.approx(3 / 7)


def test_regret_of_a_case_by_hand():
    scores, likeness = [80, 60, 75, 70], [0.1, 0.9, 0.8, 0.2]
    assert [regret_at_k(scores, likeness, k) for k in (1, 2, 3, 4)] == pytest.approx(
        [20 / 80, 5 / 80, 5 / 80, 0]
    )
    assert [best_of_top_k(scores, likeness, k) for k in (1, 2, 3, 4)] == [60, 75, 75, 80]


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # its check of the gains
@pytest.mark.parametrize("k", [None, 1, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_ndcg_is_that_of_scikit_learn_on_the_papers_gains(k, seed):
    """With and without equal similarities; both share the gain of equal ones."""
    draw = np.random.default_rng(seed)
    scores = draw.uniform(0, 100, 8)
    for likeness in (draw.normal(size=8), draw.integers(0, 3, 8).astype(float), np.zeros(8)):
        gains = 2**scores - 1
        wanted = ndcg_score(gains[None], likeness[None], k=k)
        assert ndcg(scores, likeness, k) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    "likeness", [[0] * 6, [2, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 2], [3, 3, 3, 3, 1, 2], range(6)]
)
def test_equal_similarities_have_the_exact_mean_over_their_orders(likeness):
    """Reference: every order, one by one."""
    scores = [71.5, 70.0, 73.0, 73.0, 64.25, 72.0]
    found = [[scores[at] for at in order] for order in orders(list(likeness))]
    wanted = np.mean([paper_dcg(own) for own in found]) / paper_dcg(sorted(scores)[::-1])
    assert ndcg(scores, likeness) == pytest.approx(wanted, rel=1e-12)
    for k in range(1, 7):
        best = np.mean([max(own[:k]) for own in found])
        assert best_of_top_k(scores, likeness, k) == pytest.approx(best, rel=1e-12)
        assert regret_at_k(scores, likeness, k) == pytest.approx((73 - best) / 73, abs=1e-14)


def test_only_the_order_of_similarities_counts_and_the_order_of_sources_does_not():
    draw = np.random.default_rng(0)
    scores, likeness = draw.uniform(50, 100, 9), draw.normal(size=9)
    mixed = draw.permutation(9)
    for other in (np.exp(likeness), 1e-9 * likeness - 4):
        assert ndcg(scores, other) == ndcg(scores, likeness)
        assert regret_at_k(scores, other, 2) == regret_at_k(scores, likeness, 2)
    assert ndcg(scores[mixed], likeness[mixed]) == pytest.approx(ndcg(scores, likeness))
    assert ndcg(scores / 100, likeness) != pytest.approx(ndcg(scores, likeness))  # unlike Regret
    assert regret_at_k(scores / 100, likeness, 2) == pytest.approx(regret_at_k(scores, likeness, 2))


def test_scores_of_100_and_below_0_have_finite_gains_and_no_good_source_has_no_value():
    assert ndcg([100, 99, 0], [1, 2, 3]) == pytest.approx(
        paper_dcg([0, 99, 100]) / paper_dcg([100, 99, 0])
    )
    assert ndcg([50, -20], [1, 0]) == 1
    for scores in ([0, 0], [-5, 0]):
        assert math.isnan(ndcg(scores, [1, 2]))
        assert math.isnan(regret_at_k(scores, [1, 2], 1))


@pytest.mark.parametrize(
    ("scores", "likeness", "k", "reason"),
    [
        ([], [], 1, "give one row of finite numbers"),
        ([1, math.nan], [1, 2], 1, "scores .*: give one row of finite numbers"),
        ([1, 2], [1, math.inf], 1, "similarities .*: give one row of finite numbers"),
        ([[1, 2]], [[1, 2]], 1, "give one row of finite numbers"),
        ([1, 2], [1, 2, 3], 1, "2 scores and 3 similarities: give one each per source"),
        ([1, 101], [1, 2], 1, "give percent, at most 100"),
        ([1, 2], [1, 2], 0, "k is 0, and there are 2 sources"),
        ([1, 2], [1, 2], 3, "k is 3, and there are 2 sources"),
    ],
)
def test_what_is_no_ranking_of_scores_is_refused(scores, likeness, k, reason):
    for measure in (ndcg, best_of_top_k, regret_at_k):
        with pytest.raises(ValueError, match=reason):
            measure(scores, likeness, k)


# ---- evaluation ----------------------------------------------------------------------------------


def drawn(seeds: int = 3) -> list[Entry]:
    """Scores of 5 sources for 2 targets, and some without transfer."""
    draw = np.random.default_rng(1)
    pairs = itertools.product("abcde", "xy", range(seeds))
    entries = [Entry(s, t, float(draw.uniform(60, 90)), f"{seed}") for s, t, seed in pairs]
    return [*entries, *(Entry(NO_TRANSFER, "x", value, value_seed) for value, value_seed in BASE)]


BASE = ((70.0, "0"), (74.0, "1"))
RATING = {"x": {name: at for at, name in enumerate("abcde")}, "y": dict.fromkeys("abcde", 0)}


def test_seeds_are_averaged_before_or_after_the_ranking():
    """Reference: a loop over targets and seeds."""
    table = make_table(drawn())
    mean, each = (evaluate(table, RATING, seeds) for seeds in ("mean", "each"))
    for target in "xy":
        likeness = list(RATING[target].values())
        scores = np.array([list(table.scores[target][source].values()) for source in "abcde"])
        assert mean[target].ndcg == pytest.approx(ndcg(scores.mean(axis=1), likeness))
        own = [ndcg(scores[:, seed], likeness) for seed in range(3)]
        assert each[target].ndcg == pytest.approx(np.mean(own))
        for k in (1, 3):
            regret = [regret_at_k(scores[:, seed], likeness, k) for seed in range(3)]
            assert each[target].regret[k] == pytest.approx(np.mean(regret))
            best = best_of_top_k(scores.mean(axis=1), likeness, k)
            assert mean[target].score[k] == pytest.approx(best)
            gain = (best - 72) / 72 if target == "x" else math.nan
            assert mean[target].gain[k] == pytest.approx(gain, nan_ok=True)


def test_fewer_sources_than_k_have_no_regret_at_k():
    entries = [Entry("a", "x", 70.0), Entry("b", "x", 80.0)]
    found = evaluate(make_table(entries), {"x": {"a": 1, "b": 0}})["x"]
    assert (found.sources, found.regret[1]) == (2, 0.125)
    assert math.isnan(found.regret[3])
    assert math.isnan(found.score[3])


def test_a_seed_counts_where_all_sources_have_it():
    entries = [e for e in drawn() if (e.source, e.target, e.seed) != ("b", "x", "1")]
    table = make_table(entries)
    assert table.notes == ("measured with fewer than 3 seeds: b for x",)
    found = evaluate(table, RATING, "each")["x"]
    whole = [[table.scores["x"][s][seed] for s in "abcde"] for seed in "02"]
    assert found.ndcg == pytest.approx(np.mean([ndcg(own, range(5)) for own in whole]))
    apart = [Entry("a", "x", 70.0, "0"), Entry("b", "x", 80.0, "1")]
    with pytest.raises(ValueError, match="x: no seed that all its sources have"):
        evaluate(make_table(apart), {"x": {"a": 1, "b": 0}}, "each")


def test_similarities_that_are_missing_are_named():
    table = make_table(drawn())
    lacking = {"x": RATING["x"], "y": {"a": 1.0, "b": math.nan, "c": 0.0, "d": 1.0}}
    with pytest.raises(ValueError, match=r"no similarity of 2 of 10 pairs .*: b for y, e for y"):
        evaluate(table, lacking)
    with pytest.raises(ValueError, match="seeds is 'all'; allowed: mean, each"):
        evaluate(table, RATING, "all")  # pyright: ignore[reportArgumentType]


# ---- tables --------------------------------------------------------------------------------------


def test_long_and_wide_tables_are_the_same(tmp_path):
    wide, long = tmp_path / "wide.csv", tmp_path / "long.csv"
    wide.write_text("\ufeff# a comment\nfrom,x,size,y\nA,70,100,80\n\nNo_Transfer,60,,\nB,71.5,,\n")
    long.write_text(
        "target,source,score,size\nx,A,70,100\ny,A,80,100\nx,no transfer,60,\nx,B,71.5,\ny,B,,\n"
    )
    entries, sizes = read_table(wide)
    assert entries == [
        Entry("A", "x", 70.0),
        Entry("A", "y", 80.0),
        Entry(NO_TRANSFER, "x", 60.0),
        Entry("B", "x", 71.5),
    ]
    other, other_sizes = read_table(long)
    assert sorted(other, key=str) == sorted(entries, key=str)
    assert sizes == other_sizes == {"A": 100.0}
    long.write_text("source,target,score,seed\nA,x,70,1\nA,x,71,2\nB,x,60,1\nB,x,61,2\n")
    assert make_table(read_table(long)[0]).scores == {
        "x": {"A": {"1": 70.0, "2": 71.0}, "B": {"1": 60.0, "2": 61.0}}
    }


def test_own_tasks_and_missing_pairs_are_told():
    pairs = ["ab", "ac", "ba", "bc", "aa", "ca", "cb", "da"]
    table = make_table([Entry(source, target, 50.0) for source, target in pairs])
    assert sorted(table.pairs()) == [(t, s) for t, s in ("ab", "ac", "ad", "ba", "bc", "ca", "cb")]
    assert table.notes == (
        "left out, a task as its own source: a",
        "not measured, so not ranked for that target: d for b, d for c",
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "table.csv has no rows"),
        ("source,x\n", "table.csv has no rows"),
        ("source,x\nA,good\n", "table.csv, line 2: x is 'good', not a finite number"),
        ("# c\nsource,x\n\nA,nan\n", "table.csv, line 4: x is 'nan', not a finite number"),
        ("source,x\nA,1,2\n", "table.csv, line 2: 3 cells for 2 columns"),
        ("source,x\n,1\n", "table.csv, line 2: no source; no-transfer stands for none"),
        ("source,x,x\nA,1,2\n", "columns without a name, or twice: x"),
        ("source,\nA,1\n", r"columns without a name, or twice: \(empty\)"),
        ("source,size\nA,1\n", "no column of a target"),
        ("source,x,size\nA,1,-4\n", "line 2: size of A is -4: give one number above 0"),
        ("source,target,score,std\nA,x,1,2\n", "unknown columns std; a long table has source"),
        ("source,target,score\nA,,1\n", "line 2: no target"),
        ("source,target,score,size\nA,x,1,2\nA,y,1,3\n", "line 3: size of A is 3"),
    ],
)
def test_files_that_are_no_tables_are_refused(tmp_path, text, reason):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_table(path)


def test_files_that_are_not_there_or_not_text_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing.csv: give a CSV table"):
        read_table(tmp_path / "nothing.csv")
    (tmp_path / "binary.csv").write_bytes(b"source,x\n\xff,1\n")
    with pytest.raises(ValueError, match=r"binary.csv is not UTF-8 text"):
        read_table(tmp_path / "binary.csv")


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([Entry("a", "x", 0.7), Entry("b", "x", 0.8)], "all scores are at most 1: give percent"),
        ([Entry("a", "x", 700.0), Entry("b", "x", 8.0)], "scores such as 700: give percent"),
        ([Entry("a", "x", 70.0)], "needs two sources or more for a target: x"),
        ([Entry(NO_TRANSFER, "x", 70.0)], "needs two sources or more for a target: x"),
        ([], "needs two sources or more"),
        ([Entry("a", "x", 7.0)] * 2, "such as that of a for x: keep one, or tell them apart"),
        ([Entry("a", "x", 7.0, "3")] * 2, "such as that of a for x and seed 3"),
    ],
)
def test_numbers_that_are_no_transfer_are_refused(entries, reason):
    with pytest.raises(ValueError, match=reason):
        make_table(entries)


# ---- the paper -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper():
    """Table 7 as it ships with the package."""
    return make_table(*read_table(PAPER_TABLE))


def test_the_typed_table_has_the_papers_tasks_means_and_best_sources(paper):
    tasks = partition("selection/13_to_10")
    assert tuple(paper.sources) == tasks.source
    assert tuple(paper.scores) == tasks.target
    assert paper.notes == ()
    assert len(paper.pairs()) == 130
    values = {pair: paper.scores[pair[0]][pair[1]][""] for pair in paper.pairs()}
    assert np.mean(list(paper.baseline.values())) == pytest.approx(77.204)  # Table 4: 77.2
    mnli = [value for (_, source), value in values.items() if source == "selection-mnli"]
    assert np.mean(mnli) == pytest.approx(77.584)  # Table 4: 77.58
    assert max(paper.scores["selection-copa"]["selection-cxc"].values()) - 60 == 8  # appendix C
    best = {}
    for target, found in paper.scores.items():
        highest = max(own[""] for own in found.values())
        best[target] = [source for source, own in found.items() if own[""] == highest]
    short = {t[10:]: " ".join(s[10:] for s in own) for t, own in best.items()}
    assert short == {
        "boolq": "qnli squad",
        "cola": "hellaswag",
        "stsb": "hellaswag",
        "wic": "cosmosqa",
        "cr": "qnli",
        "mrpc": "drop",
        "rte": "cosmosqa",
        "wsc": "qqp",
        "copa": "cxc multirc race",
        "cb": "record",
    }
    order = sorted(paper.sizes, key=lambda name: -paper.sizes[name])
    assert order == list(tasks.source)  # Table 2 is in order of size


def test_size_and_random_on_the_published_means(paper):
    """Reference: the authors' sum over their fixed order, and the mean over all sources."""
    code = "mnli qqp qnli record squad cxc drop sst2 winogrande hellaswag multirc race cosmosqa"
    ranks = {f"selection-{name}": -place for place, name in enumerate(code.split())}
    found = evaluate(paper, {target: ranks for target in paper.scores})
    values, regrets = [], []
    for target, of_source in paper.scores.items():
        scores = [of_source[source][""] for source in ranks]
        values.append(paper_dcg(scores) / paper_dcg(sorted(scores)[::-1]))
        assert found[target].ndcg == pytest.approx(values[-1], rel=1e-12)
        regrets.append((max(scores) - np.mean(scores)) / max(scores))
    assert 100 * np.mean(values) == pytest.approx(84.09, abs=0.005)
    for k, wanted in ((1, 1.92), (3, 0.61)):
        regret = 100 * np.mean([own.regret[k] for own in found.values()])
        assert regret == pytest.approx(wanted, abs=0.005)
    chance = evaluate(paper, {target: dict.fromkeys(ranks, 0) for target in paper.scores})
    assert [own.regret[1] for own in chance.values()] == pytest.approx(regrets)
    assert 100 * np.mean([own.ndcg for own in chance.values()]) == pytest.approx(86.54, abs=0.005)


def test_the_random_value_is_the_mean_of_many_draws(paper):
    """The mean over 4,000 random rankings lies within five standard errors."""
    draw = np.random.default_rng(0)
    scores = [own[""] for own in paper.scores["selection-cb"].values()]
    rows = [draw.permutation(scores) for _ in range(4000)]
    ideal = paper_dcg(sorted(scores)[::-1])
    for values, wanted in (
        ([paper_dcg(row) / ideal for row in rows], ndcg(scores, [0] * 13)),
        ([1 - max(row[:3]) / max(scores) for row in rows], regret_at_k(scores, [0] * 13, 3)),
    ):
        assert abs(np.mean(values) - wanted) < 5 * np.std(values) / np.sqrt(len(rows))


def test_the_table_ships_with_the_package():
    assert PAPER_TABLE.parent == Path(read_table.__code__.co_filename).parents[1] / "data"
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '"data/*.csv"' in text
