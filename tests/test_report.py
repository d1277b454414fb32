"""Reports from result files: choice by dev, means, comparisons and notes, against plain loops."""

from __future__ import annotations

import csv
import math
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import result_line
from lightning.pytorch import Trainer

from prompt_lab.analysis.report import (
    NEEDED,
    Line,
    compare,
    find_reference,
    find_results,
    make_lines,
    mean_score,
    read_results,
    upstream_of,
)
from prompt_lab.commands import offline
from prompt_lab.commands.report_command import (
    make_report,
    markdown,
    report_command,
    table_rows,
    task_rows,
)
from prompt_lab.core.backbone import Backbone
from prompt_lab.data.crossfit import CrossFitDataModule
from prompt_lab.data.partitions import partition
from prompt_lab.files.results import RESULT_COLUMNS, read_csv, summary_table, write_csv
from prompt_lab.methods.prompt_tuning import PromptTuning

Cells = dict[str, Any]

ONTOLOGY = {
    "glue-sst2": "cls/sentiment analysis",
    "boolq": "qa/binary",
    "aeslc": "cg/summarization",
    "mine": "custom",
}


def row(**given: Any) -> Cells:
    """A line of results of prompt tuning."""
    cells = result_line(**{"task": "boolq", "sample": 13} | given)
    return {"ontology": ONTOLOGY[cells["task"]], **cells}


def baseline(variant: str, **given: Any) -> Cells:
    """A line of results of what is not tuned, with the cells that the package leaves empty."""
    empty = ("init_seed", "order_seed", "initialised", "num_virtual_tokens", "optimizer")
    empty += ("learning_rate", "batch_size", "dev", "status")
    return row(**{**dict.fromkeys(empty), "variant": variant, **given})


def grid(method: str, seed: int, tasks: Iterable[str] = ONTOLOGY, **given: Any) -> list[Cells]:
    """Runs with made-up scores: tasks x 3 samples x 2 seeds x 2 rates x 2 batch sizes.

    One sample has a single seed, so that a mean over seeds and then samples is not one over all.
    """
    rng = random.Random(seed)
    return [
        row(
            method=method,
            task=task,
            sample=sample,
            init_seed=init_seed,
            learning_rate=rate,
            batch_size=size,
            dev=round(rng.uniform(0, 1), 1),  # with ties
            test=rng.uniform(0.1, 1),
            **given,
        )
        for task in tasks
        for sample in (13, 21, 42)
        for init_seed in ((0,) if sample == 42 else (0, 1))
        for rate in (0.3, 0.1)
        for size in (8, 4)
    ]


def naive_scores(rows: Sequence[Cells]) -> dict[str, float]:
    """Score by task of the runs of one method: the rule of the report as plain loops."""
    scores = {}
    for task in {r["task"] for r in rows}:
        sample_means = []
        for sample in {r["sample"] for r in rows if r["task"] == task}:
            tests = []
            for seed in {
                r["init_seed"] for r in rows if (r["task"], r["sample"]) == (task, sample)
            }:
                wanted = (task, sample, seed)
                runs = [r for r in rows if (r["task"], r["sample"], r["init_seed"]) == wanted]
                best = max(r["dev"] for r in runs)
                runs = [r for r in runs if r["dev"] == best]
                lowest = min(r["learning_rate"] for r in runs)
                runs = [r for r in runs if r["learning_rate"] == lowest]
                tests.append(min(runs, key=lambda r: r["batch_size"])["test"])
            sample_means.append(sum(tests) / len(tests))
        scores[task] = sum(sample_means) / len(sample_means)
    return scores


def write(path: Path, rows: Sequence[Cells]) -> Path:
    write_csv(path, RESULT_COLUMNS, rows)
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., dict[str, Line]]:
    """Writes rows to a file, reads them and gives the lines by label."""

    def make(*rows: Cells) -> dict[str, Line]:
        path = write(tmp_path / "results.csv", rows)
        return {line.label: line for line in make_lines(read_results([path]))}

    return make


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., str]:
    """Writes rows to a file and gives the report on them as Markdown."""

    def make(*rows: Cells, **settings: Any) -> str:
        path = write(tmp_path / "results.csv", rows)
        return markdown(make_report([path], **settings))

    return make


def cells(text: str, title: str) -> dict[str, dict[str, str]]:
    """A table of the Markdown: by first cell and column."""
    lines = text.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()
    header, _, *rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines]
    return {r[0]: dict(zip(header, r, strict=True)) for r in rows}


def notes(text: str) -> list[str]:
    return text.split("## Notes\n\n")[1].splitlines() if "## Notes" in text else []


# ---- choice and means ----------------------------------------------------------------------------


def test_scores_are_those_of_plain_loops(lines):
    """Reference: the rule as nested loops; choice by dev, then mean over seeds, then samples."""
    rows = grid("PromptTuning", 0)
    random.Random(1).shuffle(rows)
    line = lines(*rows)["prompt tuning"]
    expected = naive_scores(rows)
    assert {t: r.score for t, r in line.tasks.items()} == pytest.approx(expected, rel=1e-12)
    mean = mean_score(line)
    assert mean.value == pytest.approx(statistics.mean(expected.values()), rel=1e-12)
    assert (mean.tasks, mean.runs) == (4, 4 * 5)
    spreads = [statistics.stdev(result.tests) for result in line.tasks.values()]
    assert mean.std == pytest.approx(statistics.mean(spreads), rel=1e-12)


def test_ties_go_to_the_lower_rate_as_a_number_then_to_the_smaller_batch(lines):
    """As text, 1e-05 would come after 0.3."""
    rows = [
        row(learning_rate=0.3, batch_size=4, test=0.1),
        row(learning_rate=1e-05, batch_size=16, test=0.2),
        row(learning_rate=1e-05, batch_size=8, test=0.3),
        row(learning_rate=1e-06, batch_size=8, test=0.4, dev=0.4),
    ]
    for order in (rows, rows[::-1]):
        assert lines(*order)["prompt tuning"].tasks["boolq"].score == 0.3


def test_a_run_without_dev_score_loses_and_a_choice_among_such_is_noted(lines, report):
    rows = [row(dev=None, learning_rate=0.1, test=0.9), row(dev=-0.5, test=0.1)]
    assert lines(*rows)["prompt tuning"].tasks["boolq"].score == 0.1
    assert not notes(report(*rows))
    rows[1]["dev"] = math.nan
    assert lines(*rows)["prompt tuning"].tasks["boolq"].score == 0.9
    assert notes(report(*rows)) == [
        "- prompt tuning: no dev score to choose by, so the lowest learning rate, on 1 task "
        "(boolq)."
    ]


def test_runs_without_test_score_are_left_out_of_means_counted_and_named(lines, report):
    rows = [row(test=0.2), row(sample=21, test=None), row(task="aeslc", test=None)]
    line = lines(*rows)["prompt tuning"]
    mean = mean_score(line)
    assert (mean.value, mean.tasks, mean.runs) == (0.2, 1, 1)
    (note,) = notes(report(*rows))
    assert "2 runs that count have no score, on 2 tasks (boolq, aeslc)" in note


def test_failed_runs_are_counted_and_keep_their_score(report):
    rows = [
        row(status="failed: loss not finite", dev=0.6, test=0.7),
        row(sample=21, status="diverged", dev=0.1, test=0.2),
        row(sample=21, learning_rate=0.1, test=0.3),
        row(sample=42, status="training", test=0.5),
        row(sample=87, status="stopped early", test=0.5),
    ]
    text = report(*rows)
    found = cells(text, "All tasks")["prompt tuning"]
    assert (found["runs"], found["failed"], found["mean"]) == ("5", "2", "0.500 (1/4)")
    assert any("2 of 5 runs failed" in n and "1 of them count, on 1 task" in n for n in notes(text))
    assert any("1 of 5 runs were tested before their end" in note for note in notes(text))


# ---- lines ---------------------------------------------------------------------------------------


def test_settings_tell_lines_apart_only_where_one_task_has_several(lines):
    """K and the way of answering belong to the task, but not where one task has two of them."""
    rows = [row(), row(task="aeslc", shots=32, decoding="generate beams=1 tokens=8")]
    assert list(lines(*rows)) == ["prompt tuning"]
    assert set(lines(*rows, row(shots=64))) == {
        "prompt tuning, K 16",
        "prompt tuning, K 32",
        "prompt tuning, K 64",
    }
    assert set(lines(row(), row(num_virtual_tokens=10))) == {
        "prompt tuning, N 100",
        "prompt tuning, N 10",
    }
    assert set(lines(row(), row(backbone="gpt2"))) == {
        "prompt tuning, backbone t5-base",
        "prompt tuning, backbone gpt2",
    }


def test_settings_that_differ_between_tasks_are_noted(report):
    (note,) = notes(report(row(), row(task="aeslc", num_virtual_tokens=20)))
    assert note == "- prompt tuning: num virtual tokens differs within the line: 100, 20."


def test_lines_of_a_dimension_stand_in_its_order_and_beside_the_method_without(lines):
    rows = [row(intrinsic_dim=size) for size in (100, 5, None, 50)]
    rows += [row(method="IntrinsicSubspace", intrinsic_dim=5), row(method="FineTuning")]
    found = lines(*rows)
    assert list(found) == [
        "fine tuning",
        "intrinsic subspace, dim 5",
        "prompt tuning",
        *(f"prompt tuning, dim {size}" for size in (5, 50, 100)),
    ]
    assert found["prompt tuning, dim 5"].family == "prompt tuning, subspace"
    assert found["intrinsic subspace, dim 5"].family == "intrinsic subspace"


def test_subspaces_of_two_fits_are_two_families_over_all_dimensions(lines, report):
    """Names of source prompts and of files per dimension tell no lines apart; folders do."""
    rows = [row()]
    for size in (5, 10):
        for sample in (13, 21):
            given: Cells = {"intrinsic_dim": size, "sample": sample}
            source = f"reconstruction of boolq_{sample}_seed0_lr0.3_bs8"
            given_ = {**given, "method": "IntrinsicSubspace", "initialised": source}
            rows += [row(**given_, variant="reconstructed")]
            rows += [row(**given_, variant="reconstructed_unseen", task="aeslc")]
            for fit in ("a", "b"):
                words = f"codes std 0.05 in {fit}/5/subspace_{size}.safetensors"
                rows.append(row(**given, variant="subspace", initialised=words))
            words = "codes std 0.05 in random subspace seed 5"
            rows.append(row(**given, variant="random_subspace", initialised=words))
    found = lines(*rows)
    within = "prompt tuning, subspace, initialised codes std 0.05 in {}/5/subspace_I.safetensors"
    expected = [within.format("a"), within.format("b"), "prompt tuning, random subspace"]
    expected += [f"intrinsic subspace, reconstructed{word}" for word in ("", " unseen")]
    assert set(found) == {"prompt tuning"} | {f"{x}, dim {n}" for x in expected for n in (5, 10)}
    assert {line.family for line in found.values()} == {"prompt tuning", *expected}
    assert not any("within the line" in note for note in notes(report(*rows)))


def test_starts_from_learned_prompts_are_lines_of_their_own(lines, report):
    """Even where no task has several starts; other starts are told apart as without them."""
    learned = "maml mpt/cls_to_cls/source"
    rows = [row(), row(task="aeslc", initialised="labels 5000")]
    rows += [row(task="glue-sst2", initialised=learned)]
    found = lines(*rows, row(initialised=learned), row(initialised="reptile top 5"))
    assert list(found) == [
        "prompt tuning",
        f"prompt tuning, {learned}",
        "prompt tuning, reptile top 5",
    ]
    assert set(found["prompt tuning"].tasks) == {"boolq", "aeslc"}
    assert found[f"prompt tuning, {learned}"].upstream == ("maml", "mpt/cls_to_cls/source")
    assert found["prompt tuning"].upstream is None
    assert list(lines(*rows[2:])) == [f"prompt tuning, {learned}"]
    assert set(lines(*rows, baseline("initial_prompt", initialised=learned))) == {
        *("prompt tuning", f"prompt tuning, {learned}"),
        f"prompt tuning, initial prompt, {learned}",
    }
    (note,) = [n for n in notes(report(*rows)) if "within the line" in n]
    assert note.startswith("- prompt tuning: initialised differs")


@pytest.mark.parametrize("words", ["vocab 5000", "maml", "maml ", "mamls x", "file maml x", ""])
def test_other_starts_are_not_learned_ones(words):
    assert upstream_of(words) is None


def test_a_method_as_a_reference_is_without_learned_prompts(lines):
    found = list(lines(row(), row(initialised="maml x")).values())
    references = find_reference("prompt_tuning", found)
    assert references["prompt tuning, maml x"].label == "prompt tuning"
    named = find_reference("prompt tuning, maml x", found)
    assert named["prompt tuning"].label == "prompt tuning, maml x"
    with pytest.raises(ValueError, match="there are: prompt tuning, maml x"):
        find_reference("prompt_tuning", found[1:])


def test_baselines_of_several_fits_and_methods_are_one_line(lines):
    rows = [row(), row(method="FineTuning", fit_id="b2")]
    for fit, method in (("a1", "PromptTuning"), ("b2", "FineTuning")):
        for variant in ("chance", "majority", "no_prompt", "initial_prompt"):
            rows.append(baseline(variant, fit_id=fit, method=method, test=0.25))
    found = lines(*rows)
    assert set(found) == {
        *("prompt tuning", "fine tuning", "chance", "majority", "no prompt"),
        *("prompt tuning, initial prompt", "fine tuning, initial prompt"),
    }
    assert len(found["chance"].tasks["boolq"].rows) == 1


# ---- comparison ----------------------------------------------------------------------------------


def test_comparisons_are_those_of_plain_loops(lines):
    """Reference: ratios and means over the tasks that both have, as loops."""
    ours = grid("FineTuning", 2, ["glue-sst2", "boolq", "aeslc"])
    base = grid("PromptTuning", 3, ["boolq", "aeslc", "mine"])
    found = lines(*ours, *base)
    result = compare(found["fine tuning"], found["prompt tuning"])
    one, other = naive_scores(ours), naive_scores(base)
    shared = {"boolq", "aeslc"}
    ratios = {task: one[task] / other[task] for task in shared}
    assert set(result.shared) == shared
    assert result.ratios == pytest.approx(ratios, rel=1e-12)
    assert result.e_rel.value == pytest.approx(statistics.mean(ratios.values()), rel=1e-12)
    assert result.mean.value == pytest.approx(statistics.mean(one[t] for t in shared))
    assert result.reference_mean.value == pytest.approx(statistics.mean(other[t] for t in shared))
    assert (result.only_here, result.only_reference) == (("glue-sst2",), ("mine",))
    assert (result.e_rel.tasks, result.e_rel.runs) == (2, 10)
    spreads = [
        statistics.stdev(found["fine tuning"].tasks[task].tests) / other[task] for task in shared
    ]
    assert result.e_rel.std == pytest.approx(statistics.mean(spreads), rel=1e-12)
    assert not result.differs


def test_zero_and_missing_references_are_left_out_of_e_rel_and_named(report):
    rows = [row(method="FineTuning", task=task, test=0.5) for task in ONTOLOGY]
    for task, score in {"boolq": 0.25, "aeslc": 0.0, "glue-sst2": None}.items():
        rows.append(row(task=task, test=score))
    text = report(*rows)
    found = cells(text, "All tasks")["fine tuning"]
    assert found["E_rel, prompt tuning"] == "2.000 (1/1)"
    assert found["mean : prompt tuning"] == "0.500 : 0.125 (2/2 : 2)"
    about = [note for note in notes(text) if note.startswith("- fine tuning")]
    assert about == [
        "- fine tuning: against prompt tuning, no score of the reference for 2 tasks (glue-sst2, "
        "mine).",
        "- fine tuning; prompt tuning: against prompt tuning, left out of E_rel, reference zero: "
        "1 task (aeslc).",
    ]


def test_comparisons_of_unlike_runs_are_noted(report):
    rows = [row(), row(method="FineTuning", sample=21, decoding="generate beams=4 tokens=64")]
    text = report(*rows)
    for word in ("sample", "decoding"):
        expected = f"compared although {word} is not the same: 1 task (boolq)"
        assert any(expected in note and "fine tuning: against" in note for note in notes(text))


@pytest.mark.parametrize(
    "name", ["prompt_tuning", "PromptTuning", "prompt tuning", "Prompt-Tuning"]
)
def test_a_reference_is_found_under_any_spelling(lines, name):
    """It is the line without an intrinsic dimension, not a subspace of the same method."""
    found = lines(row(), row(intrinsic_dim=5), row(method="FineTuning"))
    references = find_reference(name, list(found.values()))
    assert {label: line.label for label, line in references.items()} == dict.fromkeys(
        found, "prompt tuning"
    )


def test_a_reference_has_the_same_backbone(lines):
    found = lines(
        *(
            row(backbone=name, method=m)
            for name in ("a", "b")
            for m in ("PromptTuning", "FineTuning")
        ),
        row(backbone="c", method="FineTuning"),
    )
    references = find_reference("prompt_tuning", list(found.values()))
    assert references["fine tuning, backbone a"].label == "prompt tuning, backbone a"
    assert references["fine tuning, backbone b"].label == "prompt tuning, backbone b"
    assert "fine tuning, backbone c" not in references


def test_a_reference_has_the_same_shots_where_they_are_varied(lines):
    found = lines(*(row(shots=k, intrinsic_dim=i) for k in (16, 32) for i in (None, 5)))
    references = find_reference("prompt_tuning", list(found.values()))
    assert references["prompt tuning, K 32, dim 5"].label == "prompt tuning, K 32"


def test_an_unclear_reference_is_refused_and_by_default_passed_over(lines, report):
    rows = [row(), row(num_virtual_tokens=10), row(intrinsic_dim=5), row(method="FineTuning")]
    found = lines(*rows)
    with pytest.raises(ValueError, match=r"several lines for 'fine tuning': .*name one of them"):
        find_reference("prompt_tuning", list(found.values()))
    named = find_reference("prompt tuning, N 10", list(found.values()))
    assert named["fine tuning"].label == "prompt tuning, N 10"
    assert named["prompt tuning, N 100"].label == "prompt tuning, N 10"
    text = report(*rows)
    assert "E_rel, fine tuning" in cells(text, "All tasks")["fine tuning"]
    assert "E_rel, prompt tuning" not in text
    assert any("No comparison: 'prompt_tuning' is several lines" in note for note in notes(text))


# ---- tables --------------------------------------------------------------------------------------


def test_every_table_has_the_figures_of_plain_loops(report):
    """Reference: loops over ontology groups, sets and dimensions."""
    split = partition("crossfit/random")
    tasks = [*split.source[:4], *split.target[:3], "mine"]
    ONTOLOGY_OF = dict(zip(tasks, ["cls/nli", "qa/x", "cls/y", "other/z"] * 2, strict=True))
    rows: dict[str, list[Cells]] = {}
    for at, (label, given) in enumerate(
        {
            "prompt tuning": {},
            "prompt tuning, dim 5": {"intrinsic_dim": 5},
            "prompt tuning, dim 10": {"intrinsic_dim": 10},
        }.items()
    ):
        rows[label] = [
            {**cells, "task": task, "ontology": ONTOLOGY_OF[task]}
            for n, task in enumerate(tasks)
            for cells in grid("PromptTuning", 10 * at + n, ["boolq"], **given)
        ]
    text = report(*(r for of_label in rows.values() for r in of_label), partition="crossfit/random")
    scores = {label: naive_scores(of_label) for label, of_label in rows.items()}
    groups = {g: [t for t in tasks if ONTOLOGY_OF[t].startswith(g)] for g in ("cls", "qa", "other")}
    sets = {"source": tasks[:4], "target": tasks[4:7]}
    for kind, members in (("ontology", groups), ("partition crossfit/random", sets)):
        means, ratios = (
            cells(text, f"{what} by {kind}")
            for what in ("Mean score", "E_rel against prompt tuning")
        )
        for label, of_label in scores.items():
            for name, of_set in members.items():
                counts = f"({len(of_set)}/{5 * len(of_set)})"
                mean = statistics.mean(of_label[task] for task in of_set)
                base = scores["prompt tuning"]
                ratio = statistics.mean(of_label[task] / base[task] for task in of_set)
                assert means[label][name] == f"{mean:.3f} {counts}"
                assert ratios[label][name] == f"{ratio:.3f} {counts}"
    found = cells(text, "Mean score by intrinsic dimension")["prompt tuning, subspace"]
    for size in ("5", "10"):
        mean = statistics.mean(scores[f"prompt tuning, dim {size}"].values())
        assert found[size] == f"{mean:.3f} (8/40)"
    about = notes(text)
    assert "- In no set of crossfit/random: mine." in about
    assert any("4 of 120 source, 0 of 20 dev, 3 of 20 target tasks" in note for note in about)


def test_csv_files_hold_the_figures_in_full(tmp_path):
    rows = [*grid("PromptTuning", 4), *grid("FineTuning", 5)]
    found = make_report([write(tmp_path / "results.csv", rows)])
    (whole,) = [
        r
        for r in table_rows(found)
        if (r["line"], r["set"], r["reference"]) == ("fine tuning", "all tasks", "prompt tuning")
    ]
    ours, base = naive_scores(rows[len(rows) // 2 :]), naive_scores(rows[: len(rows) // 2])
    assert whole["e_rel"] == pytest.approx(statistics.mean(ours[t] / base[t] for t in ours))
    assert (whole["rows"], whole["chosen"], whole["e_rel_tasks"]) == (80, 20, 4)
    tasks = {r["task"]: r for r in task_rows(found) if r["reference"] == "prompt tuning"}
    assert {t: r["score"] for t, r in tasks.items()} == pytest.approx(base)
    assert (whole["optimizer"], whole["num_virtual_tokens"]) == ("adamw", "100")


def test_runs_are_counted_within_each_set_of_tasks(tmp_path):
    """Reference: the rows of each ontology group, counted."""
    rows = [
        row(),
        row(learning_rate=0.1, status="failed: loss not finite"),
        row(task="aeslc", dev=0.9, status="failed: loss not finite"),
        row(task="aeslc", sample=21, test=None),
    ]
    found = make_report([write(tmp_path / "results.csv", rows)])
    names = ("rows", "failed", "chosen", "failed_chosen", "without_score", "tasks", "runs")
    counts = {r["set"]: tuple(r[name] for name in names) for r in table_rows(found)}
    assert counts == {
        "all tasks": (4, 2, 3, 2, 1, 2, 2),
        "qa": (2, 1, 1, 1, 0, 1, 1),
        "cg": (2, 1, 2, 1, 1, 1, 1),
    }


def test_without_a_reference_there_are_means_alone(report):
    text = report(row(method="VectorArithmetic"))
    assert "E_rel" not in text
    assert cells(text, "All tasks")["vector arithmetic"]["mean"] == "0.500 (1/1)"


def test_bars_in_names_do_not_break_a_table(report):
    text = report(row(), row(initialised="text 'a|b'"))
    (line,) = [x for x in text.splitlines() if r"text 'a\|b'" in x and x.startswith("|")][:1]
    assert line.count(" | ") == text.splitlines()[6].count(" | ")


# ---- files ---------------------------------------------------------------------------------------


def test_folders_are_searched_and_replaced_results_passed_over(tmp_path):
    for name in ("a", "a/previous-1", "b/c", "b/previous-12/d", "previous"):
        write(tmp_path / name / "results.csv", [row()])
    found = [path.parent.relative_to(tmp_path).as_posix() for path in find_results([tmp_path])]
    assert found == ["a", "b/c", "previous"]
    named = tmp_path / "a" / "previous-1"
    assert find_results([named, named / "results.csv"]) == [named / "results.csv"]


def test_a_run_that_stands_in_two_files_counts_once(tmp_path):
    """As where a sweep joins the results of its trials; time and place do not make it another."""
    one = write(tmp_path / "one.csv", [row(seconds=1, prompt_file="p"), row(sample=21)])
    two = write(tmp_path / "two.csv", [row(seconds=2, prompt_file="x/p"), row(sample=42)])
    assert len(read_results([one, two])) == 3


def test_runs_repeated_with_other_scores_are_noted(report):
    text = report(row(), row(fit_id="b2", dev=0.6, test=0.7), row(learning_rate=0.1, dev=0.1))
    assert cells(text, "All tasks")["prompt tuning"]["mean"] == "0.700 (1/1)"
    (note,) = notes(text)
    assert "1 runs repeat another one's settings" in note


def test_columns_of_a_later_version_are_passed_over(tmp_path):
    path = tmp_path / "later.csv"
    write_csv(path, [*NEEDED, "more"], [{**row(), "more": "x"}])
    assert len(read_results([path])) == 1


@pytest.fixture
def real(backbone: Callable[..., Backbone], fewshot_root: Path, tmp_path: Path) -> Path:
    """The results of a real fit and test of a tiny model, with baselines."""
    data = CrossFitDataModule(["glue-sst2", "e2e_nlg_cleaned"], str(fewshot_root), [13, 42])
    method = PromptTuning(
        num_virtual_tokens=3,
        learning_rate=[0.03, 0.01],
        init_seed=[0, 1],
        batch_size=4,
        test_baselines=True,
        max_new_tokens=4,
    )
    method.backbone = backbone("gpt2")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=2,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path / "run",
    )
    trainer.fit(method, datamodule=data)
    trainer.test(method, datamodule=data, verbose=False)
    return tmp_path / "run"


def test_a_real_results_file_gives_the_scores_that_its_test_printed(real, tmp_path):
    """Reference: the package's table of the same runs; its ties go to the first rate, so lower."""
    files = report_command([str(real)], out=str(tmp_path / "out"))
    rows: list[Cells] = list(read_csv(real / "results.csv"))
    for cells_ in rows:
        cells_["test"] = float(cells_["test"]) if cells_["test"] else math.nan
    rows.sort(key=lambda r: float(r["learning_rate"] or 0))
    printed = {x.split()[0]: x for x in summary_table(rows).splitlines()[2:]}
    with (tmp_path / "out" / "tasks.csv").open() as file:
        tuned = [r for r in csv.DictReader(file) if r["line"] == "prompt tuning"]
    assert {r["task"] for r in tuned} == {"glue-sst2", "e2e_nlg_cleaned"}
    for cells_ in tuned:
        expected = f"{float(cells_['score']):.3f} ± {float(cells_['std']):.3f}"
        assert expected in printed[cells_["task"]]
        assert (cells_["rows"], cells_["runs"], cells_["failed"]) == ("8", "4", "0")
    names = ["table.md", "table.csv", "tasks.csv", "scores.png", "scores.svg"]
    assert [path.name for path in files] == names
    assert all(path.stat().st_size for path in files)
    text = (tmp_path / "out" / "table.md").read_text()
    for label in ("chance", "majority", "no prompt", "prompt tuning, initial prompt"):
        assert label in cells(text, "All tasks")


def test_curves_of_a_real_fit_are_found_by_the_names_of_its_prompts(real, tmp_path):
    """Reference: the dev scores in curves.csv of the runs that count, all at the only step."""
    other = tmp_path / "other"
    shutil.copytree(real, other)
    text = (real / "results.csv").read_text()
    (other / "results.csv").write_text(text.replace("vocab 5000", "maml some tasks"))
    found = make_report([real, other]).gains
    assert not [note for note in found.notes if "adaptation" in note]
    (setting,) = found.settings
    (point,) = setting.curves["plain"]
    assert setting.curves["maml"] == [point]
    assert (point.step, point.tasks, point.samples) == (2, 2, 2)
    assert setting.gains["maml"].by_task["glue-sst2"].value == 0
    dev = {cells_["run"]: float(cells_["dev"]) for cells_ in read_csv(real / "curves.csv")}
    lines = make_lines(read_results([real / "results.csv"]))
    (line,) = [line for line in lines if line.label == "prompt tuning"]
    chosen = [Path(r.cells["prompt_file"]).stem for t in line.tasks.values() for r in t.chosen]
    assert point.mean == pytest.approx(statistics.mean(dev[name] for name in chosen))


def test_the_columns_that_reports_need_are_written_by_the_package():
    assert set(NEEDED) <= set(RESULT_COLUMNS)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs ``prompt-lab report`` in an empty folder: status, output and errors."""
    place = ("prompt_lab.commands.report_command", "report_command")
    monkeypatch.setitem(offline.FUNCTIONS, "report", place)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = offline.run(["report", *words])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        return (status, *capsys.readouterr())

    return run


def test_the_command_prints_the_table_and_writes_tables_and_pictures(command):
    rows = grid("PromptTuning", 0) + grid("FineTuning", 1)
    rows += [r for size in (5, 10) for r in grid("PromptTuning", size, intrinsic_dim=size)]
    write(Path("runs/a/results.csv"), rows[: len(rows) // 2])
    write(Path("runs/b.csv"), rows[len(rows) // 2 :])
    words = ("--reference", "prompt_tuning", "--partition", "mpt/cls_to_cls")
    status, out, err = command("runs/a", "runs/b.csv", "--out", "out", *words)
    assert (status, err) == (0, "")
    assert out.startswith(Path("out/table.md").read_text())
    names = [
        *("table.md", "table.csv", "tasks.csv", "scores.png", "scores.svg"),
        *("score-by-dimension.png", "score-by-dimension.svg"),
        *("e_rel-prompt_tuning-by-dimension.png", "e_rel-prompt_tuning-by-dimension.svg"),
    ]
    assert {path.name for path in Path("out").iterdir()} == set(names)
    assert out.splitlines()[-len(names) :] == [f"out/{name}" for name in names]
    assert "160 runs" not in out
    assert f"{len(rows)} runs of 4 tasks from 2 files" in out


def test_many_tasks_and_lines_are_drawn_on_several_pages(command):
    rows = [
        {**row(num_virtual_tokens=n), "task": f"task-{t:02}", "ontology": "custom"}
        for n in range(9)
        for t in range(21)
    ]
    write(Path("results.csv"), rows)
    assert command(".", "--out", "out")[0] == 0
    assert len(list(Path("out").glob("scores-?.png"))) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "no file or folder none"),
        (["empty"], "no results.csv in empty or below"),
        (["text.csv"], "text.csv is no results.csv of prompt-lab"),
        (["model.bin"], "model.bin is no results.csv of prompt-lab"),
        (["nothing.csv"], "nothing.csv is no results.csv of prompt-lab"),
        (["old.csv"], "old.csv lacks the columns intrinsic_dim, status: an older version wrote it"),
        (["header.csv"], "no runs in header.csv"),
        (["cut.csv"], "cut.csv, line 3: not as many cells as columns"),
        (["word.csv"], "word.csv, line 2: dev is 'high', not a number"),
        (["good.csv", "--reference", "fine_tuning"], "no reference 'fine_tuning' in the results; "),
        (["good.csv", "--partition", "ipt/randm"], "did you mean ipt/random"),
        (["good.csv", "--out", "good.csv"], "--out good.csv is a file: name a folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command, words, message):
    Path("empty").mkdir()
    Path("text.csv").write_text("task,score\nboolq,0.5\n")
    Path("model.bin").write_bytes(b"\x80\x02\xff\x00\n")
    Path("nothing.csv").write_text("")
    good = write(Path("good.csv"), [row(), row(sample=21)]).read_text()
    Path("cut.csv").write_text(good[:-40])
    write(Path("word.csv"), [row(dev="high")])
    write(Path("header.csv"), [])
    kept = [name for name in RESULT_COLUMNS if name not in ("status", "intrinsic_dim")]
    write_csv("old.csv", kept, [row()])
    status, out, err = command(*words, *([] if "--out" in words else ["--out", "out"]))
    assert (status, out) == (1, "")
    assert message in err
    assert err.startswith("prompt-lab: ")
    assert err.count("\n") == 1
    assert not Path("out").exists()


def test_the_command_says_what_it_needs(command):
    assert command("good.csv")[2] == "prompt-lab: give --out; prompt-lab report --help says more\n"
    assert command("--help")[0] == 0


def test_a_report_loads_neither_torch_nor_transformers(tmp_path):
    write(tmp_path / "results.csv", [row(), row(method="FineTuning", intrinsic_dim=5)])
    code = (
        "import sys\n"
        "from prompt_lab.commands.report_command import report_command\n"
        f"report_command([{str(tmp_path)!r}], out={str(tmp_path / 'out')!r}, "
        "partition='ipt/random')\n"
        "assert not {'torch', 'transformers', 'lightning', 'pandas'} & set(sys.modules)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
