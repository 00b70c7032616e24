"""What our code inside vLLM costs: an engine with middleware and resolver against a plain one, on the same requests, in short turns.

Both engines are up all the time, with the same model, slots and limits; one is asked while the other waits. A round is four blocks of the
same requests, ours, plain, plain, ours (or the other way about), so that a machine that grows slower, or is slower for a while, is no
difference; first closed-loop, which gives throughput and processor time, then at the same moments, which gives latencies. A ratio is taken
in each round, over its two blocks of each engine, and the median over the rounds is what is reported. Latencies of all rounds are put
together first, since a p99 wants many. Each ratio has the interval that holds 95 % of what the rounds, drawn again with replacement,
would have given: it says whether the figure can tell 2 % at all. Processor time is that of all the engine's processes; wall time is at the
mercy of whatever else the machine does, processor time much less.

Parts of their own are what the middleware takes by itself (`alone`), set against what the plain engine takes here for a request, which
can be told where the ratios of two engines cannot; and (`served`) how long it takes, on the quiet engine, from a release that is proved in
process to the first answer of the alias from it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.serving.load import Question, ask_all, ask_at
from benchmarks.serving.stage import NEW, OLD, engine_processor_s, make_cold, our_engine, plain_engine, processor_s, say

from memupdate import Workspace
from memupdate.progress import ProgressEvent
from memupdate.serving.engine import Engine

AT_ONCE = 8
LATENCY_SHARE = 0.4
"""Of the throughput: well below what the engine can do, where a p99 is not only the length of a queue."""
SEED = 20_261
DRAWS = 1000
INTERVAL = (0.025, 0.975)
OURS, PLAIN = "ours", "plain"

Block = dict[str, float]
Round = dict[str, list[Any]]


def measure(workspace: Workspace, asked: list[Question], *, rounds: int, requests: int) -> dict[str, Any]:
    """Ratios over `rounds` rounds of four times `requests` requests each."""
    work = (asked * (requests // len(asked) + 1))[:requests]
    with our_engine(workspace) as ours:
        workspace.publish(NEW)
        workspace.publish(OLD)
        with plain_engine(workspace, ours.settings) as plain:
            engines = {OURS: ours, PLAIN: plain}
            for engine in engines.values():
                ask_all(engine.url, asked, at_once=AT_ONCE)
            rate = LATENCY_SHARE * len(asked) / ask_all(plain.url, asked, at_once=AT_ONCE)[1]
            dice, busy, timed = random.Random(SEED), list[Round](), list[Round]()
            for number in range(rounds):
                order = [OURS, PLAIN, PLAIN, OURS] if number % 2 == 0 else [PLAIN, OURS, OURS, PLAIN]
                chosen = dice.sample(work, len(work))
                busy.append(one_round(order, lambda name, chosen=chosen: throughput(engines[name], chosen)))
                timed.append(
                    one_round(order, lambda name, chosen=chosen, n=number: latencies(engines[name], chosen, rate, n))
                )
                if number % 10 == 9:
                    say(f"round {number + 1}: cpu_per_request_ratio {ratios(busy, timed)['cpu_per_request_ratio']:.4f}")
    return {
        **ratios(busy, timed),
        **{
            f"{name}_ms_{which}": 1000 * statistics.mean(block[f"{name}_s"] for r in busy for block in r[which])
            for name in ("engine", "api_server")
            for which in engines
        },
        "latency_requests_per_s": rate,
        "requests_per_block": len(work),
        "rounds": busy,
    }


def one_round(order: Sequence[str], block: Callable[[str], Any]) -> Round:
    """Both blocks of each engine."""
    found: Round = {OURS: [], PLAIN: []}
    for name in order:
        found[name].append(block(name))
    return found


def throughput(engine: Engine, work: list[Question]) -> Block:
    """Seconds per request: of the clock, of all the engine's processors, and of the API server, in which our code runs."""
    before = engine_processor_s(engine.pid), processor_s(engine.pid)
    answers, seconds = ask_all(engine.url, work, at_once=AT_ONCE)
    after = engine_processor_s(engine.pid), processor_s(engine.pid)
    refuse_failures(answers)
    share = 1 / len(work)
    return {
        "wall_s": seconds * share,
        "engine_s": (after[0] - before[0]) * share,
        "api_server_s": (after[1] - before[1]) * share,
    }


def latencies(engine: Engine, work: list[Question], rate: float, number: int) -> list[float]:
    answers = ask_at(engine.url, work, rate, SEED + number)
    refuse_failures(answers)
    return [answer.latency_s for answer in answers]


def ratios(busy: Sequence[Round], timed: Sequence[Round]) -> dict[str, float]:
    """Ours ÷ plain, each as `…_ratio` with `…_ratio_low` and `…_ratio_high`; of throughput, that is the plain engine's time ÷ ours."""
    found = {
        "throughput": with_interval(busy, of_blocks("wall_s", PLAIN, OURS)),
        "cpu_per_request": with_interval(busy, of_blocks("engine_s", OURS, PLAIN)),
        "api_server": with_interval(busy, of_blocks("api_server_s", OURS, PLAIN)),
        "p50": with_interval(timed, of_latencies(0.5)),
        "p99": with_interval(timed, of_latencies(0.99)),
    }
    return {f"{name}_ratio{end}": value for name, ends in found.items() for end, value in ends.items()}


def of_blocks(key: str, above: str, below: str) -> Callable[[Sequence[Round]], float]:
    """The median over rounds of the sum of one engine's blocks ÷ that of the other's."""

    def figure(rounds: Sequence[Round]) -> float:
        return statistics.median(
            sum(block[key] for block in one[above]) / sum(block[key] for block in one[below]) for one in rounds
        )

    return figure


def of_latencies(share: float) -> Callable[[Sequence[Round]], float]:
    """A percentile of all latencies of ours ÷ that of the plain engine's."""

    def figure(rounds: Sequence[Round]) -> float:
        ours, plain = ([s for one in rounds for block in one[which] for s in block] for which in (OURS, PLAIN))
        return percentile(ours, share) / percentile(plain, share)

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
    """A failed request would make its engine look fast."""
    for answer in answers:
        if answer.failed:
            raise RuntimeError(f"{answer.url}: {answer.status} {answer.error}")


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
