"""The registry's manifest: which releases exist and where each alias points. The alias is the only thing that moves.

Invariant: a `Manifest` held in memory is whole and consistent (every alias names a release in it), whatever state the
file is in; readers that find a torn, missing or foreign file keep the last good one. Only the holder of the workspace
lock writes. This module knows nothing about vLLM, HTTP or adapters' contents.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from memupdate.errors import UsageError
from memupdate.layout import COLLECTION_PATTERN, RELEASE_PATTERN
from memupdate.storage import write_text_atomic

SCHEMA_VERSION = 1
RELEASED = "released"
"""State of a release that engines may load."""
RETIRED = "retired"
"""State of a release that engines must answer with 404; its folder may be deleted."""
STATES = (RELEASED, RETIRED)

_DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_MANIFEST_BYTES = 64 << 20
_LOG = logging.getLogger("memupdate.manifest")
_T = TypeVar("_T")


class ManifestError(UsageError):
    """The manifest is missing, torn, inconsistent, or written by a newer memupdate."""


@dataclass(frozen=True)
class ReleaseEntry:
    """One immutable release, as engines need to know it."""

    digest: str
    """`sha256:…` of `adapter_model.safetensors`."""
    config_digest: str
    """`sha256:…` of `adapter_config.json`."""
    rank: int
    lora_int_id: int
    """Positive, unique in the manifest, the same on every engine and after every restart."""
    base_fingerprint: str
    """Which base model the release belongs to."""
    state: str = RELEASED


@dataclass(frozen=True)
class AliasEntry:
    """Where one alias points."""

    release: str
    previous: str | None = None
    """Where it pointed before the last move: what `rollback` goes back to."""
    canary: None = None
    """Reserved: shares of traffic for a second release. Always null in schema version 1."""


@dataclass(frozen=True)
class Manifest:
    """A consistent snapshot of the registry."""

    base_fingerprint: str
    generation: int = 0
    """Grows by one with every change, so that an engine's view can be compared with the file."""
    aliases: Mapping[str, AliasEntry] = field(default_factory=lambda: MappingProxyType({}))
    releases: Mapping[str, ReleaseEntry] = field(default_factory=lambda: MappingProxyType({}))

    def next_lora_int_id(self) -> int:
        """The smallest id above all that were ever given out here (retired releases keep theirs)."""
        return 1 + max((entry.lora_int_id for entry in self.releases.values()), default=0)


def with_release(manifest: Manifest, name: str, entry: ReleaseEntry) -> Manifest:
    """The manifest with one more release. The same release again changes nothing.

    Raises:
        ValueError: the name is no release name, is taken by other content, or the entry is malformed.
    """
    if manifest.releases.get(name) == entry:
        return manifest
    if name in manifest.releases:
        raise ValueError(f"{name} is already in the manifest with other content; releases are immutable")
    return _changed(manifest, releases={**manifest.releases, name: entry})


def with_alias(manifest: Manifest, alias: str, release: str) -> Manifest:
    """The manifest with `alias` pointing at `release`, the former target remembered as `previous`.

    Rolling back is `with_alias(manifest, alias, manifest.aliases[alias].previous)`: it can itself be undone the same
    way.

    Raises:
        ValueError: the alias is malformed, or the release is unknown or retired.
    """
    before = manifest.aliases.get(alias)
    if before is not None and before.release == release:
        return manifest
    entry = AliasEntry(release, previous=before.release if before else None)
    return _changed(manifest, aliases={**manifest.aliases, alias: entry})


def with_retired(manifest: Manifest, name: str) -> Manifest:
    """The manifest with release `name` retired: engines answer 404 for it.

    Raises:
        ValueError: the release is unknown, or an alias still points at it.
    """
    entry = manifest.releases.get(name)
    if entry is None:
        raise ValueError(f"{name} is not in the manifest")
    if entry.state == RETIRED:
        return manifest
    return _changed(manifest, releases={**manifest.releases, name: replace(entry, state=RETIRED)})


def manifest_json(manifest: Manifest) -> str:
    """The manifest as the text of `manifest.json`."""
    value = {
        "schema_version": SCHEMA_VERSION,
        "generation": manifest.generation,
        "base_fingerprint": manifest.base_fingerprint,
        "aliases": {name: asdict(entry) for name, entry in manifest.aliases.items()},
        "releases": {name: asdict(entry) for name, entry in manifest.releases.items()},
    }
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def parse_manifest(text: str | bytes) -> Manifest:
    """The manifest in `text`; keys that this version does not know are ignored.

    Raises:
        ValueError: not JSON, another schema version, or inconsistent.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    root = _dict(value, "the document")
    version = root.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ValueError(f"schema_version is {version!r}, this memupdate reads {SCHEMA_VERSION}")
    manifest = Manifest(
        base_fingerprint=_text(root, "base_fingerprint", "the document"),
        generation=_integer(root, "generation", "the document", minimum=0),
        aliases=_frozen({name: _parse_alias(name, entry) for name, entry in _dict_at(root, "aliases").items()}),
        releases=_frozen({name: _parse_release(name, entry) for name, entry in _dict_at(root, "releases").items()}),
    )
    _check(manifest)
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest at `path`.

    Raises:
        ManifestError: missing, unreadable, torn or inconsistent.
    """
    return _read(path)[0]


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest at `path` atomically; the caller holds the workspace lock.

    Raises:
        UsageError: the disk is full or the folder cannot be written to.
        ValueError: the manifest is inconsistent (nothing is written).
    """
    _check(manifest)
    write_text_atomic(path, manifest_json(manifest))


_Identity = tuple[int, int, int]


class ManifestCache:
    """The manifest at `path`, read again only when (mtime_ns, size, inode) changes: one `stat` per call otherwise.

    A torn, missing or foreign file is logged once per state it is seen in, and the last good manifest stays in force.
    `get` never raises. Safe to share between threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: _Identity | None = None
        self._good: Manifest | None = None
        self._missing_logged = False
        self._lock = threading.Lock()

    def get(self) -> Manifest | None:
        """The last good manifest; None as long as there has never been one."""
        try:
            identity = _identity(os.stat(self.path))
        except (OSError, ValueError) as error:
            self._log_missing(error)
            return self._good
        if identity != self._seen:
            self._reload(identity)
        return self._good

    def _reload(self, identity: _Identity) -> None:
        with self._lock:
            if identity == self._seen:
                return
            try:
                manifest, read_identity = _read(self.path)
            except ManifestError as error:
                # Remembered as seen, so that a broken file is not parsed again for every request.
                self._seen = identity
                kept = "none so far" if self._good is None else f"generation {self._good.generation}"
                _LOG.warning("%s; keeping the last good manifest (%s)", error.message, kept)
                return
            self._good = manifest
            self._seen = read_identity
            self._missing_logged = False
            _LOG.info("read manifest generation %d of %s", manifest.generation, self.path)

    def _log_missing(self, error: Exception) -> None:
        if not self._missing_logged:
            self._missing_logged = True
            # Forget what was seen: a file that comes back is read even if its identity is the same.
            self._seen = None
            _LOG.warning("%s: cannot be read (%s); keeping the last good manifest", self.path, error)


def _read(path: Path) -> tuple[Manifest, _Identity]:
    """The manifest and the identity of exactly the file that was read."""
    try:
        with path.open("rb") as file:
            identity = _identity(os.fstat(file.fileno()))
            content = file.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise ManifestError(f"{path}: there is no manifest") from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read ({error})") from error
    if len(content) > _MAX_MANIFEST_BYTES:
        raise ManifestError(f"{path}: larger than {_MAX_MANIFEST_BYTES} bytes")
    try:
        return parse_manifest(content), identity
    except ValueError as error:
        raise ManifestError(f"{path}: {error}", "publish again, or restore the file from a backup") from error


def _identity(status: os.stat_result) -> _Identity:
    return (status.st_mtime_ns, status.st_size, status.st_ino)


def _changed(
    manifest: Manifest,
    *,
    aliases: dict[str, AliasEntry] | None = None,
    releases: dict[str, ReleaseEntry] | None = None,
) -> Manifest:
    changed = Manifest(
        base_fingerprint=manifest.base_fingerprint,
        generation=manifest.generation + 1,
        aliases=_frozen(aliases) if aliases is not None else manifest.aliases,
        releases=_frozen(releases) if releases is not None else manifest.releases,
    )
    _check(changed)
    return changed


def _check(manifest: Manifest) -> None:
    """Raise ValueError unless the manifest is consistent."""
    if not manifest.base_fingerprint:
        raise ValueError("base_fingerprint is empty")
    by_id: dict[int, str] = {}
    for name, release in manifest.releases.items():
        if RELEASE_PATTERN.fullmatch(name) is None:
            raise ValueError(f"not a release name: {name!r}")
        if release.rank < 1 or release.lora_int_id < 1:
            raise ValueError(f"{name}: rank and lora_int_id must be at least 1")
        for digest in (release.digest, release.config_digest):
            if _DIGEST_PATTERN.fullmatch(digest) is None:
                raise ValueError(f"{name}: not a digest: {digest!r}")
        if release.state not in STATES:
            raise ValueError(f"{name}: state {release.state!r} is none of {', '.join(STATES)}")
        other = by_id.setdefault(release.lora_int_id, name)
        if other != name:
            raise ValueError(f"{name} and {other} share lora_int_id {release.lora_int_id}")
    for alias, entry in manifest.aliases.items():
        if COLLECTION_PATTERN.fullmatch(alias) is None:
            raise ValueError(f"not an alias: {alias!r}")
        target = manifest.releases.get(entry.release)
        if target is None:
            raise ValueError(f"alias {alias} points at {entry.release}, which is not in the manifest")
        if target.state == RETIRED:
            raise ValueError(f"alias {alias} points at {entry.release}, which is retired")


def _parse_alias(name: str, value: Any) -> AliasEntry:
    entry = _dict(value, f"aliases.{name}")
    if entry.get("canary") is not None:
        raise ValueError(f"aliases.{name}.canary: this memupdate does not split traffic")
    previous = entry.get("previous")
    if previous is not None and not isinstance(previous, str):
        raise ValueError(f"aliases.{name}.previous: expected text or null")
    return AliasEntry(_text(entry, "release", f"aliases.{name}"), previous)


def _parse_release(name: str, value: Any) -> ReleaseEntry:
    where = f"releases.{name}"
    entry = _dict(value, where)
    return ReleaseEntry(
        digest=_text(entry, "digest", where),
        config_digest=_text(entry, "config_digest", where),
        rank=_integer(entry, "rank", where, minimum=1),
        lora_int_id=_integer(entry, "lora_int_id", where, minimum=1),
        base_fingerprint=_text(entry, "base_fingerprint", where),
        state=_text(entry, "state", where),
    )


def _dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object")
    return value


def _dict_at(root: dict[str, Any], key: str) -> dict[str, Any]:
    return _dict(root.get(key), key)


def _text(value: dict[str, Any], key: str, where: str) -> str:
    found = value.get(key)
    if not isinstance(found, str) or not found:
        raise ValueError(f"{where}: {key} must be text")
    return found


def _integer(value: dict[str, Any], key: str, where: str, *, minimum: int) -> int:
    found = value.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < minimum:
        raise ValueError(f"{where}: {key} must be a whole number of at least {minimum}")
    return found


def _frozen(mapping: dict[str, _T]) -> Mapping[str, _T]:
    return MappingProxyType(mapping)
