"""The command `doctor`: its findings as text and JSON, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from memupdate.cli import app

runner = CliRunner()


def test_the_machine_is_looked_at_where_there_is_no_workspace(tmp_path: Path) -> None:
    result = runner.invoke(app, ["-w", str(tmp_path), "doctor"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "no workspace here" in " ".join(result.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_a_broken_workspace_is_a_finding_and_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "memupdate.toml").write_text("schema_version = 1\nmodel = 7\n")
    result = runner.invoke(app, ["-w", str(tmp_path), "doctor", "--json"])
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert (document["schema_version"], document["command"], document["target"]) == (1, "doctor", str(tmp_path))
    failed = [finding for finding in document["findings"] if finding["status"] == "fail"]
    assert document["failed"] == len(failed) > 0
    assert "model" in failed[0]["what"]
    assert failed[0]["mend"] == "mend the lines named"


def test_an_engine_that_is_not_there_exits_with_6(tmp_path: Path) -> None:
    result = runner.invoke(app, ["-w", str(tmp_path), "doctor", "--served", "http://127.0.0.1:9"])
    assert result.exit_code == 6
    assert "1 failed" in result.stdout
    assert "cannot be reached" in " ".join(result.stdout.split())
