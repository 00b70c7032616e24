"""The log: what happened when, for the operator and for `status`. Append-only.

Decided from it is only what is in it already, and whether a release that still waits was meant to begin as a canary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from memupdate.ledger.clock import utc_now
from memupdate.ledger.database import LedgerDatabase
from memupdate.ledger.records import Event
from memupdate.storage import canonical_json


class Events(LedgerDatabase):
    """The event log."""

    def add_event(
        self,
        kind: str,
        *,
        collection: str | None = None,
        batch: int | None = None,
        release: str | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Log one event; `detail` must be JSON data without NaN."""
        row = {
            "at_utc": utc_now(),
            "kind": kind,
            "collection": collection,
            "batch": batch,
            "release": release,
            "detail_json": canonical_json(dict(detail or {})),
        }
        with self.transaction():
            self._insert("events", row)

    def events(
        self,
        collection: str | None = None,
        *,
        batch: int | None = None,
        kind: str | None = None,
        limit: int = 100,
    ) -> list[Event]:
        """The newest `limit` events that match (-1 for all), oldest of them first."""
        rows = self._rows(
            "SELECT * FROM events WHERE (:collection IS NULL OR collection = :collection) "
            "AND (:batch IS NULL OR batch = :batch) AND (:kind IS NULL OR kind = :kind) ORDER BY id DESC LIMIT :limit",
            {"collection": collection, "batch": batch, "kind": kind, "limit": limit},
        )
        return [
            Event(
                id=row["id"],
                at_utc=row["at_utc"],
                kind=row["kind"],
                collection=row["collection"],
                batch=row["batch"],
                release=row["release"],
                detail=json.loads(row["detail_json"]),
            )
            for row in reversed(rows)
        ]
