"""Nearest tokens, drift, spread and the permutation test against NumPy, SciPy and naive loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from scipy.stats import kendalltau, spearmanr
from torch import Tensor

from prompt_lab.analysis.interpretation import (
    frobenius_distances,
    group_distances,
    initial_tokens,
    mean_row_distances,
    nearest_tokens,
    rank_correlation,
    row_drift,
    row_norms,
    spread_of_runs,
    surviving,
    token_ranks,
)

N, V, D = 6, 83, 12
MEASURES = ("cosine", "l2", "dot")
METRICS = {"cosine": "cosine", "l2": "euclidean"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(prompt: Tensor, table: Tensor, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """All tokens in order of nearness, and all scores (N, V), by SciPy's cdist."""
    a, b = prompt.double().numpy(), table.double().numpy()
    if measure == "dot":
        return np.argsort(-(a @ b.T), axis=1, kind="stable"), a @ b.T
    far = cdist(a, b, METRICS[measure])
    return np.argsort(far, axis=1, kind="stable"), 1 - far if measure == "cosine" else far


# ---- nearest tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 8192])
@pytest.mark.parametrize("measure", MEASURES)
def test_nearest_tokens_are_those_of_all_distances_whatever_the_chunk(measure, chunk):
    prompt, table = normal(N, D), normal(V, D, seed=1) * torch.linspace(0.1, 3, V)[:, None]
    order, scores = reference(prompt, table, measure)
    found = nearest_tokens(prompt, table, measure, 9, chunk)
    assert found.ids.tolist() == order[:, :9].tolist()
    wanted = np.take_along_axis(scores, order[:, :9], axis=1)
    np.testing.assert_allclose(found.scores.numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("chunk", [3, 40])
def test_of_equal_tokens_the_lower_id_comes_first(measure, chunk):
    table = normal(1, D).repeat(60, 1)
    found = nearest_tokens(normal(N, D, seed=1), table, measure, 7, chunk)
    assert found.ids.tolist() == [list(range(7))] * N
    twice = torch.cat([normal(20, D), normal(20, D)])
    ids = nearest_tokens(twice[[25, 3]], twice, "l2", 2, chunk).ids
    assert ids.tolist() == [[5, 25], [3, 23]]


@pytest.mark.parametrize("measure", MEASURES)
def test_only_the_given_ids_are_found_and_their_order_does_not_matter(measure):
    prompt, table = normal(N, D), normal(V, D, seed=1)
    some = torch.tensor([2, 3, 4, 9, 40, 41, 80])
    order, _ = reference(prompt, table[some], measure)
    for ids in (some, some.flip(0)):
        found = nearest_tokens(prompt, table, measure, 4, 3, ids=ids)
        assert found.ids.tolist() == some.numpy()[order[:, :4]].tolist()


def test_cosine_has_no_regard_to_lengths_and_l2_is_the_same_after_a_turn():
    prompt, table = normal(N, D), normal(V, D, seed=1)
    longer = nearest_tokens(prompt * 100, table * 3, "cosine")
    assert longer.ids.equal(nearest_tokens(prompt, table, "cosine").ids)
    turn = torch.linalg.qr(normal(D, D, seed=2).double()).Q
    turned = nearest_tokens(prompt.double() @ turn, table.double() @ turn, "l2")
    plain = nearest_tokens(prompt, table, "l2")
    assert turned.ids.equal(plain.ids)
    torch.testing.assert_close(turned.scores, plain.scores)


def test_small_distances_are_exact_beside_large_norms():
    """The squares of the norms are 1e8; a difference of their float32 sums would be noise."""
    table = 1e4 * normal(V, D)
    prompt = table[:N] + 1e-2
    found = nearest_tokens(prompt, table, "l2", 1)
    assert found.ids[:, 0].tolist() == list(range(N))
    wanted = (prompt.double() - table[:N].double()).norm(dim=1)
    torch.testing.assert_close(found.scores[:, 0], wanted)


def test_half_precision_tables_are_read_as_their_values():
    table = normal(V, D).bfloat16()
    found = nearest_tokens(normal(N, D, seed=1), table)
    assert found.ids.equal(nearest_tokens(normal(N, D, seed=1), table.float()).ids)


def test_a_row_of_zeros_has_cosine_zero_with_all():
    found = nearest_tokens(torch.zeros(1, D), normal(V, D), "cosine", 3)
    assert found.scores.tolist() == [[0.0] * 3]
    assert found.ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("chunk", [5, 8192])
def test_ranks_are_the_places_in_the_full_order(measure, chunk):
    prompt, table = normal(N, D), normal(V, D, seed=1)
    order, _ = reference(prompt, table, measure)
    tokens = torch.tensor([0, 5, 82, -1, 40, 41])
    ranks = token_ranks(prompt, tokens, table, measure, chunk)
    wanted = [
        0 if t < 0 else 1 + own.tolist().index(t) for t, own in zip(tokens, order, strict=True)
    ]
    assert ranks.tolist() == wanted


def test_the_rank_is_one_where_the_token_is_the_nearest_also_among_equal_ones():
    table = normal(20, D).repeat(2, 1)
    prompt = normal(N, D, seed=1)
    nearest = nearest_tokens(prompt, table, k=2, chunk=7)
    assert token_ranks(prompt, nearest.ids[:, 0], table, chunk=7).tolist() == [1] * N
    assert token_ranks(prompt, nearest.ids[:, 1], table, chunk=7).tolist() == [2] * N


def test_initial_tokens_are_the_rows_that_equal_embeddings_and_survive_where_they_stay_nearest():
    table = normal(V, D)
    init = torch.cat([table[[7, 80, 3]], normal(1, D, seed=5)])
    assert initial_tokens(init, table, chunk=10).tolist() == [7, 80, 3, -1]
    rounded = table[[7, 80, 3]].bfloat16().float()
    assert initial_tokens(rounded, table).tolist() == [7, 80, 3]
    assert initial_tokens(init, table, ids=torch.arange(50)).tolist() == [7, -1, 3, -1]
    tuned = init + torch.stack([0 * init[0], table[9] - init[1], 0.01 * init[2], 0 * init[3]])
    found = surviving(initial_tokens(init, table), nearest_tokens(tuned, table, "l2"))
    assert found.tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": normal(N, D + 1)}, "of one backbone"),
        ({"prompt": normal(D)}, "give \\(N, D\\)"),
        ({"prompt": torch.full((N, D), math.nan)}, "NaN"),
        ({"prompt": torch.ones(N, D, dtype=torch.int64)}, "floats"),
        ({"table": torch.full((V, D), math.inf)}, "table holds NaN or infinite"),
        ({"measure": "angle"}, "cosine, l2, dot"),
        ({"k": 0}, "1 to 83"),
        ({"k": V + 1}, "1 to 83"),
        ({"chunk": 0}, "chunk is 0"),
        ({"ids": torch.tensor([1, V])}, "0 to 82"),
        ({"ids": torch.tensor([1, 1])}, "different rows"),
    ],
)
def test_searches_that_make_no_sense_are_refused(change, words):
    given = {"prompt": normal(N, D), "table": normal(V, D), **change}
    with pytest.raises(ValueError, match=words):
        nearest_tokens(**given)


def test_ranks_of_tokens_that_are_not_among_the_ids_are_refused():
    with pytest.raises(ValueError, match="one of the ids"):
        token_ranks(normal(2, D), torch.tensor([1, 9]), normal(V, D), ids=torch.arange(9))


# ---- drift and norms -----------------------------------------------------------------------------


def test_drift_and_norms_are_those_of_numpy():
    prompt, init = normal(N, D), normal(N, D, seed=1)
    drift = row_drift(prompt, init)
    a, b = prompt.double().numpy(), init.double().numpy()
    np.testing.assert_allclose(drift.l2, np.linalg.norm(a - b, axis=1))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(drift.cosine, (a * b).sum(1) / norms)
    np.testing.assert_allclose(row_norms(prompt, chunk=4), np.linalg.norm(a, axis=1))
    np.testing.assert_allclose(
        row_norms(prompt, torch.tensor([4, 1])), np.linalg.norm(a, axis=1)[[4, 1]]
    )
    still = row_drift(init, init)
    assert still.l2.tolist() == [0.0] * N
    torch.testing.assert_close(still.cosine, torch.ones(N, dtype=torch.float64))


def test_drift_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match="of one shape"):
        row_drift(normal(N, D), normal(N + 1, D))


# ---- distances and spread ------------------------------------------------------------------------


def test_distances_are_those_of_scipy_and_do_not_change_when_all_prompts_move_or_turn():
    bank = normal(5, N, D)
    found = frobenius_distances(bank)
    flat = bank.double().flatten(1).numpy()
    np.testing.assert_allclose(found, cdist(flat, flat), atol=1e-12)
    assert found.equal(found.T)
    assert not found.diagonal().any()
    turn = torch.linalg.qr(normal(D, D, seed=2).double()).Q
    torch.testing.assert_close(frobenius_distances((bank.double() + 3) @ turn), found)
    means = bank.double().mean(1).numpy()
    np.testing.assert_allclose(mean_row_distances(bank), cdist(means, means), atol=1e-12)


def test_unequal_lengths_are_refused_with_the_choices_and_mean_rows_take_them():
    prompts = [normal(12, D), normal(20, D)]
    with pytest.raises(ValueError, match=r"prompts of 12, 20 rows .* mean rows"):
        frobenius_distances(prompts)
    wanted = (prompts[0].double().mean(0) - prompts[1].double().mean(0)).norm()
    torch.testing.assert_close(mean_row_distances(prompts)[0, 1], wanted)


@pytest.mark.parametrize("distances", [frobenius_distances, mean_row_distances])
def test_prompts_that_cannot_be_compared_are_refused(distances):
    with pytest.raises(ValueError, match="one or more prompts"):
        distances([])
    with pytest.raises(ValueError, match="widths 12, 13"):
        distances([normal(N, D), normal(N, D + 1)])
    with pytest.raises(ValueError, match="prompt 1 holds NaN"):
        distances([normal(N, D), torch.full((N, D), math.nan)])


def test_the_spread_of_runs_is_that_of_naive_loops():
    bank, groups = normal(6, N, D), ["a", "b", "a", "a", "b", "c"]
    spreads = spread_of_runs(bank, frobenius_distances(bank), groups)
    assert [one.group for one in spreads] == ["a", "b", "c"]
    flat = bank.double().flatten(1).numpy()
    for one in spreads:
        own = [flat[at] for at in range(6) if groups[at] == one.group]
        others = [flat[at] for at in range(6) if groups[at] != one.group]
        norms = [np.linalg.norm(prompt) for prompt in own]
        within = pdist(own) if len(own) > 1 else []
        between = [np.linalg.norm(x - y) for x, y in itertools.product(own, others)]
        assert (one.runs, one.within_pairs, one.between_pairs) == (
            *(len(own), len(within)),
            len(between),
        )
        assert one.norm_mean == pytest.approx(np.mean(norms))
        assert one.between_mean == pytest.approx(np.mean(between))
        assert one.between_variance == pytest.approx(np.var(between, ddof=1))
        if len(own) > 1:
            assert one.norm_variance == pytest.approx(np.var(norms, ddof=1))
            assert one.within_mean == pytest.approx(np.mean(within))
        if len(within) > 1:
            assert one.within_variance == pytest.approx(np.var(within, ddof=1))
    assert math.isnan(spreads[1].within_variance)  # one pair
    assert math.isnan(spreads[2].within_mean)
    assert math.isnan(spreads[2].norm_variance)


def test_one_group_alone_has_no_distance_to_others():
    bank = normal(2, N, D)
    (spread,) = spread_of_runs(bank, frobenius_distances(bank), ["a", "a"])
    assert math.isnan(spread.between_mean)
    assert spread.between_pairs == 0


def test_distances_between_groups_are_means_over_pairs_of_different_prompts():
    bank, groups = normal(5, N, D), ["a", "b", "a", "b", "c"]
    full = frobenius_distances(bank)
    names, found = group_distances(full, groups)
    assert names == ["a", "b", "c"]
    for (i, one), (j, other) in itertools.product(enumerate(names), repeat=2):
        pairs = [
            float(full[x, y])
            for x, y in itertools.product(range(5), repeat=2)
            if x != y and (groups[x], groups[y]) == (one, other)
        ]
        wanted = np.mean(pairs) if pairs else math.nan
        assert float(found[i, j]) == pytest.approx(wanted, nan_ok=True)
    with pytest.raises(ValueError, match="a group for each"):
        group_distances(full, ["a"])
    with pytest.raises(ValueError, match="give each prompt one"):
        spread_of_runs(bank[:4], full, groups)


# ---- the permutation test ------------------------------------------------------------------------


def matrices(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Distances of some points, and an asymmetric matrix that falls with them, with noise."""
    far = frobenius_distances(normal(size, 1, 3, seed=seed))
    return far, -far + 0.5 * normal(size, size, seed=seed + 1).double()


def off_diagonal(matrix: Tensor) -> np.ndarray:
    return matrix.numpy()[~np.eye(len(matrix), dtype=bool)]


@pytest.mark.parametrize(("method", "function"), [("spearman", spearmanr), ("kendall", kendalltau)])
def test_few_tasks_are_permuted_in_every_way(method, function):
    """Reference: SciPy's coefficient under all 24 orders of four tasks."""
    far, gains = matrices(4)
    found = rank_correlation(far, gains, method)
    given = function(off_diagonal(far), off_diagonal(gains)).statistic
    every = [
        function(off_diagonal(far[list(o)][:, list(o)]), off_diagonal(gains)).statistic
        for o in itertools.permutations(range(4))
    ]
    assert found.coefficient == pytest.approx(given)
    assert found.p == pytest.approx(np.mean(np.abs(every) >= abs(given) - 1e-12))
    assert (found.cells, found.permutations, found.is_exhaustive) == (12, 23, True)


def test_many_tasks_are_permuted_at_random_with_the_seed_and_counted_with_the_given_order():
    far, gains = matrices(8)
    found = rank_correlation(far, gains, permutations=99, seed=3)
    assert found == rank_correlation(far, gains, permutations=99, seed=3)
    assert not found.is_exhaustive
    given = spearmanr(off_diagonal(far), off_diagonal(gains)).statistic
    generator, beyond = np.random.default_rng(3), 0
    for _ in range(99):
        order = generator.permutation(8)
        made = spearmanr(off_diagonal(far[order][:, order]), off_diagonal(gains)).statistic
        beyond += abs(made) >= abs(given) - 1e-12
    assert found.coefficient == pytest.approx(given)
    assert given < -0.5
    assert found.p == (beyond + 1) / 100


def test_the_coefficient_does_not_change_with_order_of_tasks_or_a_rising_function():
    far, gains = matrices(6)
    given = rank_correlation(far, gains, permutations=9).coefficient
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = rank_correlation(far[order][:, order], gains[order][:, order], permutations=9)
    assert moved.coefficient == pytest.approx(given)
    assert rank_correlation(far**3, gains.exp(), permutations=9).coefficient == pytest.approx(given)


def test_diagonals_are_not_looked_at_and_unknown_cells_are_left_out():
    far, gains = matrices(5)
    given = rank_correlation(far, gains)
    for diagonal in (math.nan, 1e9):
        filled = [m.clone().fill_diagonal_(diagonal) for m in (far, gains)]
        assert rank_correlation(*filled) == given
    gains[0, 3] = gains[2, 1] = math.nan
    found = rank_correlation(far, gains)
    known = np.isfinite(off_diagonal(gains))
    wanted = spearmanr(off_diagonal(far)[known], off_diagonal(gains)[known]).statistic
    assert found.coefficient == pytest.approx(wanted)
    assert (found.cells, found.permutations) == (18, 119)


def test_independent_matrices_have_small_p_values_as_often_as_they_should():
    p = [
        rank_correlation(matrices(5, seed)[0], normal(5, 5, seed=900 + seed)).p
        for seed in range(40)
    ]
    assert 0.3 < np.mean(p) < 0.7
    assert sum(value <= 0.2 for value in p) <= 16  # expected 8


@pytest.mark.parametrize(
    ("far", "gains", "reason"),
    [
        (normal(2, 2), normal(2, 2), "fewer than three tasks"),
        (torch.ones(4, 4), normal(4, 4), "distances off the diagonal are all equal"),
        (normal(4, 4), torch.ones(4, 4), "values off the diagonal are all equal"),
        (normal(4, 4), torch.full((4, 4), math.nan), "fewer than three cells"),
    ],
)
def test_matrices_without_a_correlation_say_why(far, gains, reason):
    found = rank_correlation(far, gains)
    assert reason in found.reason
    assert math.isnan(found.coefficient)
    assert math.isnan(found.p)


def test_matrices_that_do_not_fit_are_refused():
    far, gains = matrices(4)
    with pytest.raises(ValueError, match="two of \\(T, T\\)"):
        rank_correlation(far, gains[:3])
    with pytest.raises(ValueError, match="distances hold NaN"):
        rank_correlation(torch.full((4, 4), math.nan), gains)
    with pytest.raises(ValueError, match="spearman, kendall"):
        rank_correlation(far, gains, "pearson")
    with pytest.raises(ValueError, match="1 or more"):
        rank_correlation(far, gains, permutations=0)
