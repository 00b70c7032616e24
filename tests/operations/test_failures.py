"""What goes wrong around the main job: killed processes, Ctrl-C, a full disk, a port in use, a model that has gone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from memupdate import Workspace
from memupdate.ledger.ledger import Ledger
from memupdate.resources import resource_dir
from support import news, write_facts_file

Make = Callable[..., Workspace]
FEW = 5
DEADLINE_S = 240.0


def command(root: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "memupdate", "-w", str(root), *arguments]


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(root, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background of a shell has Ctrl-C ignored, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(root, *arguments), capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def wait_for_state(root: Path, process: subprocess.Popen[str], states: set[str]) -> str:
    """Until the first batch is in one of `states`; the process must still run then."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        with Ledger.open(root / "ledger.db", readonly=True) as ledger:
            batches = ledger.batches()
        if batches and batches[0].state in states:
            return str(batches[0].state)
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"no batch came to {states}")


@pytest.mark.parametrize("state", ["received", "planned", "trained", "verified"])
def test_a_batch_killed_at_any_state_is_resumed_to_a_proved_release(
    make_workspace: Make, tmp_path: Path, state: str
) -> None:
    root = make_workspace().root
    facts = write_facts_file(tmp_path / "facts.jsonl", news(1)[:FEW])
    process = start(root, "add", str(facts))
    wait_for_state(root, process, {state, *_after(state)})
    if state == "planned":
        time.sleep(2)  # in the middle of training
    with suppress(ProcessLookupError):  # a fast machine may have finished
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    resumed = run(root, "resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    with Ledger.open(root / "ledger.db", readonly=True) as ledger:
        assert ledger.verify() == []
        (batch,) = ledger.batches()
        assert (batch.state, batch.release, batch.facts_proved) == ("released", "acme@v1", FEW)
        assert sorted(f.prompt for f in ledger.live_facts("acme")) == sorted(row["prompt"] for row in news(1)[:FEW])
        proofs = ledger.proofs("acme@v1")
        assert len(proofs) == FEW
        assert all(proof.proved for proof in proofs)
    assert [path.name for path in (root / "registry" / "releases").iterdir()] == ["acme@v1"]
    assert run(root, "verify", "acme@v1").returncode == 0


def _after(state: str) -> list[str]:
    """Where a fast machine may have come to by the time that we look."""
    order = ["received", "planned", "trained", "verified", "released"]
    return order[order.index(state) + 1 :]


def test_ctrl_c_leaves_a_batch_that_resumes(make_workspace: Make, tmp_path: Path) -> None:
    root = make_workspace().root
    process = start(root, "add", str(write_facts_file(tmp_path / "facts.jsonl", news(1)[:20])))
    wait_for_state(root, process, {"planned"})
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "memupdate resume" in said
    assert "Traceback" not in said
    assert run(root, "resume").returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_clear_line_and_nothing_is_lost(small_disk: Path, tmp_path: Path) -> None:
    root = Workspace.init(small_disk / "ws", model="atlas", collection="acme").root
    failed = run(root, "add", str(write_facts_file(tmp_path / "facts.jsonl", news(1)[:FEW])))
    assert failed.returncode == 2, failed.stderr
    assert "no space left" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (root / "registry" / "releases").exists()
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    resumed = run(root, "resume")
    assert resumed.returncode == 0, resumed.stderr
    assert [row.facts for row in Workspace(root).releases()] == [FEW]


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
    root = make_workspace(memory__max_rank="2", memory__min_rank="1").root
    many = write_facts_file(tmp_path / "many.jsonl", [*news(1), *news(2)[:20]])
    done = run(root, "add", str(many))
    assert (done.returncode, done.stdout) == (4, "")
    assert "rank" in done.stderr
