"""The auto-encoder of prompts against NumPy and PCA; its file: what is written is read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HIDDEN
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prompt_lab import __version__
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.subspace import Subspace, load_subspace, reconstruction_loss, save_subspace
from prompt_lab.files.prompt_file import Prompt, save_prompt

Factory = Callable[..., Backbone]

N, D, H = 4, 6, 7
CODE = 3
METADATA: dict[str, Any] = {
    "backbone": "someone/some-model",
    "backbone_digest": "0123456789abcdef",
    "source_tasks": ["emotion", "glue-sst2"],
    "init_seed": 0,
    "steps": 1000,
    "alpha": 200.0,
    "lm_reduction": "mean",
    "ae_reduction": "sum",
}


def make(inner_size: int | None = H, seed: int = 0) -> Subspace:
    return Subspace(N, D, CODE, inner_size, seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A subspace file."""
    path = tmp_path / "subspace.safetensors"
    save_subspace(path, make(), METADATA)
    return path


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **metadata: str | None) -> None:
    """The same file with other tensors, or with metadata changed, or left out where None."""
    with safe_open(str(path), "pt") as file:
        old = file.metadata()
    new = {k: v for k, v in {**old, **metadata}.items() if v is not None}
    save_file(load_file(path) if tensors is None else tensors, path, new)


# ---- the maps -----------------------------------------------------------------------------------


def test_maps_equal_the_formulas_of_the_paper() -> None:
    """Proj(p) = A p + a; Back(c) = W2 tanh(W1 c + b1) + b2; in NumPy."""
    subspace, prompts = make(), draw(5, N, D)
    weights = [tensor.double().numpy() for tensor in subspace.state_dict().values()]
    a, a0, w1, b1, w2, b2 = weights
    codes = prompts.double().numpy().reshape(5, N * D) @ a.T + a0
    expected = (np.tanh(codes @ w1.T + b1) @ w2.T + b2).reshape(5, N, D)
    with torch.no_grad():
        np.testing.assert_allclose(subspace.project(prompts), codes, atol=1e-5)
        np.testing.assert_allclose(subspace(prompts), expected, atol=1e-5)
        back = subspace.back_project(torch.from_numpy(codes).float())
    np.testing.assert_allclose(back, expected, atol=1e-5)


def test_without_an_inner_size_the_way_back_is_one_linear_layer() -> None:
    subspace = make(inner_size=None)
    a, b = draw(2, CODE), draw(2, CODE, seed=1)
    with torch.no_grad():
        zero, both = subspace.back_project(torch.zeros(2, CODE)), subspace.back_project(a + b)
        sum_ = subspace.back_project(a) + subspace.back_project(b)
    torch.testing.assert_close(both, sum_ - zero)
    assert sum(p.numel() for p in subspace.parameters()) == 2 * N * D * CODE + CODE + N * D


def test_the_papers_sizes_give_the_papers_number_of_parameters() -> None:
    """100 tokens of 768, I = 250, H = 768: 19.2, 0.19 and 59.06 million, with biases."""
    with torch.device("meta"):
        subspace = Subspace(100, 768, 250, seed=None)
    sizes = [p.numel() for p in subspace.parameters()]
    assert sizes == [250 * 76800, 250, 768 * 250, 768, 76800 * 768, 76800]
    assert all(p.dtype == torch.float32 for p in subspace.parameters())


def test_weights_are_drawn_as_torchs_linear_layers_draw_them() -> None:
    torch.manual_seed(5)
    layers = [torch.nn.Linear(N * D, CODE), torch.nn.Linear(CODE, H), torch.nn.Linear(H, N * D)]
    expected = [p for layer in layers for p in layer.parameters()]
    for found, ours in zip(make(seed=5).parameters(), expected, strict=True):
        torch.testing.assert_close(found, ours)


def test_initialisation_depends_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (make(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_autocast_does_not_round_prompts() -> None:
    subspace, prompts = make(), draw(5, N, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = subspace(prompts)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, subspace(prompts))


def test_wrong_shapes_and_sizes_are_refused() -> None:
    subspace = make()
    for shape in ((5, D, N), (N, D), (5, N * D)):
        with pytest.raises(ValueError, match=r"this subspace takes \(R, 4, 6\)"):
            subspace.project(torch.zeros(shape))
    for shape in ((CODE,), (2, CODE + 1)):
        with pytest.raises(ValueError, match=r"this subspace takes \(R, 3\)"):
            subspace.back_project(torch.zeros(shape))
    with pytest.raises(ValueError, match="intrinsic_dim is 0"):
        Subspace(N, D, 0)
    with pytest.raises(ValueError, match="inner_size is 0"):
        Subspace(N, D, CODE, 0)


# ---- reconstruction -----------------------------------------------------------------------------


def test_reconstruction_loss_is_a_squared_norm_or_its_mean_per_prompt() -> None:
    a, b = draw(5, N, D), draw(5, N, D, seed=1)
    square = [((x - y).numpy() ** 2).sum() for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(reconstruction_loss(a, b), square, rtol=1e-5)
    mean = reconstruction_loss(a, b, "mean")
    np.testing.assert_allclose(mean, np.array(square) / (N * D), rtol=1e-5)


def test_reconstruction_loss_refuses_other_shapes_and_reductions() -> None:
    with pytest.raises(ValueError, match="must both be"):
        reconstruction_loss(draw(1, N, D), draw(5, N, D))
    with pytest.raises(ValueError, match="allowed: 'sum', 'mean'"):
        reconstruction_loss(draw(1, N, D), draw(1, N, D), "none")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_linear_maps_reach_the_error_of_pca(seed: int) -> None:
    """24 prompts of 60 numbers, I = 5: within 1 % of the SVD of the centred prompts."""
    count, tokens, width, dim = 24, 10, 6, 5
    spread = torch.linspace(1, 0.2, tokens * width).double()
    mean = draw(tokens * width, seed=10)
    flat = 0.3 * (mean + draw(count, tokens * width, seed=seed).double() * spread)
    prompts = flat.view(count, tokens, width)
    subspace = Subspace(tokens, width, dim, inner_size=None, seed=seed).double()
    optimizer = torch.optim.LBFGS(
        subspace.parameters(),
        max_iter=300,
        history_size=100,
        tolerance_grad=1e-10,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = reconstruction_loss(subspace(prompts), prompts).sum()
        value.backward()
        return value

    optimizer.step(loss)
    singular = np.linalg.svd((flat - flat.mean(0)).numpy(), compute_uv=False)
    pca = (singular[dim:] ** 2).sum()
    reached = loss().item()
    assert pca * (1 - 1e-9) <= reached <= pca * 1.01


def test_joint_loss_trains_every_weight() -> None:
    subspace, prompts = make(), draw(5, N, D)
    reconstruction_loss(subspace(prompts), prompts).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in subspace.parameters())


# ---- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_size", [H, None])
def test_what_is_written_is_read(tmp_path: Path, inner_size: int | None) -> None:
    subspace, path = make(inner_size), tmp_path / "new" / "subspace.safetensors"
    save_subspace(path, subspace, METADATA)
    found = load_subspace(path, num_virtual_tokens=N)
    assert found.metadata == METADATA | {"version": __version__}
    assert found.sizes() == subspace.sizes()
    assert torch.equal(found(draw(2, N, D)), subspace(draw(2, N, D)))


def test_a_loaded_subspace_is_frozen_and_only_codes_get_a_gradient(written: Path) -> None:
    subspace = load_subspace(written)
    assert not any(p.requires_grad for p in subspace.parameters())
    codes = draw(2, CODE).requires_grad_()
    subspace.back_project(codes).square().sum().backward()
    assert codes.grad is not None
    assert codes.grad.any()
    assert all(p.grad is None for p in subspace.parameters())


def test_metadata_are_strings_that_other_readers_understand(written: Path) -> None:
    with safe_open(str(written), "pt") as file:
        raw = file.metadata()
    assert raw["format"] == "prompt_lab.core.subspace"
    sizes = ("num_virtual_tokens", "hidden_size", "intrinsic_dim", "inner_size")
    assert [json.loads(raw[name]) for name in sizes] == [N, D, CODE, H]
    assert json.loads(raw["source_tasks"]) == METADATA["source_tasks"]


def test_weights_are_written_in_single_precision(tmp_path: Path) -> None:
    path = tmp_path / "subspace.safetensors"
    save_subspace(path, make().double(), METADATA)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


def test_a_failed_write_leaves_the_old_file(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = written.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_subspace(written, make(seed=1), METADATA)
    assert written.read_bytes() == old
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_metadata_must_name_the_backbone_and_leave_sizes_to_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks backbone_digest"):
        save_subspace(tmp_path / "a", make(), {"backbone": "x"})
    with pytest.raises(ValueError, match="leave hidden_size out of the metadata"):
        save_subspace(tmp_path / "a", make(), METADATA | {"hidden_size": D})
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no subspace file .*absent"):
        load_subspace(tmp_path / "absent")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(written: Path, kept: int) -> None:
    written.write_bytes(written.read_bytes()[:kept])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load_subspace(written)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "subspace.pt"
    path.write_bytes(pickle.dumps(make().state_dict()))
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load_subspace(path)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    prompt = Prompt(draw(N, D), draw(N, D), "p", "someone/some-model", "01", "02")
    save_prompt(tmp_path / "prompt", prompt)
    with pytest.raises(ValueError, match=r"not a subspace file of prompt_lab \(a prompt file\)"):
        load_subspace(tmp_path / "prompt")
    save_file({"weight": draw(N, D)}, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"not a subspace file .*\(no such metadata\)"):
        load_subspace(tmp_path / "plain")


def test_a_newer_format_and_lacking_metadata_are_refused(written: Path) -> None:
    rewrite(written, format_version="2")
    with pytest.raises(ValueError, match="reads up to 1: upgrade prompt_lab"):
        load_subspace(written)
    rewrite(written, format_version="1", intrinsic_dim=None, backbone=None)
    with pytest.raises(ValueError, match="metadata lacks intrinsic_dim, backbone"):
        load_subspace(written)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": None}, "damaged, no version of the format"),
        ({"format_version": "one"}, "damaged, no version of the format"),
        ({"backbone": "{"}, "damaged, its metadata is not JSON"),
    ],
)
def test_damaged_metadata_is_told(written: Path, changes: dict[str, str], reason: str) -> None:
    rewrite(written, **changes)
    with pytest.raises(ValueError, match=reason):
        load_subspace(written)


def test_shapes_that_disagree_with_the_metadata_are_refused(written: Path) -> None:
    rewrite(written, intrinsic_dim="4")
    with pytest.raises(ValueError, match=r"damaged: tensors .*\(3, 24\).*mean .*\(4, 24\)"):
        load_subspace(written)
    tensors = load_file(written)
    del tensors["proj.bias"]
    rewrite(written, tensors, intrinsic_dim="3")
    with pytest.raises(ValueError, match="damaged: tensors"):
        load_subspace(written)


def test_another_number_of_virtual_tokens_is_refused_with_both_sides(written: Path) -> None:
    with pytest.raises(ValueError, match="of 4 virtual tokens, but num_virtual_tokens is 100"):
        load_subspace(written, num_virtual_tokens=100)


def test_another_backbone_is_refused_with_both_sides(tmp_path: Path, backbone: Factory) -> None:
    ours, path = backbone("gpt2"), tmp_path / "subspace.safetensors"
    metadata = METADATA | {"backbone": ours.name, "backbone_digest": ours.digest}
    save_subspace(path, Subspace(N, HIDDEN, CODE, H), metadata)
    assert load_subspace(path, ours).metadata["backbone"] == ours.name
    with pytest.raises(ValueError, match=rf"with weights {ours.digest[:12]}, but .* has weights"):
        load_subspace(path, backbone("bloom"))
    save_subspace(path, Subspace(N, HIDDEN + 1, CODE, H), metadata)
    with pytest.raises(ValueError, match=rf"width {HIDDEN + 1} .* has hidden size {HIDDEN}"):
        load_subspace(path, ours)
