"""A power law with a floor, `y(P, ℓ) = K·P^(−γ)·ℓ^δ + y0`: residual loss, harm and time, each with its own bounds.

P are effective parameters, ℓ target tokens. The floor `y0` is what more rank does not buy: MemFT stops by its margin,
and a guard's KL has a noise level. Platform trial, plain SFT: `ln L = c − 1.38 ln r + 1.08 ln ℓ`, R² 0.96.

Invariant: with `γ, δ ≥ 0` each draw, and so each end of an interval, never rises with P and never falls with ℓ, inside
and outside the fitted range. Outside it, the end that the range does not support moves away: see `_warp`. Fitted on
log y with a soft-L1 loss, since scatter is multiplicative and a run sometimes fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memupdate.law import intervals
from memupdate.law.points import Interval
from memupdate.law.resampling import Cells, noise_quantiles, rounded
from memupdate.law.solver import Array, Solution, solve

EXTRAPOLATION_STRETCH = 0.25
"""Outside the fitted range, an end of an interval counts a log-unit of distance a quarter more where that widens it
against the reader, and a quarter less where it would narrow it."""

MIN_VALUE = 1e-6
"""Smallest y that is told apart from zero."""

ROBUST_SCALE = 0.3
"""In log units: a run off by more than a third counts linearly, not squared."""

PRIOR_SCALE = 0.2
"""A prior one standard deviation off costs as much as one residual of this size: nothing against data that show an
exponent, enough to keep it where every point sits on the floor."""

_MIN_SCATTER = 0.02


@dataclass(frozen=True)
class Shape:
    """What is assumed about a quantity before data: bounds and priors (mean, standard deviation) of its exponents."""

    gamma: tuple[float, float]
    gamma_prior: tuple[float, float]
    delta: tuple[float, float]
    delta_prior: tuple[float, float]
    floor: bool
    """Whether there may be a floor."""


RESIDUAL_LOSS = Shape((0.0, 6.0), (1.4, 1.0), (0.0, 6.0), (1.1, 1.0), True)
HARM = Shape((0.0, 6.0), (0.7, 1.0), (0.0, 6.0), (0.7, 1.0), True)
DURATION = Shape((-2.0, 2.0), (0.0, 0.5), (0.0, 3.0), (1.0, 0.5), True)
"""More rank costs a little more per step and saves steps: either sign. Time never falls with ℓ."""


@dataclass(frozen=True)
class ResidualLaw:
    """A fitted law. Arrays of draws are tuples, so that equal laws compare equal; use `fit_residual_law` to make
    one."""

    k: Interval
    """K, in units of y; P and ℓ enter as they are."""
    gamma: Interval
    delta: Interval
    floor: Interval
    """y0, in units of y."""
    scatter: float
    """Standard deviation of ln y around the law: 0.1 is about 10 %."""
    r2: float | None
    """On ln y."""
    mape_unseen_cell: float
    """Mean percentage error (as a share) for cells that were left out of the fit."""
    mape_unseen_rank: float | None
    """The same with all cells of a rank left out; None with fewer than three ranks."""
    mape_unseen_size: float | None
    points: int
    parameters_range: tuple[float, float]
    tokens_range: tuple[float, float]
    centre: tuple[float, float]
    """Mean ln P and mean ln ℓ of the points: parameters below refer to it."""
    best: tuple[float, ...]
    """(ln of the power part at the centre, γ, δ, y0)."""
    draws: tuple[tuple[float, ...], ...]
    """Bootstrap: the same four, one row per draw."""
    noise: tuple[float, ...]
    """Scatter in ln y, one per draw."""

    def predict(self, parameters: float, tokens: float, confidence: float) -> Interval:
        """y of one future run, central interval at `confidence`."""
        mid = float(np.exp(_log_value(np.asarray([self.best]), *self._place(parameters, tokens, 0, 0))[0]))
        tail = (1 - confidence) / 2
        # Time may fall or rise with P, so each end takes the worse of both stretches along P.
        low = min(np.quantile(self._runs(parameters, tokens, side, -1), tail) for side in (1, -1))
        high = max(np.quantile(self._runs(parameters, tokens, side, 1), 1 - tail) for side in (1, -1))
        return Interval(min(float(low), mid), mid, max(float(high), mid))

    def pressure(self, parameters: float, tokens: float, side: int) -> tuple[float, Array]:
        """ln of the power part over its value at the centre, `−γ·Δln P + δ·Δln ℓ`: best (scalar) and draws (draws,).

        How hard the memory is pressed, without the floor; never rises with P, never falls with ℓ. `side` is 1 for the
        end where the range supports least, −1 for the other, 0 for no stretch.
        """
        lp, lt = self._place(parameters, tokens, -side, side)
        draws = np.asarray(self.draws)
        return -self.best[1] * lp + self.best[2] * lt, np.asarray(
            -draws[:, 1] * lp + draws[:, 2] * lt, dtype=np.float64
        )

    def _runs(self, parameters: float, tokens: float, parameters_side: int, tokens_side: int) -> Array:
        """One future run per draw: y (draws,)."""
        place = self._place(parameters, tokens, parameters_side, tokens_side)
        return _exp(_log_value(np.asarray(self.draws), *place) + np.asarray(self.noise))

    def _place(self, parameters: float, tokens: float, parameters_side: int, tokens_side: int) -> tuple[float, float]:
        lp = _warp(math.log(max(parameters, 1.0)), self.parameters_range, parameters_side)
        lt = _warp(math.log(max(tokens, 1.0)), self.tokens_range, tokens_side)
        return lp - self.centre[0], lt - self.centre[1]


def fit_residual_law(
    parameters: Sequence[float],
    tokens: Sequence[float],
    values: Sequence[float],
    *,
    shape: Shape,
    confidence: float,
    bootstrap: int,
    seed: int,
    scored: bool = True,
) -> ResidualLaw:
    """Fit `y(P, ℓ)` to measured `values` (not negative), one per point.

    Args:
        parameters: effective parameters P.
        tokens: target tokens ℓ.
        values: y; values under `MIN_VALUE` count as that.
        shape: bounds and priors.
        confidence: of the intervals of K, γ, δ and y0.
        bootstrap: draws.
        seed: of the draws.
        scored: whether cells, ranks and sizes are left out in turn, most of the work; without, those errors are NaN or None.
    """
    lp, lt = np.log(np.asarray(parameters, dtype=np.float64)), np.log(np.asarray(tokens, dtype=np.float64))
    log_y = np.log(np.maximum(np.asarray(values, dtype=np.float64), MIN_VALUE))
    centre = (float(lp.mean()), float(lt.mean()))
    problem = _Problem(lp - centre[0], lt - centre[1], log_y, shape)
    cells = Cells.of(parameters, tokens)
    rng = np.random.default_rng(seed)
    best = rounded(problem.solve_from_many_starts())
    draws = rounded(problem.solve_weighted(best, cells.resample(bootstrap, rng)))
    residuals = log_y - _log_value(best[None, :], problem.lp[:, None], problem.lt[:, None])[:, 0]
    freedom = max(len(log_y) - 4.0, 1.0)
    scatter = max(float(np.sqrt(np.sum(residuals**2) / freedom)), _MIN_SCATTER)
    noise = rounded(scatter * noise_quantiles(bootstrap, freedom, rng))
    unseen_cell = problem.held_out_error(best, cells, cells.cell) if scored else math.nan
    unseen_rank = problem.held_out_error(best, cells, cells.rank_group) if scored and cells.ranks >= 3 else None
    unseen_size = problem.held_out_error(best, cells, cells.size_group) if scored and cells.sizes >= 3 else None
    constants = draws[:, 0] + draws[:, 1] * centre[0] - draws[:, 2] * centre[1]
    return ResidualLaw(
        k=intervals.central(
            _exp(constants), float(_exp(best[0] + best[1] * centre[0] - best[2] * centre[1])), confidence
        ),
        gamma=intervals.central(draws[:, 1], float(best[1]), confidence),
        delta=intervals.central(draws[:, 2], float(best[2]), confidence),
        floor=intervals.central(draws[:, 3], float(best[3]), confidence),
        scatter=scatter,
        r2=intervals.r_squared(log_y, log_y - residuals),
        mape_unseen_cell=unseen_cell,
        mape_unseen_rank=unseen_rank,
        mape_unseen_size=unseen_size,
        points=len(log_y),
        parameters_range=(float(min(parameters)), float(max(parameters))),
        tokens_range=(float(min(tokens)), float(max(tokens))),
        centre=centre,
        best=tuple(best.tolist()),
        draws=tuple(tuple(row) for row in draws.tolist()),
        noise=tuple(noise.tolist()),
    )


class _Problem:
    """Residuals on ln y, then one row per prior. `lp`, `lt`, `log_y`: (n,), the first two centred."""

    def __init__(self, lp: Array, lt: Array, log_y: Array, shape: Shape) -> None:
        self.lp, self.lt, self.log_y, self.shape = lp, lt, log_y, shape
        top = float(np.exp(log_y.max())) if shape.floor else 0.0
        self.lower = np.asarray([log_y.min() - 12.0, shape.gamma[0], shape.delta[0], 0.0])
        self.upper = np.asarray([log_y.max() + 6.0, shape.gamma[1], shape.delta[1], top])

    def model(self, theta: Array) -> tuple[Array, Array]:
        """Residuals (B, n + 2) and Jacobian (B, n + 2, 4)."""
        power = np.exp(theta[:, :1] - theta[:, 1:2] * self.lp + theta[:, 2:3] * self.lt)
        value = np.maximum(power + theta[:, 3:4], 1e-300)
        share = power / value
        rows = np.stack([share, -share * self.lp, share * self.lt, 1 / value], axis=2)
        priors = np.zeros((len(theta), 2, 4))
        (gamma, gamma_sd), (delta, delta_sd) = self.shape.gamma_prior, self.shape.delta_prior
        priors[:, 0, 1], priors[:, 1, 2] = PRIOR_SCALE / gamma_sd, PRIOR_SCALE / delta_sd
        prior_residuals = np.stack(
            [PRIOR_SCALE * (theta[:, 1] - gamma) / gamma_sd, PRIOR_SCALE * (theta[:, 2] - delta) / delta_sd], axis=1
        )
        residuals = np.concatenate([np.log(value) - self.log_y, prior_residuals], axis=1)
        return residuals, np.concatenate([rows, priors], axis=1)

    def solve_from_many_starts(self) -> Array:
        """The best solution (4,) over floors from none to the median, each started from the linear fit of ln(y −
        y0)."""
        y = np.exp(self.log_y)
        floors = [0.0]
        if self.shape.floor:
            floors += [
                0.5 * float(y.min()),
                0.9 * float(y.min()),
                0.8 * float(np.quantile(y, 0.25)),
                0.9 * float(np.median(y)),
            ]
        starts = []
        for floor in floors:
            above = np.log(np.maximum(y - floor, 0.05 * y))
            design = np.stack([np.ones_like(self.lp), -self.lp, self.lt], axis=1)
            # The priors as two more rows: points of one density would leave γ and δ undetermined.
            rows = np.vstack([design, [0, PRIOR_SCALE, 0], [0, 0, PRIOR_SCALE]])
            aims = [*above, PRIOR_SCALE * self.shape.gamma_prior[0], PRIOR_SCALE * self.shape.delta_prior[0]]
            linear = np.linalg.lstsq(rows, np.asarray(aims), rcond=None)[0]
            starts.append([*linear, floor])
        return self._solve(np.asarray(starts), np.ones((len(starts), len(y)))).best()

    def solve_weighted(self, start: Array, weights: Array) -> Array:
        """Solutions (B, 4) for point weights (B, n), from the overall best and, where that gets stuck, without a
        floor."""
        bare = start * np.asarray([1.0, 1.0, 1.0, 0.0])
        first = self._solve(np.tile(start, (len(weights), 1)), weights)
        second = self._solve(np.tile(bare, (len(weights), 1)), weights)
        return np.where((first.cost <= second.cost)[:, None], first.parameters, second.parameters)

    def held_out_error(self, start: Array, cells: Cells, group: Array) -> float:
        """MAPE (share) of y over groups that were left out in turn."""
        weights = cells.held_out(group)
        theta = self.solve_weighted(start, weights)
        predicted = _log_value(theta, self.lp[:, None], self.lt[:, None])
        left_out = weights.T == 0
        measured = np.broadcast_to(self.log_y[:, None], predicted.shape)
        return intervals.mean_percentage_error(_exp(measured[left_out]), _exp(predicted[left_out]))

    def _solve(self, starts: Array, weights: Array) -> Solution:
        padded = np.concatenate([weights, np.ones((len(weights), 2))], axis=1)
        return solve(self.model, starts, padded, self.lower, self.upper, ROBUST_SCALE)


def _log_value(theta: Array, lp: Array | float, lt: Array | float) -> Array:
    """ln y for parameters (B, 4) at centred ln P and ln ℓ: (B,) for scalars, (n, B) for columns (n, 1)."""
    power = np.exp(theta[:, 0] - theta[:, 1] * lp + theta[:, 2] * lt)
    return np.asarray(np.log(np.maximum(power + theta[:, 3], MIN_VALUE)), dtype=np.float64)


def _warp(value: float, bounds: tuple[float, float], side: int) -> float:
    """ln of a coordinate, moved up (`side` 1), down (−1) or not at all (0) by a share of its distance from the fitted
    range.

    Increasing in `value` for every `side`, so that what is monotone stays so. A pessimistic reader moves ℓ up and P
    down: distance towards a fuller memory counts a quarter more, distance towards an emptier one a quarter less.
    """
    low, high = math.log(max(bounds[0], 1.0)), math.log(max(bounds[1], 1.0))
    return value + side * EXTRAPOLATION_STRETCH * (max(value - high, 0.0) + max(low - value, 0.0))


def _exp(values: Array | float) -> Array:
    """exp without overflow: a law's K may be astronomically large when P is raised to a high power."""
    return np.asarray(np.exp(np.minimum(values, 700.0)), dtype=np.float64)
