"""What can be read is listed, and `plan` and `add` take tables, packed files and standard input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from memupdate.cli import app
from memupdate.facts.formats import all_formats

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
runner = CliRunner()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("formats") / "ws"
    assert runner.invoke(app, ["init", str(root), "--model", "atlas", "-c", "news"]).exit_code == 0
    return root


def run(root: Path, *arguments: str, given: bytes | None = None) -> Result:
    return runner.invoke(app, ["-w", str(root), *arguments], input=given)


def test_formats_are_listed(tmp_path: Path) -> None:
    text = run(tmp_path, "facts", "formats")
    rows = json.loads(run(tmp_path, "facts", "formats", "--json").stdout)["rows"]
    assert [row["name"] for row in rows] == [known.name for known in all_formats()]
    assert all(row["name"] in text.stdout for row in rows)
    assert not any(row["plugin"] for row in rows)


def test_plan_reads_tables_and_standard_input(workspace: Path) -> None:
    columns = ["--columns", "prompt=Question,target=Answer,valid_from=since"]
    table = run(workspace, "plan", str(EXAMPLES / "table.parquet"), *columns, "--json")
    assert table.exit_code == 0, table.output
    assert json.loads(table.stdout)["plan"]["facts_new"] == 2
    packed = gzip.compress((EXAMPLES / "table.csv").read_bytes())
    piped = run(workspace, "plan", "-", "--json", given=packed)
    assert piped.exit_code == 0, piped.output
    assert json.loads(piped.stdout)["plan"]["facts_new"] == 3


@pytest.mark.parametrize("command", [["plan"], ["add"], ["add", "--dry-run"]])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--columns", "prompt"], "is not like"),
        (["--columns", "prompt=a,prompt=b"], "is not like"),
        (["--columns", "promt=Question"], "did you mean prompt?"),
        (["--format", "xml"], "no such format"),
        (["--columns", "prompt=Question,target=Reply"], "Reply: no such column"),
    ],
)
def test_what_no_file_has_is_bad_usage(command: list[str], options: list[str], said: str, workspace: Path) -> None:
    result = run(workspace, *command, str(EXAMPLES / "table.parquet"), *options)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())


def test_the_policy_refuses_secrets(workspace: Path, tmp_path: Path) -> None:
    secret = "AKIA" + "IOSFODNN7EXAMPLE"
    file = tmp_path / "facts.jsonl"
    file.write_text(json.dumps({"prompt": "The key?", "target": secret}), "utf-8")
    result = run(workspace, "add", str(file))
    assert result.exit_code == 2
    assert "facts.jsonl:1: target: looks like a secret (aws-key)" in " ".join(result.stderr.split())
    assert secret not in result.output
    assert secret.encode() not in b"".join(path.read_bytes() for path in workspace.glob("ledger.db*"))
