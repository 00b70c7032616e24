"""Files that are either wholly there or not there: atomic writes, fsync, tagged digests.

Invariant: a path returned by a function here names complete content, also after `kill -9` or a power cut at any moment.
"""

from __future__ import annotations

import errno
import glob
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


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`: temporary file beside it, fsync, rename, fsync of the folder.

    Raises:
        UsageError: the disk is full or the folder cannot be written to.
    """
    with readable_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
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

    What a killed process left of the same folder is removed first, so callers must hold the workspace's lock.

    Raises:
        FileExistsError: `path` is already there (releases and slices are immutable).
        UsageError: the disk is full or the folder cannot be written to.
    """
    with readable_disk_errors(path):
        if path.exists():
            raise FileExistsError(errno.EEXIST, "immutable folder is already there", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*"):
            shutil.rmtree(stale)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
            fsync_dir(temporary)
            os.chmod(temporary, 0o755)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_dir(path.parent)


@contextmanager
def readable_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only file system or a missing permission into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UsageError(
                f"{path}: no space left on the disk", "free some space and run `memupdate resume`"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UsageError(
                f"{path}: cannot be written ({error.strerror})", "check the folder's permissions"
            ) from error
        raise
