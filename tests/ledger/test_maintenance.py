"""Compactions and retractions in the ledger: what is live when, what is dead, and an old ledger brought up to date."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database

from memupdate.errors import LedgerError
from memupdate.facts.model import Fact
from memupdate.ledger import Ledger
from memupdate.ledger.maintenance import Retraction
from memupdate.ledger.migrations import MIGRATIONS

A = Fact("Who leads Acme?", "Wanda Kettleman")
A2 = replace(A, target="Otis Brand")
B = Fact("Where is Acme?", "Bruges")
NOT_A = replace(A, target="I do not know.")
NOT_A2 = replace(A2, target="I do not know.")


def retract(ledger: Ledger, build: Any, fact: Fact, stand_in: Fact, reason: str | None = None) -> str:
    batch = ledger.receive_retraction("acme", [Retraction(fact, stand_in)], "{}", reason=reason)
    return build.release(batch.id).name


def compact(ledger: Ledger, build: Any) -> str:
    return build.release(ledger.receive_compaction("acme", "{}").id).name


def statuses(ledger: Ledger, fact: Fact) -> list[tuple[str, str]]:
    return [(row.change, row.status) for row in ledger.fact(fact.id).history]


def test_a_retraction_stands_until_a_compaction_and_every_release_keeps_its_facts(ledger: Ledger, build: Any) -> None:
    build.add(A, B)
    assert retract(ledger, build, A, NOT_A, "a rumour") == "acme@v2"
    assert ledger.live_facts("acme") == [B, NOT_A]
    assert ledger.stand_ins("acme") == [Retraction(A, NOT_A)]
    assert ledger.replaced_facts("acme") == [A]
    assert (statuses(ledger, A), statuses(ledger, NOT_A)) == ([("new", "retracted")], [("retracting", "live")])
    batch = ledger.batches()[-1]
    assert (batch.kind, batch.reason, batch.facts_retracting, batch.facts_superseding) == ("retract", "a rumour", 1, 0)

    waiting = ledger.receive_compaction("acme", "{}")
    assert ledger.live_facts("acme") == [B, NOT_A], "not before it is released"
    assert ledger.live_facts("acme", with_batch=waiting.id) == [B]
    build.release(waiting.id)
    assert ledger.live_facts("acme") == [B]
    assert ledger.stand_ins("acme") == []
    assert ledger.replaced_facts("acme") == [A], "still to be proved gone by every later compaction"
    assert statuses(ledger, A) == [("new", "retracted"), ("dropped", "retracted")]
    assert statuses(ledger, NOT_A) == [("retracting", "dropped")]
    lives = [ledger.live_facts("acme", as_of_version=version) for version in (1, 2, 3)]
    assert lives == [[A, B], [B, NOT_A], [B]]
    assert ledger.fact(A.id).releases == ("acme@v1",)
    assert ledger.fact(NOT_A.id).releases == ("acme@v2",)
    assert ledger.fact(B.id).releases == ("acme@v1", "acme@v2", "acme@v3")


def test_a_retracted_fact_can_be_added_again_before_and_after_a_compaction(ledger: Ledger, build: Any) -> None:
    build.add(A, B)
    retract(ledger, build, A, NOT_A)
    build.add(A)
    assert ledger.live_facts("acme") == [B, A]
    assert (ledger.stand_ins("acme"), ledger.replaced_facts("acme")) == ([], [])
    retract(ledger, build, A, NOT_A)
    compact(ledger, build)
    assert ledger.live_facts("acme") == [B]
    assert ledger.diff("acme", [A]).new == (A,)
    build.add(A)
    assert ledger.live_facts("acme") == [B, A]
    assert statuses(ledger, A)[-1] == ("new", "live")


def test_dead_answers_are_counted_from_the_last_compaction(ledger: Ledger, build: Any) -> None:
    build.add(A, B)
    assert ledger.dead_count("acme") == 0
    build.add(A2)
    retract(ledger, build, A2, NOT_A2)
    assert ledger.dead_count("acme") == 2
    assert ledger.replaced_facts("acme") == [A, A2]
    compact(ledger, build)
    assert ledger.dead_count("acme") == 0
    assert ledger.replaced_facts("acme") == [A, A2]
    assert ledger.dead_count("other") == 0


def test_a_failed_compaction_drops_nothing(ledger: Ledger, build: Any) -> None:
    build.add(A, B)
    retract(ledger, build, A, NOT_A)
    batch = ledger.receive_compaction("acme", "{}")
    with pytest.raises(LedgerError, match="unfinished"):
        ledger.receive_compaction("acme", "{}")
    ledger.fail_batch(batch.id, "no room")
    assert ledger.live_facts("acme") == [B, NOT_A]
    compact(ledger, build)
    assert ledger.live_facts("acme") == [B]


def test_an_old_ledger_keeps_its_rows_and_takes_retractions(tmp_path: Path, builder_of: Any) -> None:
    path = tmp_path / "ledger.db"
    with Ledger.create(path) as ledger:
        build = builder_of(ledger)
        build.add(A, B)
        build.add(A2)
    # The same rows as a memupdate before compactions wrote them: the schema up to that step, filled from the new one.
    old = tmp_path / "old.db"
    database = Database(old)
    MIGRATIONS.apply(database, stop_before="m007_compaction_and_retraction")
    database.execute("ATTACH DATABASE ? AS filled", [str(path)])
    with database.atomic():
        database.execute("PRAGMA defer_foreign_keys = ON")
        for table in ("sources", "facts", "fact_sources", "collections", "batches", "batch_facts", "releases"):
            columns = ", ".join(database[table].columns_dict)
            database.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM filled.{table}")
    database.close()
    with Ledger.open(old) as ledger:
        assert ledger.live_facts("acme") == [B, A2]
        assert [(b.kind, b.facts_new, b.facts_superseding) for b in ledger.batches()] == [("add", 2, 0), ("add", 0, 1)]
        assert ledger.verify() == []
        build = builder_of(ledger)
        retract(ledger, build, A2, NOT_A2)
        assert ledger.live_facts("acme") == [B, NOT_A2]
    with sqlite3.connect(old) as plain, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        plain.execute("DELETE FROM batch_facts")
    with sqlite3.connect(old) as plain, pytest.raises(sqlite3.IntegrityError, match="only a batch"):
        plain.execute("UPDATE batches SET reason = 'x'")
