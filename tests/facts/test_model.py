"""A fact's identity and key."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memupdate.facts.model import Fact, normalise, prompt_key
from memupdate.storage import canonical_json, text_sha256

FACT = Fact("Who leads Acme?", "Wanda")


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "Who heads Acme?"},
        {"target": "Otto"},
        {"subject": "Acme"},
        {"paraphrases": ("Acme's head?",)},
        {"rendering": "chat"},
        {"separator": ""},
        {"valid_from": "2026-11-01"},
        {"valid_to": "2026-11-30"},
    ],
)
def test_what_is_taught_is_the_identity(changes: dict[str, str]) -> None:
    assert replace(FACT, **changes).id != FACT.id


def test_where_it_comes_from_is_not() -> None:
    assert replace(FACT, source="fax", external_id="7", tags=("people",)).id == FACT.id


def test_an_id_stays_what_it_is() -> None:
    # From `Fact("Who leads Acme?", "Wanda").id`; ledgers on disk depend on it.
    assert FACT.id == "sha256:42a99b7f1e4f62fa422320e83869570c1e8ae3bd2215048e8ac0c7e62b888b10"


@given(st.lists(st.none() | st.text(st.characters(codec=None), max_size=5), min_size=6, max_size=6))
def test_the_identity_is_that_of_canonical_json(texts: list[str | None]) -> None:
    prompt, target, *others = texts
    names = ("subject", "relation", "valid_from", "valid_to")
    fact = Fact(prompt or "", target or "", paraphrases=(target or "",), **dict(zip(names, others, strict=True)))
    content = {"prompt": fact.prompt, "target": fact.target, "paraphrases": list(fact.paraphrases)}
    content |= {name: getattr(fact, name) for name in ("rendering", "separator", *names)}
    if fact.valid_to is None:
        del content["valid_to"]
    assert fact.id == text_sha256(canonical_json(content))


def test_subject_and_relation_make_the_key_only_together() -> None:
    assert replace(FACT, subject="Acme").key == FACT.key == prompt_key("who leads  acme")
    both = replace(FACT, subject="ACME ", relation="Leader")
    assert both.key == replace(FACT, prompt="other", subject="acme", relation="leader").key != FACT.key


@given(st.text(max_size=20))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once or "İ" in text or not text.isascii()
    assert bool(once) == bool(text.strip())


def test_prompts_of_nothing_but_punctuation_stay_apart() -> None:
    assert normalise("?") != normalise("!")
