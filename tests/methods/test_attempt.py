"""``Attempt``: a step and its answers against a loop over rows, and what a fit leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_backbone, make_method, make_store
from tiny_fits import SaveAt, fit_in, make_attempt, run_test
from torch import Tensor, nn

from prompt_lab.__main__ import main
from prompt_lab.commands import fit as cli
from prompt_lab.core.attention_mixture import PromptAttention
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import Prefixes
from prompt_lab.core.batch import Batch
from prompt_lab.files.results import read_csv
from prompt_lab.files.tensors import load_network
from prompt_lab.methods.attempt import Attempt
from prompt_lab.methods.starts import InitConfig

SOURCES = ["glue-cola", "e2e_nlg_cleaned"]
TARGETS = ["glue-sst2", "emotion"]


@pytest.fixture
def fit(backbone, fewshot_root, tmp_path) -> Callable[..., Attempt]:
    """Function that fits on a tiny model and returns the method, its trainer attached."""

    def run(
        kind: str = "gpt2",
        tasks: list[str] = TARGETS,
        model: Backbone | None = None,
        trainer: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Attempt:
        method = make_attempt(model or backbone(kind), tmp_path, **settings)
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return fit_in(folder, method, fewshot_root, tasks, **(trainer or {}))

    return run


def row_prompt(
    method: Attempt, ids: list[int], target: Tensor, attention: PromptAttention
) -> Tensor:
    """The prompt (N, D) of one input of these tokens, by a loop over the prompts."""
    assert method.backbone is not None
    embedded = method.backbone.embed(torch.tensor([ids])).detach()[0]
    inner = attention.up(nn.functional.silu(attention.down(embedded.max(dim=0).values)))
    query = attention.norm(inner)
    prompts = [*method.sources, target]
    scores = torch.stack([prompt.max(dim=0).values @ query for prompt in prompts])
    weights = (scores / attention.temperature).softmax(0)
    made = target
    for weight, prompt in zip(weights, prompts, strict=True):
        made = made + weight * prompt
    return made


def one_row(batch: Batch, row: int) -> tuple[list[int], Batch]:
    """The input of a row without padding, and the row as a batch of one prompt."""
    alone = batch.slice(row, row + 1)
    alone = Batch(**{**vars(alone), "prompts": [0], "prompt_index": torch.zeros(1).long()})
    return [*batch.front, *batch.input_ids[row][batch.input_mask[row] == 1].tolist()], alone


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
def test_a_step_and_its_gradients_are_those_of_a_loop_over_rows(fit, kind):
    """Reference: each row alone, in one graph, under a prompt that is mixed by hand; float64."""
    method = fit(kind, model=make_backbone(kind), tokens_per_forward=64)
    method.double()
    method.weight_sum = method.weight_sum.float()  # sums the float32 weights of batches
    batch = method.datamodule.draw.batch(5, range(len(method.runs)))
    assert len(set(batch.prompts)) == 2
    assert len(set(batch.input_lengths)) > 1
    trained = [method.prompt, *method.attention.parameters()]
    loss = method.training_step(batch, 0)
    found = torch.autograd.grad(loss, trained)
    total = torch.zeros((), dtype=torch.float64)
    for row, task in enumerate(batch.prompts):
        ids, alone = one_row(batch, row)
        made = row_prompt(method, ids, method.prompt[task], method.attention)
        total = total + method.backbone.loss(made[None], alone)[0] / 7
    expected = torch.autograd.grad(total, trained)
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)  # batches have float32 weights
    for own, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-9
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
@pytest.mark.parametrize("decoding", ["score", "generate"])
def test_answers_are_those_of_each_row_alone(fit, kind, decoding):
    """Reference: one row after another, with its prompt by hand; so no row sees another's length.

    Batches hold several rows, and rows of other lengths.
    """
    method = fit(kind, decoding=decoding, max_new_tokens=4, trainer={"max_steps": 3})
    backbone, steps = method.backbone, list(method.datamodule.test_dataloader())
    assert max(len(step.batch) for step in steps) > 3
    method._current = False
    for step in steps:
        found = method.answer(Prefixes(backbone, method.best), step)
        labels = list(method.datamodule.tasks[step.task].labels)
        for row, text in enumerate(found):
            ids, alone = one_row(step.batch, row)
            target = method.best[step.batch.prompts[row]]
            made = row_prompt(method, ids, target, method.best_attention).detach()[None]
            if decoding == "score":
                assert text == labels[backbone.choose(made, alone, labels)[0]]
            else:
                assert text == backbone.generate(made, alone, 4)[0]


def test_one_task_sees_the_rows_that_prompt_tuning_sees(fit, backbone, fewshot_root, tmp_path):
    drawn = fit(tasks=TARGETS[:1]).datamodule.draw
    plain = fit_in(tmp_path / "plain", make_method(backbone("gpt2"), batch_size=7), fewshot_root)
    for step in range(4):
        assert drawn.batch(step, [0]).rows == plain.datamodule.draw.batch(step, [0]).rows


def test_target_prompts_and_attention_change_at_their_own_rates(fit):
    method = fit()
    assert not torch.equal(method.prompt, method.init)
    for name, weight in method.attention.state_dict().items():
        assert not torch.equal(weight, method.initial_attention.state_dict()[name]), name
    targets, attention = method.optimizers().param_groups
    assert [id(weight) for weight in targets["params"]] == [id(method.prompt)]
    assert [*map(id, attention["params"])] == [*map(id, method.attention.parameters())]
    assert (targets["initial_lr"], attention["initial_lr"]) == (0.03, 0.01)


def test_target_prompts_say_that_they_answer_only_in_mixtures(fit, backbone, tmp_path, capsys):
    method = fit(trainer={"max_steps": 3})
    run_test(method.run_dir, method, method.datamodule)
    rows = read_csv(method.run_dir / "results.csv")
    assert [(row["variant"], row["task"]) for row in rows] == [("attempt", t) for t in TARGETS]
    for row, prompt in zip(rows, method.store.load([r.name for r in method.runs]), strict=True):
        assert prompt.test_score == float(row["test"])
        assert prompt.source_tasks == SOURCES
    saved = load_network(
        method.run_dir / "attention.safetensors", PromptAttention, backbone("gpt2")
    )
    assert saved.metadata["source_tasks"] == SOURCES
    assert saved.metadata["steps"] == int(method.keeper.step)
    folder, inputs = method.run_dir / "target_prompts", tmp_path / "inputs.txt"
    inputs.write_text("a text\n")
    capsys.readouterr()
    for source in (folder, sorted(folder.glob("*.safetensors"))[0]):
        for words in (
            ["predict", str(source), "--input", str(inputs)],
            ["export", str(source), f"--out={tmp_path / 'out'}", "--format=tensor"],
        ):
            assert main(words) == 1
            said = capsys.readouterr()
            assert "target prompts of Attempt answer only in mixtures with source" in said.err
            assert said.err.count("\n") == 1
            assert not said.out
    assert not (tmp_path / "out").exists()


def test_attention_csv_has_the_mean_weights_of_the_test_rows(fit):
    """Reference: a loop over the rows; the two tasks have twelve each."""
    method = fit("t5")
    method.trainer.test(method, datamodule=method.datamodule)
    rows = read_csv(method.run_dir / "attention.csv")
    assert [row["source"] for row in rows] == [*SOURCES, "target prompt"] * 2
    for at, task in enumerate(TARGETS):
        inputs = method.datamodule.tokens(task, 13, "test").inputs
        keys = torch.cat([method.sources, method.best[at : at + 1]]).amax(1)
        weights = []
        for ids in inputs:
            pooled = method.backbone.embed(torch.tensor(ids)).amax(0, keepdim=True)
            weights.append(method.best_attention(pooled, keys[:-1], keys[-1:])[0])
        found = [row for row in rows if row["task"] == task]
        means, stds = torch.stack(weights).mean(0), torch.stack(weights).std(0, correction=0)
        for row, mean, std in zip(found, means.tolist(), stds.tolist(), strict=True):
            assert float(row["weight"]) == pytest.approx(mean, rel=1e-5)
            assert float(row["std"]) == pytest.approx(std, rel=1e-2)
            assert std > 0


def test_the_baseline_of_initial_prompts_is_the_mixture_before_training(fit):
    """Reference: the answers of a method that was never trained, and none without a prompt."""
    method = fit("t5", test_baselines=True, learning_rate=0.3, attention_learning_rate=3.0)
    method.trainer.test(method, datamodule=method.datamodule)
    lines = [json.loads(line) for line in (method.run_dir / "predictions.jsonl").open()]
    said = {(x["variant"], x["task"], x["row"]): x["prediction"] for x in lines}
    untrained = PromptAttention(32, 6, 2.0, seed=0)
    initial = Prefixes(method.backbone, method.init)
    for step in method.datamodule.test_dataloader():
        labels = list(method.datamodule.tasks[step.task].labels)
        (mixed,), _ = method.prefix_of(initial, step.batch)
        for row, number in enumerate(step.batch.rows):
            ids, alone = one_row(step.batch, row)
            made = row_prompt(method, ids, method.init[step.batch.prompts[row]], untrained).detach()
            torch.testing.assert_close(mixed[row], made)
            for variant, prompt in (("initial_prompt", made), ("no_prompt", made[:0])):
                choice = method.backbone.choose(prompt[None], alone, labels)[0]
                assert said[variant, step.task, number] == labels[choice]


def test_target_prompts_start_from_a_source_prompt(fit, tmp_path, backbone):
    make_store(tmp_path / "store-tiny-gpt2", backbone("gpt2"))
    path = tmp_path / "store-tiny-gpt2" / "glue-cola.safetensors"
    method = fit(init=InitConfig("file", path=str(path)))
    assert torch.equal(method.init, method.sources[:1].expand(2, -1, -1))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"source_tasks": []}, "source_tasks is empty"),
        ({"source_tasks": ["trec", "glue-cola"]}, "1 of 2 source prompts are not in .*: trec 13"),
        ({"source_sample": 42}, "2 of 2 source prompts are not in"),
        ({"num_virtual_tokens": 4}, "5 virtual tokens, but model.num_virtual_tokens is 4"),
        ({"trainer": {"samples": [13, 42]}}, "2 samples, which would share one attention"),
    ],
)
def test_bad_settings_are_refused(fit, settings, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        fit(**settings)


def test_a_target_that_is_a_source_and_a_loss_that_is_not_finite_are_told_of(fit):
    with pytest.warns(UserWarning, match="glue-cola: a source task and a target task"):
        fit(tasks=["glue-cola"])
    with pytest.warns(UserWarning, match="the loss is not finite by step 3; the best state so"):
        fit(learning_rate=1e30)


def test_checkpoints_and_files_of_other_sources_are_refused(fit, backbone, tmp_path):
    fitted = fit(trainer={"callbacks": [SaveAt(tmp_path / "four.ckpt")]})
    changed = {"source_tasks": SOURCES[::-1]}
    with pytest.raises(ValueError, match=r"of source prompts 2 \(glue-cola, e2e_nlg_cleaned\)"):
        fit(trainer={"ckpt": tmp_path / "four.ckpt"}, **changed)
    for settings, reason in (
        (changed, "is of the source prompts"),
        ({"temperature": 3.0}, "temperature 2, the config asks for 6 and 3"),
    ):
        other = make_attempt(backbone("gpt2"), tmp_path, **settings)
        with pytest.raises(ValueError, match=reason):
            run_test(fitted.run_dir, other, fitted.datamodule)


def test_the_command_line_fits_and_tests(model_folder, fewshot_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(cli.RUN_DIR_VARIABLE, "")
    store = make_store(tmp_path / "store", make_backbone("t5"))
    run_dir = tmp_path / "run"
    words = [
        *("fit", "--model=Attempt", f"--model.prompts={store}", f"--model.source_tasks={SOURCES}"),
        *(f"--model.backbone.name={model_folder('t5')}", "--model.num_virtual_tokens=5"),
        *("--model.batch_size=4", f"--data.tasks={TARGETS}", f"--data.root={fewshot_root}"),
        *("--data.samples=[13]", "--trainer.max_steps=4", "--trainer.val_check_interval=2"),
        *("--trainer.accelerator=cpu", "--trainer.logger=false", f"--run_dir={run_dir}"),
    ]
    with pytest.raises(SystemExit, match="0"):
        cli.run([*words, "--dry_run"])
    assert "source_tasks: glue-cola, e2e_nlg_cleaned" in capsys.readouterr().out
    assert cli.run([*words, "--test_after_fit"]) == 0
    first = (run_dir / "attention.csv").read_bytes()
    config = str(run_dir / "config-fit.yaml")
    assert cli.run(["test", f"--config={config}", f"--run_dir={run_dir}"]) == 0
    assert (run_dir / "attention.csv").read_bytes() == first
    assert cli.run([*words, "--overwrite"]) == 0
    assert not (run_dir / "attention.csv").exists()
