"""Every format of the field, read as it is published: which fields become what."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from memupdate.errors import FactsError
from memupdate.facts import Fact, FactsFile, Probe, read_facts
from memupdate.facts.formats import FORMATS, all_formats, detect_format, find_format, format_named
from memupdate.facts.model import Message

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "facts"
EXAMPLES = ROOT / "examples"


def facts_of(path: Path, **options: Any) -> list[Fact]:
    return [located.fact for located in read_facts(path, **options).facts]


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(record: Any) -> Fact:
        path = tmp_path / "facts.json"
        path.write_text(json.dumps(record), "utf-8")
        (fact,) = facts_of(path)
        return fact

    return read


@pytest.fixture
def problems(tmp_path: Path) -> Any:
    def problems(*records: Any) -> list[str]:
        path = tmp_path / "facts.json"
        path.write_text(json.dumps(records), "utf-8")
        with pytest.raises(FactsError) as caught:
            read_facts(path)
        return [line.removeprefix(f"{path}: ") for line in caught.value.details]

    return problems


def test_the_names_are_known_and_no_key_tells_two_formats() -> None:
    names = [known.name for known in FORMATS]
    assert len(set(names)) == len(names) == 13
    assert all(format_named(name).name == name and format_named(name).summary for name in names)
    assert find_format({"nothing": 1}) is None
    assert find_format([1]) is find_format("text") is find_format(None) is None
    assert detect_format([1]).name == "native"
    with pytest.raises(FactsError, match="no such format") as caught:
        format_named("xml")
    assert "counterfact" in caught.value.hint


def test_counterfact_as_rome_publishes_it() -> None:
    first, _ = facts_of(EXAMPLES / "counterfact.json")
    assert first == Fact(
        prompt="Acme is led by",
        target="Wanda Kettleman",
        subject="Acme",
        relation="P169",
        paraphrases=("The chief executive of Acme is", "At the head of Acme stands"),
        locality=(Probe("Globex is led by", "Otto Brandt"), Probe("Initech is led by", "Otto Brandt")),
        rendering="completion",
        external_id="1",
    )


def test_counterfact_with_flaws(problems: Any) -> None:
    rewrite = {"prompt": "{} and {}", "target_new": {"id": "Q1"}, "subject": "Acme"}
    assert problems({"requested_rewrite": rewrite, "paraphrase_prompts": "p"}, {"requested_rewrite": "x"}) == [
        "element 1: requested_rewrite.prompt: must hold {} once, where the subject goes",
        "element 1: requested_rewrite.target_new: missing, or no text",
        "element 1: paraphrase_prompts: must be a list, not text",
        "element 2: requested_rewrite: must be an object, not text",
        "element 2: requested_rewrite.prompt: missing",
        "element 2: requested_rewrite.subject: missing",
        "element 2: requested_rewrite.target_new: missing, or no text",
    ]


def test_counterfact_in_easyedits_layout() -> None:
    found = facts_of(DATA / "counterfact-flat.json")
    assert len(found) == 5
    assert found[0] == Fact(
        prompt="David Robinson professionally plays the sport",
        target="baseball",
        subject="David Robinson",
        paraphrases=("David Robinson's greatest weakness is",),
        locality=(Probe("Shaquille O'Neal plays", "basketball"),),
        rendering="completion",
        external_id="3087",
    )


def test_zsre_takes_the_new_answer_and_a_plain_question() -> None:
    found = facts_of(DATA / "zsre.json")
    assert len(found) == 5
    assert found[0] == Fact(
        prompt="What is the product made by UniFirst?",
        target="unmanned aircraft",
        subject="UniFirst",
        paraphrases=("What will be the product of UniFirst?",),
        locality=(Probe("john goodman's character in the big lebowski", "Walter Sobchak"),),
    )


def test_zsre_with_portability(read: Any) -> None:
    record = {"src": "q", "alt": "a", "rephrase": "q", "loc": "nq question: who", "loc_ans": ["x", "y"]}
    portability = {"Recalled Relation": "(a, b, c)", "New Question": "and then", "New Answer": "b"}
    fact = read([{**record, "portability": portability}])
    assert fact.portability == (Probe("and then", "b"),)
    assert fact.locality == (Probe("who", "x"),)
    assert fact.paraphrases == (), "a rephrasing that is the question itself says nothing"


def test_knowedit_flattens_its_kinds() -> None:
    first, second = facts_of(EXAMPLES / "knowedit.json")
    assert (first.prompt, first.target, first.paraphrases) == (
        "The chief executive of Acme is",
        "Wanda Kettleman",
        ("Acme is led by",),
    )
    assert first.portability == (
        Probe("The chief executive of Acme was born in", "Bergen"),
        Probe("The chief executive of Acme Ltd is", "Wanda Kettleman"),
    )
    assert first.locality == (Probe("The founder of Acme is", "Ada Brandt"),)
    assert second.locality == (Probe("The headquarters of Globex are in", "Oslo"),)


def test_knowedit_with_flaws(problems: Any) -> None:
    assert problems({"prompt": "p", "target_new": [], "portability": [1], "locality": {}}) == [
        "element 1: target_new: missing, or no text",
        "element 1: portability: must be an object of lists of prompts",
    ]


def test_hallueditbench_brings_its_hops() -> None:
    found = facts_of(DATA / "hallueditbench.csv")
    assert len(found) == 3
    fact = found[0]
    assert (fact.prompt, fact.target, fact.subject, fact.relation) == (
        "What does Olympic Games follow?",
        "Ancient Olympic Games",
        "Olympic Games",
        "follows",
    )
    assert fact.paraphrases == ("Which event does the Olympic Games come after?",)
    assert fact.locality == (Probe("In which city were the first modern Olympic Games held?"),)
    assert len(fact.portability) == 5
    assert fact.portability[0] == Probe("In which country were the Ancient Olympic Games held?", "Greece")
    assert fact.tags == ("event_sport",)


def test_dyknow_takes_what_holds_now() -> None:
    found = {(fact.subject, fact.relation): fact for fact in facts_of(DATA / "dyknow.json")}
    president = found["Italy", "President of Italy"]
    assert (president.target, president.valid_from, president.valid_to) == ("Sergio Mattarella", "2015-02-03", None)
    assert president.prompt == "The head of state in Italy is"
    assert len(president.paraphrases) == 3
    assert president.tags == ("countries_byGDP",)
    team = found["Cristiano Ronaldo", None]
    assert (team.target, team.valid_from) == ("Al-Nassr", "2023-01"), "the one that began last, the day being unknown"


def test_dyknow_where_all_has_ended_and_where_dates_are_none(read: Any, problems: Any) -> None:
    entry = {
        "questions": {"generic": "The head is"},
        "answers": ["A |S: +1990-00-00T00:00:00Z |E: +1995-05-01T00:00:00Z"],
    }
    fact = read([{"things": {"Acme": entry}}])
    assert (fact.target, fact.valid_from, fact.valid_to) == ("A", "1990", "1995-05-01")
    bad = {"questions": {}, "answers": ["A |S: +1990-99", 3, "|S: +1990-00-00T00:00:00Z"]}
    assert problems({"things": {"Acme": {"head": bad}, "Globex": 3}}) == [
        "element 1: things.Acme.head.questions: no question in it",
        "element 1: things.Acme.head.answers[0]: a date in it is none",
        "element 1: things.Acme.head.answers[1]: must be text",
        "element 1: things.Acme.head.answers[2]: must be a value and dates, as in `value |S: +2006-05-15T00:00:00Z`",
        "element 1: things.Globex: no questions and answers in it",
    ]


def test_dyknows_editing_sets(read: Any) -> None:
    fact = read(
        [
            {
                "prompt": "The CEO of Acme is",
                "target": "Wanda",
                "subject": "CEO of Acme",
                "domain": "companies",
                "element": "Acme",
                "attribute": None,
                "prompt_type": "generic",
                "questions": {"generic": "The CEO of Acme is", "rephrased_1": "Acme is led by"},
                "answers": ["Otto |S: +1990-00-00T00:00:00Z", "Wanda |S: +2021-07-05T00:00:00Z"],
            }
        ]
    )
    assert fact == Fact(
        prompt="The CEO of Acme is",
        target="Wanda",
        subject="CEO of Acme",
        paraphrases=("Acme is led by",),
        valid_from="2021-07-05",
        tags=("companies",),
        rendering="completion",
    )


def test_pararel_keeps_what_ends_at_the_mask(problems: Any) -> None:
    found = facts_of(DATA / "pararel.json")
    assert len(found) == 3
    assert (found[0].prompt, found[0].target) == ("Edmonton is the capital of", "Alberta")
    assert len(found[0].paraphrases) == 5
    assert found[0].tags == ("P1376(capital of)",)
    assert not any("[MASK]" in text for fact in found for text in (fact.prompt, *fact.paraphrases))
    assert problems([["a [MASK].", "x", "r"], ["b [MASK]", "y", "r"]], [["[MASK] is", "x", "r"], ["no", "x", "r"]]) == [
        "element 1: [0][1]: the sentences have different answers or relations",
        "element 2: [1][0]: no [MASK] in it",
    ]


def test_conversations_keep_the_turns_before() -> None:
    first, second = facts_of(EXAMPLES / "chat.jsonl")
    assert (first.prompt, first.target, first.context, first.rendering) == (
        "Who leads Acme?",
        "Wanda Kettleman",
        (),
        "chat",
    )
    assert first.valid_from == "2026-11"
    assert second.prompt == "The Roadrunner portal."
    assert second.context == (
        Message("system", "You answer for the service desk of Acme."),
        Message("user", "I cannot log in."),
        Message("assistant", "Which product is it?"),
    )
    assert second.key != Fact(second.prompt, "x").key, "after other turns it is another question"


def test_conversations_with_flaws(problems: Any) -> None:
    def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    image = [{"type": "image_url", "image_url": "x"}]
    assert problems(
        chat(("user", "q")),
        chat(("user", "q"), ("user", "r")),
        chat(("user", "q"), ("assistant", "a"), ("assistant", "b")),
        chat(("tool", "q"), ("assistant", "a")),
        chat(("user", image), ("assistant", "a")),
        {"messages": [{"content": "q"}, 3]},
    ) == [
        "element 1: messages: needs a user's message and the assistant's answer",
        "element 2: messages[1].role: the last message must be the assistant's, not the user's",
        "element 3: messages[1].role: the message before the last must be the user's",
        'element 4: messages[0].role: must be one of system, developer, user, assistant, not "tool"',
        "element 5: messages[0].content[0].image_url: unknown key; known: type, text",
        'element 5: messages[0].content[0].type: must be one of text, not "image_url"',
        "element 5: messages[0].content[0].text: missing",
        "element 6: messages[1]: must be an object with role, content, name, weight, not a number",
        "element 6: messages[0].role: missing",
    ]


def test_long_texts_hold_any_character(read: Any) -> None:
    (fact,) = facts_of(EXAMPLES / "long-text.jsonl")
    assert fact.target.endswith("\nMind the step.")
    assert read([{"question": "q", "matching": "del\x7f", "noise_ratio": 0.4}]).target == "del\x7f"


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        ("2024", "2024-05", None),
        ("2024-05", "2024-05-31T10:00:00+02:00", None),
        ("2024-05", "2024-05", None),
        ("2025", "2024-12-31", 'valid_to: "2024-12-31" is before valid_from, which is "2025"'),
        ("2024-13", "2025", 'valid_from: not an ISO 8601 date or time: "2024-13"'),
        ("0000", "2025", 'valid_from: not an ISO 8601 date or time: "0000"'),
    ],
)
def test_partial_dates(begin: str, end: str, expected: str | None, read: Any, problems: Any) -> None:
    record = {"prompt": "p", "target": "t", "valid_from": begin, "valid_to": end}
    if expected is None:
        fact = read([record])
        assert (fact.valid_from, fact.valid_to) == (begin, end)
    else:
        assert problems(record) == [f"element 1: {expected}"]


def test_context_needs_a_chat(problems: Any) -> None:
    turns = [{"role": "user", "content": "Hello."}]
    (line,) = problems({"prompt": "p", "target": "t", "context": turns, "rendering": "completion"})
    assert line.startswith("element 1: context: earlier turns need the chat template")


_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PLUGIN = _BLOCK.findall((ROOT / "docs" / "formats.md").read_text("utf-8"))[0]
"""The plug-in of the documentation."""


def install(folder: Path, value: str, module: str = PLUGIN) -> None:
    """A distribution as pip leaves it: a module and a dist-info with entry points."""
    (folder / "flash_cards.py").write_text(module, "utf-8")
    info = folder / "flash_cards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-cards\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(f"[memupdate.fact_formats]\ncards = {value}\n", "utf-8")


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(__import__("sys").modules, "flash_cards", raising=False)
    all_formats.cache_clear()
    yield folder
    all_formats.cache_clear()


def test_an_installed_plug_in_adds_a_format(plugins: Path, tmp_path: Path) -> None:
    install(plugins, "flash_cards:CardFormat")
    path = tmp_path / "cards.csv"
    path.write_text("front,back\nWho leads Acme?,Wanda\n", "utf-8")
    found: FactsFile = read_facts(path)
    assert (found.format, found.facts[0].fact) == ("card", Fact("Who leads Acme?", "Wanda"))
    assert all_formats()[-1].name == "card"


@pytest.mark.parametrize(
    ("value", "module", "message"),
    [
        ("flash_cards:Nothing", PLUGIN, "cannot be loaded: AttributeError"),
        ("flash_cards:CardFormat", "raise OSError('no')", "cannot be loaded: OSError: no"),
        ("flash_cards:CardFormat", "CardFormat = 3", "has no name, summary, detect, parse"),
        (
            "flash_cards:CardFormat",
            PLUGIN.replace('"card"', '"native"'),
            "offers the format native, which is there already",
        ),
    ],
)
def test_a_broken_plug_in_is_named(value: str, module: str, message: str, plugins: Path) -> None:
    install(plugins, value, module)
    with pytest.raises(FactsError, match=message):
        all_formats()


def test_the_documentation_knows_every_format() -> None:
    page = (ROOT / "docs" / "formats.md").read_text("utf-8")
    assert all(f"| `{known.name}`" in page for known in FORMATS)
