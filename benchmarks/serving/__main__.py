"""What clients notice of updates, on the real vLLM: `python -m benchmarks.serving [--quick] [--part NAME]`.

Two releases of the embedded model are made by `add` (once; they are kept in the work folder), and then:

- flips: a hundred flips on one engine under a steady load of chat and completions, streaming and not. Counted are requests that failed,
  answers that are not letter for letter what the release they name gives alone, and answers of a release that was not in force any more.
  Questions that both releases answer alike are not asked: on them a mix would not be seen.
- replicas: the same on two engines of one registry, of which one is killed with -9 half-way and comes back.
- cost: throughput and latency through our middleware against past it, in short turns.
- alone: microseconds of the middleware by itself.
- served: seconds from proved to served, on an engine that has nothing else to do.

Each part keeps what it found in the work folder; the results are written when all of them are there or in the results so far, so that the
parts can be run at different times.
The machine should have nothing else to do for `cost` and `served`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.recording import commit, markdown_table, record, recorded
from benchmarks.serving import alone, cost, flips, stage

PARTS = ("flips", "replicas", "cost", "alone", "served")


@dataclass(frozen=True)
class Size:
    """How much is done."""

    facts: int | None
    """Of each news file; None: all."""
    prompts: int
    flips: int
    replica_flips: int
    rounds: int
    requests: int
    """Of each block of a round."""
    repeats: int


FULL = Size(facts=None, prompts=16, flips=100, replica_flips=100, rounds=24, requests=128, repeats=7)
QUICK = Size(facts=6, prompts=6, flips=20, replica_flips=10, rounds=8, requests=24, repeats=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six facts, 20 flips, 8 rounds; writes serving-quick.json")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given several times")
    parser.add_argument("--rounds", type=int, help="of the part `cost`, instead of 24 (8 with --quick)")
    parser.add_argument("--work", type=Path, default=Path("build/serving"), help="where releases and parts are kept")
    arguments = parser.parse_args()
    size, name = (QUICK, "serving-quick") if arguments.quick else (FULL, "serving")
    size = replace(size, rounds=arguments.rounds or size.rounds)
    work: Path = arguments.work.resolve() / name
    work.mkdir(parents=True, exist_ok=True)
    workspace = stage.prepare(work, size.facts)
    asked = stage.questions(size.facts, prompts=size.prompts)
    measure: dict[str, Callable[[], dict[str, Any]]] = {
        "flips": lambda: flips.one_engine(workspace, asked, size.flips),
        "replicas": lambda: flips.two_replicas(workspace, asked, size.replica_flips),
        "cost": lambda: cost.measure(workspace, asked, rounds=size.rounds, requests=size.requests),
        "alone": lambda: alone.measure(workspace, asked),
        "served": lambda: cost.served(workspace, size.repeats),
    }
    for part in arguments.part or PARTS:
        stage.say(f"== {part}")
        before = os.getloadavg()
        found = measure[part]()
        stage.write_part(work, part, {"commit": commit(), "load_before": before[0], **found})
    kept = recorded(name).get("details", {})
    parts = {part: found for part in PARTS if (found := stage.read_part(work, part) or kept.get(part))}
    if len(parts) == len(PARTS):
        figures = figures_of(parts)
        print(json.dumps(figures, indent=2))
        record(name, figures, table_markdown=table(figures, parts), details=parts)


RATIOS = tuple(
    f"{name}_ratio{end}"
    for name in ("throughput", "cpu_per_request", "api_server", "p50", "p99")
    for end in ("", "_low", "_high")
)
"""Each with the ends of its interval of 95 %."""


def figures_of(parts: dict[str, dict[str, Any]]) -> dict[str, float | int | None]:
    one, two, cost_found, by_itself, served = (parts[part] for part in PARTS)
    memory = {int(number): value for number, value in one["memory_mb"].items()}
    last = max(memory)
    return {
        "flips": one["flips"],
        "requests": one["requests"],
        "failed_requests": one["failed_requests"],
        "mixed_responses": one["mixed_responses"],
        "answered_by_old_release": one["answered_by_old_release"],
        "verified_to_served_s": round(served["verified_to_served_s"], 3),
        "proved_to_served_s": round(served["proved_to_served_s"], 3),
        "publish_under_load_s": one["publish_under_load_s"],
        "rollback_s": round(served["rollback_s"], 3),
        **{key: round(cost_found[key], 4) for key in RATIOS},
        "middleware_us": round(by_itself["middleware_us"], 1),
        "middleware_share": round(by_itself["middleware_us"] / (1000 * cost_found["engine_ms_past"]), 5),
        "memory_growth_mb": round(memory[last] - memory[flips.MEMORY_EVERY], 2),
        "memory_growth_without_flips_mb": without_flips(one),
        "replica_flips": two["flips"],
        "replica_requests": two["requests"],
        "replica_mixed_responses": two["mixed_responses"],
        "replica_answered_by_old_release": two["answered_by_old_release"],
        "replica_kill_failed_requests": two["failed_requests"],
        "replica_kill_away_s": round(two["away_s"], 1),
        "replica_kill_failed_after_recovery": two["after_recovery"]["failed_requests"],
    }


def without_flips(one: dict[str, Any]) -> float | None:
    """Growth under the load alone, over the second half of the time before the flips, MB; None: not measured."""
    readings = list(one.get("memory_without_flips_mb", {}).values())
    return round(readings[-1] - readings[len(readings) // 2 - 1], 2) if readings else None


LABELS = {
    "flips": "flips on one engine, forward (with proof) and back",
    "requests": "requests meanwhile",
    "failed_requests": "… failed",
    "mixed_responses": "… whose answer is not what the release it names gives alone",
    "answered_by_old_release": "… begun after a flip's return and answered by the other release",
    "verified_to_served_s": "from proved in process to served, with the proof on the engine, quiet engine, s (median)",
    "proved_to_served_s": "… of that prewarming, flip and confirmation, s",
    "publish_under_load_s": "`publish` under load, s (median)",
    "rollback_s": "`rollback`, quiet engine, s (median)",
    "throughput_ratio": "throughput through our middleware ÷ past it (95 % of redrawn rounds)",
    "cpu_per_request_ratio": "processor time of the engine per request, through ÷ past",
    "api_server_ratio": "… of its API server alone, where our code runs",
    "p50_ratio": "median latency, through ÷ past",
    "p99_ratio": "p99 latency, through ÷ past",
    "middleware_us": "processor time of the middleware by itself per request, µs",
    "middleware_share": "… ÷ that of the engine per request past it",
    "memory_growth_mb": "memory of the engine after the last flip less that after the tenth; KV cache filled, all lengths met before, MB",
    "memory_growth_without_flips_mb": "… the same under the load alone, before the first flip, for half as long, MB",
    "replica_flips": "flips on two replicas",
    "replica_requests": "requests meanwhile",
    "replica_mixed_responses": "… mixed",
    "replica_answered_by_old_release": "… answered by the other release",
    "replica_kill_failed_requests": "… failed, those in flight on the replica when it was killed among them",
    "replica_kill_away_s": "the killed replica was away, s",
    "replica_kill_failed_after_recovery": "… failed after it was back",
}


def table(figures: dict[str, Any], parts: dict[str, dict[str, Any]]) -> str:
    rows = [[label, shown(key, figures)] for key, label in LABELS.items()]
    load = ", ".join(f"{name} {part['load_before']:.1f}" for name, part in parts.items())
    commits = ", ".join(f"{name} {part['commit']}" for name, part in parts.items())
    notes = f"\nLoad average of the machine before each part: {load}. Commits that they were measured at: {commits}.\n"
    return markdown_table(["", "measured"], rows) + notes


def shown(key: str, figures: dict[str, Any]) -> str:
    """A figure, with its interval where it has one."""
    low, high = figures.get(f"{key}_low"), figures.get(f"{key}_high")
    return str(figures[key]) if low is None else f"{figures[key]} ({low} to {high})"


if __name__ == "__main__":
    main()
