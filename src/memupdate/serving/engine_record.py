"""The notes by which other commands find the engines of a workspace: `engine.json`, and `engine-2.json` … for replicas.

Invariant: a note counts only while the very process that it names lives and, for a running engine, answers. Notes are
written by whoever keeps the engine (`Engine`, `Supervisor`); this module knows how they are written and read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from memupdate.storage import write_text_atomic

SCHEMA_VERSION = 1
_NUMBERED = re.compile(r"-([1-9][0-9]{0,3})$")


@dataclass(frozen=True)
class RunningEngine:
    """An engine that another process started, alive and answering."""

    pid: int
    url: str
    served_model_name: str
    max_lora_rank: int
    started_at_utc: str
    log_path: str
    restarts: int = 0
    """How often `serve` had to start it again."""
    last_failure: str = ""
    """Why it was last started again."""
    limits: tuple[str, ...] = ()
    """How its LoRA slots were chosen, one line each."""
    target_modules: tuple[str, ...] = ()
    """Last parts of the names of the matrices that have slots; empty in notes of earlier versions."""


@dataclass(frozen=True)
class EngineNote:
    """What one note says, whether or not it still counts."""

    path: Path
    number: int
    """1 for `engine.json`, n for `engine-n.json`."""
    pid: int
    """Of the engine; 0 while there is none."""
    is_engine_alive: bool
    supervisor_pid: int
    """Of the `serve` that keeps the engine; 0 where nobody does."""
    is_supervisor_alive: bool
    state: str
    """`running`, `starting` or `restarting`."""
    last_failure: str = ""


def record_of(path: Path, number: int) -> Path:
    """Where the note of replica `number` is, beside that of the first at `path`."""
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def record_paths(path: Path) -> list[Path]:
    """The notes that are there: `path` and its numbered sisters, in order."""
    found = [(_number(path, file), file) for file in path.parent.glob(f"{path.stem}*{path.suffix}")]
    return [file for number, file in sorted((n, f) for n, f in found if n)]


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Replace the note at `path`."""
    write_text_atomic(path, json.dumps({"schema_version": SCHEMA_VERSION, **value}, indent=2) + "\n")


def read_record(path: Path) -> dict[str, Any] | None:
    """What the note at `path` says; None where it is missing or torn."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def running_engine(path: Path, *, timeout_s: float = 5.0) -> RunningEngine | None:
    """The engine that the note at `path` tells of, if that very process lives and answers `/health`; else None."""
    value = read_record(path)
    if value is None:
        return None
    try:
        engine = RunningEngine(
            pid=int(value["pid"]),
            url=str(value["url"]),
            served_model_name=str(value["served_model_name"]),
            max_lora_rank=int(value["max_lora_rank"]),
            started_at_utc=str(value["started_at_utc"]),
            log_path=str(value["log_path"]),
            restarts=int(value.get("restarts", 0)),
            last_failure=str(value.get("last_failure", "")),
            limits=tuple(str(line) for line in value.get("limits", ())),
            target_modules=tuple(str(name) for name in value.get("lora_target_modules", ())),
        )
    except (KeyError, TypeError, ValueError):
        return None
    started = process_start(engine.pid)
    if started is None or started != value.get("process_started"):
        return None
    return engine if answers(engine.url, timeout_s=timeout_s) else None


def running_engines(path: Path, *, timeout_s: float = 5.0) -> list[RunningEngine]:
    """All replicas that run and answer now, the first (`engine.json` at `path`) first where it does."""
    paths = record_paths(path)
    if not paths:
        return []
    with ThreadPoolExecutor(max_workers=min(8, len(paths))) as pool:
        found = list(pool.map(lambda file: running_engine(file, timeout_s=timeout_s), paths))
    return [engine for engine in found if engine is not None]


def engine_notes(path: Path) -> list[EngineNote]:
    """What every note says, and which of its processes live. Asks no engine anything."""
    notes = []
    for file in record_paths(path):
        value = read_record(file) or {}
        pid, keeper = _pid(value, "pid"), _pid(value, "supervisor_pid")
        notes.append(
            EngineNote(
                path=file,
                number=_number(path, file),
                pid=pid,
                is_engine_alive=_is_same(pid, value.get("process_started")),
                supervisor_pid=keeper,
                is_supervisor_alive=_is_same(keeper, value.get("supervisor_started")),
                state=str(value.get("state", "running")),
                last_failure=str(value.get("last_failure", "")),
            )
        )
    return notes


def answers(url: str, *, timeout_s: float = 5.0) -> bool:
    """Whether `/health` there says that the engine can serve."""
    try:
        return httpx.get(f"{url}/health", timeout=timeout_s, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def process_start(pid: int) -> str | None:
    """A mark that tells this process from a later one of the same id; None where there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _alive_without_proc(pid)
    return None if fields[0] == "Z" else fields[19]


def _alive_without_proc(pid: int) -> str | None:
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return "unknown"


def _is_same(pid: int, started: object) -> bool:
    return pid > 0 and started is not None and process_start(pid) == started


def _number(path: Path, file: Path) -> int:
    """1 for `path` itself, n for its sister `…-n`, 0 for any other file."""
    if file == path:
        return 1
    found = _NUMBERED.search(file.stem)
    return int(found[1]) if found and file == record_of(path, int(found[1])) and int(found[1]) > 1 else 0


def _pid(value: Mapping[str, Any], key: str) -> int:
    found = value.get(key)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0
