"""The grid of runs: which runs, in which order, under which names, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from prompt_lab.core.run import Run, grid

AXES: dict[str, Any] = {
    "tasks": ["glue-sst2", "emotion"],
    "samples": [100, 13],
    "init_seeds": [0, 7],
    "learning_rates": [0.3, 0.05],
    "batch_sizes": [8, 2],
}


def test_the_grid_holds_every_combination_in_order() -> None:
    """Reference: ``itertools.product``, the last axis fastest."""
    runs = grid(**AXES)
    found = [(r.task, r.sample, r.init_seed, r.learning_rate, r.batch_size) for r in runs]
    assert found == list(product(*AXES.values()))


def test_names_are_unique_and_can_be_file_names() -> None:
    names = [run.name for run in grid(**AXES)]
    assert len(set(names)) == len(names)
    assert not any("/" in name or name.startswith(".") for name in names)
    assert Run("emotion", 13, 2, 0.05, 8).name == "emotion_13_seed2_lr0.05_bs8"
    sum_of_two = Run("emotion", 13, 2, 0.05, 8, source="trec + glue-sst2")
    assert sum_of_two.name == "emotion_13_seed2_lr0.05_bs8_from_trec_glue-sst2"


def test_every_run_is_made_once_for_each_source() -> None:
    plain, runs = grid(**AXES), grid(**AXES, sources=["trec", "imdb"])
    assert [run.source for run in runs] == ["trec", "imdb"] * len(plain)
    assert [replace(run, source="") for run in runs[::2]] == plain
    assert len({run.name for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"init_seeds": []}, "init_seed is empty"),
        ({"samples": [13, 13]}, "samples has a value twice"),
        ({"learning_rates": [0.3, 0.3]}, "learning_rate has a value twice"),
        ({"batch_sizes": [8, 0]}, "batch_size must be at least 1"),
        ({"learning_rates": [0.3, 0.0]}, "learning_rate must be positive"),
        ({"learning_rates": [float("nan")]}, "learning_rate must be positive"),
        ({"learning_rates": [0.3, 0.3 + 1e-9]}, "too close to tell apart by name"),
        ({"sources": []}, "source_tasks is empty"),
        ({"sources": ["trec", "trec"]}, "source_tasks has a value twice"),
        ({"sources": ["a + b", "a * b"]}, "too close to tell apart by name"),
    ],
)
def test_bad_axes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(**{**AXES, **change})
