"""How errors that a user can cause are shown: message, details and hint on stderr, one per line, no markup.

Plain text on purpose: file names and values from a user's file must never be read as Rich markup.
"""

from __future__ import annotations

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


def raise_terminated(_number: int, _frame: FrameType | None) -> None:
    """The handler of SIGTERM."""
    raise Terminated


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
