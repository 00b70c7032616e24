"""What is asked beyond a fact's own prompt, and how free answers are judged."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memupdate.facts.model import Fact, Message, Probe
from memupdate.facts.render import Renderer
from memupdate.models.base import BaseModel
from memupdate.verification.questions import (
    GIVEN,
    HELD_OUT,
    RENDERING,
    SYSTEM,
    TEMPLATE,
    TRAINED,
    Question,
    fact_questions,
    fill,
    judge_text,
    template_of,
)

ACME = Fact(
    "Who leads Acme?", "Ida Quist", subject="Acme", relation="chief executive",
    paraphrases=("Who runs Acme?", "Name the head of Acme."), portability=(Probe("Whom does Ida Quist lead?", "Acme"), Probe("Who?")),
)  # fmt: skip
BOLT = Fact(
    "Who is the boss of Bolt?", "Jo Lind", subject="Bolt", relation="Chief Executive", paraphrases=("Who runs Bolt?", "Bolt's head?")
)  # fmt: skip
PLAIN = Fact("Call Harold:", "0471", rendering="completion")


def split(fact: Fact) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return fact.paraphrases[:1], fact.paraphrases[1:]


def asked(renderer: Renderer, fact: Fact, system: str = "Be brief.") -> list[Question]:
    return fact_questions(renderer, [fact], [ACME, BOLT, PLAIN], split, system_prompt=system)


def parts(questions: list[Question]) -> list[tuple[str, str]]:
    return [(q.part, q.example.prompt) for q in questions]


@pytest.mark.parametrize(
    ("expected", "answer", "stopped", "judged"),
    [
        ("Leeds", "Leeds", True, "exact"),
        ("Leeds", "Leeds", False, "contained"),
        ("Leeds", " leeds. ", True, "normalised"),
        ("Leeds", "It is in Leeds, I think.", True, "contained"),
        ("19", "In 1999", True, "other"),
        ("19", "In 19", True, "contained"),
        ("C++", "Use C++ here", True, "contained"),
        ("北京", "答案是北京市", True, "contained"),
        ("Leeds", "", True, "other"),
        ("", "", True, "exact"),
        ("", "Leeds", True, "other"),
    ],
)
def test_answers_are_judged_by_the_strictest_match(expected: str, answer: str, stopped: bool, judged: str) -> None:
    assert judge_text(expected, answer, stopped=stopped) == judged


@given(st.text(), st.text(alphabet=" .,ab", max_size=4))
def test_the_answer_itself_matches_and_no_match_is_stricter_than_it_is(expected: str, after: str) -> None:
    assert judge_text(expected, expected, stopped=True) == "exact"
    assert judge_text(expected, expected + after + "x", stopped=True) != "exact"


def test_a_fact_is_asked_in_every_wording_and_form_once(atlas_renderer: Renderer) -> None:
    questions = asked(atlas_renderer, ACME)
    assert parts(questions) == [
        (TRAINED, "Who runs Acme?"),
        (HELD_OUT, "Name the head of Acme."),
        (TEMPLATE, "Who is the boss of Acme?"),
        (TEMPLATE, "Acme's head?"),
        (RENDERING, ACME.prompt),
        (SYSTEM, ACME.prompt),
        (GIVEN, "Whom does Ida Quist lead?"),
    ]
    assert [q.measure for q in questions] == ["recall", *["generality"] * 5, "portability"]
    assert {q.fact_id for q in questions} == {ACME.id}
    own = atlas_renderer.render(ACME)
    assert all(q.example.prompt_ids != own.prompt_ids for q in questions)
    assert [q.example.answer for q in questions] == ["Ida Quist"] * 4 + [" Ida Quist", "Ida Quist", "Acme"]
    assert [q.example.style for q in questions] == ["chat"] * 4 + ["completion", "chat", "chat"]
    assert questions[5].example.messages[0] == {"role": "system", "content": "Be brief."}


def test_plain_text_is_asked_by_chat_too(atlas_renderer: Renderer) -> None:
    questions = asked(atlas_renderer, PLAIN)
    assert [(q.part, q.example.style, q.example.answer) for q in questions] == [(RENDERING, "chat", "0471")]


def test_a_model_without_a_template_is_not_asked_by_chat(atlas_base: BaseModel) -> None:
    class Bare:
        chat_template = None
        eos_token_id = atlas_base.tokenizer.eos_token_id
        encode = staticmethod(atlas_base.tokenizer.encode)
        apply_chat_template = staticmethod(atlas_base.tokenizer.apply_chat_template)

    assert asked(Renderer(Bare()), PLAIN) == []


def test_later_turns_keep_their_conversation(atlas_renderer: Renderer) -> None:
    later = replace(
        ACME, context=(Message("system", "You know Acme."), Message("user", "Hello"), Message("assistant", "Hi"))
    )
    found = asked(atlas_renderer, later)
    assert [part for part, _ in parts(found)] == [TRAINED, HELD_OUT, GIVEN], "no second system turn, no plain text"
    assert all(q.example.context == later.context for q in found[:2])


def test_no_system_prompt_asks_none(atlas_renderer: Renderer) -> None:
    assert SYSTEM not in [part for part, _ in parts(asked(atlas_renderer, ACME, system=""))]


def test_what_is_too_long_for_the_model_is_not_asked(atlas_base: BaseModel) -> None:
    short = Renderer(atlas_base.tokenizer, context=atlas_base_length(atlas_base))
    assert [part for part, _ in parts(asked(short, ACME, system="word " * 200))] == [
        TRAINED, HELD_OUT, TEMPLATE, TEMPLATE, RENDERING, GIVEN,
    ]  # fmt: skip


def atlas_base_length(base: BaseModel) -> int:
    return Renderer(base.tokenizer).render(ACME).length + 40


@given(st.text(min_size=1).filter(str.strip), st.text(), st.text(), st.text(min_size=1))
def test_a_template_gives_the_wording_back(subject: str, before: str, after: str, other: str) -> None:
    wording = before + subject + after
    template = template_of(wording, subject)
    if template is None:
        assert wording.count(subject) > 1
    elif "\0" not in before + after + subject:
        assert fill(template, subject) == wording
        assert fill(template, other) == before + other + after
