"""What people see of facts: rows with ids short enough to read and long enough to type, a key's values, a fact's trail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from memupdate.cli.render import to_plain, views

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memupdate.ledger.questions import FactExplanation, FactLifetime
    from memupdate.ledger.records import FactDetail, FactHistory
    from memupdate.operations.questions import FactsAsOf

SHOWN_ID = len("sha256:") + 12
"""Characters of a fact's id in a list; `facts show` takes a beginning of it."""

_LIST_COLUMNS = ("id", "prompt", "target", "status", "release")
_IDS = frozenset({"id", "fact", "supersedes"})


def rows_views(title: str, *columns: str) -> Callable[[Sequence[Any]], list[RenderableType]]:
    """A view of rows: one table with these columns, with short ids."""

    def view(rows: Sequence[Any]) -> list[RenderableType]:
        return views(title, [_short(row) for row in to_plain(rows)], columns=columns or _LIST_COLUMNS)

    return view


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value[:SHOWN_ID] if key in _IDS and value else value for key, value in row.items()}


def fact_row(history: FactHistory) -> dict[str, Any]:
    """A fact and what became of it, flat; the id, which is computed from the content, comes first."""
    plain: dict[str, Any] = to_plain(history)
    fact = plain.pop("fact")
    return {"id": history.fact.id, "prompt": fact["prompt"], "target": fact["target"], **plain}


def as_of_document(known: FactsAsOf) -> dict[str, Any]:
    """A release and its facts, each with all fields, as `rows`."""
    rows = [{"id": fact.id, "key": fact.key, **to_plain(fact), "release": known.release} for fact in known.facts]
    return {
        "collection": known.collection,
        "release": known.release,
        "facts_total": known.facts_total,
        "rows": rows,
    }


def fact_document(detail: FactDetail) -> dict[str, Any]:
    """All about one fact, its id first."""
    plain: dict[str, Any] = to_plain(detail)
    history = [{key: value for key, value in row.items() if key != "fact"} for row in plain["history"]]
    return {"id": detail.fact.id, **plain.pop("fact"), **plain, "history": history}


def history_views(rows: Sequence[FactLifetime]) -> list[RenderableType]:
    """One table per key and collection: value, valid time, transaction time."""
    shown: list[RenderableType] = []
    for collection, key in dict.fromkeys((row.collection, row.key) for row in rows):
        group = [row for row in rows if (row.collection, row.key) == (collection, key)]
        table = [
            {
                "id": row.fact[:SHOWN_ID],
                "target": row.target,
                "true": _span(row.valid_from, row.valid_to),
                "told_utc": _minute(row.told_at_utc),
                "releases": _releases(row),
                "status": row.status,
            }
            for row in group
        ]
        shown += views(f"{collection}: {group[-1].prompt}", table)
    return shown


def _span(begin: str | None, end: str | None) -> str | None:
    if begin is None and end is None:
        return None
    return f"{begin or '…'} to {end}" if end else f"from {begin}"


def _minute(moment_utc: str) -> str:
    return moment_utc[:16].replace("T", " ")


def _releases(row: FactLifetime) -> str | None:
    if row.since_release is None or row.status in ("failed", "unproved"):
        return None
    return f"{row.since_release} until {row.until_release}" if row.until_release else f"since {row.since_release}"


def explanation_views(found: FactExplanation) -> list[RenderableType]:
    """The fact, then each way it came as one column of steps, then its proofs."""
    plain = to_plain(found)
    shown = views(f"fact {found.id}", {name: plain[name] for name in ("prompt", "target", "key", "releases")})
    for trace in found.traces:
        line = f"{trace.path}:{trace.line}" if trace.line else trace.path
        plan = None if trace.plan_rank is None else f"rank {trace.plan_rank}"
        steps = {
            "line": line,
            "file": trace.file_sha256,
            "stated source": trace.stated_source,
            "batch": f"{trace.batch} ({trace.kind}), {trace.batch_state}, received {_minute(trace.received_at_utc)}",
            "change": trace.change if trace.supersedes is None else f"{trace.change} {trace.supersedes[:SHOWN_ID]}",
            "plan": plan,
            "law fit": trace.law_fit,
            "slice": None if trace.slice_path is None else f"{trace.slice_path} {trace.slice_sha256}",
            "release": None if trace.release is None else f"{trace.release} {trace.release_digest}",
            "status": trace.status,
        }
        shown += views(f"batch {trace.batch} of {trace.collection}", steps)
    if not found.traces:
        shown += views(
            "stated, not taught", [{"file": source.source.path, "line": source.line} for source in found.sources]
        )
    return shown + (views("proofs", plain["proofs"]) if plain["proofs"] else [])
