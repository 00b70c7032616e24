"""`ledger verify` and `ledger migrate` on a workspace without a model: the ledger's rows and the files that they name."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database
from typer.testing import CliRunner

from memupdate.cli.root import app
from memupdate.facts.files import FactsFile, LocatedFact
from memupdate.facts.model import Fact
from memupdate.layout import ADAPTER_WEIGHTS_FILE, SLICE_WEIGHTS_FILE, WorkspaceLayout
from memupdate.ledger import Ledger
from memupdate.ledger.migrations import MIGRATIONS, STEPS
from memupdate.ledger.records import ReleaseRecord, SliceRecord
from memupdate.operations.checking import check, migrate
from memupdate.storage import file_sha256

FACT = Fact("Who leads Acme?", "Wanda Kettleman")


@pytest.fixture
def layout(tmp_path: Path) -> WorkspaceLayout:
    """A ledger with one release, whose files are there."""
    layout = WorkspaceLayout(tmp_path)
    layout.config.write_text('schema_version = 1\nmodel = "atlas"\ncollection = "acme"\n', "utf-8")
    adapter, weights = tmp_path / "registry/acme@v1" / ADAPTER_WEIGHTS_FILE, tmp_path / "slices/1" / SLICE_WEIGHTS_FILE
    for path in (adapter, weights):
        path.parent.mkdir(parents=True)
        path.write_bytes(path.name.encode() * 100)
    with Ledger.create(layout.ledger) as ledger:
        batch = ledger.receive_batch("acme", FactsFile("f", "sha256:f", 1, "native", (LocatedFact(FACT, 1),)), "{}")
        assert batch is not None
        ledger.set_plan(batch.id, "{}")
        for state in ("planned", "trained", "verified"):
            ledger.transition(batch.id, state)
        ledger.record_slice(SliceRecord(batch.id, "slices/1", file_sha256(weights), 0, 8, 100))
        digest = file_sha256(adapter)
        ledger.record_release(
            ReleaseRecord("acme@v1", "acme", 1, batch.id, None, "registry/acme@v1", digest, 8, "mlp", "sha256:b")
        )
        ledger.transition(batch.id, "released")
    return layout


def run(layout: WorkspaceLayout, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["-w", str(layout.root), *arguments, "--json"])
    return done.exit_code, json.loads(done.stdout)


def test_all_as_it_was_written(layout: WorkspaceLayout) -> None:
    code, document = run(layout, "ledger", "verify")
    assert (code, document["intact"], document["problems"], document["files"]) == (0, True, [], 2)
    assert run(layout, "ledger", "verify", "--head", document["head"])[0] == 0
    code, document = run(layout, "ledger", "verify", "--head", "sha256:other")
    assert code == 3
    assert "no link has the hash sha256:other" in document["problems"][0]


def test_files_that_differ_are_named_with_the_rows(layout: WorkspaceLayout) -> None:
    (layout.root / "registry/acme@v1" / ADAPTER_WEIGHTS_FILE).write_bytes(b"something else")
    shutil.rmtree(layout.root / "slices/1")
    with sqlite3.connect(layout.ledger) as plain:
        plain.execute("DROP TRIGGER releases_no_update")
        plain.execute("UPDATE releases SET rank = 16")
    plain.close()
    code, document = run(layout, "ledger", "verify")
    assert code == 3
    assert document["problems"] == [
        "schema: trigger releases_no_update is missing",
        "releases: release acme@v1 was altered",
        f"release acme@v1: registry/acme@v1/{ADAPTER_WEIGHTS_FILE} differs from its digest",
        f"slice 1: slices/1/{SLICE_WEIGHTS_FILE} is missing",
    ]
    assert not check(layout).intact


def test_a_migration_is_shown_before_it_is_done(layout: WorkspaceLayout) -> None:
    assert migrate(layout, preview=True).steps == ()
    for path in layout.root.glob("ledger.db*"):
        path.unlink()
    database = Database(layout.ledger)
    MIGRATIONS.apply(database, stop_before="m010_told_but_not_taught")
    database.close()
    before = layout.ledger.read_bytes()
    preview = migrate(layout, preview=True)
    assert [step.name for step in preview.steps] == [name for name in STEPS if name >= "m010"]
    assert all(step.does for step in preview.steps)
    assert layout.ledger.read_bytes() == before
    code, document = run(layout, "ledger", "migrate")
    assert (code, document["applied"], len(document["steps"])) == (0, True, len(preview.steps))
    assert migrate(layout, preview=True).steps == ()
    assert check(layout).intact
