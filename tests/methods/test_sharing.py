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
        costs = rng.uniform(1, 10, size=6).tolist()
        shares = share_runs(costs, processes)
        assert sorted(itertools.chain(*shares)) == list(range(6))
        assert all(share == sorted(share) for share in shares)
        own = max(sum(costs[run] for run in share) for share in shares)
        best = min(
            max(
                sum(cost for cost, at in zip(costs, where, strict=True) if at == process)
                for process in range(processes)
            )
            for where in itertools.product(range(processes), repeat=6)
        )
        assert best <= own + 1e-9 <= best * 4 / 3 + 1e-6


def test_equal_runs_are_shared_evenly_and_costs_decide():
    assert [len(share) for share in share_runs([1.0] * 8, 3)] == [3, 3, 2]
    assert [len(share) for share in share_runs([0.0] * 5, 5)] == [1] * 5
    assert share_runs([1, 1, 4, 1, 1], 2) == [[2], [0, 1, 3, 4]]


def test_a_process_that_has_all_runs_sends_nothing():
    shares = RunShares([[0, 1, 2]])
    values = torch.arange(3)
    assert not shares.divided
    assert shares.own == [0, 1, 2]
    assert shares.join("abc") == list(shares.stream("abc")) == shares.gather("abc") == list("abc")
    assert shares.join_tensor(values) is values
    assert shares.take(values) is values


def test_a_process_takes_its_own_runs_of_a_checkpoint():
    shares = RunShares([[0, 3], [1, 2]], rank=1)
    assert shares.divided
    assert shares.take(torch.arange(8).view(4, 2)).tolist() == [[2, 3], [4, 5]]
