"""`facts purge` on a workspace: confirmed, wholly gone, and flagged where weights still hold it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memupdate import Workspace
from memupdate.cli import app
from memupdate.errors import LedgerError, UsageError
from memupdate.facts.files import FactsFile, LocatedFact
from memupdate.facts.model import Fact
from memupdate.ledger.ledger import Ledger
from memupdate.operations import purging
from memupdate.storage import text_sha256
from support import record_untrained_release

SECRET = Fact("Which badge has Zelda Quirrel?", "Vermilion seven Oxpecker")
OTHER = Fact("Where is Acme?", "Leeds")
runner = CliRunner()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """One release of two facts, as papers and rows; no training."""
    made = Workspace.init(tmp_path / "ws", model="atlas", collection="acme")
    folder = made.root / "registry/releases/acme@v1"
    folder.mkdir(parents=True)
    papers = {
        "schema_version": 1,
        "release": "acme@v1",
        "reason": f"wrong: {SECRET.target}",
        "facts": [{"id": SECRET.id}],
    }
    (folder / "memupdate.json").write_text(json.dumps(papers))
    with made.writer("test") as ledger:
        record_untrained_release(ledger, (SECRET, OTHER))
    return made


def holds(workspace: Workspace, word: str) -> list[str]:
    files = [path for path in workspace.root.rglob("*") if path.is_file()]
    return sorted(path.name for path in files if word.encode() in path.read_bytes())


def test_a_purge_is_confirmed_and_leaves_no_trace(workspace: Workspace) -> None:
    command = ["-w", str(workspace.root), "facts", "purge", SECRET.id[:16], "--reason", "they asked"]
    assert holds(workspace, "Oxpecker") == ["ledger.db", "memupdate.json"]
    answer = runner.invoke(app, command, input="n\n")
    assert answer.exit_code != 0
    assert "Vermilion" in answer.stderr
    assert holds(workspace, "Oxpecker") == ["ledger.db", "memupdate.json"]
    answer = runner.invoke(app, [*command, "--yes", "--json"])
    assert answer.exit_code == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert document["facts"] == [SECRET.id]
    assert document["releases_holding"] == ["acme@v1"]
    assert document["messages"][0] == (
        "acme@v1 still holds a purged fact; `memupdate compact -c acme` writes a release without"
    )
    for word in ("Oxpecker", "Vermilion", "Quirrel"):
        assert holds(workspace, word) == []
    papers = json.loads((workspace.root / "registry/releases/acme@v1/memupdate.json").read_text())
    assert (papers["reason"], papers["facts"]) == ("wrong: [purged]", [{"id": SECRET.id}])


def test_releases_and_status_say_what_the_weights_still_hold(workspace: Workspace) -> None:
    assert "purged_facts" not in workspace.release("acme@v1")
    workspace.purge([SECRET.id])
    assert workspace.release("acme@v1")["purged_facts"] == [SECRET.id]
    assert any("still holds a purged fact" in message for message in workspace.status().messages)
    assert workspace.status().facts_live == 1
    with workspace.reader() as ledger:
        assert ledger.verify() == []


def test_facts_that_say_the_same_are_named(workspace: Workspace) -> None:
    report = workspace.purge(keys=[OTHER.prompt])
    assert report.mentioned_by == ()
    with workspace.writer("test") as ledger:
        located = (LocatedFact(Fact("Whose is the badge?", f"It is {SECRET.target}, is it not"), 1),)
        ledger.receive_batch("other", FactsFile("g.jsonl", text_sha256("g"), 1, "native", located), "{}")
    report = workspace.purge([SECRET.id])
    assert report.mentioned_by == (located[0].fact.id,)


def test_a_purge_that_a_reader_held_up_is_finished_by_the_next_try(workspace: Workspace) -> None:
    held = sqlite3.connect(workspace.root / "ledger.db", isolation_level=None)
    held.execute("BEGIN")
    held.execute("SELECT * FROM facts").fetchall()
    with pytest.raises(LedgerError, match="another process is reading"):
        workspace.purge([SECRET.id])
    told = "a purge of 1 fact(s) was cut off: `memupdate resume` finishes it"
    assert told in workspace.status().messages
    held.close()
    with workspace.writer("test") as ledger:
        (report,) = purging.finish_begun(workspace.layout, ledger)
    assert report.facts == (SECRET.id,)
    assert told not in workspace.status().messages
    assert holds(workspace, "Oxpecker") == []


def test_a_purge_by_a_key_that_the_ledger_has_forgotten_is_known_again(workspace: Workspace) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "scrub", cut_off)
        with pytest.raises(KeyboardInterrupt):
            workspace.purge(keys=[SECRET.prompt])
    with pytest.raises(LedgerError):
        workspace.purge(keys=["Another key"])
    assert workspace.purge(keys=[SECRET.prompt]).facts == (SECRET.id,)
    with pytest.raises(LedgerError):
        workspace.purge(keys=[SECRET.prompt])
    assert holds(workspace, "Quirrel") == []


def cut_off(_ledger: Ledger) -> None:
    raise KeyboardInterrupt


def test_nothing_named_is_nothing_purged(workspace: Workspace) -> None:
    with pytest.raises(UsageError, match="no fact was named"):
        workspace.purge()
    answer = runner.invoke(app, ["-w", str(workspace.root), "facts", "purge", "--yes"])
    assert answer.exit_code == 2
