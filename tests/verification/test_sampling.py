"""The size of a sample against the probability that it shows no failure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memupdate.verification.sampling import SampleRule, confident_size, draw

SHARES = st.floats(0.001, 0.999)


@given(SHARES, SHARES)
def test_a_confident_sample_is_the_smallest_that_says_it(confidence: float, share: float) -> None:
    size = confident_size(confidence, share)
    assert (1 - share) ** size <= (1 - confidence) * (1 + 1e-6)
    assert size == 1 or (1 - share) ** (size - 1) > (1 - confidence) * (1 - 1e-6)


def test_99_per_cent_sure_that_less_than_1_per_cent_fail() -> None:
    assert confident_size(0.99, 0.01) == 459  # ln 0.01 / ln 0.99 = 458.2
    rule = SampleRule("confident", 0.99, 0.01)
    assert [rule.size(total) for total in (0, 70, 459, 2000)] == [0, 70, 459, 459]
    assert rule.statement(70, 70) == "all 70"
    assert rule.statement(459, 2000) == (
        "459 of 2,000, which without a failure says with 99.0% confidence that under 0.01 of them fail"
    )


def test_a_number_and_all() -> None:
    assert SampleRule(16, 0.99, 0.01).size(2000) == 16
    assert SampleRule(16, 0.99, 0.01).size(3) == 3
    assert SampleRule("all", 0.99, 0.01).size(2000) == 2000
    assert "14.9% confidence" in SampleRule(16, 0.99, 0.01).statement(16, 2000)


@given(st.lists(st.integers()), st.integers(0, 20), st.integers(0, 5))
def test_a_draw_is_the_same_for_a_seed_and_in_order(items: list[int], count: int, seed: int) -> None:
    pairs = list(enumerate(items))
    drawn = draw(pairs, count, seed=seed)
    assert drawn == draw(pairs, count, seed=seed)
    assert len(drawn) == min(count, len(items))
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(pairs)


@pytest.mark.parametrize("seed", range(3))
def test_draws_differ_between_seeds(seed: int) -> None:
    assert draw(range(1000), 20, seed=seed) != draw(range(1000), 20, seed=seed + 1)
