"""JSON values one at a time: a line of JSON Lines, or the elements of an array that is the whole file.

Invariant: at most one value of `max_bytes` is in memory (and a buffer); an object with a key twice, NaN or Infinity never
passes. Nothing here knows what a value means.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from memupdate.facts.fields import RecordProblems

_CHUNK_BYTES = 1 << 16
_SPACE = re.compile(r"[ \t\n\r]*")


class JsonDecoder:
    """A strict decoder, to be used again and again: making one takes longer than decoding a fact."""

    def __init__(self) -> None:
        self._notes: list[tuple[str, str]] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._distinct, parse_constant=self._no_constant)

    def decode(self, text: str) -> Any:
        """The value that `text` is. Raises RecordProblems."""
        self._notes.clear()
        try:
            value = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            raise RecordProblems([("line", f"not JSON: {error.msg} at column {error.colno}")]) from error
        except RecursionError as error:
            raise RecordProblems([("line", "nested too deeply")]) from error
        except ValueError as error:  # a number too long to be converted
            raise RecordProblems([("line", f"not JSON: {error}")]) from error
        if self._notes:
            raise RecordProblems(self._notes.copy())
        return value

    def decode_at(self, text: str, start: int) -> tuple[Any, int, list[tuple[str, str]]]:
        """The value that begins at `start`, where it ends, and its problems. Raises what `json` raises."""
        self._notes.clear()
        value, end = self._decoder.raw_decode(text, start)
        return value, end, self._notes.copy()

    def _distinct(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    self._notes.append((name if name.isprintable() else repr(name), "comes twice in one object"))
                seen.add(name)
        return record

    def _no_constant(self, name: str) -> Any:
        self._notes.append(("line", f"not JSON: {name} is no JSON value"))


class Element(NamedTuple):
    """One element of an array, or why there is none."""

    number: int
    """1-based."""
    value: Any = None
    problems: tuple[tuple[str, str], ...] = ()
    """(field, reason) of each; `element` for all of it."""


class ElementReader:
    """Iterate once over the elements of an array, or over values that follow each other without brackets.

    Args:
        max_bytes: longer elements end the reading (about; it counts characters).
    """

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file, self._max = file, max_bytes
        self._decode_bytes = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = JsonDecoder()
        self._text, self._at, self._ended, self._bad_bytes = "", 0, False, ""
        self._number = 0

    def __iter__(self) -> Iterator[Element]:
        in_array = self._next_character() == "["
        self._at += in_array
        character = self._next_character()
        if in_array and character == "]":
            self._at += 1
            character = self._next_character()
        elif in_array or character:
            while True:
                self._number += 1
                self._next_character()
                element, readable = self._element()
                yield element
                if not readable:
                    return
                character = self._next_character()
                if not in_array:
                    if not character:
                        return
                    continue
                if character not in ("]", ","):
                    yield self._stop(
                        f"no comma or bracket after it, but {character!r}" if character else "the file ends"
                    )
                    return
                self._at += 1
                if character == "]":
                    character = self._next_character()
                    break
        if character or self._bad_bytes:
            self._number += 1
            yield self._stop(f"something after the end of the array: {character!r}")

    def _stop(self, reason: str) -> Element:
        reason = self._bad_bytes or reason
        return Element(self._number, None, (("element", f"not JSON: {reason}; the rest cannot be read"),))

    def _element(self) -> tuple[Element, bool]:
        """The element that begins here, and whether what follows it can be read."""
        while True:
            reason = ""
            try:
                value, end, notes = self._json.decode_at(self._text, self._at)
            except RecursionError:
                reason = "nested too deeply"
            except json.JSONDecodeError as error:
                reason = error.msg
            except ValueError as error:
                reason = str(error)
            else:
                # A number at the very end may go on.
                if end < len(self._text) or self._ended:
                    self._at = end
                    fields = tuple(("element" if name == "line" else name, why) for name, why in notes)
                    return Element(self._number, value, fields), True
            if self._ended:
                return self._stop(reason), False
            if len(self._text) - self._at > self._max:
                why = f"longer than {self._max} bytes, or {reason or 'without an end'}; the rest cannot be read"
                return Element(self._number, None, (("element", why),)), False
            self._fill(max(_CHUNK_BYTES, len(self._text) - self._at))

    def _next_character(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches always
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._fill(_CHUNK_BYTES)

    def _fill(self, size: int) -> None:
        raw = self._file.read(size)
        try:
            more = self._decode_bytes(raw, not raw)
        except UnicodeDecodeError as error:
            more = error.object[: error.start].decode("utf-8-sig")
            raw, self._bad_bytes = b"", f"not UTF-8 ({error.reason})"
        self._text = self._text[self._at :] + more
        self._at = 0
        self._ended = not raw
