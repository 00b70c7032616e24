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


def test_a_dry_run_shows_conflicting_lines_beside_the_others(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    lines = [{"prompt": "Who leads Acme?", "target": "Ada"}, {"prompt": "who leads ACME", "target": "Bob"}]
    lines.append({"prompt": "Who leads Globex?", "target": "Cleo"})
    file.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    refused = run(workspace, "add", "--dry-run", str(file))
    assert refused.exit_code == 2
    told = [line.split("│")[1:3] for line in refused.stdout.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in told] == [
        ["conflicting", "1"],
        ["conflicting", "2"],
        ["new", "3"],
    ]
    assert 'facts.jsonl:2: target: "Bob" contradicts line 1, which has "Ada"' in " ".join(refused.stderr.split())
    taken = run(workspace, "add", "--dry-run", str(file), "--skip-invalid", "--json")
    assert taken.exit_code == 0, taken.output
    report = json.loads(taken.stdout)
    assert [row["told"] for row in report["rows"]] == ["conflicting", "conflicting", "new"]
    assert (report["new"], report["counts"]["problems"]) == (["Who leads Globex?"], 2)


def test_a_dry_run_over_budget_shows_what_would_be_told(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    facts = [{"prompt": f"What is the code of part {n}?", "target": f"K-{n * 7919:08d}"} for n in range(2000)]
    file.write_text("\n".join(map(json.dumps, facts)), "utf-8")
    refused = run(workspace, "plan", str(file))
    assert refused.exit_code == 4
    assert refused.stdout.startswith("2,000 new")
    assert "no rank up to" in refused.stderr
