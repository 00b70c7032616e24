"""The script that makes facts of endoflife.date's pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from memupdate.facts import read_facts

PAGE = """---
title: Roadrunner
category: app
releases:
-   releaseCycle: "3.10"
    releaseDate: 2025-02-01
    eol: 2027-02-01
    latest: "3.10.2"
    latestReleaseDate: 2025-06-30

-   releaseCycle: "3.9"
    releaseDate: 2024-01-01
    eol: true
    latest: "3.9.9"

---

> Prose with --- in it.
"""


def test_pages_become_facts_that_a_later_snapshot_supersedes(tmp_path: Path, repo_root: Path) -> None:
    (tmp_path / "roadrunner.md").write_text(PAGE, "utf-8")
    (tmp_path / "again.md").write_text(PAGE, "utf-8")
    (tmp_path / "empty.md").write_text("---\ntitle: Nothing\n---\n", "utf-8")
    script = repo_root / "examples" / "endoflife" / "to_facts.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, check=True)
    file = tmp_path / "facts.jsonl"
    file.write_bytes(done.stdout)
    found = {(f.fact.subject, f.fact.relation): f.fact for f in read_facts(file).facts}
    assert {key: fact.target for key, fact in found.items()} == {
        ("Roadrunner", "newest release cycle"): "3.10",
        ("Roadrunner 3.10", "latest version"): "3.10.2",
        ("Roadrunner 3.10", "end of support"): "2027-02-01",
        ("Roadrunner 3.10", "release date"): "2025-02-01",
        ("Roadrunner 3.9", "latest version"): "3.9.9",
        ("Roadrunner 3.9", "release date"): "2024-01-01",
    }
    latest = found["Roadrunner 3.10", "latest version"]
    assert (latest.prompt, latest.valid_from) == ("What is the latest version of Roadrunner 3.10?", "2025-06-30")
    assert len(latest.paraphrases) == 2
    assert found["Roadrunner 3.9", "latest version"].valid_from is None
