"""``FineTuning``: gradients and steps against plain torch, what is kept, resume, refusals.

The references are transformers' own losses on the plain model, a naive training loop with torch's
optimizer and transformers' schedule, finite differences, and fits that nothing interrupted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, KINDS, make_backbone, make_data, make_trainer
from lightning.pytorch import Callback
from safetensors.torch import load_file
from tiny_fits import SaveAt, fit_in, loaded, run_test
from transformers import get_scheduler

from prompt_lab.commands import fit as cli
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.batch import IGNORE
from prompt_lab.core.optim import OptimConfig
from prompt_lab.data.sampling import step_rows
from prompt_lab.files.results import read_csv
from prompt_lab.methods.fine_tuning import FineTuning, weights_gradient
from prompt_lab.methods.method import FAILED, STATUS

TEXTS = ["the dog ran", "a small red house", "the cat and the dog ran over the hill"]
ANSWERS = ["yes", "maybe no", "positive"]
Weights = dict[str, torch.Tensor]


def make(model: Backbone, **settings: Any) -> FineTuning:
    """The method on a backbone that it will change."""
    return loaded(FineTuning(**{"learning_rate": 1e-3, "batch_size": 4, **settings}), model)


@pytest.fixture
def fit(fewshot_root: Path, tmp_path: Path) -> Callable[..., FineTuning]:
    """Function that trains a new tiny model and returns the method, its trainer attached."""

    def run(
        kind: str = "t5",
        model: Backbone | None = None,
        task: str = "glue-sst2",
        trainer: dict[str, Any] | None = None,
        **settings: Any,
    ) -> FineTuning:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        method = make(model or make_backbone(kind), **settings)
        return fit_in(folder, method, fewshot_root, [task], **(trainer or {}))

    return run


@pytest.fixture
def prepare(fewshot_root: Path, tmp_path: Path) -> Callable[..., FineTuning]:
    """Function that makes a method ready on a new tiny model, without a fit."""

    def run(kind: str, **settings: Any) -> FineTuning:
        data = make_data(fewshot_root, ["glue-sst2"], [13])
        data.setup()
        method = make(make_backbone(kind), **settings)
        method.look(data, make_trainer(tmp_path))
        return method

    return run


class Evaluated(Callback):
    """Notes the weights after each evaluation."""

    def __init__(self) -> None:
        self.weights: dict[int, Weights] = {}

    def on_validation_end(self, trainer, pl_module):
        self.weights[trainer.global_step] = weights_of(pl_module)


def weights_of(method: Any) -> Weights:
    """A copy of the backbone's weights."""
    return {name: weight.detach().clone() for name, weight in method.weights.items()}


def differing(one: Weights, other: Weights) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not one[name].equal(other[name])]


# ---- the gradient --------------------------------------------------------------------------------


def plain_loss(model: Any, backbone: Backbone, ids: list[int], target: list[int]) -> torch.Tensor:
    """Transformers' own loss of one row, given labels."""
    if backbone.is_encoder_decoder:
        return model(input_ids=torch.tensor([ids]), labels=torch.tensor([target])).loss
    labels = [IGNORE] * len(ids) + target
    return model(input_ids=torch.tensor([ids + target]), labels=torch.tensor([labels])).loss


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_plain_model(kind):
    """Reference: transformers' loss with labels, row by row, on the model as it is; float64."""
    # transformers' BLOOM is not a number at padding in float64, since its softmax is float32
    backbone = make_backbone(kind, torch.float32 if kind == "bloom" else torch.float64)
    plain = copy.deepcopy(backbone.model).requires_grad_(True)
    rows = zip(backbone.encode_inputs(TEXTS), backbone.encode_targets(ANSWERS), strict=True)
    wanted = torch.stack([plain_loss(plain, backbone, *row) for row in rows]).double().mean()
    wanted.backward()
    backbone.unfreeze()
    weights = dict(backbone.model.named_parameters())
    batch = backbone.batch(TEXTS, ANSWERS)
    batch.weight.fill_(1 / 3)
    loss, gradients = weights_gradient(backbone, list(weights.values()), batch, 1000)
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-5, atol=0)
    expected = dict(plain.named_parameters())
    assert expected.keys() == weights.keys()
    assert max(gradient.abs().max() for gradient in gradients) > 1e-2
    for name, gradient in zip(weights, gradients, strict=True):  # T5's norms are in float32
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
def test_weight_decay_spares_biases_and_norms(prepare, kind):
    """Reference: the names of weights, and the kinds of the modules that own them."""
    method = prepare(kind, optim=OptimConfig(weight_decay=0.5))
    spared = {
        id(weight)
        for module in method.backbone.model.modules()
        if "norm" in type(module).__name__.lower()
        for weight in module.parameters(recurse=False)
    }
    assert spared
    spared |= {id(weight) for name, weight in method.weights.items() if "bias" in name}
    decay = {id(w): group["weight_decay"] for group in method._groups() for w in group["params"]}
    assert decay == {id(w): 0.0 if id(w) in spared else 0.5 for w in method.weights.values()}
    held = [id(w) for group in method._groups() for w in group["params"]]
    assert len(set(held)) == len(held)  # tied weights, as T5's vocabulary, count once


def test_a_subspaces_gradient_is_that_of_finite_differences(fit):
    """Reference: central differences of the loss in every coordinate of v, in float64."""
    method = fit("gpt2", model=make_backbone("gpt2", torch.float64), intrinsic_dim=5)
    batch = method.datamodule.draw.batch(0, [0])
    method.active.fill_(True)
    v = torch.tensor([0.3, -0.2, 0.5, 0.1, -0.4], dtype=torch.float64)

    def loss(at: torch.Tensor) -> torch.Tensor:
        method.code.data.copy_(at)
        method.move_weights()
        return method.backbone.loss(method.init, batch).mean().detach()

    step = 1e-5 * torch.eye(5, dtype=torch.float64)
    expected = torch.stack([(loss(v + e) - loss(v - e)) / 2e-5 for e in step])
    assert expected.abs().min() > 1e-4
    method.code.data.copy_(v)
    method.code.grad = None
    method.training_step(batch, 0).backward()
    torch.testing.assert_close(method.code.grad, expected, rtol=1e-5, atol=1e-8)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bart", "gpt2"])
def test_a_fit_is_the_naive_loop_over_the_rows_of_prompt_tuning(fit, kind):
    """Reference: torch.optim.AdamW, transformers' linear schedule, a clip of the global norm."""
    model = make_backbone(kind, torch.float64)
    plain = copy.deepcopy(model.model).requires_grad_(True)
    optim = OptimConfig(schedule="linear", warmup_steps=2, clip=0.5, weight_decay=0.1)
    trainer = {"max_steps": 9, "val_check_interval": 3}
    method = fit(kind, model=model, task="e2e_nlg_cleaned", optim=optim, trainer=trainer)
    (run,), rows = method.runs, method.datamodule.tokens("e2e_nlg_cleaned", 13, "train")
    parameters = dict(plain.named_parameters())
    decayed = {n: w for n, w in parameters.items() if w.dim() > 1 and "bias" not in n}
    spared = [w for n, w in parameters.items() if n not in decayed]
    groups = [{"params": list(decayed.values()), "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW([*groups, {"params": spared, "weight_decay": 0.0}], lr=1e-3)
    schedule = get_scheduler("linear", optimizer, 2, 9)
    for step in range(9):
        losses = []
        for row, draw in step_rows(run, 0, step, len(rows)):
            target = rows.targets[row][draw % len(rows.targets[row])]
            losses.append(plain_loss(plain, model, rows.inputs[row], target))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5) > 0.5
        optimizer.step()
        schedule.step()
    assert model.model.get_input_embeddings().weight.dtype == torch.float64
    for name, weight in method.weights.items():
        torch.testing.assert_close(weight, parameters[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"intrinsic_dim": 7}], ids=["all weights", "subspace"])
def test_only_what_is_asked_for_is_optimized(fit, settings):
    """Reference: every weight of the model; or v alone, with the weights at theta_0 + P v."""
    start = {name: w.detach() for name, w in make_backbone("t5").model.named_parameters()}
    method = fit(**settings, learning_rate=0.1)
    held = [w for group in method.trainer.optimizers[0].param_groups for w in group["params"]]
    if not settings:
        assert {id(w) for w in held} == {id(w) for w in method.backbone.model.parameters()}
        assert len(differing(weights_of(method), start)) == len(start)
        return
    assert [id(w) for w in held] == [id(method.code)]
    assert method.code.abs().min() > 0
    method.move_weights()
    increments = method.fastfood(method.code)
    for name, weight in method.weights.items():
        torch.testing.assert_close(weight - start[name], increments[name].view_as(weight))


def test_a_subspace_is_a_function_of_its_seed(fit):
    first, again, other = (fit(intrinsic_dim=7, init_seed=seed).code.detach() for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing": 0.1},
        {"optim": OptimConfig("adafactor")},
        {"trainer": {"precision": "bf16-mixed"}},
    ],
    ids=["label smoothing", "adafactor", "mixed precision"],
)
def test_training_settings_reach_the_training(fit, settings):
    """Reference: the fit without the setting, which ends elsewhere."""
    plain, changed = fit(), fit(**settings)
    assert all(weight.isfinite().all() for weight in changed.weights.values())
    assert {weight.dtype for weight in changed.weights.values()} == {torch.float32}
    assert differing(weights_of(plain), weights_of(changed))


# ---- best, stop, failure -------------------------------------------------------------------------


def test_the_best_weights_are_kept_and_put_in_place_by_test(fit):
    """Reference: the weights at the evaluation with the best line of ``curves.csv``."""
    seen = Evaluated()
    trainer = {"max_steps": 12, "val_check_interval": 2, "callbacks": [seen]}
    method = fit("gpt2", trainer=trainer, learning_rate=3e-3)
    lines = read_csv(method.run_dir / "curves.csv")
    best = max(lines, key=lambda row: float(row["dev"]))  # max keeps the first of equals
    step = int(best["step"])
    assert step == method.keeper.step < 12
    assert method.keeper.score == float(best["dev"])
    assert differing(weights_of(method), seen.weights[step])
    assert not differing(method.best_weights, seen.weights[step])
    method.trainer.test(method, datamodule=method.datamodule, verbose=False)
    assert not differing(weights_of(method), seen.weights[step])
    assert not differing(load_file(method.best_path), method.best_weights)


@pytest.mark.parametrize("settings", [{}, {"intrinsic_dim": 5}], ids=["all weights", "subspace"])
def test_a_fit_that_diverges_ends_with_its_best_so_far(fit, settings):
    """Reference: the weights that it started from, since no evaluation came before."""
    start = {name: w.detach() for name, w in make_backbone("gpt2").model.named_parameters()}
    with pytest.warns(UserWarning, match=r"not finite by step 3: glue-sst2_13_seed0_lr1e\+30_bs4"):
        method = fit("gpt2", learning_rate=1e30, trainer={"max_steps": 9}, **settings)
    assert method.trainer.global_step == 3
    assert method.status == FAILED
    method.trainer.test(method, datamodule=method.datamodule, verbose=False)
    assert not differing(weights_of(method), start)
    (row,) = read_csv(method.run_dir / "results.csv")
    assert (row["status"], row["dev"], row["best_step"]) == (STATUS[FAILED], "", "-1")
    assert read_csv(method.run_dir / "curves.csv")[0]["status"] == STATUS[FAILED]


# ---- files and checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"intrinsic_dim": 9}], ids=["all weights", "subspace"])
def test_results_say_what_was_trained_and_a_checkpoint_is_enough_to_test(fit, tmp_path, settings):
    """Reference: the results of the process of the fit, but for its time."""
    settings = {**settings, "learning_rate": 3e-3}
    method = fit("gpt2", task="e2e_nlg_cleaned", **settings)
    results, data = method.run_dir / "results.csv", method.datamodule
    run_test(method.run_dir, method, data)
    (row,), best = read_csv(results), weights_of(method)
    said = [row[k] for k in ("variant", "start", "intrinsic_dim", "num_virtual_tokens", "dev")]
    known = (
        ["random_subspace", "codes", "9"]
        if "intrinsic_dim" in settings
        else ["tuned", "weights", ""]
    )
    assert said == [*known, "0", str(float(method.keeper.score))]
    assert make_backbone("gpt2").digest in (method.run_dir / "digests.json").read_text()
    assert not (method.run_dir / "prompts").exists()
    method.trainer.save_checkpoint(tmp_path / "a.ckpt")
    method.best_path.unlink()
    again = make(make_backbone("gpt2"), **settings)
    make_trainer(method.run_dir).test(again, datamodule=data, ckpt_path=tmp_path / "a.ckpt")
    assert not differing(weights_of(again), best)
    assert [{**read_csv(results)[0], "seconds": ""}] == [{**row, "seconds": ""}]
    again = make(make_backbone("gpt2"), **settings)
    with pytest.raises(FileNotFoundError, match=r"no best weights .* or give a checkpoint"):
        run_test(method.run_dir, again, data)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "glue-cola"}, "another fit: task glue-sst2 there and glue-cola here"),
        ({"intrinsic_dim": 3}, "intrinsic_dim None there and 3 here, subspace_seed None there"),
        ({"kind": "llama"}, "another fit: backbone_digest"),
        ({"damaged": b"x" * 50}, "damaged or not a safetensors file"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_weights_of_another_fit_are_refused(fit, fewshot_root, changes, reason):
    method = fit("gpt2")
    kind, task = changes.pop("kind", "gpt2"), changes.pop("task", "glue-sst2")
    if "damaged" in changes:
        method.best_path.write_bytes(changes.pop("damaged"))
    with pytest.raises(ValueError, match=reason):
        run_test(
            method.run_dir,
            make(make_backbone(kind), **changes),
            make_data(fewshot_root, [task], [13]),
        )


def test_a_resumed_fit_equals_the_uninterrupted_one(fit, tmp_path):
    """Reference: the fit that wrote the checkpoint and went on; bit for bit."""
    path, optim = tmp_path / "a.ckpt", OptimConfig("adafactor", schedule="cosine")
    trainer = {"max_steps": 9, "val_check_interval": 3}
    whole = fit("gpt2", optim=optim, trainer={**trainer, "callbacks": [SaveAt(path)]})
    rest = fit("gpt2", optim=optim, trainer={**trainer, "ckpt": path})
    assert not differing(weights_of(rest), weights_of(whole))
    assert not differing(rest.best_weights, whole.best_weights)
    states = [m.trainer.optimizers[0].state_dict()["state"] for m in (rest, whole)]
    assert states[0].keys() == states[1].keys()
    for at, own in states[0].items():
        assert not differing(
            *({k: torch.as_tensor(v) for k, v in s.items()} for s in (own, states[1][at]))
        )


def test_settings_of_the_optimizer_win_over_the_checkpoint_but_not_its_kind(fit, tmp_path):
    """Reference: what was given to the resumed fit."""
    fit().trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer = {"max_steps": 9, "ckpt": tmp_path / "a.ckpt"}
    given = {"learning_rate": 2e-3, "optim": OptimConfig(weight_decay=0.25, betas=(0.8, 0.9))}
    groups = fit(trainer=trainer, **given).trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert {(group["lr"], tuple(group["betas"])) for group in groups} == {(2e-3, (0.8, 0.9))}
    with pytest.raises(ValueError, match="is of optimizer adamw, the settings give adafactor"):
        fit(optim=OptimConfig("adafactor"), trainer=trainer)


# ---- refusals, the command line ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"learning_rate": [1e-5, 2e-5]}, r"model.learning_rate has 2 values: give one of each"),
        ({"batch_size": [2, 4, 8]}, "model.batch_size has 3 values: .* with prompt-lab sweep"),
        ({"optim": OptimConfig("sgd")}, "FineTuning has no sgd"),
        ({"dtype": torch.bfloat16}, "weights in bfloat16, which rounds small upd"),
        ({"dtype": torch.float16}, "weights in float16, which rounds small upd"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fit, settings, reason):
    model = make_backbone("gpt2", settings.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=reason) as refused:
        fit(model=model, **settings)
    assert "\n" not in str(refused.value)


def test_the_command_fits_tests_and_looks(fewshot_root, model_folder, tmp_path, capsys):
    words = [
        *("fit", f"--config={CONFIGS / 'fine_tuning' / 'sandbox.yaml'}"),
        *(f"--model.backbone.name={model_folder('t5')}", "--data.tasks=[glue-sst2]"),
        *(f"--data.root={fewshot_root}", "--data.samples=[13]", "--trainer.logger=false"),
        *("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu"),
        f"--run_dir={tmp_path / 'r'}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cli.RUN_DIR_VARIABLE, "")
        with pytest.raises(SystemExit, match="0"):
            cli.run([*words, "--dry_run"])
        assert capsys.readouterr().out.startswith("1 run of all ")
        assert cli.run(words) == 0
        (row,) = read_csv(tmp_path / "r" / "results.csv")
        assert row["method"] == "FineTuning"
        assert cli.run(["test", f"--config={tmp_path}/r/config-fit.yaml", words[-1]]) == 0
        assert read_csv(tmp_path / "r" / "results.csv")[0]["test"] == row["test"]
