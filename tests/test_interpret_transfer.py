"""``prompt-lab interpret --transfer``: measured transfer from tables and from results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from test_interpret_command import TASKS, N, command, prompt, rows_of
from test_prompt_tuning import make_data, make_trainer

from prompt_lab.commands import cli
from prompt_lab.core.backbone import Backbone
from prompt_lab.data.tasks import find_tasks
from prompt_lab.files.prompts import Prompt, PromptStore
from prompt_lab.files.results import RESULT_COLUMNS, read_csv
from prompt_lab.files.tensors import write_csv
from prompt_lab.methods.vector_arithmetic import VectorArithmetic

CONFIGS = Path(__file__).parents[1] / "configs" / "interpretation"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(model_folder) -> Backbone:
    return Backbone.load(str(model_folder("bloom")))


@pytest.fixture
def store(model: Backbone) -> str:
    PromptStore("store").save([prompt(model, task, seed) for task in TASKS for seed in range(3)])
    return "store"


# ---- tables --------------------------------------------------------------------------------------


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
        (("x,y,0.5,0",), "are tasks of these prompts (one, two)"),
    ],
)
def test_tables_of_transfer_that_say_nothing_are_refused(store, lines, said, capsys):
    assert command(store, "--out", "out", "--transfer", write_transfer(*lines)) == 1
    assert said in capsys.readouterr().err


def test_a_place_of_transfer_that_is_not_there_is_named(store, capsys):
    table = write_transfer("one,two,0.5,0")
    assert command(store, "--out", "out", "--transfer", table, "none", "no.csv") == 1
    assert "no table of transfer none, no.csv" in capsys.readouterr().err


# ---- results -------------------------------------------------------------------------------------


def result(task: str, test: float | str, variant: str = "vectors", **cells: Any) -> dict[str, Any]:
    """A line of results."""
    given = {"fit_id": "f", "method": "VectorArithmetic", "stage": "test", "backbone": "b"}
    given |= {"sample": 13, "init_seed": 0, "decoding": "score", "metric_variant": "crossfit"}
    if variant in ("vectors", "single"):
        given |= {"scale": 1.0, "expression": task, "prompt_file": "prompts/a.safetensors"}
    return {**given, "task": task, "variant": variant, "test": test, **cells}


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


def test_results_give_the_gain_of_each_pair_averaged_over_runs_and_folders(store, model, capsys):
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
    found = {(row["source"], row["target"]): row for row in rows_of("out/transfer.csv")}
    assert set(found) == {("one", "one"), ("one", "two"), ("two", "one")}
    gain = np.mean([0.5 - 0.25, 0.7 - 0.35, 0.4 - 0.25])
    assert float(found["one", "two"]["gain"]) == pytest.approx(gain)
    assert found["one", "two"]["lines"] == "3"
    assert float(found["one", "one"]["gain"]) == pytest.approx(0.4)
    assert float(found["two", "one"]["gain"]) == pytest.approx(0.3)


def test_scores_without_prompt_may_come_from_the_fits(store, capsys):
    write_results("fit", result("two", 0.25, "no_prompt", method="PromptTuning"))
    write_results("test", result("two", 0.5, expression="one"))
    assert command(store, "--out", "out", "--transfer", "test", "fit/results.csv") == 0
    (row,) = rows_of("out/transfer.csv")
    assert float(row["gain"]) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("lines", "digest", "said"),
    [
        ([result("two", 0.5, expression="one")], "f" * 64, "weights ffffffffffff, the prompts are"),
        ([result("two", 0.5, expression="one")], "", "no score without prompt"),
        (
            [*NO_PROMPT, result("two", 0.5, expression="one", decoding="greedy")],
            *("", "(variant no_prompt) of two, answered in the same way"),
        ),
        ([*NO_PROMPT, result("two", 0.5, "single", expression="a + b")], "", "no line of Vector"),
        ([*NO_PROMPT, result("x", 0.5, "single")], "", "no score without prompt"),
        ([*NO_PROMPT, result("two", "", expression="one")], "", "score is ''"),
    ],
)
def test_results_that_say_nothing_of_transfer_are_refused(store, lines, digest, said, capsys):
    folder = write_results("run", *lines, digest=digest)
    assert command(store, "--out", "out", "--transfer", folder) == 1
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_prompts_of_unequal_lengths_go_from_their_tests_to_a_correlation(
    backbone, fewshot_root, capsys, monkeypatch
):
    """One test for each length, as the paper's written prompts need it. Reference: SciPy."""
    model = backbone("gpt2")
    monkeypatch.setattr(Backbone, "load", lambda name: model)
    tasks = ["glue-sst2", "glue-cola", "emotion"]
    means = []
    for at, task in enumerate(tasks):
        own = random_prompt(model, task, N + at)
        means.append(own.prompt.double().mean(dim=0))
        PromptStore(f"fits/{task}/prompts").save([own])
        method = VectorArithmetic(*(f"fits/{task}", "expressions", [task], "all"), scales=[1.0])
        method.backbone = model
        data = make_data(fewshot_root, tasks, [13])
        make_trainer(Path("tests") / task).test(method, datamodule=data, verbose=False)
    fits = [f"fits/{task}" for task in tasks]
    given = ["--compare", "mean", "--out", "out", "--transfer", "tests"]
    assert command(*fits, *given) == 0
    rows = rows_of("out/transfer.csv")
    assert [(row["source"], row["target"]) for row in rows] == [
        (a, b) for a in tasks for b in tasks
    ]
    lines = {task: read_csv(Path("tests") / task / "results.csv") for task in tasks}
    for row in rows:
        (score,) = (
            float(line["test"])
            for line in lines[row["source"]]
            if (line["task"], line["expression"]) == (row["target"], row["source"])
        )
        (without,) = (
            float(line["test"])
            for line in lines[row["source"]]
            if (line["task"], line["variant"]) == (row["target"], "no_prompt")
        )
        assert float(row["gain"]) == pytest.approx(score - without)
    off = [row for row in rows if row["source"] != row["target"]]
    far = [
        float((means[tasks.index(row["source"])] - means[tasks.index(row["target"])]).norm())
        for row in off
    ]
    assert [float(row["distance"]) for row in off] == pytest.approx(far)
    rho = spearmanr(far, [float(row["gain"]) for row in off]).statistic
    said = " ".join(capsys.readouterr().out.split())
    assert f"Spearman's rho {rho:+.3f}, p = " in said


def random_prompt(model: Backbone, task: str, length: int) -> Prompt:
    """A prompt of random rows."""
    drawn = torch.Generator().manual_seed(length)
    rows = torch.randn(2, length, model.hidden_size, generator=drawn)
    facts: dict[str, Any] = {"tokenizer_digest": model.tokenizer_digest, "task": task}
    facts |= {"backbone": model.name, "backbone_digest": model.digest}
    return Prompt(rows[0], rows[1], f"{task}_13", sample=13, init_seed=0, dev_score=0.5, **facts)


# ---- the configs ---------------------------------------------------------------------------------


def test_the_configs_of_the_sandbox_run_from_fit_to_report(
    model_folder, fewshot_root, capsys, monkeypatch
):
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
    rows = rows_of("said/transfer.csv")
    assert [row["lines"] for row in rows] == ["2"] * 4
    assert {row["runs"] for row in rows_of("said/spread.csv")} == {"2"}


def few_rows(root: Path) -> Path:
    """A copy of a data root with 11 rows of dev and test."""
    copied = Path("root").resolve()
    shutil.copytree(root, copied)
    for path in [*copied.glob("*/*_dev.tsv"), *copied.glob("*/*_test.tsv")]:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:11]))
    return copied


@pytest.mark.parametrize(("task", "rows"), [("cb", 15), ("rte", 14), ("copa", 12), ("wsc", 20)])
def test_the_configs_of_the_paper_are_read_with_the_text_of_a_task(task, rows, monkeypatch):
    """Lengths are those that the paper states; a whole number of evaluations fits the budget."""
    monkeypatch.setattr(cli.PromptLabCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(cli.PromptLabCLI, "_run_subcommand", lambda self, *given: None)
    monkeypatch.setattr(cli.PromptLabCLI, "before_instantiate_classes", lambda self: None)
    configs = [f"--config={CONFIGS}/{name}.yaml" for name in ("bloomz-560m", task)]
    own = cli.PromptLabCLI(["fit", *configs, "--data.order_seed=3"]).config.fit
    settings = own.model.init_args
    assert own.data.tasks == [f"interpretation-{task}"]
    assert (own.data.shots, own.data.order_seed) == ("all", 3)
    assert (settings.num_virtual_tokens, settings.patience) == (rows, 5)
    note = find_tasks([f"interpretation-{task}"])[0].note
    assert settings.init.text.replace("`", "").rstrip("?.") in " ".join(note.split())
    assert own.trainer.max_steps == 50 * own.trainer.val_check_interval
    if task == "cb":  # stands in the first file, too
        assert (
            cli.PromptLabCLI(["fit", configs[0], "--data.order_seed=3"]).config.fit.model
            == own.model
        )
    transfer = cli.PromptLabCLI(["test", f"--config={CONFIGS}/bloomz-560m_transfer.yaml"]).config
    assert f"interpretation-{task}" in transfer.test.data.tasks
    assert transfer.test.model.init_args.evaluate_on == "all"
