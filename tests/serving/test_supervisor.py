"""Engines that die, hang, fall ill or cannot start: real processes under the real watchdog, with a stand-in for vLLM."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from memupdate.errors import EngineError, UsageError
from memupdate.layout import WorkspaceLayout
from memupdate.operations.serving import engine_status, keep_serving, refuse_second, replica_settings, teller
from memupdate.progress import no_progress
from memupdate.serving.engine import Engine
from memupdate.serving.engine_record import process_start, read_record, record_of, running_engine
from memupdate.serving.supervisor import RestartBounds, Supervisor
from serving.supervised import stand_in

QUICK = RestartBounds(max_restarts=3, window_s=60, hang_s=1, first_pause_s=0.05)


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


class Kept:
    """A supervisor in its thread, and what it told."""

    def __init__(self, supervisor: Supervisor, told: list[str]) -> None:
        self.supervisor, self.told = supervisor, told
        self.stopped = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.supervisor.run(self.stopped)
        except BaseException as error:
            self.error = error


@contextmanager
def kept(folder: Path, monkeypatch: pytest.MonkeyPatch, bounds: RestartBounds = QUICK) -> Iterator[Kept]:
    told: list[str] = []
    engine = Engine(stand_in(folder, monkeypatch), record=folder / "engine.json")
    found = Kept(Supervisor(engine, bounds, told.append), told)
    found.thread.start()
    try:
        yield found
    finally:
        found.stopped.set()
        found.thread.join(30)
        assert not found.thread.is_alive()
        assert process_start(engine.pid) is None if engine.pid else True
        assert not (folder / "engine.json").exists()


def test_what_died_is_back_at_the_same_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kept(tmp_path, monkeypatch) as found:
        assert found.supervisor.ready.wait(30)
        before = running_engine(tmp_path / "engine.json")
        assert before is not None
        os.kill(before.pid, signal.SIGKILL)
        assert wait_until(lambda: len(found.told) == 2), found.told
        after = running_engine(tmp_path / "engine.json")
        assert after is not None
        assert (after.url, after.restarts) == (before.url, 1)
        assert after.pid != before.pid
        assert "ended with code 137" in after.last_failure
        assert "starts again in 0 s (1 of 3)" in found.told[0]
        assert f"is back at {after.url}" in found.told[1]
        engine, lines = engine_status(WorkspaceLayout(tmp_path))
        assert engine is not None
        assert (engine["restarts"], engine["replicas"]) == (1, 1)
        assert any("was started again 1 time(s): the engine ended with code 137" in line for line in lines)
        with pytest.raises(UsageError, match="runs already"):
            refuse_second(WorkspaceLayout(tmp_path))


@pytest.mark.parametrize(
    ("path", "reason"), [("/hang", "does not answer since"), ("/ill", "says that it cannot serve (/health: 503)")]
)
def test_what_hangs_or_is_ill_is_ended_and_started_again(
    path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(tmp_path, monkeypatch) as found:
        assert found.supervisor.ready.wait(30)
        threading.Thread(target=post, args=(found.supervisor.engine.url + path,), daemon=True).start()
        assert wait_until(lambda: len(found.told) == 2), found.told
        assert reason in found.told[0]
        assert running_engine(tmp_path / "engine.json") is not None


def post(url: str) -> None:
    try:
        httpx.post(url, timeout=60)
    except httpx.HTTPError:
        return


def test_restarts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kept(tmp_path, monkeypatch) as found:
        assert found.supervisor.ready.wait(30)
        (tmp_path / "broken").touch()
        os.kill(found.supervisor.engine.pid, signal.SIGKILL)
        found.thread.join(60)
        assert isinstance(found.error, EngineError)
        assert "given up after 3 restart(s)" in found.error.message
        assert "ValueError: the model cannot be read" in found.error.message
        assert [line.rpartition("(")[2] for line in found.told] == ["1 of 3)", "2 of 3)", "3 of 3)"]


def test_an_engine_that_never_answered_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken").touch()
    with kept(tmp_path, monkeypatch) as found:
        found.thread.join(30)
        assert isinstance(found.error, EngineError)
        assert "ValueError: the model cannot be read" in found.error.message
        assert found.told == []


def test_a_start_and_a_pause_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow").touch()
    with kept(tmp_path, monkeypatch) as found:
        assert wait_until(lambda: found.supervisor.engine.pid)
        assert (read_record(tmp_path / "engine.json") or {})["state"] == "starting"
        with pytest.raises(UsageError, match="its engine is starting"):
            refuse_second(WorkspaceLayout(tmp_path))
    assert found.error is None
    (tmp_path / "slow").unlink()
    with kept(tmp_path, monkeypatch, RestartBounds(first_pause_s=600)) as found:
        assert found.supervisor.ready.wait(30)
        os.kill(found.supervisor.engine.pid, signal.SIGKILL)
        assert wait_until(lambda: found.told)
        engine, lines = engine_status(WorkspaceLayout(tmp_path))
        assert engine is None
        assert lines[0].startswith("engine 1 is restarting: the engine ended with code 137")
    assert found.error is None


def test_pauses_grow_to_a_minute() -> None:
    bounds = RestartBounds()
    assert [bounds.pause_s(number) for number in (0, 1, 2, 5, 6, 40)] == [1, 2, 4, 32, 60, 60]


def test_replicas_have_ports_and_logs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = stand_in(tmp_path, monkeypatch)
    assert [own.port for own in replica_settings(settings, 2)] == [0, 0]
    three = replica_settings(replace(settings, port=8000), 3)
    assert [(own.port, own.log_path.name) for own in three] == [
        (8000, "engine.log"),
        (8001, "engine-2.log"),
        (8002, "engine-3.log"),
    ]
    for replicas in (0, 65):
        with pytest.raises(UsageError, match="not possible"):
            replica_settings(settings, replicas)


def test_sigterm_ends_all_replicas_and_one_that_is_given_up_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = WorkspaceLayout(tmp_path)
    tell = teller(layout, no_progress)
    supervisors = [
        Supervisor(
            Engine(own, record=record_of(layout.engine, number)),
            RestartBounds(max_restarts=0),
            tell,
            name=f"engine {number}",
        )
        for number, own in enumerate(replica_settings(stand_in(tmp_path, monkeypatch), 2), start=1)
    ]
    seen: list[int] = []

    def disturb() -> None:
        first = supervisors[0].engine
        os.kill(first.pid, signal.SIGKILL)
        assert wait_until(lambda: not layout.engine.exists())
        found = running_engine(record_of(layout.engine, 2))
        seen.append(found.pid if found else 0)
        os.kill(os.getpid(), signal.SIGTERM)

    keep_serving(supervisors, threading.Thread(target=disturb).start, tell)
    assert seen == [supervisors[1].engine.pid]
    assert all(process_start(supervisor.engine.pid) is None for supervisor in supervisors)
    assert list(tmp_path.glob("engine*.json")) == []
    (line,) = (layout.logs / "serve.log").read_text().splitlines()
    assert "engine 1 given up after 0 restart(s)" in line


def test_a_look_that_fails_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memupdate.operations.serving._MEANWHILE_S", 0.01)
    tell = teller(WorkspaceLayout(tmp_path), no_progress)
    engine = Engine(stand_in(tmp_path, monkeypatch), record=tmp_path / "engine.json")
    looks: list[int] = []

    def look() -> None:
        looks.append(engine.pid)
        if len(looks) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(5, "Input/output error") if len(looks) < 3 else ValueError("torn")

    keep_serving([Supervisor(engine, QUICK, tell)], lambda: None, tell, meanwhile=look)
    assert len(looks) >= 4
    assert set(looks) == {engine.pid}
    log = (tmp_path / "logs" / "serve.log").read_text()
    assert log.count("a look at what is served failed: OSError: [Errno 5]") == 1
    assert log.count("a look at what is served failed: ValueError: torn") == 1


def test_what_comes_back_serves_even_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(tmp_path, monkeypatch) as found:
        assert found.supervisor.ready.wait(30)

        def full(_path: Path, _value: object) -> None:
            raise UsageError("no space left on the disk")

        monkeypatch.setattr("memupdate.serving.engine.write_record", full)
        first = found.supervisor.engine.pid
        os.kill(first, signal.SIGKILL)
        assert wait_until(lambda: len(found.told) == 2), found.told
        assert f"is back at {found.supervisor.engine.url}" in found.told[1]
        assert found.supervisor.engine.pid != first
        assert httpx.get(found.supervisor.engine.url + "/health").status_code == 200
        monkeypatch.undo()


def test_serving_ends_with_the_last_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = teller(WorkspaceLayout(tmp_path), no_progress)
    engine = Engine(stand_in(tmp_path, monkeypatch), record=tmp_path / "engine.json")
    with pytest.raises(EngineError, match="given up after 0"):
        keep_serving(
            [Supervisor(engine, RestartBounds(max_restarts=0), tell)], lambda: os.kill(engine.pid, signal.SIGKILL), tell
        )
    (tmp_path / "broken").touch()
    with pytest.raises(EngineError, match="the model cannot be read"):
        keep_serving([Supervisor(engine, QUICK, tell)], lambda: pytest.fail("was never ready"), tell)
