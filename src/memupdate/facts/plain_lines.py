"""The most frequent line of all, a native record of plain texts, read by msgspec in a fifth of the time of the general way.

Invariant: what `PlainLines.read` returns for a line is what the general way makes of it, to the letter. It judges nothing: a line that
is not plain, or has anything wrong with it, gets None, and the general way says what is wrong. Secrets are not looked for here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import msgspec

from memupdate.facts.fields import parse_time
from memupdate.facts.model import Fact, fact_of


class _Record(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    prompt: str
    target: str
    external_id: str | None = msgspec.field(default=None, name="id")
    subject: str | None = None
    relation: str | None = None
    source: str | None = None
    valid_from: str | None = None
    valid_to: str | None = None


class PlainFact(NamedTuple):
    """A fact and all of its texts, one after the other."""

    fact: Fact
    texts: str


class PlainLines:
    """A reader of such lines, to be used again and again."""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(_Record).decode

    def read(self, line: bytes) -> PlainFact | None:
        """The fact that a line of JSON states; None where only the general way can tell."""
        if b'\\"' in line or b"\\\\" in line:
            return None
        try:
            record = self._decode(line)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return None
        values = msgspec.structs.asdict(record)
        texts = [text for text in values.values() if text is not None]
        # Names and texts only, each between two quotation marks: one more of them is a name that comes twice.
        if line.count(b'"') != 4 * len(texts):
            return None
        for text in texts:
            if text[:1] <= " ":  # empty, perhaps blank, or a control character
                return None
        joined = " ".join(texts)
        if not joined.isprintable() or not _is_period(record.valid_from, record.valid_to):
            return None
        return PlainFact(fact_of(values), joined)


@lru_cache(maxsize=4_096)  # a file says few dates many times
def _is_period(valid_from: str | None, valid_to: str | None) -> bool:
    """Whether both are times where given, and in order."""
    begin = None if valid_from is None else parse_time(valid_from)
    end = None if valid_to is None else parse_time(valid_to)
    if (valid_from and begin is None) or (valid_to and end is None):
        return False
    return begin is None or end is None or begin <= end
