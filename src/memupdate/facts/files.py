"""What reading a facts file yields: the facts with their lines, what was wrong, and how a file is refused. Nothing here reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from memupdate.errors import FactsError
from memupdate.facts.model import Fact

MAX_DETAILS = 50
"""Problems that an error lists; it counts the rest."""

Unit = Literal["line", "element", "row"]
"""What a record is found by: a line of text, an element of a JSON array, a row of Parquet."""


class LocatedFact(NamedTuple):
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


def no_facts(path: str) -> FactsError:
    """The refusal of a file without a fact."""
    return FactsError(f"{path}: no facts in the file", "give a file with one JSON object a line")


def problems_found(path: str, shown: Sequence[Problem], *, problems: int, lines: int) -> FactsError:
    """The refusal of a file with problems.

    Args:
        shown: those to be listed, at least one.
        problems: how many there are in all.
        lines: how many lines have one.
    """
    details = [problem.describe(path) for problem in shown]
    if problems > len(shown):
        details.append(f"and {problems - len(shown)} more")
    unit = shown[0].unit
    count = f"1 {unit} with problems" if lines == 1 else f"{lines} {unit}s with problems"
    return FactsError(
        f"{path}: {count}; nothing was taken", "correct them, or take the rest with --skip-invalid", details
    )
