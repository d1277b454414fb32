"""The likeliest of several answers, on a bigram model whose every log-likelihood is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from prompt_lab.core.batch import IGNORE
from prompt_lab.core.candidates import candidate_scores

VOCABULARY, END, PAD = 12, 1, 0
LABELS = [[3, END], [3, 4, END], [3, 4, 5, END], [6, END], [7, 8, 9, END], [10, 11, END], [END]]


class Bigrams:
    """Logits of a token depend on the token before it; counts the rows that were run."""

    def __init__(self, rows: int, sure: float) -> None:
        generator = torch.Generator().manual_seed(4)
        self.first = 2 * torch.randn(rows, VOCABULARY, generator=generator)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        for label in LABELS:  # a tuned prompt is sure of how a label goes on
            for token, after in pairwise(label):
                self.table[token, after] += sure
        self.kept = torch.arange(rows)
        self.ran = 0

    def follow(self, keep: Tensor | None, ids: Tensor) -> Tensor:
        self.kept = self.kept if keep is None else self.kept[keep]
        assert len(ids) == len(self.kept)
        self.ran += len(ids)
        return self.table[ids]

    def scores(self, mean: bool = False) -> np.ndarray:
        """Log-likelihood of each label by the formula, or its mean over tokens: (B, C)."""
        first = self.first.double().log_softmax(1).numpy()
        table = self.table.double().log_softmax(1).numpy()
        later = [sum(table[a, b] for a, b in pairwise(x)) for x in LABELS]
        sums = np.stack([first[:, x[0]] + more for x, more in zip(LABELS, later, strict=True)], 1)
        return sums / [len(label) for label in LABELS] if mean else sums


def answers() -> Tensor:
    depth = max(map(len, LABELS))
    return torch.tensor([[*label, *[IGNORE] * (depth - len(label))] for label in LABELS])


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("sure", [0.0, 10.0])
@pytest.mark.parametrize("at_once", [0, 250, 10_000])
def test_exhaustive_scores_equal_the_formula(sure: float, mean: bool, at_once: int) -> None:
    model, how = Bigrams(50, sure), {"exhaustive": True, "at_once": at_once}
    found = candidate_scores(model.first, answers(), model.follow, PAD, mean=mean, **how)
    np.testing.assert_allclose(found.numpy(), model.scores(mean), atol=1e-5)


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("sure", [0.0, 10.0])
@pytest.mark.parametrize("at_once", [0, 1000])
def test_bounds_are_above_the_scores_and_the_largest_is_the_largest_score(
    sure: float, mean: bool, at_once: int
) -> None:
    model, how = Bigrams(200, sure), {"exhaustive": False, "at_once": at_once}
    found = candidate_scores(model.first, answers(), model.follow, PAD, mean=mean, **how)
    found, expected = found.numpy(), model.scores(mean)
    assert (found >= expected - 1e-5).all()
    assert found.argmax(1).tolist() == expected.argmax(1).tolist()
    np.testing.assert_allclose(found.max(1), expected.max(1), atol=1e-5)
    assert len(set(found.argmax(1))) > 3
    assert (expected.argmax(1) != model.scores(not mean).argmax(1)).any()
    assert model.ran < len(LABELS) * 200  # it stops early


def test_what_first_tokens_decide_takes_one_more_pass_at_most() -> None:
    """A model that is sure of the rest of a label: a few rows are run twice, none seven times.

    Labels 0 to 2 share their beginnings, so that following the longest makes all three exact.
    """
    model = Bigrams(200, 10.0)
    candidate_scores(model.first, answers(), model.follow, PAD, exhaustive=False)
    assert model.ran < 1.2 * 200
    model.kept, model.ran = torch.arange(200), 0
    candidate_scores(model.first, answers(), model.follow, PAD, exhaustive=True)
    assert model.ran <= 5 * 200  # the end alone is exact at once, 0 to 2 may share one pass


def test_a_single_candidate_and_candidates_of_one_token_need_no_second_pass() -> None:
    model = Bigrams(3, 0.0)
    ends = torch.tensor([[END], [5]])
    found = candidate_scores(model.first, ends, model.follow, PAD, exhaustive=True)
    assert model.ran == 0
    assert torch.allclose(found, model.first.log_softmax(1)[:, [END, 5]], atol=1e-6)


def test_a_prompt_that_is_not_finite_ends_too() -> None:
    model = Bigrams(4, 0.0)
    model.first[1], model.first[2, 3] = torch.nan, -torch.inf
    for exhaustive in (False, True):
        model.kept = torch.arange(4)
        found = candidate_scores(model.first, answers(), model.follow, PAD, exhaustive=exhaustive)
        assert found[1].isnan().all()
        assert found[0].isfinite().all()
