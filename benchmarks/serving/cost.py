"""What our code inside vLLM costs: the same requests through our middleware and past it, in short turns, on one engine.

One engine, since two of the same kind differ by more than what is looked for (where threads and memory happen to lie). Past the
middleware a request names the release itself, as it would without us; the resolver is not in it: vLLM asks it once per release. A round
is four blocks of the same requests, through, past, past, through (or the other way about), so that a machine that is slower for a while is
no difference; first closed-loop, which gives throughput and processor time, then at the same moments, which gives latencies. A ratio
is taken in each round, over its two blocks of each kind, and the median over the rounds is what is reported. Latencies of all rounds are
put together first, since a p99 wants many. Each ratio has the interval that holds 95 % of what the rounds, drawn again with
replacement, would have given: it says whether the figure can tell 2 % at all. Processor time is that of all the engine's
processes; wall time is at the mercy of whatever else the machine does, processor time less. vLLM's core is bound to its worker's
processor, see `stage`.

Parts of their own are what the middleware takes by itself (`alone`), set against what the engine takes here for a request past it, and how
long it takes, on the quiet engine, from a release that is proved in process to the first answer of the alias from it (`served`).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.serving.load import ALIAS, Question, ask_all, ask_at
from benchmarks.serving.stage import (
    NEW,
    OLD,
    engine_processor_s,
    make_cold,
    our_engine,
    processor_s,
    say,
    toggled_engine,
)
from benchmarks.serving.toggle import PAST_HEADER

from memupdate import Workspace
from memupdate.progress import ProgressEvent
from memupdate.serving.engine import Engine

AT_ONCE = 32
"""Enough to keep the engine busy."""
LATENCY_SHARE = 0.4
"""Of the throughput: well below what the engine can do, where a p99 is not only the length of a queue."""
SEED = 20_261
DRAWS = 1000
INTERVAL = (0.025, 0.975)
OURS, PAST = "ours", "past"
WAYS: dict[str, dict[str, Any]] = {OURS: {"model": ALIAS}, PAST: {"model": OLD, "headers": {PAST_HEADER: "1"}}}
"""How a request is made."""

Block = dict[str, float]
Round = dict[str, list[Any]]


def measure(workspace: Workspace, asked: list[Question], *, rounds: int, requests: int) -> dict[str, Any]:
    """Ratios over `rounds` rounds of four times `requests` requests each."""
    work = (asked * (requests // len(asked) + 1))[:requests]
    with toggled_engine(workspace) as engine:
        workspace.publish(OLD, served=[engine.url])
        for which in (OURS, PAST):
            ask_all(engine.url, asked, at_once=AT_ONCE, **WAYS[which])
        rate = LATENCY_SHARE * len(asked) / ask_all(engine.url, asked, at_once=AT_ONCE, **WAYS[PAST])[1]
        dice, busy, timed = random.Random(SEED), list[Round](), list[Round]()
        for number in range(rounds):
            order = [OURS, PAST, PAST, OURS] if number % 2 == 0 else [PAST, OURS, OURS, PAST]
            chosen = dice.sample(work, len(work))
            busy.append(one_round(order, lambda which, chosen=chosen: throughput(engine, which, chosen)))
            timed.append(one_round(order, lambda which, c=chosen, n=number: latencies(engine, which, c, rate, n)))
            if number % 10 == 9:
                say(f"round {number + 1}: {ratios(busy, timed)}")
    return {
        **ratios(busy, timed),
        **{
            f"{name}_ms_{which}": 1000 * statistics.mean(block[f"{name}_s"] for r in busy for block in r[which])
            for name in ("engine", "api_server")
            for which in (OURS, PAST)
        },
        "latency_requests_per_s": rate,
        "requests_per_block": len(work),
        "rounds": busy,
    }


def one_round(order: Sequence[str], block: Callable[[str], Any]) -> Round:
    """Both blocks of each kind."""
    found: Round = {OURS: [], PAST: []}
    for name in order:
        found[name].append(block(name))
    return found


def throughput(engine: Engine, which: str, work: list[Question]) -> Block:
    """Seconds per request: of the clock, of all the engine's processors, and of the API server, in which our code runs."""
    before = engine_processor_s(engine.pid), processor_s(engine.pid)
    answers, seconds = ask_all(engine.url, work, at_once=AT_ONCE, **WAYS[which])
    after = engine_processor_s(engine.pid), processor_s(engine.pid)
    refuse_failures(answers)
    share = 1 / len(work)
    return {
        "wall_s": seconds * share,
        "engine_s": (after[0] - before[0]) * share,
        "api_server_s": (after[1] - before[1]) * share,
    }


def latencies(engine: Engine, which: str, work: list[Question], rate: float, number: int) -> list[float]:
    answers = ask_at(engine.url, work, rate, SEED + number, **WAYS[which])
    refuse_failures(answers)
    return [answer.latency_s for answer in answers]


def ratios(busy: Sequence[Round], timed: Sequence[Round]) -> dict[str, float]:
    """Through our middleware ÷ past it, each as `…_ratio` with `…_ratio_low` and `…_ratio_high`; of throughput, upside down."""
    found = {
        "throughput": with_interval(busy, of_blocks("wall_s", PAST, OURS)),
        "cpu_per_request": with_interval(busy, of_blocks("engine_s", OURS, PAST)),
        "api_server": with_interval(busy, of_blocks("api_server_s", OURS, PAST)),
        "p50": with_interval(timed, of_latencies(0.5)),
        "p99": with_interval(timed, of_latencies(0.99)),
    }
    return {f"{name}_ratio{end}": value for name, ends in found.items() for end, value in ends.items()}


def of_blocks(key: str, above: str, below: str) -> Callable[[Sequence[Round]], float]:
    """The median over rounds of the sum of one kind's blocks ÷ that of the other's."""

    def figure(rounds: Sequence[Round]) -> float:
        return statistics.median(
            sum(block[key] for block in one[above]) / sum(block[key] for block in one[below]) for one in rounds
        )

    return figure


def of_latencies(share: float) -> Callable[[Sequence[Round]], float]:
    """A percentile of all latencies through ÷ that of those past it."""

    def figure(rounds: Sequence[Round]) -> float:
        ours, past = ([s for one in rounds for block in one[which] for s in block] for which in (OURS, PAST))
        return percentile(ours, share) / percentile(past, share)

    return figure


def with_interval(rounds: Sequence[Round], figure: Callable[[Sequence[Round]], float]) -> dict[str, float]:
    """The figure of all rounds, and between what it lies for rounds drawn from them again and again."""
    dice = random.Random(SEED)
    drawn = sorted(figure(dice.choices(rounds, k=len(rounds))) for _ in range(DRAWS))
    low, high = (drawn[int(share * (DRAWS - 1))] for share in INTERVAL)
    return {"": figure(rounds), "_low": low, "_high": high}


def served(workspace: Workspace, repeats: int) -> dict[str, Any]:
    """`repeats` cold publications."""
    with our_engine(workspace) as ours:
        workspace.publish(NEW)
        workspace.publish(OLD)
        return verified_to_served(workspace, ours.url, repeats)


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
    """A failed request would make its way look fast."""
    for answer in answers:
        if answer.failed:
            raise RuntimeError(f"{answer.url}: {answer.status} {answer.error}")


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
