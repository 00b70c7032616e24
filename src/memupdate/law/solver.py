"""Bounded, robust, nonlinear least squares for many small problems at once: starts, resamples and held-out cells in
one batch.

Invariant: deterministic; every accepted step lowers its problem's cost and stays inside the bounds. SciPy solves one
problem per call with milliseconds of overhead each; a fit here needs about a thousand solutions, so all are iterated
together. Tests compare with `scipy.optimize`. It knows nothing about laws.

Shapes: B problems, n residuals, p parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Model = Callable[[Array], tuple[Array, Array]]
"""Parameters (B, p) → residuals (B, n) and their Jacobian (B, n, p)."""

MAX_ITERATIONS = 120
COST_TOLERANCE = 1e-12
"""Relative drop in cost below which an accepted step counts as the last."""
DAMPING_START, DAMPING_MIN, DAMPING_MAX = 1e-2, 1e-10, 1e8


@dataclass(frozen=True)
class Solution:
    """`parameters`: (B, p); `cost`: (B,)."""

    parameters: Array
    cost: Array

    def best(self) -> Array:
        """Parameters (p,) of the problem with the lowest cost; the first of equals."""
        return np.asarray(self.parameters[int(np.argmin(self.cost))], dtype=np.float64)


def solve(model: Model, starts: Array, weights: Array, lower: Array, upper: Array, scale: float) -> Solution:
    """Minimise `Σ w · scale² · ρ((r / scale)²)` with `ρ(z) = 2(√(1 + z) − 1)` (soft L1) from every start.

    Levenberg–Marquardt; steps are clipped to the bounds, and parameters held by a bound that they push against are left
    out of the step.

    Args:
        model: residuals and Jacobian.
        starts: (B, p), inside the bounds.
        weights: (B, n), not negative; 0 leaves a residual out.
        lower: (p,).
        upper: (p,).
        scale: residual size from which the loss turns from quadratic to linear.
    """
    theta = np.clip(starts, lower, upper)
    damping = np.full(len(theta), DAMPING_START)
    residuals, jacobian = model(theta)
    cost = _cost(residuals, weights, scale)
    for _ in range(MAX_ITERATIONS):
        trial = np.clip(theta + _step(theta, residuals, jacobian, weights, damping, lower, upper, scale), lower, upper)
        trial_residuals, trial_jacobian = model(trial)
        trial_cost = _cost(trial_residuals, weights, scale)
        accepted = trial_cost < cost
        finished = np.where(accepted, cost - trial_cost <= COST_TOLERANCE * cost, damping >= DAMPING_MAX)
        theta = np.where(accepted[:, None], trial, theta)
        residuals = np.where(accepted[:, None], trial_residuals, residuals)
        jacobian = np.where(accepted[:, None, None], trial_jacobian, jacobian)
        cost = np.where(accepted, trial_cost, cost)
        damping = np.clip(np.where(accepted, damping / 5, damping * 4), DAMPING_MIN, DAMPING_MAX)
        if finished.all():
            break
    return Solution(theta, cost)


def _cost(residuals: Array, weights: Array, scale: float) -> Array:
    # √(1 + z) − 1 written so that small residuals do not cancel away: exact fits must be comparable too.
    z = (residuals / scale) ** 2
    return np.asarray(2 * scale**2 * np.sum(weights * z / (np.sqrt(1 + z) + 1), axis=1), dtype=np.float64)


def _step(
    theta: Array,
    residuals: Array,
    jacobian: Array,
    weights: Array,
    damping: Array,
    lower: Array,
    upper: Array,
    scale: float,
) -> Array:
    # Gradient by ρ' and curvature by ρ' + 2zρ'': with ρ' alone (reweighted squares) steps shrink where outliers decide.
    slope = 1 / np.sqrt(1 + (residuals / scale) ** 2)
    gradient = np.einsum("bnp,bn->bp", jacobian, weights * slope * residuals)
    normal = np.einsum("bnp,bn,bnq->bpq", jacobian, weights * slope**3, jacobian)
    held = ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))
    gradient = np.where(held, 0.0, gradient)
    normal = np.where(held[:, :, None] | held[:, None, :], 0.0, normal)
    diagonal = np.einsum("bpp->bp", normal)
    ridge = damping[:, None] * diagonal + 1e-12 * (1 + diagonal.max(axis=1, keepdims=True))
    normal = normal + np.einsum("bp,pq->bpq", np.where(held, 1.0, ridge), np.eye(theta.shape[1]))
    step = -np.linalg.solve(normal, gradient[:, :, None])[:, :, 0]
    return np.asarray(np.where(held, 0.0, step), dtype=np.float64)
