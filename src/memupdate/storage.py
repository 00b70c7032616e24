"""Files that are either wholly there or not there: atomic writes, fsync, tagged digests.

Invariant: a path returned by a function here names complete content, also after `kill -9` or a power cut at any moment.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memupdate.errors import UsageError

_CHUNK_BYTES = 1 << 20
_TEMPORARY = ".partial"
"""How names of files and folders end that are not complete yet; they begin with a dot."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values have equal text. Raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def text_sha256(text: str) -> str:
    """Tagged digest `sha256:<hex>` of UTF-8 text (lone surrogates kept, so that any string has a digest)."""
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_sha256(path: Path) -> str:
    """Tagged digest `sha256:<hex>` of a file's bytes, read in constant memory. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return "sha256:" + digest.hexdigest()


def fsync_dir(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ensure_dir(path: Path) -> None:
    """Make `path` and what is missing above it, durably: a folder is as lost as its entry in its parent. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_dir(folder.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`, UTF-8. Raises UsageError: the disk is full or the folder cannot be written to."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: temporary file beside it, fsync, rename, fsync of the folder.

    Raises:
        UsageError: the disk is full or the folder cannot be written to.
    """
    with readable_disk_errors(path):
        ensure_dir(path.parent)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


@contextmanager
def new_dir_atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it is fsynced and renamed to `path`, otherwise removed.

    What a killed process left is removed by `remove_leftovers`.

    Raises:
        FileExistsError: `path` is already there (releases and slices are immutable).
        UsageError: the disk is full or the folder cannot be written to.
    """
    with readable_disk_errors(path):
        if path.exists():
            raise FileExistsError(errno.EEXIST, "immutable folder is already there", str(path))
        ensure_dir(path.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent))
        try:
            yield temporary
            # Deepest first: what a folder names is safe before the folder is.
            for entry in sorted(temporary.rglob("*"), reverse=True):
                fsync_dir(entry)  # a file is synced by the same call
            fsync_dir(temporary)
            os.chmod(temporary, 0o755)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_dir(path.parent)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files and folders that killed processes left in `folder`; returns what was removed.

    The caller holds the workspace's lock, so that no process is still writing them.

    Raises:
        UsageError: the folder cannot be written to.
    """
    with readable_disk_errors(folder):
        left = sorted(folder.glob(f".*{_TEMPORARY}"))
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return left


@contextmanager
def readable_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only file system or a missing permission into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UsageError(f"{path}: no space left on the disk", "free some space and try again") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UsageError(
                f"{path}: cannot be written ({error.strerror})", "check the folder's permissions"
            ) from error
        raise
