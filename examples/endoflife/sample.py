"""Takes a few facts of two snapshots made by to_facts.py: some whose value changed in between, and some that stayed.

    python examples/endoflife/to_facts.py PAGES-2024 > old.jsonl
    python examples/endoflife/to_facts.py PAGES-2025 > new.jsonl
    python examples/endoflife/sample.py old.jsonl new.jsonl --changed 150 --same 50

writes `2024-01-01.jsonl` (all of them, as they were) and `2025-01-01.jsonl` (all of them, as they became) beside this file. Which facts
is a matter of the seed alone; release dates are left out, since a date of the past is history and not news.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

Key = tuple[str, str]
RELATIONS = ("newest release cycle", "latest version", "end of support")
NAMES = ("2024-01-01.jsonl", "2025-01-01.jsonl")


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """Facts by subject and relation."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {(r["subject"].casefold(), r["relation"]): r for r in records if r["relation"] in RELATIONS}


def sample(old: dict[Key, Any], new: dict[Key, Any], *, changed: int, same: int, seed: int) -> list[Key]:
    """Keys of both snapshots, in random order. What became true before it had become false is no news, and left out."""
    rng = random.Random(seed)
    both = sorted(old.keys() & new.keys())
    moved = [k for k in both if old[k]["target"] != new[k]["target"] and since(new[k]) >= since(old[k])]
    stayed = [k for k in both if old[k]["target"] == new[k]["target"]]
    chosen = rng.sample(moved, changed) + rng.sample(stayed, same)
    rng.shuffle(chosen)
    return chosen


def since(record: dict[str, Any]) -> str:
    """The date from which a fact is true, "" where the page does not say."""
    return str(record.get("valid_from", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description="A sample of two snapshots of facts, changed and unchanged ones.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--changed", type=int, default=150)
    parser.add_argument("--same", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="the folder to write to")
    options = parser.parse_args()
    old, new = read(options.old), read(options.new)
    chosen = sample(old, new, changed=options.changed, same=options.same, seed=options.seed)
    for name, records in zip(NAMES, (old, new), strict=True):
        lines = [json.dumps(records[key], ensure_ascii=False) + "\n" for key in chosen]
        (options.to / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
