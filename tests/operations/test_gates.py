"""What holds a release back, by the kind of its batch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memupdate.facts.render import Example
from memupdate.ledger.records import Batch, BatchKind
from memupdate.operations.gates import Gates
from memupdate.operations.measuring import Measured
from memupdate.operations.proving import MemoryProof, near, smallest
from memupdate.policies import load_policy
from memupdate.verification.general_text import TextMeasure
from memupdate.verification.gone import DeadAnswer
from memupdate.verification.inprocess import LocalityResult
from memupdate.verification.neighbours import GUESSED, PROBE, SAME_SUBJECT
from memupdate.verification.questions import GIVEN, HELD_OUT, SYSTEM, TEMPLATE, Answered, Question
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


def measured(*answers: tuple[str, str, str], ratio: float = 1.0) -> Measured:
    """Answers as (measure, part, judged)."""
    example = Example("f1", "chat", "Q?", "A", (1,), (2,))
    asked = tuple(
        Answered(Question(measure, part, "f1", example), judged, "A", None if judged == "exact" else "B", 0.9)  # type: ignore[arg-type]
        for measure, part, judged in answers
    )
    return Measured(asked, "general.txt", TextMeasure(100, 4.0, 4.0 * ratio, 0.01))


ASKED = measured(
    ("generality", HELD_OUT, "exact"),
    ("generality", TEMPLATE, "contained"),
    ("generality", SYSTEM, "other"),
    ("locality", PROBE, "exact"),
    ("locality", SAME_SUBJECT, "normalised"),
    ("locality", SAME_SUBJECT + GUESSED, "other"),
    ("portability", GIVEN, "other"),
    ratio=1.02,
)


def bounded(**bounds: float) -> Gates:
    overrides = {f"proof.{name}": value for name, value in bounds.items()}
    return Gates(load_policy("standard", overrides=overrides), BATCH, {"f1"})


def test_measures_hold_nothing_back_unless_the_policy_says_so() -> None:
    assert bounded().reasons(replace(proof(GOOD), measured=ASKED)) == []
    assert bounded().reasons(proof(GOOD)) == bounded(min_generality=1.0, min_locality=1.0).reasons(proof(GOOD)) == []


def test_bounds_count_what_they_name_and_nothing_else() -> None:
    shown = replace(proof(GOOD), measured=ASKED)
    assert bounded(min_generality=0.5, min_locality=0.5, max_perplexity_increase=0.03).reasons(shown) == []
    gates_ = bounded(min_generality=0.51, min_locality=0.51, max_perplexity_increase=0.01)
    assert gates_.reasons(shown) == [
        "generality is 50.0%: 1 of 2 phrasings that were not trained on are answered word for word, 51.0% wanted",
        "locality is 50.0%: 1 of 2 probes and near neighbours are answered as before, 51.0% wanted",
        "perplexity of general text (general.txt) is up by 2.0%, 1.0% allowed",
    ]
    assert gates_.details(shown) == [f"{part}: 'Q?': 'B', not 'A'" for part in (TEMPLATE, SAME_SUBJECT)]


def test_advice_for_generality_is_wordings_and_for_harm_rank() -> None:
    shown = replace(proof(GOOD), measured=ASKED)
    assert "facts.train_paraphrases" in bounded(min_generality=0.9).advice(shown)
    assert "rank buys harmlessness" in bounded(min_locality=0.9).advice(shown)
    assert "rank buys harmlessness" in bounded(min_generality=0.9, min_locality=0.9).advice(shown)


def test_facts_near_the_bound_are_named_on_both_sides_of_it() -> None:
    facts = [replace(GOOD, fact_id=f"f{p}", min_probability=p) for p in (0.9, 0.519, 0.521, 0.481, 0.3)]
    assert [(n.fact_id, n.min_probability) for n in near(facts, 0.5)] == [("f0.481", 0.481), ("f0.519", 0.519)]
    assert smallest(facts) == 0.3
    assert smallest([]) is None
