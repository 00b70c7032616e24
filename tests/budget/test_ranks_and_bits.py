"""The ladder, the engine's slots, escalation, and bits."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memupdate.budget.bits import bits_per_parameter, bits_stored
from memupdate.budget.ranks import RANK_LADDER, SERVING_RANKS, candidate_ranks, next_rank, serving_rank
from memupdate.errors import OverBudget


@pytest.mark.parametrize(("rank", "slot"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (257, 320), (512, 512)])
def test_serving_rank_is_the_smallest_slot_that_fits(rank, slot):
    assert serving_rank(rank) == slot


def test_no_slot_is_larger_than_the_engine_allows():
    with pytest.raises(OverBudget, match="513"):
        serving_rank(513)


def test_every_serving_rank_above_one_is_on_the_ladder_and_steps_at_most_double():
    assert set(SERVING_RANKS) <= set(RANK_LADDER)
    assert all(upper <= 2 * lower for lower, upper in itertools.pairwise(RANK_LADDER))


@pytest.mark.parametrize(
    ("rank", "factor", "limit", "expected"),
    [(8, 2.0, 64, 16), (12, 2.0, 64, 24), (8, 1.1, 64, 12), (48, 2.0, 64, 64), (64, 2.0, 64, None), (20, 1.0, 64, 24)],
)
def test_next_rank(rank, factor, limit, expected):
    assert next_rank(rank, factor, limit) == expected


@given(st.integers(1, 600), st.floats(1, 8), st.integers(1, 700))
def test_next_rank_grows_and_keeps_the_limit(rank, factor, limit):
    found = next_rank(rank, factor, limit)
    assert (found is None) == (rank >= limit)
    assert found is None or rank < found <= limit


def test_candidates_are_the_ladder_within_the_bounds_and_never_below_the_present_rank():
    assert candidate_ranks(8, 64, 0) == (8, 12, 16, 24, 32, 48, 64)
    assert candidate_ranks(8, 50, 20) == (20, 24, 32, 48, 50)
    assert candidate_ranks(10, 10, 0) == (10,)
    assert candidate_ranks(8, 64, 65) == ()


def test_bits_are_base_loss_over_ln_two():
    assert bits_stored(math.log(2), 1000) == pytest.approx(1000)
    # Platform trial: 256 facts, 1,252 tokens, base loss 6.22 nats, rank 1 of 2,880 parameters: drop 4.33 gave 2.72
    # bits.
    assert bits_per_parameter(bits_stored(6.22 - 1.89, 1252), 2880) == pytest.approx(2.72, abs=0.01)
    assert bits_stored(-0.1, 10) == 0
