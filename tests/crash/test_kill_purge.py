"""`kill -9` of a real `facts purge` before each of its steps: the same command again leaves no trace of the text, and a whole workspace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import killing
from killing import Stage
from memupdate.ledger.ledger import Ledger
from memupdate.operations.matching import matcher_digest
from memupdate.operations.purging import begun
from memupdate.serving.manifest import read_manifest

KEY = "Where is Velon Energy based?"
TRACES = (b"Velon", b"velon", b"Malalbridge")
PURGE = ("facts", "purge", "--key", KEY, "--yes", "--reason", "they asked")


def holding(root: Path) -> list[str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return sorted(path.name for path in files if any(word in path.read_bytes() for word in TRACES))


def is_begun(root: Path) -> bool:
    with Ledger.open(root / "ledger.db", readonly=True) as ledger:
        return begun(ledger) != []


def with_a_reason(root: Path) -> Path:
    """The release's papers have a reason, which repeats the answer."""
    file = root / "registry/releases/acme@v1/memupdate.json"
    papers = {**json.loads(file.read_text(encoding="utf-8")), "reason": "they moved to Malalbridge"}
    file.write_text(json.dumps(papers), encoding="utf-8")
    return root


def check(root: Path) -> None:
    assert holding(root) == []
    assert killing.leftovers(root) == []
    release = root / "registry/releases/acme@v1"
    named = read_manifest(root / "registry/manifest.json").releases["acme@v1"].matcher_digest
    assert named == matcher_digest(release)
    with Ledger.open(root / "ledger.db", readonly=True) as ledger:
        assert ledger.verify() == []
        assert begun(ledger) == []
        assert len(ledger.events(kind="purged")) == 1


def test_killed_before_each_of_its_steps(stage: Stage, copy: Callable[[], Path]) -> None:
    stale = 0
    for steps in range(100):
        root = with_a_reason(copy())
        assert {"ledger.db", "matcher.json", "memupdate.json"} <= set(holding(root))
        command = stage.commands.start(root, *PURGE, steps=steps)
        if command.wait() == 0:
            check(root)
            break
        assert command.wait() == -9, command.said
        manifest = read_manifest(root / "registry/manifest.json").releases["acme@v1"]
        stale += manifest.matcher_digest != matcher_digest(root / "registry/releases/acme@v1")
        if is_begun(root):
            # The same command again, by a key that the ledger may have forgotten, or `resume`.
            again = stage.commands.run(root, *(PURGE if steps % 2 else ("resume",)))
            assert again.wait() == 0, again.said
        elif holding(root):
            continue
        check(root)
    assert steps > 8
    assert stale
