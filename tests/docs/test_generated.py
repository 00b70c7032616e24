"""The generated pages are those that the code would write now, and the check notices when they are not."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from memupdate.ledger.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {"cli_docs": "docs/cli.md", "ledger_docs": "docs/ledger.md"}


def run(tools: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(tools / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", TOOLS)
def test_the_page_is_up_to_date(name: str) -> None:
    answer = run(ROOT / "tools", name, "--check")
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(("name", "page"), TOOLS.items())
def test_drift_is_noticed_and_mended(name: str, page: str, tmp_path: Path) -> None:
    """On a copy: a page that is missing or stale fails the check, which writes nothing; without it the page is written."""
    (tmp_path / "tools").mkdir()
    for file in ("generated_docs", name):
        shutil.copy(ROOT / "tools" / f"{file}.py", tmp_path / "tools")
    assert run(tmp_path / "tools", name, "--check").returncode == 1
    assert not (tmp_path / page).exists()
    assert run(tmp_path / "tools", name).returncode == 0
    written = (tmp_path / page).read_text(encoding="utf-8")
    assert written == (ROOT / page).read_text(encoding="utf-8")
    (tmp_path / page).write_text(written + "one line more\n", encoding="utf-8")
    answer = run(tmp_path / "tools", name, "--check")
    assert answer.returncode == 1
    assert "-one line more" in answer.stderr
    assert (tmp_path / page).read_text(encoding="utf-8").endswith("one line more\n")


def test_the_sql_examples_run_on_a_ledger(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sql\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    statements = [part for part in re.sub(r"^--.*$", "", block, flags=re.MULTILINE).split(";") if part.strip()]
    assert len(statements) == 3
    with Ledger.create(tmp_path / "ledger.db"):
        connection = sqlite3.connect(tmp_path / "ledger.db")
        for statement in statements:
            assert connection.execute(statement).fetchall() == []
        connection.close()
