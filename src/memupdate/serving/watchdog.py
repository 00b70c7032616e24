"""The small process between `serve` and vLLM: it ends vLLM, children and all, when the process that started it is gone.

Run as `python -m memupdate.serving.watchdog PARENT_PID GRACE_S -- COMMAND…`; prints the command's pid as its only line
on stdout and exits with the command's code. The command gets a session of its own. Invariant: when this process has
ended, by whatever cause but SIGKILL, no process of that session is left; if it is killed with SIGKILL itself, the
kernel sends the command SIGTERM (Linux). It knows nothing about vLLM, and imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

_POLL_S = 0.25
_REAP_S = 5.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str]) -> int:
    """Run the command and watch it; returns its exit code (128 + signal where a signal ended it)."""
    parent, grace_s, command = int(arguments[0]), float(arguments[1]), arguments[3:]
    stop_wanted = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stop_wanted
        stop_wanted = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True, preexec_fn=_die_with(os.getpid())
    )
    print(child.pid, flush=True)
    try:
        while not stop_wanted and os.getppid() == parent:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return _exit_code(child.wait(_POLL_S))
        return _exit_code(_terminate(child, grace_s))
    finally:
        _end_session(child)


def _terminate(child: subprocess.Popen[bytes], grace_s: float) -> int:
    """SIGTERM to the command only, so that it can finish and stop its own children; SIGKILL to all after `grace_s`."""
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(grace_s)
    _signal_group(child.pid, signal.SIGKILL)
    return child.wait()


def _end_session(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL whatever the command left behind, and wait until it is gone."""
    deadline = time.monotonic() + _REAP_S
    while _signal_group(child.pid, signal.SIGKILL) and time.monotonic() < deadline:
        # As their subreaper this process inherits the command's orphans; unreaped they would stay in the group as
        # zombies.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def _signal_group(group: int, number: signal.Signals) -> bool:
    """Whether there still was anyone in the group."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _die_with(parent: int) -> Callable[[], None]:
    """What the child runs before `exec`: SIGTERM from the kernel when the watchdog dies (Linux; elsewhere nothing)."""

    def arrange() -> None:
        _prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:
            os._exit(1)

    return arrange


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
