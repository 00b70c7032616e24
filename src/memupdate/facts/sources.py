"""Opens what facts come in (a file, a pipe, standard input), takes gzip and Zstandard off, and hashes the bytes on the way.

Invariant: the digest is that of the very bytes that were read, as they lie on the disk, all of them; memory does not grow with the
file, however far it unpacks. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from memupdate.errors import FactsError

STDIN = "-"
"""The path that stands for standard input."""
BUFFER_BYTES = 1 << 18
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_INPUT_BYTES = 2048
"""A block of 128 KiB can come from four bytes, so that this much unpacks to 64 MiB at the very most."""
_MAX_WINDOW_BYTES = 1 << 27
"""What `zstd` itself takes without being asked for more."""


class ByteSource:
    """One file to be read once.

    Args:
        path: a file, a named pipe, or `-`.
    """

    def __init__(self, path: Path | str) -> None:
        self.is_stdin = str(path) == STDIN
        self.path = Path(path)
        self.name = "stdin" if self.is_stdin else str(path)
        """For messages and for the record of where a fact came from."""
        self._digest = hashlib.sha256()
        self._file: IO[bytes]
        self._packed: io.BufferedReader[Any]
        self.size_bytes = 0

    @property
    def sha256(self) -> str:
        """Tagged digest of the bytes read so far: of the file, once `open` has ended well."""
        return "sha256:" + self._digest.hexdigest()

    def took(self, data: Any) -> None:
        """Count and hash bytes that were read."""
        self._digest.update(data)
        self.size_bytes += len(data)

    @contextmanager
    def open(self) -> Iterator[io.BufferedReader[Any]]:
        """The unpacked bytes; at the end, what was left unread is hashed too.

        Raises:
            FactsError: the path is missing, a folder, a device or unreadable, the file is empty, or damaged as an archive.
        """
        try:
            with self._raw() as raw:
                packed = io.BufferedReader(_Counted(raw, self), BUFFER_BYTES)
                self._file, self._packed = raw, packed
                if not packed.peek(1):
                    raise FactsError(f"{self.name}: the file is empty", "give a file with one JSON object a line")
                yield _unpacked(packed)
                while packed.read(BUFFER_BYTES):
                    pass
        except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
            where = f"{self.name}: damaged, or cut off, within its first {self.size_bytes} packed bytes"
            raise FactsError(f"{where} ({error})", "pack it again, or give the file unpacked") from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise FactsError(f"{self.name}: cannot be read ({reason})", "check the file's permissions") from error

    def reread(self) -> IO[bytes]:
        """The packed bytes from their beginning, for formats that are read from their end; all are hashed before.

        Raises:
            FactsError: a pipe, which cannot be read twice.
        """
        if self.is_stdin or not self._file.seekable():
            raise FactsError(f"{self.name}: a pipe cannot be read from its end", "save it to a file and give its path")
        while self._packed.read(BUFFER_BYTES):
            pass
        self._file.seek(0)
        return self._file

    @contextmanager
    def _raw(self) -> Iterator[IO[bytes]]:
        if self.is_stdin:
            yield sys.stdin.buffer
            return
        refuse_what_is_no_file(self.path)
        with self.path.open("rb") as file:
            yield file


class _Counted(io.RawIOBase):
    def __init__(self, file: Any, source: ByteSource) -> None:
        self._file, self._source = file, source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)
        self._source.took(buffer[:count])
        return count


class _Zstandard(io.RawIOBase):
    """Frames one after the other. Not `stream_reader`, which takes a file that was cut off for a whole one."""

    def __init__(self, packed: io.BufferedReader[Any]) -> None:
        self._packed, self._ready, self._rest = packed, memoryview(b""), b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._packed.read(_ZSTD_INPUT_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
            self._ready, self._rest = memoryview(self._frame.decompress(data)), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _unpacked(packed: io.BufferedReader[Any]) -> io.BufferedReader[Any]:
    head = packed.peek(4)[:4]
    if head.startswith(_GZIP_MAGIC):
        return io.BufferedReader(cast("Any", gzip.GzipFile(fileobj=packed)), BUFFER_BYTES)
    if head == _ZSTD_MAGIC:
        return io.BufferedReader(_Zstandard(packed), BUFFER_BYTES)
    return packed


def refuse_what_is_no_file(path: Path) -> None:
    """Raises FactsError for a path that is missing, a folder or a device; following it could also wait for ever."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise FactsError(f"{path}: no such file", "check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise FactsError(f"{path!s}: cannot be read ({error})", "check the path and its permissions") from error
    if stat.S_ISDIR(mode):
        raise FactsError(f"{path}: is a folder, not a facts file", "give one file")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise FactsError(f"{path}: not a regular file", "give a file with one JSON object a line")
