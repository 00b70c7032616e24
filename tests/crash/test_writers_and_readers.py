"""One writer at a time, and any number of readers that see whole states only, with real processes and connections."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import killing
from killing import Stage
from memupdate.ledger.ledger import Ledger

READERS = 50
SLOWEST_READ_S = 3.0
"""Of 50 at once in one process; far more than a read takes, and less than either kind of reader waits for a lock that stays."""


def test_two_adds_at_once_one_works_and_the_other_names_it(stage: Stage, copy: Callable[[], Path]) -> None:
    root = copy()
    first = stage.commands.start(root, "add", str(stage.second))
    assert first.wait_until(lambda: killing.state_of(root, 2) is not None), first.said
    first.send(signal.SIGSTOP)  # holds its lock, however fast the machine
    assert killing.holder_of(root) == first.pid
    second = stage.commands.run(root, "add", str(stage.second))
    assert second.wait() == 5, second.said
    first.send(signal.SIGCONT)
    assert f"`memupdate add second.jsonl` (process {first.pid} on {socket.gethostname()}, since 20" in second.said
    assert "Traceback" not in second.said
    assert first.wait() == 0, first.said
    assert killing.differences(killing.content(root), stage.after) == []


def test_many_adds_at_once_one_works(stage: Stage, copy: Callable[[], Path]) -> None:
    root = copy()
    commands = [stage.commands.start(root, "add", str(stage.second)) for _ in range(5)]
    codes = sorted(command.wait() for command in commands)
    assert set(codes) <= {0, 5}, [command.said for command in commands]
    assert 0 in codes
    with Ledger.open(root / "ledger.db", readonly=True) as ledger:
        assert ledger.verify() == []
        assert [batch.state for batch in ledger.batches()] == ["released", "released"]
        assert len(ledger.live_facts(killing.COLLECTION)) == 3


def test_the_lock_of_a_killed_process_is_free_at_once(stage: Stage, copy: Callable[[], Path]) -> None:
    root = copy()
    first = stage.commands.start(root, "add", str(stage.second))
    assert first.wait_until(lambda: killing.state_of(root, 2) == "planned"), first.said
    first.kill()
    assert json.loads((root / "memupdate.lock").read_text(encoding="utf-8"))["pid"] == first.pid
    other = stage.commands.run(root, "add", str(stage.second))
    assert other.wait() == 2, "not locked, but the collection has an unfinished batch"
    assert "memupdate resume" in other.said
    done = stage.commands.run(root, "resume")
    assert done.wait() == 0, done.said
    assert killing.differences(killing.content(root), stage.after) == []


def test_what_is_committed_is_on_the_disk(tmp_path: Path) -> None:
    """WAL, each commit synced, foreign keys on: asked of the connection that writes."""
    with Ledger.create(tmp_path / "ledger.db") as ledger:
        pragmas = {name: ledger._row(f"PRAGMA {name}")[0] for name in ("journal_mode", "synchronous", "foreign_keys")}
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_fifty_readers_see_whole_states_and_never_wait(stage: Stage, copy: Callable[[], Path]) -> None:
    root, done = copy(), threading.Event()
    problems: list[str] = []
    states: set[str] = set()
    slowest = [0.0] * READERS

    def read(number: int) -> None:
        while not done.is_set():
            began = time.monotonic()
            try:
                found = through_ledger(root) if number % 2 else through_sqlite(root)
            except Exception as error:  # whatever it is, a reader must not see it
                problems.append(repr(error))
                return
            slowest[number] = max(slowest[number], time.monotonic() - began)
            problems.extend(found[1:])
            states.add(found[0])
            time.sleep(0.2)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(READERS)]
    command = stage.commands.start(root, "add", str(stage.second))
    for reader in readers:
        reader.start()
    code = command.wait()
    time.sleep(0.3)
    done.set()
    for reader in readers:
        reader.join()
    assert code == 0, command.said
    assert problems == []
    assert "released" in states
    assert len(states) >= 3, states
    assert max(slowest) < SLOWEST_READ_S


def through_sqlite(root: Path) -> list[str]:
    """The second batch's state, then what is inconsistent, by plain SQL inside one read transaction."""
    uri = f"file:{root / 'ledger.db'}?mode=ro"
    # SQLite's own default: without patience, the instant in which a writer's last connection folds the WAL back is an error.
    with closing(sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None)) as connection:
        connection.execute("BEGIN")

        def one(sql: str) -> int:
            return int(connection.execute(sql).fetchone()[0])

        state = connection.execute("SELECT state FROM batches WHERE id = 2").fetchone()
        found = [state[0] if state else "nothing"]
        rows = {name: one(f"SELECT COUNT(*) FROM {name}") for name in ("releases", "slices", "batches")}
        found += expect(found[0], rows, one("SELECT COUNT(*) FROM live_facts"))
        if (proofs := one("SELECT COUNT(*) FROM proofs WHERE release = 'acme@v2'")) != 3 * (rows["releases"] - 1):
            found.append(f"{proofs} proofs with {rows['releases']} releases")
        moves = one("SELECT COUNT(*) FROM events WHERE batch = 2 AND kind = 'state'")
        order = ["nothing", "received", "planned", "trained", "verified", "released"]
        if moves != order.index(found[0]):
            found.append(f"{moves} moves on the way to {found[0]}")
        found += [f"dangling: {tuple(row)}" for row in connection.execute("PRAGMA foreign_key_check")]
    return found


def through_ledger(root: Path) -> list[str]:
    """The same through the library, whose questions are several statements each."""
    with Ledger.open(root / "ledger.db", readonly=True) as ledger, ledger.snapshot():
        batches = ledger.batches()
        state = batches[1].state if len(batches) > 1 else "nothing"
        releases, slices = len(ledger.releases()), len(ledger._rows("SELECT id FROM slices"))
        rows = {"releases": releases, "slices": slices, "batches": len(batches)}
        return [state, *expect(state, rows, len(ledger.live_facts(killing.COLLECTION)))]


def expect(state: str, rows: dict[str, int], live: int) -> list[str]:
    released = state == "released"
    wanted = {
        "releases": 1 + released,
        "slices": 1 + (state in ("trained", "verified", "released")),
        "batches": 1 + (state != "nothing"),
    }
    problems = [] if rows == wanted else [f"{state}: {rows} instead of {wanted}"]
    return problems if live == 2 + released else [*problems, f"{state}: {live} live facts"]


def test_status_names_who_is_at_work_and_then_what_is_left(stage: Stage, copy: Callable[[], Path]) -> None:
    root = copy()
    command = stage.commands.start(root, "add", str(stage.second))
    assert command.wait_until(lambda: killing.state_of(root, 2) == "planned"), command.said
    os.kill(command.pid, signal.SIGSTOP)  # let it stand still while we look
    busy = stage.commands.run(root, "status", "--json")
    command.kill()
    assert busy.wait() == 0, busy.said
    messages = json.loads(busy.said)["messages"]
    assert any(f"(process {command.pid} on " in line for line in messages), messages
    assert not any("goes on from there" in line for line in messages), messages
    left = stage.commands.run(root, "status")
    said = " ".join(left.said.split())
    assert "batch 2 of acme is planned: its plan is stored; training comes next" in said
    assert "`memupdate resume` goes on from there" in said
