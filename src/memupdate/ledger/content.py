"""Facts as rows and back.

Invariant: `parse_fact(fact_json(fact)) == fact` for every fact, whatever characters it holds. A fact whose text was purged
comes back as a `PurgedFact`, under its old id.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from json.encoder import encode_basestring_ascii
from typing import Any, TypeVar

from memupdate.facts.model import Fact, Message, Probe, fact_of

_FIELDS = frozenset(field.name for field in fields(Fact))
T = TypeVar("T")


def fact_json(fact: Fact) -> str:
    """Every field as ASCII JSON, so that NULs and lone surrogates pass through SQLite unharmed."""
    # Put together by hand, with the names in order: an encoder takes longer than all the rest of storing a fact.
    return (
        f'{{"context":{_json_list(fact.context, _turn_json)},"external_id":{_json(fact.external_id)},'
        f'"locality":{_json_list(fact.locality, _probe_json)},"paraphrases":{_json_list(fact.paraphrases, _json)},'
        f'"portability":{_json_list(fact.portability, _probe_json)},"prompt":{_json(fact.prompt)},'
        f'"relation":{_json(fact.relation)},"rendering":{_json(fact.rendering)},"separator":{_json(fact.separator)},'
        f'"source":{_json(fact.source)},"subject":{_json(fact.subject)},"tags":{_json_list(fact.tags, _json)},'
        f'"target":{_json(fact.target)},"valid_from":{_json(fact.valid_from)},"valid_to":{_json(fact.valid_to)}}}'
    )


def _json(text: str | None) -> str:
    return "null" if text is None else encode_basestring_ascii(text)


def _json_list(items: Sequence[T], encode: Callable[[T], str]) -> str:
    return f"[{','.join(map(encode, items))}]" if items else "[]"


def _probe_json(probe: Probe) -> str:
    return f'{{"prompt":{_json(probe.prompt)},"target":{_json(probe.target)}}}'


def _turn_json(turn: Message) -> str:
    return f'{{"role":{_json(turn.role)},"content":{_json(turn.content)}}}'


PURGED_TEXT = "[purged]"
"""What stands where a purged text was."""


@dataclass(frozen=True)
class PurgedFact(Fact):
    """What is left of a fact whose text was purged: the id that it had. It has nothing to teach."""

    purged_id: str = ""

    @cached_property
    def id(self) -> str:
        """As it was when the fact still had its text; can be computed no longer."""
        return self.purged_id

    @cached_property
    def key(self) -> str:
        """A key of its own: it contradicts and supersedes nothing any more."""
        return f"purged:{self.purged_id}"


def purged_json(fact: str) -> str:
    """`content_json` of a purged fact, by its id."""
    return f'{{"purged":"{fact}"}}'


def parse_fact(content_json: str) -> Fact:
    """The fact that `fact_json` wrote; fields of a newer memupdate are passed over."""
    stored: dict[str, Any] = json.loads(content_json)
    if "purged" in stored:
        return PurgedFact(PURGED_TEXT, PURGED_TEXT, purged_id=stored["purged"])
    data = {name: value for name, value in stored.items() if name in _FIELDS}
    data["paraphrases"] = tuple(data["paraphrases"])
    data["tags"] = tuple(data["tags"])
    for name in ("locality", "portability"):
        data[name] = tuple(Probe(**probe) for probe in data.get(name, ()))  # facts stored before lack the second
    data["context"] = tuple(Message(**turn) for turn in data.get("context", ()))
    return fact_of(data)


def fact_row(fact: Fact, created_at_utc: str) -> dict[str, Any]:
    """The row of table `facts`."""
    return {
        "id": fact.id,
        "key": storable(fact.key),
        "prompt": storable(fact.prompt),
        "target": storable(fact.target),
        "subject": storable(fact.subject),
        "relation": storable(fact.relation),
        "content_json": fact_json(fact),
        "created_at_utc": created_at_utc,
    }


def storable(text: str | None) -> str | None:
    """`text` for a column that people read: lone surrogates become `?`."""
    # SQLite stores UTF-8; a lone surrogate has none. These columns are for reading, content_json has the exact text.
    if text is None or text.isascii():
        return text
    return text.encode("utf-8", "replace").decode("utf-8")
