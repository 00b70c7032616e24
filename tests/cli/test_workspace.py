"""The commands on a real workspace with the embedded base model, as far as they need no training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from memupdate.cli import app
from memupdate.facts.model import Fact
from memupdate.facts.reader import read_facts
from memupdate.ledger.ledger import Ledger

runner = CliRunner()


def run(root: Path, *arguments: str) -> Result:
    return runner.invoke(app, ["-w", str(root), *arguments], prog_name="memupdate")


def data_of(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    return document.get("rows", document)


def digest_of(root: Path) -> dict[str, str]:
    """Every file of a workspace with its content, but for SQLite's working files and the lock."""
    files = (path for path in root.rglob("*") if path.is_file())
    kept = (path for path in files if not path.name.endswith(("-wal", "-shm", ".lock")))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    root = tmp_path / "ws"
    data = data_of(runner.invoke(app, ["init", str(root), "--model", "atlas", "-c", "news", "--json"]))
    assert (data["collection"], data["facts_live"], data["releases"]) == ("news", 0, 0)
    return root


def test_a_new_workspace_is_empty_and_says_so(workspace: Path) -> None:
    assert data_of(run(workspace, "status", "--json"))["root"] == str(workspace)
    assert "collection" in run(workspace, "status").stdout
    assert data_of(run(workspace, "releases", "list", "--json")) == []
    assert data_of(run(workspace, "facts", "list", "--json")) == []
    assert data_of(run(workspace, "resume", "--json")) == []


def test_init_twice_and_init_without_a_model_exit_with_the_designs_codes(workspace: Path, tmp_path: Path) -> None:
    before = digest_of(workspace)
    again = runner.invoke(app, ["init", str(workspace), "--model", "atlas"])
    assert (again.exit_code, again.stdout) == (2, "")
    assert digest_of(workspace) == before
    unknown = runner.invoke(app, ["init", str(tmp_path / "other"), "--model", str(tmp_path / "no-model")])
    assert (unknown.exit_code, unknown.stdout) == (6, "")
    assert "no-model" in unknown.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "Who?", "target": "A"}\n' * 6 + b"{broken\n", ":7"),
        (b'{"prompt": "Who?"}\n', "target"),
        (b"", "facts.jsonl"),
        ('{"prompt": "Wer?", "target": "Jürgen"}\n'.encode("latin-1"), "UTF-8"),
        (b'{"prompt": "Who?", "target": "A"}\n{"prompt": "Who?", "target": "B"}\n', "2"),
    ],
    ids=["broken JSON at line 7", "missing target", "empty file", "wrong encoding", "contradiction"],
)
@pytest.mark.parametrize("command", ["plan", "add"])
def test_bad_facts_exit_with_2_and_change_nothing(
    workspace: Path, tmp_path: Path, command: str, content: bytes, said: str
) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_bytes(content)
    before = digest_of(workspace)
    result = run(workspace, command, str(facts), "--json")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert digest_of(workspace) == before


def test_facts_are_listed_and_shown_with_their_ids(workspace: Path, tmp_path: Path) -> None:
    """A batch that was received, but not trained yet, has pending facts."""
    file = tmp_path / "facts.jsonl"
    file.write_text('{"prompt": "Who leads [Acme]?", "target": "Wanda Kettleman"}\n', encoding="utf-8")
    with Ledger.open(workspace / "ledger.db") as ledger:
        ledger.receive_batch("news", read_facts(file), "{}", publish=True)
    fact_id = Fact("Who leads [Acme]?", "Wanda Kettleman").id
    shown = data_of(run(workspace, "facts", "show", fact_id[:20], "--json"))
    assert (shown["id"], shown["target"], shown["history"][0]["status"]) == (fact_id, "Wanda Kettleman", "pending")
    text = run(workspace, "facts", "show", fact_id).stdout
    assert "Who leads [Acme]?" in text
    assert run(workspace, "facts", "show", "nonsense").exit_code == 2


@pytest.mark.parametrize("arguments", [["publish", "news@v1"], ["verify"], ["verify", "../../etc"]])
def test_what_is_not_there_is_bad_input(workspace: Path, arguments: list[str]) -> None:
    result = run(workspace, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "hint:" in result.stderr


def test_serve_can_print_its_command(workspace: Path) -> None:
    result = run(workspace, "serve", "--port", "8123", "--print-command")
    assert result.exit_code == 0, result.output
    assert "vllm.entrypoints.openai.api_server" in result.stdout
    assert "--port 8123" in result.stdout


def test_the_law_is_reported_where_one_is_fitted(workspace: Path, tmp_path: Path) -> None:
    shipped = data_of(run(workspace, "report", "--json"))
    assert len(shipped["points"]) >= 20
    (capacity,) = shipped["collections"]
    assert capacity["now"]["free"] == capacity["now"]["target_tokens"] > 0
    assert "ΔL" in run(workspace, "report").stdout
    other = tmp_path / "other"
    assert runner.invoke(app, ["init", str(other), "--model", "atlas", "-p", "standard"]).exit_code == 0
    missing = run(other, "report")
    assert (missing.exit_code, missing.stdout) == (2, "")
    assert "memupdate calibrate" in missing.stderr
