"""A map to adapters is found for several tasks, and codes are tuned in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_trainer
from lightning.pytorch import Callback

from prompt_lab.core.adapters import AdaptedBackbone
from prompt_lab.core.bank import renumber
from prompt_lab.core.pretrained import weights_digest
from prompt_lab.core.subspace import AdapterMap
from prompt_lab.files.prompts import PromptStore
from prompt_lab.files.results import read_csv
from prompt_lab.files.tensors import load_network, save_network
from prompt_lab.methods.adapter_subspace import (
    AdapterSubspace,
    AdapterTuning,
)
from prompt_lab.methods.configs import BackboneConfig

DIM, INNER, BOTTLENECK = 3, 8, 2
TASKS = ["glue-sst2", "glue-cola", "e2e_nlg_cleaned"]

Fit = Callable[..., Any]


@pytest.fixture
def find(backbone, fewshot_root, tmp_path) -> Fit:
    """Function that finds a map on a tiny model and returns the method, trainer attached."""

    def run(
        kind: str = "bart",
        run_dir: str = "find",
        ckpt: Path | None = None,
        trainer: dict[str, Any] | None = None,
        tasks: list[str] = TASKS,
        **settings: Any,
    ) -> AdapterSubspace:
        given = {"intrinsic_dim": DIM, "inner_size": INNER, "bottleneck": BOTTLENECK}
        given |= {"batch_size": 12, "learning_rate": 0.01, "clip": None, **settings}
        method = AdapterSubspace(**given)
        method.backbone = backbone(kind)
        made = make_trainer(tmp_path / run_dir, **(trainer or {}))
        data = make_data(fewshot_root, tasks, [13])
        made.fit(method, datamodule=data, ckpt_path=None if ckpt is None else str(ckpt))
        return method

    return run


@pytest.fixture
def tune(backbone, fewshot_root, tmp_path) -> Fit:
    """Function that tunes codes in a map and returns the method, trainer attached."""

    def run(
        path: Path,
        kind: str = "bart",
        run_dir: str = "tune",
        ckpt: Path | None = None,
        trainer: dict[str, Any] | None = None,
        **settings: Any,
    ) -> AdapterTuning:
        given = {"learning_rate": 0.1, "batch_size": 4, "std": 0.5, **settings}
        method = AdapterTuning(str(path), **given)
        method.backbone = backbone(kind)
        made = make_trainer(tmp_path / run_dir, **(trainer or {}))
        data = make_data(fewshot_root, ["emotion"], [13])
        made.fit(method, datamodule=data, ckpt_path=None if ckpt is None else str(ckpt))
        return method

    return run


@pytest.fixture
def map_file(backbone, tmp_path) -> Path:
    """The file of a random map to adapters of the tiny BART."""
    model = backbone("bart")
    path = tmp_path / "map.safetensors"
    size = AdaptedBackbone(model, BOTTLENECK).hidden_size
    made = AdapterMap(size, DIM, INNER)
    metadata = {"backbone": model.name, "backbone_digest": model.digest}
    save_network(path, made, {**metadata, "bottleneck": BOTTLENECK})
    return path


# ---- the map -------------------------------------------------------------------------------------


def test_the_map_is_a_two_layer_perceptron_without_projection():
    made = AdapterMap(20, DIM, INNER, seed=4)
    assert {name: tuple(p.shape) for name, p in made.named_parameters()} == {
        "back.0.weight": (INNER, DIM),
        "back.0.bias": (INNER,),
        "back.2.weight": (20, INNER),
        "back.2.bias": (20,),
    }
    codes = torch.randn(5, DIM, generator=torch.Generator().manual_seed(0))
    first, last = made.back[0], made.back[2]
    expected = torch.tanh(codes @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(made.back_project(codes), expected[:, None])
    assert float(first.weight.detach().abs().max()) <= DIM**-0.5
    assert 0.9 * INNER**-0.5 < float(last.weight.detach().abs().max()) <= INNER**-0.5
    assert torch.equal(made.back[0].weight, AdapterMap(20, DIM, INNER, seed=4).back[0].weight)


# ---- finding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bart", "t5", "gpt2"])
def test_the_loss_and_its_gradient_are_those_of_a_loop_over_rows(find, kind):
    """Reference: one row after another, each under the adapters of its task's code."""
    method = find(kind, trainer={"max_steps": 3})
    method.status.zero_()
    method.active.fill_(True)
    batch = method.datamodule.draw.batch(5, range(len(method.runs)))
    assert len(set(batch.prompts)) == 3
    trained = [*method.subspace.parameters(), method.code]
    loss = method.training_step(batch, 0)
    found = torch.autograd.grad(loss, trained)
    total = torch.zeros(())
    for row, task in enumerate(batch.prompts):
        made = method.subspace.back_project(method.code[task : task + 1])
        alone = renumber(batch.slice(row, row + 1), [task])
        total = total + method.backbone.loss(made, alone)[0] / 12
    expected = torch.autograd.grad(total, trained)
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)
    for own, other in zip(found, expected, strict=True):
        assert ((own - other).norm() / other.norm()).item() < 1e-3
    assert (expected[-1].norm(dim=1) > 1e-6).all()  # every task has a gradient of its own


@pytest.mark.parametrize("kind", ["bart", "gpt2"])
def test_finding_lowers_the_loss_and_changes_map_and_codes_alone(find, backbone, kind):
    before = weights_digest(backbone(kind).model)
    method = find(kind, trainer={"max_steps": 40, "val_check_interval": 10})
    assert weights_digest(backbone(kind).model) == before
    (optimizer,) = method.trainer.optimizers
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in (*method.subspace.parameters(), method.code)}
    rows = read_csv(method.run_dir / "curves.csv")
    assert len(rows) == 4 * len(TASKS)
    loss = [sum(float(row["train_loss"]) for row in rows if row["step"] == s) for s in ("10", "40")]
    assert loss[1] < 0.9 * loss[0]
    codes = method.code.detach()
    assert min((codes[a] - codes[b]).norm() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-2


def test_the_best_map_is_one_step_for_all_tasks(find, backbone):
    method = find(trainer={"max_steps": 40, "val_check_interval": 5})
    rows = read_csv(method.run_dir / "curves.csv")
    means: dict[int, float] = {}
    for row in rows:
        means[int(row["step"])] = means.get(int(row["step"]), 0) + float(row["dev"]) / len(TASKS)
    best = max(means, key=lambda step: (round(means[step], 9), -step))
    assert method.keeper.step.tolist() == [best]
    saved = load_network(method.map_path, AdapterMap, backbone("bart"))
    assert saved.metadata["steps"] == best
    assert saved.metadata["source_tasks"] == TASKS
    assert saved.metadata["dev_score"] == pytest.approx(means[best])
    torch.testing.assert_close(saved.back_project(method.keeper["code"]), method.best)


def test_test_reads_the_adapters_from_the_store(find, backbone):
    fitted = find()
    tested = AdapterSubspace(
        intrinsic_dim=DIM,
        inner_size=INNER,
        bottleneck=BOTTLENECK,
        batch_size=12,
        learning_rate=0.01,
    )
    tested.backbone = backbone("bart")
    make_trainer(fitted.run_dir).test(tested, datamodule=fitted.datamodule)
    rows = read_csv(fitted.run_dir / "results.csv")
    assert [(row["task"], row["method"], row["variant"]) for row in rows] == [
        (task, "AdapterSubspace", "adapter_subspace") for task in TASKS
    ]
    assert {(r["intrinsic_dim"], r["num_virtual_tokens"]) for r in rows} == {(str(DIM), "0")}
    assert torch.equal(tested.best, fitted.best)


class SaveAtStepFour(Callback):
    """Saves a checkpoint in the middle of a fit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"intrinsic_dim": 0}, "intrinsic_dim is 0: give at least 1"),
        ({"inner_size": 0}, "inner_size is 0: give at least 1"),
        ({"bottleneck": 0}, "bottleneck is 0: give at least 1"),
        ({"std": -1.0}, "std is -1.0: give 0 or more"),
        ({"warmup": 2.0}, "warmup is 2.0: give a share of the steps"),
        ({"clip": 0.0}, "clip is 0.0: give a positive norm"),
        ({"backbone": BackboneConfig(compile=True)}, "compile do not go with adapters"),
        (
            {"backbone": BackboneConfig(gradient_checkpointing=True)},
            "gradient_checkpointing .* do not go with adapters",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(find, settings, reason):
    with pytest.raises(ValueError, match=reason):
        find(**settings)


# ---- tuning --------------------------------------------------------------------------------------


def test_a_found_map_is_tuned_in_and_only_codes_change(find, tune, backbone):
    found = find()
    before = load_network(found.map_path, AdapterMap, backbone("bart"))
    method = tune(found.map_path, learning_rate=[0.1, 0.01])
    assert [tuple(p.shape) for p in method.parameters() if p.requires_grad] == [(2, DIM)]
    for name, weight in method.subspace.state_dict().items():
        assert torch.equal(weight, before.state_dict()[name])
    torch.testing.assert_close(method.best, method.subspace.back_project(method.keeper["code"]))
    assert torch.tensor(method.moved()).min() > 1e-4


def test_tuning_lowers_the_loss(tune, map_file):
    method = tune(map_file, trainer={"max_steps": 60, "val_check_interval": 20})
    losses = [float(row["train_loss"]) for row in read_csv(method.run_dir / "curves.csv")]
    assert losses[-1] < losses[0] - 0.1


def test_a_bank_of_codes_follows_the_separate_single_runs(tune, map_file):
    trainer = {"max_steps": 12, "val_check_interval": 3}
    bank = tune(map_file, run_dir="b", learning_rate=[0.1, 0.02], init_seed=[0, 3], trainer=trainer)
    for i, run in enumerate(bank.runs):
        given = {"learning_rate": run.learning_rate, "init_seed": run.init_seed}
        alone = tune(map_file, run_dir=f"alone{i}", trainer=trainer, **given)
        torch.testing.assert_close(bank.code[i], alone.code[0], rtol=0, atol=1e-5)
        assert bank.keeper.step[i] == alone.keeper.step[0]


def test_results_name_the_dimension_and_files_hold_code_and_adapters(tune, map_file, backbone):
    method = tune(map_file, test_baselines=True)
    store = PromptStore(method.run_dir / "prompts")
    (saved,) = store.load([method.runs[0].name], AdaptedBackbone(backbone("bart"), BOTTLENECK))
    torch.testing.assert_close(method.subspace.back_project(saved.code[None])[0], saved.prompt)
    with pytest.raises(ValueError, match="has hidden size 32"):
        store.load([method.runs[0].name], backbone("bart"))
    tested = AdapterTuning(
        str(map_file), learning_rate=0.1, batch_size=4, std=0.5, test_baselines=True
    )
    tested.backbone = backbone("bart")
    make_trainer(method.run_dir).test(tested, datamodule=method.datamodule)
    rows = {row["variant"]: row for row in read_csv(method.run_dir / "results.csv")}
    assert list(rows) == [
        "adapter_subspace",
        "no_prompt",
        "initial_prompt",
        "chance",
        "majority",
    ]
    row = rows["adapter_subspace"]
    assert (row["method"], row["intrinsic_dim"]) == ("AdapterTuning", str(DIM))
    assert torch.equal(tested.keeper["code"][0], saved.code)


def test_a_checkpoint_needs_its_map(tune, map_file, tmp_path, backbone):
    path = tmp_path / "four.ckpt"
    tune(map_file, run_dir="whole", trainer={"callbacks": [SaveAtStepFour(path)]})
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert not any(name.startswith(("backbone.", "subspace.")) for name in saved)
    model, other = backbone("bart"), tmp_path / "other.safetensors"
    metadata = {"backbone": model.name, "backbone_digest": model.digest, "bottleneck": BOTTLENECK}
    size = AdaptedBackbone(model, BOTTLENECK).hidden_size
    save_network(other, AdapterMap(size, DIM, INNER, seed=1), metadata)
    with pytest.raises(ValueError, match="is of subspace"):
        tune(other, run_dir="other", ckpt=path)
