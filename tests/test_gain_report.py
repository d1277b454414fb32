"""Gains of learned prompts and their adaptation curves, against NumPy and plain loops."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import result_line

from prompt_lab.analysis.adaptation_curves import Curve, adaptation, read_curves
from prompt_lab.analysis.gain_report import (
    draw_gains,
    find_gains,
    gain_rows,
    gain_table,
    relative_gain,
    sample_scores,
    show_gain,
)
from prompt_lab.analysis.report import compare, make_lines, read_results
from prompt_lab.commands import offline
from prompt_lab.files.results import CURVE_COLUMNS, RESULT_COLUMNS, read_csv, write_csv

TASKS = ("emo", "anli", "wiki_qa", "samsum")
SAMPLES = ("100", "13", "21")
KIND = {"emo": "cls/emotion", "anli": "cls/nli", "wiki_qa": "cls/other", "samsum": "cg/summary"}
SOURCE = "mpt/cls_to_cls/source"
PLAIN = "vocab 5000"
CURVES = {0: 0.1, 10: 0.2, 20: 0.3}

Cells = dict[str, Any]
Table = dict[str, dict[str, float]]


def run(
    initialised: str = PLAIN, test: float | None = 0.5, task: str = "emo", **given: Any
) -> Cells:
    """A line of results of prompt tuning."""
    own = {"backbone": "t5-large", "sample": "100", "initialised": initialised, "test": test}
    own |= {"task": task, "ontology": KIND.get(task, "other/x")}
    cells = result_line(**own | given)
    name = f"{cells['task']}_{cells['sample']}_seed{cells['init_seed']}_lr0.3_bs8"
    is_prompt = cells["method"] == "PromptTuning"
    return {"prompt_file": f"prompts/{name}.safetensors" if is_prompt else "", **cells}


def tuned(**given: Any) -> Cells:
    """A line of results of fine tuning."""
    return run(**{"initialised": "pretrained weights", "method": "FineTuning", **given})


def made_up(seed: int, tasks: Iterable[str] = TASKS, samples: Iterable[str] = SAMPLES) -> Table:
    """Scores by task and sample."""
    rng = np.random.default_rng(seed)
    return {task: {sample: float(rng.uniform(0.2, 1)) for sample in samples} for task in tasks}


def runs(scores: Table, initialised: str, **given: Any) -> list[Cells]:
    """Results with these scores."""
    return [
        run(initialised, value, task, sample=sample, **given)
        for task, of_task in scores.items()
        for sample, value in of_task.items()
    ]


def write(folder: Path, rows: Iterable[Cells], curves: Mapping[int, float] | None = CURVES) -> Path:
    """The results of a fit, with the same curve for all its runs."""
    rows = list(rows)
    write_csv(folder / "results.csv", RESULT_COLUMNS, rows)
    if curves is not None:
        lines = [
            {"step": step, "run": Path(row["prompt_file"]).stem, "dev": dev}
            for row in rows
            if row["prompt_file"]
            for step, dev in curves.items()
        ]
        write_csv(folder / "curves.csv", CURVE_COLUMNS, lines)
    return folder


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., Any]:
    """Writes rows to one folder and gives the gains."""

    def make(*rows: Cells, names: list[str] | None = None, curves: Any = CURVES) -> Any:
        folder = write(tmp_path / "fit", rows, curves)
        return find_gains(make_lines(read_results([folder / "results.csv"])), names)

    return make


def matrix(scores: Table) -> np.ndarray:
    """Scores (T, S)."""
    return np.array([list(of_task.values()) for of_task in scores.values()])


# ---- relative gain -------------------------------------------------------------------------------


def test_gains_are_those_of_numpy():
    """Reference: the formula over arrays (T, S); the value is of means, the spread of samples."""
    ours, base = made_up(0), made_up(1)
    found = relative_gain(ours, base, TASKS)
    a, b = matrix(ours), matrix(base)
    per_task = (a.mean(1) - b.mean(1)) / b.mean(1)
    per_cell = (a - b) / b
    assert found.value == pytest.approx(per_task.mean(), rel=1e-12)
    assert found.std == pytest.approx(per_cell.mean(0).std(ddof=1), rel=1e-12)
    assert (found.tasks, found.samples) == (4, 3)
    for at, task in enumerate(TASKS):
        one = found.by_task[task]
        assert one.value == pytest.approx(per_task[at], rel=1e-12)
        assert one.std == pytest.approx(per_cell[at].std(ddof=1), rel=1e-12)
        assert (one.samples, one.left_out) == (3, "")
        assert (one.score, one.reference) == pytest.approx((a[at].mean(), b[at].mean()))
    assert not found.left_out
    assert not found.lacking


def test_the_value_is_e_rel_less_one(tmp_path):
    """Reference: `prompt_lab.analysis.report.compare`; scores are first averaged over seeds."""
    rows = runs(made_up(2), PLAIN) + runs(made_up(3), f"maml {SOURCE}")
    rows += runs(made_up(4), f"maml {SOURCE}", init_seed=1)
    write(tmp_path, rows)
    plain, maml = make_lines(read_results([tmp_path / "results.csv"]))
    scores = sample_scores(maml)
    mean = (made_up(3)["anli"]["13"] + made_up(4)["anli"]["13"]) / 2
    assert scores["anli"]["13"] == pytest.approx(mean, rel=1e-12)
    found = relative_gain(scores, sample_scores(plain), TASKS)
    assert found.value == pytest.approx(compare(maml, plain).e_rel.value - 1, rel=1e-12)


def test_tasks_are_left_out_by_the_rule_and_count_in_no_sample():
    ours = made_up(5) | {"x": {"100": 0.5, "13": 0.5}, "y": {"100": 0.5}, "z": {}}
    base = made_up(6) | {"x": {"100": -0.5, "13": 0.1}, "z": {"100": 0.5}}
    found = relative_gain(ours, base, [*TASKS, "x", "y", "z"])
    assert found.left_out == {
        "x": "reference negative",
        "y": "reference missing",
        "z": "score missing",
    }
    clean = relative_gain(ours, base, TASKS)
    assert (found.value, found.std, found.tasks) == (clean.value, clean.std, 4)
    assert math.isnan(found.by_task["x"].value)
    assert found.by_task["x"].samples == 0


def test_within_a_sample_the_rule_holds_too():
    """Reference: NumPy's mean over the tasks that have a gain in the sample."""
    ours, base = made_up(7), made_up(8)
    base["emo"]["13"] = 0.0
    ours["anli"]["21"] = math.nan
    found = relative_gain(ours, base, TASKS)
    assert found.lacking == {("emo", "13"): "reference zero", ("anli", "21"): "score missing"}
    assert (found.tasks, found.samples, found.by_task["emo"].samples) == (4, 3, 2)
    a, b = matrix(ours), np.where(matrix(base) == 0, np.nan, matrix(base))
    expected = np.nanmean((a - b) / b, axis=0).std(ddof=1)
    assert found.std == pytest.approx(expected, rel=1e-12)
    means = np.nanmean(a, 1) / matrix(base).mean(1) - 1
    assert found.value == pytest.approx(means.mean(), rel=1e-12)


def test_one_sample_has_no_deviation_and_nothing_gives_nan():
    found = relative_gain({"emo": {"100": 0.6}}, {"emo": {"100": 0.5}}, ["emo"])
    assert show_gain(found) == "20.00 (1/1)"
    assert math.isnan(found.std)
    found = relative_gain({}, {}, ["emo"])
    assert (found.tasks, found.samples, found.left_out) == (0, 0, {"emo": "reference missing"})
    assert show_gain(found) == show_gain(None) == "-"


# ---- adaptation ----------------------------------------------------------------------------------


def test_adaptation_is_that_of_plain_loops():
    """Reference: loops over steps, tasks and samples, and NumPy's deviation; seeds come first."""
    rng = np.random.default_rng(0)
    dev = rng.uniform(0, 1, (2, 3, 2, 4))  # tasks, samples, seeds, steps
    cells = {
        (task, sample): [
            Curve({10 * k: float(dev[t, s, seed, k]) for k in range(4)}) for seed in range(2)
        ]
        for t, task in enumerate(("emo", "anli"))
        for s, sample in enumerate(SAMPLES)
    }
    points = adaptation(cells)
    assert [point.step for point in points] == [0, 10, 20, 30]
    for k, point in enumerate(points):
        means = dev[..., k].mean(-1)
        assert point.mean == pytest.approx(means.mean(), rel=1e-12)
        assert point.std == pytest.approx(means.mean(0).std(ddof=1), rel=1e-12)
        assert (point.tasks, point.samples) == (2, 3)


def test_runs_that_ended_early_keep_their_last_score_and_others_do_not():
    ended = Curve({0: 0.1, 10: 0.4}, ended=True)
    whole = Curve({0: 0.1, 10: 0.2, 20: 0.8, 30: 0.8})
    short = Curve({0: 0.1, 10: 0.2, 20: 0.6})
    points = adaptation({("emo", "100"): [ended], ("anli", "100"): [whole]})
    assert [(p.step, p.mean) for p in points] == [
        (0, 0.1),
        (10, pytest.approx(0.3)),
        (20, pytest.approx(0.6)),
        (30, pytest.approx(0.6)),
    ]
    assert all(math.isnan(point.std) for point in points)
    points = adaptation({("emo", "100"): [ended], ("anli", "100"): [short, whole]})
    assert [point.step for point in points] == [0, 10, 20]


def test_only_steps_that_all_runs_share_are_kept():
    coarse, fine = Curve({0: 0.1, 20: 0.3}), Curve({10: 0.1, 20: 0.5, 30: 0.7})
    (point,) = adaptation({("emo", "100"): [coarse], ("anli", "100"): [fine]})
    assert (point.step, point.mean) == (20, pytest.approx(0.4))
    assert adaptation({("emo", "100"): [Curve({1: 0.0}), Curve({2: 0.0})]}) == []
    assert adaptation({}) == []


def test_curves_are_read_without_steps_that_have_no_score(tmp_path):
    rows = [("a", 10, 0.5), ("a", 20, None), ("a", 30, math.nan), ("b", 10, 0.25)]
    lines = [{"run": name, "step": step, "dev": dev} for name, step, dev in rows]
    write_csv(tmp_path / "curves.csv", CURVE_COLUMNS, lines)
    assert read_curves(tmp_path / "curves.csv") == {"a": {10: 0.5}, "b": {10: 0.25}}


@pytest.mark.parametrize("text", ["step,run\n1,a\n", "step,run,dev\nx,a,0.5\n", "run,dev\n\xff"])
def test_a_file_that_is_no_table_of_curves_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "curves.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"curves.csv is no curves.csv of prompt-lab") as caught:
        read_curves(path)
    assert "\n" not in str(caught.value)


# ---- settings ------------------------------------------------------------------------------------


def test_a_setting_is_a_row_and_methods_stand_in_their_order(report):
    tables = {name: made_up(at) for at, name in enumerate(("multitask", "reptile", "fomaml"))}
    rows = [r for name, table in tables.items() for r in runs(table, f"{name} {SOURCE}")]
    rows += runs(made_up(3), "maml top 5") + runs(made_up(4), PLAIN)
    rows += [tuned(test=v, task=t, sample=s) for t, of in made_up(5).items() for s, v in of.items()]
    found = report(*rows)
    header, table = gain_table(found)
    assert header == ["sources", "maml", "fomaml", "reptile", "multitask", "fine tuning"]
    (first, second) = ({"sources": x[0], **dict(zip(header, x, strict=True))} for x in table)
    assert (first["sources"], first["maml"]) == (SOURCE, "-")
    assert (second["sources"], second["reptile"]) == ("top 5", "-")
    base = matrix(made_up(4)).mean(1)
    for name, seed in (("fomaml", 2), ("fine tuning", 5)):
        value = 100 * (matrix(made_up(seed)).mean(1) / base - 1).mean()
        assert first[name].startswith(f"{value:.2f} ± ")
        assert first[name].endswith(" (4/3)")
    assert second["fine tuning"] == first["fine tuning"]
    assert not found.notes
    assert [list(setting.curves) for setting in found.settings] == [
        ["plain", "fomaml", "reptile", "multitask"],
        ["plain", "maml"],
    ]


def test_fine_tuning_counts_on_the_tasks_of_the_setting_only(report):
    """The union of those of the setting's algorithms."""
    rows = runs(made_up(0), PLAIN)
    rows += runs(made_up(1, ["emo"]), "maml x") + runs(made_up(2, ["anli"]), "reptile x")
    rows += [tuned(test=0.5, task=task, sample=s) for task in TASKS for s in SAMPLES]
    found = report(*rows)
    (setting,) = found.settings
    assert list(setting.tasks) == ["anli", "emo"]
    assert setting.gains["fine tuning"].tasks == 2
    assert setting.gains["maml"].tasks == 1
    assert any(
        note == "x, maml: left out of ARG, score missing: 1 task (anli)." for note in found.notes
    )
    assert any("adaptation curves are of the tasks and samples" in note for note in found.notes)
    assert not setting.curves


def test_without_a_learned_prompt_or_a_reference_there_is_no_setting(report):
    assert report(run(), tuned()) == find_gains([])
    found = report(run("maml x"), tuned())
    assert not found.settings
    assert found.notes == [
        "x: no average relative gain: no line of plain prompt tuning on the same backbone."
    ]


def test_a_reference_is_of_the_same_backbone(report):
    rows = [run(test=t, backbone=b) for b, t in (("t5", 0.5), ("gpt2", 0.25))]
    rows += [run("maml x", 0.5, backbone=b) for b in ("t5", "gpt2", "bart")]
    rows += [tuned(backbone="gpt2", test=0.75)]
    found = report(*rows)
    assert gain_table(found) == (
        ["sources", "maml", "fine tuning"],
        [
            ["x, backbone gpt2", "100.00 (1/1)", "200.00 (1/1)"],
            ["x, backbone t5", "0.00 (1/1)", "-"],
        ],
    )
    assert found.notes == [
        "x, backbone bart: no average relative gain: no line of plain prompt tuning on the same "
        "backbone."
    ]


def test_numbers_of_shots_are_settings_of_their_own_with_their_own_reference(report):
    """As in Table 3 of the paper."""
    rows = [run(test=k / 100, shots=k) for k in (16, 32)]
    rows += [run("maml x", 0.32, shots=k) for k in (16, 32)]
    _, table = gain_table(report(*rows))
    assert table == [["x, K 16", "100.00 (1/1)"], ["x, K 32", "0.00 (1/1)"]]


def test_an_unclear_reference_is_a_note_and_can_be_named(report):
    rows = [run(test=0.5), run(test=0.25, num_virtual_tokens=20), run("maml x", 0.5)]
    found = report(*rows)
    assert not found.settings
    assert found.notes == [
        "x: no average relative gain: plain prompt tuning is several lines (prompt tuning, N 100; "
        "prompt tuning, N 20); --reference names one."
    ]
    for names, gain in (
        (["prompt tuning, N 20"], 1.0),
        (["fine_tuning", "Prompt_Tuning, n 100"], 0),
    ):
        (setting,) = report(*rows, tuned(), names=names).settings
        assert setting.gains["maml"].value == pytest.approx(gain)


def test_notes_name_three_lines_and_settings_and_count_the_others(report):
    plain = [run(f"file {n}.safetensors") for n in range(6)]
    learned = [run(f"maml {n}") for n in range(5)]
    (note,) = report(*plain, *learned).notes
    assert note == (
        "0; 1; 2; and 2 more: no average relative gain: plain prompt tuning is several lines "
        "(prompt tuning, initialised file 0.safetensors; prompt tuning, initialised file "
        "1.safetensors; prompt tuning, initialised file 2.safetensors; and 3 more); --reference "
        "names one."
    )


def test_an_unclear_fine_tuning_is_a_note_and_the_rest_goes_on(report):
    rows = [run(), run("maml x"), tuned(), tuned(optimizer="adafactor", test=1.0)]
    found = report(*rows)
    assert list(found.settings[0].gains) == ["maml"]
    (note,) = found.notes
    assert "x, fine tuning: no average relative gain: fine tuning is several lines" in note
    (setting,) = report(*rows, names=["fine tuning, optimizer adafactor"]).settings
    assert setting.gains["fine tuning"].value == pytest.approx(1.0)


def test_subspaces_and_untrained_prompts_are_no_method_of_a_setting(report):
    rows = [run(), run("maml x"), run("maml x", 0.1, variant="initial_prompt")]
    rows.append(run(intrinsic_dim=5, variant="subspace", initialised="codes std 0.05 in x"))
    rows.append(tuned(intrinsic_dim=5, variant="random_subspace"))
    (setting,) = report(*rows).settings
    assert list(setting.gains) == ["maml"]
    assert setting.gains["maml"].value == 0


def test_tasks_that_the_reference_lacks_and_missing_scores_are_named(report):
    rows = [run(), run(task="anli", test=0.0), run(task="samsum", sample="13", test=0.0)]
    rows += [run(task="samsum", test=0.5)]
    rows += [run("maml x", test, task) for task, test in (("emo", None), ("anli", 0.5))]
    rows += [run("maml x", 0.5, "wiki_qa"), run("maml x", 0.75, "samsum")]
    rows += [run("maml x", 0.75, "samsum", sample="13")]
    found = report(*rows)
    assert [note for note in found.notes if "ARG" in note] == [
        "x, maml: left out of ARG, reference missing: 1 task (wiki_qa).",
        "x, maml: left out of ARG, reference zero: 1 task (anli).",
        "x, maml: left out of ARG, score missing: 1 task (emo).",
        "x, maml: left out of the spread of ARG, in sample 13, reference zero: 1 task (samsum).",
    ]
    assert show_gain(found.settings[0].gains["maml"]) == "200.00 (1/1)"


def test_when_all_tasks_are_left_out_there_is_a_dash_and_no_bars(report, tmp_path):
    found = report(run(test=0.0), run("maml x"), curves=None)
    assert gain_table(found)[1] == [["x", "-"]]
    assert any("reference zero: 1 task (emo)" in note for note in found.notes)
    assert draw_gains(found, tmp_path) == []


def test_rows_hold_every_figure_with_its_counts(report):
    ours, base = made_up(0), made_up(1)
    base["emo"] = dict.fromkeys(SAMPLES, 0.0)
    rows = list(gain_rows(report(*runs(base, PLAIN), *runs(ours, f"maml {SOURCE}"))))
    whole, *tasks = rows
    found = relative_gain(ours, base, TASKS)
    assert "task" not in whole
    assert (whole["relative_gain"], whole["std"]) == (found.value, found.std)
    assert (whole["tasks"], whole["samples"], whole["left_out"]) == (3, 3, "emo")
    assert [row["task"] for row in tasks] == ["anli", "emo", "wiki_qa", "samsum"]
    for row in tasks:
        one = found.by_task[row["task"]]
        assert (row["score"], row["reference_score"]) == (one.score, one.reference)
        assert row["left_out"] == ("reference zero" if row["task"] == "emo" else "")
        assert row["tasks"] == (row["task"] != "emo")
        assert (row["method"], row["line"]) == ("maml", f"prompt tuning, maml {SOURCE}")


# ---- curves --------------------------------------------------------------------------------------


def fits(root: Path, given: Mapping[str, tuple[Table, Mapping[int, float] | None]]) -> Any:
    """The gains of a folder per initialisation, with one curve for all runs of each."""
    folders = [
        write(root / str(at), runs(table, name), curve)
        for at, (name, (table, curve)) in enumerate(given.items())
    ]
    return find_gains(make_lines(read_results([folder / "results.csv" for folder in folders])))


def test_curves_are_those_of_the_runs_that_count(tmp_path):
    """Runs of one name in two folders are told apart; dev chose the second rate."""
    table = made_up(0, ["emo"], ["100"])
    rows = runs(table, PLAIN)
    rows += [{**rows[0], "learning_rate": 0.5, "dev": 0.9, "prompt_file": "prompts/b.safetensors"}]
    write(tmp_path / "a", rows)
    lines = [{"step": 10, "run": "b", "dev": 0.9}]
    write_csv(tmp_path / "a" / "curves.csv", CURVE_COLUMNS, lines)
    write(tmp_path / "b", runs(table, "maml x"), {10: 0.25})
    files = [tmp_path / name / "results.csv" for name in ("a", "b")]
    (setting,) = find_gains(make_lines(read_results(files))).settings
    found = {start: [(p.step, p.mean) for p in points] for start, points in setting.curves.items()}
    assert found == {"plain": [(10, 0.9)], "maml": [(10, 0.25)]}


def test_curves_are_of_the_tasks_and_samples_that_all_starts_have(tmp_path):
    ours = made_up(0, ["emo", "anli"])
    del ours["anli"]["13"]
    found = fits(tmp_path, {PLAIN: (made_up(1), CURVES), "maml x": (ours, CURVES)})
    (setting,) = found.settings
    assert {(p.tasks, p.samples) for points in setting.curves.values() for p in points} == {(2, 3)}
    notes = [note for note in found.notes if "adaptation" in note]
    assert notes[0] == (
        "x: adaptation curves are of the tasks and samples that all of plain, maml have; left out: "
        "1 pair of 1 task (anli)."
    )
    assert "not every sample has all tasks" in notes[1]


def test_missing_curves_are_noted_and_the_report_goes_on(tmp_path):
    given = {PLAIN: (made_up(0), None), "maml x": (made_up(1), CURVES)}
    found = fits(tmp_path, given)
    assert list(found.settings[0].curves) == ["maml"]
    assert found.notes == [
        f"x, plain: no adaptation curve for 12 runs, without a curves.csv: {tmp_path / '0'}."
    ]
    (tmp_path / "1" / "curves.csv").write_text("word\nx\n")
    lines = make_lines(read_results([tmp_path / at / "results.csv" for at in ("0", "1")]))
    found = find_gains(lines)
    assert not found.settings[0].curves
    assert any("with a curves.csv that cannot be read" in note for note in found.notes)


def test_runs_that_ended_early_are_noted(tmp_path):
    rows = runs(made_up(0), PLAIN, status="stopped early")[:-1]
    folder = write(tmp_path / "a", rows, {0: 0.1, 10: 0.2})
    rows += [run(PLAIN, 0.5, TASKS[-1], sample=SAMPLES[-1], prompt_file="prompts/x.safetensors")]
    write_csv(folder / "results.csv", RESULT_COLUMNS, rows)
    with (folder / "curves.csv").open("a") as file:
        csv.DictWriter(file, CURVE_COLUMNS).writerows(
            {"step": step, "run": "x", "dev": 0.2} for step in (0, 10, 20)
        )
    write(tmp_path / "b", runs(made_up(1), "maml x"), CURVES)
    files = [tmp_path / name / "results.csv" for name in ("a", "b")]
    found = find_gains(make_lines(read_results(files)))
    assert found.notes == [
        "x: adaptation curves carry on the last dev score of runs that ended before the last step "
        "(patience or failure): 11 of 12 runs of plain."
    ]
    assert [point.step for point in found.settings[0].curves["plain"]] == [0, 10, 20]


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs ``prompt-lab report`` in an empty folder: status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def go(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = offline.run(["report", *words])
        return (status, *capsys.readouterr())

    return go


def test_the_command_writes_tables_and_pictures_of_every_setting(command):
    """Settings whose names make one file name get one each."""
    sources = ("a/b", "a b", "x" * 200)
    for at, name in enumerate([PLAIN, *(f"maml {source}" for source in sources)]):
        write(Path(f"runs/{at}"), runs(made_up(at), name))
    status, out, err = command("runs", "--out", "out")
    assert (status, err) == (0, "")
    for name in ("a_b", "a_b--2", "x" * 100):
        for kind in ("gains", "adaptation"):
            assert Path(f"out/{kind}-{name}.png").stat().st_size
            assert f"out/{kind}-{name}.svg" in out
    assert "## Average relative gain" in out
    rows = read_csv(Path("out/gains.csv"))
    assert len(rows) == 3 * (1 + len(TASKS))
    expected = relative_gain(made_up(1), made_up(0), TASKS)
    (mean,) = [row for row in rows if row["setting"] == "a/b" and not row["task"]]
    assert float(mean["relative_gain"]) == pytest.approx(expected.value)
    points = read_csv(Path("out/adaptation.csv"))
    assert len(points) == 3 * 2 * len(CURVES)
    for point in points:
        assert point["initialisation"] in ("plain", "maml")
        assert float(point["mean_dev"]) == pytest.approx(CURVES[int(point["step"])])


def test_a_report_without_learned_prompts_has_nothing_of_gains(command):
    write(Path("runs"), [run(), tuned()])
    status, out, _ = command("runs", "--out", "out")
    assert status == 0
    assert "Average relative gain" not in out
    assert not [
        path for path in Path("out").iterdir() if "gain" in path.name or "adapt" in path.name
    ]
