"""Commands, ports, records and reasons; and the watchdog, with real processes that do not want to die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from memupdate.errors import UsageError
from memupdate.serving import engine as module
from memupdate.serving.engine import (
    EngineSettings,
    choose_port,
    engine_command,
)
from memupdate.serving.engine_log import failure_reason
from memupdate.serving.engine_record import (
    engine_notes,
    process_start,
    record_of,
    record_paths,
    running_engine,
    running_engines,
)


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    model = tmp_path / "model"
    model.mkdir()
    return EngineSettings(
        model=str(model),
        served_model_name="tiny",
        registry=tmp_path / "registry",
        log_path=tmp_path / "engine.log",
        lora_target_modules=("gate_proj", "up_proj", "down_proj", "lm_head"),
        max_lora_rank=20,
    )


def options(command: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    name = ""
    for word in command:
        if word.startswith("--"):
            name = word
            found[name] = []
        elif name:
            found[name].append(word)
    return found


def test_the_command_keeps_lm_head_out_and_names_vllm_packed_modules(settings: EngineSettings) -> None:
    command, environment = engine_command(replace(settings, extra_args=("--seed", "3"), drain_s=5, max_model_len=64))
    given = options(command)
    assert given["--lora-target-modules"] == ["gate_proj", "up_proj", "down_proj", "gate_up_proj"]
    assert given["--max-lora-rank"] == ["32"]
    assert given["--middleware"] == ["memupdate.serving.middleware.AliasMiddleware"]
    assert given["--shutdown-timeout"] == ["5"]
    assert given["--max-model-len"] == ["64"]
    assert command[-2:] == ["--seed", "3"]
    assert environment["MEMUPDATE_REGISTRY"] == str(settings.registry.resolve())
    assert environment["MEMUPDATE_MAX_LORA_RANK"] == "32"
    assert environment["MEMUPDATE_BASE_MODEL"] == settings.served_model_name
    assert "MEMUPDATE_ACCESS" not in environment
    bound = engine_command(replace(settings, access=settings.registry / "access.json"))[1]
    assert bound["MEMUPDATE_ACCESS"] == str(settings.registry.resolve() / "access.json")
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UsageError, match="at least one module"):
        engine_command(replace(settings, lora_target_modules=("lm_head",)))


def test_only_a_cpu_engine_is_eager_and_only_a_local_model_offline(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_cpu_engine", lambda: True)
    command, environment = engine_command(replace(settings, kv_cache_gib=3))
    assert "--enforce-eager" in command
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert int(environment["MALLOC_MMAP_THRESHOLD_"]) < int(environment["MALLOC_TRIM_THRESHOLD_"])
    assert environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "32", (
        "or its worker grows with every new length of a batch"
    )
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment, "vLLM chooses for an engine that is alone"
    bound = replace(settings, processors=(2, 3))
    assert engine_command(bound)[1]["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in engine_command(bound)[1], "the operator's own word stands"
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
    assert engine_command(settings)[1]["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "512"
    monkeypatch.setattr(module, "is_cpu_engine", lambda: False)
    command, environment = engine_command(replace(settings, model="Qwen/Qwen3-0.6B"))
    assert "--enforce-eager" not in command
    on_cpu = {"VLLM_CPU_KVCACHE_SPACE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "MALLOC_MMAP_THRESHOLD_"}
    assert not on_cpu & set(environment)
    assert "HF_HUB_OFFLINE" not in environment
    assert options(command)["--model"] == ["Qwen/Qwen3-0.6B"]


def test_secrets_are_in_no_command_line(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    command, environment = engine_command(replace(settings, api_key="client-key"))
    assert "client-key" not in " ".join(command)
    assert environment["VLLM_API_KEY"] == "client-key"
    assert environment["VLLM_PLUGINS"] == "other,memupdate"


def test_a_port_in_use_is_said_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is in use"):
            choose_port("127.0.0.1", port)
    assert choose_port("127.0.0.1", port) == port
    assert choose_port("127.0.0.1", 0) > 0
    with pytest.raises(UsageError, match="cannot listen"):
        choose_port("127.0.0.1", 70000)
    with pytest.raises(UsageError, match="cannot listen"):
        choose_port("203.0.113.7", 0)


def test_nothing_here_loads_torch_or_vllm() -> None:
    names = ("manifest", "adapter_check", "middleware", "vllm_plugin", "watchdog", "engine", "client")
    code = "import sys\n" + "".join(f"import memupdate.serving.{name}\n" for name in names)
    code += "assert not {'torch', 'vllm', 'transformers', 'peft'} & set(sys.modules)\n"
    code += "sys.modules['memupdate.serving.vllm_plugin'].register()\nassert 'vllm' not in sys.modules\n"
    environment = {name: value for name, value in os.environ.items() if name != "MEMUPDATE_REGISTRY"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_reason_is_the_cause_and_not_its_consequences(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text(
        "(APIServer pid=7) INFO 11-24 06:11:12 [api_server.py:1] starting\n"
        "(EngineCore pid=9) ERROR 11-24 06:11:13 [core.py:9] Traceback (most recent call last):\n"
        '(EngineCore pid=9) ERROR 11-24 06:11:13 [core.py:9]   File "x.py", line 3, in f\n'
        "(EngineCore pid=9) ERROR 11-24 06:11:13 [core.py:9]     raise ValueError('x')\n"
        "(EngineCore pid=9) ERROR 11-24 06:11:13 [core.py:9] ValueError: No available memory for the cache blocks.\n"
        "(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    reason, tail = failure_reason(log)
    assert reason == "ValueError: No available memory for the cache blocks."
    assert tail[-1].startswith("RuntimeError: Engine core initialization failed")
    assert failure_reason(tmp_path / "none.log") == ("", ())
    log.write_text(
        "pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, no such architecture [type=value_error, input_value=ArgsKwargs(())]\n"
        "    For further information visit a page\n"
    )
    assert failure_reason(log)[0].endswith("for ModelConfig Value error, no such architecture")
    log.write_text(
        "(APIServer pid=7) WARNING 11-24 06:11:12 [x.py:1] This can cause errors like `OSError: [Errno 24] Too many`.\n"
        "(APIServer pid=7) ERROR 11-24 06:11:13 [x.py:9] vllm.EngineDeadError: EngineCore encountered an issue.\n"
    )
    assert failure_reason(log)[0] == "vllm.EngineDeadError: EngineCore encountered an issue."
    log.write_text("all is well\n")
    assert failure_reason(log) == ("", ("all is well",))


class _Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_replicas_are_found_by_their_numbered_records(tmp_path: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Health)
    Thread(target=server.serve_forever, daemon=True).start()
    first = tmp_path / "engine.json"
    value = {
        "pid": os.getpid(), "process_started": process_start(os.getpid()), "url": f"http://127.0.0.1:{server.server_port}",
        "served_model_name": "tiny", "max_lora_rank": 16, "started_at_utc": "2026-01-01T00:00:00+00:00", "log_path": "x",
    }  # fmt: skip
    assert (running_engines(first), record_paths(first)) == ([], [])
    for number in (10, 2, 1):
        restarts = {"restarts": number, "last_failure": "killed"}
        record_of(first, number).write_text(json.dumps({**value, **restarts}))
    dead = {"pid": 2**22 + 1, "process_started": "1", "supervisor_pid": os.getpid(), "state": "restarting"}
    record_of(first, 3).write_text(json.dumps({**dead, "supervisor_started": process_start(os.getpid())}))
    for other in ("engine-x.json", "engine-01.json", "engine-1.json", "engines.json"):
        (tmp_path / other).write_text(json.dumps(value))
    try:
        assert [path.name for path in record_paths(first)] == [
            "engine.json", "engine-2.json", "engine-3.json", "engine-10.json",
        ]  # fmt: skip
        assert [(found.restarts, found.last_failure) for found in running_engines(first)] == [
            (1, "killed"), (2, "killed"), (10, "killed"),
        ]  # fmt: skip
        notes = {note.number: note for note in engine_notes(first)}
        assert (notes[2].is_engine_alive, notes[2].is_supervisor_alive, notes[2].state) == (True, False, "running")
        assert (notes[3].is_engine_alive, notes[3].is_supervisor_alive, notes[3].state) == (False, True, "restarting")
    finally:
        server.shutdown()
        server.server_close()


def test_a_record_counts_only_while_its_very_process_answers(tmp_path: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Health)
    Thread(target=server.serve_forever, daemon=True).start()
    record = tmp_path / "engine.json"
    value = {
        "schema_version": 1,
        "pid": os.getpid(),
        "process_started": process_start(os.getpid()),
        "url": f"http://127.0.0.1:{server.server_port}",
        "served_model_name": "tiny",
        "max_lora_rank": 16,
        "started_at_utc": "2026-01-01T00:00:00+00:00",
        "log_path": "engine.log",
    }
    try:
        record.write_text(json.dumps(value))
        found = running_engine(record)
        assert found is not None
        assert (found.pid, found.url, found.max_lora_rank) == (os.getpid(), value["url"], 16)
        record.write_text(json.dumps({**value, "process_started": "another process with this id"}))
        assert running_engine(record) is None
        record.write_text(json.dumps({**value, "pid": 2**22 + 1, "process_started": None}))
        assert running_engine(record) is None
    finally:
        server.shutdown()
        server.server_close()
    record.write_text(json.dumps(value))
    assert running_engine(record, timeout_s=1) is None
    record.write_text("{")
    assert running_engine(record) is None
    assert running_engine(tmp_path / "none.json") is None


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 2:
    subprocess.Popen([sys.executable, __file__, sys.argv[1]])
open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
time.sleep(120)
"""


def alive(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if process_start(int(path.name)) is not None]


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def watched(parent: int, *command: str, grace_s: float = 0.3) -> subprocess.Popen[str]:
    watchdog = [sys.executable, "-m", "memupdate.serving.watchdog", str(parent), str(grace_s), "--", *command]
    return subprocess.Popen(watchdog, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture
def stubborn(tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A command with a child, both deaf to SIGTERM, and the folder where they sign in."""
    script, folder = tmp_path / "stubborn.py", tmp_path / "pids"
    script.write_text(STUBBORN)
    folder.mkdir()
    return folder, (sys.executable, str(script), str(folder), "with child")


def test_the_watchdog_ends_a_whole_stubborn_session(stubborn: tuple[Path, tuple[str, ...]]) -> None:
    folder, command = stubborn
    with watched(os.getpid(), *command) as watchdog:
        assert watchdog.stdout is not None
        leader = int(watchdog.stdout.readline())
        assert wait_until(lambda: len(alive(folder)) == 2)
        assert leader in alive(folder)
        watchdog.terminate()
        assert watchdog.wait(10) == 128 + signal.SIGKILL
        assert alive(folder) == []


def test_kill_9_of_the_parent_ends_the_session(tmp_path: Path, stubborn: tuple[Path, tuple[str, ...]]) -> None:
    folder, command = stubborn
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import os, subprocess, sys, time\n"
        "watchdog = [sys.executable, '-m', 'memupdate.serving.watchdog', str(os.getpid()), '0.3', '--']\n"
        "subprocess.Popen([*watchdog, *sys.argv[1:]])\n"
        "time.sleep(120)\n"
    )
    parent = subprocess.Popen([sys.executable, str(launcher), *command], stdout=subprocess.DEVNULL)
    assert wait_until(lambda: len(alive(folder)) == 2)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: alive(folder) == [])


def test_children_left_by_a_command_that_ended_are_ended_too(stubborn: tuple[Path, tuple[str, ...]]) -> None:
    folder, command = stubborn
    with watched(os.getpid(), *command) as watchdog:
        assert watchdog.stdout is not None
        leader = int(watchdog.stdout.readline())
        assert wait_until(lambda: len(alive(folder)) == 2)
        os.kill(leader, signal.SIGKILL)
        assert watchdog.wait(10) == 128 + signal.SIGKILL
        assert alive(folder) == []


def test_the_watchdog_passes_the_exit_code_on() -> None:
    with watched(os.getpid(), sys.executable, "-c", "raise SystemExit(7)") as watchdog:
        assert watchdog.wait(10) == 7


def test_kill_9_of_the_watchdog_reaches_the_command() -> None:
    with watched(os.getpid(), sys.executable, "-c", "import time; time.sleep(120)") as watchdog:
        assert watchdog.stdout is not None
        leader = int(watchdog.stdout.readline())
        assert wait_until(lambda: process_start(leader) is not None)
        watchdog.kill()
        assert wait_until(lambda: process_start(leader) is None)
