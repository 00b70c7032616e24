"""Two real vLLM engines of `serve --replicas 2` on one registry: one is killed with -9, misses a flip, comes back and heals itself."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import killing
from killing import Stage
from memupdate import Workspace
from memupdate.errors import EngineError
from memupdate.serving.client import Completion, EngineClient
from memupdate.serving.compat import engine_installed
from memupdate.serving.engine_record import running_engines

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(engine_installed() is None, reason="vLLM is not installed"),
]
STARTED_S = 420.0


@pytest.fixture
def serving(stage: Stage, tmp_path: Path) -> Iterator[tuple[Workspace, subprocess.Popen[bytes]]]:
    """A workspace with two releases, and its `serve`, which has published the latest on both engines."""
    root = Path(shutil.copytree(stage.template, tmp_path / "ws"))
    done = stage.commands.run(root, "add", str(stage.second))
    assert done.wait() == 0, done.said
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = min(free.getsockname()[1], 60_000)
    command = [sys.executable, "-m", "memupdate", "-w", str(root), "serve", "--replicas", "2", "--port", str(port)]
    with (tmp_path / "serve.out").open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        workspace = Workspace(root)
        try:
            wait_until(lambda: killing.state_of(root, 2) == "published" or process.poll() is not None)
            assert process.poll() is None, (tmp_path / "serve.out").read_text()
            yield workspace, process
        finally:
            process.terminate()
            process.wait(90)


def test_a_killed_replica_comes_back_with_what_was_published_meanwhile(
    serving: tuple[Workspace, subprocess.Popen[bytes]],
) -> None:
    workspace, serve = serving
    record = workspace.layout.engine
    first, second = running_engines(record)
    urls = [first.url, second.url]
    assert workspace.publish("acme@v1").replicas == 2
    old = [ask(url) for url in urls]
    assert [answer.model for answer in old] == ["acme@v1"] * 2
    assert old[0].text == old[1].text

    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: [engine.url for engine in running_engines(record)] == [second.url])
    with pytest.raises(EngineError, match="cannot be reached"):
        ask(first.url)
    assert ask(second.url).text == old[1].text, "the other one goes on"
    assert workspace.publish("acme@v2").replicas == 1
    new = ask(second.url)
    assert new.model == "acme@v2"

    wait_until(lambda: [engine.url for engine in running_engines(record)] == urls)
    back = running_engines(record)[0]
    assert (back.restarts, back.pid == first.pid) == (1, False)
    healed = ask(first.url)
    assert (healed.model, healed.text) == (new.model, new.text), "nobody told it"
    assert ask(first.url, "acme@v1").text == old[0].text
    assert workspace.rollback().replicas == 2
    assert [ask(url).model for url in urls] == ["acme@v1"] * 2
    assert "is back at" in (workspace.layout.logs / "serve.log").read_text()

    serve.terminate()
    assert serve.wait(90) == 0
    assert running_engines(record) == []


def ask(url: str, model: str = "acme") -> Completion:
    with EngineClient(url) as client:
        return client.chat(model, [{"role": "user", "content": "Who leads Acme?"}], 12)


def wait_until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + STARTED_S
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.5)
