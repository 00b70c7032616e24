"""Drift: by how much batches missed the plans that were made for them, in the plans' own deviations.

Rule: z of a batch is `(ln measured − ln predicted) / σ`, σ from the plan's interval of the mean loss; the next fit's intervals of loss,
harm and needed rank are widened by the root mean square of the last `LAST` z, where it is above 1 and there are at least `ENOUGH`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from memupdate.law.points import Interval

LAST = 20
ENOUGH = 3
MOST = 4.0
"""Widening is cut here: a law that is off by more wants a new calibration, not a wider interval."""
_FLOOR_NATS = 1e-4
_MIN_SIGMA = 0.02


@dataclass(frozen=True)
class PlannedPoint:
    """A batch's loss as planned and as measured at the planned rank, nats per target token."""

    batch: int
    predicted: Interval
    measured_nats: float
    confidence: float
    """Of the interval."""

    @property
    def z(self) -> float:
        """How many deviations the measurement lies above the prediction."""
        width = NormalDist().inv_cdf((1 + self.confidence) / 2)
        mid, measured = max(self.predicted.mid, _FLOOR_NATS), max(self.measured_nats, _FLOOR_NATS)
        end = self.predicted.high if measured > mid else self.predicted.low
        sigma = max(abs(math.log(max(end, _FLOOR_NATS) / mid)) / width, _MIN_SIGMA)
        return math.log(measured / mid) / sigma


@dataclass(frozen=True)
class Drift:
    """What the last batches say about the law that planned them."""

    batches: int
    rms_z: float
    """1 where intervals are as wide as they should be; 0 without batches."""
    mean_z: float
    """Above 0: losses came out higher than planned."""
    widening: float
    """Factor on the next fit's intervals, at least 1."""


def drift_of(planned: Sequence[PlannedPoint]) -> Drift:
    """Drift over the last batches, oldest first in `planned`."""
    scores = [point.z for point in planned[-LAST:]]
    if not scores:
        return Drift(0, 0.0, 0.0, 1.0)
    rms = math.sqrt(sum(z * z for z in scores) / len(scores))
    widening = min(max(1.0, rms), MOST) if len(scores) >= ENOUGH else 1.0
    return Drift(len(scores), rms, sum(scores) / len(scores), widening)
