"""From loss to recall: the share of facts proved (every target token the argmax) as a function of how hard the memory
is pressed.

`share = σ(a − s·x)` with x the log of the residual law's power part, `−γ·Δln P + δ·Δln ℓ`. A floor in the loss is the
margin at which MemFT stops, not a lack of room, so it is no part of x.

Invariant: `s > 0`, so more facts never raise the share and more rank never lowers it. A weak normal prior on (a, s)
keeps the fit finite where all facts of all points are proved. Facts of one run share their luck: the scatter between
runs beyond the binomial is estimated (on the logit scale) and is part of every prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memupdate.law import intervals
from memupdate.law.points import Interval
from memupdate.law.resampling import Cells, noise_quantiles, rounded
from memupdate.law.residual_law import ResidualLaw
from memupdate.law.solver import Array

PRIOR_MEAN = (2.0, 2.0)
"""Of (a, s): platform trial, where the share fell from 0.97 to 0.4 while ln L rose by 1.8."""
PRIOR_SD = (4.0, 2.0)
MIN_SLOPE = 0.05
_MAX_SCATTER = 4.0
_NEWTON_STEPS = 60


@dataclass(frozen=True)
class RecallLink:
    """The fitted link; use `fit_recall_link` to make one."""

    intercept: Interval
    """a: logit of the share at the centre of the fitted points."""
    slope: Interval
    """s: logits lost per e-fold of the capacity part."""
    scatter: float
    """Standard deviation between runs beyond the binomial, in logits."""
    mean_error: float
    """Mean absolute difference between measured and fitted share, 0 to 1."""
    best: tuple[float, ...]
    """(a, s)."""
    draws: tuple[tuple[float, ...], ...]
    noise: tuple[float, ...]

    def predict(self, law: ResidualLaw, parameters: float, tokens: float, confidence: float) -> Interval:
        """Expected share of facts proved by one future run. `law` must be the one that the link was fitted with.

        Scatter between runs is in the interval; the luck of single facts (binomial, small for many facts) is not.
        """
        x, _ = law.pressure(parameters, tokens, 0)
        mid = float(_sigmoid(self.best[0] - self.best[1] * x))
        tail = (1 - confidence) / 2
        low = float(np.quantile(self._runs(law.pressure(parameters, tokens, 1)[1]), tail))
        high = float(np.quantile(self._runs(law.pressure(parameters, tokens, -1)[1]), 1 - tail))
        return Interval(min(low, mid), mid, max(high, mid))

    def predict_all(self, law: ResidualLaw, parameters: float, tokens: float, facts: int) -> float:
        """Probability that all `facts` of one future run are proved, each with the run's share, 0 to 1."""
        return float(np.mean(self._runs(law.pressure(parameters, tokens, 0)[1]) ** facts))

    def _runs(self, pressures: Array) -> Array:
        draws = np.asarray(self.draws)
        return _sigmoid(draws[:, 0] - draws[:, 1] * pressures + np.asarray(self.noise))


def fit_recall_link(
    law: ResidualLaw,
    parameters: Sequence[float],
    tokens: Sequence[float],
    facts: Sequence[int],
    facts_proved: Sequence[int],
    *,
    confidence: float,
    seed: int,
) -> RecallLink:
    """Fit the link to the points that `law` was fitted to.

    Each draw refits it at that draw's exponents on the same resampled cells, so that both uncertainties move together:
    `seed` must be the law's.
    """
    bootstrap = len(law.draws)
    counts, proved = np.asarray(facts, dtype=np.float64), np.asarray(facts_proved, dtype=np.float64)
    pressures = [law.pressure(p, t, 0) for p, t in zip(parameters, tokens, strict=True)]
    x = np.asarray([best for best, _ in pressures])
    x_draws = np.stack([draws for _, draws in pressures], axis=1)
    rng = np.random.default_rng(seed)
    weights = Cells.of(parameters, tokens).resample(bootstrap, rng)

    theta = _fit(x[None, :], counts[None, :], proved[None, :])
    scatter = _between_runs(_sigmoid(theta[:, :1] - theta[:, 1:] * x)[0], counts, proved)
    shares = _sigmoid(theta[:, :1] - theta[:, 1:] * x)[0]
    # Quasi-likelihood: a run of many facts is still one run.
    effective = 1 / (1 + np.maximum(counts - 1, 0) * scatter**2 * shares * (1 - shares))
    best = rounded(_fit(x[None, :], (effective * counts)[None, :], (effective * proved)[None, :]))[0]
    draws = rounded(_fit(x_draws, weights * effective * counts, weights * effective * proved))
    fitted = _sigmoid(best[0] - best[1] * x)
    return RecallLink(
        intercept=intervals.central(draws[:, 0], float(best[0]), confidence),
        slope=intervals.central(draws[:, 1], float(best[1]), confidence),
        scatter=scatter,
        mean_error=float(np.mean(np.abs(fitted - proved / counts))),
        best=tuple(best.tolist()),
        draws=tuple(tuple(row) for row in draws.tolist()),
        noise=tuple(rounded(scatter * noise_quantiles(bootstrap, max(len(x) - 2.0, 1.0), rng)).tolist()),
    )


def _fit(x: Array, counts: Array, proved: Array) -> Array:
    """Maximum a posteriori (a, s) for B problems of n points, all (B, n): (B, 2). Damped Newton; the posterior is
    concave."""
    theta = np.tile(np.asarray(PRIOR_MEAN), (len(x), 1))
    theta = _newton(theta, x, counts, proved, np.asarray([1.0, 1.0]))
    flat = theta[:, 1] < MIN_SLOPE
    # Concave with one bound: where it binds, the optimum lies on it and only a is left to find.
    bound = np.stack([theta[:, 0], np.full(len(theta), MIN_SLOPE)], axis=1)
    return np.where(flat[:, None], _newton(bound, x, counts, proved, np.asarray([1.0, 0.0])), theta)


def _newton(theta: Array, x: Array, counts: Array, proved: Array, free: Array) -> Array:
    precision = 1 / np.asarray(PRIOR_SD) ** 2
    design = np.stack([np.ones_like(x), -x], axis=2) * free

    def log_posterior(at: Array) -> Array:
        eta = at[:, :1] - at[:, 1:] * x
        likelihood = np.sum(proved * eta - counts * np.logaddexp(0, eta), axis=1)
        return np.asarray(likelihood - 0.5 * np.sum(precision * (at - PRIOR_MEAN) ** 2, axis=1), dtype=np.float64)

    value = log_posterior(theta)
    for _ in range(_NEWTON_STEPS):
        share = _sigmoid(theta[:, :1] - theta[:, 1:] * x)
        gradient = np.einsum("bnp,bn->bp", design, proved - counts * share) - free * precision * (theta - PRIOR_MEAN)
        curvature = np.einsum("bnp,bn,bnq->bpq", design, counts * share * (1 - share), design) + np.diag(precision)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        size = np.ones(len(theta))
        for _ in range(20):
            worse = log_posterior(theta + size[:, None] * step) < value - 1e-12
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        theta = theta + size[:, None] * step
        value = log_posterior(theta)
        if float(np.abs(step).max()) < 1e-9:
            break
    return theta


def _between_runs(shares: Array, counts: Array, proved: Array) -> float:
    """σ of a run's logit by moments: `Var(k) ≈ n·p·q·(1 + (n − 1)·σ²·p·q)` (Williams 1982), solved by bisection; 0
    where binomial."""
    spread = np.maximum(shares * (1 - shares), 1e-3)
    freedom = max(len(counts) - 2.0, 1.0)

    def excess(sigma: float) -> float:
        variance = counts * spread * (1 + (counts - 1) * sigma**2 * spread)
        return float(np.sum((proved - counts * shares) ** 2 / variance)) - freedom

    low, high = 0.0, _MAX_SCATTER
    if excess(low) <= 0:
        return 0.0
    if excess(high) >= 0:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2


def _sigmoid(values: Array | float) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(values, -500.0, 500.0))), dtype=np.float64)
