"""`judge`: every target token must be the argmax and clear the probability asked for; what failed is named."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memupdate.facts.render import Example
from memupdate.verification.recall import FactProof, judge

EXAMPLE = Example("sha256:1", "chat", "Who leads Acme?", "Wanda", (1, 2), (10, 11, 12))


def verdict(probabilities: list[float], greedy: list[int], minimum: float = 0.5) -> FactProof:
    return judge(EXAMPLE, probabilities, greedy, min_probability=minimum, decode=lambda token: f"<{token}>")


def test_proved() -> None:
    proof = verdict([0.9, 0.5, 0.99], [10, 11, 12])
    assert proof == FactProof("sha256:1", "Who leads Acme?", "Wanda", True, 0.5)
    assert proof.explain() == "'Who leads Acme?' → 'Wanda': proved, smallest probability 0.500"


def test_another_token_comes_out() -> None:
    proof = verdict([0.9, 0.2, 0.1], [10, 77, 78])
    assert not proof.proved
    assert (proof.failed_position, proof.failed_token, proof.emitted_token) == (1, "<11>", "<77>")
    assert proof.min_probability == 0.1
    assert proof.explain() == "'Who leads Acme?' → 'Wanda': token 1 '<11>' is not what comes out, '<77>' is"


def test_the_end_token_counts() -> None:
    proof = verdict([0.9, 0.9, 0.3], [10, 11, 13])
    assert (proof.proved, proof.failed_position, proof.emitted_token) == (False, 2, "<13>")


def test_the_right_token_but_too_weak() -> None:
    proof = verdict([0.9, 0.49, 0.99], [10, 11, 12])
    assert (proof.proved, proof.failed_position) == (False, 1)
    assert proof.failed_token == proof.emitted_token == "<11>"
    assert proof.explain() == "'Who leads Acme?' → 'Wanda': token 1 '<11>' has probability 0.490 only"
    assert verdict([0.9, 0.49, 0.99], [10, 11, 12], minimum=0.0).proved


def test_a_wrong_token_is_named_before_an_earlier_weak_one() -> None:
    proof = verdict([0.4, 0.9, 0.1], [10, 11, 13])
    assert (proof.failed_position, proof.failed_token, proof.emitted_token) == (2, "<12>", "<13>")


def test_probable_enough_but_not_the_argmax_is_not_proved() -> None:
    """A tie, or an engine whose numbers and choices disagree."""
    assert not verdict([0.9, 0.5, 0.9], [10, 77, 12]).proved


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("minimum", [0.0, 0.5])
def test_not_a_number_is_no_proof(position: int, minimum: float) -> None:
    probabilities = [0.9, 0.9, 0.9]
    probabilities[position] = math.nan
    proof = verdict(probabilities, [10, 11, 12], minimum=minimum)
    assert (proof.proved, proof.failed_position) == (False, position)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        verdict([0.9, 0.9], [10, 11])


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(10, 12)), min_size=3, max_size=3),
    st.floats(0, 1),
)
def test_proved_iff_every_token_is_right_and_clears_the_minimum(
    tokens: list[tuple[float, int]], minimum: float
) -> None:
    probabilities, greedy = [p for p, _ in tokens], [g for _, g in tokens]
    proof = verdict(probabilities, greedy, minimum)
    right = [g == t for g, t in zip(greedy, EXAMPLE.target_ids, strict=True)]
    assert proof.proved == (all(right) and min(probabilities) >= minimum)
    assert (proof.failed_position is None) == proof.proved
    assert proof.min_probability == min(probabilities)
