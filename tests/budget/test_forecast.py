"""The forecast follows its rule: the window, the interval, and silence where there is too little to go by."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit

from memupdate.budget.forecast import MIN_BATCHES, RECENT_BATCHES, Growth, forecast, t_reach

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
TOKENS = st.lists(st.integers(1, 5000), min_size=MIN_BATCHES, max_size=30)


def daily(tokens: list[int]) -> list[Growth]:
    return [Growth(START + timedelta(days=day), added) for day, added in enumerate(tokens)]


def hourly(tokens: list[int]) -> list[Growth]:
    return [Growth(START + timedelta(hours=hour), added) for hour, added in enumerate(tokens)]


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30, 101])
@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.99])
def test_students_t_agrees_with_scipy(degrees: int, confidence: float) -> None:
    assert t_reach(degrees, confidence) == pytest.approx(float(stdtrit(degrees, (1 + confidence) / 2)), rel=1e-9)


@pytest.mark.parametrize("count", range(MIN_BATCHES))
def test_too_few_batches_say_nothing(count: int) -> None:
    found = forecast(daily([100] * count), room_policy=1000, room_engine=5000, confidence=0.9)
    assert found.until_policy_limit is found.until_engine_limit is found.tokens_per_batch is None
    assert found.note == f"too few batches to say: {count} released, 3 needed"


def test_equal_batches_are_divided_exactly() -> None:
    found = forecast(daily([100] * 5), room_policy=1000, room_engine=5000, confidence=0.9)
    assert (found.batches_seen, found.batches_per_day) == (5, 1.0)
    assert found.until_policy_limit is not None
    assert found.until_engine_limit is not None
    assert (found.until_policy_limit.low, found.until_policy_limit.mid, found.until_policy_limit.high) == (10, 10, 10)
    assert found.until_engine_limit.mid == 50


def test_only_the_week_up_to_the_newest_release_counts_where_it_has_enough() -> None:
    found = forecast(daily([9000] * 20 + [100] * 8), room_policy=1000, room_engine=1000, confidence=0.9)
    assert found.batches_seen == 8
    assert found.until_policy_limit is not None
    assert found.until_policy_limit.mid == 10


def test_a_slow_line_looks_at_its_last_batches() -> None:
    monthly = [Growth(START + timedelta(days=30 * month), 100) for month in range(15)]
    found = forecast(monthly, room_policy=1000, room_engine=1000, confidence=0.9)
    assert found.batches_seen == RECENT_BATCHES
    assert found.batches_per_day == pytest.approx(1 / 30)


def test_shrinking_facts_have_no_end_in_sight() -> None:
    found = forecast(daily([100, -80, -30]), room_policy=1000, room_engine=1000, confidence=0.9)
    assert found.until_policy_limit is None
    assert "no end in sight" in found.note


def test_growth_that_may_be_nothing_has_an_open_end() -> None:
    found = forecast(daily([5, 400, 5]), room_policy=1000, room_engine=1000, confidence=0.9)
    assert found.until_policy_limit is not None
    assert math.isinf(found.until_policy_limit.high)
    assert found.until_policy_limit.low > 0


def test_batches_of_one_morning_give_no_rate_per_day() -> None:
    assert forecast(hourly([10] * 5), room_policy=10, room_engine=10, confidence=0.9).batches_per_day is None


@given(TOKENS, st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0.5, 0.99))
def test_intervals_are_ordered_and_more_room_is_never_fewer_batches(
    tokens: list[int], room: int, more: int, confidence: float
) -> None:
    found = forecast(hourly(tokens), room_policy=room, room_engine=room + more, confidence=confidence)
    near, far = found.until_policy_limit, found.until_engine_limit
    assert near is not None
    assert far is not None
    assert 0 <= near.low <= near.mid <= near.high
    assert near.low <= far.low
    assert near.mid <= far.mid
    faster = forecast(
        hourly([2 * n for n in tokens]), room_policy=room, room_engine=room + more, confidence=confidence
    ).until_policy_limit
    assert faster is not None
    assert faster.mid <= near.mid
