"""Which processors each CPU engine of a machine computes on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def cores(topology: Path = _TOPOLOGY) -> list[int]:
    """One processor of each core that this process may use: the last of its siblings, as vLLM takes; without a topology, all of them."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    found = []
    for number in allowed:
        siblings = [number]
        with suppress(OSError, ValueError):
            siblings = _listed((topology / f"cpu{number}/topology/thread_siblings_list").read_text())
        if number == max(set(siblings) & set(allowed), default=number):
            found.append(number)
    return found


def shares(found: Sequence[int], engines: int) -> list[tuple[int, ...]]:
    """The processors that each of `engines` engines computes on; () each where there are fewer than engines, or one engine alone.

    A share of several leaves one free, for vLLM's core and API server, as vLLM does by itself.
    """
    if engines < 2 or len(found) < engines:
        return [()] * engines
    bounds = [len(found) * number // engines for number in range(engines + 1)]
    parts = [tuple(found[first:last]) for first, last in itertools.pairwise(bounds)]
    return [part[1:] or part for part in parts]


def _listed(text: str) -> list[int]:
    """`0-2,8` as Linux lists processors."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
