"""How many more batches like the recent ones a memory takes: room by the law, over tokens that a batch adds.

Invariant: `until.low <= until.mid <= until.high`; faster growth never gives more batches; with too few batches nothing
is claimed. Time is that of the releases, never of the clock, so that one ledger has one forecast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from memupdate.law.points import Interval

WINDOW = timedelta(days=7)
"""“This week”, counted back from the newest release."""
MIN_BATCHES = 3
"""Fewer say nothing about the next ones."""
RECENT_BATCHES = 10
"""Looked at where the week has fewer than `MIN_BATCHES`."""
RULE = (
    "Growth is the live target tokens that a batch adds (compactions left out), over the batches released in the seven days "
    f"up to the newest release, or over the last {RECENT_BATCHES} where that week has fewer than {MIN_BATCHES}. Room is what the law's "
    "pessimistic end still allows within the policy's harm budget and share of facts proved. Batches left are room over "
    "growth; the interval is Student's t over the batches' growth, at the law's confidence."
)


@dataclass(frozen=True)
class Growth:
    """How a collection grew by one release."""

    released_at: datetime
    tokens_added: int
    """Live target tokens after it less those before; negative where facts went."""


@dataclass(frozen=True)
class Forecast:
    """Batches until the room ends, as a stated rule counts them."""

    batches_seen: int
    """That the growth was taken from."""
    tokens_per_batch: Interval | None
    """None where there are too few batches to say."""
    batches_per_day: float | None
    """None where they span less than a day."""
    until_policy_limit: Interval | None
    """Batches until no rank that the policy allows holds all live facts: compact, or raise the limit. `high` is
    infinite where the growth may be nothing."""
    until_engine_limit: Interval | None
    """The same for the largest rank that vLLM serves."""
    note: str
    """In words what the figures cannot say; empty otherwise."""


def forecast(growth: Sequence[Growth], *, room_policy: int, room_engine: int, confidence: float) -> Forecast:
    """Room over growth.

    Args:
        growth: of all releases, oldest first.
        room_policy: target tokens still free at the policy's largest rank.
        room_engine: target tokens still free at the largest rank that the engine serves.
        confidence: of the intervals, in (0, 1).
    """
    recent = _recent(growth)
    if len(recent) < MIN_BATCHES:
        note = f"too few batches to say: {len(recent)} released, {MIN_BATCHES} needed"
        return Forecast(len(recent), None, None, None, None, note)
    rate = _mean_interval([float(item.tokens_added) for item in recent], confidence)
    per_day = _per_day(recent)
    if rate.mid <= 0:
        note = "the live facts did not grow over these batches: no end in sight"
        return Forecast(len(recent), rate, per_day, None, None, note)
    return Forecast(len(recent), rate, per_day, _batches(room_policy, rate), _batches(room_engine, rate), "")


def _recent(growth: Sequence[Growth]) -> Sequence[Growth]:
    if not growth:
        return ()
    week = [item for item in growth if growth[-1].released_at - item.released_at <= WINDOW]
    return week if len(week) >= MIN_BATCHES else growth[-RECENT_BATCHES:]


def _mean_interval(values: Sequence[float], confidence: float) -> Interval:
    """Student's t for the mean: x̄ ± t(n − 1) · s / √n."""
    count = len(values)
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    reach = t_reach(count - 1, confidence) * math.sqrt(variance / count)
    return Interval(mean - reach, mean, mean + reach)


def t_reach(degrees: int, confidence: float) -> float:
    """t with P(|T| <= t) = `confidence` for Student's T of so many degrees of freedom.

    By bisection on Abramowitz and Stegun 26.7.3 and 26.7.4, which are exact for whole degrees. Importing SciPy for it
    would take a fifth of the time in which a report is to be there; the tests compare with it.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _t_inside(theta: float, degrees: int) -> float:
    """P(|T| <= √ν·tan θ), A(t|ν) in the source: a finite sum in cos² θ."""
    square, odd = math.cos(theta) ** 2, degrees % 2
    term = total = 1.0 if degrees > 1 else 0.0
    for step in range(1, degrees // 2):
        term *= square * (2 * step - 1 + odd) / (2 * step + odd)
        total += term
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    return math.sin(theta) * total


def _batches(room: int, rate: Interval) -> Interval:
    return Interval(room / rate.high, room / rate.mid, room / rate.low if rate.low > 0 else math.inf)


def _per_day(recent: Sequence[Growth]) -> float | None:
    span = recent[-1].released_at - recent[0].released_at
    return (len(recent) - 1) / (span / timedelta(days=1)) if span >= timedelta(days=1) else None
