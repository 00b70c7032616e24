"""Starting, watching and ending one vLLM engine, and the note (`engine.json`) by which other commands find it.

Invariant: an engine that `Engine.start` began has ended, with all its processes, when `stop` returns, when the context
is left by whatever way (Ctrl-C included), or when this process dies (`watchdog`). `engine.json` tells of an engine only
once it has answered. This module knows how to launch vLLM and nothing about releases or proofs.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, Self

import httpx

from memupdate.budget.ranks import serving_rank
from memupdate.errors import EngineError, MemupdateError, UsageError
from memupdate.progress import Progress, ProgressEvent, no_progress
from memupdate.serving.compat import check_vllm_version, is_cpu_engine
from memupdate.serving.engine_log import failure_reason
from memupdate.serving.engine_record import process_start, read_record, write_record
from memupdate.serving.env import ACCESS_ENV, BASE_FINGERPRINT_ENV, BASE_MODEL_ENV, MAX_RANK_ENV, REGISTRY_ENV
from memupdate.storage import readable_disk_errors

MIDDLEWARE = "memupdate.serving.middleware.AliasMiddleware"
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "memupdate"
PACKED_MODULES = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
}
"""How vLLM packs the matrices of the usual decoders: its name beside PEFT's."""
_NEVER_TARGETS = frozenset({"lm_head", "embed_tokens"})
"""LoRA on `lm_head` makes one `prompt_logprobs` request kill the CPU engine; see `engine_command`."""
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_KEEP_ALIVE_S = 620
"""How long an idle connection is kept: longer than clients and load balancers keep theirs (Google's 600 s). vLLM's own 5 s end
connections that a client is about to use again, and what it has sent is lost: 34 of 3,974 requests under load."""
_STEADY_MEMORY = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 20),
}
"""On a CPU: oneDNN compiles a kernel for each number of tokens that it meets, and would keep 1,024 of them, some hundred MB; tensors that
live for one batch (bytes, from the first threshold on) go back to the system instead of leaving holes between what stays."""
_STOP_GRACE_S = 20.0
_KILL_GRACE_S = 10.0
_POLL_S = 0.25


@dataclass(frozen=True)
class EngineSettings:
    """All that is decided about an engine before it starts."""

    model: str
    """Folder of the base model, or a hub id."""
    served_model_name: str
    """How clients ask for the untouched base model."""
    registry: Path
    log_path: Path
    """vLLM's output goes here; the log of the run before is kept beside it as `….1`."""
    lora_target_modules: tuple[str, ...]
    """Last parts of the adapted modules' names, as PEFT spells them; `lm_head` is left out always."""
    max_lora_rank: int
    """Largest rank that must be servable; rounded up to what vLLM accepts."""
    max_loras: int = 4
    """Releases that one batch may mix."""
    max_cpu_loras: int = 0
    """Releases kept in memory beside the slots, so that a flip reads no file; 0: as many as `max_loras`."""
    host: str = "127.0.0.1"
    port: int = 0
    """0: a free one is chosen."""
    dtype: str = "auto"
    max_model_len: int = 0
    """Tokens; 0: the model's own."""
    kv_cache_gib: int = 1
    """GiB of memory for the KV cache; used on the CPU only."""
    processors: tuple[int, ...] = ()
    """Of this machine, that it computes on; (): vLLM chooses, the same ones for every engine. Used on the CPU only."""
    base_fingerprint: str | None = None
    """Where given, only releases made for this base model are served."""
    api_key: str | None = None
    """What clients must show; handed over by environment, so that it is in no process list."""
    access: Path | None = None
    """File that binds API keys to collections; where given, nobody is let in without it."""
    extra_args: tuple[str, ...] = ()
    """Appended to vLLM's command line as they are."""
    drain_s: int = 0
    """Seconds that requests in flight may take to finish when the engine is stopped; 0 aborts them."""
    ready_timeout_s: float = 600.0


def engine_command(settings: EngineSettings) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment variables to add, for this machine's vLLM. Port 0 is left as it is.

    `--lora-target-modules` is always given, without `lm_head`: vLLM otherwise wraps the logits for LoRA, and the CPU
    kernel then fails on prompt positions, so that one `prompt_logprobs` request would end the engine. It also keeps
    slots small.
    """
    rank = serving_rank(settings.max_lora_rank)
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", _local_or_hub(settings.model), "--served-model-name", settings.served_model_name]
    command += ["--host", settings.host, "--port", str(settings.port), "--dtype", settings.dtype]
    command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(settings.max_loras)]
    if settings.max_cpu_loras:
        command += ["--max-cpu-loras", str(max(settings.max_cpu_loras, settings.max_loras))]
    command += ["--lora-target-modules", *_target_modules(settings.lora_target_modules)]
    command += ["--middleware", MIDDLEWARE]
    if settings.max_model_len:
        command += ["--max-model-len", str(settings.max_model_len)]
    if settings.drain_s:
        command += ["--shutdown-timeout", str(settings.drain_s)]
    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # Without it vLLM asks no resolver.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(_KEEP_ALIVE_S)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        REGISTRY_ENV: str(settings.registry.resolve()),
        MAX_RANK_ENV: str(rank),
        BASE_MODEL_ENV: settings.served_model_name,
    }
    if settings.access is not None:
        environment[ACCESS_ENV] = str(settings.access.resolve())
    if settings.base_fingerprint:
        environment[BASE_FINGERPRINT_ENV] = settings.base_fingerprint
    if settings.api_key:
        environment["VLLM_API_KEY"] = settings.api_key
    if Path(settings.model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if plugins := os.environ.get("VLLM_PLUGINS"):
        environment["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins.split(","), PLUGIN_NAME]))
    if is_cpu_engine():
        # Compiling takes minutes and gains little at the batch sizes of a CPU. With an explicit cache size vLLM also
        # skips a warm-up.
        command += ["--enforce-eager"]
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        environment["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")  # leaves the cores to training
        environment |= {name: os.environ.get(name, value) for name, value in _STEADY_MEMORY.items()}
        if settings.processors and _BINDING not in os.environ:
            environment[_BINDING] = ",".join(map(str, settings.processors))
    return [*command, *settings.extra_args], environment


class Engine:
    """One vLLM process tree, started and ended by us. Use as a context manager, or call `start` and `stop`."""

    def __init__(self, settings: EngineSettings, *, record: Path | None = None) -> None:
        """Nothing happens yet. `record` is where `engine.json` goes (`WorkspaceLayout.engine`); None writes none."""
        self.settings = settings
        self.url = ""
        self.notes: dict[str, Any] = {}
        """Goes into the record beside what the engine itself knows."""
        self.needs_record = True
        """Whether an engine that cannot be recorded is ended. One that comes back serves even on a full disk."""
        self._port = 0
        self._record = record
        self._watchdog: subprocess.Popen[str] | None = None
        self._pid = 0

    @property
    def pid(self) -> int:
        """The API server's process id, which is also its session and process group; 0 before the start."""
        return self._pid

    @property
    def _grace_s(self) -> float:
        return _STOP_GRACE_S + self.settings.drain_s

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, progress: Progress = no_progress, *, cancelled: Event | None = None) -> str:
        """Start vLLM and wait until it answers; returns its URL. Events: stage `engine`, seconds waited.

        May be called again after `stop`: the URL stays the same.

        Args:
            progress: told how long it takes.
            cancelled: set by another thread, it ends the waiting and the engine.

        Raises:
            UsageError: the port is in use.
            EngineError: vLLM is not installed here, ended before it answered (the message says why), took too long, or
                the start was cancelled.
        """
        if self._watchdog is not None:
            raise EngineError("this engine was started already")
        _check_installed()
        _check_model(self.settings.model)
        self._port = choose_port(self.settings.host, self._port or self.settings.port)
        command, environment = self.command()
        command[command.index("--port") + 1] = str(self._port)
        self.url = f"http://{_dialled(self.settings.host)}:{self._port}"
        try:
            self._launch(command, {**os.environ, **environment})
            self._wait_ready(progress, cancelled or Event())
            self._write_record()
        except BaseException:
            self.stop()
            raise
        return self.url

    def command(self) -> tuple[list[str], dict[str, str]]:
        """What `start` runs, and what it adds to the environment; see `engine_command`."""
        return engine_command(self.settings)

    def poll(self) -> int | None:
        """The exit code, or None while the engine runs (or was never started)."""
        return None if self._watchdog is None else self._watchdog.poll()

    def failure(self) -> EngineError:
        """Why the engine ended, from its log."""
        reason, tail = failure_reason(self.settings.log_path)
        code = self.poll()
        message = (
            f"the engine ended{'' if code is None else f' with code {code}'}: {reason or 'the log gives no reason'}"
        )
        return EngineError(message, f"the whole log is {self.settings.log_path}", tail)

    def kill(self) -> None:
        """End the engine at once, without grace; `stop` then cleans up."""
        if self._watchdog is not None and self._pid:
            _kill_group(self._pid)

    def stop(self) -> None:
        """End the engine: some seconds to finish what it does, then all of its session is killed. Safe to repeat."""
        if self._pid and self._recorded_pid() == self._pid:
            self.remove_record()
        watchdog = self._watchdog
        if watchdog is None:
            return
        if watchdog.poll() is None:
            watchdog.terminate()
        try:
            watchdog.wait(self._grace_s + _KILL_GRACE_S)
        except BaseException as error:
            # The watchdog hangs, or the user is impatient (a second Ctrl-C): no grace any more.
            watchdog.kill()
            watchdog.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        finally:
            if self._pid and (watchdog.returncode or 0) < 0:
                _kill_group(self._pid)  # The watchdog was killed before it could do this itself.
            if watchdog.stdout is not None:
                watchdog.stdout.close()
            self._watchdog = None

    def _launch(self, command: list[str], environment: Mapping[str, str]) -> None:
        log = self.settings.log_path
        with readable_disk_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            if log.exists():
                os.replace(log, log.with_name(log.name + ".1"))
            log.touch()
        prefix = [sys.executable, "-P", "-m", "memupdate.serving.watchdog", str(os.getpid()), str(self._grace_s), "--"]
        with log.open("wb") as output:
            self._watchdog = subprocess.Popen(
                [*prefix, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C in the terminal reaches us, and we decide.
                text=True,
            )
        line = self._watchdog.stdout.readline().strip() if self._watchdog.stdout else ""
        if not line.isdecimal():
            self._watchdog.wait(_KILL_GRACE_S)
            raise self.failure()
        self._pid = int(line)

    def _wait_ready(self, progress: Progress, cancelled: Event) -> None:
        started = time.monotonic()
        with httpx.Client(
            base_url=self.url, headers=_authorization(self.settings.api_key), timeout=5.0, trust_env=False
        ) as client:
            while True:
                waited = time.monotonic() - started
                if self.poll() is not None:
                    raise self.failure()
                if waited > self.settings.ready_timeout_s:
                    reason, tail = failure_reason(self.settings.log_path)
                    raise EngineError(
                        f"the engine did not answer within {self.settings.ready_timeout_s:.0f} s"
                        + (f": {reason}" if reason else ""),
                        f"the log is {self.settings.log_path}",
                        tail,
                    )
                if _answers(client):
                    break
                progress(ProgressEvent("engine", waited, None, "seconds, waiting for vLLM"))
                if cancelled.wait(_POLL_S):
                    raise EngineError("the engine was stopped before it answered")
            self._check_ours(client)
        progress(ProgressEvent("engine", waited, waited, "vLLM answers"))

    def _check_ours(self, client: httpx.Client) -> None:
        """What answers serves our model: another server may have taken the port since it was chosen."""
        try:
            served = [model["id"] for model in client.get("/v1/models").raise_for_status().json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{self.url} answers, but not like vLLM ({error})", "choose another port") from error
        if self.settings.served_model_name not in served:
            raise EngineError(
                f"{self.url} serves {', '.join(served)}: not the engine that was started", "choose another port"
            )

    def _write_record(self) -> None:
        value = {
            "pid": self._pid,
            "process_started": process_start(self._pid),
            "url": self.url,
            "served_model_name": self.settings.served_model_name,
            "max_lora_rank": serving_rank(self.settings.max_lora_rank),
            "lora_target_modules": list(self.settings.lora_target_modules),
            "started_at_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "log_path": str(self.settings.log_path),
        }
        self.write_note({**value, **self.notes})

    def write_note(self, value: Mapping[str, Any]) -> None:
        """Write the record; while there is no engine to tell of, of what its keeper is at. Raises UsageError for a full disk."""
        if self._record is None:
            return
        try:
            write_record(self._record, value)
        except (MemupdateError, OSError):
            if self.needs_record:
                raise

    def remove_record(self) -> None:
        """Remove the record, whatever it says of this engine."""
        if self._record is not None:
            self._record.unlink(missing_ok=True)

    def _recorded_pid(self) -> int:
        """Of the engine that the record tells of: 0 without one."""
        pid = (read_record(self._record) or {}).get("pid", 0) if self._record is not None else 0
        return pid if isinstance(pid, int) else 0


def choose_port(host: str, port: int) -> int:
    """`port` if nothing listens there, or a free one for 0.

    Raises:
        UsageError: the port is in use, or the host is none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} is in use", "choose another --port, or 0 for a free one") from error
        raise UsageError(f"cannot listen on {host} port {port} ({error})", "check --host and --port") from error


def _check_installed() -> None:
    check_vllm_version()
    if not any(point.name == PLUGIN_NAME for point in metadata.entry_points(group=PLUGIN_GROUP)):
        raise EngineError(
            "memupdate is importable but not installed here, so vLLM would not find its plug-in",
            "install memupdate into the environment that runs vLLM",
        )


def _check_model(model: str) -> None:
    """A path that is not there must not be taken for a hub id: vLLM would look for it on the network."""
    looks_like_path = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if looks_like_path and not Path(model).is_dir():
        raise EngineError(f"there is no model folder {model}", "give the folder of the base model, or a hub id")


def _target_modules(names: tuple[str, ...]) -> list[str]:
    """PEFT's names and vLLM's packed ones, without those that must never be wrapped.

    Raises:
        UsageError: none is left.
    """
    wanted = [name for name in names if name not in _NEVER_TARGETS]
    if not wanted:
        raise UsageError("the engine needs at least one module to adapt (lm_head and embed_tokens are not served)")
    return list(dict.fromkeys([*wanted, *(PACKED_MODULES[name] for name in wanted if name in PACKED_MODULES)]))


def _local_or_hub(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _dialled(host: str) -> str:
    """Where to reach a server bound to `host`."""
    if host in ("", "0.0.0.0"):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def _authorization(api_key: str | None) -> dict[str, str]:
    key = api_key or os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
