"""Which process has which runs; that they join again is seen in ``test_ddp.py``."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from prompt_lab.methods.sharing import RunShares, share_runs


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_are_at_most_four_thirds_of_the_best_ones(processes):
    """Reference: all ways to share six runs (Graham 1969)."""
    rng = np.random.default_rng(processes)
    for _ in range(20):
        costs = rng.uniform(1, 10, size=6)
        shares = share_runs(costs.tolist(), processes)
        assert sorted(itertools.chain(*shares)) == list(range(6))
        assert all(share == sorted(share) for share in shares)
        own = max(costs[share].sum() for share in shares)
        ways = np.array(list(itertools.product(range(processes), repeat=6)))
        best = np.stack([(costs * (ways == at)).sum(1) for at in range(processes)]).max(0).min()
        assert best <= own + 1e-9 <= best * 4 / 3 + 1e-6


def test_equal_runs_are_shared_evenly_and_costs_decide():
    assert [len(share) for share in share_runs([1.0] * 8, 3)] == [3, 3, 2]
    assert [len(share) for share in share_runs([0.0] * 5, 5)] == [1] * 5
    assert share_runs([1, 1, 4, 1, 1], 2) == [[2], [0, 1, 3, 4]]
    shares = RunShares([[0, 3], [1, 2]], rank=1)
    assert shares.take(torch.arange(8).view(4, 2)).tolist() == [[2, 3], [4, 5]]
