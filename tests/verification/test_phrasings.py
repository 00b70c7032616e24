"""Which wordings of a fact are trained on and which are kept apart: its own paraphrases and its relation's templates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memupdate.errors import PolicyError
from memupdate.facts.model import Fact, Message
from memupdate.operations.config import WorkspaceConfig
from memupdate.operations.session import Session
from memupdate.policies import load_policy, parse_policy

TEMPLATES = {
    "Price": (
        "What does {subject} cost?",
        "How much is {subject}?",
        "Name the price of {subject}.",
        "{subject}: price?",
    )
}
LAMP = Fact(
    "How much is the Lamp?", "9 euros", subject="the Lamp", relation="price",
    paraphrases=("What is the price of the Lamp?", "the Lamp sells for?"),
)  # fmt: skip


def session(root: Path, share: float = 0.5) -> Session:
    config = WorkspaceConfig(schema_version=1, model="atlas", policy="atlas", collection="acme", probes="")
    overrides = {"facts.templates": TEMPLATES, "facts.train_paraphrases": share}
    return Session(root, config, load_policy("atlas", overrides=overrides))


def test_a_share_of_paraphrases_and_of_templates_is_trained_on_and_the_rest_measures(tmp_path: Path) -> None:
    trained, held_out = session(tmp_path).phrasings(LAMP)
    # The template that is the prompt already is neither; three are left, of which half is two.
    assert trained == ("What is the price of the Lamp?", "What does the Lamp cost?", "Name the price of the Lamp.")
    assert held_out == ("the Lamp sells for?", "the Lamp: price?")
    assert set(session(tmp_path).wordings(LAMP)) == {LAMP.prompt, *trained, *held_out}


@pytest.mark.parametrize(("share", "counts"), [(0.0, (0, 5)), (1.0, (5, 0))])
def test_none_or_all(tmp_path: Path, share: float, counts: tuple[int, int]) -> None:
    trained, held_out = session(tmp_path, share).phrasings(LAMP)
    assert (len(trained), len(held_out)) == counts


def test_templates_are_for_facts_of_their_relation_alone(tmp_path: Path) -> None:
    opened = session(tmp_path)
    for other in (
        replace(LAMP, relation="weight"),
        replace(LAMP, subject=None),
        replace(LAMP, context=(Message("user", "Hi"),)),
    ):
        trained, held_out = opened.phrasings(other)
        assert {*trained, *held_out} == set(LAMP.paraphrases)


def test_what_is_trained_is_rendered_and_what_stands_in_is_trained_whole(tmp_path: Path) -> None:
    opened = session(tmp_path)
    trained, held_out = opened.phrasings(LAMP)
    assert [e.prompt for e in opened.training_examples([LAMP])] == [LAMP.prompt, *trained]
    assert [e.prompt for e in opened.training_examples([LAMP], whole={LAMP.id})] == [LAMP.prompt, *trained, *held_out]


@pytest.mark.parametrize("wording", ["How much?", "{subject} and {subject}"])
def test_a_template_has_one_place_for_its_subject(wording: str) -> None:
    text = f'schema_version = 1\nname = "p"\n[facts.templates]\nprice = ["{wording}"]\n'
    with pytest.raises(PolicyError) as caught:
        parse_policy(text)
    assert "allowed: texts with {subject} once" in caught.value.details[0]
