"""A map to adapters is found for several tasks, and codes are tuned in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_backbone
from tiny_fits import ALL_TASKS, BOTTLENECK, DIM, INNER, SaveAt, fit_in, loaded, make_map, run_test

from prompt_lab.core.adapters import AdaptedBackbone
from prompt_lab.core.bank import renumber
from prompt_lab.core.subspace import AdapterMap
from prompt_lab.files.results import read_csv
from prompt_lab.files.tensors import load_network
from prompt_lab.methods.adapter_subspace import AdapterSubspace, AdapterTuning
from prompt_lab.methods.configs import BackboneConfig

TASKS = ALL_TASKS[:3]
Fit = Callable[..., Any]


@pytest.fixture
def find(backbone, fewshot_root, tmp_path) -> Fit:
    """Function that finds a map on a tiny model and returns the method, trainer attached."""

    def run(kind: str = "bart", trainer: Any = None, **settings: Any) -> AdapterSubspace:
        given = {"intrinsic_dim": DIM, "inner_size": INNER, "bottleneck": BOTTLENECK}
        given |= {"batch_size": 12, "learning_rate": 0.01, "clip": None, **settings}
        method = loaded(AdapterSubspace(**given), backbone(kind))
        return fit_in(tmp_path / "find", method, fewshot_root, TASKS, **(trainer or {}))

    return run


@pytest.fixture
def tune(backbone, fewshot_root, tmp_path) -> Fit:
    """Function that tunes codes in a map and returns the method, trainer attached."""

    def run(path: Path, trainer: Any = None, **settings: Any) -> AdapterTuning:
        method = AdapterTuning(str(path), **{"learning_rate": 0.1, "std": 0.5, **settings})
        folder = tmp_path / f"tune-{len(list(tmp_path.iterdir()))}"
        return fit_in(
            folder, loaded(method, backbone("bart")), fewshot_root, ["emotion"], **(trainer or {})
        )

    return run


@pytest.fixture
def map_file(backbone, tmp_path) -> Path:
    """The file of a random map to adapters of the tiny BART."""
    return make_map(tmp_path / "map.safetensors", backbone("bart"))


def test_the_map_is_a_two_layer_perceptron_without_projection():
    made = AdapterMap(20, DIM, INNER, seed=4)
    first, last = made.back[0], made.back[2]
    assert [tuple(p.shape) for p in made.parameters()] == [
        (INNER, DIM),
        (INNER,),
        (20, INNER),
        (20,),
    ]
    codes = torch.randn(5, DIM, generator=torch.Generator().manual_seed(0))
    expected = torch.tanh(codes @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(made.back_project(codes), expected[:, None])
    assert float(first.weight.detach().abs().max()) <= DIM**-0.5
    assert 0.9 * INNER**-0.5 < float(last.weight.detach().abs().max()) <= INNER**-0.5
    assert torch.equal(first.weight, AdapterMap(20, DIM, INNER, seed=4).back[0].weight)


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


def test_finding_lowers_the_loss_and_keeps_the_map_of_one_best_step(find, backbone):
    method = find(trainer={"max_steps": 40, "val_check_interval": 5})
    (optimizer,) = method.trainer.optimizers
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in (*method.subspace.parameters(), method.code)}
    means, loss = dict.fromkeys(range(5, 41, 5), 0.0), dict.fromkeys(range(5, 41, 5), 0.0)
    for row in read_csv(method.run_dir / "curves.csv"):
        means[int(row["step"])] += float(row["dev"]) / len(TASKS)
        loss[int(row["step"])] += float(row["train_loss"])
    assert loss[40] < 0.9 * loss[5]
    codes = method.code.detach()
    assert min((codes[a] - codes[b]).norm() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-2
    best = max(means, key=lambda step: (round(means[step], 9), -step))
    assert method.keeper.step.tolist() == [best]
    saved = load_network(method.map_path, AdapterMap, backbone("bart"))
    assert (saved.metadata["steps"], saved.metadata["source_tasks"]) == (best, TASKS)
    assert saved.metadata["dev_score"] == pytest.approx(means[best])
    torch.testing.assert_close(saved.back_project(method.keeper["code"]), method.best)
    run_test(method.run_dir, method, method.datamodule)
    rows = read_csv(method.run_dir / "results.csv")
    named = ("task", "method", "variant", "intrinsic_dim", "num_virtual_tokens")
    assert [tuple(row[name] for name in named) for row in rows] == [
        (task, "AdapterSubspace", "adapter_subspace", str(DIM), "0") for task in TASKS
    ]


@pytest.mark.parametrize("name", ["compile", "gradient_checkpointing"])
def test_ways_to_run_a_backbone_that_do_not_fit_are_refused(fewshot_root, tmp_path, name):
    method = AdapterSubspace(backbone=BackboneConfig(**{name: True}))
    with pytest.raises(ValueError, match=f"{name} .*do not go with adapters"):
        fit_in(tmp_path, method, fewshot_root)


# ---- tuning --------------------------------------------------------------------------------------


def test_a_found_map_is_tuned_in_only_codes_change_and_the_loss_falls(find, tune, backbone):
    found = find()
    before = load_network(found.map_path, AdapterMap, backbone("bart"))
    trainer = {"max_steps": 60, "val_check_interval": 20}
    method = tune(found.map_path, learning_rate=[0.1, 0.01], trainer=trainer)
    assert [tuple(p.shape) for p in method.parameters() if p.requires_grad] == [(2, DIM)]
    for name, weight in method.subspace.state_dict().items():
        assert torch.equal(weight, before.state_dict()[name])
    torch.testing.assert_close(method.best, method.subspace.back_project(method.keeper["code"]))
    assert torch.tensor(method.moved()).min() > 1e-4
    rows = read_csv(method.run_dir / "curves.csv")
    losses = [float(row["train_loss"]) for row in rows if row["run"] == method.runs[0].name]
    assert losses[-1] < losses[0] - 0.1


def test_files_hold_code_and_adapters_and_a_checkpoint_needs_its_map(tune, map_file, tmp_path):
    path = tmp_path / "four.ckpt"
    method, model = tune(map_file, trainer={"callbacks": [SaveAt(path)]}), make_backbone("bart")
    names = [method.runs[0].name]
    (saved,) = method.store.load(names, AdaptedBackbone(model, BOTTLENECK))
    torch.testing.assert_close(method.subspace.back_project(saved.code[None])[0], saved.prompt)
    with pytest.raises(ValueError, match="has hidden size 32"):
        method.store.load(names, model)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert not any(name.startswith(("backbone.", "subspace.")) for name in state)
    other = make_map(tmp_path / "other.safetensors", model, seed=1)
    with pytest.raises(ValueError, match="is of subspace"):
        tune(other, trainer={"ckpt": path})
