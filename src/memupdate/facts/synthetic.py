"""Random facts to calibrate with: key–value pairs in the manner of PhoneBook, put as questions, that no base model can know."""

from __future__ import annotations

import random

from memupdate.facts.model import Fact

_SYLLABLES = [
    "ba",
    "be",
    "bo",
    "da",
    "de",
    "do",
    "fa",
    "fe",
    "ga",
    "go",
    "ha",
    "he",
    "ka",
    "ke",
    "ko",
    "la",
    "le",
    "lo",
    "ma",
    "me",
    "mo",
    "na",
    "ne",
    "no",
    "pa",
    "pe",
    "ra",
    "re",
    "ro",
    "sa",
    "se",
    "so",
    "ta",
    "te",
    "to",
    "va",
    "ve",
    "vi",
    "wa",
]
_QUESTIONS = (
    ("chief executive", "Who leads {s}?", "person"),
    ("headquarters", "Where is {s} based?", "word"),
    ("phone number", "What is the phone number of {s}?", "digits"),
    ("founding year", "When was {s} founded?", "year"),
)


def synthetic_facts(count: int, *, seed: int) -> list[Fact]:
    """`count` distinct facts; a longer list begins with the shorter one of the same seed."""
    rng = random.Random(f"memupdate-synthetic-{seed}")
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        relation, question, kind = _QUESTIONS[len(facts) % len(_QUESTIONS)]
        subject = f"{_word(rng)} {_word(rng)}"
        fact = Fact(prompt=question.format(s=subject), target=_value(rng, kind), subject=subject, relation=relation)
        facts.setdefault(fact.key, fact)
    return list(facts.values())


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4))).capitalize()


def _value(rng: random.Random, kind: str) -> str:
    if kind == "person":
        return f"{_word(rng)} {_word(rng)}"
    if kind == "digits":
        return str(rng.randrange(10**6, 10**7))
    return str(rng.randint(1800, 2030)) if kind == "year" else _word(rng)
