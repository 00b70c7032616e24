"""What reading a facts file yields: the facts with their lines, and what was wrong. Plain data; nothing here reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memupdate.facts.model import Fact

MAX_DETAILS = 50
"""Problems that an error lists; it counts the rest."""

Unit = Literal["line", "element", "row"]
"""What a record is found by: a line of text, an element of a JSON array, a row of Parquet."""


@dataclass(frozen=True)
class LocatedFact:
    """A fact and where it stands in its file."""

    fact: Fact
    line: int
    """1-based line of the file (the first one, where the same fact comes again); of an array its element, of Parquet its row."""


@dataclass(frozen=True)
class Problem:
    """Why one line, or the file as a whole, cannot be taken."""

    line: int
    """1-based; 0 for the file as a whole."""
    field: str
    """The field at fault, for example `paraphrases[2]`; `line`, `element` or `row` for all of it."""
    reason: str
    unit: Unit = "line"
    """What `line` counts."""

    def describe(self, path: str) -> str:
        """`file:line: field: reason`, or `file: element 7: field: reason`."""
        place = f":{self.line}" if self.unit == "line" else f": {self.unit} {self.line}"
        return f"{path}{place}: {self.field}: {self.reason}"


@dataclass(frozen=True)
class FactsFile:
    """A facts file as read: no two facts share an id or a key."""

    path: str
    sha256: str
    """Tagged digest of the file's bytes."""
    size_bytes: int
    format: str
    """Names of the formats found, joined by `+` where a file mixes them."""
    facts: tuple[LocatedFact, ...]
    skipped: tuple[Problem, ...] = ()
    """What `skip_invalid` left out."""
    unit: Unit = "line"
    """What the lines of its facts count."""
    duplicates: int = 0
    """Lines that say what an earlier line said; taken once."""
