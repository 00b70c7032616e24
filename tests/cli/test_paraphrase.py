"""`facts paraphrase` on the embedded model: facts on stdout or in a new file, the report beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from memupdate.cli import app
from memupdate.facts.reader import read_facts
from support import news, write_facts_file

runner = CliRunner()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paraphrase")
    assert runner.invoke(app, ["init", str(folder / "ws"), "--model", "atlas", "-c", "news"]).exit_code == 0
    write_facts_file(folder / "facts.jsonl", [{**news(1)[0], "source": "Amtsblatt Köln"}, news(1)[1]])
    return folder


def run(root: Path, *arguments: str) -> Result:
    few = ["--count", "2", "--attempts", "1"]
    return runner.invoke(
        app, ["-w", str(root / "ws"), "facts", "paraphrase", str(root / "facts.jsonl"), *few, *arguments]
    )


def test_facts_go_to_stdout_and_the_report_to_stderr(root: Path, tmp_path: Path) -> None:
    result = run(root, "--seed", "3")
    assert result.exit_code == 0, result.output
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(result.stdout_bytes)
    assert "Köln" in copy.read_text(encoding="utf-8")
    assert [f.fact.prompt for f in read_facts(copy).facts] == [
        f.fact.prompt for f in read_facts(root / "facts.jsonl").facts
    ]
    assert "wordings kept" in result.stderr
    assert "not able" in result.stderr
    assert run(root, "--seed", "3").stdout_bytes == result.stdout_bytes


def test_a_new_file_is_written_and_an_old_one_left(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "wider.jsonl"
    result = run(root, "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["command"], data["out"], data["facts"]) == ("facts paraphrase", str(out), 2)
    assert "written" not in data
    assert len(read_facts(out).facts) == 2
    before = out.read_bytes()
    again = run(root, "--out", str(out))
    assert (again.exit_code, again.stdout) == (2, "")
    assert f"{out}: is there already" in again.stderr
    assert out.read_bytes() == before


def test_json_needs_a_file(root: Path) -> None:
    result = run(root, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--out" in result.stderr
