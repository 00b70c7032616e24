"""What our code inside vLLM costs: an engine with middleware and resolver against a plain one, in turn, on the same requests.

Both engines are up all the time, with the same model, slots and limits; one is asked while the other waits. A pair is: the same requests
closed-loop (throughput, and the processor time of the API server, the process in which our code runs; the others spin while they wait, so
that theirs says little), then the same requests at the same moments (latency), of each engine; which one goes first alternates, so that a
machine that grows slower is no difference. Throughputs are compared pair by pair, and the median is taken; processor times and latencies of
all pairs are put together, since a p99 wants many. Then, on the quiet engine: how long from a release that is proved in process to the
first answer of the alias from it.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.serving.load import Question, ask_all, ask_at
from benchmarks.serving.stage import NEW, OLD, make_cold, our_engine, plain_engine, processor_s, say

from memupdate import Workspace
from memupdate.progress import ProgressEvent
from memupdate.serving.engine import Engine

AT_ONCE = 8
LATENCY_SHARE = 0.4
"""Of the throughput: well below what the engine can do, where a p99 is not only the length of a queue."""
SEED = 20_261


def measure(workspace: Workspace, asked: list[Question], *, pairs: int, requests: int, repeats: int) -> dict[str, Any]:
    """Ratios over `pairs` pairs of `requests` requests each, and `repeats` cold publications."""
    work = (asked * (requests // len(asked) + 1))[:requests]
    with our_engine(workspace) as ours:
        workspace.publish(NEW)
        workspace.publish(OLD)
        served = verified_to_served(workspace, ours.url, repeats)
        with plain_engine(workspace, ours.settings) as plain:
            engines = {"ours": ours, "plain": plain}
            for engine in engines.values():
                ask_all(engine.url, work, at_once=AT_ONCE)
            rate = LATENCY_SHARE * len(work) / ask_all(plain.url, work, at_once=AT_ONCE)[1]
            found = []
            for number in range(pairs):
                order = list(engines) if number % 2 == 0 else list(engines)[::-1]
                found.append(pair(engines, order, work, rate, SEED + number))
                say(f"pair {number + 1}: throughput {found[-1]['throughput_ratio']:.3f}")
    latencies = {name: [seconds for p in found for seconds in p[name].pop("latencies_s")] for name in engines}
    return {
        "throughput_ratio": statistics.median(p["throughput_ratio"] for p in found),
        **{
            f"api_server_ms_{name}": statistics.mean(p[name]["api_server_ms_per_request"] for p in found)
            for name in engines
        },
        "p50_ratio": percentile(latencies["ours"], 0.5) / percentile(latencies["plain"], 0.5),
        "p99_ratio": percentile(latencies["ours"], 0.99) / percentile(latencies["plain"], 0.99),
        "latency_requests_per_s": rate,
        "requests_per_window": len(work),
        "pairs": found,
        **served,
    }


def pair(engines: dict[str, Engine], order: list[str], work: list[Question], rate: float, seed: int) -> dict[str, Any]:
    """Throughput and the API server's processor time of each, then latencies of each."""
    found: dict[str, dict[str, Any]] = {name: {} for name in engines}
    for name in order:
        before = processor_s(engines[name].pid)
        answers, seconds = ask_all(engines[name].url, work, at_once=AT_ONCE)
        refuse_failures(answers)
        used = processor_s(engines[name].pid) - before
        found[name] = {"requests_per_s": len(work) / seconds, "api_server_ms_per_request": 1000 * used / len(work)}
    for name in order:
        answers = ask_at(engines[name].url, work, rate, seed)
        refuse_failures(answers)
        found[name]["latencies_s"] = [answer.latency_s for answer in answers]
    ours, plain = found["ours"], found["plain"]
    return {
        "throughput_ratio": ours["requests_per_s"] / plain["requests_per_s"],
        "first": order[0],
        **found,
    }


def verified_to_served(workspace: Workspace, url: str, repeats: int) -> dict[str, Any]:
    """Seconds of `publish` of a release that the engine has never seen: manifest, proof on the engine, prewarming, flip, confirmation."""
    runs = []
    for _ in range(repeats):
        if workspace.status().aliases["acme"] == NEW:
            workspace.rollback()
        make_cold(workspace, url, NEW)
        moments: dict[str, float] = {}

        def note(event: ProgressEvent, moments: dict[str, float] = moments) -> None:
            if event.stage == "warm" or event.done:  # the proof's end, and the first replica about to be warmed
                moments[event.stage] = time.monotonic()

        begun = time.monotonic()
        workspace.publish(NEW, progress=note)
        ended = time.monotonic()
        begun_back = time.monotonic()
        workspace.rollback()
        back_s = time.monotonic() - begun_back
        runs.append({"whole_s": ended - begun, "flip_s": ended - moments["warm"], "rollback_s": back_s})
    say(f"verified to served: {[round(run['whole_s'], 2) for run in runs]} s")
    return {
        "verified_to_served_s": statistics.median(run["whole_s"] for run in runs),
        "proved_to_served_s": statistics.median(run["flip_s"] for run in runs),
        "rollback_s": statistics.median(run["rollback_s"] for run in runs),
        "served_runs": runs,
    }


def refuse_failures(answers: list[Any]) -> None:
    """A failed request would make its engine look fast."""
    for answer in answers:
        if answer.failed:
            raise RuntimeError(f"{answer.url}: {answer.status} {answer.error}")


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
