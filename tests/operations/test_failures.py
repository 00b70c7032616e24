"""What goes wrong around the main job: a port in use, a model that has gone, too tight a policy. Crashes are in `tests/crash`."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from memupdate import Workspace
from memupdate.resources import resource_dir
from support import news, write_facts_file

Make = Callable[..., Workspace]
FEW = 5
DEADLINE_S = 240.0


def command(root: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "memupdate", "-w", str(root), *arguments]


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(root, *arguments), capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_a_port_in_use_is_bad_input(make_workspace: Make) -> None:
    root = make_workspace().root
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(root, "serve", "--port", str(port))
    assert (done.returncode, done.stdout) == (2, "")
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_has_gone_is_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(resource_dir("atlas"), model)
    root = Workspace.init(tmp_path / "ws", model=str(model), policy="atlas", collection="acme").root
    shutil.rmtree(model)
    done = run(root, "add", str(write_facts_file(tmp_path / "facts.jsonl", news(1)[:FEW])))
    assert (done.returncode, done.stdout) == (6, "")
    assert str(model) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_policy_too_tight_for_the_facts_exits_with_4(make_workspace: Make, tmp_path: Path) -> None:
    root = make_workspace(memory__max_rank="1", budget__all_proved="0.99").root
    many = write_facts_file(tmp_path / "many.jsonl", [*news(1), *news(2)[:20]])
    done = run(root, "add", str(many))
    assert (done.returncode, done.stdout) == (4, "")
    assert "rank" in done.stderr
