"""Questions near the facts: none that a live fact answers, all of a kind with what they are made from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memupdate.facts.model import Fact, prompt_key
from memupdate.verification.neighbours import (
    GUESSED,
    SAME_RELATION,
    SAME_SUBJECT,
    changed_keys,
    is_guess,
    made_neighbours,
    nearness,
    sort_probe,
)

PROMPTS = {"head": "Who leads {}?", "city": "Where is {} based?", "born": "Where was {} born?"}


def fact(subject: str, relation: str) -> Fact:
    return Fact(PROMPTS[relation].format(subject), f"{subject}'s {relation}", subject=subject, relation=relation)


LIVE = [fact("Acme", "head"), fact("Acme", "city"), fact("Bolt", "city"), fact("Ida", "born")]


def test_wordings_are_put_to_others_of_their_kind() -> None:
    found = {(n.part, n.asked.prompt) for n in made_neighbours(LIVE, LIVE, [], seed=0)}
    assert found <= {(SAME_RELATION, "Who leads Bolt?"), (SAME_SUBJECT, "Who leads Bolt?")}
    assert len(found) == 1, "Ida is no company, and each question is asked once"


def test_probes_say_of_which_kind_a_subject_is() -> None:
    probes = [fact("Cog", "city"), fact("Otto", "born")]
    prompts = {n.asked.prompt for n in made_neighbours(LIVE, LIVE, probes, seed=0)}
    assert prompts <= {"Who leads Bolt?", "Who leads Cog?"}
    assert not any("Where is Cog" in prompt or "Otto" in prompt for prompt in prompts)


def test_without_subjects_there_are_no_neighbours() -> None:
    assert made_neighbours([Fact("Who?", "I")], [Fact("Who?", "I")], [], seed=0) == []


subjects, relations = st.sampled_from(["Acme", "Bolt", "Cog", "Dune"]), st.sampled_from(sorted(PROMPTS))
worlds = st.lists(st.builds(fact, subjects, relations), max_size=10, unique_by=lambda f: f.key)


@given(worlds, worlds, st.integers(0, 3))
def test_no_neighbour_asks_what_is_answered_already(live: list[Fact], probes: list[Fact], seed: int) -> None:
    found = made_neighbours(live, live, probes, seed=seed)
    taken = changed_keys(live) | changed_keys(probes)
    assert not taken & {key for n in found for key in (n.asked.key, prompt_key(n.asked.prompt))}
    assert len({n.asked.key for n in found}) == len(found) <= 2 * len(live)
    assert found == made_neighbours(live, live, probes, seed=seed)
    by_id = {f.id: f for f in live}
    for neighbour in found:
        near = by_id[neighbour.fact_id or ""]
        same = neighbour.asked.relation == near.relation, neighbour.asked.subject == near.subject
        assert same == ((True, False) if neighbour.part == SAME_RELATION else (False, True))
        assert neighbour.asked.prompt == PROMPTS[neighbour.asked.relation or ""].format(neighbour.asked.subject)


def test_given_probes_are_sorted_by_what_they_are_near_to() -> None:
    near = nearness(LIVE)
    assert sort_probe(fact("ACME", "born"), near) == SAME_SUBJECT
    assert sort_probe(fact("Zed", "city"), near) == SAME_RELATION
    assert sort_probe(Fact("What is 2 + 2?", "4"), near) == ""
    assert [is_guess(part) for part in (SAME_SUBJECT, SAME_SUBJECT + GUESSED)] == [False, True]
