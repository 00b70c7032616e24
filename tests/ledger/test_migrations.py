"""Forward from every earlier schema, with rows in every table that it had: nothing is lost or altered, and all of it verifies."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database

from memupdate.errors import LedgerError
from memupdate.facts.model import Fact
from memupdate.ledger import Ledger, chain
from memupdate.ledger.migrations import MIGRATIONS, STEPS

NAMES = list(STEPS)


def tables_of(connection: sqlite3.Connection) -> list[str]:
    """Our tables in the order of their making, so that no row refers to one that comes later."""
    rows = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' AND name NOT LIKE '%_fts%' "
        "AND name NOT LIKE '\\_%' ESCAPE '\\' ORDER BY rowid"
    )
    return [name for (name,) in rows]


def columns_of(connection: sqlite3.Connection, table: str) -> str:
    return ", ".join(f'"{row[1]}"' for row in connection.execute(f"PRAGMA table_info({table})"))


def content_of(connection: sqlite3.Connection, tables: dict[str, str]) -> dict[str, list[tuple[Any, ...]]]:
    return {table: connection.execute(f"SELECT {names} FROM {table}").fetchall() for table, names in tables.items()}


def old_ledger(path: Path, last_step: str, full: Path) -> dict[str, str]:
    """A ledger as `last_step` left it, with what `full` has for it; returns table → its columns."""
    later = NAMES[NAMES.index(last_step) + 1]
    database = Database(path)
    MIGRATIONS.apply(database, stop_before=later)
    old = database.conn
    old.execute("ATTACH ? AS given", [str(full)])
    columns = {table: columns_of(old, table) for table in tables_of(old)}
    for table, names in columns.items():
        if table != "links":
            old.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM given.{table} ORDER BY rowid")
    if "links" in columns:
        chain.seal_everything(old, "2026-11-24T00:00:00.000Z")
    if "m008_questions" in NAMES[: NAMES.index(last_step) + 1]:
        old.execute("INSERT INTO facts_fts (facts_fts) VALUES ('rebuild')")
    old.commit()
    for table in columns:
        assert old.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] > 0, f"{table} has no row"
    old.close()
    return columns


@pytest.mark.parametrize("last_step", NAMES[:-1])
def test_forward_with_rows_in_every_table(last_step: str, tmp_path: Path, builder_of: Any) -> None:
    full, path = tmp_path / "full.db", tmp_path / "ledger.db"
    with Ledger.create(full) as ledger:
        builder_of(ledger).fill(last_step)
        given_live = sorted(fact.target for fact in ledger.live_facts("acme"))
    columns = old_ledger(path, last_step, full)
    with closing(sqlite3.connect(path)) as old:
        before = content_of(old, columns)
    with pytest.raises(LedgerError, match="older memupdate"):
        Ledger.open(path, readonly=True)
    pending = [step.name for step in Ledger.pending_steps(path)]
    assert pending == NAMES[NAMES.index(last_step) + 1 :]
    with Ledger.open(path) as ledger:
        after = content_of(ledger._connection, columns)
        links = after.pop("links", [])
        assert [tuple(row) for row in links[: len(before.get("links", []))]] == before.pop("links", [])
        assert {table: [tuple(row) for row in rows] for table, rows in after.items()} == before
        assert ledger.verify() == []
        if "m003_releases" not in pending:
            assert sorted(fact.target for fact in ledger.live_facts("acme")) == given_live
            assert ledger.search("Wanda Kettleman")[0].target == "Wanda Kettleman"
        # What is there is built upon.
        new = Fact("Where is Cog?", "Goole")
        release = builder_of(ledger).add(new)
        assert release.version == 1 + len(before.get("releases", []))
        assert new in ledger.live_facts("acme")
        assert ledger.verify() == []


def test_the_newest_schema_is_filled_too(tmp_path: Path, builder_of: Any) -> None:
    with Ledger.create(tmp_path / "ledger.db") as ledger:
        builder_of(ledger).fill()
        for table in tables_of(ledger._connection):
            assert ledger._rows(f"SELECT 1 FROM {table} LIMIT 1"), f"{table} has no row: give it one in Builder.fill"
