"""Result files and the table of a test: cells, curves that a resumed fit keeps, choice by dev."""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
from itertools import pairwise
from typing import Any

import pytest

from prompt_lab.files.results import (
    CURVE_COLUMNS,
    RESULT_COLUMNS,
    append_curves,
    best_by_dev,
    read_csv,
    start_curves,
    summary_table,
    text_table,
    write_csv,
    write_predictions,
)


def row(**given: Any) -> dict[str, Any]:
    """A line of results with the columns that the table reads."""
    fixed = {"task": "boolq", "metric": "ACC", "variant": "tuned", "sample": 13, "init_seed": 0}
    return {**fixed, "dev": 0.5, "test": 0.5, **given}


# ---- files ---------------------------------------------------------------------------------------


def test_csv_cells_keep_text_and_numbers_and_leave_unknown_ones_empty(tmp_path):
    """Reference: Python's own csv reader. A file is replaced as a whole."""
    given = {"fit_id": 'a,"b"\nc', "dev": 0.1 + 0.2, "test": math.nan, "sample": 13, "extra": 1}
    path = tmp_path / "results.csv"
    write_csv(path, ["a"], [{"a": n} for n in range(999)])
    write_csv(path, RESULT_COLUMNS, [given])
    with path.open(newline="") as file:
        (header, cells) = csv.reader(file)
    read = dict(zip(header, cells, strict=True))
    assert (tuple(header), read_csv(path)) == (RESULT_COLUMNS, [read])
    known = {name: cell for name, cell in read.items() if cell}
    assert known == {"fit_id": 'a,"b"\nc', "dev": repr(0.1 + 0.2), "sample": "13"}
    write_csv(path, ["a", "b", "c"], [{"a": -math.inf, "b": False, "c": 0}])
    assert path.read_text() == "a,b,c\n-inf,False,0\n"
    assert [*tmp_path.iterdir()] == [path]
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_csv(tmp_path / "none.csv")


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (2, 0), (3, 1), (6, 2), (7, 2), (99, 3)])
def test_a_fit_that_starts_at_a_step_keeps_the_curves_up_to_it_and_goes_on(tmp_path, step, kept):
    """Reference: the curves of a fit that nothing interrupted. Step 0 is a new fit."""
    path, steps = tmp_path / "new" / "curves.csv", (3, 6, 12)
    start_curves(path, step)
    for at in steps:
        append_curves(path, [{"step": at, "run": run, "dev": 0.25} for run in "ab"])
    whole = path.read_bytes()
    start_curves(path, step)
    assert [int(line["step"]) for line in read_csv(path)] == [x for x in steps[:kept] for _ in "ab"]
    for at in steps[kept:]:
        append_curves(path, [{"step": at, "run": run, "dev": 0.25} for run in "ab"])
    assert path.read_bytes() == whole
    assert whole.decode().startswith(",".join(CURVE_COLUMNS) + "\n3,a,")


def test_predictions_are_one_json_object_a_line(tmp_path):
    """Line breaks and other scripts within answers stay whole."""
    rows = [{"prediction": "a\nb\u2028c", "references": ["ä", "日"]}, {"prediction": ""}]
    write_predictions(tmp_path / "predictions.jsonl", rows)
    text = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.removesuffix("\n").split("\n")] == rows
    assert "ä" in text


# ---- choice by dev -------------------------------------------------------------------------------


def test_dev_chooses_among_rates_within_each_task_sample_and_seed():
    """Reference: the highest dev of each group, by hand; of a tie the first stays."""
    rows = [row(dev=0.5, test=0.1), row(dev=0.7, test=0.2), row(dev=0.7, test=0.9)]
    rows += [row(sample=42, dev=0.1, test=0.3), row(init_seed=1, dev=0.2, test=0.4)]
    rows += [row(task="trec", dev=0.3, test=0.5)]
    assert [chosen["test"] for chosen in best_by_dev(rows)] == [0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize("unknown", [None, "", math.nan, "nan"])
def test_runs_without_a_dev_score_lose_to_all_others(unknown):
    rows = [row(dev=unknown, test=0.9), row(dev=-0.5, test=0.1), row(dev=unknown, test=0.8)]
    assert [chosen["test"] for chosen in best_by_dev(rows)] == [0.1]
    assert [chosen["test"] for chosen in best_by_dev(rows[::2])] == [0.9]


def test_dev_is_compared_as_a_number_also_when_read_from_a_file(tmp_path):
    """As text, 9e-05 would be more than 0.5."""
    write_csv(tmp_path / "x", RESULT_COLUMNS, [row(dev=9e-05, test=0.1), row(dev=0.5, test=0.2)])
    assert [chosen["test"] for chosen in best_by_dev(read_csv(tmp_path / "x"))] == ["0.2"]


# ---- the table -----------------------------------------------------------------------------------


def cells(table: str) -> list[list[str]]:
    """The cells of an aligned table, its line of dashes left out."""
    lines = table.splitlines()
    assert {len(line) for line in lines} == {len(lines[1])}
    assert {*lines[1]} == {"-", " "}
    ends = [0, *(at + 2 for at in range(len(lines[1])) if lines[1][at : at + 2] == "  "), None]
    parts = [slice(a, b) for a, b in pairwise(ends)]
    return [[line[part].strip() for part in parts] for line in [lines[0], *lines[2:]]]


def test_the_table_has_mean_and_deviation_of_the_runs_that_dev_chose():
    """Reference: the statistics module (ddof 1)."""
    tests = [0.2, 0.5, 0.9]
    rows = [row(sample=sample, test=test) for sample, test in enumerate(tests)]
    rows += [row(sample=sample, dev=0.1, test=0.0) for sample in range(3)]  # lose by dev
    rows.append(row(task="glue-cola", metric="Matthew-Correlation", test=-0.25))
    mean, spread = statistics.mean(tests), statistics.stdev(tests)
    assert cells(summary_table(rows)) == [
        ["task", "metric", "tuned", "prompts"],
        ["boolq", "ACC", f"{mean:.3f} ± {spread:.3f}", "3"],
        ["glue-cola", "Matthew-Correlation", "-0.250", "1"],
    ]


def test_the_table_has_the_baselines_that_were_measured_and_leaves_out_unknown_scores():
    rows = [row(sample=at, test=test) for at, test in enumerate((0.75, math.nan, None))]
    rows += [row(variant="majority", dev=None), row(variant="chance", test=math.nan, dev=None)]
    rows += [row(variant="initial_prompt", init_seed=x, test=x, dev=None) for x in (0, 1)]
    assert cells(summary_table(rows)) == [
        ["task", "metric", "initial prompt", "chance", "majority", "tuned", "prompts"],
        ["boolq", "ACC", "0.500", "-", "0.500", "0.750", "1 of 3"],
    ]
    assert cells(summary_table(rows[1:3]))[1][2:] == ["-", "0 of 2"]


def test_a_narrow_terminal_wraps_long_cells_and_cuts_none(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((60, 24)))
    names = ["sandbox-what-foreign", "sandbox-first-food-foreign", "boolq"]
    header = ["task", "metric", "no prompt", "initial prompt", "tuned"]
    rows = [[name, "EM", "0.023", "0.000", "0.921 ± 0.033"] for name in names]
    lines = text_table(header, rows).splitlines()
    assert max(map(len, lines)) <= 60
    width = lines[2].index(" ")
    assert set(lines[2]) == {"-", " "}
    assert "".join(line[:width].strip() for line in lines[3:]) == "".join(names)
