"""Backups of real workspaces: whole, checked, made while another process writes, and brought back as they were."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from memupdate import Workspace
from memupdate.errors import LedgerError, MemupdateError, UsageError
from memupdate.facts.files import FactsFile, LocatedFact
from memupdate.facts.model import Fact
from memupdate.ledger import Ledger
from memupdate.ledger.records import ReleaseRecord, SliceRecord
from memupdate.storage import file_sha256, text_sha256

WRITER = """
import sys
from memupdate.facts.files import FactsFile, LocatedFact
from memupdate.facts.model import Fact
from memupdate.ledger import Ledger
from memupdate.storage import text_sha256

with Ledger.open(sys.argv[1]) as ledger:
    print("ready", flush=True)
    for number in range(100_000):
        facts = tuple(LocatedFact(Fact(f"Question {number} {i}?", "Answer"), i + 1) for i in range(20))
        batch = ledger.receive_batch("acme", FactsFile(f"{number}.jsonl", text_sha256(str(number)), 1, "native", facts), "{}")
        ledger.fail_batch(batch.id, "only a test")
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """One released batch, with files for its slice and its release; no training."""
    made = Workspace.init(tmp_path / "ws", model="atlas", collection="acme")
    files = {
        "registry/releases/acme@v1/adapter_model.safetensors": b"weights" * 1000,
        "slices/1/slice.safetensors": b"s",
    }
    files["registry/releases/acme@v1/memupdate.json"] = b"{}"
    for name, content in files.items():
        (made.root / name).parent.mkdir(parents=True, exist_ok=True)
        (made.root / name).write_bytes(content)
    with made.writer("test") as ledger:
        facts = (LocatedFact(Fact("Who leads Acme?", "Wanda"), 1),)
        batch = ledger.receive_batch("acme", FactsFile("f.jsonl", text_sha256("f"), 1, "native", facts), "{}")
        assert batch is not None
        ledger.set_plan(batch.id, '{"rank": 8}')
        slice_digest = file_sha256(made.root / "slices/1/slice.safetensors")
        ledger.record_slice(SliceRecord(batch.id, "slices/1", slice_digest, 0, 8, 1))
        for state in ("planned", "trained", "verified"):
            ledger.transition(batch.id, state)
        folder = "registry/releases/acme@v1"
        digest = file_sha256(made.root / folder / "adapter_model.safetensors")
        ledger.record_release(
            ReleaseRecord("acme@v1", "acme", 1, batch.id, None, folder, digest, 8, "mlp-all", "sha256:b")
        )
        ledger.transition(batch.id, "released")
    return made


def content(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_backup_comes_back_as_it_was(workspace: Workspace, tmp_path: Path) -> None:
    report = workspace.backup(tmp_path / "b.tar")
    assert (report.releases, report.size_bytes) == (1, (tmp_path / "b.tar").stat().st_size)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.tar", "ws"]
    again = Workspace.restore(tmp_path / "b.tar", tmp_path / "again")
    before, after = content(workspace.root), content(again.root)
    left_out = {name for name in before if name.startswith(("cache/", "logs/", "memupdate.lock", "ledger.db"))}
    assert {name: after[name] for name in after if name != "ledger.db"} == {
        n: before[n] for n in before if n not in left_out
    }
    with workspace.reader() as old, again.reader() as new:
        assert list(old._connection.iterdump()) == list(new._connection.iterdump())
        assert new.verify() == []
    with again.writer("test") as ledger:  # it goes on from there
        assert ledger._row("PRAGMA journal_mode")[0] == "wal"
        ledger.fail_batch(1, "after the restore")


def test_backups_taken_while_another_process_writes_are_whole(workspace: Workspace, tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(workspace.layout.ledger)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        seen = []
        for number in range(4):
            time.sleep(0.2)
            workspace.backup(tmp_path / f"{number}.tar")
            again = Workspace.restore(tmp_path / f"{number}.tar", tmp_path / f"again{number}")
            with again.reader() as ledger:
                assert ledger.verify() == []
                batches = ledger.batches("acme")
                assert all(batch.facts_new == (20 if batch.id > 1 else 1) for batch in batches)
                seen.append(len(batches))
        assert writer.poll() is None
        assert seen == sorted(seen)
        assert seen[0] < seen[-1]
    finally:
        writer.kill()
        writer.wait()
    with Ledger.open(workspace.layout.ledger) as ledger:
        assert ledger.verify() == []


def test_a_backup_is_never_written_over(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_text("precious")
    with pytest.raises(UsageError, match="there already"):
        workspace.backup(tmp_path / "b.tar")
    with pytest.raises(UsageError, match="no such folder"):
        workspace.backup(tmp_path / "nowhere" / "b.tar")
    assert (tmp_path / "b.tar").read_text() == "precious"


@pytest.mark.parametrize("name", ["registry/releases/acme@v1/adapter_model.safetensors", "slices/1/slice.safetensors"])
@pytest.mark.parametrize("what", ["missing", "differs"])
def test_what_the_ledger_names_must_be_there_unaltered(
    workspace: Workspace, tmp_path: Path, name: str, what: str
) -> None:
    path = workspace.root / name
    path.unlink() if what == "missing" else path.write_bytes(b"tampered")
    with pytest.raises(LedgerError) as error:
        workspace.backup(tmp_path / "b.tar")
    assert error.value.details[0].startswith(f"{name}: {what}")
    assert not (tmp_path / "b.tar").exists()


def test_a_restore_never_touches_what_is_there(workspace: Workspace, tmp_path: Path) -> None:
    workspace.backup(tmp_path / "b.tar")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    for target in ("used", "used/file"):
        with pytest.raises(UsageError, match="not empty"):
            Workspace.restore(tmp_path / "b.tar", tmp_path / target)
    assert content(tmp_path / "used") == {"file": b"mine"}
    (tmp_path / "empty").mkdir()
    assert Workspace.restore(tmp_path / "b.tar", tmp_path / "empty").collection == "acme"


def rewrite(old: Path, new: Path, change: dict[str, bytes | None]) -> None:
    """A copy of a backup with files changed, left out (None) or added at the beginning."""
    with tarfile.open(old) as source, tarfile.open(new, "w") as target:
        members = {member.name: source.extractfile(member).read() for member in source}
        for name, data in ({k: v for k, v in change.items() if k not in members} | members | change).items():
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)

                target.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"ledger.db": b"x"}, "ledger.db: differs from its digest"),
        ({"policy.toml": None}, "policy.toml: missing"),
        ({"surplus": b"x"}, "surplus: not in the backup's index"),
    ],
)
def test_a_damaged_backup_restores_nothing(
    workspace: Workspace, tmp_path: Path, change: dict[str, bytes | None], problem: str
) -> None:
    workspace.backup(tmp_path / "b.tar")
    rewrite(tmp_path / "b.tar", tmp_path / "bad.tar", change)
    with pytest.raises(UsageError) as error:
        Workspace.restore(tmp_path / "bad.tar", tmp_path / "again")
    assert error.value.details == (problem,)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_a_backup_writes_nowhere_else(workspace: Workspace, tmp_path: Path, name: str) -> None:
    workspace.backup(tmp_path / "b.tar")
    rewrite(tmp_path / "b.tar", tmp_path / "bad.tar", {name: b"x"})
    with pytest.raises(UsageError, match="no place in a backup"):
        Workspace.restore(tmp_path / "bad.tar", tmp_path / "deep" / "again")
    assert not list(tmp_path.rglob("outside"))


def test_torn_and_foreign_files_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    workspace.backup(tmp_path / "b.tar")
    whole = (tmp_path / "b.tar").read_bytes()
    newer = json.dumps({"schema_version": 99, "files": {"ledger.db": ""}, "releases": 1}).encode()
    rewrite(tmp_path / "b.tar", tmp_path / "newer.tar", {"backup.json": newer})
    for name, data in {"half": whole[: len(whole) // 2], "empty": b"", "text": b"hello" * 500}.items():
        (tmp_path / name).write_bytes(data)
    for name in ("half", "empty", "text", "missing", "newer.tar"):
        with pytest.raises(MemupdateError):
            Workspace.restore(tmp_path / name, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert shutil.which("tar") is None or subprocess.run(
        ["tar", "-tf", tmp_path / "b.tar"], check=True, capture_output=True
    )
