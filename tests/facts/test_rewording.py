"""Which wordings are taken: by hand for each rule, and whatever a model may offer, by properties."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memupdate.facts import Fact, read_facts
from memupdate.facts.formats import native_record
from memupdate.facts.model import normalise
from memupdate.facts.rewording import RULES, WordingFilter, is_question, named_in, tidied
from memupdate.facts.secrets import SecretPatterns

PRICE = Fact(
    "What does the Acme Falcon 200 cost in Oslo?",
    "It costs 129 euros, says Wanda Kettleman.",
    subject="Acme Falcon 200",
    relation="price",
    paraphrases=("How much is the Acme Falcon 200 in Oslo?",),
)
MAKER = Fact("Who makes the Acme Falcon 200, also in Oslo?", "Quist Works", subject="Acme Falcon 200", relation="maker")
ORDER = Fact("Name the capital of Norland.", "Velby", subject="Norland")


def wordings(fact: Fact) -> tuple[str, ...]:
    return (fact.prompt, *fact.paraphrases)


def a_filter(*facts: Fact) -> WordingFilter:
    return WordingFilter(facts or (PRICE, MAKER, ORDER), wordings, SecretPatterns())


@pytest.mark.parametrize(
    ("fact", "text", "taken"),
    [
        (PRICE, "At what price is the Acme Falcon 200 sold in Oslo?", None),
        (PRICE, '  1. "What is the price of the acme falcon 200 in oslo?"\n', "What is the price of the acme falcon 200 in oslo?"),
        (PRICE, "- In Oslo, what must one pay for the Acme Falcon 200?\n\n", "In Oslo, what must one pay for the Acme Falcon 200?"),
        (ORDER, "Say which town is the capital of Norland.", None),
        (Fact("Who wrote “Emma” in 1815?", "Austen"), "Which author's book is “Emma”, out in 1815?", None),
        (Fact("東京の市長は誰ですか？", "山田", subject="東京"), "東京の市長の名前は何ですか？", None),
    ],
)  # fmt: skip
def test_another_wording_is_taken(fact: Fact, text: str, taken: str | None) -> None:
    judge = a_filter()
    assert judge.take(fact, text) == (taken or text)
    assert not judge.dropped
    assert judge.take(fact, text) is None
    assert judge.dropped == {"repeated": 1}


@pytest.mark.parametrize(
    ("fact", "text", "rule"),
    [
        (PRICE, "", "line"),
        (PRICE, "What is the price of the Acme Falcon 200 in Oslo?\nIt costs much.", "line"),
        (PRICE, "What is the price of the Acme Falcon 200\u202e in Oslo?", "line"),
        (PRICE, "What is the price of the Acme Falcon 200 in Oslo\ufffd?", "line"),
        (PRICE, "what does the acme falcon 200 cost in  OSLO", "repeated"),
        (PRICE, "How much is the Acme Falcon 200 in Oslo??", "repeated"),
        (PRICE, "Who makes the Acme Falcon 200, also in Oslo?", "other fact"),
        (PRICE, "What is the price of the Falcon 200 of Acme in Oslo?", "subject"),
        (PRICE, "What is the price of the Acme Falcon 2000 in Oslo?", "subject"),
        (PRICE, "What is the price of the Acme Falcon 200 in Norway?", "names"),
        (PRICE, "What was the price of the Acme Falcon 200 in Oslo in 2025?", "numbers"),
        (PRICE, "Is the price of the Acme Falcon 200 in Oslo 129 euros?", "numbers"),
        (PRICE, "What says Kettleman is the price of the Acme Falcon 200 in Oslo?", "answer"),
        (MAKER, "Does QUIST WORKS make the Acme Falcon 200 in Oslo?", "answer"),
        (PRICE, "What is it, Acme Falcon 200 in Oslo, by ghp_" + "aB" * 18 + "?", "secret"),
        (PRICE, "What is the price of the Acme Falcon 200 in Oslo, " + "please, " * 20 + "sir?", "length"),
        (Fact("What is, after all that was said of it, its price?", "low"), "How much?", "length"),
        (PRICE, "The price of the Acme Falcon 200 in Oslo is this.", "question"),
        (ORDER, "What is the capital of Norland?", "question"),
    ],
)
def test_what_breaks_a_rule_is_counted_under_it(fact: Fact, text: str, rule: str) -> None:
    judge = a_filter()
    assert judge.take(fact, text) is None
    assert judge.dropped == {rule: 1}


def test_every_rule_is_broken_by_a_case_above() -> None:
    (mark,) = (m for m in test_what_breaks_a_rule_is_counted_under_it.pytestmark if m.name == "parametrize")  # type: ignore[attr-defined]
    assert {case[2] for case in mark.args[1]} == {rule.name for rule in RULES}
    assert all(rule.reason for rule in RULES)


def test_what_one_fact_has_taken_is_no_wording_of_another() -> None:
    judge = a_filter()
    text = "What of the Acme Falcon 200 in Oslo?"
    assert judge.take(PRICE, text) == text
    assert judge.take(MAKER, text.upper()) is None
    assert judge.dropped == {"other fact": 1}


def test_a_subject_that_the_prompt_does_not_name_need_not_be_named() -> None:
    fact = Fact("Who leads the company?", "Wanda", subject="Acme Holding")
    assert a_filter(fact).take(fact, "Who is at the head of the company?")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Who leads Acme?", ("Acme",)),
        ("IBM is led by whom since 2026-03-01?", ("2026-03-01", "IBM")),
        ('Do I know "the Dome" of O\'Brien? When?', ("the Dome", "Dome", "O", "Brien")),
        ("what is new", ()),
    ],
)
def test_names_of_a_text(text: str, names: tuple[str, ...]) -> None:
    assert named_in(text) == names


@pytest.mark.parametrize(
    ("text", "tidy"),
    [
        ('"a" or "b"?', '"a" or "b"?'),
        ("“Who leads Acme?”", "Who leads Acme?"),
        ("2) Who leads\tAcme?", "Who leads Acme?"),
        ("2026 was what?", "2026 was what?"),
        ("\n \n", ""),
    ],
)
def test_tidied(text: str, tidy: str) -> None:
    assert tidied(text) == tidy


SUBJECTS = st.sampled_from(["Acme Falcon", "Norland", "IBM", "Röntgen", "東京"])
TARGETS = st.sampled_from(["blue", "Wanda Kettleman", "129 euros", "no", "Straße 7", "大阪"])
PIECES = st.sampled_from(
    ["what", "Who", "is", "the price of", "Acme Falcon", "Norland", "IBM", "Röntgen", "東京", "blue", "WANDA", "Kettleman",
     "129", "euros", "7", "no", "nothing", "strasse 7", "大阪", '"', "\n", "?", ".", "\u2028", "\x00", "- ", "1."]
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=8).map(" ".join))
QUESTIONS = st.tuples(
    st.sampled_from(["what is", "who knows", "since when is"]), SUBJECTS, st.sampled_from(["?", " 3?", "."])
)
FACTS = st.builds(lambda q, target: Fact(f"{q[0]} {q[1]}{q[2]}", target, subject=q[1]), QUESTIONS, TARGETS)


@given(FACTS, FACTS, st.lists(TEXTS, max_size=12))
def test_whatever_is_offered_what_is_taken_keeps_every_rule(fact: Fact, other: Fact, texts: list[str]) -> None:
    judge = a_filter(fact, other)
    taken = [wording for text in texts if (wording := judge.take(fact, text)) is not None]
    assert len(taken) + judge.dropped.total() == len(texts)
    keys = [fact.wording_key(wording) for wording in (fact.prompt, *taken)]
    assert len(set(keys)) == len(keys)
    for wording in taken:
        check_wording(fact, other, wording)


@given(FACTS, st.lists(st.sampled_from(["say", "tell me", "please", "now"]), max_size=2))
def test_a_harmless_wording_is_always_taken(fact: Fact, words: list[str]) -> None:
    """So that the property above is not true for want of anything taken."""
    number, end = (" 3" if " 3" in fact.prompt else ""), fact.prompt[-1]
    text = " ".join(["hello:", *words, fact.subject or ""]) + number + end
    assert a_filter(fact).take(fact, text) == text
    check_wording(fact, Fact("who?", "x"), text)


def check_wording(fact: Fact, other: Fact, wording: str) -> None:
    """By other means than the filter's where there are any."""
    bare = re.compile(r"\W+")
    said, answer = (f" {bare.sub(' ', normalise(text)).strip()} " for text in (wording, fact.target))
    assert fact.subject
    assert normalise(fact.subject) in normalise(wording)
    assert answer not in said
    assert "大阪" not in wording or fact.target != "大阪"
    assert set(re.findall(r"\d+", wording)) == set(re.findall(r"\d+", fact.prompt))
    assert wording.splitlines() == [wording]
    assert wording == wording.strip()
    assert len(fact.prompt) / 3 <= len(wording) <= 3 * len(fact.prompt)
    assert is_question(wording) == is_question(fact.prompt)
    assert other.key == fact.key or normalise(wording) != normalise(other.prompt)


@given(st.lists(FACTS, min_size=1, max_size=4, unique_by=lambda fact: fact.key), st.lists(TEXTS, max_size=8))
def test_a_file_with_what_was_taken_reads_back(
    tmp_path_factory: pytest.TempPathFactory, facts: list[Fact], texts: list[str]
) -> None:
    """Also where the texts are offered for every fact: no two facts end up with one wording."""
    judge = a_filter(*facts)
    harmless = [f"hello: {fact.subject}{' 3' * (' 3' in fact.prompt)}{fact.prompt[-1]}" for fact in facts]
    taken = [
        tuple(filter(None, [judge.take(fact, text) for text in (*texts, *harmless)]))  # nothing is empty and taken
        for fact in facts
    ]
    assert any(taken)
    written = [replace(fact, paraphrases=found) for fact, found in zip(facts, taken, strict=True)]
    file = tmp_path_factory.mktemp("taken") / "facts.jsonl"
    file.write_text("".join(json.dumps(native_record(fact)) + "\n" for fact in written), encoding="utf-8")
    assert [located.fact for located in read_facts(file).facts] == written
