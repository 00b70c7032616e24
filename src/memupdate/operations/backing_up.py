"""Backup and restore: a workspace's ledger, releases, slices and settings as one tar file, taken while others go on writing.

Invariant: a backup is whole or not there, and everything that its ledger names is in it with the digest that the ledger
says. The ledger is copied first, by SQLite's online backup, at one moment; releases and slices are written before the
rows that name them and never change, so whatever that copy names can be copied afterwards. The manifest is read before
it, and so names no release that the ledger does not have yet. A restored workspace holds the bytes of the backup, or is
not there. Caches, logs, and where an engine runs are left out: they are made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from memupdate import __version__
from memupdate.errors import LedgerError, UsageError
from memupdate.layout import (
    ADAPTER_WEIGHTS_FILE,
    LEDGER_FILE,
    MANIFEST_FILE,
    REGISTRY_DIR,
    SLICE_WEIGHTS_FILE,
    WORKSPACE_FILE,
    WorkspaceLayout,
)
from memupdate.ledger.ledger import Ledger
from memupdate.operations.config import load_config
from memupdate.operations.reports import Report
from memupdate.storage import file_sha256, fsync_dir, new_dir_atomic, readable_disk_errors

INDEX_FILE = "backup.json"
"""The last file of a backup: what is in it, with digests."""
_SCHEMA_VERSION = 1
_CHUNK_BYTES = 1 << 20
_MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True)
class BackupReport(Report):
    """A backup that was made, or brought back."""

    file: str
    workspace: str
    size_bytes: int
    files: int
    releases: int
    made_at_utc: str
    """The moment whose ledger is in it."""
    duration_s: float


def back_up(layout: WorkspaceLayout, file: Path) -> BackupReport:
    """Write a backup of the workspace to `file`; needs no lock, and holds no writer up.

    Raises:
        UsageError: `file` is there already, or cannot be written.
        LedgerError: the ledger is damaged, or a file that it names is missing or differs from its digest; all are listed.
    """
    started = time.monotonic()
    if file.exists():
        raise UsageError(f"{file}: is there already", "give another name; a backup is never written over")
    if not file.parent.is_dir():
        raise UsageError(f"{file.parent}: no such folder", "make it first, or give another place")
    config = load_config(layout.root)
    manifest = layout.registry.manifest.read_bytes() if layout.registry.manifest.is_file() else None
    with readable_disk_errors(file), tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
        snapshot, archive = Path(folder) / LEDGER_FILE, Path(folder) / "backup.tar"
        with Ledger.open(layout.ledger, readonly=True) as ledger:
            made_at = ledger.copy_to(snapshot)
        with Ledger.open(snapshot, readonly=True) as copied:
            if damage := copied.verify_file():
                raise LedgerError(f"{layout.ledger}: the ledger is damaged; no backup was made", "", damage)
            releases, slices = copied.releases(), copied.newest_slices()
        expected = {f"{r.relative_path}/{ADAPTER_WEIGHTS_FILE}": r.digest for r in releases}
        expected |= {f"{s.relative_path}/{SLICE_WEIGHTS_FILE}": s.sha256 for s in slices}
        _refuse_missing(layout.root, expected)
        with archive.open("wb") as raw, tarfile.open(fileobj=raw, mode="w") as tar:
            writer = _Writer(tar)
            writer.add(LEDGER_FILE, snapshot)
            for name in dict.fromkeys((WORKSPACE_FILE, config.policy, config.probes)):
                if name and (layout.root / name).is_file():
                    writer.add(name, layout.root / name)
            if manifest is not None:
                writer.add_bytes(f"{REGISTRY_DIR}/{MANIFEST_FILE}", manifest)
            for kept in dict.fromkeys([*(r.relative_path for r in releases), *(s.relative_path for s in slices)]):
                for path in sorted((layout.root / kept).rglob("*")):
                    if path.is_file():
                        writer.add(path.relative_to(layout.root).as_posix(), path)
            changed = [name for name, digest in expected.items() if writer.digests[name] != digest]
            if changed:
                raise _broken([f"{name}: differs from the digest in the ledger" for name in changed])
            index = {
                "schema_version": _SCHEMA_VERSION,
                "memupdate_version": __version__,
                "made_at_utc": made_at,
                "releases": len(releases),
                "files": writer.digests,
            }
            writer.add_bytes(INDEX_FILE, json.dumps(index, indent=2).encode())
        with archive.open("rb") as written:
            os.fsync(written.fileno())
        size = archive.stat().st_size
        os.replace(archive, file)
        fsync_dir(file.parent)
    return BackupReport(
        file=str(file),
        workspace=str(layout.root),
        size_bytes=size,
        files=len(writer.digests),
        releases=len(releases),
        made_at_utc=made_at,
        duration_s=time.monotonic() - started,
    )


def _refuse_missing(root: Path, expected: dict[str, str]) -> None:
    missing = [f"{name}: missing" for name in expected if not (root / name).is_file()]
    if missing:
        raise _broken(missing)


def _broken(problems: list[str]) -> LedgerError:
    count = "a file" if len(problems) == 1 else f"{len(problems)} files"
    return LedgerError(
        f"{count} that the ledger names cannot be backed up as it should be; no backup was made",
        "see `memupdate ledger verify`; bring the files back from an earlier backup",
        problems,
    )


class _Writer:
    """Adds files to a tar and keeps the digest of the very bytes that went in."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.digests: dict[str, str] = {}

    def add(self, name: str, path: Path) -> None:
        with path.open("rb") as file:
            self._add(name, file, os.fstat(file.fileno()).st_size)

    def add_bytes(self, name: str, content: bytes) -> None:
        self._add(name, io.BytesIO(content), len(content))

    def _add(self, name: str, file: IO[bytes], size: int) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o644, int(time.time())
        hashing = _Hashing(file)
        self._tar.addfile(info, hashing)
        self.digests[name] = hashing.digest


class _Hashing:
    """A file whose reader's bytes are hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._hash.update(chunk)
        return chunk

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


def restore(file: Path, to: Path) -> BackupReport:
    """Bring a backup back as a workspace in `to`, which must be empty or not there.

    Raises:
        UsageError: `to` is in use; or `file` is no backup, is torn, or holds bytes that differ from their digests.
    """
    started = time.monotonic()
    to = to.resolve()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"{to}: is not empty", "give a folder that is empty or not there yet")
    with _opened(file) as tar, readable_disk_errors(to):
        if to.exists():
            to.rmdir()
        with new_dir_atomic(to) as folder:
            digests, index = _extract(file, tar, folder)
            wrong = [
                f"{name}: {'missing' if name not in digests else 'differs from its digest'}"
                for name, digest in index["files"].items()
                if digests.get(name) != digest
            ]
            wrong += [f"{name}: not in the backup's index" for name in digests if name not in index["files"]]
            if wrong:
                raise UsageError(f"{file}: the backup is damaged; nothing was restored", "use another backup", wrong)
            (folder / REGISTRY_DIR).mkdir(exist_ok=True)
    return BackupReport(
        file=str(file),
        workspace=str(to),
        size_bytes=file.stat().st_size,
        files=len(digests),
        releases=int(index["releases"]),
        made_at_utc=str(index["made_at_utc"]),
        duration_s=time.monotonic() - started,
    )


@contextmanager
def _opened(file: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(file, mode="r:") as tar:
            yield tar
    except FileNotFoundError as error:
        raise UsageError(f"{file}: no such file", "give a file that `memupdate ledger backup` wrote") from error
    except (tarfile.TarError, EOFError) as error:
        raise UsageError(
            f"{file}: not a backup, or a torn one ({error})", "give a file that `memupdate ledger backup` wrote"
        ) from error


def _extract(file: Path, tar: tarfile.TarFile, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Write every file below `folder`; returns the digests of what was written, and the index."""
    digests: dict[str, str] = {}
    for member in tar:
        name = PurePosixPath(member.name)
        source = tar.extractfile(member) if member.isfile() else None
        if source is None or name.is_absolute() or ".." in name.parts or member.name in digests:
            raise UsageError(f"{file}: {member.name!r} has no place in a backup; nothing was restored", "")
        if member.name == INDEX_FILE:
            return digests, _parse_index(file, source.read(_MAX_INDEX_BYTES))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                target.write(chunk)
        digests[member.name] = file_sha256(path)
    raise UsageError(f"{file}: not a backup, or a torn one (it has no {INDEX_FILE})", "use another backup")


def _parse_index(file: Path, content: bytes) -> dict[str, Any]:
    try:
        index = json.loads(content)
        version = index["schema_version"]
        ok = isinstance(index["files"], dict) and LEDGER_FILE in index["files"] and isinstance(index["releases"], int)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file}: its {INDEX_FILE} cannot be read ({error})", "use another backup") from error
    if version != _SCHEMA_VERSION or not ok:
        raise UsageError(f"{file}: written by another version of memupdate", "upgrade memupdate")
    return dict(index)
