"""The Parametric Memory Law, `ΔL = C·r^α·ℓ^(−β) + b` (Xu et al., "How LoRA Remembers?", arXiv 2605.30260).

ΔL is the drop in mean target-token loss (nats per token), r the rank, ℓ the target tokens. It holds while capacity
limits. A saturated point, one whose ΔL is at least `SATURATED_SHARE` of the loss before or whose training stopped
because every token had cleared the margin, says only "at least this much": it is right-censored, so that it costs
nothing where the law predicts more.

Invariant: `C ≥ 0` and `α, β > 0`, so predictions never fall with r and never rise with ℓ. Plans use the residual law;
this one is the paper's, reported with its own range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memupdate.law import intervals
from memupdate.law.points import Interval, LawPoint
from memupdate.law.resampling import Cells, noise_quantiles, rounded
from memupdate.law.solver import Array, solve

SATURATED_SHARE = 0.97
"""ΔL from this share of the loss before on is taken for saturated: what is left of the base loss, not capacity, limits
it."""

ROBUST_SCALE = 0.5
"""Nats: a run off by more than this counts linearly."""

MIN_POINTS = 4
ALIKE = 1.2
"""Sizes within this factor count as one where runs are compared with each other."""
EXPONENT_BOUNDS = (0.02, 3.0)
_START_EXPONENTS = (0.05, 0.15, 0.3, 0.5, 0.8, 1.2, 2.0)
_STARTS = 8


@dataclass(frozen=True)
class MemoryLaw:
    """The fitted law; use `fit_memory_law` to make one."""

    c: Interval
    alpha: Interval
    beta: Interval
    b: Interval
    """Nats per token."""
    scatter: float
    """Standard deviation of ΔL around the law over the unsaturated points, nats per token."""
    r2: float | None
    """Over the unsaturated points."""
    r2_all: float | None
    """Over all points, predictions cut at the loss before: the lack of fit where memory is not full."""
    mape_unseen_cell: float
    """Mean percentage error (as a share) of ΔL for unsaturated cells that were left out of the fit."""
    mape_unseen_rank: float | None
    """The same with all cells of a rank left out; None with fewer than three ranks."""
    mape_unseen_size: float | None
    lack_of_fit: float | None
    """Scatter around the law over the scatter between runs of one rank and nearly one size: 1 where the form describes the data, 2 where
    half of what is off is the form's. None where no two unsaturated runs are that alike."""
    c_effective: Interval
    """C for effective parameters P in place of r: the same law on the axis that placements share."""
    points_used: int
    points_censored: int
    rank_range: tuple[int, int]
    """Of the unsaturated points."""
    tokens_range: tuple[int, int]
    note: str
    """Lack of fit in words; empty where there is nothing to say."""
    best: tuple[float, ...]
    """(C, α, β, b)."""
    draws: tuple[tuple[float, ...], ...]
    noise: tuple[float, ...]

    def predict_drop(self, rank: float, tokens: float, confidence: float) -> Interval:
        """ΔL of one future run while capacity limits it, nats per token; not cut at the loss before."""
        draws = np.asarray(self.draws)
        mid = float(_drop(np.asarray([self.best]), rank, tokens)[0])
        return intervals.central(_drop(draws, rank, tokens) + np.asarray(self.noise), mid, confidence)


def is_saturated(point: LawPoint) -> bool:
    """Whether ΔL says "at least" only: see `SATURATED_SHARE`."""
    return bool(point.stopped_early or point.loss_drop_nats >= SATURATED_SHARE * point.loss_before_nats)


def why_not_fitted(points: Sequence[LawPoint]) -> str:
    """Why the paper's law cannot be fitted to these points, in words; empty where it can."""
    open_points = [point for point in points if not is_saturated(point)]
    ranks, sizes = {point.rank for point in open_points}, {point.target_tokens for point in open_points}
    if len(open_points) >= MIN_POINTS and len(ranks) >= 2 and len(sizes) >= 2:
        return ""
    return (
        f"the paper's law needs {MIN_POINTS} unsaturated points over 2 ranks and 2 sizes; of {len(points)} points "
        f"{len(open_points)} are unsaturated, over {len(ranks)} ranks and {len(sizes)} sizes"
    )


def fit_memory_law(points: Sequence[LawPoint], *, confidence: float, bootstrap: int, seed: int) -> MemoryLaw:
    """Fit the law; `why_not_fitted(points)` must be empty.

    Args:
        points: of one base model, placement and recipe.
        confidence: of the parameters' intervals.
        bootstrap: draws, resampling cells.
        seed: of the draws.
    """
    ranks = np.asarray([point.rank for point in points], dtype=np.float64)
    tokens = np.asarray([point.target_tokens for point in points], dtype=np.float64)
    before = np.asarray([point.loss_before_nats for point in points])
    drop = np.asarray([point.loss_drop_nats for point in points])
    censored = np.asarray([is_saturated(point) for point in points])
    problem = _Problem(ranks, tokens, drop, censored)
    cells = Cells.of(ranks.tolist(), tokens.tolist())
    rng = np.random.default_rng(seed)
    centred = problem.solve_from_many_starts()
    best = rounded(problem.uncentred(centred[None, :]))[0]
    draws = rounded(problem.uncentred(problem.solve_weighted(centred, cells.resample(bootstrap, rng))))
    predicted = _drop(best[None, :], ranks[:, None], tokens[:, None])[:, 0]
    residuals = (predicted - drop)[~censored]
    freedom = max(len(residuals) - 4.0, 1.0)
    scatter = float(np.sqrt(np.sum(residuals**2) / freedom))
    r2 = intervals.r_squared(drop[~censored], predicted[~censored])
    r2_all = intervals.r_squared(drop, np.minimum(predicted, before))
    parameters_per_rank = math.exp(
        float(np.mean([math.log(point.effective_parameters / point.rank) for point in points]))
    )
    effective = draws[:, 0] * parameters_per_rank ** -draws[:, 1]
    unseen_rank = problem.held_out_error(centred, cells, cells.rank_group) if cells.ranks >= 3 else None
    unseen_size = problem.held_out_error(centred, cells, cells.size_group) if cells.sizes >= 3 else None
    named = [intervals.central(draws[:, column], float(best[column]), confidence) for column in range(4)]
    return MemoryLaw(
        c=named[0],
        alpha=named[1],
        beta=named[2],
        b=named[3],
        scatter=scatter,
        r2=r2,
        r2_all=r2_all,
        mape_unseen_cell=problem.held_out_error(centred, cells, cells.cell) or 0.0,
        mape_unseen_rank=unseen_rank,
        mape_unseen_size=unseen_size,
        lack_of_fit=_lack_of_fit(residuals, ranks[~censored], tokens[~censored], freedom),
        c_effective=intervals.central(effective, float(best[0] * parameters_per_rank ** -best[1]), confidence),
        points_used=int(np.sum(~censored)),
        points_censored=int(np.sum(censored)),
        rank_range=(int(ranks[~censored].min()), int(ranks[~censored].max())),
        tokens_range=(int(tokens[~censored].min()), int(tokens[~censored].max())),
        note=_note(r2, residuals, best),
        best=tuple(best.tolist()),
        draws=tuple(tuple(row) for row in draws.tolist()),
        noise=tuple(rounded(scatter * noise_quantiles(bootstrap, freedom, rng)).tolist()),
    )


class _Problem:
    """Residuals `predicted − measured` in nats, one-sided where censored. Parameters: (value of the power part at the
    centre, α, β, b)."""

    def __init__(self, ranks: Array, tokens: Array, drop: Array, censored: NDArray[np.bool_]) -> None:
        self.lr, self.lt = np.log(ranks), np.log(tokens)
        self.centre = (float(self.lr.mean()), float(self.lt.mean()))
        self.lr, self.lt = self.lr - self.centre[0], self.lt - self.centre[1]
        self.drop, self.censored = drop, censored
        reach = 20 * float(np.abs(drop).max()) + 1.0
        self.lower = np.asarray([0.0, EXPONENT_BOUNDS[0], EXPONENT_BOUNDS[0], -reach])
        self.upper = np.asarray([reach, EXPONENT_BOUNDS[1], EXPONENT_BOUNDS[1], reach])

    def model(self, theta: Array) -> tuple[Array, Array]:
        """Residuals (B, n) and Jacobian (B, n, 4)."""
        shape = np.exp(theta[:, 1:2] * self.lr - theta[:, 2:3] * self.lt)
        power = theta[:, :1] * shape
        residuals = power + theta[:, 3:4] - self.drop
        jacobian = np.stack([shape, power * self.lr, -power * self.lt, np.ones_like(power)], axis=2)
        counts = ~(self.censored & (residuals > 0))
        return residuals * counts, jacobian * counts[:, :, None]

    def solve_from_many_starts(self) -> Array:
        """The best solution (4,): for a grid of exponents C and b by linear least squares, the most promising ones
        polished."""
        seen = ~self.censored
        starts = []
        for alpha in _START_EXPONENTS:
            for beta in _START_EXPONENTS:
                shape = np.exp(alpha * self.lr - beta * self.lt)[seen]
                amplitude, b = np.linalg.lstsq(
                    np.stack([shape, np.ones_like(shape)], axis=1), self.drop[seen], rcond=None
                )[0]
                error = float(np.sum((max(amplitude, 0.0) * shape + b - self.drop[seen]) ** 2))
                starts.append((error, max(float(amplitude), 1e-3), alpha, beta, float(b)))
        chosen = np.asarray([start[1:] for start in sorted(starts)[:_STARTS]])
        return solve(
            self.model, chosen, np.ones((len(chosen), len(self.drop))), self.lower, self.upper, ROBUST_SCALE
        ).best()

    def solve_weighted(self, start: Array, weights: Array) -> Array:
        """Solutions (B, 4) for point weights (B, n)."""
        starts = np.tile(start, (len(weights), 1))
        return solve(self.model, starts, weights, self.lower, self.upper, ROBUST_SCALE).parameters

    def uncentred(self, theta: Array) -> Array:
        """(B, 4) as (C, α, β, b) of the law itself."""
        constants = theta[:, 0] * np.exp(-theta[:, 1] * self.centre[0] + theta[:, 2] * self.centre[1])
        return np.stack([constants, theta[:, 1], theta[:, 2], theta[:, 3]], axis=1)

    def held_out_error(self, start: Array, cells: Cells, group: Array) -> float | None:
        """MAPE (share) of ΔL over unsaturated points whose group was left out; None where none of them is unsaturated."""
        weights = cells.held_out(group)
        theta = self.solve_weighted(start, weights)
        power = theta[:, :1] * np.exp(theta[:, 1:2] * self.lr - theta[:, 2:3] * self.lt) + theta[:, 3:4]
        left_out = (weights == 0) & ~self.censored
        measured = np.broadcast_to(self.drop, power.shape)
        if not left_out.any():
            return None
        return intervals.mean_percentage_error(measured[left_out], power[left_out])


def _drop(theta: Array, rank: Array | float, tokens: Array | float) -> Array:
    """ΔL for (B, 4) at scalars: (B,); at columns (n, 1): (n, B)."""
    return np.asarray(theta[:, 0] * rank ** theta[:, 1] * tokens ** -theta[:, 2] + theta[:, 3], dtype=np.float64)


def _lack_of_fit(residuals: Array, ranks: Array, tokens: Array, freedom: float) -> float | None:
    """√(mean square around the law / mean square between runs of one rank whose sizes are within `ALIKE`)."""
    within, count = 0.0, 0
    left = sorted(range(len(residuals)), key=lambda i: (ranks[i], tokens[i]))
    while left:
        first = left[0]
        group = [i for i in left if ranks[i] == ranks[first] and tokens[i] <= ALIKE * tokens[first]]
        left = [i for i in left if i not in group]
        # Residuals, not drops: what the law says about the small difference in size is taken out.
        values = residuals[group]
        within += float(np.sum((values - values.mean()) ** 2))
        count += len(group) - 1
    if not count or within <= 0.0:
        return None
    return float(np.sqrt(np.sum(residuals**2) / freedom / (within / count)))


def _note(r2: float | None, residuals: Array, best: Array) -> str:
    worst = float(np.max(np.abs(residuals)))
    if r2 is None:
        return "the unsaturated points do not differ: nothing to explain"
    if len(residuals) <= 4:
        return f"four parameters on {len(residuals)} unsaturated points: R² says nothing"
    notes = []
    if r2 < 0.9:
        notes.append(f"lack of fit: R² {r2:.2f} over the unsaturated points, worst off by {worst:.2f} nats")
    if min(best[1], best[2]) < 2 * EXPONENT_BOUNDS[0] or max(best[1], best[2]) > 0.9 * EXPONENT_BOUNDS[1]:
        notes.append(
            "an exponent is at its bound (the points look logarithmic over this range): C and b are not told apart"
        )
    return "; ".join(notes)
