"""Reports: their numbers equal those of the old code, they count all runs, and say what is wrong.

``data/report`` holds results of made-up studies (scores, gains, starts, vectors) and of small fits
(pins), and ``expected`` what the report of version 0.1.0 printed for them.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from prompt_lab.__main__ import main as run
from prompt_lab.analysis.report import make_report, write_report
from prompt_lab.analysis.sections import Section, compare_runs, literal
from prompt_lab.analysis.statistics import holm
from prompt_lab.analysis.tables import chosen_runs, read_lines
from prompt_lab.commands.report import report_command
from prompt_lab.data.partitions import partition

DATA = Path(__file__).parent / "report"
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


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Section]]:
    """The sections of every study by name."""
    found = partition("ipt/random")
    sets = {name: getattr(found, name) for name in ("source", "dev", "target")}
    return {
        study: {x.name: x for x in make_report(lines_of(study), references, sets)}
        for study, (_, references) in STUDIES.items()
    }


@pytest.mark.parametrize("path", EXPECTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_numbers_equal_those_of_the_old_report(reports, path):
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


def test_correction_equals_the_old_one():
    expected = pd.read_csv(CONTESTS)
    own = expected[~expected["shots"].astype(str).eq("0")]
    np.testing.assert_allclose(holm(expected["p"])[own.index], own["p_corrected"], rtol=1e-12)


@pytest.mark.parametrize("study", STUDIES)
def test_runs_in_are_runs_out(reports, study):
    runs, sections = lines_of(study), reports[study]
    sums = runs["variant"].isin(["vectors", "vector_alone"]).sum()
    assert sections["scores"].table["runs"].sum() == len(runs) - sums
    for name, section in sections.items():
        if name.startswith(("gains-", "score-by-o", "e_rel")) and "dimension" not in name:
            assert section.table["runs"].sum() == len(runs) - sums, name
    made = [x.table["runs"].sum() for name, x in sections.items() if name.startswith("vectors-")]
    assert sum(made) == (runs["variant"] == "vectors").sum()


@pytest.mark.parametrize("study", STUDIES)
def test_the_legend_counts_the_runs_of_the_lines(reports, study):
    section = reports[study]["lines"]
    counts = section.table.set_index("what").loc["runs"].astype(int)
    assert section.legend.startswith(f"{counts.sum()} runs of ")
    shared = lines_of(study)["line"].isin(["no_prompt", "chance", "majority"]).sum()
    assert (f"and {shared} of baselines that all lines share" in section.legend) == (shared > 0)


def test_five_lines_of_pandas_make_the_main_table(reports):
    table = reports["gains"]["scores"].table.set_index("label")["score"]
    for line, expected in table.items():
        runs = pd.read_csv(DATA / "gains" / str(line) / "results.csv").query("variant == 'tuned'")
        cell = ["task", "sample", "init_seed", "order_seed"]
        best = runs.sort_values(["dev", "run"], ascending=[False, True]).drop_duplicates(cell)
        scores = best.groupby(["task", "sample"]).test.mean().groupby("task").mean()
        assert scores.mean() == pytest.approx(expected, rel=1e-12)


def test_a_report_is_the_same_twice_and_has_all_its_files(tmp_path):
    for place in ("one", "two"):
        write_report(make_report(lines_of("gains"), ["plain"]), tmp_path / place)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"report.md", "report.html", "scores.csv", "gains-plain.png", "adaptation.svg"} <= {
        *files
    }
    for name in files:
        same = (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert same, name
    text = (tmp_path / "one" / "report.md").read_text()
    assert all(f"]({name})" in text for name in files if name.endswith(".png"))
    page = (tmp_path / "one" / "report.html").read_text()
    assert "<b>" in page
    assert "**" not in page


def test_the_best_is_marked_and_counts_stand_once(reports):
    section = reports["gains"]["scores"]
    best = section.table.loc[section.table["tasks"].eq(4), "score"].idxmax()
    assert section.shown["score"][best].startswith("**")
    assert section.shown["score"].str.startswith("**").sum() == 1
    assert "4 tasks in every row" in reports["gains"]["gains-plain"].legend
    assert "tasks" not in reports["gains"]["gains-plain"].shown


@pytest.mark.parametrize("study", STUDIES)
def test_legends_are_sentences(reports, study):
    for name, section in reports[study].items():
        assert section.legend.endswith("."), name
        assert not re.search(r"\bnan\b|\bNone\b|\(\'|\b1 \w+s\b", section.legend), name


def test_lines_of_fewer_tasks_are_none_of_the_best_and_baselines_are_told_apart(tmp_path):
    frame = write(tmp_path / "one", test="0.5")
    write(tmp_path / "two", test="0.4")
    write(tmp_path / "three", test="0.3")
    few = frame[frame["task"] == frame["task"].iloc[0]].assign(test="0.9")
    (tmp_path / "few").mkdir()
    few.to_csv(tmp_path / "few" / "results.csv", index=False)
    runs = read_lines({name: tmp_path / name for name in ("one", "two", "three", "few")})
    for section in make_report(runs, ["two"]):
        if section.name in ("scores", "gains-two"):
            best = section.shown.set_index("line").iloc[:, 0].str.startswith("**")
            assert best[best].index.tolist() == ["one"], section.name
            assert section.shown.set_index("line").loc["few", "tasks"] == 1
    chance = frame.drop_duplicates("task").iloc[:3].assign(variant="chance", dev="", run="")
    for name in ("one", "two"):
        both = pd.concat([frame, chance])
        both.to_csv(tmp_path / name / "results.csv", index=False)
    runs = read_lines({name: tmp_path / name for name in ("one", "two")})
    section = {x.name: x for x in make_report(runs)}["scores"]
    assert section.shown.set_index("line")["tasks"].to_dict() == {"one": 4, "two": 4, "chance": 3}
    assert "12 runs in every row, baselines apart. " in section.legend


def test_settings_in_which_lines_differ_stand_in_a_table(tmp_path):
    for name, flag in (("one", 0.0), ("two", 0.1)):
        write(tmp_path / name, settings=f'{{"model.label_smoothing": {flag}}}')
    section = make_report(read_lines({x: tmp_path / x for x in ("one", "two")}))[0]
    shown = section.shown.set_index("")
    assert [*shown.loc["model.label_smoothing"]] == ["0.0", "0.1"]
    assert "model.num_beams" not in shown.index


def write(folder: Path, **cells: object) -> pd.DataFrame:
    """Results of a line of the studies, with some cells in all rows."""
    frame = pd.read_csv(DATA / "gains" / "plain" / "results.csv", dtype=str, keep_default_na=False)
    frame = frame.assign(**{name: cell for name, cell in cells.items()})
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "results.csv", index=False)
    return frame


def test_codes_and_norms_are_read_from_the_prompt_files(tmp_path):
    init = np.ones((2, 4), np.float32)
    tensors = {"prompt": 3 * init, "init": init}
    for at, task in enumerate(("emo", "boolq", "glue-rte", "ag_news")):
        code = np.array([at, at**2, 1], np.float32)
        save_file(tensors | {"code": code}, tmp_path / f"{task}.safetensors")
    write(tmp_path / "plain", intrinsic_dim="3")
    frame = pd.read_csv(tmp_path / "plain" / "results.csv")
    frame.assign(prompt_file="../" + frame["task"] + ".safetensors").to_csv(
        tmp_path / "plain" / "results.csv", index=False
    )
    sections = {x.name: x for x in make_report(read_lines({"plain": tmp_path / "plain"}))}
    assert sections["codes"].table["codes"].sum() == len(chosen_runs(read_lines({"x": tmp_path})))
    assert [*sections["codes"].figures] == ["codes-plain"]
    frame = pd.read_csv(DATA / "vectors" / "cross" / "results.csv")
    (tmp_path / "cross").mkdir()
    frame.assign(prompt_file="../emo.safetensors").to_csv(
        tmp_path / "cross" / "results.csv", index=False
    )
    (section,) = (
        x for x in make_report(read_lines({"x": tmp_path / "cross"})) if x.name == "vectors-cross"
    )
    assert section.table["ratio"].tolist() == pytest.approx([2.0] * 4)


# ---- tests are honest ----------------------------------------------------------------------------


def made(folder: Path, scores: dict[str, tuple[float, float]]) -> dict[str, Path]:
    """Lines of four seeds with these mean dev and test scores."""
    places = {}
    for name, (dev, test) in scores.items():
        frame = write(folder / name).iloc[:4]
        frame = frame.assign(task="emo", ontology="cls", init_seed=[*"0123"], sample="13", run="0")
        noise = np.random.default_rng(len(name)).normal(0, 0.01, 4)
        frame = frame.assign(dev=dev + noise, test=test + noise[::-1])
        frame.to_csv(folder / name / "results.csv", index=False)
        places[name] = folder / name
    return places


def test_the_tested_pair_is_the_one_that_dev_puts_first(tmp_path):
    scores = {"a": (0.9, 0.2), "bb": (0.8, 0.5), "ccc": (0.1, 0.9)}
    runs = read_lines(made(tmp_path, scores))
    table = {x.name: x for x in make_report(runs)}["tests"].table
    assert table[["one", "other"]].to_numpy().tolist() == [["a", "bb"]]
    assert table["difference"][0] < 0


def test_with_a_reference_every_line_is_tested_against_it(tmp_path):
    scores = {"a": (0.9, 0.2), "bb": (0.8, 0.5), "ccc": (0.1, 0.9)}
    runs = read_lines(made(tmp_path, scores))
    section = {x.name: x for x in make_report(runs, ["bb"])}["tests"]
    assert section.table[["one", "other"]].to_numpy().tolist() == [["a", "bb"], ["ccc", "bb"]]
    assert (section.table["test"] == "paired").all()
    np.testing.assert_allclose(section.table["p_corrected"], holm(section.table["p"]))
    assert "over the 2 tests" in section.legend


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
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, capsys, words, message):
    words = [word.replace("DATA", str(DATA)) for word in words]
    assert run(["report", *words, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_out_is_no_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="name a folder"):
        report_command([str(DATA / "gains" / "plain")], out=str(tmp_path / "file"))


def test_sums_at_several_k_stay_apart(tmp_path):
    results = DATA / "vectors" / "expressions" / "results.csv"
    again = pd.read_csv(results, dtype=str, keep_default_na=False)
    again["test"] = [str(float(x) / 2) if x else x for x in again["test"]]
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "results.csv").write_bytes(results.read_bytes())
    (tmp_path / "many").mkdir()
    again.assign(shots="999").to_csv(tmp_path / "many" / "results.csv", index=False)
    found = {x.name: x.table for x in make_report(read_lines({"k": tmp_path}), [], {})}
    few, many = (own for _, own in found["vectors-expressions"].groupby("line", sort=False))
    np.testing.assert_allclose(few["tuned"], 2 * many["tuned"])


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
