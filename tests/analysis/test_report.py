"""Results as tables and reports: numbers equal those on record, nothing is merged silently.

``report`` holds results of made-up studies (scores, gains, starts, vectors) and of small fits
(pins), and ``expected`` the tables that another implementation made of them.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from prompt_lab.__main__ import main as run
from prompt_lab.analysis.report import compare_runs, make_report
from prompt_lab.analysis.sections import Section, literal, write_report
from prompt_lab.analysis.statistics import holm
from prompt_lab.analysis.tables import (
    chosen_runs,
    mean_over_tasks,
    read_lines,
    read_results,
    relate,
    shots_rank,
    task_scores,
)
from prompt_lab.data.partitions import partition

DATA = Path(__file__).parent / "report"
PLAIN = DATA / "gains" / "plain" / "results.csv"
CONTESTS = DATA / "expected" / "starts" / "contests.csv"
EXPECTED = sorted({*(DATA / "expected").rglob("*.csv")} - {CONTESTS})
STUDIES = {
    "scores": (["plain", "ft", "random", "msf"], ["plain", "ft"]),
    "gains": (["plain", "maml", "reptile", "ft"], ["plain"]),
    "starts": (["plain", "spot", "attempt"], []),
    "vectors": (["cross", "pairs", "expressions"], []),
    "pins": (
        [
            *("prompts", "prompts_random_subspace", "prompts_from_sources", "attempt"),
            *("fine_tuning", "vectors_cross", "vectors_pairs"),
        ],
        ["prompts", "fine_tuning"],
    ),
}


def lines_of(study: str) -> pd.DataFrame:
    return read_lines({name: DATA / study / name for name in STUDIES[study][0]})


def report_of(study: str) -> dict[str, Section]:
    """The sections of a study by name."""
    found = partition("ipt/random")
    sets = {name: getattr(found, name) for name in ("source", "dev", "target")}
    return {x.name: x for x in make_report(lines_of(study), STUDIES[study][1], sets)}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Section]]:
    return {study: report_of(study) for study in STUDIES}


def sections_of(places: dict[str, Path], *references: str) -> dict[str, Section]:
    return {x.name: x for x in make_report(read_lines(places), references)}


def write(folder: Path, frame: pd.DataFrame | None = None, **cells: object) -> Path:
    """Results of a line of the studies, or others, with some cells in all rows."""
    if frame is None:
        frame = pd.read_csv(PLAIN, dtype=str, keep_default_na=False)
    folder.mkdir(parents=True, exist_ok=True)
    frame.assign(**cells).to_csv(folder / "results.csv", index=False)
    return folder


# ---- lines: nothing is merged silently -----------------------------------------------------------

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
COLUMNS = {"method": "Attempt", "backbone": "gpt2", "num_virtual_tokens": "8", "metric": "EM"}


@pytest.mark.parametrize("name", [*TEN_SETTINGS, *COLUMNS])
def test_fits_that_differ_in_a_setting_or_column_are_no_line(tmp_path, name):
    write(tmp_path / "a")
    settings = {"settings": json.dumps({name: TEN_SETTINGS.get(name)}), "order_seed": "1"}
    write(tmp_path / "b", **({name: COLUMNS[name]} if name in COLUMNS else settings))
    with pytest.raises(ValueError, match=rf"^mixed: {name}.* differs within the line: ") as e:
        read_lines({"mixed": tmp_path})
    assert str(tmp_path / "a") in str(e.value)
    assert str(tmp_path / "b") in str(e.value)
    runs = read_lines({"a": tmp_path / "a", "b": tmp_path / "b"})
    assert len(runs) == 2 * len(read_results(PLAIN))


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


def baselines(folder: Path, score: str, shots: str = "16") -> Path:
    """The line with the baseline that needs no method."""
    frame = pd.read_csv(PLAIN, dtype=str, keep_default_na=False)
    empty = dict.fromkeys(("init_seed", "order_seed", "start", "start_seed", "learning_rate"), "")
    first = frame.drop_duplicates(["task", "sample"]).assign(dev="", batch_size="", **empty)
    first = first.assign(variant="no_prompt", test=score)
    return write(folder, pd.concat([frame, first]), shots=shots)


def test_baselines_are_shared_where_all_lines_agree_and_are_points_of_their_k(tmp_path):
    places = {name: baselines(tmp_path / name, "0.25") for name in ("a", "b")}
    runs = read_lines(places)
    assert runs["label"].unique().tolist() == ["a", "b", "no prompt"]
    assert runs.attrs["twice"] == len(read_results(PLAIN)[["task", "sample"]].drop_duplicates())
    places["c"] = baselines(tmp_path / "c", "0.5")
    labels = read_lines(places)["label"].unique().tolist()
    assert labels == ["a", "b", "c", *(f"{x}, no prompt" for x in "abc")]
    for k in ("16", "32"):
        baselines(tmp_path / "k" / k, "0.25", k)
    labels = read_lines({"a": tmp_path / "k"})["label"].unique().tolist()
    assert labels == ["a, K 16", "a, K 32", "no prompt, K 16", "no prompt, K 32"]


def test_ratios_leave_out_what_says_nothing(tmp_path):
    runs = read_lines({x: write(tmp_path / x) for x in "ab"})
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


WHOLE, FIRST, *_ = PLAIN.read_text().splitlines()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no columns fit_id and test"),
        ("fit_id,test,version\nx,1,0.1.0\n", r"lacks the columns method.*version.*\(0\.1\.0\)"),
        ("", "no results.csv of prompt-lab"),
        ("fit_id,test\n1,2,3,4\n1,2\n", "lacks the columns|no results"),
        ("\x00\xff", "no results.csv of prompt-lab"),
        (f"{WHOLE}\n{FIRST}\n{FIRST[:40]}", "line 3: fewer cells than columns"),
        (f"{WHOLE}\n", r"no runs in .*only a header"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "results.csv").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=message):
        read_lines({"x": tmp_path})


def test_cells_that_are_no_numbers_and_folders_without_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="line 2: test is 'high', not a number"):
        read_lines({"x": write(tmp_path, test="high")})
    with pytest.raises(ValueError, match="no JSON object"):
        read_lines({"x": write(tmp_path, settings="[1")})
    (tmp_path / "results.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no results\.csv in"):
        read_lines({"x": tmp_path})


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXPECTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_numbers_equal_those_on_record(reports, path):
    study, expected = path.parent.name, pd.read_csv(path, dtype={"shots": str})
    table = reports[study][path.stem].table.astype({"shots": str} if "shots" in expected else {})
    if "arg" in expected:
        table = table.assign(arg=table["e_rel"] - 1)
    keys = [
        name
        for name in ("label", "name", "task", "set", "step", "shots", "expression")
        if name in expected
    ]
    both = expected.merge(table, on=keys, suffixes=("", "_now"), validate="1:1")
    assert len(both) == len(expected)
    for name in [name for name in expected if name not in keys]:
        old, new = both[name], both[f"{name}_now"]
        if name in ("vector", "kept"):
            assert [*old.fillna("")] == [*new.fillna("")]
        else:
            new = new.astype(float).where(old.notna() | (name not in ("arg", "arg_std", "samples")))
            np.testing.assert_allclose(new, old, rtol=1e-12, atol=1e-13, err_msg=name)


def test_the_same_pairs_give_the_same_tests():
    expected = pd.read_csv(CONTESTS, dtype={"shots": str})
    runs = chosen_runs(lines_of("starts"))
    found = []
    for _, row in expected.iterrows():
        own = runs[(runs["task"] == row["task"]) & (runs["shots"] == row["shots"])]
        found.append(compare_runs(*(own[own["name"] == row[side]] for side in ("one", "other"))))
    now = pd.DataFrame(found)
    for name, column in (("difference",) * 2, ("low", "difference_low"), ("t",) * 2, ("p",) * 2):
        known = expected[column].notna() & now[name].notna()
        assert known.sum() >= len(expected) - 2
        np.testing.assert_allclose(now[name][known], expected[column][known], rtol=1e-9)
    own = ~expected["shots"].eq("0")
    np.testing.assert_allclose(holm(expected["p"])[own], expected["p_corrected"][own], rtol=1e-12)


@pytest.mark.parametrize("study", STUDIES)
def test_runs_in_are_runs_out_and_legends_are_sentences(reports, study):
    runs, sections = lines_of(study), reports[study]
    sums = runs["variant"].isin(["vectors", "vector_alone"]).sum()
    assert sections["scores"].table["runs"].sum() == len(runs) - sums
    for name, section in sections.items():
        if name.startswith(("gains-", "score-by-o", "e_rel")) and "dimension" not in name:
            assert section.table["runs"].sum() == len(runs) - sums, name
        assert section.legend.endswith("."), name
        assert not re.search(r"\bnan\b|\bNone\b|\(\'|\b1 \w+s\b", section.legend), name
    made = [x.table["runs"].sum() for name, x in sections.items() if name.startswith("vectors-")]
    assert sum(made) == (runs["variant"] == "vectors").sum()
    counts = sections["lines"].table.set_index("what").loc["runs"].astype(int)
    assert sections["lines"].legend.startswith(f"{counts.sum()} runs of ")
    shared = runs["line"].isin(["no_prompt", "chance", "majority"]).sum()
    assert (f"and {shared} of baselines" in sections["lines"].legend) == (shared > 0)


def test_scores_by_task_stand_beside_no_prompt_chance_and_majority(reports):
    section, runs = reports["scores"]["tasks"], lines_of("scores")
    beside = section.table[section.table["line"].isin(["no_prompt", "chance", "majority"])]
    assert not beside.empty
    assert {*beside["name"]} <= {*section.shown.columns}
    for _, row in beside.iterrows():
        own = runs[(runs["line"] == row["line"]) & (runs["task"] == row["task"])]
        assert row["score"] == pytest.approx(own.groupby("sample")["test"].mean().mean())
        assert "**" not in section.shown.set_index("task").loc[row["task"], row["name"]]


def test_a_report_is_the_same_twice_and_has_all_its_files(tmp_path, reports):
    for place, report in (("one", reports["gains"]), ("two", report_of("gains"))):
        write_report([*report.values()], tmp_path / place)
    one, two = ({x.name: x.read_bytes() for x in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert {"report.md", "report.html", "scores.csv", "gains-plain.png", "adaptation.svg"} <= {*one}
    text, page = one["report.md"].decode(), one["report.html"].decode()
    assert all(f"]({name})" in text for name in one if name.endswith(".png"))
    assert "<b>" in page
    assert "**" not in page


def test_the_best_of_the_usual_number_of_tasks_is_marked_and_counts_stand_once(tmp_path, reports):
    assert "4 tasks in every row" in reports["gains"]["gains-plain"].legend
    assert "tasks" not in reports["gains"]["gains-plain"].shown
    scores = {"one": "0.5", "two": "0.4", "three": "0.3", "few": "0.9"}
    places = {name: write(tmp_path / name, test=test) for name, test in scores.items()}
    frame = pd.read_csv(PLAIN, dtype=str, keep_default_na=False)
    write(tmp_path / "few", frame[frame["task"] == frame["task"].iloc[0]], test="0.9")
    for name, section in sections_of(places, "two").items():
        if name in ("scores", "gains-two"):
            shown = section.shown.set_index("line")
            assert [*shown.index[shown.iloc[:, 0].str.startswith("**")]] == ["one"], name
            assert shown.loc["few", "tasks"] == 1
    chance = frame.drop_duplicates("task").iloc[:3].assign(variant="chance", dev="", run="")
    for name in ("one", "two"):
        write(tmp_path / name, pd.concat([frame, chance]))
    section = sections_of({x: tmp_path / x for x in ("one", "two")})["scores"]
    assert section.shown.set_index("line")["tasks"].to_dict() == {"one": 4, "two": 4, "chance": 3}
    assert "12 runs in every row, baselines apart. " in section.legend


def test_settings_in_which_lines_differ_stand_in_a_table(tmp_path):
    for name, flag in (("one", 0.0), ("two", 0.1)):
        write(tmp_path / name, settings=f'{{"model.label_smoothing": {flag}}}')
    shown = sections_of({x: tmp_path / x for x in ("one", "two")})["lines"].shown.set_index("")
    assert [*shown.loc["model.label_smoothing"]] == ["0.0", "0.1"]
    assert "model.num_beams" not in shown.index


def test_codes_and_norms_are_read_from_the_prompt_files(tmp_path):
    init = np.ones((2, 4), np.float32)
    tensors = {"prompt": 3 * init, "init": init}
    for at, task in enumerate(("emo", "boolq", "glue-rte", "ag_news")):
        code = np.array([at, at**2, 1], np.float32)
        save_file(tensors | {"code": code}, tmp_path / f"{task}.safetensors")
    frame = pd.read_csv(PLAIN)
    files = "../" + frame["task"] + ".safetensors"
    places = {"plain": write(tmp_path / "plain", frame, prompt_file=files, intrinsic_dim=3)}
    sections = sections_of(places)
    assert sections["codes"].table["codes"].sum() == len(chosen_runs(read_lines(places)))
    assert [*sections["codes"].figures] == ["codes-plain"]
    frame = pd.read_csv(DATA / "vectors" / "cross" / "results.csv")
    places = {"x": write(tmp_path / "cross", frame, prompt_file="../emo.safetensors")}
    assert sections_of(places)["vectors-cross"].table["ratio"].tolist() == pytest.approx([2.0] * 4)


def test_tests_are_of_the_pair_that_dev_puts_first_or_against_the_reference(tmp_path):
    frame = pd.read_csv(PLAIN, dtype=str, keep_default_na=False).iloc[:4]
    frame = frame.assign(task="emo", ontology="cls", init_seed=[*"0123"], sample="13", run="0")
    places = {}
    for name, dev, test in (("a", 0.9, 0.2), ("bb", 0.8, 0.5), ("ccc", 0.1, 0.9)):
        noise = np.random.default_rng(len(name)).normal(0, 0.01, 4)
        places[name] = write(tmp_path / name, frame, dev=dev + noise, test=test + noise[::-1])
    table = sections_of(places)["tests"].table
    assert table[["one", "other"]].to_numpy().tolist() == [["a", "bb"]]
    assert table["difference"][0] < 0
    section = sections_of(places, "bb")["tests"]
    assert section.table[["one", "other"]].to_numpy().tolist() == [["a", "bb"], ["ccc", "bb"]]
    assert (section.table["test"] == "paired").all()
    np.testing.assert_allclose(section.table["p_corrected"], holm(section.table["p"]))
    assert "over the 2 tests" in section.legend


def test_sums_at_several_k_stay_apart(tmp_path):
    frame = pd.read_csv(DATA / "vectors" / "expressions" / "results.csv")
    write(tmp_path / "few", frame)
    write(tmp_path / "many", frame, test=frame["test"] / 2, shots="999")
    table = sections_of({"k": tmp_path})["vectors-expressions"].table
    few, many = (own for _, own in table.groupby("line", sort=False))
    np.testing.assert_allclose(few["tuned"], 2 * many["tuned"])


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_names_lines_by_folder_or_as_told(tmp_path, capsys):
    words = [f"one={DATA / 'gains' / 'plain'}", str(DATA / "gains" / "maml")]
    out = tmp_path / "report"
    assert run(["report", *words, "--reference", "one", "--out", str(out)]) == 0
    assert pd.read_csv(out / "scores.csv")["line"].tolist() == ["one", "maml"]
    printed = capsys.readouterr().out
    assert "| maml" in printed
    assert str(out / "report.md") in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DATA/gains/plain", "DATA/scores/plain"], "two lines are named plain"),
        (["DATA/gains/none"], "no file or folder"),
        (["DATA/gains/plain", "--reference", "maml"], "no reference 'maml' among the lines plain"),
        (["DATA/gains/plain", "--partition", "none"], "none"),
        (["DATA/scores/msf", "DATA/scores/ft", "--reference", "msf"], "several references"),
        (["DATA/pins/prompts/curves.csv"], "no columns fit_id and test"),
        (["DATA/gains/plain", "--out", str(PLAIN)], "is a file: name a folder"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, capsys, words, message):
    words = [word.replace("DATA", str(DATA)) for word in words]
    assert run(["report", "--out", str(tmp_path), *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---- cells ---------------------------------------------------------------------------------------

MARKS = [
    *("a|b", "*", "**", "**bold** _it_ ~~no~~", "`x`", "<b>&amp;</b>", "[a](http://b.c) @f #1"),
    *("\\", "\\|", "\\n", "\\**", "|", "_", "تناقض", "准确", "\"'", "$x$", "a__b", "&lt;"),
]


class Cells(HTMLParser):
    """Texts of the cells of all tables, and of what is bold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.bold: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.cells += [""] * (tag == "td")
        self.bold += [""] * (tag in ("b", "strong"))

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass  # such as <meta> has no end

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data
        if {"b", "strong"} & {*self.open}:
            self.bold[-1] += data


@pytest.mark.parametrize("text", MARKS)
@pytest.mark.parametrize("is_bold", [False, True])
def test_a_text_of_any_marks_is_one_cell_that_shows_it_as_it_is(tmp_path, text, is_bold):
    """Reference: a parser of HTML, and one of Markdown."""
    markdown_it = pytest.importorskip("markdown_it")
    cell = f"**{literal(text)}** 0.5" if is_bold else f"{literal(text)} 0.5"
    shown = pd.DataFrame({"a": ["1"], "b": [cell], "c": ["a|b *"]})
    write_report([Section("x", "X", "", shown, shown)], tmp_path, "Tokens & more")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>Tokens &amp; more</title>" in page
    rules = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for found in (page, rules.render((tmp_path / "report.md").read_text(encoding="utf-8"))):
        made = Cells(found)
        assert made.cells == ["1", f"{text} 0.5", "a|b *"]
        assert made.bold == [text] * is_bold
