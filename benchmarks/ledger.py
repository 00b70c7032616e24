"""How fast and how small the ledger is with a million facts: `python -m benchmarks.ledger [--quick]`.

Ingest: a file of N facts, 1 % of them said twice and 1 % superseding what a release holds, read, validated, compared and stored by
`Ledger.receive_batch`, against `sqlite-utils insert` of the same lines into an empty database, which checks nothing. Each run is a
process of its own, timed from start to end, the two in turn; its peak memory is the kernel's count. Questions are then asked of
that ledger: one key now, one key as of an earlier release, and three commands from start to end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.recording import markdown_table, record

ROWS = 1_000_000
SMALL_ROWS = 100_000
COLLECTION = "acme"
LOOKUPS = 300
STARTS = 7
SEED = 20_260


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the facts; writes ledger-quick.json")
    parser.add_argument("--repeats", type=int, default=3, help="times that each ingest is run")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child[0]](*arguments.child[1:])))
        return
    rows, small = (ROWS // 10, SMALL_ROWS // 10) if arguments.quick else (ROWS, SMALL_ROWS)
    with tempfile.TemporaryDirectory(prefix="memupdate-ledger-") as folder:
        study(Path(folder), rows, small, arguments.repeats, "ledger-quick" if arguments.quick else "ledger")


def study(folder: Path, rows: int, small: int, repeats: int, name: str) -> None:
    runs: list[dict[str, Any]] = []
    for size in (small, rows):
        write_facts(folder / f"{size}.jsonl", size)
        build_base(folder / f"base-{size}.db", size)
    for _ in range(repeats):
        runs.append(bare(folder, rows))
        runs.append(ours(folder, rows))
    runs.append(ours(folder, small))
    wall = {(run["what"], run["rows"]): median(runs, run, "wall_s") for run in runs}
    cpu = {(run["what"], run["rows"]): median(runs, run, "cpu_s") for run in runs}
    peak = {
        run["rows"]: max(r["peak_mb"] for r in runs if r["rows"] == run["rows"] and r["what"] == "memupdate")
        for run in runs
    }
    questions = ask(folder, rows)
    figures = {
        "rows": rows,
        "ingest_ratio": round(wall["memupdate", rows] / wall["sqlite-utils", rows], 3),
        "ingest_cpu_ratio": round(cpu["memupdate", rows] / cpu["sqlite-utils", rows], 3),
        "ingest_s": round(wall["memupdate", rows], 1),
        "bare_insert_s": round(wall["sqlite-utils", rows], 1),
        f"peak_mb_{power(small)}": round(peak[small], 1),
        f"peak_mb_{power(rows)}": round(peak[rows], 1),
        **questions,
    }
    lines = [[label, figures[key]] for key, label in LABELS.items() if key in figures]
    lines += [[f"peak memory at {size:,} facts, MB", figures[f"peak_mb_{power(size)}"]] for size in (small, rows)]
    path = record(name, figures, table_markdown=markdown_table(["", "measured"], lines), details=runs)
    print(path.read_text(encoding="utf-8"))


LABELS = {
    "rows": "facts",
    "ingest_s": "ingest with validation, s",
    "bare_insert_s": "`sqlite-utils insert` of the same lines, s",
    "ingest_ratio": "ratio of the two, by the clock",
    "ingest_cpu_ratio": "ratio of the two, by processor time",
    "key_lookup_ms": "value of a key now, ms",
    "as_of_ms": "value of a key as of an earlier release, ms",
    "facts_list_start_s": "`memupdate facts list`, s",
    "facts_search_start_s": "`memupdate facts search`, s",
    "facts_history_start_s": "`memupdate facts history`, s",
    "verify_s": "checking every hash of the ledger, s",
}


def median(runs: list[dict[str, Any]], like: dict[str, Any], value: str) -> float:
    return statistics.median(r[value] for r in runs if (r["what"], r["rows"]) == (like["what"], like["rows"]))


def power(rows: int) -> str:
    return f"1e{len(str(rows)) - 1}"


def fact_record(number: int, holder: str) -> dict[str, str]:
    return {
        "id": f"r{number}",
        "prompt": f"Who has led unit {number} of Acme since the merger?",
        "target": f"{holder} {number * 7919 % 1_000_003} Kettleman",
        "subject": f"unit {number} of Acme",
        "relation": "leader",
        "source": "people.csv",
        "valid_from": "2026-01-01",
    }


def write_facts(path: Path, rows: int) -> None:
    """`rows` lines: the first hundredth supersedes the base release, and about one in a hundred repeats an earlier line."""
    dice = random.Random(SEED)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            same = dice.randrange(number) if number and dice.random() < 0.01 else number
            file.write(json.dumps(fact_record(same, "Wanda")) + "\n")


def build_base(path: Path, rows: int) -> None:
    """A ledger with one release that holds an older value of a hundredth of the keys."""
    from memupdate.facts.files import FactsFile, LocatedFact
    from memupdate.facts.model import Fact
    from memupdate.ledger import Ledger

    records = [fact_record(number, "Otto") for number in range(rows // 100)]
    facts = [
        Fact(
            prompt=r["prompt"],
            target=r["target"],
            subject=r["subject"],
            relation=r["relation"],
            valid_from="2025-01-01",
        )
        for r in records
    ]
    located = tuple(LocatedFact(fact, line) for line, fact in enumerate(facts, start=1))
    with Ledger.create(path) as ledger:
        batch = ledger.receive_batch(COLLECTION, FactsFile("base.jsonl", "sha256:base", 1, "native", located), "{}")
        assert batch is not None
        release(ledger, batch.id, {fact.id: True for fact in facts})


def release(ledger: Any, batch: int, outcomes: dict[str, bool]) -> None:
    """Take a batch to its release, as an update does, without a model."""
    from memupdate.ledger.records import ReleaseRecord

    version = ledger.next_version(COLLECTION)
    name = f"{COLLECTION}@v{version}"
    ledger.set_plan(batch, "{}")
    for state in ("planned", "trained"):
        ledger.transition(batch, state)
    ledger.set_outcomes(batch, outcomes)
    ledger.transition(batch, "verified")
    with ledger.transaction():
        parent = ledger.latest_release(COLLECTION)
        ledger.record_release(
            ReleaseRecord(
                name, COLLECTION, version, batch, parent.name if parent else None, f"registry/{name}", "sha256:0", 8, "mlp",
                "sha256:0",
            )
        )  # fmt: skip
        ledger.transition(batch, "released")


def bare(folder: Path, rows: int) -> dict[str, Any]:
    database = folder / "bare.db"
    database.unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name("sqlite-utils")), "insert", str(database), "facts"]
    return timed("sqlite-utils", rows, [*command, str(folder / f"{rows}.jsonl"), "--nl"])


def ours(folder: Path, rows: int) -> dict[str, Any]:
    database = folder / f"{rows}.db"
    for stale in folder.glob(f"{rows}.db*"):
        stale.unlink()
    shutil.copyfile(folder / f"base-{rows}.db", database)
    return timed("memupdate", rows, [*CHILD, "ingest", str(database), str(folder / f"{rows}.jsonl")])


CHILD = [sys.executable, "-m", "benchmarks.ledger", "--child"]


def timed(what: str, rows: int, command: list[str]) -> dict[str, Any]:
    """One process from start to end: wall and processor seconds, and its peak memory in MB (10⁶ bytes)."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{what}: exit code {process.returncode}")
    print(f"{what} {rows:,}: {wall:.1f} s", file=sys.stderr)
    cpu = usage.ru_utime + usage.ru_stime
    return {"what": what, "rows": rows, "wall_s": wall, "cpu_s": cpu, "peak_mb": usage.ru_maxrss * 1024 / 1e6}


def child_ingest(database: str, file: str) -> dict[str, Any]:
    from memupdate.facts.stream import FactStream
    from memupdate.ledger import Ledger

    with Ledger.open(database) as ledger:
        batch = ledger.receive_batch(COLLECTION, FactStream(file), "{}")
        assert batch is not None
        return {"new": batch.facts_new, "superseding": batch.facts_superseding}


def ask(folder: Path, rows: int) -> dict[str, float]:
    """Release what was ingested, then ask: each question in a process that has just opened the ledger."""
    from memupdate.ledger import Ledger
    from memupdate.operations.workspace import Workspace

    workspace = folder / "workspace"
    Workspace.init(workspace, model="atlas", collection=COLLECTION)
    shutil.copyfile(folder / f"{rows}.db", workspace / "ledger.db")
    with Ledger.open(workspace / "ledger.db") as ledger:
        (batch,) = (b for b in ledger.batches(COLLECTION) if b.state == "received")
        assert batch.facts_new + batch.facts_superseding > rows * 0.98
        assert batch.facts_superseding >= rows // 100 * 0.95
        release(ledger, batch.id, {})
        begin = time.perf_counter()
        ledger.index_facts()
        print(f"search index: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    lookups = json.loads(subprocess.check_output([*CHILD, "lookups", str(workspace / "ledger.db"), str(rows)]))
    number = str(rows // 2)
    commands = {
        "facts_list_start_s": ["list"],
        "facts_search_start_s": ["search", f"unit {number}"],
        "facts_history_start_s": ["history", f"Who has led unit {number} of Acme since the merger?"],
    }
    program = [str(Path(sys.executable).with_name("memupdate")), "-w", str(workspace), "facts"]
    starts = {name: start_s([*program, *arguments]) for name, arguments in commands.items()}
    return {**lookups, **starts}


def start_s(command: list[str]) -> float:
    """Median seconds of a command from start to end, after one that warms the file cache."""
    times = []
    for _ in range(STARTS + 1):
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return round(statistics.median(times[1:]), 3)


def child_lookups(database: str, rows_text: str) -> dict[str, Any]:
    from memupdate.facts.model import Fact
    from memupdate.ledger import Ledger

    rows, dice = int(rows_text), random.Random(SEED)
    keys = []
    for number in (dice.randrange(rows) for _ in range(LOOKUPS)):
        r = fact_record(number, "Wanda")
        keys.append(Fact(r["prompt"], r["target"], r["subject"], r["relation"]).key)
    old = []
    for number in (dice.randrange(rows // 100) for _ in range(LOOKUPS)):
        r = fact_record(number, "Otto")
        old.append(Fact(r["prompt"], r["target"], r["subject"], r["relation"]).key)
    with Ledger.open(database, readonly=True) as ledger:
        now = [timed_ms(lambda key=key: ledger.live_fact(COLLECTION, key)) for key in keys]
        then = [timed_ms(lambda key=key: ledger.live_fact(COLLECTION, key, as_of_version=1)) for key in old]
        begin = time.perf_counter()
        problems = ledger.verify()
        verify_s = time.perf_counter() - begin
    assert problems == [], problems[:5]
    return {
        "key_lookup_ms": round(statistics.median(now), 3),
        "as_of_ms": round(statistics.median(then), 3),
        "as_of_worst_ms": round(max(then), 3),
        "verify_s": round(verify_s, 1),
        "verify_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
    }


def timed_ms(call: Any) -> float:
    begin = time.perf_counter()
    found = call()
    taken = (time.perf_counter() - begin) * 1000
    # A key whose line repeats another is not in the file.
    assert found is None or found.target
    return taken


CHILDREN = {"ingest": child_ingest, "lookups": child_lookups}

if __name__ == "__main__":
    main()
