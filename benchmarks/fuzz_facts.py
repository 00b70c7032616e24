"""Byte-level fuzzing of everything that reads facts, up to the ledger's door: `python -m benchmarks.fuzz_facts [--inputs N] [--seed S]`.

Real files of every format, as they are and packed, are mutated byte by byte and given to a real ledger, which must take or refuse each:
no exception but `FactsError`, no input that takes longer than the alarm, no byte of the ledger changed by what is refused or only looked
at, and every refusal names the file, and the line (element, row) and field where there is one. The first failure of each kind is kept,
with what made it, in the results.
"""

from __future__ import annotations

import argparse
import gzip
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard
from benchmarks.recording import ROOT, markdown_table, record

from memupdate.errors import FactsError
from memupdate.facts import Fact, FactStream
from memupdate.facts.files import FactsFile, LocatedFact
from memupdate.ledger.ledger import Ledger
from memupdate.storage import file_sha256

ALARM_S = 10
"""Seconds after which an input counts as a hang; the median takes a few milliseconds."""
PARQUET_COLUMNS = {"prompt": "Question", "target": "Answer", "valid_from": "since"}
SAMPLES = ("examples/*.json*", "examples/table.*", "tests/data/facts/*.json", "tests/data/facts/*.csv")
TOKENS = (
    b"\x00", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n", b"\r\n", b"\t", b'"', b"\\", b"\\u0000", b"\\ud83d", b"{", b"}",
    b"[", b"]", b",", b":", b"null", b"true", b"-1e999", b"NaN", b"1" * 5000, b"[" * 3000, b'{"a":' * 500,
    b'{"prompt": "p", "target": "t"}',
    b'"target"', b'"prompt": ', b"0000-00-00", b"2024-13-41", b"9999-12-31T23:59:59+00:00", b"{}", b"[MASK]", "ﬁİß\u2028🦊".encode(),
    b"PAR1",
    b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x7f\xff\xff\xff",
)  # fmt: skip
"""What parsers are known to stumble over."""
_PLACE = re.compile(r"(:\d+|: (element|row) \d+): .+: .+|and \d+ more.*", re.DOTALL)


@dataclass(frozen=True)
class Seed:
    name: str
    """As the mutated file is called: its suffix is part of how a file is read."""
    content: bytes
    columns: dict[str, str] | None = None


@dataclass
class Tally:
    outcomes: Counter[str] = field(default_factory=Counter)
    by_seed: dict[str, Counter[str]] = field(default_factory=dict)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind → its first case."""
    slowest_s: float = 0.0

    def add(self, seed: Seed, outcome: str, case: dict[str, Any]) -> None:
        self.outcomes[outcome] += 1
        self.by_seed.setdefault(seed.name, Counter())[outcome] += 1
        if outcome not in ("taken", "refused"):
            self.failures.setdefault(outcome, case)


class Hang(BaseException):
    """Not an Exception, so that nothing under test takes it for one of its own."""


def seeds() -> list[Seed]:
    found: list[Seed] = []
    for pattern in SAMPLES:
        for path in sorted(ROOT.glob(pattern)):
            columns = PARQUET_COLUMNS if path.suffix == ".parquet" else None
            found.append(Seed(path.name, path.read_bytes(), columns))
    packed = [seed for seed in found if seed.name in ("native.jsonl", "table.csv", "zsre.json", "dyknow.json")]
    found += [Seed(f"{seed.name}.gz", gzip.compress(seed.content, mtime=0)) for seed in packed]
    found += [Seed(f"{seed.name}.zst", zstandard.compress(seed.content)) for seed in packed]
    # Without a suffix the content alone tells what it is, as on standard input.
    return found + [Seed(seed.name.partition(".")[0] + "-unnamed", seed.content, seed.columns) for seed in found[::3]]


def mutate(content: bytes, rng: random.Random, others: Sequence[Seed]) -> bytes:
    """`content` with one to eight changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 8))):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 4, 16, 64, 512)), len(data) - at)
        match rng.randrange(9):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.randrange(256)
            case 2:
                data[at:at] = rng.choice(TOKENS)
            case 3:
                data[at : at + length] = rng.choice(TOKENS)
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
            case 6:
                del data[at:]
            case 7:
                data[at : at + length] = rng.randbytes(length)
            case 8:
                other = rng.choice(others).content
                start = rng.randrange(len(other))
                data[at : at + length] = other[start : start + rng.choice((8, 64, 400))]
    return bytes(data)


def run(inputs: int, seed: int, folder: Path) -> tuple[Tally, float]:
    """Fuzz; returns the tally and the seconds it took."""
    path, known, tally = folder / "ledger.db", seeds(), Tally()
    with Ledger.create(path) as ledger:
        ledger.receive_batch(
            "acme", FactsFile("first", "sha256:0", 1, "native", (LocatedFact(Fact("Who?", "Wanda"), 1),)), "{}"
        )
    signal.signal(signal.SIGALRM, _raise_hang)
    started = time.monotonic()
    with Ledger.open(path) as ledger:
        before = _digest(folder)
        for number in range(inputs):
            rng = random.Random(f"{seed}-{number}")
            chosen = known[number % len(known)]
            file = folder / chosen.name
            file.write_bytes(mutate(chosen.content, rng, known))
            begin = time.monotonic()
            outcome, detail = _give(ledger, file, chosen)
            tally.slowest_s = max(tally.slowest_s, time.monotonic() - begin)
            file.unlink()
            if _digest(folder) != before:
                outcome, detail = "ledger changed", outcome
            tally.add(chosen, outcome, {"seed": seed, "number": number, "file": chosen.name, "detail": detail})
            if (number + 1) % 5000 == 0:
                print(
                    f"{number + 1} inputs, {time.monotonic() - started:.0f} s, {dict(tally.outcomes)}", file=sys.stderr
                )
    return tally, time.monotonic() - started


def _give(ledger: Ledger, file: Path, seed: Seed) -> tuple[str, str]:
    """Outcome and detail of one input."""
    signal.setitimer(signal.ITIMER_REAL, ALARM_S)
    try:
        with ledger.stage("acme", FactStream(file, columns=seed.columns)):
            return "taken", ""
    except FactsError as error:
        unplaced = [line for line in error.details if not _PLACE.fullmatch(line.removeprefix(str(file)))]
        if unplaced or not error.message.startswith(str(file)):
            return "refused without a place", (unplaced or [error.message])[0]
        return "refused", ""
    except Hang:
        return "hang", traceback.format_exc()
    except Exception as error:
        return f"traceback: {type(error).__name__}", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _digest(folder: Path) -> tuple[str, ...]:
    return tuple(file_sha256(path) for path in sorted(folder.glob("ledger.db*")) if not path.name.endswith("-shm"))


def _raise_hang(*_: object) -> None:
    raise Hang


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2,000 inputs; nothing is written")
    options = parser.parse_args()
    inputs = 2_000 if options.quick else options.inputs
    with tempfile.TemporaryDirectory() as folder:
        tally, duration_s = run(inputs, options.seed, Path(folder))
    bad = sum(count for outcome, count in tally.outcomes.items() if outcome not in ("taken", "refused"))
    figures = {
        "inputs": inputs,
        "refused": tally.outcomes["refused"],
        "taken": tally.outcomes["taken"],
        "tracebacks": sum(count for outcome, count in tally.outcomes.items() if outcome.startswith("traceback")),
        "hangs": tally.outcomes["hang"],
        "ledger_changes": tally.outcomes["ledger changed"],
        "refused_without_a_place": tally.outcomes["refused without a place"],
        "files": len(tally.by_seed),
        "slowest_s": round(tally.slowest_s, 3),
        "duration_s": round(duration_s, 1),
    }
    rows = [
        (name, counts.total(), counts["refused"], counts["taken"]) for name, counts in sorted(tally.by_seed.items())
    ]
    table = markdown_table(("file that was mutated", "inputs", "refused", "taken"), rows)
    print(figures, *tally.failures.values(), sep="\n")
    if not options.quick:
        record("fuzz", figures, table_markdown=table, details={"failures": tally.failures})
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
