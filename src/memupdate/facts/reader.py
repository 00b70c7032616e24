"""Reads facts files: every problem of a file at once, and nothing of it unless all of it is valid.

Invariant: in a `FactsFile` no two facts share an id or a key, and no wording asks for two answers. Nothing here knows
the ledger or a tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memupdate.errors import FactsError
from memupdate.facts.files import FactsFile, LocatedFact, Problem
from memupdate.facts.formats import RecordProblems, detect_format
from memupdate.facts.lines import Line, LineReader
from memupdate.facts.model import Fact, normalise, prompt_key

__all__ = ["MAX_DETAILS", "MAX_LINE_BYTES", "FactsFile", "LocatedFact", "Problem", "read_facts"]

MAX_LINE_BYTES = 16 * 2**20
"""A fact is a sentence, a passage a page; a longer line is some other file."""

MAX_DETAILS = 50
"""Problems that an error lists; it counts the rest."""


def read_facts(path: Path | str, *, skip_invalid: bool = False, max_line_bytes: int = MAX_LINE_BYTES) -> FactsFile:
    """Read a facts file: JSON Lines in any of the formats of `memupdate.facts.formats`, also mixed.

    Args:
        skip_invalid: leave out lines with problems (of contradicting lines both) and list them in `skipped`.
        max_line_bytes: longer lines are problems, and are not kept in memory.

    Raises:
        FactsError: the file cannot be read, has no facts, or has problems; `details` has `file:line: field: reason` for
        each.
    """
    path = Path(path)
    lines = LineReader(path, max_line_bytes)
    found = _Found()
    for line in lines:
        found.add_line(line)
    problems = tuple(sorted(found.problems, key=lambda problem: problem.line))
    facts = tuple(located for located in found.facts if located.line not in found.contradicted)
    if problems and not (skip_invalid and facts):
        raise _error(path, problems)
    if not facts:
        raise FactsError(f"{path}: no facts in the file", "give a file with one JSON object a line")
    return FactsFile(
        path=str(path),
        sha256=lines.sha256,
        size_bytes=lines.size_bytes,
        format="+".join(sorted(found.formats)),
        facts=facts,
        skipped=problems,
        duplicates=found.duplicates,
    )


@dataclass
class _Found:
    """What a file has yielded so far."""

    facts: list[LocatedFact] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    formats: set[str] = field(default_factory=set)
    duplicates: int = 0
    contradicted: set[int] = field(default_factory=set)
    """Lines that were taken before a later one contradicted them."""
    by_key: dict[str, LocatedFact] = field(default_factory=dict)
    by_wording: dict[str, LocatedFact] = field(default_factory=dict)
    """Prompts and paraphrases, normalised, and who asks them first."""

    def add_line(self, line: Line) -> None:
        if line.problem:
            self.problems.append(Problem(line.number, "line", line.problem))
        elif line.text and not line.text.isspace():
            try:
                record = _parse_object(line.text)
                known = detect_format(record)
                fact = known.parse(record)
            except RecordProblems as error:
                self.problems.extend(Problem(line.number, name, reason) for name, reason in error.problems)
                return
            self.formats.add(known.name)
            self._add_fact(LocatedFact(fact, line.number))

    def _add_fact(self, new: LocatedFact) -> None:
        old = self.by_key.get(new.fact.key)
        if old is not None and _says_the_same(old.fact, new.fact):
            self.duplicates += 1
            return
        other = old or self._asks_the_same(new.fact)
        if other is None:
            self.facts.append(new)
            self.by_key[new.fact.key] = new
            for key in _wordings(new.fact):
                self.by_wording.setdefault(key, new)
        elif other.fact.target == new.fact.target:
            reason = f"says what line {other.line} says, otherwise; make one line of them, with paraphrases"
            self.problems.append(Problem(new.line, "prompt", reason))
        else:
            self._contradict(other, new)

    def _asks_the_same(self, fact: Fact) -> LocatedFact | None:
        """An earlier fact that asks one of this fact's questions and answers it differently."""
        others = (self.by_wording.get(key) for key in _wordings(fact))
        return next((other for other in others if other and other.fact.target != fact.target), None)

    def _contradict(self, old: LocatedFact, new: LocatedFact) -> None:
        reason = f"{_quoted(new.fact.target)} contradicts line {old.line}, which has {_quoted(old.fact.target)}"
        self.problems.append(Problem(new.line, "target", reason))
        if old.line not in self.contradicted:
            self.contradicted.add(old.line)
            self.problems.append(Problem(old.line, "target", f"contradicted by line {new.line}"))


def _parse_object(text: str) -> dict[str, Any]:
    """Raises RecordProblems for anything but one JSON object with distinct keys."""
    try:
        record = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except RecursionError as error:
        raise RecordProblems([("line", "nested too deeply")]) from error
    except json.JSONDecodeError as error:
        raise RecordProblems([("line", f"not JSON: {error.msg} at column {error.colno}")]) from error
    except ValueError as error:  # a number too long to be converted
        raise RecordProblems([("line", f"not JSON: {error}")]) from error
    if isinstance(record, list):
        raise RecordProblems([("line", "a JSON list; give one object a line (`jq -c '.[]'` makes them)")])
    if not isinstance(record, dict):
        raise RecordProblems([("line", "not a JSON object; give one object a line, in braces")])
    return record


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in pairs:
        if name in record:
            raise RecordProblems([(name if name.isprintable() else repr(name), "comes twice in one object")])
        record[name] = value
    return record


def _no_constant(name: str) -> Any:
    raise RecordProblems([("line", f"not JSON: {name} is no JSON value")])


def _says_the_same(old: Fact, new: Fact) -> bool:
    """Whether two facts teach the same, but for case, spacing and closing punctuation of the prompt."""
    return replace(old, prompt=normalise(old.prompt)).id == replace(new, prompt=normalise(new.prompt)).id


def _wordings(fact: Fact) -> list[str]:
    return [prompt_key(wording) for wording in (fact.prompt, *fact.paraphrases)]


def _quoted(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:57] + '..."'


def _error(path: Path, problems: tuple[Problem, ...]) -> FactsError:
    details = [problem.describe(str(path)) for problem in problems[:MAX_DETAILS]]
    if len(problems) > MAX_DETAILS:
        details.append(f"and {len(problems) - MAX_DETAILS} more")
    bad_lines = len({problem.line for problem in problems})
    count = "1 line with problems" if bad_lines == 1 else f"{bad_lines} lines with problems"
    return FactsError(
        f"{path}: {count}; nothing was taken", "correct them, or take the rest with --skip-invalid", details
    )
