"""``prompt-lab interpret``: what is read, written and drawn, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import result_line
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr

from prompt_lab.__main__ import main
from prompt_lab.commands import fit as cli
from prompt_lab.core.backbone import Backbone
from prompt_lab.files.prompts import Prompt, PromptStore, save_prompt
from prompt_lab.files.results import RESULT_COLUMNS
from prompt_lab.files.tensors import write_csv

pytestmark = pytest.mark.usefixtures("own_folder")

N = 4
TASKS = ("one", "two")
CONFIGS = Path(__file__).parents[2] / "configs" / "interpretation"


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


def command(*words: str) -> int:
    """Exit status of ``prompt-lab interpret``."""
    return main(["interpret", *words])


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


def test_the_tables_hold_nearest_tokens_survival_and_drift(made, model):
    """Reference: SciPy's cosine distances to all tokens that are not special."""
    folder, _ = made
    rows = pd.read_csv(folder / "tokens.csv")
    assert rows["row"].tolist() == [1, 2, 3, 4] * 6
    table = model.embedding_table().double().numpy()
    allowed = [i for i in range(len(table)) if i not in model.tokenizer.all_special_ids]
    given = prompt(model, "one", 0)
    far = cdist(given.prompt.double().numpy(), table[allowed], "cosine")
    for at, row in rows[:N].iterrows():
        order = np.argsort(far[at])
        assert [row[f"id_{k}"] for k in (1, 2, 3)] == [allowed[i] for i in order[:3]]
        assert row["score_2"] == pytest.approx(1 - far[at, order[1]])
        place = [allowed[i] for i in order].index(10 + at) + 1
        found = row[["initial_id", "initial_rank", "survived"]]
        assert found.tolist() == [10 + at, place, int(place == 1)]
    prompts = pd.read_csv(folder / "prompts.csv")
    assert prompts[["survived", "initial_tokens"]].to_numpy().tolist() == [[3, 4]] * 6
    norms = [float(prompt(model, t, s).prompt.norm()) for t in TASKS for s in range(3)]
    np.testing.assert_allclose(prompts["norm"], norms, rtol=1e-6)
    assert len(pd.read_csv(folder / "distances.csv")) == 15
    assert pd.read_csv(folder / "spread.csv")["runs"].tolist() == [3, 3]


def test_the_report_shows_all_figures_and_tokens(made):
    folder, printed = made
    page = (folder / "report.html").read_text(encoding="utf-8")
    text = (folder / "report.md").read_text(encoding="utf-8")
    tokens = pd.read_csv(folder / "tokens.csv")
    stems = {"drift", "norms", "distances", "task-distances", "map-pca", "map-tsne"}
    assert {path.stem for path in folder.glob("*.png")} == stems
    for stem in stems:
        assert f'src="{stem}.png"' in page
        assert f"]({stem}.png)" in text
        assert (folder / f"{stem}.svg").is_file()
    assert tokens["token_1"][0] in page
    assert (
        page.count("<b>")
        == text.count("** ")
        == (tokens[["id_1", "id_2", "id_3"]].eq(tokens["initial_id"], axis=0)).sum(axis=None)
    )
    assert "4 special tokens and 0 rows that no token has" in text
    assert "3 of 4" in printed
    assert "report.html" in printed


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
    (found,) = pd.read_csv("out/distances.csv")["distance"]
    a, b = (prompt(model, task, 0, length) for task, length in (("one", 4), ("two", 6)))
    wanted = float((a.prompt.double().mean(0) - b.prompt.double().mean(0)).norm())
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "no prompt file or folder nowhere"),
        (("empty",), "empty holds no prompts: give"),
        (("store", "other.safetensors"), "do not combine: backbone"),
        (("nan.safetensors",), "nan.safetensors: the prompt holds numbers that are not"),
        (("store", "--top", "0"), "--top is 0"),
        (("store", "--top", "9999"), "--top is 9999: there are "),
        (("store", "--transfer", "none.csv", "store"), "no table of transfer none.csv"),
        (("store", "--backbone", "sandbox"), "backbone 'sandbox' has hidden size"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(store, model, words, said, capsys):
    Path("empty").mkdir()
    given = prompt(model, "one", 9)
    save_prompt("other.safetensors", replace(given, backbone_digest="f" * 64))
    save_prompt("nan.safetensors", replace(given, prompt=given.prompt * math.nan))
    assert command(*words, "--out", "out") == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


# ---- transfer ------------------------------------------------------------------------------------


def write_transfer(*lines: str) -> str:
    Path("transfer.csv").write_text("\n".join(["source,target,score,no_prompt", *lines]) + "\n")
    return "transfer.csv"


def gains(path: str = "out/transfer.csv") -> pd.DataFrame:
    return pd.read_csv(path).set_index(["source", "target"])


def test_transfer_is_averaged_and_its_correlation_with_distance_told(model, capsys):
    PromptStore("store").save(
        [prompt(model, task, seed) for task in ("a", "bb", "ccc") for seed in range(2)]
    )
    table = write_transfer(
        *("a,bb,0.5,0.1", "a_seed1,bb,0.7,0.1", "a,ccc,0.2,0.1", "bb,a,0.3,0.2"),
        *("bb,ccc,0.1,0.1", "ccc,a,0.4,0.2", "ccc,bb,0.05,0.1", "elsewhere,a,1,0"),
    )
    assert command("store", "--out", "out", "--transfer", table) == 0
    found = gains()
    assert [*found.index[:2]] == [("a", "bb"), ("a", "ccc")]
    assert found.loc[("a", "bb"), ["gain", "lines"]].tolist() == [pytest.approx(0.5), 2]
    assert len(found) == 6
    rho = spearmanr(found["distance"], found["gain"]).statistic
    said = " ".join(capsys.readouterr().out.split())
    assert f"Spearman's rho {rho:+.3f}, p = " in said
    assert "6 pairs of different tasks, 5 permutations of the tasks, all others" in said
    assert Path("out/transfer.png").is_file()


def result(task: str, test: float | str, variant: str = "vectors", **cells: Any) -> dict[str, Any]:
    """A line of results of VectorArithmetic."""
    given = {"method": "VectorArithmetic", "sample": 13, "start": "", "start_seed": ""}
    if variant in ("vectors", "single"):
        given |= {"scale": 1.0, "expression": task, "prompt_file": "prompts/a.safetensors"}
    return result_line(**given, task=task, variant=variant, test=test) | cells


def write_results(folder: str, *lines: dict[str, Any], digest: str = "") -> str:
    """A folder with results and, with a digest, that of the backbone beside them."""
    write_csv(Path(folder) / "results.csv", RESULT_COLUMNS, lines)
    if digest:
        (Path(folder) / "digests.json").write_text(json.dumps({"backbone": digest}))
    return folder


NO_PROMPT = (
    *(result("one", 0.5, "no_prompt"), result("two", 0.25, "no_prompt")),
    result("two", 0.35, "no_prompt", sample=21),
)


def test_results_give_the_gain_of_each_pair_averaged_over_runs_and_folders(store, model):
    """Other sums, scales, initial prompts and methods in the same files do not count."""
    write_results(
        "runs/a",
        *NO_PROMPT,
        result("one", 0.9, "single"),
        result("two", 0.5, expression="one"),
        result("two", 0.7, expression="one", sample=21),
        digest=model.digest,
    )
    write_results(
        "runs/b",
        *NO_PROMPT,  # the same in every test
        result("two", 0.4, expression="1 * one", init_seed=1),
        result("two", 0.99, expression="one", scale=0.5),
        result("two", 0.98, expression="2 * one"),
        result("two", 0.97, expression="one + two"),
        result("two", 0.96, expression="- one"),
        result("one", 0.95, expression="one", start="vocab", start_seed=1),
        result("two", 0.94, "initial_prompt", scale=0.0),
        result("two", 0.93, "tuned", method="PromptTuning"),
    )
    table = write_transfer("two,one,0.8,0.5")
    assert command(store, "--out", "out", "--transfer", "runs", table) == 0
    found = gains()
    assert [*found.index] == [("one", "one"), ("one", "two"), ("two", "one")]
    wanted = np.mean([0.5 - 0.25, 0.7 - 0.35, 0.4 - 0.25])
    np.testing.assert_allclose(found["gain"], [0.4, wanted, 0.3])
    assert found["lines"].tolist() == [1, 3, 1]


RESULT = result("two", 0.5, expression="one")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((), "lacks the columns source, target, score, no_prompt, or has no lines"),
        (("one,two,high,0",), "line 2, score is 'high'"),
        (("x,y,0.5,0",), "are tasks of these prompts (one, two)"),
        ([RESULT], "no score without prompt"),
        ([*NO_PROMPT, RESULT], "weights ffffffffffff, the prompts are"),
        ([*NO_PROMPT, RESULT | {"decoding": "greedy"}], "of two, answered in the same way"),
        ([*NO_PROMPT, result("two", 0.5, "single", expression="a + b")], "no line of Vector"),
    ],
)
def test_what_says_nothing_of_transfer_is_refused(store, lines, said, capsys):
    if lines and isinstance(lines[0], dict):
        place = write_results("run", *lines, digest="f" * 64 if "weights" in said else "")
    else:
        place = write_transfer(*lines)
    assert command(store, "--out", "out", "--transfer", place) == 1
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


# ---- the configs ---------------------------------------------------------------------------------


def test_the_configs_of_the_sandbox_run_from_fit_to_report(model_folder, fewshot_root, monkeypatch):
    """On a tiny model and real rows, so that it takes seconds; samples are the repeated runs."""
    monkeypatch.setenv(cli.RUN_DIR_VARIABLE, "")
    tasks = "[glue-sst2, glue-cola]"
    common = [
        *(f"--model.backbone.name={model_folder('t5')}", f"--data.root={few_rows(fewshot_root)}"),
        *(f"--data.tasks={tasks}", "--data.samples=[13, 42]"),
        *("--trainer.accelerator=cpu", "--trainer.logger=false"),
    ]
    steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.max_epochs=-1"]
    fit = ["fit", f"--config={CONFIGS}/sandbox.yaml", "--run_dir=runs/said", *common, *steps]
    assert cli.run(fit) == 0
    test = ["test", f"--config={CONFIGS}/sandbox_transfer.yaml", "--run_dir=runs/said_transfer"]
    assert cli.run([*test, *common, f"--model.expressions={tasks}"]) == 0
    assert command("runs/said", "--transfer", "runs/said_transfer", "--out", "said") == 0
    assert gains("said/transfer.csv")["lines"].tolist() == [2] * 4
    assert pd.read_csv("said/spread.csv")["runs"].tolist() == [2, 2]


def few_rows(root: Path) -> Path:
    """A copy of a data root with 11 rows of dev and test."""
    copied = Path("root").resolve()
    shutil.copytree(root, copied)
    for path in [*copied.glob("*/*_dev.tsv"), *copied.glob("*/*_test.tsv")]:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:11]))
    return copied
