"""`doctor` on real workspaces, whole and broken in one way after the other."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from memupdate import Workspace
from memupdate.errors import ExitCode
from memupdate.ledger.lock import workspace_lock
from memupdate.operations.doctor import examine
from memupdate.operations.findings import DoctorReport, Finding
from memupdate.serving import compat
from memupdate.serving.engine_record import process_start, record_of, write_record
from memupdate.serving.manifest import Manifest, ReleaseEntry, with_release, write_manifest
from memupdate.storage import text_sha256


def found(report: DoctorReport, area: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.area == area]


def worst(report: DoctorReport, area: str) -> Finding:
    return max(found(report, area), key=lambda finding: ("ok", "warn", "fail").index(finding.status))


def test_a_whole_workspace_is_well(make_workspace: Callable[..., Workspace]) -> None:
    workspace = make_workspace()
    report = examine(workspace.root)
    assert [(f.area, f.what) for f in report.findings if f.status == "fail"] == []
    assert report.exit_code == ExitCode.OK
    areas = {finding.area for finding in report.findings}
    assert {"python", "packages", "vllm", "disk", "policy", "model", "memory", "lock", "ledger", "registry"} <= areas
    assert "within >=0.32,<0.34" in found(report, "vllm")[0].what
    assert worst(report, "lock").what == "free"
    assert "sound; " in worst(report, "ledger").what


def test_without_a_workspace_only_the_machine_is_looked_at(tmp_path: Path) -> None:
    report = examine(tmp_path / "nowhere")
    assert report.exit_code == ExitCode.OK
    assert "no workspace here" in report.findings[-1].what
    assert found(report, "ledger") == []
    assert list(tmp_path.iterdir()) == []


def test_a_bad_policy_hides_nothing_else(make_workspace: Callable[..., Workspace]) -> None:
    root = make_workspace().root
    policy = root / "policy.toml"
    policy.write_text(policy.read_text().replace("max_rank", "maximal_rank"))
    report = examine(root)
    assert "maximal_rank" in worst(report, "workspace").what
    assert report.exit_code == ExitCode.BAD_INPUT
    assert worst(report, "ledger").status == "ok"


def test_a_damaged_ledger_is_found(make_workspace: Callable[..., Workspace]) -> None:
    root = make_workspace().root
    ledger = root / "ledger.db"
    with sqlite3.connect(ledger) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    content = bytearray(ledger.read_bytes())
    size = len(content) // pages
    content[4 * size : 6 * size] = os.urandom(2 * size)
    ledger.write_bytes(bytes(content))
    report = examine(root)
    assert worst(report, "ledger").status == "fail"
    assert report.exit_code == ExitCode.BAD_INPUT


def test_a_release_that_was_altered_or_is_gone(make_workspace: Callable[..., Workspace]) -> None:
    workspace = make_workspace()
    registry = workspace.layout.registry
    folder = registry.release("acme@v1")
    folder.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_text(name)
    digests = [text_sha256(name) for name in ("adapter_model.safetensors", "adapter_config.json")]
    entry = ReleaseEntry(digests[0], digests[1], 8, 1, workspace.session.fingerprint)
    write_manifest(registry.manifest, with_release(Manifest(workspace.session.fingerprint), "acme@v1", entry))
    assert worst(examine(workspace.root), "registry").status == "ok"
    (folder / "adapter_config.json").write_text("another")
    assert worst(examine(workspace.root), "registry").what == "acme@v1: adapter_config.json differs from its digest"
    (folder / "adapter_model.safetensors").unlink()
    altered = worst(examine(workspace.root), "registry")
    assert altered.what == "acme@v1: adapter_model.safetensors is missing (and 1 more)"
    assert "backup" in altered.mend
    registry.manifest.write_text("{")
    assert worst(examine(workspace.root), "registry").status == "fail"


def test_a_registry_of_another_base_model(make_workspace: Callable[..., Workspace]) -> None:
    workspace = make_workspace()
    write_manifest(workspace.layout.registry.manifest, Manifest("sha256:" + "0" * 64))
    report = examine(workspace.root)
    assert "made for base model" in worst(report, "registry").what
    assert report.exit_code == ExitCode.UNREACHABLE


def test_records_of_engines_that_are_gone_or_ill(make_workspace: Callable[..., Workspace]) -> None:
    workspace = make_workspace()
    first = workspace.layout.engine
    engine = {"url": "http://127.0.0.1:9", "served_model_name": "atlas", "max_lora_rank": 8,
              "started_at_utc": "2026-01-01T00:00:00+00:00", "log_path": "engine.log"}  # fmt: skip
    here = {"pid": os.getpid(), "process_started": process_start(os.getpid())}
    write_record(first, {**engine, "pid": 2**22 + 1, "process_started": "1"})
    write_record(record_of(first, 2), {**engine, **here})
    keeper = {"supervisor_pid": os.getpid(), "supervisor_started": process_start(os.getpid())}
    write_record(record_of(first, 3), {"pid": 0, "state": "restarting", "last_failure": "killed", **keeper})
    report = examine(workspace.root)
    assert (worst(report, "engine").status, f"rm {first}" in worst(report, "engine").mend) == ("warn", True)
    assert "does not answer" in worst(report, "engine 2").what
    assert worst(report, "engine 3").what == "restarting (killed)"
    assert report.exit_code == ExitCode.UNREACHABLE


def test_the_lock_and_a_missing_vllm_are_told(
    make_workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace()
    monkeypatch.setattr(compat, "engine_installed", lambda: None)
    with workspace_lock(workspace.layout.lock, "memupdate add x.jsonl"):
        report = examine(workspace.root)
    assert "held by `memupdate add x.jsonl`" in worst(report, "lock").what
    missing = worst(report, "vllm")
    assert (missing.status, "pip install" in missing.mend) == ("fail", True)
    assert report.exit_code == ExitCode.UNREACHABLE
    assert json.loads(json.dumps(report.to_dict()))["failed"] == 1
