"""Keeps an engine up: one that ends, or no longer answers, is started again, within bounds, and each step is told in one line.

Invariant: when `Supervisor.run` has returned or raised, its engine has ended and its note is gone. While it runs, the note says
at any moment who keeps the engine, in which state it is, how often it was started again, and why. An engine that
starts late or again needs nothing from anybody: it reads the registry and loads releases as they are asked for. This
module knows nothing about releases.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import httpx

from memupdate.errors import EngineError, MemupdateError
from memupdate.progress import Progress, no_progress
from memupdate.serving.engine import Engine
from memupdate.serving.engine_record import process_start

_POLL_S = 0.5
_LOOK_S = 2.0
"""Between two looks at `/health`."""
_LOOK_TIMEOUT_S = 5.0
_ILL_S = 5.0
"""An engine that says itself that it is dead usually ends by itself, and its log then tells why."""
_LONGEST_PAUSE_S = 60.0

Tell = Callable[[str], None]


@dataclass(frozen=True)
class RestartBounds:
    """How often an engine is started again."""

    max_restarts: int = 5
    """Within `window_s`; one more failure ends `serve`."""
    window_s: float = 600.0
    hang_s: float = 60.0
    """An engine that has not answered `/health` for so long is taken for dead."""
    first_pause_s: float = 1.0
    """Before the first restart; doubled for each further one within the window."""

    def pause_s(self, restarts: int) -> float:
        """Seconds to wait before the next restart, after so many within the window."""
        return float(min(self.first_pause_s * 2**restarts, _LONGEST_PAUSE_S))


class Supervisor:
    """One engine and whoever keeps it. `run` belongs in a thread of its own; `stopped` is how to end it from another."""

    def __init__(
        self,
        engine: Engine,
        bounds: RestartBounds,
        tell: Tell,
        *,
        name: str = "engine",
        progress: Progress = no_progress,
    ) -> None:
        """`tell` gets one line for people at each step; `name` begins it. `progress` follows each start."""
        self.engine = engine
        self.ready = Event()
        """Set when the engine has answered for the first time."""
        self.restarts = 0
        self._bounds = bounds
        self._tell = tell
        self._name = name
        self._progress = progress
        self._recent: deque[float] = deque()
        self._last_failure = ""

    def run(self, stopped: Event) -> None:
        """Start the engine and keep it until `stopped` is set; requests in flight may then finish (`EngineSettings.drain_s`).

        Raises:
            MemupdateError: the first start failed: whatever is wrong then would be wrong again.
            EngineError: it was started again as often as the bounds allow.
        """
        try:
            self._note("starting")
            self._start(stopped)
            self.ready.set()
            self.engine.needs_record = False
            while (reason := self._watch(stopped)) is not None:
                self._restart(reason, stopped)
        except _Stopped:
            return
        finally:
            self.engine.stop()
            self.engine.remove_record()

    def _start(self, stopped: Event) -> None:
        try:
            self.engine.notes |= self._kept()
            self.engine.start(self._progress, cancelled=stopped)
        except EngineError:
            if stopped.is_set():
                raise _Stopped from None
            raise

    def _restart(self, reason: str, stopped: Event) -> None:
        """Raises _Stopped; EngineError where the bounds are used up."""
        bounds = self._bounds
        while True:
            self.engine.stop()
            now = time.monotonic()
            while self._recent and now - self._recent[0] > bounds.window_s:
                self._recent.popleft()
            before = len(self._recent)
            if before >= bounds.max_restarts:
                raise EngineError(
                    f"{self._name} given up after {before} restart(s) within {bounds.window_s:.0f} s: {reason}",
                    f"look at {self.engine.settings.log_path}; serving.max_restarts in the policy allows more",
                )
            pause = bounds.pause_s(before)
            self._recent.append(now)
            self.restarts, self._last_failure = self.restarts + 1, reason
            self._note("restarting")
            self._tell(f"{self._name}: {reason}; starts again in {pause:.0f} s ({before + 1} of {bounds.max_restarts})")
            if stopped.wait(pause):
                raise _Stopped
            try:
                self._start(stopped)
            except MemupdateError as error:
                reason = error.message
                continue
            self._tell(f"{self._name}: is back at {self.engine.url} after {time.monotonic() - now:.0f} s")
            return

    def _watch(self, stopped: Event) -> str | None:
        """Wait until the engine is no longer of use, and say why; None once `stopped` is set."""
        answered = looked = time.monotonic()
        with httpx.Client(base_url=self.engine.url, timeout=_LOOK_TIMEOUT_S, trust_env=False) as client:
            while not stopped.wait(_POLL_S):
                if self.engine.poll() is not None:
                    return self.engine.failure().message
                if time.monotonic() - looked < _LOOK_S:
                    continue
                status, looked = _health(client), time.monotonic()
                if status == 200:
                    answered = looked
                limit = self._bounds.hang_s if status is None else min(_ILL_S, self._bounds.hang_s)
                if looked - answered > limit:
                    said = "does not answer" if status is None else f"says that it cannot serve (/health: {status})"
                    self.engine.kill()  # No grace: what hangs would use all of it up.
                    return f"the engine {said} since {looked - answered:.0f} s"
        return None

    def _kept(self) -> dict[str, Any]:
        return {
            "supervisor_pid": os.getpid(),
            "supervisor_started": process_start(os.getpid()),
            "restarts": self.restarts,
            "last_failure": self._last_failure,
        }

    def _note(self, state: str) -> None:
        """While there is no engine to tell of, the note tells of its keeper."""
        self.engine.write_note({"pid": 0, "state": state, **self._kept()})


class _Stopped(Exception):
    """Somebody wants no engine any more."""


def _health(client: httpx.Client) -> int | None:
    """The status of `/health`; None where nothing answers in time."""
    try:
        return client.get("/health").status_code
    except httpx.HTTPError:
        return None
