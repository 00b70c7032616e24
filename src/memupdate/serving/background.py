"""Disks that may hang, kept off the event loop: a look that many requests share, and single calls in threads of their own.

Invariant: no event loop waits here for longer than a stated bound, however long a disk hangs (a hard NFS mount hangs for
ever), and a request that begins after a file was replaced sees the new one while the disk answers. Disks of this machine
are asked in place: a thread takes 0.1 ms to answer, 10 times a `stat`, and on an overloaded machine now and then 50 ms.
Threads are daemons: one that hangs does not hold up the end of the process. This module does not know what is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

WAIT_S = 2.0
"""A disk that has not answered for so long counts as away. Long, because an overloaded machine may not run a thread for a while."""
_PATIENCE = 5
"""So many times as long is waited for a thread that the machine does not run."""
_LOCAL = frozenset(
    {
        "bcachefs",
        "btrfs",
        "erofs",
        "ext2",
        "ext3",
        "ext4",
        "f2fs",
        "overlay",
        "ramfs",
        "squashfs",
        "tmpfs",
        "xfs",
        "zfs",
    }
)
"""File systems that answer or fail, but do not wait for another machine. Any other may hang."""
_MOUNTS = Path("/proc/self/mountinfo")
_LOG = logging.getLogger("vllm.memupdate")
_T = TypeVar("_T")
_Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


@dataclass
class _Shared:
    """What the thread of a `SharedLook` knows; not the look itself, which would then never be collected."""

    look: Callable[[], object]
    wait_s: float
    queue: SimpleQueue[_Waiter | None] = field(default_factory=SimpleQueue)
    began_s: float | None = None
    """Monotonic time at which the look in progress began; None: there is none."""
    told_s: float | None = None
    """`began_s` of the last look that was said to hang."""


class SharedLook:
    """Calls `look` in one thread: once for all requests that came since the call before it began.

    Args:
        look: reads the disk and keeps what it found where the requests find it; never raises.
        is_aside: whether in a thread; False: in place, for a disk that does not hang.
        wait_s: for how long a request waits for a look before it goes on with what was found earlier.
    """

    def __init__(self, look: Callable[[], object], *, is_aside: bool, wait_s: float = WAIT_S) -> None:
        self._shared = _Shared(look, wait_s)
        self._is_aside = is_aside
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()

    async def fresh(self) -> None:
        """Returns when a call of `look` that began after this one has ended; at once, or after `wait_s`, while one hangs."""
        if not self._is_aside:
            _look(self._shared)
            return
        if _hangs(self._shared) or not self._is_started():
            return
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(self._shared.wait_s, _give_up, self._shared, done, _PATIENCE)
        self._shared.queue.put((loop, done))
        try:
            await done
        finally:
            timer.cancel()

    def _is_started(self) -> bool:
        """Start the thread if there is none: not before the first request, since it would not outlive a fork."""
        if self._thread is not None:
            return True
        with self._start_lock:
            if self._thread is None:
                thread = threading.Thread(target=_serve, args=(self._shared,), name="memupdate-look", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    _LOG.exception("no thread can be started; requests go on with the last good content")
                    return False
                self._thread = thread
                weakref.finalize(self, self._shared.queue.put, None).atexit = False
        return True


def may_hang(*paths: Path) -> bool:
    """Whether any of `paths` is on a disk that may hang, as far as this machine's mounts tell. Asks the disk itself only for links."""
    mounts = _mounted(_MOUNTS)
    if mounts is None:
        return True
    for path in paths:
        real = Path(os.path.realpath(path))
        if next((mounts[folder] for folder in map(str, (real, *real.parents)) if folder in mounts), "") not in _LOCAL:
            return True
    return False


def call_aside(call: Callable[[], _T]) -> Future[_T]:
    """`call` in a daemon thread of its own; give the future to `settled`. For what is rare: it costs about 0.1 ms."""
    future: Future[_T] = Future()
    future.set_running_or_notify_cancel()  # One waiter that leaves must not cancel it for the others.

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    try:
        threading.Thread(target=run, name="memupdate-aside", daemon=True).start()
    except RuntimeError as error:  # The process has no more threads to give.
        future.set_exception(error)
    return future


async def settled(future: Future[_T], within_s: float | None) -> bool:
    """Wait until `future` has ended, for at most so many seconds (None: without bound). Whether it has; never raises for it."""
    if not future.done() and (within_s is None or within_s > 0):
        waiting = asyncio.wrap_future(future)
        # Its exception counts as seen: asyncio need not log it.
        waiting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await asyncio.wait({waiting}, timeout=within_s)
    return future.done()


@lru_cache(maxsize=1)
def _mounted(table: Path) -> dict[str, str] | None:
    """This machine's mounts, read once for a process; None where it does not tell."""
    try:
        return _mounts(table.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError:
        return None


def _mounts(text: str) -> dict[str, str]:
    """Mount point → type of its file system, from the text of `mountinfo`. Of several at one point the last is on top."""
    found = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        if len(fields := before.split(" ")) > 4 and after:
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
            found[point] = after.split(" ", 1)[0]
    return found


def _serve(shared: _Shared) -> None:
    """The thread of a `SharedLook`, until that is collected."""
    while (first := shared.queue.get()) is not None:
        waiters = [first]
        # Whoever is in the queue by now has come before the look begins; who comes later waits for the next one.
        with contextlib.suppress(Empty):
            while (waiter := shared.queue.get_nowait()) is not None:
                waiters.append(waiter)
            shared.queue.put(None)
        _look(shared)
        _tell(waiters)


def _hangs(shared: _Shared) -> bool:
    began_s = shared.began_s
    if began_s is None or time.monotonic() - began_s < shared.wait_s:
        return False
    if shared.told_s != began_s:
        shared.told_s = began_s
        _LOG.error("the registry's disk does not answer; requests go on with the last good content")
    return True


def _give_up(shared: _Shared, done: asyncio.Future[None], patience: int) -> None:
    """Let a request go on that waits for a disk that hangs; one that waits for a processor goes on waiting."""
    if patience <= 1 or _hangs(shared):
        _settle([done])
    elif not done.done():
        done.get_loop().call_later(shared.wait_s, _give_up, shared, done, patience - 1)


def _look(shared: _Shared) -> None:
    began_s = shared.began_s = time.monotonic()
    try:
        shared.look()
    except Exception:
        _LOG.exception("a look at the registry failed")
    shared.began_s = None
    took_s = time.monotonic() - began_s
    if took_s > shared.wait_s:
        _LOG.warning("the registry's disk answers again, after %.1f s", took_s)


def _tell(waiters: list[_Waiter]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for loop, done in waiters:
        by_loop.setdefault(loop, []).append(done)
    for loop, waiting in by_loop.items():
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            loop.call_soon_threadsafe(_settle, waiting)


def _settle(waiting: list[asyncio.Future[None]]) -> None:
    for done in waiting:
        if not done.done():
            done.set_result(None)
