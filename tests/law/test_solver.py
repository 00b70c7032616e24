"""The batched solver against `scipy.optimize.least_squares`, problem by problem."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from memupdate.law.resampling import Cells
from memupdate.law.solver import solve

X = np.linspace(0.1, 4, 25)


def model(theta):
    curve = theta[:, :1] * np.exp(-theta[:, 1:2] * X)
    residuals = curve + theta[:, 2:3] - TARGET
    return residuals, np.stack([curve / theta[:, :1], -X * curve, np.ones_like(curve)], axis=2)


_RNG = np.random.default_rng(0)
TARGET = 2.0 * np.exp(-0.9 * X) + 0.3 + _RNG.normal(0, 0.05, len(X))
TARGET[4] += 3.0


@pytest.mark.parametrize(
    ("lower", "upper"),
    [([0.1, 0.0, -5.0], [10.0, 5.0, 5.0]), ([0.1, 0.0, 0.5], [10.0, 5.0, 5.0]), ([0.1, 0.0, -5.0], [1.5, 5.0, 5.0])],
    ids=["free", "lower bound holds", "upper bound holds"],
)
def test_batches_of_weighted_robust_bounded_problems_agree_with_scipy(lower, upper):
    lower, upper = np.asarray(lower), np.asarray(upper)
    weights = np.vstack([np.ones(len(X)), _RNG.integers(0, 3, (4, len(X)))]).astype(float)
    start = np.asarray([1.0, 0.5, 0.6])
    found = solve(model, np.tile(start, (5, 1)), weights, lower, upper, 0.1)
    for row, weight in zip(found.parameters, weights, strict=True):
        # SciPy takes no weights: an observation of weight two is there twice.
        repeated = np.repeat(np.arange(len(X)), weight.astype(int))
        reference = least_squares(
            lambda theta, rows=repeated: model(theta[None, :])[0][0][rows],
            start, bounds=(lower, upper), loss="soft_l1", f_scale=0.1, xtol=1e-12, ftol=1e-12, gtol=1e-12,
        )  # fmt: skip
        assert row == pytest.approx(reference.x, rel=1e-4, abs=1e-4)
        assert np.all((row >= lower) & (row <= upper))


def test_resamples_draw_whole_cells_and_keep_two_ranks_and_two_sizes():
    cells = Cells.of([1, 1, 1, 2, 2, 4], [10, 10, 20, 10, 20, 20])
    weights = cells.resample(200, np.random.default_rng(0))
    assert np.all(weights[:, 0] == weights[:, 1])
    for row in weights:
        assert len(set(cells.rank_group[row > 0])) >= 2
        assert len(set(cells.size_group[row > 0])) >= 2
    assert np.array_equal(weights, cells.resample(200, np.random.default_rng(0)))
    # Five cells, each drawn once on average.
    assert weights[:, [0, 2, 3, 4, 5]].mean() == pytest.approx(1.0, abs=0.1)


def test_held_out_groups_cover_every_point_once():
    cells = Cells.of([1, 1, 2, 2], [10, 20, 10, 20])
    held = cells.held_out(cells.size_group)
    assert held.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
