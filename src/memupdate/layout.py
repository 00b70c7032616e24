"""Every name that memupdate gives to something on disk, in one place. Paths only; nothing here reads or writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

WORKSPACE_FILE = "memupdate.toml"
LEDGER_FILE = "ledger.db"
LOCK_FILE = "memupdate.lock"
MANIFEST_LOCK_FILE = "manifest.lock"
REGISTRY_DIR = "registry"
MANIFEST_FILE = "manifest.json"
RELEASES_DIR = "releases"
RELEASE_FILE = "memupdate.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
MATCHER_FILE = "matcher.json"
ACCESS_FILE = "access.json"
SLICES_DIR = "slices"
SLICE_WEIGHTS_FILE = "slice.safetensors"
CACHE_DIR = "cache"
LOGS_DIR = "logs"
ENGINE_FILE = "engine.json"

COLLECTION_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
"""Collections and aliases: lower-case ASCII, no separators that a path or a URL would read; at most 64 characters."""

RELEASE_PATTERN = re.compile(rf"(?P<collection>{COLLECTION_PATTERN.pattern})@v(?P<version>[1-9][0-9]{{0,8}})")
"""Releases: `acme@v7`. Match with `fullmatch` only, so that no model name reaches the file system otherwise."""


def release_name(collection: str, version: int) -> str:
    """The name of a release, for example `acme@v7`."""
    return f"{collection}@v{version}"


@dataclass(frozen=True)
class RegistryLayout:
    """Paths inside a registry folder: what the serving machines read, and all that they need."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / MANIFEST_FILE

    @property
    def lock(self) -> Path:
        """Held for the moment in which the manifest is changed; of no interest to readers."""
        return self.root / MANIFEST_LOCK_FILE

    @property
    def access(self) -> Path:
        """Which API keys may ask which collections; absent where none are bound."""
        return self.root / ACCESS_FILE

    @property
    def releases(self) -> Path:
        return self.root / RELEASES_DIR

    def release(self, name: str) -> Path:
        """Folder of a release; `name` must match `RELEASE_PATTERN` (ValueError otherwise), so it never escapes."""
        if RELEASE_PATTERN.fullmatch(name) is None:
            raise ValueError(f"not a release name: {name!r}")
        return self.releases / name


@dataclass(frozen=True)
class WorkspaceLayout:
    """Paths inside a workspace."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / WORKSPACE_FILE

    @property
    def ledger(self) -> Path:
        return self.root / LEDGER_FILE

    @property
    def lock(self) -> Path:
        return self.root / LOCK_FILE

    @property
    def registry(self) -> RegistryLayout:
        return RegistryLayout(self.root / REGISTRY_DIR)

    @property
    def slices(self) -> Path:
        return self.root / SLICES_DIR

    @property
    def cache(self) -> Path:
        """Files that may be deleted at any time; they are made again."""
        return self.root / CACHE_DIR

    @property
    def logs(self) -> Path:
        return self.root / LOGS_DIR

    @property
    def written_under_lock(self) -> tuple[Path, ...]:
        """Folders that only the holder of the lock writes to. The registry's own is written by who holds its manifest."""
        return (self.registry.releases, self.slices)

    @property
    def engine(self) -> Path:
        """What `serve` writes about the engine it runs: pid, URL."""
        return self.root / ENGINE_FILE
