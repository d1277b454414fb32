"""``IntrinsicSubspace``: the joint loss against a loop over rows, and what a fit leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_store
from tiny_fits import ALL_TASKS, TOKENS, fit_in, loaded, run_test

from prompt_lab.core.bank import renumber
from prompt_lab.core.subspace import Subspace
from prompt_lab.files.prompts import source_prompts
from prompt_lab.files.results import read_csv
from prompt_lab.files.tensors import load_network
from prompt_lab.methods.identity import fit_id
from prompt_lab.methods.intrinsic_subspace import IntrinsicSubspace
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.starts import SubspaceConfig

SEEN = ALL_TASKS[:3]


@pytest.fixture
def fit(backbone, fewshot_root, tmp_path) -> Callable[..., IntrinsicSubspace]:
    """Function that finds a subspace on a tiny model and returns the method, trainer attached."""

    def run(kind: str = "gpt2", trainer: Any = None, **settings: Any) -> IntrinsicSubspace:
        store = tmp_path / f"store-{kind}"
        if not store.exists():
            make_store(store, backbone(kind))
        given = {"intrinsic_dim": [2, 3], "inner_size": 16, "batch_size": 12}
        given |= {"num_virtual_tokens": TOKENS, "unseen_tasks": ["emotion"], **settings}
        method = loaded(IntrinsicSubspace(str(store), **given), backbone(kind))
        return fit_in(tmp_path / "run", method, fewshot_root, ALL_TASKS, **(trainer or {}))

    return run


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
@pytest.mark.parametrize(
    ("lm", "reconstruction"), [("mean", "sum"), ("sum", "mean"), ("sum", "sum")]
)
def test_the_joint_loss_and_its_gradient_are_those_of_a_loop_over_rows(
    fit, kind, lm, reconstruction
):
    """Reference: one row after another, each under its own decoded prompt, in one graph."""
    method = fit(kind, lm_reduction=lm, reconstruction_reduction=reconstruction, alpha=0.7)
    batch = method.datamodule.draw.batch(5, range(len(method.runs)))
    assert len(set(batch.prompts)) == 3
    maps = list(method.subspaces.parameters())
    loss = method.training_step(batch, 0)
    found = torch.autograd.grad(loss, maps)
    total = torch.zeros(())
    for subspace in method.subspaces:
        for row, prompt in enumerate(batch.prompts):
            source = method.sources[prompt : prompt + 1]
            made = subspace(source)
            alone = renumber(batch.slice(row, row + 1), [prompt])
            (nll,) = method.backbone.loss(made, alone)
            nll = nll / 12 if lm == "mean" else nll * batch.target_lengths[row]
            square = (made - source).square()
            distance = square.sum() if reconstruction == "sum" else square.mean()
            total = total + nll + 0.7 * distance / 12
    expected = torch.autograd.grad(total, maps)
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)
    scale = max(part.abs().max() for part in expected)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=float(scale) * 1e-4)


def test_maps_trained_side_by_side_are_those_trained_alone(fit):
    both = fit()
    for at, dim in enumerate((2, 3)):
        alone = fit(intrinsic_dim=dim)
        for own, other in zip(
            both.subspaces[at].parameters(), alone.subspaces[0].parameters(), strict=True
        ):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
        assert both.keeper.score[at] == alone.keeper.score[0]


def test_training_brings_reconstructions_nearer(fit):
    trainer = {"max_steps": 60, "val_check_interval": 20}
    method = fit(intrinsic_dim=3, alpha=10.0, learning_rate=0.01, clip=None, trainer=trainer)
    rows = read_csv(method.run_dir / "curves.csv")
    assert [row["step"] for row in rows] == ["20", "40", "60"]
    assert float(rows[-1]["reconstruction"]) < 0.5 * float(rows[0]["reconstruction"])
    assert all(row["run"] == "dim3" and float(row["train_loss"]) > 0 for row in rows)


def test_files_hold_the_best_maps_test_scores_them_and_prompts_are_tuned_in_them(
    fit, backbone, fewshot_root, tmp_path
):
    method = fit()
    saved = load_network(method.subspace_path(3), Subspace, backbone("gpt2"))
    for name, tensor in method.best_subspaces[1].state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)
    known = saved.metadata
    assert known["source_tasks"] == SEEN
    assert known["source_prompts"] == SEEN  # the better of two of glue-sst2
    assert known["alpha"] == 200
    (prompt,) = method.store.load(["emotion_13_dim3"], backbone("gpt2"))
    torch.testing.assert_close(saved.back_project(prompt.code[None])[0], prompt.prompt)
    run_test(method.run_dir, method, method.datamodule)
    rows = read_csv(method.run_dir / "results.csv")
    assert [(row["task"], row["variant"], row["intrinsic_dim"]) for row in rows] == [
        (task, "reconstructed_unseen" if task == "emotion" else "reconstructed", dim)
        for dim in ("2", "3")
        for task in ALL_TASKS
    ]
    subspace = SubspaceConfig(str(method.subspace_path(2)))
    tuned = loaded(PromptTuning(num_virtual_tokens=TOKENS, subspace=subspace), backbone("gpt2"))
    assert fit_in(tmp_path / "ist", tuned, fewshot_root).code.shape == (1, 2)
    name = fit_id(method)[0]
    method.sources[0, 0, 0] += 1  # other source prompts are another fit
    assert fit_id(method)[0] != name


def test_missing_prompts_are_all_named(backbone, tmp_path):
    model = backbone("gpt2")
    store = make_store(tmp_path / "store", model, ["glue-sst2"])
    keys = [("glue-sst2", 13), ("glue-cola", 13), ("glue-sst2", 42)]
    with pytest.raises(
        FileNotFoundError, match=r"2 of 3 .*: glue-cola 13, glue-sst2 42; tune them"
    ):
        source_prompts([str(store)], keys, model, TOKENS)
    with pytest.raises(ValueError, match=r"5 virtual tokens, but .*num_virtual_tokens is 7"):
        source_prompts([str(store)], keys[:1], model, 7)
    with pytest.raises(ValueError, match="made for backbone"):
        source_prompts([str(store)], keys[:1], backbone("bart"), TOKENS)
    with pytest.raises(FileNotFoundError, match="no prompt file or folder"):
        source_prompts([str(tmp_path / "none")], keys[:1], model, TOKENS)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"intrinsic_dim": []}, "give distinct numbers of 1 or more"),
        ({"intrinsic_dim": [3, 3]}, "give distinct numbers of 1 or more"),
        ({"unseen_tasks": ["imdb"]}, "unseen_tasks has imdb, which data.tasks has not"),
        ({"unseen_tasks": ALL_TASKS}, "unseen_tasks has every task of data.tasks"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fit, settings, reason):
    with pytest.raises(ValueError, match=reason):
        fit(**settings)


def test_more_dimensions_than_prompts_are_warned_of(fit):
    with pytest.warns(UserWarning, match="intrinsic_dim 7 is larger than the number of prompts"):
        fit(intrinsic_dim=7)
