"""Draws the progress of long work on stderr: Rich bars on a terminal, an occasional plain line elsewhere.

Invariant: a `Progress` from here never writes to stdout, and does not raise when stderr has gone away.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from memupdate.progress import Progress, ProgressEvent

LINE_INTERVAL_S = 10.0
"""Time between two plain lines of one stage: often enough to see life, rare enough for a log."""


@contextmanager
def progress_on_stderr() -> Iterator[Progress]:
    """Yield a callback for operations; bars are removed at the end, so that only results stay on the terminal."""
    if sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield PlainLines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[message]}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(event: ProgressEvent, /) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, count="", message="")
            bars.update(
                tasks[event.stage],
                completed=event.done,
                total=event.total,
                count=_count(event),
                message=event.message,
            )

        yield show


class PlainLines:
    """One line when a stage starts and ends, and every `LINE_INTERVAL_S` seconds between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_shown_s: dict[str, float] = {}

    def __call__(self, event: ProgressEvent, /) -> None:
        """Print the event if its time has come."""
        now_s = self._clock()
        last_s = self._last_shown_s.get(event.stage)
        finished = event.total is not None and event.done >= event.total
        if last_s is not None and not finished and now_s - last_s < LINE_INTERVAL_S:
            return
        self._last_shown_s[event.stage] = now_s
        parts = [part for part in (_count(event), event.message) if part]
        with suppress(OSError, ValueError):  # a closed stderr must not stop an update
            print(f"{event.stage}: {', '.join(parts)}" if parts else event.stage, file=sys.stderr, flush=True)


def _count(event: ProgressEvent) -> str:
    if event.total is None:
        return f"{event.done:.0f}" if event.done else ""
    return f"{event.done:.0f}/{event.total:.0f}"
