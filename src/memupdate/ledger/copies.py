"""A copy of the whole ledger as it is at one moment, while others write.

Invariant: the copy is a whole ledger file of its own, with nothing left in a write-ahead log beside it.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from memupdate.ledger.clock import utc_now
from memupdate.ledger.database import LedgerDatabase, plain_errors
from memupdate.ledger.records import SliceRecord


class Copies(LedgerDatabase):
    """Copies, and what belongs to them."""

    def copy_to(self, path: Path) -> str:
        """Copy the ledger to a new file; returns the moment whose content it has, UTC.

        Raises:
            LedgerError: the disk is full, or the ledger cannot be read.
        """
        with plain_errors(path):
            copy = sqlite3.connect(path)
            try:
                # All pages in one step: one read transaction, which holds up no writer and is started over by none.
                moment = utc_now()
                self._connection.backup(copy, pages=-1)
                copy.execute("PRAGMA journal_mode = DELETE")
            finally:
                copy.close()
        return moment

    def newest_slices(self) -> list[SliceRecord]:
        """The newest slice of each batch that has one: those whose files are there."""
        rows = self._rows("SELECT * FROM slices WHERE id IN (SELECT MAX(id) FROM slices GROUP BY batch) ORDER BY batch")
        return [SliceRecord(**{name: row[name] for name in SliceRecord.__dataclass_fields__}) for row in rows]
