"""Tables of task prompt vectors from result files, against NumPy and SciPy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import result_line
from scipy.stats import ttest_rel

from prompt_lab.analysis.report import read_results
from prompt_lab.analysis.significance_report import Correction
from prompt_lab.analysis.vectors_report import (
    VectorReport,
    draw_vectors,
    norm_ratio,
    vector_report,
    vector_sections,
    vector_tables,
)
from prompt_lab.commands import offline
from prompt_lab.files.prompts import Prompt, save_prompt
from prompt_lab.files.results import RESULT_COLUMNS, read_csv, write_csv

Cells = dict[str, Any]
TASKS = ("sst", "trec")
SEEDS = (0, 1, 2)


def line(variant: str, task: str, test: float | None, **given: Any) -> Cells:
    """A line of results of VectorArithmetic."""
    is_sum = variant != "initial_prompt"
    cells = dict.fromkeys(("order_seed", "optimizer", "learning_rate", "batch_size"))
    cells |= {"method": "VectorArithmetic", "variant": variant, "task": task, "test": test}
    cells |= {"ontology": "cls/other", "expression": task if is_sum else "", "scale": int(is_sum)}
    cells = result_line(**cells | given)
    return {"prompt_file": f"prompts/{variant}-{task}.safetensors", **cells}


def read(folder: Path, rows: Iterable[Cells], correction: Correction = "holm") -> VectorReport:
    """The report of some lines, through a file."""
    write_csv(folder / "results.csv", RESULT_COLUMNS, rows)
    return vector_report(read_results([folder / "results.csv"]), correction)


def scores(*key: int) -> np.ndarray:
    """Scores (seeds, seeds) of a task; those of the diagonal are higher."""
    return np.random.default_rng(key).uniform(0.2, 0.6, (3, 3)) + 0.3 * np.eye(3)


def crossed(**given: Any) -> list[Cells]:
    """A cross study of two tasks and three seeds, without the initial prompts of other tasks."""
    rows = []
    for at, task in enumerate(TASKS):
        tests = scores(at)
        for i, j in product(SEEDS, SEEDS):
            if i != j:
                start = {"initialised": f"vocab 5000 seed {j}", "init_seed": i}
                rows.append(line("vectors", task, tests[i, j], **start, **given))
        for i in SEEDS:
            rows.append(line("single", task, tests[i, i], init_seed=i, **given))
            rows.append(line("initial_prompt", task, 0.1 * i, init_seed=i, **given))
            alone = {"initialised": "zeros", "init_seed": i}
            rows.append(line("vector_alone", task, 0.2 + 0.1 * i, **alone, **given))
    return rows


def pair(seeds: Iterable[int] = SEEDS, single: float = 0.8, **given: Any) -> list[Cells]:
    """A pair, with scores 0.4 + 0.1 * seed on the first and 0.1 on the second task."""
    rows = []
    for seed in seeds:
        own = {"init_seed": seed, **given}
        for task, test in zip(TASKS, (0.4 + 0.1 * seed, 0.1), strict=True):
            rows.append(
                line("vectors", task, test, expression="sst + trec", scale=0.5 + 0.1 * seed, **own)
            )
            rows.append(line("single", task, single + 0.05 * seed, **own))
            rows.append(line("initial_prompt", task, 0.2, **own))
    return rows


# ---- vectors on other initial prompts ------------------------------------------------------------


def test_own_and_other_initial_prompts_are_averaged_as_in_numpy(tmp_path):
    found = read(tmp_path, crossed()).crossed
    assert [one.task for one in found] == list(TASKS)
    for at, one in enumerate(found):
        tests = scores(at)
        apart = tests[~np.eye(3, dtype=bool)]
        assert one.own.mean == pytest.approx(np.diag(tests).mean(), rel=1e-12)
        assert one.own.std == pytest.approx(np.diag(tests).std(ddof=1), rel=1e-12)
        assert one.other.mean == pytest.approx(apart.mean(), rel=1e-12)
        assert one.other.std == pytest.approx(apart.std(ddof=1), rel=1e-12)
        assert (one.own.count, one.other.count, one.seeds) == (3, 6, 3)
        assert one.initial.mean == pytest.approx(0.1)
        assert one.alone.mean == pytest.approx(0.3)
        assert one.chosen.count == 0


def test_the_test_is_paired_over_vectors_and_corrected_over_tasks(tmp_path):
    """Reference: SciPy, on each vector's mean over the other initial prompts; Holm by hand."""
    p_values = []
    found = read(tmp_path, crossed()).crossed
    for at, one in enumerate(found):
        tests = scores(at)
        others = (tests.sum(1) - np.diag(tests)) / 2
        reference = ttest_rel(others, np.diag(tests))
        assert one.t_test.statistic == pytest.approx(reference.statistic, rel=1e-9)
        assert one.t_test.p == pytest.approx(reference.pvalue, rel=1e-9)
        assert one.t_test.counts == (3, 3)
        p_values.append(reference.pvalue)
    low, high = np.argsort(p_values)
    assert found[low].adjusted == pytest.approx(2 * p_values[low])
    assert found[high].adjusted == pytest.approx(max(2 * p_values[low], p_values[high]))
    plain = read(tmp_path, crossed(), "none").crossed
    assert [one.adjusted for one in plain] == pytest.approx(p_values)


def test_a_lambda_chosen_on_the_own_initial_prompt_stands_apart(tmp_path):
    own = {"initialised": "vocab 5000 seed 1", "init_seed": 1, "scale": 0.5}
    found = read(tmp_path, [*crossed(), line("vectors", "sst", 0.77, **own)])
    assert (found.crossed[0].chosen.mean, found.crossed[0].other.count) == (0.77, 6)
    header, lines = next(vector_sections(found))[2]
    assert lines[0][header.index("own, lambda by dev")] == "0.770 (1)"
    assert lines[1][header.index("own, lambda by dev")] == "-"


def test_without_scores_there_is_no_test_and_it_is_said(tmp_path):
    rows = [row | {"test": None} if row["variant"] == "single" else row for row in crossed()]
    found = read(tmp_path, rows)
    assert math.isnan(found.crossed[0].own.mean)
    tables = {name: list(rows) for name, _, rows in vector_tables(found)}
    other = next(row for row in tables["vectors-cross.csv"] if row["kind"] == "other")
    assert other["reason"] == "fewer than two pairs"


def test_the_ratio_of_norms_is_read_from_the_prompt_files(tmp_path):
    prompt, init = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "prompts" / "single-sst.safetensors"
    save_prompt(path, Prompt(prompt, init, "x", "b", "d", "t"))
    a, b = prompt.numpy().astype(np.float64), init.numpy().astype(np.float64)
    ratio = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert norm_ratio(str(path)) == pytest.approx(ratio, rel=1e-12)
    sst, trec = read(tmp_path, crossed()).crossed
    assert sst.ratio.mean == pytest.approx(ratio)
    assert trec.ratio.count == 0


def test_a_missing_prompt_file_has_no_ratio_and_a_damaged_one_is_told(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"bad.safetensors: damaged"):
        norm_ratio(str(tmp_path / "bad.safetensors"))
    assert math.isnan(norm_ratio("nowhere.safetensors"))
    assert math.isnan(norm_ratio(""))


# ---- sums ----------------------------------------------------------------------------------------


def test_shares_are_ratios_of_means_and_their_spread_is_over_seeds(tmp_path):
    (found,) = read(tmp_path, pair()).pairs
    first, second = found.tasks
    sums, tuned = np.array([0.4, 0.5, 0.6]), np.array([0.8, 0.85, 0.9])
    assert first.share == pytest.approx(sums.mean() / tuned.mean(), rel=1e-12)
    assert first.share_std == pytest.approx((sums / tuned).std(ddof=1), rel=1e-9)
    assert (first.share_cells, first.initial_share) == (3, pytest.approx(0.2 / 0.85))
    assert second.share == pytest.approx(0.1 / 0.85)
    assert found.kept is False
    assert (first.scale.mean, first.scales) == (pytest.approx(0.6), (0.5, 0.7))


@pytest.mark.parametrize(("single", "kept"), [(0.199, True), (0.2, True), (0.201, False)])
def test_a_pair_is_kept_from_half_of_both_scores_on(tmp_path, single, kept):
    (found,) = read(tmp_path, pair([0], single)).pairs
    assert found.kept is kept


def test_a_seed_without_a_tuned_prompt_is_not_in_the_share(tmp_path):
    rows = [x for x in pair() if (x["variant"], x["init_seed"]) != ("single", 2)]
    ((first, _),) = (found.tasks for found in read(tmp_path, rows).pairs)
    assert first.share == pytest.approx(0.45 / 0.825)
    assert (first.score.count, first.share_cells) == (3, 2)


def test_a_tuned_prompt_of_score_zero_gives_no_share_and_a_note(tmp_path):
    found = read(tmp_path, pair([0], 0.0))
    assert math.isnan(found.pairs[0].tasks[0].share)
    assert found.pairs[0].kept is None
    assert "sst + trec on sst: no share, reference zero." in found.notes


def test_an_expression_tells_what_it_does_to_each_task(tmp_path):
    rows = [
        line("vectors", task, test, expression="trec - sst")
        for task, test in (("sst", 0.3), ("trec", 0.6), ("rte", 0.5))
    ]
    rows += [line("initial_prompt", "sst", 0.5), line("single", "sst", 0.9)]
    found = {one.task: one for one in read(tmp_path, rows).expressions}
    assert {task: one.role for task, one in found.items()} == {
        "trec": "added",
        "sst": "taken away",
        "rte": "not in it",
    }
    assert (found["sst"].initial.mean, found["sst"].single.mean) == (0.5, 0.9)
    assert found["rte"].single.count == 0
    ((title, _, (header, lines)),) = vector_sections(read(tmp_path, rows))
    assert title == "Other sums of task prompt vectors"
    cells = dict(zip(header, lines[1], strict=True))
    assert (cells["less initial"], cells["less tuned"]) == ("-0.200", "-0.600")


@pytest.mark.parametrize(
    ("expression", "tasks", "pairs"),
    [
        ("sst + trec", ("sst", "trec"), 1),
        ("sst + trec", ("sst", "trec", "rte"), 0),
        ("sst + trec", ("sst",), 0),
        ("0.5 * sst + 0.5 * trec", ("sst", "trec"), 0),
        ("sst - trec", ("sst", "trec"), 0),
    ],
)
def test_only_two_whole_vectors_on_just_their_tasks_are_a_pair(tmp_path, expression, tasks, pairs):
    rows = [line("vectors", task, 0.5, expression=expression) for task in tasks]
    found = read(tmp_path, rows)
    assert (len(found.pairs), len(found.expressions)) == (pairs, 0 if pairs else len(tasks))


# ---- several tests -------------------------------------------------------------------------------


def test_tests_are_kept_apart_and_named_by_folder(tmp_path):
    for name in ("one", "two"):
        write_csv(tmp_path / name / "results.csv", RESULT_COLUMNS, pair(fit_id=name))
    write_csv(tmp_path / "other/two/results.csv", RESULT_COLUMNS, pair(single=0.5, fit_id="b3"))
    files = [tmp_path / name / "results.csv" for name in ("one", "two", "other/two")]
    found = vector_report(read_results(files))
    assert [one.test for one in found.pairs] == ["one", "two two", "two b3"]
    assert found.pairs[2].tasks[0].single.mean == pytest.approx(0.55)
    assert next(vector_sections(found))[2][1][0][0] == "sst + trec (one)"


def test_a_sum_that_was_tested_twice_counts_once(tmp_path):
    again = line("vectors", "sst", 0.9, expression="sst + trec", scale=0.5)
    found = read(tmp_path, [*pair(), again])
    assert found.pairs[0].tasks[0].score.mean == pytest.approx(0.5)
    assert found.notes == [
        "VectorArithmetic: 1 score of sums that the same test has another score of; the first "
        "counts."
    ]


def test_results_of_other_methods_give_nothing(tmp_path):
    found = read(tmp_path, [line("tuned", "sst", 0.5, method="PromptTuning")])
    assert found == VectorReport()
    assert not list(vector_sections(found))
    assert not draw_vectors(found, tmp_path)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scale": "much"}, "scale is 'much', not a number"),
        ({"expression": "sst +"}, "a name is expected"),
        ({"expression": ""}, "the expression is empty"),
    ],
)
def test_cells_that_cannot_be_read_are_refused(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path, [line("vectors", "sst", 0.5, **changes)])


def test_results_without_the_columns_are_refused(tmp_path):
    columns = [name for name in RESULT_COLUMNS if name != "expression"]
    write_csv(tmp_path / "results.csv", columns, [line("vectors", "sst", 0.5)])
    with pytest.raises(ValueError, match="lack the columns expression and scale"):
        vector_report(read_results([tmp_path / "results.csv"]))


# ---- the command ---------------------------------------------------------------------------------


def test_the_report_has_tables_figures_and_unrounded_numbers(tmp_path, capsys):
    expressions = [line("vectors", "sst", 1 / 3, expression="- sst", scale=0.7)]
    write_csv(
        tmp_path / "runs/results.csv", RESULT_COLUMNS, [*crossed(), *pair(fit_id="b"), *expressions]
    )
    out = tmp_path / "out"
    words = ["report", str(tmp_path / "runs"), "--out", str(out), "--correction", "bonferroni"]
    assert offline.run(words) == 0
    text = capsys.readouterr().out
    for title in ("on other initial prompts", "Sums of two", "Other sums"):
        assert title in text
    assert "corrected after Bonferroni" in text
    assert "vector arithmetic, single" in text
    assert "vector arithmetic, vectors" not in text
    names = {path.name for path in out.iterdir()}
    assert names >= {f"vectors-{x}.csv" for x in ("cross", "pairs", "expressions")}
    assert names >= {f"vectors-{x}.{y}" for x in ("cross", "pairs") for y in ("png", "svg")}
    (row,) = read_csv(out / "vectors-expressions.csv")
    assert (float(row["score"]), row["vector"]) == (1 / 3, "taken away")
    rows = read_csv(out / "vectors-cross.csv")
    other = next(x for x in rows if (x["task"], x["kind"]) == ("sst", "other"))
    apart = scores(0)[~np.eye(3, dtype=bool)]
    assert float(other["mean"]) == pytest.approx(apart.mean(), rel=1e-14)
    assert float(other["p_corrected"]) == pytest.approx(min(1, 2 * float(other["p"])), rel=1e-12)
    assert (other["prompts"], other["vectors"]) == ("6", "3")


def test_many_pairs_stand_on_several_pages(tmp_path):
    rows = []
    for at in range(21):
        rows += [
            line(variant, task, 0.5, expression=f"sst + t{at}" if variant == "vectors" else task)
            for variant in ("vectors", "single")
            for task in ("sst", f"t{at}")
        ]
    found = read(tmp_path, rows)
    names = [path.name for path in draw_vectors(found, tmp_path)]
    assert names == [f"vectors-pairs-{page}.{kind}" for page in (1, 2) for kind in ("png", "svg")]
