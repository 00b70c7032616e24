"""How errors that a user can cause are shown: message, details and hint on stderr, one per line, no markup.

Plain text on purpose: file names and values from a user's file must never be read as Rich markup.
"""

from __future__ import annotations

import signal
import sys
import traceback
from types import FrameType

from memupdate.errors import MemupdateError

INTERRUPTED_EXIT_CODE = 130
"""128 + SIGINT, what shells expect after Ctrl-C."""
TERMINATED_EXIT_CODE = 143
"""128 + SIGTERM, what service managers expect."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an interrupt: temporary files go and a started engine stops, as after Ctrl-C."""


_received: list[int] = []
"""Signals that asked this process to end, in order."""


def raise_interrupt(number: int, _frame: FrameType | None) -> None:
    """The handler of SIGINT and SIGTERM."""
    _received.append(number)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def interrupted_exit_code() -> int | None:
    """What to exit with where a signal asked for the end; None where none did.

    Looked up, not taken from the exception: C code that an interrupt hits may raise what it failed at in its place.
    """
    if not _received:
        return None
    return TERMINATED_EXIT_CODE if _received[-1] == signal.SIGTERM else INTERRUPTED_EXIT_CODE


def show_error(error: MemupdateError, *, debug: bool) -> None:
    """Print `error` on stderr; with `debug` its traceback first."""
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    lines = [f"error: {error.message}", *(f"  {detail}" for detail in error.details)]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    print("\n".join(lines), file=sys.stderr)


def show_interrupted() -> None:
    """Say that nothing is lost and how to go on."""
    print("interrupted; run `memupdate resume` to go on from the last finished step", file=sys.stderr)
