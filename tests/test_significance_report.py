"""Starts of prompt tuning: which runs count, tests of best against second, curves over K."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import result_line
from scipy.stats import ttest_ind, ttest_rel

from prompt_lab.analysis.plots import Series
from prompt_lab.analysis.report import Row, read_results
from prompt_lab.analysis.significance_report import (
    Correction,
    StartReport,
    compare_runs,
    shot_curves,
    shot_places,
    start_report,
    start_sections,
    with_source_seed,
)
from prompt_lab.commands import offline
from prompt_lab.files.results import RESULT_COLUMNS, read_csv, write_csv

Cells = dict[str, Any]
PLAIN, VECTORS = "vocab 5000", "vectors glue-qnli + glue-mnli"


def line(initialised: str, test: float | None, **given: Any) -> Cells:
    """A line of results of prompt tuning."""
    own = {"task": "scitail", "ontology": "cls/nli", "initialised": initialised, "test": test}
    return result_line(**own | given)


def runs(initialised: str, tests: Iterable[float | None], **given: Any) -> list[Cells]:
    """A line for each seed."""
    return [line(initialised, x, init_seed=seed, **given) for seed, x in enumerate(tests)]


def untuned(initialised: str, test: float, **given: Any) -> Cells:
    """A line of an initial prompt, with the cells that the package leaves empty."""
    empty = dict.fromkeys(
        ("num_virtual_tokens", "order_seed", "learning_rate", "batch_size", "dev")
    )
    return line(initialised, test, variant="initial_prompt", **empty, **given)


def rows_of(folder: Path, lines: Iterable[Cells]) -> list[Row]:
    """Lines through a file, as a report reads them."""
    write_csv(folder / "results.csv", RESULT_COLUMNS, lines)
    return [with_source_seed(row) for row in read_results([folder / "results.csv"])]


def read(folder: Path, lines: Iterable[Cells], correction: Correction = "holm") -> StartReport:
    """The report of some lines."""
    return start_report(rows_of(folder, lines), correction)


def draw(seed: int, count: int, mean: float = 0.5) -> list[float]:
    """Scores of some runs."""
    return np.random.default_rng(seed).normal(mean, 0.05, count).tolist()


# ---- tests of significance -----------------------------------------------------------------------


def test_runs_with_equal_seeds_are_paired_as_in_scipy(tmp_path):
    one, other = draw(0, 5, 0.6), draw(1, 5)
    (found,) = read(tmp_path, [*runs(PLAIN, other), *runs(VECTORS, one)]).contests
    reference: Any = ttest_rel(one, other)
    assert (found.best, found.second, found.t_test.kind) == (VECTORS, PLAIN, "paired")
    assert found.t_test.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert found.t_test.interval == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert found.adjusted == found.t_test.p


def test_runs_with_other_seeds_get_welchs_test(tmp_path):
    one, other = draw(0, 5, 0.6), draw(1, 3)
    (found,) = read(tmp_path, [*runs(PLAIN, other), *runs(VECTORS, one)]).contests
    reference: Any = ttest_ind(one, other, equal_var=False)
    assert (found.t_test.kind, found.t_test.counts) == ("welch", (5, 3))
    assert found.t_test.p == pytest.approx(reference.pvalue, rel=1e-9)


def test_pairs_are_matched_by_seed_and_not_by_place():
    one = {("100", str(seed), "0"): x for seed, x in enumerate((0.1, 0.25, 0.32))}
    other = {unit: one[unit] - 0.1 - 0.01 * int(unit[1]) for unit in reversed(one)}
    assert compare_runs(one, other).difference == pytest.approx(0.11)
    reference: Any = ttest_rel([0.1, 0.25, 0.32], [0.0, 0.14, 0.2])
    assert compare_runs(one, other).p == pytest.approx(reference.pvalue)


def test_as_many_runs_with_other_seeds_are_not_paired():
    one = {("100", "0", "0"): 0.5, ("100", "1", "0"): 0.6}
    other = {("100", "0", "0"): 0.1, ("13", "1", "0"): 0.3}
    assert compare_runs(one, other).kind == "welch"


def test_scores_are_not_rounded(tmp_path):
    """All means print as 0.500."""
    lines = runs(PLAIN, [0.5001, 0.5002, 0.5001]) + runs(VECTORS, [0.50031, 0.50041, 0.50032])
    (found,) = read(tmp_path, lines).contests
    assert found.best == VECTORS
    assert found.adjusted < 1e-3


def test_only_the_two_best_are_tested(tmp_path):
    starts = {PLAIN: 0.3, VECTORS: 0.7, "spot mixture": 0.6}
    lines = [x for at, (k, mean) in enumerate(starts.items()) for x in runs(k, draw(at, 4, mean))]
    (found,) = read(tmp_path, lines).contests
    assert (found.best, found.second) == (VECTORS, "spot mixture")


@pytest.mark.parametrize("correction", ["holm", "bonferroni", "none"])
def test_p_values_are_corrected_over_all_tasks_and_k(tmp_path, correction):
    """References: the definitions; a contest without a test does not count."""
    lines, p = [], []
    for at, (task, shots) in enumerate([("scitail", 5), ("scitail", 16), ("snli", 16)]):
        one, other = draw(at, 6, 0.55 + 0.01 * at), draw(at + 9, 6)
        own = {"task": task, "shots": shots}
        lines += [*runs(PLAIN, other, **own), *runs(VECTORS, one, **own)]
        p.append(ttest_rel(one, other).pvalue)
    lines += [line(x, 0.1 * i, shots=32) for i, x in enumerate((PLAIN, VECTORS))]
    found = read(tmp_path, lines, correction).contests
    known = [one for one in found if not math.isnan(one.t_test.p)]
    assert [one.t_test.reason for one in found if one not in known] == ["fewer than two pairs"]
    order = np.argsort(p)
    steps = np.maximum.accumulate(np.array([3, 2, 1]) * np.array(p)[order])
    holm = dict(zip(order.tolist(), steps.tolist(), strict=True))
    expected = {
        "holm": [min(1, holm[at]) for at in range(3)],
        "bonferroni": [min(1, 3 * x) for x in p],
        "none": p,
    }
    assert [one.adjusted for one in known] == pytest.approx(expected[correction])


def test_a_missing_score_leaves_out_its_pair(tmp_path):
    lines = [*runs(PLAIN, [0.1, 0.2, 0.3]), *runs(VECTORS, [0.5, 0.7, None])]
    (found,) = read(tmp_path, lines).contests
    assert (found.t_test.counts, found.t_test.missing) == ((2, 2), (1, 1))


# ---- which runs count ----------------------------------------------------------------------------


def test_dev_chooses_among_learning_rates(tmp_path):
    lines = [*runs(PLAIN, [0.1, 0.2]), *runs(VECTORS, [0.5, 0.6])]
    lines += runs(VECTORS, [0.9, 0.9], learning_rate=0.1, dev=0.4)
    (panel,) = read(tmp_path, lines).panels
    assert list(panel.scores["16"][VECTORS].values()) == [0.5, 0.6]


def test_prompts_of_several_source_seeds_are_one_start(tmp_path):
    files = [f"file runs/x/prompts/glue-mnli_13_seed{s}_lr0.3_bs8.safetensors" for s in range(3)]
    lines = [line(file, 0.1 * at) for at, file in enumerate(files)] + runs(PLAIN, [0.7, 0.8, 0.9])
    found = read(tmp_path, lines)
    assert found.starts == ["prompt of glue-mnli", PLAIN]
    assert list(found.panels[0].scores["16"]["prompt of glue-mnli"].values()) == [0, 0.1, 0.2]
    assert found.contests[0].t_test.kind == "paired"


@pytest.mark.parametrize(
    ("text", "start", "seed"),
    [
        ("file a/trec_100_seed3_lr0.1_bs8.safetensors", "prompt of a/trec", "3"),
        ("file trec_100_seed-3.safetensors", "prompt of trec", "-3"),
        ("file a_seed1/trec_seed2.safetensors", "prompt of a_seed1/trec", "2"),
        ("file a_seed1/prompt.safetensors", "file a_seed1/prompt.safetensors", "0"),
        ("file runs/store", "file runs/store", "0"),
        (VECTORS, VECTORS, "0"),
    ],
)
def test_the_name_of_a_source_file_tells_start_and_seed(tmp_path, text, start, seed):
    (row,) = rows_of(tmp_path, [line(text, 0.5)])
    assert (row.cells["initialised"], row.cells["init_seed"]) == (start, seed)


def test_starts_of_one_name_keep_their_folders(tmp_path):
    lines = [x for a in "ab" for x in runs(f"file {a}/trec_100_seed0.safetensors", [0.5])]
    lines += [x for a in "ab" for x in runs(f"file {a}/trec_100_seed1.safetensors", [0.5])]
    assert read(tmp_path, lines).starts == ["prompt of a/trec", "prompt of b/trec"]


def test_attempt_is_a_start(tmp_path):
    own = {"method": "Attempt", "variant": "attempt"}
    lines = [*runs(PLAIN, [0.1, 0.2]), *runs(PLAIN, [0.5, 0.6], **own)]
    assert read(tmp_path, lines).starts == [PLAIN, "attempt"]
    lines += runs("spot mixture", [0.5, 0.6], **own)
    assert read(tmp_path, lines).starts == [PLAIN, f"attempt, {PLAIN}", "attempt, spot mixture"]


def test_repeated_runs_are_noted(tmp_path):
    lines = [*runs(PLAIN, [0.1, 0.2]), *runs(VECTORS, [0.5, 0.6])]
    again = runs(VECTORS, [0.7, 0.8], fit_id="b2")
    (note,) = read(tmp_path, [*lines, *again]).notes
    assert note.startswith("2 runs have the start, task, K, sample, seeds")


@pytest.mark.parametrize("column", ["backbone", "num_virtual_tokens", "decoding"])
def test_unlike_settings_are_not_compared(tmp_path, column):
    lines = [*runs(PLAIN, [0.1, 0.2], **{column: "7"}), *runs(VECTORS, [0.5, 0.6])]
    assert not read(tmp_path, lines).panels
    lines += [*runs(PLAIN, [0.1, 0.3]), *runs(VECTORS, [0.5, 0.6], **{column: "7"})]
    labels = [panel.label for panel in read(tmp_path, lines).panels]
    assert len(labels) == 2
    assert all(label.startswith("scitail, ") for label in labels)


def test_one_start_or_single_runs_are_no_comparison(tmp_path):
    one = [*runs(PLAIN, [0.1, 0.2]), untuned(PLAIN, 0.0)]
    singles = [line(PLAIN, 0.1), line(VECTORS, 0.2)]
    subspace = [*runs(PLAIN, [0.1, 0.2]), *runs(VECTORS, [0.3, 0.4], intrinsic_dim=8)]
    for lines in (one, singles, subspace):
        found = read(tmp_path, lines)
        assert not found.panels
        assert not list(start_sections(found))


# ---- K -------------------------------------------------------------------------------------------


def test_k_is_in_order_and_0_are_the_initial_prompts(tmp_path):
    lines = [x for k in ("all", 100, 5) for x in runs(PLAIN, [0.4, 0.6], shots=k)]
    for k in (5, 100):  # the same initial prompts are tested with every K
        lines += [untuned(PLAIN, 0.1 + 0.1 * seed, init_seed=seed, shots=k) for seed in (0, 1)]
    lines.append(untuned("another start", 0.9))
    (panel,) = read(tmp_path, lines).panels
    assert list(panel.scores) == ["0", "5", "100", "all"]
    assert panel.scores["0"] == {PLAIN: {("0",): 0.1, ("1",): 0.2}}


def test_initial_prompts_of_unknown_length_are_left_out(tmp_path):
    lines = [x for n in (10, 20) for k in (5, 9) for x in runs(PLAIN, [0.4, 0.6], shots=k)]
    lines = [x | {"num_virtual_tokens": n} for n in (10, 20) for x in lines[:4]]
    found = read(tmp_path, [*lines, untuned(PLAIN, 0.1)])
    assert [list(panel.scores) for panel in found.panels] == [["5", "9"]] * 2


def test_another_k_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shots is 'many', neither a number nor all"):
        read(tmp_path, [line(PLAIN, 0.1, shots="many"), line(VECTORS, 0.2)])


@pytest.mark.parametrize(
    ("shots", "places"),
    [
        (["1", "10", "1000"], [0, 1, 3]),
        (["0", "10", "100", "all"], [0.5, 1, 2, 2.5]),
        (["0", "all"], [-0.5, 0.5]),
    ],
)
def test_k_stands_at_its_logarithm(shots, places):
    assert shot_places(shots) == pytest.approx(places)


def test_curves_show_the_values_and_skip_what_is_missing():
    series = [Series("a", [0.1, math.nan, 0.3], [0.01] * 3), Series("b", [0.2] * 3, [math.nan] * 3)]
    axes = shot_curves(["0", "10", "all"], series, "test ACC").axes[0]
    drawn = [list(map(float, np.asarray(lines[0].get_ydata()))) for lines in axes.containers]
    assert drawn == [[0.1, 0.3], [0.2, 0.2, 0.2]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "10", "all"]


@pytest.mark.parametrize("series", [[], [Series("a", [0.1], [0.1])]])
def test_curves_of_nothing_or_of_another_length_are_refused(series: Sequence[Series]):
    with pytest.raises(ValueError, match=r"nothing to draw|give one of each per K"):
        shot_curves(["5", "16"], series, "test ACC")


# ---- the command ---------------------------------------------------------------------------------


def test_the_report_has_marks_tables_and_curves(tmp_path, capsys):
    lines = [untuned(PLAIN, 0.01), untuned(VECTORS, 0.02)]
    for at, k in enumerate((5, 16, "all")):
        lines += [*runs(PLAIN, draw(at, 5, 0.4), shots=k), *runs(VECTORS, draw(9, 5, 0.9), shots=k)]
    write_csv(tmp_path / "runs/results.csv", RESULT_COLUMNS, lines)
    out = tmp_path / "out"
    assert offline.run(["report", str(tmp_path / "runs"), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "## Best start against second best" in text
    assert "corrected after Holm over the 3 tests" in text
    assert "** *" in text
    assert {"starts-scitail.png", "starts-scitail.svg"} <= {path.name for path in out.iterdir()}
    tests = read_csv(out / "significance.csv")
    assert [row["shots"] for row in tests] == ["0", "5", "16", "all"]
    assert tests[0]["reason"] == "fewer than two pairs"
    assert all(float(row["p_corrected"]) <= 0.05 for row in tests[1:])
    scores = read_csv(out / "starts.csv")
    five = next(x for x in scores if (x["shots"], x["start"]) == ("5", PLAIN))
    assert float(five["mean"]) == pytest.approx(np.mean(draw(0, 5, 0.4)), rel=1e-14)
    assert float(five["std"]) == pytest.approx(np.std(draw(0, 5, 0.4), ddof=1), rel=1e-12)
    assert five["runs"] == "5"


def test_an_unknown_correction_is_refused(tmp_path, capsys):
    write_csv(tmp_path / "results.csv", RESULT_COLUMNS, runs(PLAIN, [0.5]))
    words = ["report", str(tmp_path), "--out", str(tmp_path / "o"), "--correction", "sidak"]
    with pytest.raises(SystemExit):
        offline.run(words)
    assert "allowed: holm, bonferroni, none" in capsys.readouterr().err
