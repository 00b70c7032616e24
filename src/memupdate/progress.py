"""How long work tells its caller where it is. Operations call a `Progress`; the CLI draws it; scripts may ignore it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ProgressEvent:
    """One step of long work."""

    stage: str
    """What is being done, for example `train` or `prove`; one bar per stage."""
    done: float
    total: float | None = None
    """Same unit as `done`; None while the end is unknown. The stage is over when `done == total`."""
    message: str = ""


class Progress(Protocol):
    """A callback that must be cheap and must not raise."""

    def __call__(self, event: ProgressEvent, /) -> None:
        """Take note of `event`."""


def no_progress(event: ProgressEvent, /) -> None:
    """A `Progress` that ignores everything."""
