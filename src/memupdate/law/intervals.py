"""Small statistics that every law here shares: intervals from draws, R², mean percentage error.

Invariant: an `Interval` made here is finite and ordered.
"""

from __future__ import annotations

import numpy as np

from memupdate.law.points import Interval
from memupdate.law.solver import Array

_ERROR_FLOOR = 1e-6
"""Smallest value that a percentage error is taken relative to."""


def central(draws: Array, mid: float, confidence: float) -> Interval:
    """The central interval of `draws` (draws,) at `confidence`, widened where it would leave out `mid`."""
    tail = (1 - confidence) / 2
    low, high = (float(value) for value in np.quantile(draws, (tail, 1 - tail)))
    return Interval(min(low, mid), mid, max(high, mid))


def r_squared(measured: Array, predicted: Array) -> float | None:
    """1 − residual / total sum of squares; None where nothing varies."""
    total = float(np.sum((measured - np.mean(measured)) ** 2))
    if total < 1e-12:
        return None
    return 1 - float(np.sum((measured - predicted) ** 2)) / total


def mean_percentage_error(measured: Array, predicted: Array) -> float:
    """MAPE as a share (0.05 is 5 %)."""
    return float(np.mean(np.abs(predicted - measured) / np.maximum(np.abs(measured), _ERROR_FLOOR)))
