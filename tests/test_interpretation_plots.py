"""Pictures of what prompts say: readable, marked as they should be, refused without data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist
from test_plots import assert_readable

from prompt_lab.analysis.interpretation_plots import (
    MOST_CELLS,
    drift_map,
    heatmap,
    norm_violins,
    outline,
    prompt_map,
    tsne_points,
)

LONG = [f"blimp-determiner_noun_agreement_with_adj_irregular_{at}_100_seed0" for at in range(7)]


@pytest.mark.parametrize("count", [1, 7, MOST_CELLS + 1])
def test_heat_maps_are_readable_and_have_values_where_they_fit(count):
    names = (LONG * 4)[:count]
    values = np.random.default_rng(0).normal(size=(count, count)) * 1e3
    values[0, 0] = math.nan if count > 1 else 1
    figure = heatmap(names, names, values, "distance", form="{:+.3f}" if count == 1 else "{:.3g}")
    assert_readable(figure)
    written = len(figure.axes[0].texts)
    assert written == (count * count - (count > 1) if count <= MOST_CELLS else 0)


def test_drift_maps_mark_lost_rows_and_take_prompts_of_several_lengths():
    drifts = [np.linspace(0, 1, 100), np.linspace(0, 3, 20)]
    lost = [drift > 0.5 for drift in drifts]
    figure = drift_map(LONG[:2], drifts, lost)
    assert_readable(figure)
    marks = sum(line.get_xydata().shape[0] for line in figure.axes[0].lines)
    assert marks == sum(flags.sum() for flags in lost)


def test_violins_and_maps_are_readable():
    rng = np.random.default_rng(0)
    norms = [rng.normal(9, 1, 50), np.full(3, 4.0), np.array([2.0])]
    assert_readable(norm_violins([*LONG[:2], "$x$"], norms, "norm of a row", "a note " * 20))
    groups = [f"{LONG[at % 7]}-{at % 21}" for at in range(42)]
    assert_readable(prompt_map(rng.normal(size=(42, 2)), groups, ("x", "y"), "a note"))


def test_the_outline_of_points_on_a_hull_is_the_hull():
    angles = np.random.default_rng(0).permutation(np.linspace(0, 6, 9))
    points = np.stack([3 * np.cos(angles), np.sin(angles)], axis=1)
    closed = outline(points)
    hull = points[ConvexHull(points).vertices]
    at = int(np.flatnonzero((hull == closed[0]).all(axis=1))[0])
    np.testing.assert_array_equal(closed[:-1], np.roll(hull, -at, axis=0))
    np.testing.assert_array_equal(closed[-1], closed[0])
    np.testing.assert_array_equal(outline(points[:2]), points[:2])


def test_tsne_keeps_groups_together_and_is_the_same_every_time():
    rng = np.random.default_rng(0)
    vectors = np.repeat(50 * rng.normal(size=(3, 200)), 6, axis=0) + rng.normal(size=(18, 200))
    points, perplexity = tsne_points(vectors)
    assert perplexity == pytest.approx(17 / 3)
    np.testing.assert_array_equal(points, tsne_points(vectors)[0])
    nearest = cdist(points, points) + np.diag([np.inf] * 18)
    assert (nearest.argmin(axis=1) // 6 == np.arange(18) // 6).all()
    assert tsne_points(vectors[:4])[1] == 1


def test_pictures_of_nothing_are_refused():
    with pytest.raises(ValueError, match="give each cell a number"):
        heatmap(["a"], ["b", "c"], np.ones((1, 1)), "x")
    with pytest.raises(ValueError, match="one or more prompts"):
        drift_map([], [], [])
    with pytest.raises(ValueError, match="one or more distributions"):
        norm_violins(["a"], [np.array([])], "x")
    with pytest.raises(ValueError, match=r"give \(R, 2\)"):
        prompt_map(np.ones((2, 3)), ["a", "b"], ("x", "y"))
    with pytest.raises(ValueError, match="at least four"):
        tsne_points(np.ones((3, 5)))
