"""``VectorArithmetic``: sums against NumPy, scores against a loop over rows, choice on dev."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONFIGS, HIDDEN, make_data, make_trainer
from sklearn.metrics import f1_score, matthews_corrcoef
from tiny_fits import drawn, fit_in, loaded, make_tuned, tuned

from prompt_lab.commands import fit as cli
from prompt_lab.commands.report import report_command
from prompt_lab.core.backbone import Backbone
from prompt_lab.files.prompts import Prompt, PromptStore, load_prompt
from prompt_lab.files.results import read_csv
from prompt_lab.methods.evaluation import Evaluation
from prompt_lab.methods.vector_arithmetic import GRID, VectorArithmetic
from prompt_lab.methods.vector_sums import best_scale

N = 4
TASKS = ("glue-sst2", "glue-cola", "emotion")
Row = dict[str, str]


@pytest.fixture
def run(backbone, fewshot_root, tmp_path) -> Callable[..., VectorArithmetic]:
    """Function that tests (or validates) a study on a tiny model, and returns the method."""

    def go(
        kind: str = "gpt2",
        run_dir: str = "run",
        store: Path | None = None,
        tasks: Iterable[str] = TASKS,
        samples: list[int] = [13],  # noqa: B006
        command: str = "test",
        at_once: int | None = None,
        root: Path = fewshot_root,
        precision: Any = "32-true",
        **settings: Any,
    ) -> VectorArithmetic:
        folder = store or tmp_path / f"store-{kind}"
        if not folder.exists():
            make_tuned(folder, backbone(kind))
        method = loaded(VectorArithmetic(str(folder), **settings), backbone(kind))
        method.prompts_at_once = at_once or method.prompts_at_once
        trainer = make_trainer(tmp_path / run_dir, precision=precision)
        data = make_data(root, list(tasks), samples)
        getattr(trainer, command)(method, datamodule=data, verbose=False)
        return method

    return go


def results(method: VectorArithmetic, **wanted: Any) -> list[Row]:
    """The lines of results with these cells."""
    rows = read_csv(method.run_dir / "results.csv")
    return [row for row in rows if all(row[k] == str(v) for k, v in wanted.items())]


# ---- reference -----------------------------------------------------------------------------------


@torch.no_grad()
def log_likelihood(model: Backbone, prompt: torch.Tensor, ids: list[int], label: str) -> float:
    """Summed log-likelihood of a label, one row alone, straight through the Hugging Face model."""
    (target,) = model.encode_targets([label])
    embed = model.model.get_input_embeddings()
    shown = torch.cat([prompt, embed(torch.tensor(ids))])
    if model.is_encoder_decoder:
        labels = torch.tensor([target])
        found = model.model(inputs_embeds=shown[None], labels=labels).logits[0]
    else:
        whole = torch.cat([shown, embed(torch.tensor(target))])
        found = model.model(inputs_embeds=whole[None]).logits[0, len(shown) - 1 : -1]
    chosen = found.log_softmax(-1)[range(len(target)), target]
    return chosen.sum().item()


def naive_score(method: VectorArithmetic, prompt: torch.Tensor, task: str, split: str) -> float:
    """Score of one prompt, row by row, label by label; metrics by scikit-learn."""
    model, data = method.backbone, method.datamodule
    assert model is not None
    labels = list(data.tasks[task].labels or [])
    rows = data.tokens(task, 13, split)
    told = [
        labels[int(np.argmax([log_likelihood(model, prompt, ids, label) for label in labels]))]
        for ids in rows.inputs
    ]
    gold = [answers[0] for answers in data.splits[task, 13][split].references]
    if task == "glue-cola":
        return matthews_corrcoef(gold, told)
    if task == "emotion":
        return f1_score(gold, told, average="macro")
    return float(np.mean([a == b for a, b in zip(gold, told, strict=True)]))


def naive_prompt(
    sources: dict[str, Prompt], factors: dict[str, float], init: torch.Tensor, scale: float
) -> torch.Tensor:
    """The prompt init + scale * sum in NumPy's float64, rounded once."""
    total = np.zeros((N, HIDDEN))
    for task, factor in factors.items():
        prompt = sources[task]
        total += factor * (prompt.prompt.numpy().astype(np.float64) - prompt.init.numpy())
    return torch.from_numpy((init.numpy().astype(np.float64) + scale * total).astype(np.float32))


# ---- scores and choice ---------------------------------------------------------------------------


def test_sums_of_pairs_score_as_each_prompt_alone_row_by_row(run, backbone, tmp_path):
    """Reference: NumPy's sums through the plain model; the scale by the rule, from its scores."""
    model = backbone("gpt2")
    scales = (0.25, 1.0)
    store = make_tuned(tmp_path / "one", model, seeds=[1])
    method = run(tasks=TASKS, scales=[1.0, 0.25], store=store)
    trials = read_csv(method.run_dir / "scales.csv")
    for pair in ("glue-sst2 + glue-cola", "glue-sst2 + emotion", "glue-cola + emotion"):
        factors = dict.fromkeys(pair.split(" + "), 1.0)
        sources = {task: tuned(model, task, 1) for task in factors}
        dev = {}
        for scale in scales:
            prompt = naive_prompt(sources, factors, drawn(1), scale)
            for task in factors:
                dev[task, scale] = naive_score(method, prompt, task, "dev")
                of_task = [t for t in trials if (t["expression"], t["task"]) == (pair, task)]
                (own,) = (t for t in of_task if float(t["scale"]) == scale)
                assert float(own["dev"]) == pytest.approx(dev[task, scale], abs=1e-9)
        means = [np.mean([dev[task, scale] for task in factors]) for scale in scales]
        best = scales[int(np.argmax(np.round(means, 9)))]  # the first of equal ones
        prompt = naive_prompt(sources, factors, drawn(1), best)
        for task in factors:
            (row,) = results(method, expression=pair, task=task)
            assert (row["variant"], float(row["scale"])) == ("vectors", best)
            assert float(row["dev"]) == pytest.approx(dev[task, best], abs=1e-9)
            expected = naive_score(method, prompt, task, "test")
            assert float(row["test"]) == pytest.approx(expected, abs=1e-9)


def test_many_prompts_score_as_each_of_them_alone(run, backbone, tmp_path):
    """And no more prompts than allowed are made at a time, nor kept when the next are made."""
    store = make_tuned(tmp_path / "six", backbone("gpt2"), ["glue-sst2"], range(6))
    common = {"study": "cross", "tasks": ["glue-sst2"], "store": store, "decoding": "generate"}
    bank = run(run_dir="bank", **common)
    made: list[tuple[int, Any]] = []
    original = VectorArithmetic._made

    def spy(self, places):
        """Note what is made, and that what was made before is gone."""
        assert all(reference() is None for _, reference in made)
        prompts = original(self, places)
        made.append((len(prompts), weakref.ref(prompts)))
        return prompts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VectorArithmetic, "_made", spy)
        alone = run(run_dir="alone", at_once=1, **common)
        assert {count for count, _ in made} == {1}
        assert len(made) == 2 * 48  # 6 of each of three kinds, and 30; on dev and test
        made.clear()
        some = run(run_dir="some", at_once=7, **common)
        assert max(count for count, _ in made) == 7
    names = ["results.csv", "scales.csv", "predictions.jsonl"]
    for name in names:
        expected = (bank.run_dir / name).read_bytes()
        assert (alone.run_dir / name).read_bytes() == expected
        assert (some.run_dir / name).read_bytes() == expected
    assert len(results(bank)) == 48


def test_of_equal_means_the_smallest_scale_stays_and_nan_is_the_worst():
    assert best_scale({0.5: 0.7, 0.25: 0.7, 1.0: 0.7}) == 0.25
    assert best_scale({0.25: 0.1 + 0.2, 0.5: 0.3}) == 0.25  # equal but for rounding
    assert best_scale({0.25: 0.3, 0.5: 0.1 + 0.2}) == 0.25
    assert best_scale({0.25: 0.2, 0.5: 0.9, 0.75: 0.9, 1.0: 0.1}) == 0.5
    assert best_scale({0.25: math.nan, 0.5: -0.5}) == 0.5
    assert best_scale({0.5: math.nan, 0.25: math.nan}) == 0.25
    assert np.allclose(GRID, np.arange(0.05, 1.01, 0.05))


def test_a_task_that_is_taken_away_is_scored_but_does_not_choose_the_scale(run):
    asked, scales = ["glue-cola - glue-sst2", "- glue-sst2"], [0.3, 0.6, 1.0]
    given = {"expressions": asked, "evaluate_on": "all", "scales": scales}
    method = run(study="expressions", **given, tasks=["glue-sst2", "emotion", "glue-cola"])
    trials = read_csv(method.run_dir / "scales.csv")
    for expression in asked:
        for seed in ("0", "1"):
            own = [t for t in trials if (t["expression"], t["init_seed"]) == (expression, seed)]
            assert {t["task"] for t in own} == set(TASKS)
            counted = [t for t in own if t["task"] != "glue-sst2"]
            means = {
                scale: np.mean([float(t["dev"]) for t in counted if t["scale"] == scale])
                for scale in map(str, scales)
            }
            assert {t["scale"] for t in own if t["chosen"] == "True"} == {max(means, key=means.get)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_validate_shows_what_test_chooses_in_the_same_precision(
    run, monkeypatch, capsys, precision
):
    seen, plain = [], Evaluation.add

    def watch(self, step, texts, keep=True):
        seen.append((self.split, torch.is_autocast_enabled("cpu")))
        return plain(self, step, texts, keep)

    monkeypatch.setattr(Evaluation, "add", watch)
    shown = run(scales=[0.5, 1.0], precision=precision, command="validate", run_dir="val")
    said = capsys.readouterr().out
    assert not (shown.run_dir / "results.csv").exists()
    tested = run(scales=[0.5, 1.0], precision=precision)
    assert set(seen) == {("dev", precision != "32-true"), ("test", precision != "32-true")}
    name = "scales.csv"
    assert (shown.run_dir / name).read_text() == (tested.run_dir / name).read_text()
    line = next(line for line in said.splitlines() if line.startswith("glue-cola + emotion"))
    dev = [float(row["dev"]) for row in results(tested, expression="glue-cola + emotion")]
    assert f"  {np.mean(dev[:2]):.3f} ± " in line  # two seeds of glue-cola, then emotion


# ---- equality 9, and what is written -------------------------------------------------------------


def test_crossed_prompts_are_the_sums_and_the_diagonal_is_the_tuned_prompt(run):
    """Equality 9: init + 1 tau is tuned bit for bit, 0 the bare init, others as NumPy has them."""
    method = run(study="cross", tasks=["glue-sst2", "emotion"])
    rows = {row["prompt_file"]: row for row in results(method)}
    assert len(rows) == 2 * (2 + 2 + 2 + 2)
    for file, row in rows.items():
        prompt = load_prompt(method.run_dir / file)
        seed, task = int(row["init_seed"]), row["task"]
        source = tuned(method.backbone, task, seed)
        if row["variant"] == "single":
            assert prompt.prompt.equal(source.prompt)
            assert prompt.init.equal(source.init)
        elif row["variant"] == "initial_prompt":
            assert prompt.prompt.equal(drawn(seed))
        elif row["variant"] == "vector_alone":
            assert prompt.prompt.equal((source.prompt.double() - source.init.double()).float())
            assert row["start"] == "zeros"
        else:
            other = 1 - seed
            assert (row["start"], row["start_seed"]) == ("vocab", str(other))
            made = naive_prompt({task: source}, {task: 1.0}, drawn(other), 1.0)
            assert prompt.prompt.equal(made)
            assert prompt.init.equal(drawn(other))
    report_command([str(method.run_dir)], out=str(method.run_dir / "report"))
    assert (method.run_dir / "report" / "vectors-cross.csv").is_file()


def test_a_line_and_its_file_tell_what_was_made_of_what(run):
    method = run(scales=[0.5], study="expressions", expressions=["2 * emotion  + glue-sst2"])
    row = results(method, variant="vectors", task="emotion", init_seed=1)[0]
    assert (row["expression"], row["scale"]) == ("2 * emotion + glue-sst2", "0.5")
    assert (row["method"], row["stage"], row["num_virtual_tokens"]) == (
        "VectorArithmetic",
        "test",
        str(N),
    )
    assert not row["learning_rate"] + row["batch_size"] + row["order_seed"]
    prompt = load_prompt(method.run_dir / row["prompt_file"])
    assert (prompt.task, prompt.test_score) == ("emotion", float(row["test"]))
    assert prompt.dev_score == float(row["dev"])
    assert prompt.labels == list(method.datamodule.tasks["emotion"].labels)
    assert prompt.made_from["scale"] == 0.5
    assert [part["coefficient"] for part in prompt.made_from["vectors"]] == [2.0, 1.0]
    assert [part["name"] for part in prompt.made_from["vectors"]] == [
        "emotion_13_seed1",
        "glue-sst2_13_seed1",
    ]
    assert prompt.made_from["init"]["tensor"] == "init"
    digests = json.loads((method.run_dir / "digests.json").read_text())
    assert len(digests["prompts"]) == 4  # two tasks, two seeds
    told = [json.loads(line) for line in (method.run_dir / "predictions.jsonl").open()]
    assert {line["variant"] for line in told} == {"vectors", "single", "initial_prompt"}
    assert len(told) == 12 * len(results(method))


def test_singles_are_the_tuned_prompts_and_other_scales_are_listed_beside(run):
    method = run(study="singles", tasks=["glue-sst2"])
    assert {row["variant"] for row in results(method)} == {"initial_prompt", "single"}
    searched = run(study="singles", tasks=["glue-sst2"], scales=[0.5, 1.0], run_dir="searched")
    assert len(results(searched, variant="vectors")) == 2


def test_a_sum_is_scored_on_a_task_without_a_vector_of_its_own(run):
    """As zero-shot transfer needs it: the sum's sources are not among the data's tasks."""
    given = {"expressions": ["glue-sst2 + glue-cola"], "evaluate_on": "all", "scales": [1.0]}
    method = run(study="expressions", **given, tasks=["e2e_nlg_cleaned"])
    assert {(row["variant"], row["task"]) for row in results(method)} == {
        (variant, "e2e_nlg_cleaned") for variant in ("vectors", "initial_prompt", "no_prompt")
    }


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_tuned_prompts_are_scored_on_all_tasks_and_each_task_without_prompt(run, kind, capsys):
    """As zero-shot transfer needs it. Reference: row by row through the plain model."""
    tasks = ["glue-sst2", "emotion"]
    method = run(
        kind, study="expressions", expressions=tasks, evaluate_on="all", scales=[1.0], tasks=tasks
    )
    table = capsys.readouterr().out
    model = method.backbone
    for task in tasks:
        for source in tasks:
            variant = "single" if source == task else "vectors"
            (row,) = results(method, variant=variant, expression=source, task=task, init_seed=1)
            expected = naive_score(method, tuned(model, source, 1).prompt, task, "test")
            assert float(row["test"]) == pytest.approx(expected, abs=1e-9)
        (row,) = results(method, variant="no_prompt", task=task)  # one for all seeds
        expected = naive_score(method, torch.empty(0, HIDDEN), task, "test")
        assert float(row["test"]) == pytest.approx(expected, abs=1e-9)
        assert not row["expression"] + row["scale"] + row["init_seed"]
        line = next(x for x in table.splitlines() if x.split()[1:3] == ["no_prompt", task])
        assert f"  {expected:.3f}  " in line
        own, alone = (
            np.mean([float(x["test"]) for x in results(method, task=task, variant=v)])
            for v in ("vectors", "single")
        )
        line = next(x for x in table.splitlines() if x.split()[1:3] == ["vectors", task])
        assert f"{own:.3f} ± " in line  # over seeds, and its share of the tuned prompts' score
        assert f"  {own / alone:.3f}  " in line
    told = [json.loads(line) for line in (method.run_dir / "predictions.jsonl").open()]
    assert len(told) == 12 * len(results(method))


# ---- bad input and warnings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"scales": [0.5, 1.5]}, r"model.scales is \[0.5, 1.5\]: give distinct numbers from 0"),
        ({"scales": [math.nan]}, "from 0"),
        ({"scales": []}, "from 0"),
        ({"scales": [0.5, 0.5]}, "distinct"),
        ({"study": "expressions"}, "has 0 expressions"),
        ({"expressions": ["a + b"]}, "model.study is pairs and model.expressions has 1"),
        ({"study": "expressions", "expressions": ["a +"]}, r"cannot be read from '\+' on"),
        ({"study": "expressions", "expressions": ["a + a", "2 * a"]}, "are the same"),
        ({"evaluate_on": "all"}, "evaluate_on all goes with study expressions, not pairs"),
        ({"tasks": ["glue-sst2"]}, "study pairs needs at least two data.tasks"),
        ({"tasks": ["glue-sst2", "e2e_nlg_cleaned"]}, "no prompt of task 'e2e_nlg_cleaned'"),
        ({"samples": [13, 42]}, "no seed of sample 42 has prompts"),
        (
            {"study": "expressions", "expressions": ["- emotion"]},
            "names no task to be evaluated on: set model.evaluate_on to all",
        ),
        (
            {"study": "expressions", "expressions": ["emotion"], "tasks": ["glue-sst2"]},
            "is evaluated on emotion, which data.tasks has not",
        ),
        (
            {"study": "expressions", "expressions": ["- emotion"], "tasks": ["emotion"]}
            | {"evaluate_on": "all"},
            "none can choose lambda",
        ),
        (
            {"study": "expressions", "expressions": ["emotoin"], "evaluate_on": "all"},
            "did you mean emotion",
        ),
    ],
)
def test_studies_that_make_no_sense_or_that_the_prompts_do_not_allow_are_refused(
    run, settings, sentence
):
    with pytest.raises(ValueError, match=sentence):
        run(**settings)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"init": drawn(7)}, "start from different initial prompts"),
        ({"backbone_digest": "0" * 64}, "with weights 000000000000"),
        ({"tokenizer_digest": "0" * 64}, "do not combine: tokenizer"),
        ({"prompt": drawn(1)[:2], "init": drawn(2)[:2]}, "shape 4 x 32 and 2 x 32"),
        ({"prompt": drawn(1)[:, :8], "init": drawn(2)[:, :8]}, "width 8 made for"),
        ({"prompt": drawn(1) * math.nan}, "numbers that are not finite"),
    ],
)
def test_prompts_that_do_not_combine_are_refused(run, backbone, tmp_path, changes, sentence):
    model = backbone("gpt2")
    PromptStore(tmp_path / "s").save(
        [tuned(model, "glue-sst2", 0), tuned(model, "emotion", 0, **changes)]
    )
    with pytest.raises(ValueError, match=sentence):
        run(store=tmp_path / "s", tasks=["glue-sst2", "emotion"])


def test_a_cross_study_needs_several_initial_prompts(run, backbone, tmp_path):
    model = backbone("gpt2")
    made = [tuned(model, "glue-sst2", seed, init=drawn(9)) for seed in (0, 1)]
    PromptStore(tmp_path / "s").save(made)
    with pytest.raises(ValueError, match="start from one initial prompt"):
        run(store=tmp_path / "s", tasks=["glue-sst2"], study="cross")


def test_fit_and_the_folder_of_the_prompts_are_refused(run, tmp_path, backbone, fewshot_root):
    make_tuned(tmp_path / "tuned" / "prompts", backbone("gpt2"))
    with pytest.raises(ValueError, match="VectorArithmetic trains nothing: use prompt-lab test"):
        fit_in(tmp_path / "run", VectorArithmetic(str(tmp_path / "tuned")), fewshot_root)
    file = next((tmp_path / "tuned" / "prompts").glob("*.safetensors"))
    for place in ("tuned", "tuned/prompts", file):
        with pytest.raises(ValueError, match="holds the tuned prompts"):
            run(store=tmp_path / place, run_dir="tuned")


def test_seeds_without_all_vectors_are_named_and_left_out(run, backbone, tmp_path):
    model = backbone("gpt2")
    some = make_tuned(tmp_path / "s", model, ["glue-sst2"], (0, 1, 2))
    PromptStore(some).save([tuned(model, "emotion", seed) for seed in (1, 2)])
    with pytest.warns(UserWarning, match="left out: sample 13 seed 0 lacks emotion"):
        method = run(store=some, tasks=["glue-sst2", "emotion"], scales=[1.0])
    assert {row["init_seed"] for row in results(method, variant="vectors")} == {"1", "2"}


def test_dev_without_rows_of_a_class_and_other_forms_of_rows_are_told(
    run, fewshot_root, backbone, tmp_path
):
    root = tmp_path / "root"
    shutil.copytree(fewshot_root, root)
    dev = root / "emotion" / "emotion_16_13_dev.tsv"
    dev.write_text("".join(dev.read_text().splitlines(keepends=True)[:4]))  # fewer than classes
    model = backbone("gpt2")
    made = [tuned(model, "emotion", seed, task_prefix=True) for seed in (0, 1)]
    PromptStore(tmp_path / "s").save(made)
    with pytest.warns(UserWarning, match="data.task_prefix") as told:
        run(store=tmp_path / "s", tasks=["emotion"], study="singles", root=root)
    said = " ".join(str(one.message) for one in told)
    assert "dev of emotion, sample 13, has no row of fear, surprise" in said
    assert "data.task_prefix is False, but it was True when emotion_13_seed0" in said


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def command(
    model_folder, backbone, fewshot_root, tmp_path, monkeypatch
) -> Callable[..., list[str]]:
    """Function that gives the words of a command with the config of sums, on a tiny model."""
    monkeypatch.setenv(cli.RUN_DIR_VARIABLE, "")
    prompts = make_tuned(tmp_path / "tuned", backbone("t5"), TASKS[:2], range(3))
    config = CONFIGS / "vectors" / "sandbox_arithmetic.yaml"
    return lambda stage, run_dir, *more: [
        *(stage, f"--config={config}", f"--run_dir={tmp_path / run_dir}", *more),
        *(f"--model.backbone.name={model_folder('t5')}", f"--data.root={fewshot_root}"),
        *("--data.tasks=[glue-sst2, glue-cola]", "--data.samples=[13]"),
        *("--trainer.accelerator=cpu", "--trainer.logger=false", f"--model.prompts={prompts}"),
    ]


def test_the_config_runs_its_studies(command, capsys, tmp_path):
    pairs = "--model.study=pairs"
    assert cli.run(command("fit", "dry", pairs)) == 1
    assert "VectorArithmetic trains nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.run(command("fit", "dry", pairs, "--dry_run"))
    said = capsys.readouterr().out
    assert "vectors: 3 x 20 values of lambda, 120 prompts on dev and 6 on test" in said
    assert cli.run(command("validate", "p", pairs, "--model.scales=[0.5]")) == 0
    assert "dev scores" in capsys.readouterr().out
    assert cli.run(command("test", "pairs", pairs, "--model.scales=[0.5, 1]")) == 0
    assert cli.run(command("test", "cross")) == 0
    said = capsys.readouterr().out
    assert "glue-sst2 + glue-cola  vectors" in said
    assert "vector_alone" in said
    given = ("--model.study=expressions", "--model.evaluate_on=all", "--model.scales=[0.5]")
    for expression in ("- glue-sst2", "glue-sst2 - glue-cola"):
        words = command("test", "sums", *given, f"--model.expressions=['{expression}']")
        assert cli.run(words) == 0
        rows = read_csv(tmp_path / "sums" / "results.csv")
        assert {x["expression"] for x in rows if x["variant"] == "vectors"} == {expression}
        stored = {path.name for path in (tmp_path / "sums" / "prompts").glob("*.safetensors")}
        assert stored == {Path(row["prompt_file"]).name for row in rows if row["prompt_file"]}
