"""Nearest tokens, drift, distances and spread against NumPy, SciPy and naive loops."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_backbone
from scipy.spatial.distance import cdist, pdist
from torch import Tensor

from prompt_lab.analysis import interpretation
from prompt_lab.analysis.interpretation import (
    Vocabulary,
    distance_table,
    initial_tokens,
    prompt_points,
    read_vocabulary,
    readable,
    spread_table,
    task_distances,
    token_table,
)
from prompt_lab.files.prompts import Prompt

N, V, D = 6, 83, 12
MEASURES = ("cosine", "l2", "dot")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts_of(*tensors: Tensor, init: Tensor | None = None, tasks: str = "a") -> pd.DataFrame:
    """Prompts as `find_tuned` gives them, of one letter a task."""
    pairs = [(x, x if init is None else init) for x in tensors]
    made = [Prompt(*pair, f"p{i}", "b", "d", "t") for i, pair in enumerate(pairs)]
    rows = {"prompt": [one.name for one in made], "task": [*tasks] * (len(made) // len(tasks))}
    return pd.DataFrame(rows | {"tuned": made})


def vocabulary(table: Tensor, ids: list[int] | None = None) -> Vocabulary:
    ids = [*range(len(table))] if ids is None else ids
    norms = table[ids].double().norm(dim=1).numpy()
    return Vocabulary(table, pd.Series([f"t{x}" for x in ids], ids), norms, np.median(norms), "")


def reference(prompt: Tensor, table: Tensor, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """All tokens in order of nearness, and all scores (N, V), by SciPy's cdist."""
    a, b = prompt.double().numpy(), table.double().numpy()
    if measure == "dot":
        return np.argsort(-(a @ b.T), axis=1), a @ b.T
    far = cdist(a, b, {"cosine": "cosine", "l2": "euclidean"}[measure])
    return np.argsort(far, axis=1), 1 - far if measure == "cosine" else far


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "kind"), [(7, torch.float32), (8192, torch.bfloat16)])
@pytest.mark.parametrize("measure", MEASURES)
def test_nearest_tokens_and_places_are_those_of_all_distances(measure, chunk, kind, monkeypatch):
    monkeypatch.setattr(interpretation, "_CHUNK", chunk)
    table = (normal(V, D, seed=1) * torch.linspace(0.1, 3, V)[:, None]).to(kind)
    ids = [at for at in range(V) if at % 3]
    init = torch.cat([table[[1, 5, 80]].float(), normal(N - 3, D, seed=2)])
    prompt = normal(N, D)
    found = token_table(prompts_of(prompt, init=init), vocabulary(table, ids), 9, measure)
    order, scores = reference(prompt, table[ids], measure)
    for at, row in found.iterrows():
        best = [ids[place] for place in order[at, :9]]
        assert [row[f"id_{k}"] for k in range(1, 10)] == best
        assert [row[f"token_{k}"] for k in range(1, 10)] == [f"t{x}" for x in best]
        given = [row[f"score_{k}"] for k in range(1, 10)]
        np.testing.assert_allclose(given, scores[at, order[at, :9]], atol=1e-12)
    places = [[ids[x] for x in own].index(t) + 1 for own, t in zip(order, (1, 5, 80), strict=False)]
    assert found["initial_rank"][:3].tolist() == places
    assert found["survived"][:3].tolist() == [int(x == 1) for x in places]
    assert found["initial_token"][:3].tolist() == ["t1", "t5", "t80"]
    facts = ["initial_id", "initial_token", "initial_rank", "survived"]
    assert found.loc[3:, facts].isna().all(axis=None)


def test_small_distances_are_exact_beside_large_norms():
    """The squares of the norms are 1e8; a difference of their float32 sums would be noise."""
    table = 1e4 * normal(V, D)
    found = token_table(prompts_of(table[:N] + 1e-2), vocabulary(table), 1, "l2")
    assert found["id_1"].tolist() == [*range(N)]
    wanted = (table[:N] + 1e-2).double() - table[:N].double()
    np.testing.assert_allclose(found["score_1"], wanted.norm(dim=1))


def test_equal_tokens_do_not_push_each_other_down_and_a_row_of_zeros_has_cosine_zero():
    table = normal(20, D).repeat(2, 1)
    prompt = torch.cat([table[25:26] + 0.01, torch.zeros(1, D)])
    found = token_table(prompts_of(prompt, init=table[[25, 3]]), vocabulary(table), 2)
    assert found["initial_id"].tolist() == [5, 3]  # the first of two equal ones
    assert {*found.loc[0, ["id_1", "id_2"]]} == {5, 25}
    assert found["initial_rank"].tolist() == [1, 1]
    assert found.loc[1, ["score_1", "score_2"]].tolist() == [0, 0]


def test_initial_tokens_are_rows_that_equal_embeddings_also_rounded_ones():
    table, every = normal(V, D), torch.arange(V)
    init = torch.cat([table[[7, 80, 3]], normal(1, D, seed=5)])
    assert initial_tokens(init, table, every).tolist() == [7, 80, 3, -1]
    assert initial_tokens(init[:3].bfloat16().float(), table, every).tolist() == [7, 80, 3]
    assert initial_tokens(init, table, torch.arange(2, 50)).tolist() == [5, -1, 1, -1]


def test_drift_and_norms_are_those_of_numpy():
    prompt, init, table = normal(N, D), normal(N, D, seed=1), normal(V, D, seed=2)
    found = token_table(prompts_of(prompt, init=init), vocabulary(table))
    a, b = prompt.double().numpy(), init.double().numpy()
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(found["drift"], np.linalg.norm(a - b, axis=1))
    np.testing.assert_allclose(found["cosine"], (a * b).sum(1) / lengths[0] / lengths[1])
    np.testing.assert_allclose(found["norm"], lengths[0])
    np.testing.assert_allclose(found["initial_norm"], lengths[1])
    median = np.median(np.linalg.norm(table.double().numpy(), axis=1))
    np.testing.assert_allclose(found["relative_norm"], lengths[0] / median)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("▁the", "␣the"),
        ("Ġthe", "Ġthe"),  # a Maltese letter elsewhere
        ("a\nb\t", r"a\nb\t"),
        ("a\u202eb", r"a\u202eb"),
        ("a\\n", r"a\\n"),
        ("\u00a0", r"\xa0"),
        ("تناقض", "تناقض"),
        ("", "(empty)"),
    ],
)
def test_tokens_are_readable(token, shown):
    assert readable(token) == shown


def test_tokens_that_spell_bytes_are_decoded():
    tokenizer = make_backbone("gpt2").tokenizer
    assert readable("Ġthe", tokenizer) == "␣the"
    assert readable("Ċ", tokenizer) == r"\n"
    assert readable("aåĩĨ", tokenizer) == "a准"
    assert readable("åĩ", tokenizer) == "åĩ"  # two of the three bytes of a character


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
def test_initial_rows_are_found_in_the_table_as_the_model_sees_it(kind, backbone):
    """BART scales its embeddings."""
    model = backbone(kind)
    found = read_vocabulary(model)
    ids = torch.tensor(found.names.index.to_numpy())
    given = torch.tensor([20, 9, 31])
    places = initial_tokens(model.embedding_table()[given], found.table, ids)
    assert ids[places].equal(given)
    assert not {*found.names.index} & {*model.tokenizer.all_special_ids}


def test_rows_that_no_token_has_are_left_out_unless_all_are_asked_for():
    model = make_backbone("gpt2")
    size = len(model.embedding_table())
    model.model.resize_token_embeddings(size + 5, mean_resizing=False)
    some, every = read_vocabulary(model), read_vocabulary(model, all_rows=True)
    assert some.names.index.max() < size
    assert "5 rows that no token has" in some.note
    assert [*every.names.index] == [*range(size + 5)]
    assert every.names[size + 1] == f"(row {size + 1})"


# ---- distances and spread ------------------------------------------------------------------------


def test_distances_are_those_of_scipy():
    bank = normal(5, N, D)
    prompts = prompts_of(*bank)
    flat, means = bank.double().flatten(1).numpy(), bank.double().mean(1).numpy()
    for compare, points in (("rows", flat), ("mean", means)):
        found = distance_table(prompts, prompt_points(prompts, compare))
        wanted = cdist(points, points)[np.triu_indices(5, 1)]
        np.testing.assert_allclose(found["distance"], wanted)
    assert found[["prompt", "other"]].to_numpy()[:4].tolist() == [
        ["p0", f"p{i}"] for i in range(1, 5)
    ]


def test_the_spread_of_runs_and_distances_of_tasks_are_those_of_naive_loops():
    bank, tasks = normal(6, N, D), "aaabbc"
    prompts = prompts_of(*bank, tasks=tasks)
    pairs = distance_table(prompts, prompt_points(prompts))
    spread, means = spread_table(prompts, pairs).set_index("group"), task_distances(prompts, pairs)
    assert [*spread.index] == [*means.index] == [*means.columns] == ["a", "b", "c"]
    assert means.equals(means.T)  # to the last bit, so that the two of a pair tie in ranks
    flat = bank.double().flatten(1).numpy()
    for task, other in itertools.product("abc", repeat=2):
        own = flat[[x == task for x in tasks]]
        others = flat[[x == other for x in tasks]]
        far = cdist(own, others) if task != other else pdist(own)
        wanted = far.mean() if far.size else np.nan
        assert means.loc[task, other] == pytest.approx(wanted, nan_ok=True)
    for task, row in spread.iterrows():
        own = flat[[x == task for x in tasks]]
        values: dict[str, Any] = {
            "norm": np.linalg.norm(own, axis=1),
            "within": pdist(own),
            "between": cdist(own, flat[[x != task for x in tasks]]).ravel(),
        }
        assert row["runs"] == len(own)
        for name, numbers in values.items():
            mean = numbers.mean() if len(numbers) else np.nan
            variance = numbers.var(ddof=1) if len(numbers) > 1 else np.nan
            assert row[f"{name}_mean"] == pytest.approx(mean, nan_ok=True)
            assert row[f"{name}_variance"] == pytest.approx(variance, nan_ok=True)
            assert row.get(f"{name}_pairs", len(numbers)) == len(numbers)
    one = prompts_of(*normal(2, N, D))
    alone = spread_table(one, distance_table(one, prompt_points(one))).iloc[0]
    assert np.isnan(alone["between_mean"])
    assert (alone["within_pairs"], alone["between_pairs"]) == (1, 0)
