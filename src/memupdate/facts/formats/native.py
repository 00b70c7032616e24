"""The formats that are ours or the memory-law paper's: native, passages, PhoneBook, and records of long texts.

Invariant: `NATIVE.parse(native_record(fact)) == (fact,)` for every fact that a file can state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from memupdate.facts.fields import Fields
from memupdate.facts.formats.base import checked
from memupdate.facts.model import Fact, Message, Probe, Rendering, Role

_RENDERINGS = ("auto", "chat", "completion")
_OTHERS = frozenset({"target_new", "prompt_type"})
ROLES = ("system", "developer", "user", "assistant")


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
        "portability",
        "context",
    )
    summary = "prompt + target, and optional fields: memupdate's own"

    def detect(self, record: Any) -> bool:
        """True for anything with a prompt, but for `target_new` and `prompt_type`, which data sets of editing have."""
        return isinstance(record, Mapping) and "prompt" in record and record.keys().isdisjoint(_OTHERS)

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`."""
        fields = Fields(record, self.keys)
        prompt = fields.text("prompt")
        target = fields.text("target")
        paraphrases = fields.texts("paraphrases")
        if prompt and prompt in paraphrases:
            fields.note(f"paraphrases[{paraphrases.index(prompt)}]", "the same as the prompt")
        valid_from, valid_to = fields.period()
        fact = Fact(
            prompt=prompt,
            target=target,
            subject=fields.optional_text("subject"),
            relation=fields.optional_text("relation"),
            paraphrases=paraphrases,
            locality=probes(fields, "locality"),
            source=fields.optional_text("source"),
            valid_from=valid_from,
            valid_to=valid_to,
            tags=fields.texts("tags"),
            rendering=cast("Rendering", fields.choice("rendering", _RENDERINGS, "auto")),
            separator=fields.spacing("separator", " "),
            external_id=fields.optional_id("id"),
            portability=probes(fields, "portability"),
            context=turns(fields, "context"),
        )
        if fact.context and fact.rendering == "completion":
            fields.note("context", "earlier turns need the chat template, so not rendering completion")
        return checked(fields, fact)


class PassageFormat:
    """`{"key": …, "text": …}`: a passage to be recalled word for word when its key is given."""

    name = "passage"
    keys = ("key", "text", "id", "source", "valid_from", "valid_to", "tags")
    summary = "key + text: a passage to be recalled word for word"

    def detect(self, record: Any) -> bool:
        """True for a text or a key."""
        return isinstance(record, Mapping) and ("text" in record or "key" in record)

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`."""
        fields = Fields(record, self.keys)
        valid_from, valid_to = fields.period()
        fact = Fact(
            prompt=fields.text("key"),
            target=fields.text("text"),
            source=fields.optional_text("source"),
            valid_from=valid_from,
            valid_to=valid_to,
            tags=fields.texts("tags"),
            rendering="completion",
            external_id=fields.optional_id("id"),
        )
        return checked(fields, fact)


class PhoneBookFormat:
    """`{"query": …, "target": …}`, as the PhoneBook data of the memory-law paper has it."""

    name = "phonebook"
    keys = ("query", "target", "id", "target_len")
    summary = "query + target: PhoneBook, to be completed as it stands"

    def detect(self, record: Any) -> bool:
        """True for a query."""
        return isinstance(record, Mapping) and "query" in record

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`. `target_len` counts tokens of some tokenizer, so it says nothing here."""
        fields = Fields(record, self.keys)
        fact = Fact(
            prompt=fields.text("query"),
            target=fields.text("target"),
            rendering="completion",
            external_id=fields.optional_id("id"),
        )
        return checked(fields, fact)


class LongTextFormat:
    """`{"question": …, "matching": …}`: a long text that one instruction asks for, as in the memory-law paper."""

    name = "long-text"
    summary = "question + matching: a text to be recalled word for word"

    def detect(self, record: Any) -> bool:
        """See `RecordFormat`."""
        return isinstance(record, Mapping) and "question" in record and "matching" in record

    def parse(self, record: Any) -> tuple[Fact, ...]:
        """See `RecordFormat`. `not_matching` and what was measured about the text say nothing here; random tokens hold any character."""
        fields = Fields(record)
        return checked(fields, Fact(prompt=fields.text("question"), target=fields.verbatim("matching")))


NATIVE = NativeFormat()


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
        "portability": [_probe_record(probe) for probe in fact.portability],
        "context": [{"role": turn.role, "content": turn.content} for turn in fact.context],
    }
    record.update({name: value for name, value in optional.items() if value})
    if fact.separator != " ":
        record["separator"] = fact.separator
    return record


def _probe_record(probe: Probe) -> dict[str, str]:
    return {"prompt": probe.prompt} if probe.target is None else {"prompt": probe.prompt, "target": probe.target}


def probes(fields: Fields, name: str) -> tuple[Probe, ...]:
    """A list of `{prompt, target?}`."""
    if not fields.has(name):
        return ()
    found: list[Probe] = []
    for place, inner in fields.records(name, ("prompt", "target")):
        found.append(Probe(inner.text("prompt"), inner.optional_text("target")))
        fields.take_problems(place, inner)
    return tuple(found)


def turns(fields: Fields, name: str) -> tuple[Message, ...]:
    """A list of `{role, content}`."""
    if not fields.has(name):
        return ()
    found: list[Message] = []
    for place, inner in fields.records(name, ("role", "content")):
        found.append(Message(cast("Role", inner.choice("role", ROLES, "user")), inner.text("content")))
        fields.take_problems(place, inner)
    return tuple(found)
