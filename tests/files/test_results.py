"""Result files and the table of a test: cells, curves that a resumed fit keeps, choice by dev."""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
from pathlib import Path
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
    return {
        "task": "boolq",
        "metric": "ACC",
        "variant": "tuned",
        "sample": 13,
        "init_seed": 0,
        "dev": 0.5,
        "test": 0.5,
        **given,
    }


# ---- CSV -----------------------------------------------------------------------------------------


def test_csv_cells_keep_text_and_numbers_and_leave_unknown_ones_empty(tmp_path):
    """Reference: Python's own csv reader."""
    given = {"fit_id": 'a,"b"\nc', "dev": 0.1 + 0.2, "test": math.nan, "sample": 13, "extra": 1}
    path = tmp_path / "results.csv"
    write_csv(path, RESULT_COLUMNS, [given])
    with path.open(newline="") as file:
        (header, cells) = csv.reader(file)
    assert tuple(header) == RESULT_COLUMNS
    read = dict(zip(header, cells, strict=True))
    assert read["fit_id"] == 'a,"b"\nc'
    assert float(read["dev"]) == 0.1 + 0.2  # every digit
    assert read["sample"] == "13"
    assert {name for name, cell in read.items() if cell} == {"fit_id", "dev", "sample"}
    assert read_csv(path) == [read]


def test_infinite_scores_are_kept_and_false_is_not_empty(tmp_path):
    path = tmp_path / "x.csv"
    write_csv(path, ["a", "b", "c"], [{"a": -math.inf, "b": False, "c": 0}])
    assert path.read_text() == "a,b,c\n-inf,False,0\n"


def test_a_csv_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x.csv"
    write_csv(path, ["a"], [{"a": n} for n in range(9)])
    write_csv(path, ["a"], [])
    assert path.read_text() == "a\n"
    assert [found.name for found in tmp_path.iterdir()] == ["x.csv"]


def test_a_missing_csv_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_csv(tmp_path / "none.csv")


# ---- curves --------------------------------------------------------------------------------------


def curve(step: int, run: str) -> dict[str, Any]:
    return {"step": step, "run": run, "dev": 0.25, "status": "training"}


@pytest.fixture
def curves(tmp_path: Path) -> Path:
    """Curves of two runs, evaluated at 3, 6 and 12."""
    path = tmp_path / "curves.csv"
    start_curves(path, 0)
    for step in (3, 6, 12):
        append_curves(path, [curve(step, "a"), curve(step, "b")])
    return path


def steps(path: Path) -> list[int]:
    return [int(line["step"]) for line in read_csv(path)]


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (0, []),
        (2, []),
        (3, [3, 3]),
        (6, [3, 3, 6, 6]),
        (7, [3, 3, 6, 6]),
        (99, [3, 3, 6, 6, 12, 12]),
    ],
)
def test_a_fit_that_starts_at_a_step_keeps_the_curves_up_to_it(curves, step, kept):
    """A step of 0 is a new fit, which keeps nothing."""
    start_curves(curves, step)
    assert steps(curves) == kept


def test_kept_curves_are_the_same_bytes_and_go_on(curves):
    """Reference: the curves of a fit that nothing interrupted."""
    whole = curves.read_bytes()
    start_curves(curves, 6)
    append_curves(curves, [curve(12, "a"), curve(12, "b")])
    assert curves.read_bytes() == whole


def test_curves_start_without_a_file(tmp_path):
    for step in (0, 5):
        path = tmp_path / f"new-{step}" / "curves.csv"
        start_curves(path, step)
        assert path.read_text() == ",".join(CURVE_COLUMNS) + "\n"


# ---- predictions ---------------------------------------------------------------------------------


def test_predictions_are_one_json_object_a_line(tmp_path):
    """Reference: the json module; line breaks and other scripts within answers stay whole."""
    rows = [{"prediction": "a\nb\u2028c", "references": ["ä", "日"]}, {"prediction": ""}]
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, rows)
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == rows
    assert "ä" in lines[0]


# ---- choice by dev -------------------------------------------------------------------------------


def test_dev_chooses_among_rates_within_each_task_sample_and_seed():
    """Reference: the highest dev of each group, by hand."""
    rows = [
        row(dev=0.5, test=0.1),
        row(dev=0.7, test=0.2),
        row(dev=0.7, test=0.9),  # a tie: the first stays
        row(sample=42, dev=0.1, test=0.3),
        row(init_seed=1, dev=0.2, test=0.4),
        row(task="trec", dev=0.3, test=0.5),
    ]
    assert [chosen["test"] for chosen in best_by_dev(rows)] == [0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize("unknown", [None, "", math.nan, "nan"])
def test_runs_without_a_dev_score_lose_to_all_others(unknown):
    rows = [row(dev=unknown, test=0.9), row(dev=-0.5, test=0.1), row(dev=unknown, test=0.8)]
    assert [chosen["test"] for chosen in best_by_dev(rows)] == [0.1]
    assert [chosen["test"] for chosen in best_by_dev(rows[::2])] == [0.9]


def test_dev_is_compared_as_a_number_also_when_read_from_a_file(tmp_path):
    """As text, 9e-05 would be more than 0.5."""
    path = tmp_path / "results.csv"
    write_csv(path, RESULT_COLUMNS, [row(dev=9e-05, test=0.1), row(dev=0.5, test=0.2)])
    assert [chosen["test"] for chosen in best_by_dev(read_csv(path))] == ["0.2"]


# ---- the table -----------------------------------------------------------------------------------


def cells(table: str) -> list[list[str]]:
    """The cells of a table, its line of dashes left out."""
    lines = table.splitlines()
    assert set(lines[1]) == {"-", " "}
    widths = [len(dashes) for dashes in lines[1].split("  ")]
    rows = []
    for line in [lines[0], *lines[2:]]:
        assert len(line) == len(lines[1])
        found, at = [], 0
        for width in widths:
            found.append(line[at : at + width].strip())
            at += width + 2
        rows.append(found)
    return rows


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


def test_the_table_has_a_column_for_each_baseline_that_was_measured():
    rows = [
        row(test=0.75),
        row(variant="majority", test=0.5, dev=None),
        row(variant="initial_prompt", test=0.25, dev=None),
        row(variant="initial_prompt", init_seed=1, test=0.75, dev=None),
        row(variant="chance", test=math.nan, dev=None),
    ]
    assert cells(summary_table(rows)) == [
        ["task", "metric", "initial prompt", "chance", "majority", "tuned", "prompts"],
        ["boolq", "ACC", "0.500", "-", "0.500", "0.750", "1"],
    ]


def test_scores_that_are_unknown_are_left_out_of_the_mean():
    rows = [row(sample=1, test=math.nan), row(sample=2, test=None), row(sample=3, test=0.5)]
    assert cells(summary_table(rows))[1][2:] == ["0.500", "1 of 3"]
    assert cells(summary_table(rows[:2]))[1][2:] == ["-", "0 of 2"]


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
