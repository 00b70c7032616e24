"""The base model asked for other wordings: the embedded one really, and what comes of texts that a better one would offer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memupdate import Workspace
from memupdate.errors import FactsError, UsageError
from memupdate.facts import Fact, read_facts
from memupdate.facts.rewording import RULES
from memupdate.operations.paraphrasing import ParaphraseReport, whole_text
from memupdate.verification import inprocess
from support import news, write_facts_file

BASED = "Where is Velon Energy based?"
PASSAGE = {"key": "Returns, section 2", "text": "Goods may be returned within sixty days."}
LATER_TURN = {"prompt": "And where?", "target": "Oslo", "context": [{"role": "user", "content": "Who leads Acme?"}]}


def facts_of(path: Path) -> list[Fact]:
    return [located.fact for located in read_facts(path).facts]


def offer(monkeypatch: pytest.MonkeyPatch, *rounds: Sequence[str]) -> list[int]:
    """Let the model write these texts, for every fact the same, in as many rounds; returns where the seeds are noted."""
    seeds: list[int] = []
    coming: Iterator[Sequence[str]] = iter(rounds)

    def write(base: Any, prompts: Sequence[Sequence[int]], *_: Any, seed: int, **__: Any) -> list[list[int]]:
        seeds.append(seed)
        texts = next(coming)
        encoded = [base.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        assert [base.tokenizer.decode(ids) for ids in encoded] == list(texts)
        end = min(inprocess.end_ids(base))
        return [[*encoded[place % len(texts)], end] for place in range(len(prompts))]

    monkeypatch.setattr(inprocess, "generate_sampled", write)
    return seeds


def test_the_embedded_model_is_asked_and_found_not_able(
    make_workspace: Callable[..., Workspace], tmp_path: Path
) -> None:
    """Facts come back as they were, twice the same file for one seed, and nothing is in the ledger."""
    workspace = make_workspace()
    rows = [*news(1)[:4], PASSAGE, LATER_TURN]
    del rows[1]["paraphrases"]
    file = write_facts_file(tmp_path / "facts.jsonl", rows)
    ledger = workspace.layout.ledger.read_bytes()
    reports = [workspace.paraphrase(file, out=tmp_path / f"{n}.jsonl", count=2, attempts=2, seed=5) for n in "ab"]
    first, second = reports
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert replace(first, out=None, duration_s=0) == replace(second, out=None, duration_s=0)
    assert workspace.layout.ledger.read_bytes() == ledger
    given, written = facts_of(file), facts_of(tmp_path / "a.jsonl")
    assert written == list(first.written)
    assert [replace(fact, paraphrases=()) for fact in written] == [replace(fact, paraphrases=()) for fact in given]
    for fact, wider in zip(given, written, strict=True):
        assert wider.paraphrases[: len(fact.paraphrases)] == fact.paraphrases
    assert (first.facts, first.facts_left_alone, first.asked_by) == (6, 2, "chat")
    assert first.wordings_given == sum(len(fact.paraphrases) for fact in given)
    assert first.wordings_kept == sum(len(fact.paraphrases) for fact in written) - first.wordings_given
    assert first.texts_judged == first.wordings_kept + sum(row.texts for row in first.dropped) >= 2 * 4
    assert [row.rule for row in first.dropped] == [rule.name for rule in RULES]
    assert first.model_able is False
    assert any("not able" in message for message in first.messages)


def test_wordings_of_an_able_model_are_added_after_the_given_ones(
    make_workspace: Callable[..., Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace()
    row = news(1)[0]
    assert row["prompt"] == BASED
    file = write_facts_file(tmp_path / "facts.jsonl", [row])
    good, also, third = (
        f"{start} Velon Energy based?" for start in ("In which city was", "Which city is", "Is it where")
    )
    seeds = offer(monkeypatch, [BASED, good], ["Who is based in Velarburg?", good], [also, third])
    out = tmp_path / "out.jsonl"
    report = workspace.paraphrase(file, out=out, count=2, attempts=5, seed=7)
    assert seeds == [7, 8, 9]  # the third round gave what was missing
    assert facts_of(out)[0].paraphrases == (*row["paraphrases"], good, also)
    dropped = {row.rule: row.texts for row in report.dropped if row.texts}
    assert (report.wordings_kept, report.texts_judged, dropped) == (2, 5, {"repeated": 2, "subject": 1})
    assert (report.model_able, report.facts_without, report.out) == (True, 0, str(out))
    assert any("50%" in message for message in report.messages)
    trained, held_out = workspace.session.phrasings(report.written[0])
    assert (len(trained), len(held_out)) == (3, 3)


def test_a_live_fact_keeps_its_question_but_gives_its_wordings_to_what_supersedes_it(
    make_workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workspace = make_workspace()
    of_mayor, based = "Who is Velon Energy based in?", "Which city is Velon Energy based in?"
    live = [
        Fact(of_mayor, "Ida"),
        Fact(BASED, "Wilimouth", subject="Velon Energy", relation="headquarters", paraphrases=(based,)),
    ]
    monkeypatch.setattr("memupdate.ledger.ledger.Ledger.live_facts", lambda *_, **__: live)
    row = {name: value for name, value in news(1)[0].items() if name != "paraphrases"}
    offer(monkeypatch, [of_mayor, based])
    report = workspace.paraphrase(write_facts_file(tmp_path / "facts.jsonl", [row]), count=2, attempts=1)
    assert report.written[0].paraphrases == (based,)
    assert {row.rule: row.texts for row in report.dropped if row.texts} == {"other fact": 1}


def test_a_model_without_a_chat_template_is_asked_by_examples(
    make_workspace: Callable[..., Workspace], tmp_path: Path
) -> None:
    """A text to go on from is then left alone, a question is not."""
    workspace = make_workspace()
    tokenizer = copy.deepcopy(workspace.session.tokenizer)
    tokenizer.chat_template = None
    workspace.session.parts["tokenizer"] = tokenizer
    rows = [{"prompt": BASED, "target": "Malalbridge"}, {"prompt": "Velon Energy is based in", "target": "Malalbridge"}]
    report = workspace.paraphrase(write_facts_file(tmp_path / "facts.jsonl", rows), count=2, attempts=1)
    assert (report.asked_by, report.facts_left_alone, report.texts_judged) == ("completion", 1, 2)


@pytest.mark.parametrize(
    ("text", "style", "ended", "whole"),
    [
        ("Who?\nNo", "chat", True, "Who?\nNo"),
        ("Who lea", "chat", False, ""),
        (" Who?\n\nQuestion: What?", "completion", False, " Who?".strip()),
        (" Who?", "completion", True, "Who?"),
        (" Who lea", "completion", False, ""),
    ],
)
def test_what_was_cut_off_is_no_text(text: str, style: Any, ended: bool, whole: str) -> None:
    assert whole_text(text, style, ended=ended) == whole


def test_what_cannot_be_done_is_said_before_the_model_is_loaded(
    make_workspace: Callable[..., Workspace], tmp_path: Path
) -> None:
    workspace = make_workspace()
    file = write_facts_file(tmp_path / "facts.jsonl", [news(1)[0], {"prompt": "Who?"}])

    def ask(**options: Any) -> ParaphraseReport:
        return workspace.paraphrase(file, **options)

    with pytest.raises(UsageError, match="is there already"):
        ask(out=file)
    with pytest.raises(UsageError, match="names no format"):
        ask(out=tmp_path / "facts.txt")
    with pytest.raises(UsageError, match="nothing to do"):
        ask(count=0)
    with pytest.raises(FactsError) as refused:
        ask(out=tmp_path / "out.jsonl")
    assert f"{file}:2: target: missing" in refused.value.details
    assert not (tmp_path / "out.jsonl").exists()
    assert "base" not in workspace.session.parts
    report = ask(skip_invalid=True, count=1, attempts=1)
    assert (report.facts, report.out, len(report.skipped)) == (1, None, 1)
