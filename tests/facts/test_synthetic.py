"""Calibration facts: a seed is a list, a longer list begins with the shorter one, and no two facts contradict each other."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from memupdate.facts.model import Fact
from memupdate.facts.synthetic import synthetic_facts


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 2**32))
@settings(max_examples=50)
def test_longer_list_begins_with_the_shorter(one: int, other: int, seed: int) -> None:
    short, long = sorted((one, other))
    assert synthetic_facts(long, seed=seed)[:short] == synthetic_facts(short, seed=seed)


def test_facts_are_distinct_and_answer_four_kinds_of_question() -> None:
    facts = synthetic_facts(400, seed=7)
    assert len(facts) == 400
    assert len({f.key for f in facts}) == len({f.prompt for f in facts}) == 400
    assert {f.relation for f in facts} == {"chief executive", "headquarters", "phone number", "founding year"}
    assert all(f.subject and f.subject in f.prompt for f in facts)
    assert all(f.target.isdigit() and len(f.target) == 7 for f in facts if f.relation == "phone number")
    assert all(1800 <= int(f.target) <= 2030 for f in facts if f.relation == "founding year")


def test_seeds_share_nothing() -> None:
    one, other = synthetic_facts(100, seed=1), synthetic_facts(100, seed=2)
    assert not {f.prompt for f in one} & {f.prompt for f in other}


def test_the_embedded_model_knows_none(known: list[Fact]) -> None:
    assert not {f.key for f in known} & {f.key for f in synthetic_facts(400, seed=0)}
