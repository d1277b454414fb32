"""Tuning in a subspace: codes are trained, nothing else, and the prompts are made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_method, make_trainer

from prompt_lab.core.subspace import Subspace
from prompt_lab.files.peft import load_checkpoint
from prompt_lab.files.prompts import PromptStore
from prompt_lab.files.results import read_csv
from prompt_lab.files.tensors import save_network
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.starts import SubspaceConfig

TOKENS, DIM = 5, 3


@pytest.fixture
def files(backbone, tmp_path) -> tuple[Any, Path]:
    """A tiny GPT-2 and the file of a subspace of its prompts."""
    model = backbone("gpt2")
    path = tmp_path / "subspace.safetensors"
    metadata = {"backbone": model.name, "backbone_digest": model.digest}
    save_network(path, Subspace(TOKENS, model.hidden_size, DIM, inner_size=16), metadata)
    return model, path


@pytest.fixture
def fit(files, fewshot_root, tmp_path):
    """Function that tunes in the subspace and returns the method, its trainer attached."""
    model, path = files

    def run(run_dir: str = "run", ckpt: str | None = None, **settings: Any) -> PromptTuning:
        trainer = settings.pop("trainer", {})
        given = {"subspace": SubspaceConfig(str(path), std=0.5), "learning_rate": 0.1, **settings}
        method = make_method(model, num_virtual_tokens=TOKENS, **given)
        data = make_data(fewshot_root, ["glue-sst2"], [13])
        made = make_trainer(tmp_path / run_dir, **trainer)
        made.fit(method, datamodule=data, ckpt_path=ckpt)
        return method

    return run


def test_only_the_codes_change_and_prompts_are_made_from_them(fit, files):
    before = {
        name: p.clone()
        for name, p in SubspaceConfig(str(files[1])).load(files[0], 5).named_parameters()
    }
    method = fit(learning_rate=[0.1, 0.01])
    assert method.prompt is None
    assert [tuple(p.shape) for p in method.parameters() if p.requires_grad] == [(2, DIM)]
    subspace = method.subspace
    assert all(torch.equal(p, before[name]) for name, p in subspace.named_parameters())
    torch.testing.assert_close(method.best, subspace.back_project(method.keeper["code"]))
    assert (method.bank() - method.init).abs().max() > 1e-4


def test_the_gradient_of_a_code_is_autograds_through_the_map(fit, files):
    """Reference: the loss of all rows under the decoded prompts, differentiated in one graph."""
    method = fit(init_seed=[0, 1], trainer={"max_steps": 3})
    batch = method.datamodule.draw.batch(0, [0, 1])
    method.zero_grad()
    method.status.zero_()
    method.active.fill_(True)
    method.training_step(batch, 0).backward()
    code = method.code.detach().requires_grad_()
    losses = files[0].loss(method.subspace.back_project(code), batch) * batch.weight
    (expected,) = torch.autograd.grad(losses.sum(), code)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(method.code.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_bank_of_codes_follows_the_separate_single_runs(fit):
    trainer = {"max_steps": 12, "val_check_interval": 3}
    bank = fit("bank", learning_rate=[0.1, 0.02], init_seed=[0, 3], trainer=trainer)
    for i, run in enumerate(bank.runs):
        alone = fit(
            f"alone{i}", learning_rate=run.learning_rate, init_seed=run.init_seed, trainer=trainer
        )
        torch.testing.assert_close(bank.code[i], alone.code[0], rtol=0, atol=1e-5)
        assert bank.keeper.step[i] == alone.keeper.step[0]


def test_codes_start_by_the_runs_seed_alone(fit):
    method = fit(init_seed=[0, 1])
    other = fit("other", init_seed=[1])
    torch.testing.assert_close(method.init[1], other.init[0])
    assert not torch.equal(method.init[0], method.init[1])


def test_prompt_files_hold_the_code_and_results_the_dimension(fit, files):
    method = fit()
    (saved,) = PromptStore(method.run_dir / "prompts").load([method.runs[0].name], files[0])
    torch.testing.assert_close(method.subspace.back_project(saved.code[None])[0], saved.prompt)
    assert (saved.start, saved.start_seed) == ("codes", saved.init_seed)
    tested = make_method(
        files[0], num_virtual_tokens=TOKENS, subspace=SubspaceConfig(str(files[1]))
    )
    tested.learning_rates = method.learning_rates
    trainer = make_trainer(method.run_dir)
    trainer.test(tested, datamodule=method.datamodule)
    (row,) = read_csv(method.run_dir / "results.csv")
    assert (row["variant"], row["intrinsic_dim"]) == ("subspace", str(DIM))
    torch.testing.assert_close(tested.keeper["code"][0], saved.code)


def test_a_checkpoint_holds_prompts_and_needs_its_subspace(fit, files, tmp_path):
    fit("half").trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not any(name.startswith("subspace.") for name in saved["state_dict"])
    (prompt,) = load_checkpoint(tmp_path / "a.ckpt")
    assert prompt.prompt.shape == (TOKENS, files[0].hidden_size)
    with pytest.raises(ValueError, match=r"is of subspace [0-9a-f]{12}, the settings give"):
        fit(
            "none",
            ckpt=str(tmp_path / "a.ckpt"),
            subspace=SubspaceConfig("random", intrinsic_dim=DIM),
        )


def test_a_fit_hashes_its_subspace_once(fit, tmp_path, monkeypatch):
    """However many checkpoints it writes: the map may have hundreds of megabytes."""
    hashed = []

    def digest(module: Any) -> str:
        hashed.append(type(module))
        return "a1"

    monkeypatch.setattr("prompt_lab.methods.prompt_tuning.weights_digest", digest)
    method = fit()
    for name in ("a.ckpt", "b.ckpt"):
        method.trainer.save_checkpoint(tmp_path / name)
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved["identity"]["subspace"] == "a1"
    assert hashed == [Subspace]


def test_a_random_subspace_is_a_function_of_its_seed(fit):
    settings = {"subspace": SubspaceConfig("random", intrinsic_dim=4, seed=1)}
    first, again = fit("first", **settings), fit("again", **settings)
    other = fit("other", subspace=SubspaceConfig("random", intrinsic_dim=4, seed=2))
    assert first.variant == "random_subspace"
    assert torch.equal(first.best, again.best)
    assert not torch.equal(first.init, other.init)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"path": "random"}, "give a dimension for a random subspace, and none for a file"),
        ({"path": "x", "intrinsic_dim": 3}, "path is 'x' and model.subspace.intrinsic_dim is 3"),
        ({"path": "random", "intrinsic_dim": 0}, "intrinsic_dim is 0: give at least 1"),
        ({"path": "x", "std": -1.0}, "std is -1.0: give 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        PromptTuning(subspace=SubspaceConfig(**settings))


def test_another_backbone_or_number_of_tokens_is_refused(files, backbone):
    config = SubspaceConfig(str(files[1]))
    with pytest.raises(ValueError, match="5 virtual tokens, but num_virtual_tokens is 6"):
        config.load(files[0], 6)
    with pytest.raises(ValueError, match="made for backbone"):
        config.load(backbone("bart"), TOKENS)
    with pytest.raises(FileNotFoundError, match="no subspace file"):
        SubspaceConfig("missing.safetensors").load(files[0], TOKENS)
