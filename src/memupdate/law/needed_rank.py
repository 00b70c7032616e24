"""The rank that a set of facts needs: what a plan is made on.

A memory of P effective parameters holds everything (every fact proved within the policy's attempts, harm within its budget) with
probability `σ((ln P − ln P*)/s)`, with `ln P* = a + η·(ln ℓ + w·ln(L0/L̄))`: ℓ target tokens whose base loss is L0 nats each, L̄ the
mean over the points. w = 0 counts tokens, w = 1 counts information (`ℓ·L0`); the points decide. s is the luck of sets and runs.

A run that held everything says `P* ≤ P`, one that did not `P* > P`: both are what a loss cannot say, which ends at a training's margin.
The posterior is a grid, so it is exact, needs no start and is the same everywhere; `draws` are taken from it at equal steps.

Runs of other placements may speak too, through their effective parameters: they share η, w and s, and their level a is this one's, or
this one's and an offset of their own with a normal prior, which is integrated out.

Invariant: η > 0 and 0 ≤ w ≤ 1 in every draw, so no end of an interval improves when facts are added, however cheap their tokens
(`ℓ^(1−w)·(ℓ·L0)^w` grows with tokens and with information), and none worsens with P.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.polynomial.hermite_e import hermegauss

from memupdate.law.intervals import central
from memupdate.law.points import Interval
from memupdate.law.resampling import rounded
from memupdate.law.solver import Array

LAPSE = 0.02
"""Share of runs that go against the law for reasons of their own (a set with two near-equal questions, say): one of them must not
move the law."""
ETA_PRIOR, WEIGHT_PRIOR = (0.9, 0.35), (0.2, 0.3)
"""Mean and standard deviation. Counting arguments give η = 1, and trials of this trainer a little less. w is small: a digit of a random
number, three times as dear as a letter of a name, took hardly more room."""
SPREAD_PRIOR = (math.log(0.2), 0.5)
"""Of ln s: a set needs half or twice the rank of its like only in one case of thirty."""
LEVEL_SD = 2.0
"""Of a, around the middle of the parameters that were tried."""
DRAWS = 400
OFFSET_NODES = 5
"""Of Gauss and Hermite, for a placement's own offset."""
_AXES, _COARSE = (37, 15, 9, 9), (21, 9, 5, 5)
"""Values of a, η, w, ln s on a pass; the coarse grid is for fits that are only scored."""
_PASSES = 2
"""The grid's second pass covers what the first left likely."""
_NEGLIGIBLE = 12.0
"""In ln of the posterior, below its top."""


class Runs(NamedTuple):
    """Memories of one placement, one value each."""

    parameters: Sequence[float]
    """Effective parameters."""
    tokens: Sequence[float]
    base_loss_nats: Sequence[float]
    """Per target token."""
    held: Sequence[bool]
    """Whether everything was proved with the harm within its budget."""


class Size(NamedTuple):
    """How much is to be held."""

    target_tokens: float
    base_loss_nats: float | None = None
    """Per token; None for the mean of the points."""
    base_loss_sd_log: float = 0.0
    """Uncertainty of its logarithm."""


@dataclass(frozen=True)
class NeededRank:
    """The fitted law; use `fit_needed_rank` to make one."""

    level: Interval
    """P* of a set of the centre's size, effective parameters."""
    eta: Interval
    weight: Interval
    """w: 0 counts tokens, 1 information."""
    spread: Interval
    """s, in log units of P."""
    log_score: float
    """Mean ln of the probability given to what happened, each size left out in turn; a guess by the mean share scores `log_score_guess`."""
    log_score_guess: float
    points: int
    points_held: int
    tokens_range: tuple[float, float]
    centre: tuple[float, float]
    """ln of the mean ℓ (geometric) and ln L̄."""
    draws: tuple[tuple[float, ...], ...]
    """(a, η, w, s), one row per draw."""

    def predict(self, parameters: float, size: Size, confidence: float, *, widening: float = 1.0) -> Interval:
        """Probability that a memory holds everything: the mean over what is uncertain, and the ends of what the points leave open.

        Args:
            parameters: effective parameters P.
            size: what is to be held.
            confidence: of the interval.
            widening: factor on what is uncertain about P* and on the luck of a set, at least 1.
        """
        chance = _sigmoid((math.log(max(parameters, 1.0)) - self.log_needed(size, widening)) / self._luck(widening))
        return central(chance, float(chance.mean()), confidence)

    def needed(self, size: Size, confidence: float, *, widening: float = 1.0) -> Interval:
        """Effective parameters that one future set of this size needs, its own luck included."""
        luck = self._luck(widening) * _logistic_scores(len(self.draws))
        needed = np.exp(np.minimum(self.log_needed(size, widening) + luck, 700.0))
        return central(needed, float(np.median(needed)), confidence)

    def _luck(self, widening: float) -> Array:
        return np.asarray(self.draws)[:, 3] * widening

    def log_needed(self, size: Size, widening: float = 1.0) -> Array:
        """ln P* of a size under each draw (draws,)."""
        draws = np.asarray(self.draws)
        lt = math.log(max(size.target_tokens, 1.0)) - self.centre[0]
        density = 0.0 if size.base_loss_nats is None else math.log(max(size.base_loss_nats, 1e-3)) - self.centre[1]
        densities = density + size.base_loss_sd_log * _normal_scores(len(draws))
        # Widened in the level only: a constant per draw, so that the order of sizes stays.
        level = draws[:, 0] + (widening - 1.0) * (draws[:, 0] - np.median(draws[:, 0]))
        return np.asarray(level + draws[:, 1] * (lt + draws[:, 2] * densities), dtype=np.float64)


def fit_needed_rank(
    parameters: Sequence[float],
    tokens: Sequence[float],
    base_loss_nats: Sequence[float],
    held: Sequence[bool],
    *,
    confidence: float,
    fixed_weight: float | None = None,
    scored: bool = True,
    others: Sequence[Runs] = (),
    offset_sd: float = 0.0,
) -> NeededRank:
    """Fit the law; any number of points will do, since priors stand where they are silent.

    Args:
        parameters, tokens, base_loss_nats, held: of each run, see `Runs`.
        confidence: of the parameters' intervals.
        fixed_weight: w: 0 counts tokens, 1 information. None leaves it to the points.
        scored: whether sizes are left out in turn to score it, in `others` too; without, `log_score` is the guess's.
        others: runs of other placements, from which this one's law is learnt as well; one entry each.
        offset_sd: prior deviation of what their ln P* differ from this one's by; 0: not at all.
    """
    data = _Data.of(Runs(parameters, tokens, base_loss_nats, held), others, offset_sd)
    draws = data.sample(np.ones(len(data.held)), fixed_weight)
    sizes = np.unique(data.lt)
    scores = []
    for size in sizes if scored and len(sizes) >= 3 else []:
        out = data.lt == size
        seen = replace(data, others=tuple(other.without(size) for other in data.others))
        scores += data.log_score(seen.sample((~out).astype(np.float64), fixed_weight, _COARSE), out)
    share = min(max(float(data.held.mean()), 1e-3), 1 - 1e-3)
    guess = share * math.log(share) + (1 - share) * math.log(1 - share)
    named = [central(draws[:, column], float(np.median(draws[:, column])), confidence) for column in range(4)]
    return NeededRank(
        level=Interval(math.exp(named[0].low), math.exp(named[0].mid), math.exp(named[0].high)),
        eta=named[1],
        weight=named[2],
        spread=named[3],
        log_score=float(np.mean(scores)) if scores else guess,
        log_score_guess=guess,
        points=len(data.held),
        points_held=int(data.held.sum()),
        tokens_range=(float(min(tokens)), float(max(tokens))),
        centre=data.centre,
        draws=tuple(tuple(row) for row in draws.tolist()),
    )


@dataclass(frozen=True)
class _Data:
    """Points as the law sees them, all (n,)."""

    lp: Array
    lt: Array
    """ln ℓ less its mean."""
    ld: Array
    """ln L0 less its mean."""
    held: Array
    centre: tuple[float, float]
    others: tuple[_Data, ...] = ()
    """Of other placements, around the same centre."""
    offset_sd: float = 0.0

    @classmethod
    def of(cls, runs: Runs, others: Sequence[Runs], offset_sd: float) -> _Data:
        lp, lt, ld, held = _logs(runs)
        centre = (float(f"{lt.mean():.9g}"), float(f"{ld.mean():.9g}"))
        beside = [_logs(other) for other in others if len(other.held)]
        return cls(
            lp, lt - centre[0], ld - centre[1], held, centre,
            tuple(cls(p, t - centre[0], d - centre[1], h, centre) for p, t, d, h in beside), offset_sd,
        )  # fmt: skip

    def without(self, size: float) -> _Data:
        """Without the points of one size (ln ℓ less its mean)."""
        kept = ~np.isclose(self.lt, size, rtol=0, atol=1e-9)
        return replace(self, lp=self.lp[kept], lt=self.lt[kept], ld=self.ld[kept], held=self.held[kept])

    def sample(self, weights: Array, fixed_weight: float | None, counts: tuple[int, ...] = _AXES) -> Array:
        """Draws (DRAWS, 4) from the posterior under point weights (n,)."""
        middle = float((self.lp.min() + self.lp.max()) / 2)
        bounds = [(middle - 7.0, middle + 7.0), (0.15, 2.2), (0.0, 1.0), (math.log(0.05), math.log(1.2))]
        for _ in range(_PASSES):
            grid, log_posterior, steps = self._grid(bounds, counts, weights, middle, fixed_weight)
            likely = grid[log_posterior > log_posterior.max() - _NEGLIGIBLE]
            bounds = [
                (
                    max(low, float(likely[:, axis].min()) - steps[axis]),
                    min(high, float(likely[:, axis].max()) + steps[axis]),
                )
                for axis, (low, high) in enumerate(bounds)
            ]
        cumulative = np.cumsum(np.exp(log_posterior - log_posterior.max()))
        at = (np.arange(DRAWS) + 0.5) / DRAWS * cumulative[-1]
        draws = grid[np.searchsorted(cumulative, at)].copy()
        draws[:, 3] = np.exp(draws[:, 3])
        return rounded(draws)

    def _grid(
        self,
        bounds: list[tuple[float, float]],
        counts: tuple[int, ...],
        weights: Array,
        middle: float,
        fixed_weight: float | None,
    ) -> tuple[Array, Array, list[float]]:
        """Points (m, 4) of (a, η, w, ln s), their ln posterior (m,) up to a constant, and the grid's steps."""
        axes = [np.linspace(low, high, count) for (low, high), count in zip(bounds, counts, strict=True)]
        if fixed_weight is not None:
            axes[2] = np.full(1, fixed_weight)
        grid = np.stack([values.reshape(-1) for values in np.meshgrid(*axes, indexing="ij")], axis=1)
        value = -0.5 * ((grid[:, 0] - middle) / LEVEL_SD) ** 2 - 0.5 * ((grid[:, 1] - ETA_PRIOR[0]) / ETA_PRIOR[1]) ** 2
        if fixed_weight is None:
            value -= 0.5 * ((grid[:, 2] - WEIGHT_PRIOR[0]) / WEIGHT_PRIOR[1]) ** 2
        value -= 0.5 * ((grid[:, 3] - SPREAD_PRIOR[0]) / SPREAD_PRIOR[1]) ** 2
        value += self.log_likelihood(grid, weights)
        nodes, shares = hermegauss(OFFSET_NODES) if self.offset_sd else (np.zeros(1), np.ones(1))
        for other in self.others:
            every, moved = np.ones(len(other.held)), grid.copy()
            rows = []
            for node, share in zip(nodes, shares / shares.sum(), strict=True):
                moved[:, 0] = grid[:, 0] + self.offset_sd * node
                rows.append(math.log(share) + other.log_likelihood(moved, every))
            value += np.logaddexp.reduce(rows, axis=0)
        steps = [float(axis[1] - axis[0]) if len(axis) > 1 else 0.0 for axis in axes]
        return grid, value, steps

    def log_likelihood(self, grid: Array, weights: Array) -> Array:
        """ln of the probability of what happened, the points weighted (n,), under each (a, η, w, ln s): (m,)."""
        value, spread = np.zeros(len(grid)), np.exp(grid[:, 3])
        for lp, lt, ld, held, weight in zip(self.lp, self.lt, self.ld, self.held, weights, strict=True):
            if weight:
                chance = _sigmoid((lp - grid[:, 0] - grid[:, 1] * (lt + grid[:, 2] * ld)) / spread)
                chance = LAPSE / 2 + (1 - LAPSE) * (chance if held else 1 - chance)
                value += weight * np.log(chance)
        return value

    def log_score(self, draws: Array, where: Array) -> list[float]:
        """ln of the probability that `draws` give to what happened at the points `where` (n,)."""
        needed = draws[:, 0] + draws[:, 1] * (self.lt[where][:, None] + np.outer(self.ld[where], draws[:, 2]))
        chance = _sigmoid((self.lp[where][:, None] - needed) / draws[:, 3]).mean(axis=1)
        chance = np.where(self.held[where] > 0, chance, 1 - chance)
        return [math.log(LAPSE / 2 + (1 - LAPSE) * float(value)) for value in chance]


def _logs(runs: Runs) -> tuple[Array, Array, Array, Array]:
    """ln P, ln ℓ, ln L0 and whether held, all (n,)."""
    lp, lt = np.log(np.asarray(runs.parameters, dtype=np.float64)), np.log(np.asarray(runs.tokens, dtype=np.float64))
    ld = np.log(np.maximum(np.asarray(runs.base_loss_nats, dtype=np.float64), 1e-3))
    return lp, lt, ld, np.asarray(runs.held, dtype=np.float64)


def _sigmoid(values: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(values, -500.0, 500.0))), dtype=np.float64)


def _logistic_scores(count: int) -> Array:
    """Evenly spread quantiles of the standard logistic distribution in a fixed, mixed order (count,)."""
    share = _mixed(count)
    return np.asarray(np.log(share / (1 - share)), dtype=np.float64)


def _normal_scores(count: int) -> Array:
    """The same of the standard normal distribution, in another order, by the logistic approximation (within 0.02 up to two sigma)."""
    share = _mixed(count, 1)
    return np.asarray(np.log(share / (1 - share)) / 1.702, dtype=np.float64)


def _mixed(count: int, start: int = 0) -> Array:
    """(k + ½)/count for all k, in the order of a golden-ratio walk, which is unrelated to the draws' order."""
    walk = np.modf((np.arange(count) + 0.5 * start) * 0.6180339887498949 + 0.37 * start)[0]
    return np.asarray((np.argsort(np.argsort(walk)) + 0.5) / count, dtype=np.float64)
