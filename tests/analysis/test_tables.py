"""Reading results: nothing is merged silently, ties go to the earlier run, faults are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prompt_lab.analysis.tables import (
    choose_by_dev,
    mean_over_tasks,
    read_lines,
    read_results,
    relate,
    shots_rank,
    task_scores,
)

PLAIN = Path(__file__).parent / "report" / "gains" / "plain" / "results.csv"
TEN_SETTINGS = {
    "model.optim.schedule": "linear",
    "model.optim.warmup_steps": 10,
    "model.optim.weight_decay": 0.1,
    "model.label_smoothing": 0.1,
    "model.patience": 5,
    "model.backbone.dtype": "bfloat16",
    "data.max_input_length": 128,
    "data.task_prefix": True,
    "trainer.max_steps": 500,
    "trainer.precision": "bf16-mixed",
}


def write(folder: Path, **cells: object) -> Path:
    frame = pd.read_csv(PLAIN, dtype=str, keep_default_na=False).assign(**cells)
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "results.csv", index=False)
    return folder


@pytest.mark.parametrize("flag", TEN_SETTINGS)
def test_fits_that_differ_in_a_setting_are_no_line(tmp_path, flag):
    import json

    write(tmp_path / "a")
    write(tmp_path / "b", settings=json.dumps({flag: TEN_SETTINGS[flag]}), order_seed="1")
    with pytest.raises(ValueError, match=rf"mixed: {flag} differs within the line: default") as e:
        read_lines({"mixed": tmp_path})
    assert str(tmp_path / "a") in str(e.value)
    assert str(tmp_path / "b") in str(e.value)
    runs = read_lines({"a": tmp_path / "a", "b": tmp_path / "b"})
    assert len(runs) == 2 * len(read_results(PLAIN))


@pytest.mark.parametrize(
    ("column", "value"),
    [("method", "Attempt"), ("backbone", "gpt2"), ("num_virtual_tokens", "8"), ("metric", "EM")],
)
def test_columns_that_differ_within_a_line_are_named(tmp_path, column, value):
    write(tmp_path / "a")
    write(tmp_path / "b", **{column: value})
    with pytest.raises(ValueError, match=rf"mixed: {column}.* differs within the line"):
        read_lines({"mixed": tmp_path})


def test_axes_and_grids_may_differ_within_a_line(tmp_path):
    write(tmp_path / "a", settings='{"model.init_seed": [0, 1], "model.learning_rate": [0.3]}')
    write(tmp_path / "b", shots="32", settings='{"data.shots": 32}')
    write(tmp_path / "c", intrinsic_dim="8")
    write(tmp_path / "d", order_seed="1")
    runs = read_lines({"line": tmp_path})
    assert runs["label"].unique().tolist() == ["line, K 16", "line, K 32", "line, 8 dims, K 16"]
    scores = task_scores(runs)
    assert scores["runs"].sum() == len(runs) == 4 * len(read_results(PLAIN))


def test_sources_of_starts_are_an_axis_only_where_a_task_has_several(tmp_path):
    write(tmp_path / "a", start="prompt", start_of="boolq")
    assert read_lines({"x": tmp_path})["label"].unique().tolist() == ["x"]
    write(tmp_path / "b", start="prompt", start_of="sciq")
    assert {*read_lines({"x": tmp_path})["label"]} == {"x, prompt boolq", "x, prompt sciq"}
    write(tmp_path / "c", start="meta", start_of="cls")
    assert "x, meta cls" in {*read_lines({"x": tmp_path})["label"]}


def test_files_may_differ_between_tasks_but_not_for_one_score(tmp_path):
    write(tmp_path / "a", settings='{"model.subspace.path": "aa"}')
    write(tmp_path / "b", settings='{"model.subspace.path": "bb"}', init_seed="7")
    assert len(read_lines({"x": tmp_path})) == 2 * len(read_results(PLAIN))
    write(tmp_path / "c", settings='{"model.subspace.path": "cc"}')
    with pytest.raises(ValueError, match=r"model\.subspace\.path differs"):
        read_lines({"x": tmp_path})


def test_a_run_that_stands_twice_counts_once_and_is_told(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "copy")
    runs = read_lines({"x": tmp_path})
    assert len(runs) == runs.attrs["twice"] == len(read_results(PLAIN))
    write(tmp_path / "other", test="0.5")
    with pytest.raises(ValueError, match="scores of one run"):
        read_lines({"x": tmp_path})


def baselines(folder: Path, score: str) -> Path:
    frame = pd.read_csv(PLAIN, dtype=str, keep_default_na=False)
    first = frame.drop_duplicates(["task", "sample"])
    empty = dict.fromkeys(("init_seed", "order_seed", "start", "start_seed", "learning_rate"), "")
    first = first.assign(variant="no_prompt", test=score, dev="", batch_size="", **empty)
    folder.mkdir()
    pd.concat([frame, first]).to_csv(folder / "results.csv", index=False)
    return folder


def test_baselines_without_a_method_are_shared_where_all_lines_agree(tmp_path):
    places = {name: baselines(tmp_path / name, "0.25") for name in ("a", "b")}
    runs = read_lines(places)
    assert runs["label"].unique().tolist() == ["a", "b", "no prompt"]
    assert runs.attrs["twice"] == len(read_results(PLAIN)[["task", "sample"]].drop_duplicates())
    places["c"] = baselines(tmp_path / "c", "0.5")
    labels = read_lines(places)["label"].unique().tolist()
    assert labels == ["a", "b", "c", *(f"{x}, no prompt" for x in "abc")]


def test_baselines_of_several_k_are_points_of_their_own(tmp_path):
    for k in ("16", "32"):
        folder = baselines(tmp_path / k, "0.25")
        frame = pd.read_csv(folder / "results.csv", dtype=str, keep_default_na=False)
        frame.assign(shots=k).to_csv(folder / "results.csv", index=False)
    labels = read_lines({"a": tmp_path})["label"].unique().tolist()
    assert labels == ["a, K 16", "a, K 32", "no prompt, K 16", "no prompt, K 32"]


def test_ties_go_to_the_earlier_run_and_no_dev_score_loses():
    frame = pd.DataFrame({"key": 1, "dev": [np.nan, 0.5, 0.5], "run": [0.0, 2.0, 1.0]})
    assert choose_by_dev(frame, ["key"])["run"].tolist() == [1.0]
    assert choose_by_dev(frame[:1], ["key"])["run"].tolist() == [0.0]


def test_ratios_leave_out_what_says_nothing(tmp_path):
    runs = read_lines({"a": write(tmp_path / "a"), "b": write(tmp_path / "b")})
    scores = task_scores(runs)
    first = scores["task"].unique()
    base = scores["line"] == "b"
    for task, value in zip(first, (0.0, -0.1, np.nan), strict=False):
        scores.loc[base & (scores["task"] == task), "score"] = value
    scores.loc[(scores["line"] == "a") & (scores["task"] == first[3]), "score"] = np.nan
    own = relate(scores, "b").query("line == 'a'").set_index("task")
    why = ["reference zero", "reference negative", "reference missing", "score missing"]
    assert own.loc[first[:4], "left_out"].tolist() == why
    assert own["ratio"].isna().all()
    assert mean_over_tasks(scores)["tasks"].tolist() == [3, 3]


def test_k_is_a_number_or_all():
    assert sorted(["all", "128", "16"], key=shots_rank) == ["16", "128", "all"]
    with pytest.raises(ValueError, match="shots is 'few'"):
        shots_rank("few")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no columns fit_id and test"),
        ("fit_id,test,version\nx,1,0.1.0\n", r"lacks the columns method.*version.*\(0\.1\.0\)"),
        ("", "no results.csv of prompt-lab"),
        ("fit_id,test\n1,2,3,4\n1,2\n", "lacks the columns|no results"),
        ("\x00\xff", "no results.csv of prompt-lab"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "results.csv").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=message):
        read_lines({"x": tmp_path})


def test_cells_that_are_no_numbers_missing_cells_and_no_runs(tmp_path):
    write(tmp_path / "a", test="high")
    with pytest.raises(ValueError, match="line 2: test is 'high', not a number"):
        read_lines({"x": tmp_path})
    lines = PLAIN.read_text().splitlines()
    (tmp_path / "a" / "results.csv").write_text("\n".join([*lines[:3], lines[3][:40]]))
    with pytest.raises(ValueError, match="line 4: fewer cells than columns"):
        read_lines({"x": tmp_path})
    (tmp_path / "a" / "results.csv").write_text(lines[0] + "\n")
    with pytest.raises(ValueError, match=r"no runs in .*only a header"):
        read_lines({"x": tmp_path})
    (tmp_path / "a" / "results.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no results\.csv in"):
        read_lines({"x": tmp_path})
    write(tmp_path / "a", settings="[1")
    with pytest.raises(ValueError, match="no JSON object"):
        read_lines({"x": tmp_path})
