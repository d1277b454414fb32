"""Similarities of prompts: naive loops, NumPy and SciPy, what must not matter, and bad input."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from prompt_lab.core.similarity import (
    cosine_similarities,
    feature_similarities,
    frobenius_distances,
    max_similarities,
    subspace_similarities,
    subspaces,
    unigram_similarities,
)

N, D = 6, 20


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed(*shape: int, seed: int = 0) -> Tensor:
    """Prompts whose rows differ in size, so that some directions carry little."""
    return draw(*shape, seed=seed) * torch.logspace(0, -2, shape[-2]).unsqueeze(1)


def projector(basis: Tensor) -> np.ndarray:
    """What a basis and its span have in common with every other basis of the same span."""
    return basis.numpy() @ basis.numpy().T


# ---- subspaces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.01, 0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("seed", range(3))
def test_the_rank_is_the_smallest_that_keeps_the_share_of_the_squared_norm(energy, seed):
    """Reference: Saha et al., the left singular vectors of the matrix with the rows as columns."""
    prompt = skewed(N, D, seed=seed)
    left, values, _ = np.linalg.svd(prompt.double().numpy().T, full_matrices=False)
    rank = 1
    while np.sum(values[:rank] ** 2) < energy * np.sum(values**2):
        rank += 1
    (basis,) = subspaces(prompt[None], energy=energy)
    assert basis.dtype == torch.float64
    assert basis.shape == (D, rank)
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-12)
    np.testing.assert_allclose(projector(basis), left[:, :rank] @ left[:, :rank].T, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"energy": 0.7}, {"rank": 2}])
def test_similarities_are_the_root_mean_square_cosines_of_the_principal_angles(settings):
    """Reference: the angles of SciPy, pair by pair, also of subspaces of different sizes."""
    targets = torch.stack([skewed(N, D, seed=0), draw(N, D, seed=1), draw(N, D, seed=2)])
    sources = torch.stack([draw(4, D, seed=3), skewed(4, D, seed=4)])
    found = subspace_similarities(targets, sources, **settings)
    assert (found.shape, found.dtype) == ((3, 2), torch.float64)
    for r, one in enumerate(subspaces(targets, **settings)):
        for s, other in enumerate(subspaces(sources, **settings)):
            cosines = np.cos(subspace_angles(one.numpy(), other.numpy()))
            assert len(cosines) == min(one.shape[1], other.shape[1])
            assert found[r, s].item() == pytest.approx(np.sqrt(np.mean(cosines**2)), abs=1e-10)
    turned = subspace_similarities(sources, targets, **settings)
    torch.testing.assert_close(turned.T, found, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("small", "large"), [(3, 3), (2, 6)])
def test_random_subspaces_have_the_mean_square_that_the_module_gives(small, large):
    """The mean over 40 x 40 pairs lies within five standard errors of max(k, l) / D."""
    first, second = draw(40, small, D), draw(40, large, D, seed=1)
    squares = subspace_similarities(first, second, energy=1.0).square()
    error = float(squares.std()) / np.sqrt(40)  # pairs that share a prompt are not independent
    assert 5 * error < 0.1
    assert abs(float(squares.mean()) - large / D) < 5 * error


@pytest.mark.parametrize(
    ("prompt", "settings", "reason"),
    [
        (torch.zeros(2, 3), {}, "1 of 1 prompts are all zeros"),
        (draw(N, D), {"energy": 0.0}, r"energy is 0\.0: give a share above 0 and at most 1"),
        (draw(N, D), {"energy": float("nan")}, "energy is nan"),
        (draw(N, D), {"rank": 0}, "rank is 0, but a prompt spans 6 dimensions: give 1 to 6"),
        (draw(N, D), {"rank": 7}, "rank is 7, but a prompt spans 6 dimensions: give 1 to 6"),
    ],
)
def test_a_prompt_without_such_a_subspace_is_refused(prompt, settings, reason):
    with pytest.raises(ValueError, match=reason):
        subspaces(prompt[None], **settings)


# ---- rows and numbers ----------------------------------------------------------------------------

FUNCTIONS = {
    "feature": feature_similarities,
    "feature, unit rows": partial(feature_similarities, unit_rows=True),
    "unigram": unigram_similarities,
    "unigram, unit rows": partial(unigram_similarities, unit_rows=True),
    "max": max_similarities,
    "max over source": partial(max_similarities, over="source"),
    "inner product": partial(max_similarities, unit_rows=False),
    "cosine": cosine_similarities,
    "frobenius": frobenius_distances,
}
ONE_LENGTH = ("unigram", "unigram, unit rows", "cosine", "frobenius")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two rows of numbers."""
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a)) / np.sqrt(np.dot(b, b)))


def naive(name: str, target: np.ndarray, source: np.ndarray) -> float:
    """A similarity of two prompts (N, D), number by number."""
    if name.endswith("unit rows"):
        target, source = (
            np.array([row / np.linalg.norm(row) for row in p]) for p in (target, source)
        )
    if name.startswith("feature"):
        return cosine(sum(target) / len(target), sum(source) / len(source))
    if name.startswith("unigram"):
        ours, theirs = ([sum(row) / len(row) for row in p] for p in (target, source))
        return cosine(np.array(ours), np.array(theirs))
    if name == "cosine":
        return cosine(target.reshape(-1), source.reshape(-1))
    if name == "frobenius":
        pairs = zip(target.reshape(-1), source.reshape(-1), strict=True)
        return sum((a - b) ** 2 for a, b in pairs) ** 0.5
    if name == "max over source":
        return sum(max(cosine(t, s) for t in target) for s in source) / len(source)
    product = cosine if name == "max" else np.dot
    return sum(max(float(product(t, s)) for s in source) for t in target) / len(target)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_similarities_of_rows_equal_a_loop_over_prompts(name, kind):
    targets = skewed(3, N, D).to(kind)
    sources = draw(4, N if name in ONE_LENGTH else N - 2, D, seed=1).to(kind)
    before = targets.clone(), sources.clone()
    found = FUNCTIONS[name](targets, sources)
    assert found.shape == (3, 4)
    assert found.dtype == torch.float64
    wanted = [
        [naive(name, t, s) for s in sources.double().numpy()] for t in targets.double().numpy()
    ]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 if kind == torch.float64 else 2e-6)
    assert torch.equal(targets, before[0])
    assert torch.equal(sources, before[1])


def like(name: str, target: Tensor, source: Tensor) -> float:
    """One similarity of two prompts in float64."""
    return FUNCTIONS[name](target[None].double(), source[None].double()).item()


def changed(prompt: Tensor) -> dict[str, Tensor]:
    """A prompt with something about it changed."""
    sizes = torch.linspace(0.3, 3, len(prompt)).unsqueeze(1)
    return {"order": prompt.flip(0), "size": 2.5 * prompt, "row sizes": prompt * sizes}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_does_not_matter_to_one_prompt_and_what_does(name):
    """Order of rows, size of the prompt, sizes of its rows; of the source, then of the target."""
    of_rows = {"order"} if name in ("inner product",) else {"order", "size"}
    unit = {"order", "size", "row sizes"}
    same = {
        "feature": of_rows,
        "feature, unit rows": unit,
        "unigram": {"size"},
        "unigram, unit rows": {"size", "row sizes"},
        "max": unit,
        "max over source": unit,
        "inner product": of_rows,
        "cosine": {"size"},
        "frobenius": set(),
    }[name]
    target, source = skewed(N, D).double(), draw(N, D, seed=1).double()
    wanted = like(name, target, source)
    for what, other in changed(source).items():
        assert (abs(like(name, target, other) - wanted) < 1e-9) == (what in same), what
    for what, other in changed(target).items():
        assert (abs(like(name, other, source) - wanted) < 1e-9) == (what in same), what


def test_only_max_knows_a_direction_and_its_two_are_each_other_turned_round():
    target, source = skewed(N, D), draw(N, D, seed=1)
    for name in FUNCTIONS:
        turned = like(name, source, target)
        symmetric = abs(turned - like(name, target, source)) < 1e-12
        assert symmetric == (name not in ("max", "max over source", "inner product")), name
    assert like("max", source, target) == pytest.approx(like("max over source", target, source))


def test_equal_prompts_have_cosine_1_and_distance_0_and_a_common_shift_keeps_distances():
    prompts = draw(3, N, D)
    for name, function in FUNCTIONS.items():
        own = function(prompts, prompts).diagonal()
        if name == "frobenius":
            assert own.tolist() == [0, 0, 0]
        elif name != "inner product":
            np.testing.assert_allclose(own, 1, rtol=0, atol=1e-6)
            assert (own <= 1).all()
    others, shift = draw(2, N, D, seed=1), draw(N, D, seed=2)
    before, after = (
        frobenius_distances(prompts, others),
        frobenius_distances(prompts + shift, others + shift),
    )
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*FUNCTIONS, "subspace"])
def test_banks_without_such_a_similarity_are_refused(name):
    function, good = {**FUNCTIONS, "subspace": subspace_similarities}[name], draw(2, N, D)
    with pytest.raises(ValueError, match="targets of width 20 and sources of width 8"):
        function(good, draw(2, N, 8))
    if name in ONE_LENGTH:
        with pytest.raises(ValueError, match="targets of 6 rows and sources of 4: row is compared"):
            function(good, draw(2, 4, D))
    for wrong in (torch.zeros(1, N, D), torch.full((1, N, D), torch.nan)):
        if name not in ("frobenius", "inner product", "subspace"):
            with pytest.raises(ValueError, match="zero or not finite and have no direction"):
                function(good, torch.cat([good, wrong]))
    with pytest.raises(ValueError, match="over is 'both'; allowed: target, source"):
        max_similarities(good, good, over="both")  # pyright: ignore[reportArgumentType]
