"""The record formats that facts come in: which keys tell one, and how its record becomes a `Fact`.

Invariant: detection looks at keys only, so that two lines with the same keys are never read in different ways. A new
format is a `RecordFormat` in `FORMATS`; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from memupdate.facts.fields import Fields
from memupdate.facts.model import Fact, Probe, Rendering

_RENDERINGS = ("auto", "chat", "completion")


class RecordProblems(Exception):
    """A record that is no fact; `problems` holds every (field, reason)."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__(problems)
        self.problems = problems


class RecordFormat(Protocol):
    """One format of facts, one JSON object per fact."""

    @property
    def name(self) -> str:
        """As recorded in the ledger."""

    def detect(self, record: Mapping[str, Any]) -> bool:
        """Whether the keys of `record` are this format's."""

    def parse(self, record: Mapping[str, Any]) -> Fact:
        """The fact that `record` states. Raises RecordProblems."""


class NativeFormat:
    """`{"prompt": …, "target": …}` with optional fields: memupdate's own, and what `facts export` writes."""

    name = "native"
    keys = (
        "prompt",
        "target",
        "id",
        "subject",
        "relation",
        "paraphrases",
        "locality",
        "source",
        "valid_from",
        "valid_to",
        "tags",
        "rendering",
        "separator",
    )

    def detect(self, record: Mapping[str, Any]) -> bool:
        """True for anything with a prompt."""
        return "prompt" in record

    def parse(self, record: Mapping[str, Any]) -> Fact:
        """See `RecordFormat`."""
        fields = Fields(record, self.keys)
        prompt = fields.text("prompt")
        target = fields.text("target")
        paraphrases = fields.texts("paraphrases")
        if prompt and prompt in paraphrases:
            fields.note(f"paraphrases[{paraphrases.index(prompt)}]", "the same as the prompt")
        fact = Fact(
            prompt=prompt,
            target=target,
            subject=fields.optional_text("subject"),
            relation=fields.optional_text("relation"),
            paraphrases=paraphrases,
            locality=_probes(fields),
            source=fields.optional_text("source"),
            valid_from=fields.optional_time("valid_from"),
            valid_to=fields.optional_time("valid_to"),
            tags=fields.texts("tags"),
            rendering=cast("Rendering", fields.choice("rendering", _RENDERINGS, "auto")),
            separator=fields.spacing("separator", " "),
            external_id=fields.optional_id("id"),
        )
        return _checked(fact, fields)


class PassageFormat:
    """`{"key": …, "text": …}`: a passage to be recalled word for word when its key is given."""

    name = "passage"
    keys = ("key", "text", "id", "source", "valid_from", "tags")

    def detect(self, record: Mapping[str, Any]) -> bool:
        """True for a text or a key."""
        return "text" in record or "key" in record

    def parse(self, record: Mapping[str, Any]) -> Fact:
        """See `RecordFormat`."""
        fields = Fields(record, self.keys)
        fact = Fact(
            prompt=fields.text("key"),
            target=fields.text("text"),
            source=fields.optional_text("source"),
            valid_from=fields.optional_time("valid_from"),
            tags=fields.texts("tags"),
            rendering="completion",
            external_id=fields.optional_id("id"),
        )
        return _checked(fact, fields)


class PhoneBookFormat:
    """`{"query": …, "target": …}`, as the PhoneBook data of the memory-law paper has it."""

    name = "phonebook"
    keys = ("query", "target", "id", "target_len")

    def detect(self, record: Mapping[str, Any]) -> bool:
        """True for a query."""
        return "query" in record

    def parse(self, record: Mapping[str, Any]) -> Fact:
        """See `RecordFormat`. `target_len` counts tokens of some tokenizer, so it says nothing here."""
        fields = Fields(record, self.keys)
        fact = Fact(
            prompt=fields.text("query"),
            target=fields.text("target"),
            rendering="completion",
            external_id=fields.optional_id("id"),
        )
        return _checked(fact, fields)


NATIVE = NativeFormat()
FORMATS: tuple[RecordFormat, ...] = (NATIVE, PhoneBookFormat(), PassageFormat())
"""In order of detection."""


def detect_format(record: Mapping[str, Any]) -> RecordFormat:
    """The first format whose keys `record` has; else the native one, whose messages say what is missing."""
    return next((known for known in FORMATS if known.detect(record)), NATIVE)


def native_record(fact: Fact) -> dict[str, Any]:
    """The native JSON object that reads back as `fact`; fields with their defaults are left out."""
    record: dict[str, Any] = {"prompt": fact.prompt, "target": fact.target}
    optional = {
        "id": fact.external_id,
        "subject": fact.subject,
        "relation": fact.relation,
        "paraphrases": list(fact.paraphrases),
        "locality": [_probe_record(probe) for probe in fact.locality],
        "source": fact.source,
        "valid_from": fact.valid_from,
        "valid_to": fact.valid_to,
        "tags": list(fact.tags),
        "rendering": None if fact.rendering == "auto" else fact.rendering,
    }
    record.update({name: value for name, value in optional.items() if value})
    if fact.separator != " ":
        record["separator"] = fact.separator
    return record


def _probe_record(probe: Probe) -> dict[str, str]:
    return {"prompt": probe.prompt} if probe.target is None else {"prompt": probe.prompt, "target": probe.target}


def _probes(fields: Fields) -> tuple[Probe, ...]:
    probes: list[Probe] = []
    for place, inner in fields.records("locality", ("prompt", "target")):
        probes.append(Probe(inner.text("prompt"), inner.optional_text("target")))
        fields.take_problems(place, inner)
    return tuple(probes)


def _checked(fact: Fact, fields: Fields) -> Fact:
    if fields.problems:
        raise RecordProblems(fields.problems)
    return fact
