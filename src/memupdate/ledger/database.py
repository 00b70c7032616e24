"""The ledger's connection: opening, refusing what is no ledger of ours, transactions, and SQLite's errors in plain
words.

Invariant: what a `transaction()` block did is there wholly or not at all, also after `kill -9`, a power cut or a full
disk; a ledger opened for reading is never written to. This module knows no tables.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from memupdate.errors import LedgerError
from memupdate.ledger import chain
from memupdate.ledger.clock import utc_now
from memupdate.ledger.migrations import APPLICATION_ID, APPLIED_TABLE, MIGRATION_SET, STEPS

_READ_ATTEMPTS = 5
_READ_PAUSE_S = 0.02
_BUSY_TIMEOUT_S = 10.0
"""How long to wait for another connection's transaction; ours take milliseconds."""

_CACHE_KIB = 48 * 1024
"""Pages kept in memory: enough for the index that a large batch fills in no order, and far from all of a large ledger."""
_TEMPORARY_PAGE_BYTES = 1 << 15
_LOG_BYTES = 64 * 2**20
"""What is left of the write-ahead log after a large transaction."""


@dataclass(frozen=True)
class PendingStep:
    """A migration that a ledger has not seen."""

    name: str
    does: str


class LedgerDatabase:
    """A checked connection to one ledger file. Use `Ledger`, which adds the tables."""

    def __init__(self, path: Path, connection: sqlite3.Connection, *, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self._connection = connection

    @classmethod
    def create(cls, path: Path | str) -> Self:
        """Make a ledger at `path`, or finish one that a crash left half made; opens one that is there.

        Raises:
            LedgerError: the file is no ledger of ours, or the folder cannot be written to.
        """
        return cls._connect(Path(path), readonly=False, create=True)

    @classmethod
    def open(cls, path: Path | str, *, readonly: bool = False) -> Self:
        """Open the ledger at `path`; for writing, bring its schema up to date.

        Raises:
            LedgerError: missing, no ledger, damaged, made by a newer memupdate, or (readonly) by an older one.
        """
        return cls._connect(Path(path), readonly=readonly, create=False)

    @classmethod
    def _connect(cls, path: Path, *, readonly: bool, create: bool) -> Self:
        if path.is_dir():
            raise LedgerError(f"{path}: is a folder, not a ledger", "give the workspace's folder with --workspace")
        if not create and not path.exists():
            raise LedgerError(f"{path}: no ledger here", "make a workspace with `memupdate init`, or check --workspace")
        with plain_errors(path):
            connection = _open_for_reading(path) if readonly else _open_for_writing(path, create=create)
        try:
            with plain_errors(path):
                ledger = cls(path, connection, readonly=readonly)
                ledger._check_identity(create=create)
                if not readonly:
                    # Kept in the file, so never set on a stranger's database.
                    connection.execute("PRAGMA journal_mode = WAL")
                ledger._migrate()
                if not readonly:
                    chain.watch(connection)
            return ledger
        except BaseException:
            connection.close()
            raise

    def _check_identity(self, *, create: bool) -> None:
        tables = [name for (name,) in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        (application_id,) = self._connection.execute("PRAGMA application_id").fetchone()
        blank = not set(tables) - {APPLIED_TABLE, "sqlite_sequence"}
        if application_id == APPLICATION_ID or (blank and create):
            return
        what = "an empty database" if blank else "a database, but not a memupdate ledger"
        hint = "make a workspace with `memupdate init`" if blank else "check --workspace; nothing was changed"
        raise LedgerError(f"{self.path}: {what}", hint)

    def _migrate(self) -> None:
        self._refuse_newer()
        applied = self._applied_steps()
        pending = [name for name in STEPS if name not in applied]
        if not pending:
            return
        if self.readonly:
            raise LedgerError(
                f"{self.path}: written by an older memupdate (it lacks {', '.join(pending)})",
                "run `memupdate ledger migrate` to bring it up to date; with --preview it says what would change",
            )
        from sqlite_utils import Database

        from memupdate.ledger.migrations import MIGRATIONS

        # Plug-ins of sqlite-utils belong to other people's databases.
        MIGRATIONS.apply(Database(self._connection, execute_plugins=False))

    def _refuse_newer(self) -> None:
        unknown = [name for name in self._applied_steps() if name not in STEPS]
        if unknown:
            raise LedgerError(
                f"{self.path}: written by a newer memupdate (it has {', '.join(unknown)})", "upgrade memupdate"
            )

    @classmethod
    def pending_steps(cls, path: Path | str) -> list[PendingStep]:
        """What opening the ledger at `path` for writing would change in its schema; nothing is written.

        Raises:
            LedgerError: missing, no ledger, damaged, or made by a newer memupdate.
        """
        path = Path(path)
        if not path.is_file():
            raise LedgerError(f"{path}: no ledger here", "make a workspace with `memupdate init`, or check --workspace")
        with plain_errors(path):
            connection = _open_for_reading(path)
            try:
                ledger = cls(path, connection, readonly=True)
                ledger._check_identity(create=False)
                ledger._refuse_newer()
                applied = ledger._applied_steps()
            finally:
                connection.close()
        steps = [(name, step) for name, step in STEPS.items() if name not in applied]
        return [PendingStep(name, " ".join((step.__doc__ or "").split())) for name, step in steps]

    def _applied_steps(self) -> list[str]:
        """Names of the steps that this file has seen, in order; looked up without sqlite-utils, for quick starts."""
        if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", [APPLIED_TABLE]).fetchone():
            return []
        sql = f"SELECT name FROM {APPLIED_TABLE} WHERE migration_set = ? ORDER BY rowid"
        return [name for (name,) in self._connection.execute(sql, [MIGRATION_SET])]

    def close(self) -> None:
        """Close the connection; an open transaction is rolled back."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. Blocks nest: an inner one that raises undoes itself, the outer one decides about the rest.

        Raises:
            LedgerError: the disk is full, the ledger is read-only or busy; nothing of the block is kept.
        """
        with plain_errors(self.path):
            if self._connection.in_transaction:
                with self._savepoint():
                    yield
                return
            # IMMEDIATE: take the write lock first, so that what the block reads cannot change before it writes.
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                chain.seal_changes(self._connection, utc_now())
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite may have rolled back by itself (disk full), and a failed COMMIT leaves the transaction open.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _savepoint(self) -> Iterator[None]:
        # Not `sqlite_utils.Database.atomic`, which does the same: importing it loads pandas where that is installed, 80 MB.
        self._connection.execute("SAVEPOINT inner_block")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:  # SQLite may have rolled back all of it by itself (disk full)
                self._connection.execute("ROLLBACK TO inner_block")
                self._connection.execute("RELEASE inner_block")
            raise
        self._connection.execute("RELEASE inner_block")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that the block reads is of one moment, whatever is written meanwhile; inside a transaction it is so anyway."""
        if self._connection.in_transaction:
            yield
            return
        with plain_errors(self.path):
            self._connection.execute("BEGIN")  # the moment is that of the first question
            try:
                yield
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def verify_file(self) -> list[str]:
        """What SQLite itself finds wrong with the file: damage and dangling references; empty where all is well."""
        problems = [str(row[0]) for row in self._rows("PRAGMA integrity_check") if row[0] != "ok"]
        for row in self._rows("PRAGMA foreign_key_check"):
            problems.append(f"{row['table']} row {row['rowid']}: refers to a row of {row['parent']} that is not there")
        return problems

    def _rows(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[sqlite3.Row]:
        with plain_errors(self.path):
            return self._connection.execute(sql, parameters).fetchall()

    def _row(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Row | None:
        rows = self._rows(sql, parameters)
        return rows[0] if rows else None

    def _execute(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Cursor:
        with plain_errors(self.path):
            return self._connection.execute(sql, parameters)

    def _insert(self, table: str, row: dict[str, Any]) -> int:
        """Insert one row; returns its rowid."""
        return int(self._execute(_insert_sql(table, row), row).lastrowid or 0)

    def _insert_all(self, table: str, rows: Iterable[dict[str, Any]], *, ignore: bool = False) -> None:
        """Insert rows with the same columns; `ignore` leaves those out that are there already."""
        listed = list(rows)
        if listed:
            with plain_errors(self.path):
                self._connection.executemany(_insert_sql(table, listed[0], ignore=ignore), listed)


def _insert_sql(table: str, row: dict[str, Any], *, ignore: bool = False) -> str:
    sql = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(':' + column for column in row)})"
    # Unlike OR IGNORE this passes over duplicates only, never over a broken constraint.
    return sql + " ON CONFLICT DO NOTHING" if ignore else sql


def _open_for_writing(path: Path, *, create: bool) -> sqlite3.Connection:
    connection = _open_uri(path, "rwc" if create else "rw")
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
        for schema in ("main", "temp"):
            connection.execute(f"PRAGMA {schema}.cache_size = -{_CACHE_KIB}")
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
    except BaseException:
        connection.close()
        raise
    return connection


def _open_for_reading(path: Path) -> sqlite3.Connection:
    """A connection that cannot write. In a read-only folder SQLite must be told that nobody else writes."""
    for attempt in range(_READ_ATTEMPTS):
        connection = _open_uri(path, "ro")
        try:
            connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            return connection
        except sqlite3.OperationalError:
            connection.close()
            wal = path.with_name(path.name + "-wal")
            frozen = not os.access(path.parent, os.W_OK) and not (wal.exists() and wal.stat().st_size > 0)
            if frozen:
                return _open_uri(path, "ro&immutable=1")
            # A writer that ends takes the -wal file with it: between two looks it may be there and not there.
            if attempt + 1 == _READ_ATTEMPTS:
                raise
            time.sleep(_READ_PAUSE_S)
        except BaseException:
            connection.close()
            raise
    raise AssertionError("the last attempt returns or raises")


def _open_uri(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    connection.row_factory = sqlite3.Row
    # A large file is staged in temporary tables: fewer pages, and not overwritten with zeros before their file is deleted.
    connection.execute(f"PRAGMA temp.page_size = {_TEMPORARY_PAGE_BYTES}")
    connection.execute("PRAGMA temp.secure_delete = OFF")
    return connection


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors about the file and the machine into one clear line; those that are bugs of ours pass."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
        known = _MESSAGES.get(code)
        if known is None:
            raise
        reason, hint = known
        raise LedgerError(f"{path}: {reason} ({error})", hint) from error


_MESSAGES = {
    sqlite3.SQLITE_FULL: (
        "the disk is full; nothing of this step was kept",
        "free some space, also where temporary files go ($SQLITE_TMPDIR or /var/tmp), and try again, or `memupdate resume` "
        "where a batch was begun",
    ),
    sqlite3.SQLITE_IOERR: ("the disk cannot be read or written", "check the disk, then run `memupdate resume`"),
    sqlite3.SQLITE_READONLY: ("the ledger cannot be written to", "check the permissions of the file and its folder"),
    sqlite3.SQLITE_CANTOPEN: ("the ledger cannot be opened", "check the permissions of the file and its folder"),
    sqlite3.SQLITE_PERM: ("the ledger cannot be opened", "check the permissions of the file and its folder"),
    sqlite3.SQLITE_BUSY: ("another process is writing to the ledger", "try again when it is done"),
    sqlite3.SQLITE_LOCKED: ("another connection is writing to the ledger", "try again when it is done"),
    sqlite3.SQLITE_NOTADB: ("not a ledger", "check --workspace; nothing was changed"),
    sqlite3.SQLITE_CORRUPT: (
        "the ledger is damaged",
        "restore it from a backup; `sqlite3 ledger.db .recover` may help",
    ),
}
