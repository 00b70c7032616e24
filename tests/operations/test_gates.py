"""What holds a release back, by the kind of its batch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memupdate.ledger.records import Batch, BatchKind
from memupdate.operations.gates import Gates
from memupdate.operations.proving import MemoryProof
from memupdate.policies import load_policy
from memupdate.verification.gone import DeadAnswer
from memupdate.verification.inprocess import LocalityResult
from memupdate.verification.recall import FactProof

BATCH = Batch(
    id=3, collection="acme", source=1, state="trained", publish=True, policy_json="{}", plan_json=None, failure_reason=None,
    created_at_utc="", updated_at_utc="", facts_new=1, facts_superseding=0, facts_unchanged=0, facts_proved=0, facts_unproved=0,
    release=None,
)  # fmt: skip
GOOD = FactProof("f1", "Q?", "A", True, 0.8)
BAD = replace(GOOD, fact_id="f2", proved=False, failed_position=0, failed_token="A", emitted_token="B")
SAID = DeadAnswer("d1", "Old?", "X", is_greedy=True, probability=0.9)
LIKELY = DeadAnswer("d2", "Old?", "Y", is_greedy=False, probability=0.2, base_probability=0.0)
BASES = DeadAnswer("d3", "Old?", "Z", is_greedy=True, probability=0.9, base_is_greedy=True, base_probability=0.9)
FINE = LocalityResult(10, 10, ())


def gates(kind: BatchKind, publish: str = "all") -> Gates:
    policy = load_policy("standard", overrides={"proof.publish": publish})
    return Gates(policy, replace(BATCH, kind=kind), {"f1", "f2"})


def proof(*facts: FactProof, dead: tuple[DeadAnswer, ...] = (), kl_nats: float = 0.0) -> MemoryProof:
    return MemoryProof(facts, 0.1, FINE, kl_nats, dead)


@pytest.mark.parametrize("kind", ["add", "compact", "retract"])
def test_a_good_memory_passes(kind: BatchKind) -> None:
    assert gates(kind).reasons(proof(GOOD)) == []
    assert gates(kind).reasons(proof()) == [], "nothing live, nothing to prove"


def test_dead_answers_hold_back_what_promises_to_remove_them() -> None:
    shown = proof(GOOD, dead=(SAID, LIKELY, BASES))
    assert gates("add").reasons(shown) == []
    assert [gates(kind).left_over(shown.dead) for kind in ("add", "retract", "compact")] == [
        [],
        [SAID, BASES],
        [SAID, LIKELY],
    ]
    assert gates("retract").reasons(shown) == ["2 of 3 retracted answers are not gone"]
    assert gates("compact").reasons(shown) == ["2 of 3 superseded or retracted answers are not gone"]
    assert len(gates("compact").details(shown)) == 2
    assert "probability 0.200, less than 0.1 allowed" in gates("compact").details(shown)[1]


def test_what_is_left_of_superseded_answers_is_told() -> None:
    shown = proof(GOOD, dead=(SAID, LIKELY, BASES))
    assert gates("add").remarks(shown) == ["still answered as before: 'Old?' → 'X'"], "not what the base model says"
    many = proof(GOOD, dead=(SAID,) * 12)
    assert gates("add").remarks(many)[10:] == ["and 2 more superseded or retracted answers"]
    passed = proof(GOOD, dead=(BASES, replace(LIKELY, probability=0.01)))
    assert gates("compact").remarks(passed) == [
        "1 superseded or retracted answers are proved gone",
        "the base model itself says so: 'Old?' → 'Z'",
    ]


def test_a_stand_in_must_be_proved_whatever_is_published() -> None:
    assert gates("add", "proved").reasons(proof(GOOD, BAD)) == []
    assert gates("retract", "proved").reasons(proof(GOOD, BAD)) == [
        "1 answers that stand in for retracted facts are not proved"
    ]
    older = replace(BAD, fact_id="old")
    for kind in ("add", "compact", "retract"):
        assert gates(kind, "proved").reasons(proof(GOOD, older)) == ["1 older facts are no longer proved"]


def test_advice_names_what_helps() -> None:
    harmed = proof(GOOD, kl_nats=9.0)
    assert "harm is 9.0000 nats" in gates("add").reasons(harmed)[0]
    assert "`memupdate compact -c acme`" in gates("add").advice(harmed)
    assert "memupdate compact" not in gates("compact").advice(harmed)
    assert "max_rank" in gates("compact").advice(proof(BAD))
    assert "retraction.answer" in gates("retract").advice(proof(GOOD, dead=(SAID,)))
    assert "max_dead_probability" in gates("compact").advice(proof(GOOD, dead=(LIKELY,)))
