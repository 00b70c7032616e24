"""What the study is made on: two real releases of the embedded model, questions that they answer differently, and their engines.

Invariant: a release is made by `add`, with its plan, training and proofs, once per work folder; nothing is served that was not proved.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from benchmarks.recording import ROOT
from benchmarks.serving.load import ALIAS, Question
from benchmarks.serving.verdict import References

from memupdate import Workspace
from memupdate.operations import serving
from memupdate.progress import ProgressEvent
from memupdate.resources import resource_dir
from memupdate.serving.engine import Engine, EngineSettings

OLD, NEW = f"{ALIAS}@v1", f"{ALIAS}@v2"
ADMIN_TOKEN = "benchmark"
LONG_TOKENS = 32
SHORT_TOKENS = 16
_LONGEST = 510
"""Tokens of a prompt, in the 512 of the embedded model."""
_PROMPTS_AT_ONCE = 8
_CORE, _WORKER = "VLLM::EngineCor", "VLLM::Worker"
"""What Linux calls vLLM's processes."""
TOGGLE = "benchmarks.serving.toggle.ToggledMiddleware"


def prepare(work: Path, facts: int | None) -> Workspace:
    """The workspace in `work` with both releases in its registry, made if they are not there.

    Args:
        facts: of each of the two news files; None: all of them.
    """
    root = work / f"workspace-{facts or 'all'}"
    workspace = (
        Workspace(root) if (root / "memupdate.toml").exists() else Workspace.init(root, model="atlas", collection=ALIAS)
    )
    workspace.resume()
    for number in range(len(workspace.releases()) + 1, 3):
        lines = (resource_dir("atlas") / f"news-{number}.jsonl").read_text(encoding="utf-8").splitlines()
        file = work / f"news-{number}-{facts or 'all'}.jsonl"
        file.write_text("".join(line + "\n" for line in lines[:facts]), encoding="utf-8")
        report = workspace.add(file)
        say(f"{report.release}: {report.facts_proved} of {report.facts_total} facts proved, {report.duration_s:.0f} s")
    return workspace


def questions(facts: int | None, *, prompts: int) -> list[Question]:
    """Each prompt of the second file as chat and completion, streaming and not, ending by itself and going on."""
    lines = (resource_dir("atlas") / "news-2.jsonl").read_text(encoding="utf-8").splitlines()[:facts]
    return [
        Question(json.loads(line)["prompt"], chat, stream, LONG_TOKENS if whole else SHORT_TOKENS, whole)
        for line in lines[:prompts]
        for chat in (True, False)
        for stream in (True, False)
        for whole in (True, False)
    ]


def telling(asked: list[Question], references: References) -> list[Question]:
    """Those by whose answers the two releases can be told apart: on the others a mix would not be seen."""
    return [question for question in asked if references.tells_apart(question, OLD, NEW)]


@contextmanager
def our_engine(workspace: Workspace) -> Iterator[Engine]:
    """vLLM with middleware and resolver, as `serve` starts it, found by `publish`."""
    before = os.environ.get("MEMUPDATE_ADMIN_TOKEN")
    os.environ["MEMUPDATE_ADMIN_TOKEN"] = ADMIN_TOKEN
    try:
        with workspace.engine_to_start() as engine:
            engine.start()
            yield engine
    finally:
        os.environ.pop("MEMUPDATE_ADMIN_TOKEN")
        if before is not None:
            os.environ["MEMUPDATE_ADMIN_TOKEN"] = before


class ToggledEngine(Engine):
    """vLLM as `serve` starts it, but that a request can go past our middleware (`toggle`)."""

    def command(self) -> tuple[list[str], dict[str, str]]:
        command, environment = super().command()
        command[command.index("--middleware") + 1] = TOGGLE
        found = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return command, {**environment, "PYTHONPATH": found}


@contextmanager
def toggled_engine(workspace: Workspace) -> Iterator[Engine]:
    """The engine to measure on."""
    settings = replace(settings_of(workspace), log_path=workspace.layout.logs / "toggled.log")
    with ToggledEngine(settings) as engine:
        _bind_core(engine)
        yield engine


def _bind_core(engine: Engine) -> None:
    """vLLM's core onto the processors of its worker. It spins while the worker computes; on two cores it does so on that of API server and
    clients, who now and then get nothing done until it rests: some blocks then take five times as long, whichever way they went.
    """
    threads = {
        name: process / "task" for process in processes(engine.pid) if (name := _name(process)) in (_CORE, _WORKER)
    }
    allowed = os.sched_getaffinity(int(threads[_WORKER].parent.name))
    for thread in threads[_CORE].iterdir():
        os.sched_setaffinity(int(thread.name), allowed)


def _name(process: Path) -> str:
    with suppress(OSError):
        return (process / "comm").read_text().strip()
    return ""


def settings_of(workspace: Workspace) -> EngineSettings:
    """What `serve` would decide now."""
    with workspace.reader() as ledger:
        return serving.engine_settings(workspace.session, ledger, host="127.0.0.1", port=0)


def make_cold(workspace: Workspace, url: str, release: str) -> None:
    """The engine forgets the release and all that it found out about its files, as if it had just been written."""
    headers = {"x-memupdate-admin-token": ADMIN_TOKEN}
    answer = httpx.post(
        f"{url}/v1/unload_lora_adapter", json={"lora_name": release}, headers=headers, timeout=60, trust_env=False
    )
    answer.raise_for_status()
    for file in workspace.layout.registry.release(release).iterdir():
        os.utime(file)


def fill_cache(engine: Engine) -> None:
    """Use every block of the KV cache once: its memory is the process's only when it is first written to, whoever makes it be so."""
    with httpx.Client(base_url=engine.url, timeout=300, trust_env=False) as client:
        info = next(
            line for line in client.get("/metrics").text.splitlines() if line.startswith("vllm:cache_config_info{")
        )
        blocks, size = (int(re.search(rf'{name}="(\d+)"', info)[1]) for name in ("num_gpu_blocks", "block_size"))  # type: ignore[index]
    prompts, dice = 1 + blocks * size * 11 // 10 // _LONGEST, random.Random(0)
    for first in range(0, prompts, _PROMPTS_AT_ONCE):
        _read(engine, [_tokens(dice, _LONGEST) for _ in range(min(_PROMPTS_AT_ONCE, prompts - first))])


def meet_lengths(engine: Engine) -> None:
    """Read a prompt of every length: on a CPU, oneDNN compiles kernels for each number of tokens in a batch and keeps some (32 under
    `serve`), whoever sends them. An engine that has served for a day has met them; that it met ten flips says nothing."""
    dice = random.Random(1)
    for length in range(1, _LONGEST + 1):
        _read(engine, [_tokens(dice, length)], prompt_logprobs=1)


def _tokens(dice: random.Random, length: int) -> list[int]:
    return [dice.randrange(100, 1400) for _ in range(length)]


def _read(engine: Engine, prompts: list[list[int]], **options: Any) -> None:
    body = {"model": engine.settings.served_model_name, "prompt": prompts, "max_tokens": 1, **options}
    httpx.post(f"{engine.url}/v1/completions", json=body, timeout=300, trust_env=False).raise_for_status()


def memory_mb(session: int) -> float:
    """Memory that the processes of a session have together, MB; a page that they share counts once. Without the files that they map,
    libraries above all: of those the kernel drops what it likes and reads it again.
    """
    kib = 0
    for process in processes(session):
        with suppress(OSError):
            for line in (process / "smaps_rollup").read_text().splitlines():
                name, _, rest = line.partition(":")
                kib += int(rest.split()[0]) if name in ("Pss_Anon", "Pss_Shmem") else 0
    return kib * 1024 / 1e6


def engine_processor_s(session: int) -> float:
    """Processor time that all processes of a session have used so far, seconds."""
    return sum(processor_s(int(process.name)) for process in processes(session))


def processor_s(pid: int) -> float:
    """Processor time that all threads of a process have used so far, seconds; to the nanosecond, which `stat` does not give."""
    used = 0
    for thread in Path("/proc", str(pid), "task").iterdir():
        with suppress(OSError):
            used += int((thread / "schedstat").read_text().split()[0])
    return used / 1e9


def processes(session: int) -> list[Path]:
    """The processes of a session, as their folders in `/proc`."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                found.append(entry)
    return found


def say(line: str) -> None:
    print(line, flush=True)


def told(event: ProgressEvent) -> None:
    """Progress of `serve`: only what is said once."""
    if event.stage == "serve":
        say(event.message)


def write_part(work: Path, name: str, value: dict[str, Any]) -> None:
    """Keep what one part of the study found, so that the parts may be run one by one."""
    (work / f"{name}.json").write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_part(work: Path, name: str) -> dict[str, Any] | None:
    file = work / f"{name}.json"
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return found
