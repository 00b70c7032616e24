"""Releases, the slices they came from and the proofs they carry.

Invariant: versions of a collection count up from 1 without reuse; a release never changes. This module moves no alias:
that is the registry's manifest.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, replace

from memupdate.errors import LedgerError
from memupdate.layout import release_name
from memupdate.ledger.clock import utc_now
from memupdate.ledger.database import LedgerDatabase
from memupdate.ledger.facts import proof_record
from memupdate.ledger.records import Engine, ProofRecord, ReleaseRecord, SliceRecord

_RELEASE_COLUMNS = tuple(ReleaseRecord.__dataclass_fields__)
_SLICE_COLUMNS = tuple(SliceRecord.__dataclass_fields__)


class Releases(LedgerDatabase):
    """Slices, releases and proofs."""

    def record_slice(self, record: SliceRecord) -> None:
        """Store what a batch changed. A batch that was trained again has several; `slice` gives the newest."""
        with self.transaction():
            self._insert("slices", asdict(replace(record, created_at_utc=record.created_at_utc or utc_now())))

    def slice(self, batch: int) -> SliceRecord | None:
        """The newest slice of a batch."""
        row = self._row("SELECT * FROM slices WHERE batch = ? ORDER BY id DESC LIMIT 1", [batch])
        return None if row is None else SliceRecord(**{name: row[name] for name in _SLICE_COLUMNS})

    def next_version(self, collection: str) -> int:
        """The version that the next release of `collection` gets; its folder is written before its row."""
        row = self._row("SELECT COALESCE(MAX(version), 0) + 1 AS next FROM releases WHERE collection = ?", [collection])
        return 1 if row is None else int(row["next"])

    def record_release(self, record: ReleaseRecord) -> None:
        """Store a release whose folder is in place.

        Raises:
            LedgerError: its version is not the next one, its name does not say so, or its parent is of another
            collection.
        """
        with self.transaction():
            expected = release_name(record.collection, self.next_version(record.collection))
            if (record.name, record.name) != (expected, release_name(record.collection, record.version)):
                raise LedgerError(f"{record.name} (version {record.version}): the next release is {expected}")
            if record.parent is not None and self.release(record.parent).collection != record.collection:
                raise LedgerError(f"{record.name}: its parent {record.parent} is of another collection")
            self._insert("releases", asdict(replace(record, created_at_utc=record.created_at_utc or utc_now())))

    def release(self, name: str) -> ReleaseRecord:
        """One release by name. Raises LedgerError where there is none, naming those that there are."""
        row = self._row("SELECT * FROM releases WHERE name = ?", [name])
        if row is None:
            known = [record.name for record in self.releases()][-10:]
            hint = f"there are: {', '.join(known)}" if known else "there is no release yet; `memupdate add` makes one"
            raise LedgerError(f"{name}: no such release", hint)
        return _release(row)

    def releases(self, collection: str | None = None, *, failed: bool = True) -> list[ReleaseRecord]:
        """Releases by collection and version; `failed=False` leaves out those whose batch failed after the release."""
        table = "releases" if failed else "good_releases"
        rows = self._rows(
            f"SELECT * FROM {table} WHERE (:collection IS NULL OR collection = :collection) "
            "ORDER BY collection, version",
            {"collection": collection},
        )
        return [_release(row) for row in rows]

    def latest_release(self, collection: str) -> ReleaseRecord | None:
        """The newest release that did not fail: what the next batch builds on. None before the first."""
        row = self._row("SELECT * FROM good_releases WHERE collection = ? ORDER BY version DESC LIMIT 1", [collection])
        return None if row is None else _release(row)

    def record_proofs(self, proofs: Sequence[ProofRecord]) -> None:
        """Store proofs of releases that are recorded (in the same transaction will do)."""
        now = utc_now()
        with self.transaction():
            self._insert_all(
                "proofs", [asdict(replace(proof, proved_at_utc=proof.proved_at_utc or now)) for proof in proofs]
            )

    def proofs(self, release: str, engine: Engine | None = None, *, latest: bool = True) -> list[ProofRecord]:
        """Proofs of a release, oldest first; `latest` gives only the newest of each fact and engine."""
        newest = (
            "AND id IN (SELECT MAX(id) FROM proofs WHERE release = :release GROUP BY fact, engine)" if latest else ""
        )
        rows = self._rows(
            f"SELECT * FROM proofs WHERE release = :release AND (:engine IS NULL OR engine = :engine) {newest} "
            "ORDER BY id",
            {"release": release, "engine": engine},
        )
        return [proof_record(row) for row in rows]


def _release(row: sqlite3.Row) -> ReleaseRecord:
    return ReleaseRecord(**{name: row[name] for name in _RELEASE_COLUMNS})
