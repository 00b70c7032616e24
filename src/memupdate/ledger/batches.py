"""Batches: a facts file on its way into a release, one committed state at a time.

Invariant: states follow `received → planned → trained → verified → released → published`, or `failed` with a reason; a
collection has at most one batch that is not yet released; a `released` batch has a release. Each transition is one transaction, taken
when its files are in place.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

from memupdate.errors import LedgerError, UsageError
from memupdate.facts.files import FactsFile
from memupdate.layout import COLLECTION_PATTERN
from memupdate.ledger import chain
from memupdate.ledger.clock import utc_now
from memupdate.ledger.content import parse_fact, storable
from memupdate.ledger.events import Events
from memupdate.ledger.records import Batch, BatchFact, BatchState
from memupdate.ledger.staging import FactSource, Staged, Staging

_NEXT: dict[BatchState, tuple[BatchState, ...]] = {
    "received": ("planned", "failed"),
    "planned": ("trained", "failed"),
    "trained": ("verified", "failed"),
    "verified": ("released", "failed"),
    # The proof on the serving engine comes after the release, and may fail it.
    "released": ("published", "failed"),
    "published": (),
    "failed": (),
}

_UNFINISHED = "(state IN ('received', 'planned', 'trained', 'verified') OR (state = 'released' AND publish = 1))"


# Facts go in by their ids: each index then grows at one place, and a million of them need no more memory than a thousand.
_STORE_FACTS = """
INSERT INTO facts (id, key, prompt, target, subject, relation, content_json, created_at_utc)
SELECT id, key, prompt, target, subject, relation, content_json, :now FROM staged
WHERE told IS NULL OR told IN ('superseding', 'older', 'ended', 'future') ORDER BY id ON CONFLICT DO NOTHING
"""

_STORE_LINES = """
INSERT INTO fact_sources (fact, source, line, external_id, stated_source)
SELECT COALESCE(kept, id), :source, line, external_id, stated_source FROM staged
WHERE told IS NULL OR told NOT IN ('problem', 'conflicting') ORDER BY COALESCE(kept, id), line ON CONFLICT DO NOTHING
"""
"""A fact that is known already gets one more source."""

_RECORD = """
INSERT INTO recorded_facts (collection, fact, source, reason, current, told_at_utc)
SELECT :collection, id, :source, told, live, :now FROM staged WHERE told IN ('older', 'ended', 'future') ORDER BY seq
ON CONFLICT DO NOTHING
"""

_TEACH = """
INSERT INTO batch_facts (batch, fact, position, change, supersedes)
SELECT :batch, id, position, COALESCE(told, 'new'), CASE told WHEN 'superseding' THEN live END FROM (
    SELECT id, told, live, ROW_NUMBER() OVER (ORDER BY seq) - 1 AS position
    FROM staged WHERE told IS NULL OR told = 'superseding'
) ORDER BY id
"""


class Batches(Staging, Events):
    """Batches and their state machine."""

    def ensure_collection(self, collection: str) -> None:
        """Make the collection if it is not there. Raises UsageError for a name that no path or URL could carry."""
        if COLLECTION_PATTERN.fullmatch(collection) is None:
            raise UsageError(
                f"{collection!r}: not a name for a collection",
                "use up to 64 of a-z 0-9 . _ - and begin and end with a letter or digit",
            )
        with self.transaction():
            row = {"name": collection, "created_at_utc": utc_now()}
            self._insert_all("collections", [row], ignore=True)

    def collections(self) -> list[str]:
        """Names of all collections, sorted."""
        return [row["name"] for row in self._rows("SELECT name FROM collections ORDER BY name")]

    def receive_batch(
        self,
        collection: str,
        facts: Staged | FactSource | FactsFile,
        policy_json: str,
        *,
        publish: bool = True,
        skip_invalid: bool = False,
    ) -> Batch | None:
        """Store a facts file and what it changes: one transaction, from nothing to state `received`.

        Args:
            facts: a file, or what `stage` made of it.
            policy_json: the resolved policy, which the batch keeps to its end, also across `resume`.
            publish: whether the batch is finished only when published.
            skip_invalid: of a file that is not staged yet, see `stage`.

        Returns:
            The batch, or None where no fact is to be taught; the source, and what is only put on record, are stored either way.

        Raises:
            LedgerError: the collection has a batch that is not released yet.
            FactsError: the file cannot be taken.
        """
        if not isinstance(facts, Staged):
            with self.stage(collection, facts, skip_invalid=skip_invalid) as staged:
                return self.receive_batch(collection, staged, policy_json, publish=publish)
        with self.transaction():
            self.ensure_collection(collection)
            self._refuse_unfinished(collection)
            facts.refresh()
            now = utc_now()
            source = self._store_source(facts, now)
            if not facts.counts.taught:
                self.add_event("unchanged", collection=collection, detail={"file": storable(facts.path)})
                return None
            row = {
                "collection": collection,
                "source": source,
                "state": "received",
                "publish": int(publish),
                "facts_unchanged": facts.counts.unchanged,
                "policy_json": policy_json,
                "created_at_utc": now,
                "updated_at_utc": now,
            }
            batch = self._insert("batches", row)
            self._execute(_TEACH, {"batch": batch})
            self.add_event("state", collection=collection, batch=batch, detail={"state": "received"})
            # As `batch` would count it, which takes a second for a million facts.
            counts = {"facts_new": facts.counts.new, "facts_superseding": facts.counts.superseding}
            return _batch({**_NO_COUNTS, **row, **counts, "id": batch})

    def _refuse_unfinished(self, collection: str) -> None:
        # A release that waits for an engine is safely in the registry: the next batch builds on it.
        for other in (b for b in self.batches(collection, unfinished=True) if b.state != "released"):
            raise LedgerError(
                f"collection {collection}: batch {other.id} is unfinished (state {other.state})",
                "finish it with `memupdate resume`",
            )

    def _store_source(self, staged: Staged, now: str) -> int:
        """The file, its facts with their lines, and what is put on record without being taught."""
        source_row = {
            "path": storable(staged.path),
            "sha256": staged.sha256,
            "size_bytes": staged.size_bytes,
            "format": staged.format,
            "received_at_utc": now,
        }
        self._insert_all("sources", [source_row], ignore=True)
        found = self._row("SELECT id FROM sources WHERE path = :path AND sha256 = :sha256", source_row)
        assert found is not None  # inserted two lines above, in the same transaction
        parameters = {"source": int(found["id"]), "now": now, "collection": staged.collection}
        for statement in (_STORE_FACTS, _STORE_LINES, _RECORD):
            self._execute(statement, parameters)
        chain.note(self._connection, "source", int(found["id"]))
        return int(found["id"])

    def batch(self, batch: int) -> Batch:
        """One batch. Raises LedgerError where there is none with this id."""
        row = self._row("SELECT * FROM batch_summary WHERE id = ?", [batch])
        if row is None:
            raise LedgerError(f"batch {batch}: no such batch", "see `memupdate status`")
        return _batch(row)

    def batches(self, collection: str | None = None, *, unfinished: bool = False) -> list[Batch]:
        """Batches, oldest first; `unfinished` for those that `resume` would go on with."""
        rows = self._rows(
            f"SELECT * FROM batch_summary WHERE (:collection IS NULL OR collection = :collection) "
            f"AND (:all OR {_UNFINISHED}) ORDER BY id",
            {"collection": collection, "all": not unfinished},
        )
        return [_batch(row) for row in rows]

    def batch_facts(self, batch: int) -> list[BatchFact]:
        """The facts that a batch writes, in the order of its file."""
        rows = self._rows(
            "SELECT bf.*, f.content_json FROM batch_facts bf JOIN facts f ON f.id = bf.fact WHERE bf.batch = ? "
            "ORDER BY bf.position",
            [batch],
        )
        return [
            BatchFact(parse_fact(row["content_json"]), row["change"], row["supersedes"], row["outcome"]) for row in rows
        ]

    def set_plan(self, batch: int, plan_json: str) -> None:
        """Store the plan of a batch that is not trained yet. Raises LedgerError for any other."""
        with self.transaction():
            state = self.batch(batch).state
            if state not in ("received", "planned"):
                raise LedgerError(f"batch {batch}: is {state}, so its plan is fixed")
            self._execute(
                "UPDATE batches SET plan_json = ?, updated_at_utc = ? WHERE id = ?", [plan_json, utc_now(), batch]
            )

    def transition(self, batch: int, state: BatchState, detail: Mapping[str, Any] | None = None) -> None:
        """Move a batch one state on and log it with `detail`. To fail a batch, use `fail_batch`.

        Raises:
            LedgerError: the state machine has no such step, or what the state promises is missing (plan, release).
        """
        if state == "failed":
            raise ValueError("use fail_batch, which keeps the reason")
        with self.transaction():
            self._move(batch, state, None, detail or {})

    def fail_batch(self, batch: int, reason: str) -> None:
        """Give an unfinished batch up, for a reason of one line. Raises LedgerError for a published or failed one."""
        with self.transaction():
            self._move(batch, "failed", reason or "no reason given", {"reason": reason})

    def _move(self, batch_id: int, state: BatchState, reason: str | None, detail: Mapping[str, Any]) -> None:
        batch = self.batch(batch_id)
        if state not in _NEXT[batch.state]:
            allowed = ", ".join(_NEXT[batch.state]) or "nothing"
            raise LedgerError(f"batch {batch_id}: is {batch.state}, so it cannot become {state} (only {allowed})")
        if state == "planned" and batch.plan_json is None:
            raise LedgerError(f"batch {batch_id}: has no plan, so it cannot become planned")
        if state == "released" and batch.release is None:
            raise LedgerError(f"batch {batch_id}: has no release, so it cannot become released")
        self._execute(
            "UPDATE batches SET state = ?, failure_reason = ?, updated_at_utc = ? WHERE id = ?",
            [state, reason, utc_now(), batch_id],
        )
        logged = {"state": state, "from": batch.state, **detail}
        self.add_event("state", collection=batch.collection, batch=batch_id, release=batch.release, detail=logged)

    def set_outcomes(self, batch: int, proved: Mapping[str, bool]) -> None:
        """Store which of a batch's facts (by id) were proved; a later call may overrule an earlier one.

        Raises:
            LedgerError: the batch is published or failed, or a fact is not one of its own.
        """
        with self.transaction():
            state = self.batch(batch).state
            if not _NEXT[state]:
                raise LedgerError(f"batch {batch}: is {state}, so its outcomes are fixed")
            for fact, is_proved in proved.items():
                outcome = "proved" if is_proved else "unproved"
                done = self._execute(
                    "UPDATE batch_facts SET outcome = ? WHERE batch = ? AND fact = ?", [outcome, batch, fact]
                )
                if done.rowcount != 1:
                    raise LedgerError(f"batch {batch}: has no fact {fact}")


_NO_COUNTS = dict.fromkeys(
    ("facts_new", "facts_superseding", "facts_retracting", "facts_dropped", "facts_proved", "facts_unproved"), 0
) | {"plan_json": None, "failure_reason": None, "release": None, "kind": "add", "reason": None}


def _batch(row: sqlite3.Row | Mapping[str, Any]) -> Batch:
    return Batch(
        id=row["id"],
        collection=row["collection"],
        source=row["source"],
        state=row["state"],
        publish=bool(row["publish"]),
        policy_json=row["policy_json"],
        plan_json=row["plan_json"],
        failure_reason=row["failure_reason"],
        created_at_utc=row["created_at_utc"],
        updated_at_utc=row["updated_at_utc"],
        facts_new=row["facts_new"],
        facts_superseding=row["facts_superseding"],
        facts_unchanged=row["facts_unchanged"],
        facts_proved=row["facts_proved"],
        facts_unproved=row["facts_unproved"],
        release=row["release"],
        kind=row["kind"],
        reason=row["reason"],
        facts_retracting=row["facts_retracting"],
        facts_dropped=row["facts_dropped"],
    )
