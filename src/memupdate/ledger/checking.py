"""Is the ledger what was written? Everything that can be recomputed from the file alone, each finding in one line.

Invariant: checking writes nothing and never stops at the first finding; a line names the table and the row, or the group of rows,
at fault. Adapter files lie outside the ledger: `memupdate.operations.checking` compares them with the digests kept here.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from memupdate.ledger import chain
from memupdate.ledger.database import LedgerDatabase, plain_errors


@dataclass(frozen=True)
class FileDigest:
    """A folder of the workspace whose digest the ledger keeps."""

    name: str
    """`release acme@v7` or `slice 3`."""
    relative_path: str
    """From the workspace's root."""
    digest: str


@dataclass(frozen=True)
class ChainHead:
    """The newest link of the chain. Noted outside the ledger, it tells later that nothing before it was written anew."""

    number: int
    hash: str


class Checking(LedgerDatabase):
    """The chain and the schema against what is there."""

    def verify_chain(self) -> list[str]:
        """Altered, missing and added rows of every table."""
        with plain_errors(self.path):
            return chain.find_breaks(self._connection)

    def verify_schema(self) -> list[str]:
        """Triggers and views that are missing or not as the migrations make them."""
        from sqlite_utils import Database

        from memupdate.ledger.migrations import MIGRATIONS

        fresh = Database(memory=True, execute_plugins=False)
        MIGRATIONS.apply(fresh)
        wanted, found = _objects(fresh.conn), _objects(self._connection)
        fresh.close()
        problems = [f"schema: {kind} {name} is missing" for kind, name in wanted if (kind, name) not in found]
        for key, sql in wanted.items():
            if found.get(key, sql) != sql:
                problems.append(f"schema: {key[0]} {key[1]} was altered")
        return problems

    def chain_head(self) -> ChainHead:
        """The newest link."""
        with plain_errors(self.path):
            return ChainHead(*chain.head(self._connection))

    def has_link(self, link_hash: str) -> bool:
        """Whether a hash that was noted once is in the chain."""
        return self._row("SELECT 1 FROM links WHERE hash = ?", [link_hash]) is not None

    def file_digests(self) -> list[FileDigest]:
        """What the registry and the slices must be, by release and slice; of a batch that was trained again, the newest slice."""
        releases = self._rows("SELECT name, relative_path, digest FROM releases ORDER BY collection, version")
        slices = self._rows(
            "SELECT id, relative_path, sha256 FROM slices WHERE id IN (SELECT MAX(id) FROM slices GROUP BY batch) ORDER BY id"
        )
        return [
            *(FileDigest(f"release {row['name']}", row["relative_path"], row["digest"]) for row in releases),
            *(FileDigest(f"slice {row['id']}", row["relative_path"], row["sha256"]) for row in slices),
        ]


def _objects(connection: sqlite3.Connection) -> dict[tuple[str, str], str]:
    rows = connection.execute("SELECT type, name, sql FROM sqlite_master WHERE type IN ('trigger', 'view')")
    return {(row[0], row[1]): row[2] for row in rows}
