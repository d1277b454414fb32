"""``prompt-lab interpret``: what is read, written and drawn, how tokens look, what is refused."""

from __future__ import annotations

import csv
import math
import re
from contextlib import redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist
from test_plots import assert_readable

from prompt_lab import offline
from prompt_lab.backbone import Backbone
from prompt_lab.interpret_command import (
    byte_letters,
    is_byte_level,
    read_vocabulary,
    readable,
)
from prompt_lab.interpretation import initial_tokens
from prompt_lab.interpretation_plots import (
    MOST_CELLS,
    drift_map,
    heatmap,
    norm_violins,
    outline,
    prompt_map,
    tsne_points,
)
from prompt_lab.prompt_file import Prompt, PromptStore, save_prompt
from prompt_lab.report_blocks import Block, Token, as_html, as_markdown

N = 4
TASKS = ("one", "two")
NASTY = {
    "pipe": "a|b",
    "backtick": "`x`",
    "stars": "**bold** _it_ ~~no~~",
    "html": "<b>&amp;</b>",
    "link": "[a](http://b.c) www.d.e @f #1",
    "backslash": "\\n",
    "newline": "a\nb\r\t",
    "arabic": "تناقض",
    "hebrew": "שלום!",
    "indic": "ि",
    "han": "准确",
    "override": "a\u202eb",
    "quote": "\"'",
    "dollar": "$x$",
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(model_folder) -> Backbone:
    return Backbone.load(str(model_folder("bloom")))


def prompt(model: Backbone, task: str, seed: int, length: int = N, **facts: Any) -> Prompt:
    """Starts from tokens 10, 11, ...; the first row becomes token 50, the others hardly move."""
    table = model.embedding_table()
    init = table[10 : 10 + length]
    noise = torch.randn(init.shape, generator=torch.Generator().manual_seed(seed + len(task)))
    tuned = init + 0.01 * noise
    tuned[0] = 2 * table[50] + 0.01 * noise[0]
    given: dict[str, Any] = {"name": f"{task}_seed{seed}", "init_seed": seed, "sample": 13}
    given |= {"backbone": model.name, "backbone_digest": model.digest, "dev_score": 0.5}
    given |= {"tokenizer_digest": "b", "task": task, **facts}
    return Prompt(prompt=tuned, init=init, **given)


@pytest.fixture
def store(model: Backbone) -> str:
    PromptStore("store").save([prompt(model, task, seed) for task in TASKS for seed in range(3)])
    return "store"


@pytest.fixture(scope="module")
def made(model: Backbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a report on six prompts, and what was printed."""
    folder = tmp_path_factory.mktemp("made")
    PromptStore(folder / "store").save([prompt(model, t, seed) for t in TASKS for seed in range(3)])
    with redirect_stdout(StringIO()) as printed:
        assert command(str(folder / "store"), "--out", str(folder / "out"), "--top", "3") == 0
    return folder / "out", printed.getvalue()


def command(*words: str) -> int:
    """Exit status of ``prompt-lab interpret``."""
    return offline.run(["interpret", *words])


def rows_of(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Cells(HTMLParser):
    """Texts of the cells of all tables, and sources of all pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.images: list[str] = []
        self._is_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "td":
            self.cells.append("")
        self._is_cell = self._is_cell or tag == "td"
        self.images += [value or "" for name, value in attrs if name == "src"]

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = self._is_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.cells[-1] += data


# ---- the command ---------------------------------------------------------------------------------


def test_the_tables_hold_nearest_tokens_survival_and_drift(made, model):
    """Reference: SciPy's cosine distances to all tokens that are not special."""
    folder, printed = made
    assert {str(path) for path in folder.iterdir()} <= set(printed.splitlines())
    rows = rows_of(folder / "tokens.csv")
    assert [row["row"] for row in rows] == ["1", "2", "3", "4"] * 6
    table = model.embedding_table().double().numpy()
    allowed = [i for i in range(len(table)) if i not in model.tokenizer.all_special_ids]
    given = prompt(model, "one", 0)
    far = cdist(given.prompt.double().numpy(), table[allowed], "cosine")
    for at, row in enumerate(rows[:N]):
        order = np.argsort(far[at])
        assert [int(row[f"id_{k}"]) for k in (1, 2, 3)] == [allowed[i] for i in order[:3]]
        assert float(row["score_2"]) == pytest.approx(1 - far[at, order[1]])
        assert row["initial_id"] == str(10 + at)
        place = [allowed[i] for i in order].index(10 + at) + 1
        assert (row["initial_rank"], row["survived"]) == (str(place), str(int(place == 1)))
        drift = float((given.prompt[at] - given.init[at]).norm())
        assert float(row["drift"]) == pytest.approx(drift, rel=1e-5)
    assert rows[0]["id_1"] == "50"
    prompts = rows_of(folder / "prompts.csv")
    assert [(row["survived"], row["initial_tokens"]) for row in prompts] == [("3", "4")] * 6
    assert len(rows_of(folder / "distances.csv")) == 15
    assert [row["runs"] for row in rows_of(folder / "spread.csv")] == ["3", "3"]


def test_the_report_is_one_page_with_all_figures_and_tokens(made, model):
    folder, printed = made
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert '<meta charset="utf-8">' in text
    page = Cells(text)
    assert len(page.images) == 6
    assert all((folder / image).is_file() for image in page.images)
    names = read_vocabulary(model).names
    assert names[50] in " ".join(page.cells)
    assert "3 of 4" in page.cells
    assert "4 special tokens and 0 rows that no token has" in " ".join(printed.split())
    assert "3 of 4" in printed


def test_markdown_holds_the_same(store, capsys):
    assert command(store, "--out", "out", "--format", "markdown") == 0
    text = Path("out/report.md").read_text(encoding="utf-8")
    assert not Path("out/report.html").exists()
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(images) == 6
    assert all((Path("out") / image).is_file() for image in images)
    assert text.count("\n### ") == 6


def test_files_and_fit_folders_are_read_and_of_a_grid_the_best(model, capsys):
    grid = [
        prompt(model, "one", 0, name=f"lr{rate}", learning_rate=rate, dev_score=dev)
        for rate, dev in ((0.1, 0.4), (0.2, 0.9), (0.3, None))
    ]
    PromptStore("fit/prompts").save(grid)
    save_prompt("lr0.2.safetensors", replace(grid[1], name="lr0.2"))
    assert command("fit", "lr0.2.safetensors", "--out", "out") == 0
    assert "2 prompts with a lower dev score are left out" in capsys.readouterr().out
    names = [row["prompt"] for row in rows_of("out/prompts.csv")]
    assert names == ["prompts/lr0.2", "lr0.2"]


def test_one_prompt_alone_is_enough(model, capsys):
    save_prompt("a.safetensors", prompt(model, "one", 0))
    assert command("a.safetensors", "--out", "out", "--measure", "l2") == 0
    assert not Path("out/map-tsne.png").exists()
    assert rows_of("out/distances.csv") == []


def test_prompts_from_noise_have_no_initial_tokens(model, capsys):
    given = prompt(model, "one", 0)
    noise = torch.randn(given.init.shape, generator=torch.Generator().manual_seed(0))
    save_prompt("a.safetensors", replace(given, init=noise))
    assert command("a.safetensors", "--out", "out") == 0
    rows = rows_of("out/tokens.csv")
    assert {(row["initial_id"], row["initial_rank"], row["survived"]) for row in rows} == {
        ("",) * 3
    }


def test_prompts_of_unequal_lengths_are_refused_with_the_choices_and_compared_by_mean(
    model, capsys
):
    PromptStore("store").save([prompt(model, "one", 0), prompt(model, "two", 0, length=6)])
    assert command("store", "--out", "out") == 1
    said = capsys.readouterr().err
    assert "one_seed0 has 4, two_seed0 has 6" in said
    assert "--compare mean" in said
    assert not Path("out").exists()
    assert command("store", "--out", "out", "--compare", "mean") == 0
    (row,) = rows_of("out/distances.csv")
    a, b = (prompt(model, task, 0, length) for task, length in (("one", 4), ("two", 6)))
    wanted = float((a.prompt.double().mean(0) - b.prompt.double().mean(0)).norm())
    assert float(row["distance"]) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "no prompt file or folder nowhere"),
        (("empty",), "no prompt files in empty"),
        (("store", "other.safetensors"), "only prompts of one backbone"),
        (("nan.safetensors",), "nan.safetensors holds NaN"),
        (("store", "--top", "0"), "--top is 0"),
        (("store", "--top", "9999"), "there are 196 tokens"),
        (("store", "--transfer", "none.csv"), "no table of transfer none.csv"),
        (("store", "--backbone", "sandbox"), "backbone 'sandbox' has hidden size"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(store, model, words, said, capsys):
    Path("empty").mkdir()
    given = prompt(model, "one", 9)
    save_prompt("other.safetensors", replace(given, backbone_digest="f" * 64))
    save_prompt("nan.safetensors", replace(given, prompt=given.prompt * math.nan))
    vocabulary = len(read_vocabulary(model).ids)
    assert command(*words, "--out", "out") == 1
    assert said.replace("196", str(vocabulary)) in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_out_that_is_a_file_and_unknown_choices_are_refused(store, capsys):
    Path("out").write_text("")
    assert command(store, "--out", "out") == 1
    assert "--out out is a file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(store, "--out", "new", "--measure", "angle")
    assert "cosine, l2, dot" in capsys.readouterr().err


# ---- transfer ------------------------------------------------------------------------------------


def write_transfer(*lines: str) -> str:
    Path("transfer.csv").write_text("\n".join(["source,target,score,no_prompt", *lines]) + "\n")
    return "transfer.csv"


def test_transfer_is_averaged_and_its_correlation_with_distance_told(model, capsys):
    PromptStore("store").save(
        [prompt(model, task, seed) for task in ("a", "bb", "ccc") for seed in range(2)]
    )
    table = write_transfer(
        *("a,bb,0.5,0.1", "a_seed1,bb,0.7,0.1", "a,ccc,0.2,0.1", "bb,a,0.3,0.2"),
        *("bb,ccc,0.1,0.1", "ccc,a,0.4,0.2", "ccc,bb,0.05,0.1", "elsewhere,a,1,0"),
    )
    assert command("store", "--out", "out", "--transfer", table) == 0
    first, *others = rows_of("out/transfer.csv")
    assert (first["source"], first["target"], first["lines"]) == ("a", "bb", "2")
    assert float(first["gain"]) == pytest.approx(0.5)
    assert len(others) == 5
    said = " ".join(capsys.readouterr().out.split())
    assert "Spearman's rho" in said
    assert "6 pairs of different tasks, 5 permutations" in said
    assert Path("out/transfer.png").is_file()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((), "lacks the columns source, target, score, no_prompt, or has no lines"),
        (("one,two,high,0",), "line 2, score is 'high'"),
        (("one,two,0.5,",), "line 2, no_prompt is ''"),
        (("x,y,0.5,0",), "tasks of these prompts (one, two)"),
    ],
)
def test_tables_of_transfer_that_say_nothing_are_refused(store, lines, said, capsys):
    assert command(store, "--out", "out", "--transfer", write_transfer(*lines)) == 1
    assert said in capsys.readouterr().err


# ---- tokens --------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_tokenizers_library():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_letters()) == set(ByteLevel.alphabet())
    splitter = ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("the", "准确", "तुम", "تناقض", "é", "ÿ\u0100", "😀"):
        ((token, _),) = splitter.pre_tokenize_str(text)
        assert readable(token, True).removeprefix("◌") == text


@pytest.mark.parametrize(
    ("token", "is_bytes", "shown"),
    [
        ("Ġthe", True, "␣the"),
        ("Ċ", True, r"\n"),
        ("▁the", False, "␣the"),
        ("Ġthe", False, "Ġthe"),  # a Maltese letter elsewhere
        ("åĩ", True, r"\xe5\x87"),  # two of the three bytes of a character
        ("aåĩĨ", True, "a准"),
        ("a\u202eb", False, r"a\u202eb"),
        ("a\\n", False, r"a\\n"),
        ("\u093f", False, "◌\u093f"),
        ("\u00a0", False, r"\xa0"),
        ("<0xE4>", False, "<0xE4>"),
        ("", False, "(empty)"),
    ],
)
def test_tokens_are_readable(token, is_bytes, shown):
    assert readable(token, is_bytes) == shown


def test_only_vocabularies_of_bytes_are_read_as_bytes():
    assert is_byte_level(["a", "Ġthe"])
    assert not is_byte_level(["a", "▁the", "Ġ"])  # SentencePiece with a Maltese letter
    assert not is_byte_level(["a", "the"])


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
def test_initial_rows_are_found_in_the_table_as_the_model_sees_it(kind, backbone):
    """BART scales its embeddings."""
    model = backbone(kind)
    vocabulary = read_vocabulary(model)
    ids = torch.tensor([20, 9, 31])
    init = model.embedding_table()[ids]
    assert initial_tokens(init, vocabulary.table, ids=vocabulary.ids).equal(ids)
    assert not set(vocabulary.ids.tolist()) & set(model.tokenizer.all_special_ids)


def test_rows_that_no_token_has_are_left_out_unless_all_are_asked_for():
    from conftest import make_backbone

    model = make_backbone("gpt2")
    size = len(model.embedding_table())
    model.model.resize_token_embeddings(size + 5, mean_resizing=False)
    some, every = read_vocabulary(model), read_vocabulary(model, all_rows=True)
    assert int(some.ids.max()) < size
    assert "5 rows that no token has" in some.note
    assert every.ids.tolist() == list(range(size + 5))
    assert every.names[size + 1] == f"(row {size + 1})"


# ---- HTML and Markdown ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("is_strong", [False, True])
def test_a_token_of_any_script_is_one_cell_that_shows_it_as_it_is(name, is_strong):
    """Reference: a parser of HTML, and one of Markdown."""
    markdown_it = pytest.importorskip("markdown_it")
    shown = readable(NASTY[name], False)
    table = Block("table", header=("a", "b", "c"), rows=[["1", Token(shown, is_strong), "2"]])
    assert Cells(as_html([table], "title")).cells == ["1", shown, "2"]
    made = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = made.render(as_markdown([table]))
    cells = [cell.strip("\u2068\u2069") for cell in Cells(page).cells]
    assert cells == ["1", shown, "2"]
    assert ("<strong>" in page) == is_strong


def test_names_with_marks_stay_whole_in_markdown():
    markdown_it = pytest.importorskip("markdown_it")
    name = "tweet_eval-hate_100|x<y>*z*"
    page = markdown_it.MarkdownIt("commonmark").render(as_markdown([Block("p", name)]))
    assert page == f"<p>{name.replace('<', '&lt;').replace('>', '&gt;')}</p>\n"


# ---- pictures ------------------------------------------------------------------------------------

LONG = [f"blimp-determiner_noun_agreement_with_adj_irregular_{at}_100_seed0" for at in range(7)]


@pytest.mark.parametrize("count", [1, 7, MOST_CELLS + 1])
def test_heat_maps_are_readable_and_have_values_where_they_fit(count):
    names = (LONG * 4)[:count]
    values = np.random.default_rng(0).normal(size=(count, count)) * 1e3
    values[0, 0] = math.nan if count > 1 else 1
    figure = heatmap(names, names, values, "distance", form="{:+.3f}" if count == 1 else "{:.3g}")
    assert_readable(figure)
    written = len(figure.axes[0].texts)
    assert written == (count * count - (count > 1) if count <= MOST_CELLS else 0)


def test_drift_maps_mark_lost_rows_and_take_prompts_of_several_lengths():
    drifts = [np.linspace(0, 1, 100), np.linspace(0, 3, 20)]
    lost = [drift > 0.5 for drift in drifts]
    figure = drift_map(LONG[:2], drifts, lost)
    assert_readable(figure)
    marks = sum(line.get_xydata().shape[0] for line in figure.axes[0].lines)
    assert marks == sum(flags.sum() for flags in lost)


def test_violins_and_maps_are_readable():
    rng = np.random.default_rng(0)
    norms = [rng.normal(9, 1, 50), np.full(3, 4.0), np.array([2.0])]
    assert_readable(norm_violins([*LONG[:2], "$x$"], norms, "norm of a row", "a note " * 20))
    groups = [f"{LONG[at % 7]}-{at % 21}" for at in range(42)]
    assert_readable(prompt_map(rng.normal(size=(42, 2)), groups, ("x", "y"), "a note"))


def test_the_outline_of_points_on_a_hull_is_the_hull():
    angles = np.random.default_rng(0).permutation(np.linspace(0, 6, 9))
    points = np.stack([3 * np.cos(angles), np.sin(angles)], axis=1)
    closed = outline(points)
    hull = points[ConvexHull(points).vertices]
    at = int(np.flatnonzero((hull == closed[0]).all(axis=1))[0])
    np.testing.assert_array_equal(closed[:-1], np.roll(hull, -at, axis=0))
    np.testing.assert_array_equal(closed[-1], closed[0])
    np.testing.assert_array_equal(outline(points[:2]), points[:2])


def test_tsne_keeps_groups_together_and_is_the_same_every_time():
    rng = np.random.default_rng(0)
    vectors = np.repeat(50 * rng.normal(size=(3, 200)), 6, axis=0) + rng.normal(size=(18, 200))
    points, perplexity = tsne_points(vectors)
    assert perplexity == pytest.approx(17 / 3)
    np.testing.assert_array_equal(points, tsne_points(vectors)[0])
    nearest = cdist(points, points) + np.diag([np.inf] * 18)
    assert (nearest.argmin(axis=1) // 6 == np.arange(18) // 6).all()
    assert tsne_points(vectors[:4])[1] == 1


def test_pictures_of_nothing_are_refused():
    with pytest.raises(ValueError, match="give each cell a number"):
        heatmap(["a"], ["b", "c"], np.ones((1, 1)), "x")
    with pytest.raises(ValueError, match="one or more prompts"):
        drift_map([], [], [])
    with pytest.raises(ValueError, match="one or more distributions"):
        norm_violins(["a"], [np.array([])], "x")
    with pytest.raises(ValueError, match=r"give \(R, 2\)"):
        prompt_map(np.ones((2, 3)), ["a", "b"], ("x", "y"))
    with pytest.raises(ValueError, match="at least four"):
        tsne_points(np.ones((3, 5)))
