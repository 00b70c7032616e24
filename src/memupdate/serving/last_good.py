"""A small file that others replace while we read it: parsed once per change, the last good content kept in force.

Invariant: `get` never raises and costs one `stat` while the file stays as it is; a torn, missing or foreign file is
logged once per state it is seen in. What was wrong with the content is remembered until the file changes; what was wrong
with the disk is tried again by the next `get`. Safe to share between threads. This module does not know what is in the
file.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

_MAX_BYTES = 64 << 20
_LOG = logging.getLogger("memupdate.registry")
_T = TypeVar("_T")
_Identity = tuple[int, int, int]


class Unreadable(Exception):
    """The file is missing, cannot be read, or is not what its parser accepts; one line says which."""


class _Unreachable(Unreadable):
    """The file could not be read just now, which says nothing about what is in it: the next try may do better."""


class LastGood(Generic[_T]):
    """The content of the file at `path`, read again only when (mtime_ns, size, inode) changes.

    Args:
        parse: bytes → content; raises ValueError for what it does not accept.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], _T]) -> None:
        self.path = path
        self._parse = parse
        self._seen: _Identity | None = None
        self._good: _T | None = None
        self._told: str | None = None
        self._lock = threading.Lock()

    @property
    def last(self) -> _T | None:
        """What the last `get` found, without a look at the disk."""
        return self._good

    def get(self) -> _T | None:
        """The last good content; None as long as there has never been one. Asks the disk, which may hang."""
        try:
            identity = _identity(os.stat(self.path))
        except (OSError, ValueError) as error:
            # Forget what was seen: a file that comes back is read even if its identity is the same.
            self._seen = None
            self._tell(f"{self.path}: cannot be read ({error})")
            return self._good
        if identity != self._seen:
            self._reload(identity)
        return self._good

    def _reload(self, identity: _Identity) -> None:
        with self._lock:
            if identity == self._seen:
                return
            try:
                content, read_identity = read_file(self.path, self._parse)
            except _Unreachable as error:
                # Not remembered: too many open files, or a network disk's moment of weakness, must not hide a flip.
                self._tell(str(error))
                return
            except Unreadable as error:
                # Remembered as seen, so that a broken file is not parsed again for every request.
                self._seen = identity
                self._tell(str(error))
                return
            self._good = content
            self._seen = read_identity
            self._told = None
            _LOG.info("read %s", self.path)

    def _tell(self, trouble: str) -> None:
        """Once per trouble, not once per request."""
        if self._told != trouble:
            self._told = trouble
            _LOG.warning("%s; keeping %s", trouble, "nothing" if self._good is None else "the last good content")


def read_file(path: Path, parse: Callable[[bytes], _T]) -> tuple[_T, _Identity]:
    """The content, and the identity of exactly the file that was read. Raises Unreadable."""
    try:
        with path.open("rb") as file:
            identity = _identity(os.fstat(file.fileno()))
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise _Unreachable(f"{path}: not there") from None
    except (OSError, ValueError) as error:
        raise _Unreachable(f"{path}: cannot be read ({error})") from error
    if len(content) > _MAX_BYTES:
        raise Unreadable(f"{path}: larger than {_MAX_BYTES} bytes")
    try:
        return parse(content), identity
    except ValueError as error:
        raise Unreadable(f"{path}: {error}") from error


def _identity(status: os.stat_result) -> _Identity:
    return (status.st_mtime_ns, status.st_size, status.st_ino)
