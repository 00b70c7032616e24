"""Facts as rows and back.

Invariant: `parse_fact(fact_json(fact)) == fact` for every fact, whatever characters it holds. A fact whose text was purged
comes back as a `PurgedFact`, under its old id.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from memupdate.facts.model import Fact, Message, Probe

_FIELDS = frozenset(field.name for field in fields(Fact))
_SORTED_FIELDS = sorted(_FIELDS)
_encode = json.JSONEncoder(separators=(",", ":")).encode


def fact_json(fact: Fact) -> str:
    """Every field as ASCII JSON, so that NULs and lone surrogates pass through SQLite unharmed."""
    # Neither `asdict` nor an encoder made anew for each fact: either takes longer than all the rest of storing one.
    values = vars(fact)
    data = {name: values[name] for name in _SORTED_FIELDS}
    for name in ("locality", "portability"):
        data[name] = [{"prompt": probe.prompt, "target": probe.target} for probe in data[name]]
    data["context"] = [{"role": turn.role, "content": turn.content} for turn in fact.context]
    return _encode(data)


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
    return Fact(**data)


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
