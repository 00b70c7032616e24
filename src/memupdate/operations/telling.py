"""What a facts file does to a collection, in words: one line per kind of fact that is kept without being taught."""

from __future__ import annotations

from collections.abc import Sequence

from memupdate.ledger.records import ToldCounts, ToldFact
from memupdate.ledger.staging import Staged
from memupdate.operations.reports import PlanReport

EXAMPLES = 3
"""Facts that a message names; the rest it counts."""
SHOWN = 10
"""Facts of each kind that a table lists; the JSON document has all of them."""


def told_report(staged: Staged, file: str, *, skip_invalid: bool, limit: int = -1) -> PlanReport:
    """What each fact of the file would do, without a plan; the problems of a file that is refused for them are the error's to tell."""
    rows = tuple(staged.told(limit=limit))
    return PlanReport(
        file=file, collection=staged.collection, plan=None, new=tuple(row.prompt for row in rows if row.told == "new"),
        superseding=tuple((row.prompt, row.live_target or "", row.target) for row in rows if row.told == "superseding"),
        unchanged=staged.counts.unchanged, counts=staged.counts, rows=rows,
        skipped=skipped_lines(staged) if skip_invalid else (), messages=told_messages(staged),
    )  # fmt: skip


def skipped_lines(staged: Staged) -> tuple[str, ...]:
    """Problems of the lines that `--skip-invalid` left out."""
    return tuple(problem.describe(staged.path) for problem in staged.problems())


def told_messages(staged: Staged) -> tuple[str, ...]:
    """What is put on record without being taught, and why; empty for most files."""
    if not staged.counts.recorded:
        return ()
    rows = list(staged.told(limit=EXAMPLES))
    return recorded_messages(staged.counts, rows)


def recorded_messages(counts: ToldCounts, rows: Sequence[ToldFact]) -> tuple[str, ...]:
    """The same from counts and the first rows of each kind."""
    lines = []
    for kind, number, reason in (
        (
            "older",
            counts.older,
            "older than what is live (an earlier valid_from), so on record as history and not taught",
        ),
        ("ended", counts.ended, "true no more (valid_to is past), so on record as history and not taught"),
        (
            "future",
            counts.future,
            "not true yet (valid_from is to come), so on record; add the file again from then on",
        ),
    ):
        named = [row for row in rows if row.told == kind][:EXAMPLES]
        if number:
            more = f", and {number - len(named)} more" if number > len(named) else ""
            is_are = "fact is" if number == 1 else "facts are"
            lines.append(f"{number} {is_are} {reason}: {'; '.join(_shown(row) for row in named)}{more}")
    still = [row for row in rows if row.told == "ended" and row.live_target == row.target and row.live]
    lines += [
        f"line {row.line}: the model still says {_short(row.target)}; take it back with `memupdate facts retract "
        f"{(row.live or '').removeprefix('sha256:')[:16]}`"
        for row in still
    ]
    return tuple(lines)


def _shown(row: ToldFact) -> str:
    live = "" if row.live_target is None else f", live is {_short(row.live_target)}{_since(row.live_valid_from)}"
    until = f" until {row.valid_to}" if row.valid_to else ""
    return f"line {row.line}, {_short(row.prompt)} → {_short(row.target)}{_since(row.valid_from)}{until}{live}"


def _since(valid_from: str | None) -> str:
    return f" since {valid_from}" if valid_from else ""


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
