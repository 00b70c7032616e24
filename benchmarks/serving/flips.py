"""A hundred flips, forward by `publish` and back by `rollback`, under a steady load: on one engine, and on two of which one is killed.

Invariant: a flip is the whole operation as an operator orders it, with its proof on the engine, prewarming and confirmation.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.serving.load import Answer, Question, SteadyLoad, ask_all
from benchmarks.serving.stage import NEW, OLD, fill_cache, meet_lengths, memory_mb, our_engine, say, telling
from benchmarks.serving.verdict import Flip, References, allowed, judge, take_references

from memupdate import Workspace
from memupdate.errors import EngineError, WorkspaceLocked
from memupdate.serving.engine_record import RunningEngine, running_engines

LOAD_SHARE = 0.3
"""Of what the engine can answer: flips prove and warm beside it, and on two cores all of it shares them."""
REPLICAS_LOAD_SHARE = 0.1
"""Two engines on the same cores answer less than one does, and one of them has to start again meanwhile."""
_PAUSE_S = 0.3
_PEAK, _PEAK_ROUNDS = 64, 8
"""Requests at once, more than the load has in flight at any time, flips and proofs included: heaps keep what their fullest moment took."""
_WITHOUT_S = 2.0
"""Of load without a flip before the flips, for each of them."""
_READINGS = 10
_IDLE_S = 4.0
"""vLLM 0.32 keeps 40 bytes in core and worker for each step it makes (commands of a zmq socket), until it has been idle for a second."""
_STARTED_S = 420.0
MEMORY_EVERY = 10


def one_engine(workspace: Workspace, asked: list[Question], flips: int) -> dict[str, Any]:
    """`flips` flips on one engine."""
    with our_engine(workspace) as engine:
        references, asked = _ready(workspace, engine.url, asked)
        rate = _rate(engine.url, asked, LOAD_SHARE)
        fill_cache(engine)
        meet_lengths(engine)
        ask_all(engine.url, asked * _PEAK_ROUNDS, at_once=_PEAK)
        done, memory = [_flip(workspace, OLD)], dict[int, float]()
        with SteadyLoad([engine.url], asked, rate) as load:
            without = _without_flips(engine.pid, load, _WITHOUT_S * flips)
            for number in range(1, flips + 1):
                done.append(_flip(workspace, NEW if number % 2 else OLD))
                time.sleep(_PAUSE_S)
                if number % MEMORY_EVERY == 0:
                    memory[number] = _idle_memory(engine.pid, load)
                    say(f"{number} flips, {len(load.answers)} answers, {memory[number]:.0f} MB")
            time.sleep(3)
    found = judge(load.answers, done, references)
    return {
        "flips": len(done) - 1,
        "requests_per_s": rate,
        "questions": len(asked),
        "publish_under_load_s": _median_s(done[1:], NEW),
        "rollback_under_load_s": _median_s(done[1:], OLD),
        "latency_under_load": _percentiles(load.answers),
        "memory_mb": memory,
        "memory_without_flips_mb": without,
        **found,
        "wrong": _examples(load.answers, done, references),
    }


def _without_flips(pid: int, load: SteadyLoad, seconds: float) -> dict[int, float]:
    """Answers so far → memory, MB, under the load alone."""
    memory = {}
    for _ in range(_READINGS):
        time.sleep(seconds / _READINGS)
        memory[len(load.answers)] = _idle_memory(pid, load)
    say("without a flip: " + ", ".join(f"{answers} answers {mb:.1f} MB" for answers, mb in memory.items()))
    return memory


def two_replicas(workspace: Workspace, asked: list[Question], flips: int) -> dict[str, Any]:
    """The same on two engines of `serve --replicas 2`, one of which is killed with -9 half-way."""
    record = workspace.layout.engine
    with _serve(workspace) as urls:
        references, asked = _ready(workspace, urls[0], asked)
        rate = _rate(urls[0], asked, REPLICAS_LOAD_SHARE)
        done, lost = [_flip(workspace, OLD)], 0
        killed = recovered = 0.0
        victim: RunningEngine | None = None
        with SteadyLoad(urls, asked, rate) as load:
            time.sleep(5)
            while len(done) <= flips or not recovered or time.monotonic() < recovered + 20:
                if victim is None and len(done) > flips // 2:
                    victim = running_engines(record)[0]
                    killed = time.monotonic()
                    os.kill(victim.pid, signal.SIGKILL)
                    say(f"killed {victim.url} after {len(done) - 1} flips")
                lost += not _try_flip(workspace, done)
                if victim is not None and not recovered and _is_back(workspace, victim):
                    recovered = time.monotonic()
                    say(f"{victim.url} is back after {recovered - killed:.0f} s and {len(done) - 1} flips")
                time.sleep(_PAUSE_S)
            time.sleep(3)
    assert victim is not None
    after = [answer for answer in load.answers if answer.begun_s >= recovered]
    by_replica = {url: sum(answer.url == url for answer in after) for url in urls}
    whole, late = judge(load.answers, done, references), judge(after, done, references)
    return {
        "flips": len(done) - 1 - 2 * lost,
        "flips_put_back": lost,
        "requests_per_s": rate,
        "away_s": recovered - killed,
        "refused_connections_skipped": load.skipped,
        "answers_after_recovery_by_replica": [by_replica[url] for url in urls],
        "failed_before_kill": sum(answer.failed and answer.ended_s < killed for answer in load.answers),
        **whole,
        "after_recovery": late,
        "wrong": _examples(load.answers, done, references),
    }


@contextmanager
def _serve(workspace: Workspace) -> Iterator[list[str]]:
    """`memupdate serve --replicas 2` as a process of its own; yields the URLs."""
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        port = first.getsockname()[1]
    port = port if port < 65000 else 42000
    command = [sys.executable, "-m", "memupdate", "-w", str(workspace.root), "serve"]
    process = subprocess.Popen([*command, "--replicas", "2", "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _STARTED_S
        while len(found := running_engines(workspace.layout.engine)) < 2:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"serve did not start two engines; see {workspace.layout.logs}")
            time.sleep(1)
        yield [engine.url for engine in found]
    finally:
        process.terminate()
        process.wait(120)


def _ready(workspace: Workspace, url: str, asked: list[Question]) -> tuple[References, list[Question]]:
    """Both releases published once; what each answers alone, and the questions that tell them apart."""
    for release in (NEW, OLD):
        _flip_to(workspace, release)
    references = take_references(url, asked, (OLD, NEW))
    kept = telling(asked, references)
    say(f"{len(kept)} of {len(asked)} requests are answered differently by the two releases, and are asked")
    return references, kept


def _flip_to(workspace: Workspace, release: str) -> None:
    """Publish; `serve` may still hold the workspace."""
    deadline = time.monotonic() + 60
    while True:
        try:
            workspace.publish(release)
            return
        except WorkspaceLocked:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _flip(workspace: Workspace, release: str) -> Flip:
    """Forward by `publish`, back by `rollback` where the alias is at the newer one."""
    begun = time.monotonic()
    if release == OLD and workspace.status().aliases.get("acme") == NEW:
        begun = time.monotonic()
        workspace.rollback()
    else:
        workspace.publish(release)
    return Flip(release, begun, time.monotonic())


def _try_flip(workspace: Workspace, done: list[Flip]) -> bool:
    """The next flip, noted in `done`; False where a replica went away in its middle, and the alias is where it was."""
    before = done[-1].release
    wanted, begun = OLD if before == NEW else NEW, time.monotonic()
    try:
        done.append(_flip(workspace, wanted))
        return True
    except EngineError as error:
        say(f"{wanted}: {error.message}")
    # A rollback stands even then; a publication is put back, and was in force for a moment.
    now = workspace.status().aliases["acme"]
    done += [Flip(release, begun, time.monotonic()) for release in dict.fromkeys((wanted, now))]
    return now == wanted


def _rate(url: str, asked: list[Question], share: float) -> float:
    """Requests per second that are `share` of what the engine answers at most."""
    ask_all(url, asked[:32], at_once=8)
    _, seconds = ask_all(url, asked[:64], at_once=8)
    rate = round(share * len(asked[:64]) / seconds, 1)
    say(f"the engine answers {len(asked[:64]) / seconds:.1f} requests/s at most; asked are {rate} requests/s")
    return rate


def _is_back(workspace: Workspace, victim: RunningEngine) -> bool:
    return any(e.url == victim.url and e.pid != victim.pid for e in running_engines(workspace.layout.engine))


def _idle_memory(pid: int, load: SteadyLoad) -> float:
    """Memory of the engine while nothing is asked of it, MB."""
    with load.paused():
        time.sleep(_IDLE_S)
        return round(memory_mb(pid), 2)


def _median_s(flips: list[Flip], release: str) -> float:
    return round(statistics.median(flip.ended_s - flip.begun_s for flip in flips if flip.release == release), 3)


def _percentiles(answers: list[Answer]) -> dict[str, float]:
    times = sorted(answer.latency_s for answer in answers if not answer.failed)
    return {name: round(times[int(share * (len(times) - 1))], 3) for name, share in (("p50_s", 0.5), ("p99_s", 0.99))}


def _examples(answers: list[Answer], flips: list[Flip], references: References) -> list[dict[str, Any]]:
    """The first few answers that are not as they should be, for whoever looks into it; failed ones in short."""
    found = []
    for answer in answers:
        counts = judge([answer], flips, references)
        if (
            any(counts[key] for key in ("failed_requests", "mixed_responses", "answered_by_old_release"))
            and len(found) < 12
        ):
            named = references.texts.get((answer.models[0] if answer.models else "", answer.question.key))
            found.append(
                {"key": answer.question.key, "stream": answer.question.stream, "models": answer.models, "text": answer.text,
                 "alone": named, "status": answer.status, "error": answer.error, "allowed": sorted(allowed(answer, flips))}
            )  # fmt: skip
    return found
