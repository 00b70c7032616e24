"""The needed rank: recovered from simulated runs, monotone in every draw, intervals that cover, odd points that do not rule."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memupdate.law.needed_rank import NeededRank, Size, fit_needed_rank

PER_RANK = 11_520
TRUTH = (math.log(3 * PER_RANK), 0.9, 0.3, 0.15)
"""(ln P* at 200 tokens of 3 nats, η, w, s)."""


def log_needed(tokens, nats):
    level, eta, weight, _ = TRUTH
    return level + eta * (math.log(tokens / 200) + weight * math.log(nats / 3))


def simulated(seed, count=24):
    """Runs at ranks around what they need, as an adaptive calibration makes them."""
    rng = np.random.default_rng(seed)
    runs = []
    for _ in range(count):
        tokens, nats = math.exp(rng.uniform(math.log(30), math.log(2000))), float(rng.choice([2.5, 3.0, 8.0]))
        wanted = math.exp(log_needed(tokens, nats) + rng.normal(0, 0.7)) / PER_RANK
        rank = min((1, 2, 4, 8, 16, 32, 64), key=lambda step: abs(math.log(step / wanted)))
        luck = rng.logistic(0, TRUTH[3])
        runs.append((rank * PER_RANK, tokens, nats, math.log(rank * PER_RANK) >= log_needed(tokens, nats) + luck))
    return runs


def fitted(runs, **options) -> NeededRank:
    return fit_needed_rank(*(list(column) for column in zip(*runs, strict=True)), confidence=0.9, **options)


FIT = fitted(simulated(1))


def test_simulated_runs_give_their_law_back():
    fit = fitted(simulated(3, count=200))
    assert fit.eta.low < 0.9 < fit.eta.high
    assert fit.weight.low < 0.3 < fit.weight.high
    for tokens in (60, 400, 1500):
        needed = fit.needed(Size(tokens, 3.0), 0.9)
        assert needed.mid == pytest.approx(math.exp(log_needed(tokens, 3.0)), rel=0.2)
    assert fit.log_score > fit.log_score_guess + 0.2


def test_intervals_of_the_needed_rank_cover():
    inside, beyond, asked = 0, 0, 0
    for seed in range(60):
        fit, rng = fitted(simulated(seed)), np.random.default_rng(1000 + seed)
        for _ in range(5):
            tokens = math.exp(rng.uniform(math.log(40), math.log(1500)))
            future = math.exp(log_needed(tokens, 3.0) + rng.logistic(0, TRUTH[3]))
            interval = fit.needed(Size(tokens, 3.0), 0.9)
            inside += interval.low <= future <= interval.high
            beyond += future > interval.high
            asked += 1
    assert 0.80 <= inside / asked <= 0.98
    assert beyond / asked <= 0.10


@settings(max_examples=60)
@given(
    st.floats(500, 5e7), st.floats(5, 1e6), st.floats(0.2, 12), st.floats(1, 40), st.floats(0, 0.4), st.floats(1, 4)
)  # fmt: skip
def test_no_end_improves_with_more_to_hold_or_worsens_with_more_room(parameters, tokens, nats, factor, sd, widening):
    here = FIT.predict(parameters, Size(tokens, nats, sd), 0.9, widening=widening)
    others = (
        FIT.predict(parameters, Size(factor * tokens, nats, sd), 0.9, widening=widening),
        FIT.predict(parameters, Size(tokens, factor * nats, sd), 0.9, widening=widening),
    )
    roomier = FIT.predict(factor * parameters, Size(tokens, nats, sd), 0.9, widening=widening)
    for end in ("low", "mid", "high"):
        assert 0 <= getattr(here, end) <= 1
        assert all(getattr(other, end) <= getattr(here, end) + 1e-12 for other in others)
        assert getattr(roomier, end) >= getattr(here, end) - 1e-12


@settings(max_examples=60)
@given(st.floats(5, 1e5), st.floats(0.2, 12), st.floats(1, 1e5), st.floats(0.01, 12))
def test_cheap_tokens_added_never_look_like_room(tokens, nats, more, cheap):
    together = (tokens * nats + more * cheap) / (tokens + more)
    alone, joined = (FIT.predict(4 * PER_RANK, s, 0.9) for s in (Size(tokens, nats), Size(tokens + more, together)))
    assert joined.low <= alone.low + 1e-9
    assert joined.mid <= alone.mid + 1e-9


def test_drift_and_a_guessed_base_loss_widen():
    parameters = 4 * PER_RANK
    sure, wide = (FIT.predict(parameters, Size(200, 3.0), 0.9, widening=factor) for factor in (1.0, 2.0))
    assert wide.low < sure.low
    measured, guessed = (FIT.needed(Size(200, 3.0, sd), 0.9) for sd in (0.0, 0.8))
    assert guessed.high / guessed.low > measured.high / measured.low


def test_one_odd_run_moves_little():
    odd = (64 * PER_RANK, 60.0, 3.0, False)  # a set that sixteen times the rank it needs did not hold
    before, after = (FIT if not extra else fitted([*simulated(1), *extra]) for extra in ((), (odd,)))
    needed = [fit.needed(Size(400, 3.0), 0.9) for fit in (before, after)]
    assert needed[1].mid == pytest.approx(needed[0].mid, rel=0.35)


@pytest.mark.parametrize("held", [True, False])
def test_points_of_one_outcome_still_give_a_law(held):
    runs = [(rank * PER_RANK, tokens, 3.0, held) for rank in (1, 4) for tokens in (50.0, 200.0)]
    fit = fitted(runs)
    chance = fit.predict(4 * PER_RANK, Size(50), 0.9)
    assert chance.low <= chance.mid <= chance.high
    assert (chance.mid > 0.5) is held


def test_fixing_the_weight_counts_tokens_or_information():
    assert {row[2] for row in fitted(simulated(1), fixed_weight=0.0).draws} == {0.0}
    information = fitted(simulated(1), fixed_weight=1.0)
    assert all(row[2] == 1.0 for row in information.draws)
    # Half the tokens at twice the loss are the same information.
    one = information.predict(3 * PER_RANK, Size(200, 3.0), 0.9)
    other = information.predict(3 * PER_RANK, Size(100, 6.0), 0.9)
    assert one.mid == pytest.approx(other.mid)
