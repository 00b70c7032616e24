"""Whether the files of a release are still those that were checked when it was loaded.

vLLM asks the resolver once per release. What it then drops from memory, to make room for others, it reads from disk again without
asking: an altered adapter would be served, and a missing one ends the engine for everybody. Invariant: a release whose files
have changed since it was first asked for is let through again only once their digests are the manifest's. Looking costs two `stat`
a second per release. A registry that cannot be read at all changes nothing: what is in memory goes on being served.
This module knows nothing about HTTP or vLLM.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from memupdate.layout import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, RegistryLayout
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


class ReleaseFiles:
    """The files of a registry's releases."""

    def __init__(self, layout: RegistryLayout) -> None:
        self._layout = layout
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()

    async def are_whole(self, name: str, entry: ReleaseEntry) -> bool:
        """False where the files of release `name` have changed and are not what its manifest entry says."""
        now, seen = time.monotonic(), self._seen.get(name)
        if seen is not None and now - seen.looked_s < _LOOK_S:
            return seen.is_whole
        identity = self._identity(name)
        if seen is None:
            # The resolver is about to check it, with all else that it checks.
            if identity:
                self._seen[name] = _Seen(identity, True, now)
            return True
        if identity is None or identity == seen.identity:
            seen.looked_s = now
            return seen.is_whole
        return await asyncio.to_thread(self._look_again, name, entry, identity)

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

    def _look_again(self, name: str, entry: ReleaseEntry, identity: _Identity) -> bool:
        with self._lock:
            seen = self._seen[name]
            if seen.identity != identity:
                seen.is_whole = identity != _GONE and self._is_as_released(self._layout.release(name), entry)
                seen.identity = identity
                if not seen.is_whole:
                    _LOG.error("%s is refused: its files are not what was released any more", name)
            seen.looked_s = time.monotonic()
            return seen.is_whole

    def _is_as_released(self, folder: Path, entry: ReleaseEntry) -> bool:
        try:
            found = [file_sha256(folder / file) for file in (ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE)]
        except OSError:
            return False
        return found == [entry.digest, entry.config_digest]
