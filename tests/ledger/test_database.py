"""The ledger as a file: opening, refusing, crashing, running out of space."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database

from memupdate.errors import LedgerError
from memupdate.facts.model import Fact
from memupdate.ledger import Ledger
from memupdate.ledger.migrations import MIGRATIONS
from memupdate.storage import file_sha256

A = Fact("Who leads Acme?", "Wanda Kettleman")


def test_a_new_ledger_is_whole_and_durable(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger.create(path) as ledger:
        pragmas = {name: ledger._row(f"PRAGMA {name}")[0] for name in ("journal_mode", "foreign_keys", "synchronous")}
        assert pragmas == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2}
        assert ledger.verify() == []
    assert os.listdir(tmp_path) == ["ledger.db"]
    before = file_sha256(path)
    Ledger.create(path).close()
    Ledger.open(path).close()
    assert file_sha256(path) == before, "opening again changes nothing"


def test_missing_folder_and_stranger_files(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger here") as caught:
        Ledger.open(tmp_path / "ledger.db")
    assert "memupdate init" in caught.value.hint
    assert not (tmp_path / "ledger.db").exists()
    with pytest.raises(LedgerError, match="is a folder"):
        Ledger.open(tmp_path)
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger.create(tmp_path / "no" / "such" / "folder.db")
    text = tmp_path / "notes.txt"
    text.write_text("these are notes, not a database " * 40, "utf-8")
    for readonly in (False, True):
        with pytest.raises(LedgerError, match="not a ledger"):
            Ledger.open(text, readonly=readonly)
    empty = tmp_path / "empty.db"
    empty.touch()
    with pytest.raises(LedgerError, match="an empty database"):
        Ledger.open(empty)


@pytest.mark.parametrize("opener", [Ledger.open, Ledger.create])
def test_another_programs_database_is_left_as_it_was(opener: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE facts (x)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="not a memupdate ledger"):
        opener(path)
    assert path.read_bytes() == before


def test_a_damaged_ledger_says_so(tmp_path: Path, builder_of: Any) -> None:
    path = tmp_path / "ledger.db"
    with Ledger.create(path) as ledger:
        builder_of(ledger).receive([Fact(f"q{n}", "a" * 50) for n in range(300)])
    raw = bytearray(path.read_bytes())
    raw[4096 * 3 :] = b"\xff" * (len(raw) - 4096 * 3)
    path.write_bytes(raw)
    with pytest.raises(LedgerError, match="damaged"), Ledger.open(path, readonly=True) as ledger:
        ledger.facts_list(status=None)


def test_a_newer_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    Ledger.create(path).close()
    with sqlite3.connect(path) as plain:
        plain.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('memupdate', 'm999_future', '')"
        )
    plain.close()
    for readonly in (False, True):
        with pytest.raises(LedgerError, match=r"newer memupdate .*m999_future") as caught:
            Ledger.open(path, readonly=readonly)
        assert caught.value.hint == "upgrade memupdate"


STEPS = [migration.name for migration in MIGRATIONS._migrations]


@pytest.mark.parametrize("stop_before", STEPS)
def test_a_schema_that_was_left_half_way_is_finished(stop_before: str, tmp_path: Path, builder_of: Any) -> None:
    path = tmp_path / "ledger.db"
    database = Database(path)
    MIGRATIONS.apply(database, stop_before=stop_before)
    if stop_before != STEPS[0]:
        database.execute(
            "INSERT INTO sources (path, sha256, size_bytes, format, received_at_utc) VALUES ('old', '', 1, 'n', '')"
        )
        database.conn.commit()
        with pytest.raises(LedgerError, match="older memupdate"):
            Ledger.open(path, readonly=True)
    database.close()
    with Ledger.create(path) as ledger:
        builder_of(ledger).add(A)
        assert ledger.live_facts("acme") == [A]
        kept = [row["path"] for row in ledger._rows("SELECT path FROM sources ORDER BY id")]
        assert kept == (["facts.jsonl"] if stop_before == STEPS[0] else ["old", "facts.jsonl"])


def test_a_migration_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    database = Database(path)
    MIGRATIONS.apply(database, stop_before=STEPS[1])
    database.execute("CREATE TABLE batch_facts (in_the_way)")
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        MIGRATIONS.apply(database)
    assert "batches" not in database.table_names()
    assert "collections" not in database.table_names()
    assert [step.name for step in MIGRATIONS.pending(database)] == STEPS[1:]


def test_reading_never_writes(tmp_path: Path, builder_of: Any) -> None:
    path = tmp_path / "ledger.db"
    with Ledger.create(path) as ledger:
        builder_of(ledger).add(A)
    before, stamp = file_sha256(path), path.stat().st_mtime_ns
    with Ledger.open(path, readonly=True) as reader:
        assert reader.live_facts("acme") == [A]
        assert reader.verify() == []
        with pytest.raises(LedgerError, match="cannot be written to"):
            reader.add_event("note")
        with pytest.raises(LedgerError, match="cannot be written to"):
            reader.ensure_collection("new")
    assert (file_sha256(path), path.stat().st_mtime_ns) == (before, stamp)


def test_reading_beside_a_writer(tmp_path: Path, builder_of: Any) -> None:
    path = tmp_path / "ledger.db"
    with Ledger.create(path) as writer, Ledger.open(path, readonly=True) as reader:
        builder_of(writer).add(A)
        assert reader.live_facts("acme") == [A]
        with writer.transaction():
            writer.add_event("note")
            assert reader.events(kind="note") == []
        assert len(reader.events(kind="note")) == 1


def test_reading_in_a_folder_that_cannot_be_written_to(
    tmp_path: Path, builder_of: Any, obeying_permissions: list[str]
) -> None:
    folder = tmp_path / "frozen"
    folder.mkdir()
    with Ledger.create(folder / "ledger.db") as ledger:
        builder_of(ledger).add(A)
    code = (
        "import sys\nfrom memupdate.errors import LedgerError\nfrom memupdate.ledger import Ledger\n"
        "with Ledger.open(sys.argv[1], readonly=True) as reader:\n    print(reader.live_facts('acme')[0].target)\n"
        "try:\n    Ledger.open(sys.argv[1])\nexcept LedgerError as error:\n    print(error.message, error.hint)\n"
    )
    (folder / "ledger.db").chmod(0o444)
    folder.chmod(0o555)
    try:
        command = [*obeying_permissions, sys.executable, "-c", code, str(folder / "ledger.db")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        folder.chmod(0o755)
    read, refused = done.stdout.splitlines()
    assert read == A.target
    assert "check the permissions of the file and its folder" in refused
    assert os.listdir(folder) == ["ledger.db"]


def test_a_full_disk_is_one_clear_line_and_nothing_is_kept(tmp_path: Path, builder_of: Any) -> None:
    with Ledger.create(tmp_path / "ledger.db") as ledger:
        builder_of(ledger).add(A)
        pages = ledger._row("PRAGMA page_count")[0]
        ledger._execute(f"PRAGMA max_page_count = {pages + 10}")
        with pytest.raises(LedgerError, match="the disk is full; nothing of this step was kept") as caught:
            builder_of(ledger).receive([Fact(f"question {n}", "answer " * 20) for n in range(2000)])
        assert "memupdate resume" in caught.value.hint
        assert len(ledger.batches()) == 1
        assert ledger.verify() == []
        ledger._execute("PRAGMA max_page_count = 100000")
        builder_of(ledger).add(Fact("q", "a"))
        assert len(ledger.live_facts("acme")) == 2


def test_a_second_connections_write_waits_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memupdate.ledger.database._BUSY_TIMEOUT_S", 0.05)
    path = tmp_path / "ledger.db"
    with Ledger.create(path) as one, Ledger.open(path) as two:
        with one.transaction(), pytest.raises(LedgerError, match="another process is writing"), two.transaction():
            pass
        two.add_event("now free")


def test_an_inner_block_that_fails_undoes_itself_only(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.db") as ledger:

        def inner(kind: str, *, fails: bool) -> None:
            with ledger.transaction():
                ledger.add_event(kind)
                if fails:
                    raise ValueError(kind)

        with ledger.transaction():
            ledger.add_event("outer")
            inner("kept", fails=False)
            with pytest.raises(ValueError, match="undone"):
                inner("undone", fails=True)
        assert [event.kind for event in ledger.events()] == ["outer", "kept"]
        with pytest.raises(ValueError, match="undone"), ledger.transaction():
            inner("undone", fails=True)
        assert len(ledger.events()) == 2
        assert ledger.verify() == []


def test_writing_does_not_load_what_migrations_need(tmp_path: Path) -> None:
    """sqlite-utils loads pandas where that is installed."""
    Ledger.create(tmp_path / "ledger.db").close()
    code = (
        "import sys\nfrom memupdate.facts.files import FactsFile, LocatedFact\nfrom memupdate.facts.model import Fact\n"
        "from memupdate.ledger import Ledger\n"
        "with Ledger.open(sys.argv[1]) as ledger:\n"
        "    ledger.receive_batch('acme', FactsFile('f', 'sha256:', 1, 'native', (LocatedFact(Fact('q', 'a'), 1),)), '{}')\n"
        "print('sqlite_utils' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ledger.db")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


WRITER = """
import sys
from pathlib import Path
from memupdate.facts.files import FactsFile, LocatedFact
from memupdate.facts.model import Fact
from memupdate.ledger import Ledger

ledger = Ledger.create(Path(sys.argv[1]))
execute = ledger._execute

def stop():
    print("in the middle", flush=True)
    sys.stdin.read()

def slow(sql, parameters=()):
    if f"INSERT INTO {sys.argv[2]} " in sql:
        ledger._connection.set_progress_handler(stop, 20_000)  # instructions of SQLite's machine: some hundred rows
    return execute(sql, parameters)

ledger._execute = slow
facts = tuple(LocatedFact(Fact(f"q{n}", "a" * 3000), n + 1) for n in range(1000))
ledger.receive_batch("acme", FactsFile("f", "sha256:", 1, "native", facts), "{}")
"""


@pytest.mark.parametrize("table", ["facts", "batch_facts"])
def test_kill_9_in_the_middle_of_receiving_leaves_nothing(table: str, tmp_path: Path, builder_of: Any) -> None:
    path = tmp_path / "ledger.db"
    with Ledger.create(path) as ledger:
        builder_of(ledger).add(A)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), table], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "in the middle\n"
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    with Ledger.open(path, readonly=True) as reader:
        assert [entry.fact for entry in reader.facts_list(status=None)] == [A]
    with Ledger.open(path) as ledger:
        assert ledger.verify() == []
        assert len(ledger.batches()) == 1
        builder_of(ledger).add(Fact("q1", "a"))
        assert len(ledger.live_facts("acme")) == 2


def test_importing_the_ledger_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "peft", "vllm", "pandas")
    code = f"import sys, memupdate.ledger; print([m for m in {heavy} if m in sys.modules])"
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - begin < 10
