"""Reads facts files: every problem of a file at once, and nothing of it unless all of it is valid.

Invariant: in a `FactsFile` no two facts share an id or a key, and no wording asks for two answers. Nothing here knows
the ledger or a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from memupdate.errors import FactsError
from memupdate.facts.files import MAX_DETAILS, FactsFile, LocatedFact, Problem, Unit
from memupdate.facts.model import Fact, normalise
from memupdate.facts.secrets import SecretPatterns
from memupdate.facts.stream import MAX_LINE_BYTES, FactStream

__all__ = ["MAX_DETAILS", "MAX_LINE_BYTES", "FactsFile", "LocatedFact", "Problem", "collect_facts", "read_facts"]


def read_facts(
    path: Path | str,
    *,
    skip_invalid: bool = False,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,
    secrets: SecretPatterns | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> FactsFile:
    """Read all of a facts file into memory; for the arguments not listed here see `FactStream`.

    Args:
        skip_invalid: leave out lines with problems (of contradicting lines both) and list them in `skipped`.

    Raises:
        FactsError: the file cannot be read, has no facts, or has problems; `details` has `file:line: field: reason` for
        each.
    """
    stream = FactStream(path, columns=columns, format=format, secrets=secrets, max_line_bytes=max_line_bytes)
    return collect_facts(stream, skip_invalid=skip_invalid)


def collect_facts(stream: FactStream, *, skip_invalid: bool = False) -> FactsFile:
    """`read_facts` for a stream that is made already. Raises FactsError."""
    found = _Found()
    for item in stream:
        if isinstance(item, Problem):
            found.problems.append(item)
        else:
            found.add_fact(item, stream.unit)
    problems = tuple(sorted(found.problems, key=lambda problem: problem.line))
    facts = tuple(located for located in found.facts if (located.line, located.fact.id) not in found.contradicted)
    if problems and not (skip_invalid and facts):
        raise _error(stream.path, problems)
    if not facts:
        raise FactsError(f"{stream.path}: no facts in the file", "give a file with one JSON object a line")
    return FactsFile(
        path=stream.path,
        sha256=stream.sha256,
        size_bytes=stream.size_bytes,
        format=stream.format,
        facts=facts,
        skipped=problems,
        unit=stream.unit,
        duplicates=found.duplicates,
    )


@dataclass
class _Found:
    """What a file has yielded so far."""

    facts: list[LocatedFact] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    duplicates: int = 0
    contradicted: set[tuple[int, str]] = field(default_factory=set)
    """(line, id) of those that were taken before a later one contradicted them."""
    by_key: dict[str, LocatedFact] = field(default_factory=dict)
    by_wording: dict[str, LocatedFact] = field(default_factory=dict)
    """Prompts and paraphrases, normalised, and who asks them first."""

    def add_fact(self, new: LocatedFact, unit: Unit) -> None:
        """The next one, in the order of the file."""
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
            reason = f"says what {unit} {other.line} says, otherwise; make one {unit} of them, with paraphrases"
            self.problems.append(Problem(new.line, "prompt", reason, unit))
        else:
            self._contradict(other, new, unit)

    def _asks_the_same(self, fact: Fact) -> LocatedFact | None:
        """An earlier fact that asks one of this fact's questions and answers it differently."""
        others = (self.by_wording.get(key) for key in _wordings(fact))
        return next((other for other in others if other and other.fact.target != fact.target), None)

    def _contradict(self, old: LocatedFact, new: LocatedFact, unit: Unit) -> None:
        reason = f"{_quoted(new.fact.target)} contradicts {unit} {old.line}, which has {_quoted(old.fact.target)}"
        self.problems.append(Problem(new.line, "target", reason, unit))
        if (old.line, old.fact.id) not in self.contradicted:
            self.contradicted.add((old.line, old.fact.id))
            self.problems.append(Problem(old.line, "target", f"contradicted by {unit} {new.line}", unit))


def _says_the_same(old: Fact, new: Fact) -> bool:
    """Whether two facts teach the same, but for case, spacing and closing punctuation of the prompt."""
    return replace(old, prompt=normalise(old.prompt)).id == replace(new, prompt=normalise(new.prompt)).id


def _wordings(fact: Fact) -> list[str]:
    return [fact.wording_key(wording) for wording in (fact.prompt, *fact.paraphrases)]


def _quoted(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:57] + '..."'


def _error(path: str, problems: tuple[Problem, ...]) -> FactsError:
    details = [problem.describe(path) for problem in problems[:MAX_DETAILS]]
    if len(problems) > MAX_DETAILS:
        details.append(f"and {len(problems) - MAX_DETAILS} more")
    bad, unit = len({problem.line for problem in problems}), problems[0].unit
    count = f"1 {unit} with problems" if bad == 1 else f"{bad} {unit}s with problems"
    return FactsError(
        f"{path}: {count}; nothing was taken", "correct them, or take the rest with --skip-invalid", details
    )
