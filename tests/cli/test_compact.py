"""`compact` and `facts retract` without anything to train: what they refuse, by exit code and one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from memupdate.cli import app

runner = CliRunner()


@pytest.fixture
def workspace(tmp_path: Path) -> str:
    root = str(tmp_path / "acme")
    assert runner.invoke(app, ["init", root, "--model", "atlas"]).exit_code == 0
    return root


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compact"], "nothing was released yet"),
        (["compact", "--dry-run"], "nothing was released yet"),
        (["compact", "-c", "other"], "other: nothing was released yet"),
        (["facts", "retract"], "no fact was named"),
        (["facts", "retract", "abc123"], "abc123: no such fact"),
        (["facts", "retract", "--key", "Who leads Acme?"], "no fact of acme is about this"),
        (["facts", "retract", "nonsense", "-k", "x"], "2 facts cannot be retracted from acme"),
        (["facts", "retract", "-f", "no-such-file.jsonl"], "no-such-file.jsonl"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_done_is_one_clear_line(workspace: str, arguments: list[str], said: str) -> None:
    result = runner.invoke(app, ["-w", workspace, *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr
