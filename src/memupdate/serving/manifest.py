"""The registry's manifest: which releases exist and where each alias points. The alias is the only thing that moves.

Invariant: a `Manifest` held in memory is whole and consistent (every alias names a release in it), whatever state the
file is in; readers that find a torn, missing or foreign file keep the last good one. Only the holder of the workspace
lock writes. This module knows nothing about vLLM, HTTP or adapters' contents.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from memupdate.errors import UsageError
from memupdate.layout import COLLECTION_PATTERN, RELEASE_PATTERN
from memupdate.serving.last_good import LastGood, Unreadable, read_file
from memupdate.storage import write_text_atomic

SCHEMA_VERSION = 2
_READ_VERSIONS = (1, 2)
"""Version 1 had neither canaries nor routing; engines of that version refuse a file of version 2 and keep what they had."""
RELEASED = "released"
"""State of a release that engines may load."""
RETIRED = "retired"
"""State of a release that engines must answer with 404; its folder may be deleted."""
STATES = (RELEASED, RETIRED)
ALWAYS = "always"
"""Route of an alias: every request goes to the release."""
MATCHED = "matched"
"""Route of an alias: requests that mention nothing the release knows go to the untouched base model."""
ROUTES = (ALWAYS, MATCHED)

_DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
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
    matcher_digest: str | None = None
    """`sha256:…` of the release's `matcher.json`, by which `MATCHED` decides; None where it has none. The file's place is
    fixed, so that a manifest cannot make an engine read elsewhere."""


@dataclass(frozen=True)
class Canary:
    """A second release that an alias is being moved to."""

    release: str
    share: float
    """Of the conversations, above 0 and below 1."""


@dataclass(frozen=True)
class AliasEntry:
    """Where one alias points."""

    release: str
    previous: str | None = None
    """Where it pointed before the last move: what `rollback` goes back to."""
    canary: Canary | None = None
    """A second release for a share of the conversations."""
    route: str = ALWAYS
    """One of `ROUTES`."""


@dataclass(frozen=True)
class Move:
    """The last step of one alias. It is written with the step, so that a ledger can be told of it whenever a crash came."""

    kind: str
    """What was done, as the ledger's events name it."""
    release: str
    """The release that it was about."""
    generation: int
    """Of the manifest that it made."""
    at_utc: str
    detail: Mapping[str, str | float | bool | None] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Manifest:
    """A consistent snapshot of the registry."""

    base_fingerprint: str
    generation: int = 0
    """Grows by one with every change, so that an engine's view can be compared with the file."""
    aliases: Mapping[str, AliasEntry] = field(default_factory=lambda: MappingProxyType({}))
    releases: Mapping[str, ReleaseEntry] = field(default_factory=lambda: MappingProxyType({}))
    moves: Mapping[str, Move] = field(default_factory=lambda: MappingProxyType({}))
    """Alias → its last step; engines have no use for it."""

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


def with_alias(manifest: Manifest, alias: str, release: str, *, route: str | None = None) -> Manifest:
    """The manifest with all of `alias` pointing at `release`, the former target remembered as `previous`; a canary ends.

    Rolling back is `with_alias(manifest, alias, manifest.aliases[alias].previous)`: it can itself be undone the same
    way.

    Args:
        route: one of `ROUTES`; None leaves it as it is (`ALWAYS` for a new alias).

    Raises:
        ValueError: the alias is malformed, or the release is unknown or retired.
    """
    before = manifest.aliases.get(alias)
    if before is None:
        entry = AliasEntry(release, route=route or ALWAYS)
    elif before.release == release:
        entry = replace(before, canary=None, route=route or before.route)
    else:
        entry = AliasEntry(release, previous=before.release, route=route or before.route)
    return _with_entry(manifest, alias, entry)


def with_canary(manifest: Manifest, alias: str, canary: Canary | None) -> Manifest:
    """The manifest with `canary` taking its share of `alias`; None ends the one that runs, and all go to the release again.

    Promoting is `with_alias(manifest, alias, canary.release)`.

    Raises:
        ValueError: no such alias, or the canary is malformed, unknown, retired, or what the alias points at already.
    """
    if alias not in manifest.aliases:
        raise ValueError(f"{alias} is not in the manifest")
    return _with_entry(manifest, alias, replace(manifest.aliases[alias], canary=canary))


def with_retired(manifest: Manifest, name: str) -> Manifest:
    """The manifest with release `name` retired: engines answer 404 for it.

    Raises:
        ValueError: the release is unknown, or an alias or a canary still points at it.
    """
    entry = manifest.releases.get(name)
    if entry is None:
        raise ValueError(f"{name} is not in the manifest")
    if entry.state == RETIRED:
        return manifest
    return _changed(manifest, releases={**manifest.releases, name: replace(entry, state=RETIRED)})


def with_revived(manifest: Manifest, name: str) -> Manifest:
    """The manifest with a retired release `name` open to engines again. Raises ValueError where it is unknown."""
    entry = manifest.releases.get(name)
    if entry is None:
        raise ValueError(f"{name} is not in the manifest")
    if entry.state == RELEASED:
        return manifest
    return _changed(manifest, releases={**manifest.releases, name: replace(entry, state=RELEASED)})


def with_entry(manifest: Manifest, alias: str, entry: AliasEntry | None) -> Manifest:
    """The manifest with the alias as it was before some step; None: as if it had never been. Raises ValueError."""
    if entry is not None:
        return _with_entry(manifest, alias, entry)
    return _changed(manifest, aliases={name: kept for name, kept in manifest.aliases.items() if name != alias})


def with_move(manifest: Manifest, alias: str, move: Move) -> Manifest:
    """The manifest, which a step has just made, with that step named in it; no step of its own."""
    return replace(manifest, moves=_frozen({**manifest.moves, alias: move}))


def with_matcher(manifest: Manifest, name: str, digest: str) -> Manifest:
    """The manifest with another matcher for release `name`: the only thing of a release that may change, as when a fact is
    purged.

    Raises:
        ValueError: the release is unknown, or the digest is none.
    """
    entry = manifest.releases.get(name)
    if entry is None:
        raise ValueError(f"{name} is not in the manifest")
    if entry.matcher_digest == digest:
        return manifest
    return _changed(manifest, releases={**manifest.releases, name: replace(entry, matcher_digest=digest)})


def manifest_json(manifest: Manifest) -> str:
    """The manifest as the text of `manifest.json`."""
    value = {
        "schema_version": SCHEMA_VERSION,
        "generation": manifest.generation,
        "base_fingerprint": manifest.base_fingerprint,
        "aliases": {name: asdict(entry) for name, entry in manifest.aliases.items()},
        "releases": {name: asdict(entry) for name, entry in manifest.releases.items()},
        "moves": {name: {**vars(move), "detail": dict(move.detail)} for name, move in manifest.moves.items()},
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
    if version not in _READ_VERSIONS or isinstance(version, bool):
        known = " and ".join(str(number) for number in _READ_VERSIONS)
        raise ValueError(f"schema_version is {version!r}, this memupdate reads {known}")
    manifest = Manifest(
        base_fingerprint=_text(root, "base_fingerprint", "the document"),
        generation=_integer(root, "generation", "the document", minimum=0),
        aliases=_frozen({name: _parse_alias(name, entry) for name, entry in _dict_at(root, "aliases").items()}),
        releases=_frozen({name: _parse_release(name, entry) for name, entry in _dict_at(root, "releases").items()}),
        moves=_frozen({name: _parse_move(name, move) for name, move in _dict(root.get("moves", {}), "moves").items()}),
    )
    _check(manifest)
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest at `path`.

    Raises:
        ManifestError: missing, unreadable, torn or inconsistent.
    """
    try:
        return read_file(path, parse_manifest)[0]
    except Unreadable as error:
        raise ManifestError(str(error), "publish again, or restore the file from a backup") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest at `path` atomically; the caller holds its lock.

    Raises:
        UsageError: the disk is full or the folder cannot be written to.
        ValueError: the manifest is inconsistent (nothing is written).
    """
    _check(manifest)
    write_text_atomic(path, manifest_json(manifest))


def manifest_cache(path: Path) -> LastGood[Manifest]:
    """The manifest at `path`, parsed once per change; the last good one stays in force while the file is torn or missing."""
    return LastGood(path, lambda content: parse_manifest(content))


def _with_entry(manifest: Manifest, alias: str, entry: AliasEntry) -> Manifest:
    if manifest.aliases.get(alias) == entry:
        return manifest
    return _changed(manifest, aliases={**manifest.aliases, alias: entry})


def _changed(
    manifest: Manifest,
    *,
    aliases: dict[str, AliasEntry] | None = None,
    releases: dict[str, ReleaseEntry] | None = None,
) -> Manifest:
    changed = replace(
        manifest,
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
        _check_release(name, release)
        other = by_id.setdefault(release.lora_int_id, name)
        if other != name:
            raise ValueError(f"{name} and {other} share lora_int_id {release.lora_int_id}")
    for alias, entry in manifest.aliases.items():
        _check_alias(manifest, alias, entry)


def _check_release(name: str, release: ReleaseEntry) -> None:
    if RELEASE_PATTERN.fullmatch(name) is None:
        raise ValueError(f"not a release name: {name!r}")
    if release.rank < 1 or release.lora_int_id < 1:
        raise ValueError(f"{name}: rank and lora_int_id must be at least 1")
    for digest in (release.digest, release.config_digest, release.matcher_digest):
        if digest is not None and _DIGEST_PATTERN.fullmatch(digest) is None:
            raise ValueError(f"{name}: not a digest: {digest!r}")
    if release.state not in STATES:
        raise ValueError(f"{name}: state {release.state!r} is none of {', '.join(STATES)}")


def _check_alias(manifest: Manifest, alias: str, entry: AliasEntry) -> None:
    if COLLECTION_PATTERN.fullmatch(alias) is None:
        raise ValueError(f"not an alias: {alias!r}")
    if entry.route not in ROUTES:
        raise ValueError(f"alias {alias}: route {entry.route!r} is none of {', '.join(ROUTES)}")
    targets = [("alias", entry.release)]
    if entry.canary is not None:
        if not 0 < entry.canary.share < 1:
            raise ValueError(f"canary of {alias}: share is {entry.canary.share!r}; allowed: above 0 and below 1")
        if entry.canary.release == entry.release:
            raise ValueError(f"canary of {alias} is {entry.release}, what the alias points at already")
        targets.append(("canary of", entry.canary.release))
    for what, name in targets:
        target = manifest.releases.get(name)
        if target is None:
            raise ValueError(f"{what} {alias} points at {name}, which is not in the manifest")
        if target.state == RETIRED:
            raise ValueError(f"{what} {alias} points at {name}, which is retired")


def _parse_alias(name: str, value: Any) -> AliasEntry:
    where = f"aliases.{name}"
    entry = _dict(value, where)
    return AliasEntry(
        release=_text(entry, "release", where),
        previous=_text_or_null(entry, "previous", where),
        canary=_parse_canary(entry.get("canary"), f"{where}.canary"),
        route=_text(entry, "route", where) if "route" in entry else ALWAYS,
    )


def _parse_canary(value: Any, where: str) -> Canary | None:
    if value is None:
        return None
    entry = _dict(value, where)
    share = entry.get("share")
    if not isinstance(share, int | float) or isinstance(share, bool):
        raise ValueError(f"{where}: share must be a number")
    return Canary(_text(entry, "release", where), float(share))


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
        matcher_digest=_text_or_null(entry, "matcher_digest", where),
    )


def _parse_move(alias: str, value: Any) -> Move:
    where = f"moves.{alias}"
    move = _dict(value, where)
    detail = _dict(move.get("detail"), f"{where}.detail")
    for name, item in detail.items():
        plain = item is None or isinstance(item, str | bool | int) or (isinstance(item, float) and math.isfinite(item))
        if not plain:
            raise ValueError(f"{where}.detail: {name} must be text or a number")
    return Move(
        kind=_text(move, "kind", where),
        release=_text(move, "release", where),
        generation=_integer(move, "generation", where, minimum=0),
        at_utc=_text(move, "at_utc", where),
        detail=_frozen(detail),
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


def _text_or_null(value: dict[str, Any], key: str, where: str) -> str | None:
    return None if value.get(key) is None else _text(value, key, where)


def _integer(value: dict[str, Any], key: str, where: str, *, minimum: int) -> int:
    found = value.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < minimum:
        raise ValueError(f"{where}: {key} must be a whole number of at least {minimum}")
    return found


def _frozen(mapping: dict[str, _T]) -> Mapping[str, _T]:
    return MappingProxyType(mapping)
