"""`kill -9` of real `publish`, `promote` and `abort` processes in their middle: `status`, `doctor`, `resume` and the command again heal it.

Whatever moment the kill comes at, the alias points at one of the two releases, clients go on being answered by it, and in the end the
manifest, the steps in the ledger and the batches are those of an undisturbed run. The engine is our middleware behind real HTTP, which
keeps an answer back, so that the command is killed while it warms the engine, or while it waits for the flip to be confirmed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import killing
from answering import Models, engine
from killing import Stage
from memupdate.ledger.ledger import Ledger
from memupdate.serving.client import EngineClient
from memupdate.serving.engine_record import process_start, write_record
from memupdate.serving.manifest import AliasEntry, read_manifest
from support import set_policy

STEPS = ("published", "put back", "rolled back", "canary begun", "canary ended", "promoted")
FIRST = ("publish", "acme@v1")
CANARY = ("publish", "acme@v2", "--canary", "25%")


@dataclass(frozen=True)
class Story:
    """One command, and what was done before it."""

    before: tuple[tuple[str, ...], ...]
    command: tuple[str, ...]
    requests: int
    """That it makes of the engine, all but the last before the alias moves."""


STORIES = {
    "publish": Story((FIRST,), ("publish", "acme@v2"), 2),
    "canary": Story((FIRST,), CANARY, 2),
    "promote": Story((FIRST, CANARY), ("promote",), 1),
    "abort": Story((FIRST, CANARY), ("abort",), 1),
}
MOMENTS = [(name, number) for name, story in STORIES.items() for number in range(story.requests)]


@pytest.fixture(scope="module")
def two_releases(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template with `acme@v2` beside `acme@v1`, none published; its policy wants no served proof."""
    root = Path(shutil.copytree(stage.template, tmp_path_factory.mktemp("rollout") / "ws"))
    set_policy(root / "policy.toml", {"proof__served": "false"})
    done = stage.commands.run(root, "add", str(stage.second))
    assert done.wait() == 0, done.said
    return root


@contextmanager
def served(root: Path) -> Iterator[tuple[str, Models]]:
    """An engine of the workspace, which its commands find by its note."""
    with engine(root / "registry") as (url, models):
        here = {"pid": os.getpid(), "process_started": process_start(os.getpid()), "url": url}
        told = {"served_model_name": "base", "max_lora_rank": 64, "started_at_utc": "", "log_path": ""}
        write_record(root / "engine.json", {**here, **told})
        yield url, models


def run(stage: Stage, root: Path, *arguments: str) -> Any:
    """The command's JSON."""
    done = stage.commands.run(root, *arguments, "--json")
    assert done.wait() == 0, done.said
    return json.loads(done.said[done.said.index("{") :])


def entry(root: Path) -> AliasEntry:
    return read_manifest(root / "registry" / "manifest.json").aliases["acme"]


def outcome(root: Path) -> dict[str, Any]:
    """What is left, but for times: where the alias points, its steps, and the batches."""
    with Ledger.open(root / "ledger.db", readonly=True) as ledger:
        assert ledger.verify() == []
        steps = [(e.kind, e.release) for e in ledger.events("acme", limit=-1) if e.kind in STEPS]
    return {"alias": entry(root), "steps": steps, "batches": killing.content(root)["batches"]}


@pytest.mark.parametrize(("name", "answered"), MOMENTS, ids=lambda value: str(value))
def test_killed_in_the_middle_of_a_rollout(
    stage: Stage, two_releases: Path, tmp_path: Path, name: str, answered: int
) -> None:
    story, roots = STORIES[name], [Path(shutil.copytree(two_releases, tmp_path / which)) for which in ("peace", "cut")]
    for root in roots:
        with served(root) as (url, models):
            for arguments in story.before:
                run(stage, root, *arguments)
            before = entry(root)
            if root.name == "cut":
                models.asked.clear()
                models.answer_at_most = answered
                command = stage.commands.start(root, *story.command)
                assert command.wait_until(lambda models=models: len(models.asked) > answered), command.said
                assert command.kill() == -9
                models.answer_at_most = None
                moved = entry(root) != before
                assert moved == (answered == story.requests - 1)
                assert answered_by(url) <= {"acme@v1", "acme@v2"}
                look(stage, root)
                run(stage, root, "resume")
                if not moved and name in (
                    "promote",
                    "abort",
                ):  # a release that waits goes on by `resume`, as it was meant to
                    run(stage, root, *story.command)
            else:
                run(stage, root, *story.command)
                wanted = outcome(root)
            found = outcome(root)
            look(stage, root)
    assert found == wanted
    assert killing.leftovers(root) == []


def look(stage: Stage, root: Path) -> None:
    """`status` and `doctor` find a whole workspace, with nobody in it."""
    status = run(stage, root, "status")
    assert status["aliases"] == {"acme": entry(root).release}
    done = stage.commands.run(root, "doctor", "--json")
    report = json.loads(done.said[done.said.index("{") :])
    about = [f for f in report["findings"] if f["area"] in ("workspace", "policy", "lock", "ledger", "registry")]
    assert [f["what"] for f in about if f["status"] == "fail"] == []
    assert [f["what"] for f in about if f["area"] == "lock"] == ["free"]


def answered_by(url: str) -> set[str]:
    with EngineClient(url) as client:
        return {client.complete("acme", "?", 1, user=f"user-{number}").model for number in range(40)}
