"""What an auditor asks of facts: the life of each value of a key, the whole trail of one fact, and what is waiting and why.

Invariant: each answer is one view of the schema (`fact_lifetimes`, `fact_trace`, `facts_waiting`), so that plain SQLite and
`memupdate` say the same. Full-text search has a module of its own.
"""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass
from typing import Any, TypeVar

from memupdate.errors import LedgerError
from memupdate.facts.model import normalise, prompt_key
from memupdate.ledger.facts import Facts
from memupdate.ledger.records import BatchState, Change, FactSource, FactStatus, RecordedReason
from memupdate.ledger.search import Search

_Row = TypeVar("_Row")

_ID_DIGITS = re.compile(r"(sha256:)?[0-9a-fA-F]{8,64}")
"""What is taken for the beginning of a fact's id where a prompt or a key may stand too."""


@dataclass(frozen=True)
class FactLifetime:
    """One value of a key in one collection: when it was true, when we were told, and which releases have it."""

    collection: str
    key: str
    fact: str
    """Its id."""
    prompt: str
    target: str
    change: Change
    status: FactStatus | RecordedReason
    valid_from: str | None
    """When it began to be true, as told."""
    valid_to: str | None
    batch: int | None
    """None for a fact on record that was not taught."""
    told_at_utc: str
    since_release: str | None
    """The release that brought it; None until there is one."""
    since_version: int | None
    since_utc: str | None
    until_release: str | None
    """The first release in which another value stands in its place."""
    until_version: int | None
    until_utc: str | None


@dataclass(frozen=True)
class FactTrace:
    """One way that a fact came: from a line of a file to a proved release."""

    fact: str
    collection: str
    status: FactStatus
    path: str | None
    """The file, as the operator gave it, or the command that made the batch."""
    line: int | None
    """1-based; None where no file's line states the fact: a stand-in, or a fact that a compaction leaves out."""
    file_sha256: str | None
    stated_source: str | None
    external_id: str | None
    batch: int
    kind: str
    batch_state: BatchState
    change: Change
    supersedes: str | None
    received_at_utc: str
    plan_rank: int | None
    law_fit: str | None
    """Id of the law fit that the plan was made with."""
    law_fit_at_utc: str | None
    slice_path: str | None
    slice_sha256: str | None
    release: str | None
    release_digest: str | None
    released_at_utc: str | None
    proved_in_process: bool | None
    """By the newest proof of the release that brought it; None where there was none."""
    proved_served: bool | None


@dataclass(frozen=True)
class ReleaseProofs:
    """The newest proof of a fact in one release on one engine."""

    release: str
    engine: str
    proved: bool
    min_probability: float | None
    proved_at_utc: str


@dataclass(frozen=True)
class FactExplanation:
    """Where an answer comes from."""

    id: str
    key: str
    prompt: str
    target: str
    releases: tuple[str, ...]
    """Releases that have it, oldest first."""
    sources: tuple[FactSource, ...]
    """Every line that ever stated it, also where it was known already or was not taught."""
    traces: tuple[FactTrace, ...]
    proofs: tuple[ReleaseProofs, ...]


@dataclass(frozen=True)
class WaitingFact:
    """A fact that was told and is in no release, and why; facts that a later batch told again are not counted."""

    collection: str
    fact: str
    """Its id."""
    prompt: str
    target: str
    status: FactStatus | RecordedReason
    batch: int | None
    """None for a fact that is not true yet."""
    batch_state: BatchState | None
    at_utc: str
    why: str


class Questions(Facts, Search):
    """Answers for auditors."""

    def history(self, asked: str, collection: str | None = None) -> list[FactLifetime]:
        """Every value of what `asked` names, by collection and key, in the order in which they were told.

        Args:
            asked: a fact's key, its prompt as a person would write it, `SUBJECT / RELATION`, or the beginning of an id.

        Raises:
            LedgerError: nothing in the ledger is about this.
        """
        rows: list[FactLifetime] = []
        for key in self._keys_of(asked):
            rows += self._records(
                FactLifetime,
                "SELECT * FROM fact_lifetimes WHERE key = :key AND (:collection IS NULL OR collection = :collection)",
                {"key": key, "collection": collection},
            )
        if not rows:
            place = "the ledger" if collection is None else f"collection {collection}"
            raise LedgerError(f"{asked}: nothing in {place} is about this", "look for it with `memupdate facts search`")
        return sorted(rows, key=lambda row: (row.collection, row.key, row.told_at_utc, row.batch or 0))

    def _keys_of(self, asked: str) -> list[str]:
        """The keys that `asked` may mean, the most literal first; only those that the ledger knows."""
        if _ID_DIGITS.fullmatch(asked):
            ids = f"sha256:{asked.removeprefix('sha256:').lower()}"
            found = self._rows("SELECT DISTINCT key FROM facts WHERE id >= ? AND id <= ?", [ids, f"{ids}g"])
            if found:
                return [row["key"] for row in found]
        subject, slash, relation = asked.partition(" / ")
        candidates = [asked, prompt_key(asked)]
        candidates += [f"sr:{normalise(subject)}\x1f{normalise(relation)}"] if slash else []
        known = [key for key in candidates if self._row("SELECT 1 FROM facts WHERE key = ? LIMIT 1", [key])]
        same_prompt = [
            hit.id for hit in self.search(f'"{asked}"', limit=-1) if normalise(hit.prompt) == normalise(asked)
        ]
        for fact in same_prompt:
            row = self._row("SELECT key FROM facts WHERE id = ?", [fact])
            known += [row["key"]] if row else []
        return list(dict.fromkeys(known))

    def explain(self, id_prefix: str) -> FactExplanation:
        """The whole trail of one fact: file and line, batch, plan, law fit, slice, releases, proofs.

        Raises:
            LedgerError: no fact's id begins so, or several do (listed).
        """
        detail = self.fact(id_prefix)
        fact = detail.fact
        traces = self._records(FactTrace, "SELECT * FROM fact_trace WHERE fact = ? ORDER BY batch, line", [fact.id])
        proofs = self._records(
            ReleaseProofs,
            """SELECT p.*, r.version FROM proofs p JOIN releases r ON r.name = p.release
            WHERE p.fact = :fact AND p.id IN (SELECT MAX(id) FROM proofs WHERE fact = :fact GROUP BY release, engine)
            ORDER BY r.collection, r.version, p.engine""",
            {"fact": fact.id},
        )
        return FactExplanation(
            fact.id, fact.key, fact.prompt, fact.target, detail.releases, detail.sources, tuple(traces), tuple(proofs)
        )

    def waiting(self, collection: str | None = None, *, limit: int = -1) -> list[WaitingFact]:
        """Facts that are in no release, with the reason, oldest batch first."""
        return self._records(
            WaitingFact,
            "SELECT * FROM facts_waiting WHERE (:collection IS NULL OR collection = :collection) "
            "ORDER BY collection, at_utc, batch, fact LIMIT :limit",
            {"collection": collection, "limit": limit},
        )

    def version_at(self, collection: str, moment_utc: str) -> int:
        """The newest good version of `collection` that was released by a moment (ISO 8601, UTC); 0 before the first."""
        row = self._row(
            "SELECT MAX(version) AS version FROM good_releases WHERE collection = ? AND created_at_utc <= ?",
            [collection, moment_utc],
        )
        return 0 if row is None or row["version"] is None else int(row["version"])

    def stand_in_ids(self, collection: str) -> frozenset[str]:
        """Ids of all that was ever told to a collection only to stand in for a retracted fact."""
        rows = self._rows(
            "SELECT bf.fact FROM batch_facts bf JOIN batches b ON b.id = bf.batch "
            "WHERE b.collection = ? AND bf.change = 'retracting'",
            [collection],
        )
        return frozenset(row["fact"] for row in rows)

    def datasette_metadata(self) -> dict[str, Any]:
        """Metadata with which Datasette makes sense of this file."""
        from memupdate.ledger.descriptions import datasette_metadata

        return datasette_metadata(self._connection, self.path.stem)

    def _records(self, kind: type[_Row], sql: str, parameters: Any) -> list[_Row]:
        return [_record(kind, row) for row in self._rows(sql, parameters)]


def _record(kind: type[_Row], row: sqlite3.Row) -> _Row:
    """A row as the dataclass whose fields its columns are called by; SQLite's 0 and 1 become false and true."""
    fields: dict[str, Any] = getattr(kind, "__dataclass_fields__")  # noqa: B009  # mypy does not know that it is a dataclass
    return kind(
        **{
            name: bool(row[name]) if "bool" in str(field.type) and row[name] is not None else row[name]
            for name, field in fields.items()
        }
    )
