"""DyKnow and data like it: each question with all values that it ever had, and from when to when.

Invariant: a question becomes one fact, with the value that holds now: the one without an end; of several the one that began last; where
all have ended, the last of them, with its end. The data say nothing else about which of two open values a question means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from memupdate.facts.fields import Fields
from memupdate.facts.formats.base import checked, paraphrases_of
from memupdate.facts.model import Fact

_PART = re.compile(r"\s*\|(?P<what>[SEP]):\s*\+?(?P<when>[0-9T:Z+-]+)\s*")
_DATE = re.compile(r"(?P<year>[0-9]{4})(?:-(?P<month>[0-9]{2})-(?P<day>[0-9]{2}))?(?:T[0:]*Z?)?")
_DEPTH = 4
"""Domain, entity, attribute: the questions lie at most so deep."""


class DyKnowFormat:
    """`{domain: {entity: {attribute: {"questions": {…}, "answers": ["value |S: from |E: to", …]}}}}`, or such an entry itself."""

    name = "dyknow"
    summary = "questions + answers with dates, nested by domain, entity and attribute: the value that holds now becomes the fact"

    def detect(self, record: Any) -> bool:
        """See `RecordFormat`. Descends along first values, since the keys above an entry are names."""
        for _ in range(_DEPTH):
            if not isinstance(record, Mapping) or not record:
                return False
            if "questions" in record and "answers" in record and "prompt" not in record:
                return True
            record = next(iter(record.values()))
        return False

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`."""
        fields = Fields(record)
        facts = [_fact(fields, path, entry) for path, entry in _entries(record, (), fields)]
        return checked(fields, *facts)


class DyKnowEditFormat:
    """DyKnow's editing sets: one prompt and the right answer, with the other wordings of the question."""

    name = "dyknow-edit"
    summary = "prompt + target + prompt_type, questions: DyKnow's editing sets"

    def detect(self, record: Any) -> bool:
        """See `RecordFormat`."""
        return isinstance(record, Mapping) and "prompt" in record and "prompt_type" in record

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`. The relation is the attribute, where the element has several."""
        fields = Fields(record)
        prompt, target = fields.text("prompt"), fields.text("target")
        answers = fields.value("answers")
        held = [value for value in map(_value, answers if isinstance(answers, list) else []) if value.text == target]
        domain = fields.optional_text("domain")
        fact = Fact(
            prompt=prompt,
            target=target,
            subject=fields.optional_text("subject"),
            relation=fields.optional_text("attribute"),
            paraphrases=paraphrases_of(prompt, _wordings(fields.value("questions"))),
            valid_from=held[-1].begin if held else None,
            tags=(domain,) if domain else (),
            rendering="completion",
        )
        return checked(fields, fact)


class _Value(NamedTuple):
    text: str
    begin: str | None
    end: str | None
    problem: str = ""


def _entries(record: Any, path: tuple[str, ...], fields: Fields) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if isinstance(record, Mapping) and "questions" in record and "answers" in record:
        yield path, record
    elif isinstance(record, Mapping) and len(path) < _DEPTH:
        for name, inner in record.items():
            yield from _entries(inner, (*path, name), fields)
    else:
        fields.note(_place(path, ""), "no questions and answers in it")


def _fact(fields: Fields, path: tuple[str, ...], entry: Mapping[str, Any]) -> Fact:
    inner = Fields(entry)
    wordings = _wordings(entry["questions"])
    texts = entry["answers"]
    values = [_value(text) for text in texts] if isinstance(texts, list) else []
    if not wordings:
        inner.note("questions", "no question in it")
    if not values:
        inner.note("answers", "must be a list with a value in it")
    for index, value in enumerate(values):
        if value.problem:
            inner.note(f"answers[{index}]", value.problem)
    for field, reason in inner.problems:
        fields.note(_place(path, field), reason)
    if inner.problems:
        return Fact("", "")
    now = _current(values)
    names = path[1:]
    return Fact(
        prompt=wordings[0],
        target=now.text,
        subject=names[0] if names else None,
        relation=names[1] if len(names) > 1 else None,
        paraphrases=paraphrases_of(wordings[0], wordings[1:]),
        valid_from=now.begin,
        valid_to=now.end,
        tags=path[:1],
        rendering="completion",
    )


def _current(values: list[_Value]) -> _Value:
    holding = [value for value in values if value.end is None]
    if holding:
        return max(holding, key=lambda value: value.begin or "")
    return max(values, key=lambda value: value.end or "")


def _wordings(questions: Any) -> list[str]:
    texts = questions.values() if isinstance(questions, Mapping) else questions
    return (
        [text for text in texts if isinstance(text, str) and text.strip()]
        if isinstance(questions, Mapping | list)
        else []
    )


def _value(text: Any) -> _Value:
    """`"value |S: +2006-05-15T00:00:00Z |E: +2015-00-00T00:00:00Z"`; Wikidata writes what is not known as 00."""
    if not isinstance(text, str):
        return _Value("", None, None, "must be text")
    name, bar, rest = text.partition("|")
    dates: dict[str, str] = {}
    at = 0
    rest = bar + rest
    while part := _PART.match(rest, at):
        at = part.end()
        date = _date(part["when"])
        if date is None:
            return _Value("", None, None, "a date in it is none")
        dates[part["what"]] = date
    if at != len(rest) or not name.strip():
        return _Value("", None, None, "must be a value and dates, as in `value |S: +2006-05-15T00:00:00Z`")
    return _Value(name.strip(), dates.get("S"), dates.get("E"))


def _date(text: str) -> str | None:
    found = _DATE.fullmatch(text)
    if found is None or found["year"] == "0000":
        return None
    parts = [found["year"]]
    for part in (found["month"], found["day"]):
        if not part or part == "00":
            break
        parts.append(part)
    return "-".join(parts)


def _place(path: tuple[str, ...], field: str) -> str:
    return ".".join(part[:60] for part in (*path, field) if part) or "record"
