"""Whether the files of a release are still those that were checked when it was loaded.

vLLM asks the resolver once per release. What it then drops from memory, to make room for others, it reads from disk again without
asking: an altered adapter would be served, and a missing one ends the engine for everybody. Invariant: a release whose files
have changed since it was first asked for is let through again only once their digests are the manifest's. Looking costs two `stat`
a second per release, in a thread where the disk may hang. A registry that cannot be read at all, or whose disk hangs, changes
nothing: what is in memory goes on being served. This module knows nothing about HTTP or vLLM.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from memupdate.layout import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, RegistryLayout
from memupdate.serving.background import WAIT_S, call_aside, may_hang, settled
from memupdate.serving.manifest import ReleaseEntry
from memupdate.storage import file_sha256

_LOOK_S = 1.0
_LOG = logging.getLogger("vllm.memupdate")
_Identity = tuple[tuple[int, int, int], ...]
_GONE: _Identity = ()


@dataclass
class _Seen:
    identity: _Identity
    is_whole: bool
    looked_s: float
    is_reading: bool = False
    """The files have changed and their digests are being computed: nobody can say yet whether they are whole."""


class ReleaseFiles:
    """The files of a registry's releases."""

    def __init__(self, layout: RegistryLayout) -> None:
        self._layout = layout
        self._may_hang = may_hang(layout.root)
        self._seen: dict[str, _Seen] = {}
        self._looks: dict[str, tuple[Future[None], float]] = {}
        """Release → the look in progress and when it began; the last one stays in it after its end."""

    async def are_whole(self, name: str, entry: ReleaseEntry) -> bool:
        """False where the files of release `name` have changed and are not what its manifest entry says."""
        now, seen = time.monotonic(), self._seen.get(name)
        if seen is not None and now - seen.looked_s < _LOOK_S:
            return seen.is_whole
        if self._may_hang or not self._is_known(name, self._identity(name)):
            await self._look_aside(name, entry, now)
        seen = self._seen.get(name)
        return seen is None or seen.is_whole

    async def _look_aside(self, name: str, entry: ReleaseEntry, now: float) -> None:
        look, began_s = self._looks.get(name, (None, now))
        if look is None or (look.done() and now - began_s >= _LOOK_S):
            look, began_s = call_aside(lambda: self._look(name, entry)), now
            self._looks[name] = (look, began_s)
        await settled(look, began_s + WAIT_S - now)
        seen = self._seen.get(name)
        if seen is not None and seen.is_reading:
            await settled(look, None)

    def _look(self, name: str, entry: ReleaseEntry) -> None:
        """In a thread, one at a time for each release."""
        identity = self._identity(name)
        if not self._is_known(name, identity) and identity is not None:
            self._read(name, entry, identity, self._seen[name])

    def _is_known(self, name: str, identity: _Identity | None) -> bool:
        """Whether nothing has to be read to tell what such files are; noted as looked at then."""
        seen = self._seen.get(name)
        if seen is None:
            # The resolver is about to check it, with all else that it checks.
            if identity:
                self._seen[name] = _Seen(identity, True, time.monotonic())
            return True
        if identity is not None and identity != seen.identity:
            return False
        seen.looked_s = time.monotonic()
        return True

    def _read(self, name: str, entry: ReleaseEntry, identity: _Identity, seen: _Seen) -> None:
        was_whole, seen.is_reading, seen.is_whole = seen.is_whole, True, False
        try:
            seen.is_whole = identity != _GONE and self._is_as_released(self._layout.release(name), entry)
            seen.identity = identity
        except OSError as error:
            # Refused, but read again at the next look: it may be the disk's fault.
            _LOG.warning("%s cannot be read (%s)", name, error)
        finally:
            seen.looked_s = time.monotonic()
            seen.is_reading = False
        if was_whole and not seen.is_whole:
            _LOG.error("%s is refused: its files are not what was released any more", name)

    def _identity(self, name: str) -> _Identity | None:
        """(mtime_ns, size, inode) of both files; `_GONE` where one is missing; None where that cannot be told."""
        folder = self._layout.release(name)
        try:
            found = [os.stat(folder / file) for file in (ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE)]
        except FileNotFoundError:
            # Of a registry that is not mounted nothing is there: that says nothing about one release.
            return _GONE if os.path.exists(self._layout.manifest) else None
        except OSError:
            return None
        return tuple((status.st_mtime_ns, status.st_size, status.st_ino) for status in found)

    def _is_as_released(self, folder: Path, entry: ReleaseEntry) -> bool:
        found = [file_sha256(folder / file) for file in (ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE)]
        return found == [entry.digest, entry.config_digest]
