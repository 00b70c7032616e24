"""Reads a file line by line in bounded memory, and hashes it on the way.

Invariant: whatever the file holds, at most one line of `max_line_bytes` is in memory; the digest is that of the very
bytes that the lines came from.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from memupdate.errors import FactsError

_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_SKIP_BYTES = 1 << 20


@dataclass(frozen=True)
class Line:
    """One line: its text, or why there is none."""

    number: int
    """1-based."""
    text: str = ""
    """Without its end."""
    problem: str = ""
    """Why it cannot be read; empty where it can."""


class LineReader:
    """Iterate once over the lines of `path`; afterwards `sha256` and `size_bytes` are those of the file.

    Raises:
        FactsError: the path is missing, a folder, a device, or unreadable, or the file is empty or UTF-16.
    """

    def __init__(self, path: Path, max_line_bytes: int) -> None:
        self._path = path
        self._max_line_bytes = max_line_bytes
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    @property
    def sha256(self) -> str:
        """Tagged digest of the bytes read so far."""
        return "sha256:" + self._digest.hexdigest()

    def __iter__(self) -> Iterator[Line]:
        _refuse_what_is_no_file(self._path)
        try:
            with self._path.open("rb") as file:
                yield from self._lines(file)
        except OSError as error:
            raise FactsError(
                f"{self._path}: cannot be read ({error.strerror})", "check the file's permissions"
            ) from error
        if self.size_bytes == 0:
            raise FactsError(f"{self._path}: the file is empty", "give a file with one JSON object a line")

    def _lines(self, file: BinaryIO) -> Iterator[Line]:
        number = 0
        while raw := self._take(file.readline(self._max_line_bytes + 2)):
            number += 1
            start = self.size_bytes - len(raw)
            if len(raw.rstrip(b"\r\n")) > self._max_line_bytes:
                self._skip_rest(file, raw)
                yield Line(number, problem=f"longer than {self._max_line_bytes} bytes")
                continue
            if number == 1:
                if raw.startswith(_UTF16_BOMS):
                    raise FactsError(f"{self._path}: not UTF-8 (it is UTF-16)", "save the file as UTF-8")
                if raw.startswith(_UTF8_BOM):
                    raw, start = raw[len(_UTF8_BOM) :], start + len(_UTF8_BOM)
            try:
                yield Line(number, raw.decode("utf-8").rstrip("\r\n"))
            except UnicodeDecodeError as error:
                yield Line(number, problem=f"not UTF-8 at byte {start + error.start} of the file")

    def _take(self, raw: bytes) -> bytes:
        self._digest.update(raw)
        self.size_bytes += len(raw)
        return raw

    def _skip_rest(self, file: BinaryIO, raw: bytes) -> None:
        while raw and not raw.endswith(b"\n"):
            raw = self._take(file.readline(_SKIP_BYTES))


def _refuse_what_is_no_file(path: Path) -> None:
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
