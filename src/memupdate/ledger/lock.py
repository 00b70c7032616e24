"""One writer per workspace, and one at a time that changes its manifest: an exclusive `flock` on a file that says who holds it.

Two locks, as a batch that trains holds the first for hours, and a rollback must not wait for it: whatever moves an alias takes the
second for the moment of the change, and reads again what it changes. The second is always the inner one.

Invariant: the lock is the kernel's, not the file's content, so it is free the moment its process is gone, `kill -9`
included; the content only names the holder. The file itself is never deleted (deleting it would let two processes lock
two files of one name).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from memupdate.errors import WorkspaceLocked
from memupdate.layout import RegistryLayout
from memupdate.ledger.clock import utc_now
from memupdate.storage import readable_disk_errors

_PATIENCE_S = 0.5
"""How long to try: `lock_holder` takes the lock for an instant to look, which must not turn a writer away."""
_MANIFEST_PATIENCE_S = 20.0
"""Who holds the manifest is at most waiting for SQLite."""
_PAUSE_S = 0.02
_MAX_CONTENT_BYTES = 65_536

_held: set[int] = set()
"""Descriptors of locks that this process holds."""


@dataclass(frozen=True)
class LockHolder:
    """Who holds a workspace."""

    pid: int
    command: str
    host: str
    since_utc: str

    def describe(self) -> str:
        """One phrase for messages."""
        return f"`{self.command}` (process {self.pid} on {self.host}, since {self.since_utc})"


@contextmanager
def workspace_lock(path: Path, command: str, *, patience_s: float = _PATIENCE_S) -> Iterator[None]:
    """Hold the lock file at `path` for the block.

    Args:
        command: what the holder is doing, for the message that others get.
        patience_s: how long to try, seconds.

    Raises:
        WorkspaceLocked: another process, or another block of this one, holds it; the message names it.
        UsageError: the file cannot be written.
    """
    with readable_disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _try_lock(descriptor, patience_s):
            holder = _read_holder(descriptor)
            who = holder.describe() if holder else "another process"
            raise WorkspaceLocked(
                f"{path.parent}: locked by {who}", "wait for it to finish, or stop it; the lock ends with its process"
            )
        with readable_disk_errors(path):
            _write_holder(descriptor, LockHolder(os.getpid(), command, socket.gethostname(), utc_now()))
        _held.add(descriptor)
        try:
            yield
        finally:
            _held.discard(descriptor)
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def manifest_lock(registry: RegistryLayout, change: str) -> AbstractContextManager[None]:
    """Hold the manifest for the block, which reads it, changes it and writes it. Raises WorkspaceLocked where it is not to be had."""
    return workspace_lock(registry.lock, change, patience_s=_MANIFEST_PATIENCE_S)


def lock_holder(path: Path) -> LockHolder | None:
    """Who holds the lock now; None where nobody does. Never waits and never writes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        return _read_holder(descriptor) or LockHolder(0, "unknown", "unknown", "unknown")
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_PAUSE_S)


def _write_holder(descriptor: int, holder: LockHolder) -> None:
    content = (json.dumps(asdict(holder)) + "\n").encode()
    # In this order, since others may look at any moment: the file is never empty while the lock is held.
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))


def _read_holder(descriptor: int) -> LockHolder | None:
    try:
        data = json.loads(os.pread(descriptor, _MAX_CONTENT_BYTES, 0))
        return LockHolder(int(data["pid"]), str(data["command"]), str(data["host"]), str(data["since_utc"]))
    except (ValueError, KeyError, TypeError):
        return None  # caught between truncating and writing, or written by something else


def _close_in_child() -> None:
    # A forked worker shares the lock; were it to outlive us, it would hold the workspace for ever.
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
