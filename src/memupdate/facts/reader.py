"""Reads facts files: every problem of a file at once, and nothing of it unless all of it is valid.

Invariant: in a `FactsFile` no two facts share an id or a key, and no wording asks for two answers. Nothing here knows
the ledger or a tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from memupdate.facts.contradictions import Contradictions
from memupdate.facts.files import MAX_DETAILS, FactsFile, LocatedFact, Problem, no_facts, problems_found
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
    problems: list[Problem] = []
    located: list[LocatedFact] = []
    for item in stream:
        if isinstance(item, Problem):
            problems.append(item)
        else:
            located.append(item)
    found = Contradictions(stream.unit)
    for seq, item in enumerate(located):
        found.add(seq, item.line, item.fact)
    problems += [problem for _, problem in (*found.refused, *found.contradicted)]
    problems.sort(key=lambda problem: problem.line)
    contradicted = {seq for seq, _ in found.contradicted}
    facts = tuple(located[seq] for seq in found.kept if seq not in contradicted)
    if problems and not (skip_invalid and facts):
        lines = len({problem.line for problem in problems})
        raise problems_found(stream.path, problems[:MAX_DETAILS], problems=len(problems), lines=lines)
    if not facts:
        raise no_facts(stream.path)
    return FactsFile(
        path=stream.path,
        sha256=stream.sha256,
        size_bytes=stream.size_bytes,
        format=stream.format,
        facts=facts,
        skipped=tuple(problems),
        unit=stream.unit,
        duplicates=len(found.repeats),
    )
