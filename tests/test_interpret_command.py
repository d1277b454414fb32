"""``prompt-lab interpret``: what is read, written and drawn, and what is refused."""

from __future__ import annotations

import csv
import math
import re
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from test_report_blocks import Cells

from prompt_lab.analysis.interpret_tokens import read_vocabulary
from prompt_lab.commands import offline
from prompt_lab.core.backbone import Backbone
from prompt_lab.files.prompts import Prompt, PromptStore, save_prompt

N = 4
TASKS = ("one", "two")


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
    assert names == ["fit/lr0.2", "lr0.2"]


def test_repeated_fits_of_a_task_are_told_apart_by_their_folders_and_are_one_group(model, capsys):
    """As a loop over data.order_seed leaves them: the same file names, a folder each."""
    for order in range(2):
        own = prompt(model, "one", order, name="one_13_lr0.1", init_seed=0, order_seed=order)
        PromptStore(f"runs/one-{order}/prompts").save([own])
    assert command("runs/one-0", "runs/one-1", "--out", "out") == 0
    rows = rows_of("out/prompts.csv")
    assert [row["prompt"] for row in rows] == ["one-0/one_13_lr0.1", "one-1/one_13_lr0.1"]
    assert [row["order_seed"] for row in rows] == ["0", "1"]
    (spread,) = rows_of("out/spread.csv")
    assert (spread["runs"], spread["within_pairs"]) == ("2", "1")


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
        (("empty",), "empty holds no prompts: give"),
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
