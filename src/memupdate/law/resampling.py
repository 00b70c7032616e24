"""Cells of a sweep and how they are resampled or held out, as weights per point, so that shapes never change.

A cell is all points of one (effective parameters, ℓ). Invariant: deterministic in the seed; every resample still has
two sizes and two ranks, so that both exponents can be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memupdate.law.solver import Array

_MAX_DRAWS = 200
"""Attempts at a resample with two ranks and two sizes before every cell is taken once instead."""


@dataclass(frozen=True)
class Cells:
    """Grouping of n points. `cell`, `rank_group`, `size_group`: (n,) small whole numbers."""

    cell: Array
    rank_group: Array
    size_group: Array

    @classmethod
    def of(cls, capacities: Sequence[float], sizes: Sequence[float]) -> Cells:
        """Group by rank axis (rank or effective parameters) and by target tokens."""
        rank_group = np.unique(np.asarray(capacities, dtype=np.float64), return_inverse=True)[1].reshape(-1)
        size_group = np.unique(np.asarray(sizes, dtype=np.float64), return_inverse=True)[1].reshape(-1)
        pairs = rank_group * (size_group.max() + 1) + size_group
        cell = np.unique(pairs, return_inverse=True)[1].reshape(-1)
        return cls(cell.astype(np.float64), rank_group.astype(np.float64), size_group.astype(np.float64))

    @property
    def ranks(self) -> int:
        """How many different ranks there are."""
        return len(np.unique(self.rank_group))

    @property
    def sizes(self) -> int:
        """How many different ℓ there are."""
        return len(np.unique(self.size_group))

    def resample(self, draws: int, rng: np.random.Generator) -> Array:
        """Case resampling over cells: weights (draws, n), how often each point's cell was drawn."""
        groups = self.cell.astype(np.int64)
        count = int(groups.max()) + 1
        rows = []
        for _ in range(draws):
            counts = np.ones(count)
            for _ in range(_MAX_DRAWS):
                drawn = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
                kept = drawn[groups] > 0
                if len(np.unique(self.rank_group[kept])) >= 2 and len(np.unique(self.size_group[kept])) >= 2:
                    counts = drawn
                    break
            rows.append(counts[groups])
        return np.asarray(rows, dtype=np.float64)

    def held_out(self, group: Array) -> Array:
        """Weights (groups, n): 0 for the points of one group of `group` in turn, 1 for the rest."""
        return np.asarray([(group != value).astype(np.float64) for value in np.unique(group)], dtype=np.float64)


def noise_quantiles(draws: int, degrees_of_freedom: float, rng: np.random.Generator) -> Array:
    """Standard noise, one value per draw (draws,): evenly spread quantiles in random order, so that few draws suffice.

    Student's t by the first term of its Cornish–Fisher expansion, `z + (z³ + z) / 4ν`: few points must widen intervals.
    """
    from statistics import NormalDist

    normal = NormalDist()
    z = np.asarray([normal.inv_cdf((index + 0.5) / draws) for index in range(draws)])
    return np.asarray(rng.permutation(z + (z**3 + z) / (4 * max(degrees_of_freedom, 1.0))), dtype=np.float64)


def rounded(values: Array) -> Array:
    """To nine significant digits, so that a fit kept as JSON predicts the very same numbers and stays short."""
    flat = [float(f"{value:.9g}") for value in np.asarray(values, dtype=np.float64).reshape(-1)]
    return np.asarray(flat, dtype=np.float64).reshape(np.shape(values))
