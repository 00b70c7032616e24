"""The chain finds what was altered, removed or added behind the ledger's back, and says where."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from memupdate.facts.model import Fact
from memupdate.ledger import Ledger, chain
from memupdate.ledger.migrations import MIGRATIONS
from memupdate.ledger.records import ProofRecord

A = Fact("Who leads Acme?", "Wanda Kettleman", valid_from="2025-01-01")
B = Fact("Where is Acme?", "Leeds", source="the fax", external_id="7")


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory, builder_of: Any) -> Path:
    """A ledger with a row in every table."""
    path = tmp_path_factory.mktemp("made") / "ledger.db"
    with Ledger.create(path) as ledger:
        builder_of(ledger).fill()
    return path


@pytest.fixture
def path(made_once: Path, tmp_path: Path) -> Path:
    return copied(made_once, tmp_path / "ledger.db")


def copied(path: Path, to: Path) -> Path:
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)
    return to


def findings(path: Path) -> list[str]:
    """All of `Ledger.verify` but for the schema, which tells that triggers are gone."""
    with Ledger.open(path, readonly=True) as ledger:
        facts, law = ledger.verify_facts(), ledger.verify_law()
        return [*ledger.verify_file(), *ledger.verify_chain(), *facts, *ledger.verify_purges(), *law]


def drop_triggers(plain: sqlite3.Connection) -> None:
    for (name,) in plain.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        plain.execute(f"DROP TRIGGER {name}")


def tampered(path: Path, *statements: str) -> list[str]:
    """What `verify` says after statements of a plain SQLite, without the triggers and foreign keys."""
    with sqlite3.connect(path) as plain:
        drop_triggers(plain)
        for statement in statements:
            assert plain.execute(statement).rowcount > 0, "the tampering itself must work"
    plain.close()
    return findings(path)


def columns_that_count() -> Iterator[tuple[str, str]]:
    database = Database(memory=True)
    MIGRATIONS.apply(database)
    for table in database.table_names():
        if not table.startswith(("_sqlite", "sqlite", "facts_fts")):
            yield from ((table, column.name) for column in database[table].columns)


@pytest.mark.parametrize(("table", "column"), sorted(columns_that_count()))
def test_no_value_can_be_altered_unnoticed(table: str, column: str, path: Path) -> None:
    with sqlite3.connect(path) as plain:
        found = plain.execute(f"SELECT rowid, typeof({column}), {column} FROM {table} ORDER BY rowid DESC").fetchone()
    assert found is not None, f"{table} has no row: give it one in Builder.fill"
    rowid, kind, _ = found
    value = {"integer": f"{column} + 40", "real": f"{column} + 0.5", "null": "'x'"}.get(kind, f"{column} || 'x'")
    with sqlite3.connect(path) as plain:  # a CHECK may allow few values
        plain.execute("PRAGMA ignore_check_constraints = ON")
        drop_triggers(plain)
        plain.execute(f"UPDATE {table} SET {column} = {value} WHERE rowid = ?", [rowid])
    plain.close()
    assert findings(path), f"{table}.{column} was altered unnoticed"


@pytest.mark.parametrize("table", sorted({table for table, _ in columns_that_count()}))
def test_no_row_can_go_unnoticed(table: str, path: Path) -> None:
    for order in ("ASC", "DESC"):
        problems = tampered(
            copied(path, path.with_name(f"{order}.db")),
            f"DELETE FROM {table} WHERE rowid = (SELECT rowid FROM {table} ORDER BY rowid {order} LIMIT 1)",
        )
        name = {"purges": "no purge says why"}.get(table, table)
        assert any(name in problem for problem in problems), problems


def test_a_finding_says_which_rows(path: Path) -> None:
    statement = "UPDATE batch_facts SET change = 'retracting', supersedes = fact WHERE batch = 1 AND position = 1"
    assert tampered(path, statement) == ["batch_facts: batch 1 was altered"]


def test_a_row_that_was_smuggled_in_has_no_link(path: Path) -> None:
    problems = tampered(path, "INSERT INTO collections VALUES ('evil', '2026')")
    assert problems == ["collections: collection evil was added from outside: it has no link"]


def test_a_chain_written_anew_has_another_head(path: Path) -> None:
    with Ledger.open(path, readonly=True) as ledger:
        noted = ledger.chain_head()
        assert ledger.has_link(noted.hash)
    with sqlite3.connect(path) as plain:
        drop_triggers(plain)
        plain.execute("UPDATE events SET kind = 'nothing' WHERE id = 1")
        plain.execute("DELETE FROM links")
        plain.execute("DELETE FROM sqlite_sequence WHERE name = 'links'")
        chain.seal_everything(plain, "2026-01-01T00:00:00.000Z")
    plain.close()
    with Ledger.open(path, readonly=True) as ledger:
        assert ledger.verify_chain() == []
        assert not ledger.has_link(noted.hash)


def test_a_transaction_that_is_undone_leaves_no_link(path: Path) -> None:
    with Ledger.open(path) as ledger:

        def fall_over() -> None:
            with ledger.transaction():
                ledger.add_event("note")
                raise KeyboardInterrupt

        before = ledger.chain_head()
        with pytest.raises(KeyboardInterrupt):
            fall_over()
        assert ledger.chain_head() == before
        ledger.add_event("note")
        assert ledger.chain_head().number == before.number + 1
        assert ledger.verify() == []


@given(steps=st.lists(st.sampled_from(["add", "change", "fail", "proofs", "note"]), max_size=6))
@settings(max_examples=10)
def test_whatever_the_ledger_does_keeps_the_chain(
    steps: list[str], tmp_path_factory: pytest.TempPathFactory, builder_of: Any
) -> None:
    with Ledger.create(tmp_path_factory.mktemp("chain") / "ledger.db") as ledger:
        build = builder_of(ledger)
        release = build.add(A, B)
        for number, step in enumerate(steps):
            if step == "add":
                release = build.add(Fact(f"question {number}", "answer"))
            elif step == "change":
                release = build.add(replace(B, target=f"town {number}"))
            elif step == "fail":
                ledger.fail_batch(build.receive([Fact(f"bad {number}", "answer")]).id, "loss was NaN")
            elif step == "proofs":
                ledger.record_proofs([ProofRecord(release.name, A.id, "served", bool(number % 2), 0.9)])
            else:
                ledger.add_event("note", detail={"number": number})
        assert ledger.verify() == []
