"""One writer per workspace, with real second processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memupdate.errors import ExitCode, WorkspaceLocked
from memupdate.ledger import lock_holder, workspace_lock

HOLDER = """
import os, sys
from pathlib import Path
from memupdate.ledger import workspace_lock
with workspace_lock(Path(sys.argv[1]), "add prices.jsonl"):
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.write(1, b"%d\\n" % os.getpid())
        sys.stdin.read()
        os._exit(0)
    if sys.argv[2] == "hold":
        print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(path: Path, mode: str = "hold") -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        if process.stdin:
            process.stdin.close()
        process.wait()
        if process.stdout:
            process.stdout.close()


def test_the_second_writer_is_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "memupdate.lock"
    with holder(path) as (process, said):
        assert said == "held"
        with pytest.raises(WorkspaceLocked) as caught, workspace_lock(path, "compact"):
            pytest.fail("two writers")
        assert f"`add prices.jsonl` (process {process.pid} on " in caught.value.message
        assert str(tmp_path) in caught.value.message
        assert caught.value.exit_code is ExitCode.LOCKED
        found = lock_holder(path)
        assert found is not None
        assert found.pid == process.pid == json.loads(path.read_text("utf-8"))["pid"]


def test_kill_9_frees_it_at_once(tmp_path: Path) -> None:
    path = tmp_path / "memupdate.lock"
    with holder(path) as (process, _):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert path.read_text("utf-8"), "the dead holder's name is still there, and must not matter"
        assert lock_holder(path) is None
        with workspace_lock(path, "resume"):
            found = lock_holder(path)
            assert found is not None
            assert (found.pid, found.command) == (os.getpid(), "resume")


def test_a_forked_worker_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "memupdate.lock"
    with holder(path, "fork") as (process, child):
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            os.kill(int(child), 0)
            with workspace_lock(path, "resume"):
                pass
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_it_is_free_after_the_block_also_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "memupdate.lock"
    assert lock_holder(path) is None
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), workspace_lock(path, "add"):
            raise error
        assert lock_holder(path) is None
        assert path.read_bytes() == b""


def test_one_process_cannot_hold_it_twice_and_looking_does_not_free_it(tmp_path: Path) -> None:
    path = tmp_path / "memupdate.lock"
    with workspace_lock(path, "add"):
        for _ in range(3):
            assert lock_holder(path) is not None
        with pytest.raises(WorkspaceLocked), workspace_lock(path, "add"):
            pytest.fail("locked twice")
        with holder(path) as (process, said):
            assert said == ""
            assert process.wait() == 1


def test_many_lookers_never_turn_a_writer_away(tmp_path: Path) -> None:
    path = tmp_path / "memupdate.lock"
    path.touch()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            lock_holder(path)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(50):
            with workspace_lock(path, "add"):
                pass
    finally:
        stop.set()
        thread.join()


def test_a_lock_file_that_cannot_be_made(tmp_path: Path, obeying_permissions: list[str]) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom memupdate.errors import UsageError\n"
        "from memupdate.ledger.lock import workspace_lock\n"
        "try:\n    with workspace_lock(Path(sys.argv[1]), 'add'):\n        print('locked nothing')\n"
        "except UsageError as error:\n    print(error.message)\n"
    )
    tmp_path.chmod(0o555)
    try:
        command = [*obeying_permissions, sys.executable, "-c", code, str(tmp_path / "memupdate.lock")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        tmp_path.chmod(0o755)
    assert "cannot be written" in done.stdout


def test_scribbles_in_the_file_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "memupdate.lock"
    path.write_bytes(b"\xff[1, 2")
    with workspace_lock(path, "add"):
        path.write_bytes(b'{"pid": []}')
        with pytest.raises(WorkspaceLocked, match="another process"), workspace_lock(path, "add"):
            pytest.fail("locked twice")
