"""Splits bytes into lines in bounded memory.

Invariant: whatever the bytes are, at most one line of `max_line_bytes` is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

UTF8_BOM = b"\xef\xbb\xbf"
_SKIP_BYTES = 1 << 20


class Line(NamedTuple):
    """One line: its bytes, or why there are none."""

    number: int
    """1-based."""
    content: bytes = b""
    """With its end."""
    offset: int = 0
    """Of its first byte in the file."""
    problem: str = ""
    """Why it cannot be read; empty where it can."""

    def text(self) -> tuple[str, str]:
        """Its text, with its end, and why there is none; the one or the other is empty."""
        if self.problem:
            return "", self.problem
        try:
            return self.content.decode(), ""
        except UnicodeDecodeError as error:
            return "", f"not UTF-8 at byte {self.offset + error.start} of the file"


def read_lines(file: BinaryIO, max_line_bytes: int) -> Iterator[Line]:
    """The lines of `file`; a byte order mark of UTF-8 is passed over."""
    number, offset, limit = 0, 0, max_line_bytes + 2
    while raw := file.readline(limit):
        number += 1
        start, offset = offset, offset + len(raw)
        if offset - start > max_line_bytes and len(raw.rstrip(b"\r\n")) > max_line_bytes:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(_SKIP_BYTES)
                offset += len(raw)
            yield Line(number, problem=f"longer than {max_line_bytes} bytes")
            continue
        if number == 1 and raw.startswith(UTF8_BOM):
            raw, start = raw[len(UTF8_BOM) :], len(UTF8_BOM)
        yield Line(number, raw, start)
