"""Takes typed values out of one JSON object and notes what is wrong with each field.

Invariant: every problem of a record is noted, never only the first; a value that is returned for a field with a problem
is a placeholder and is never used, since a record with problems becomes no fact.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

_ALLOWED_CONTROLS = frozenset("\n\r\t")
_YEAR_OR_MONTH = re.compile(r"[0-9]{4}(-[0-9]{2})?")
_KINDS: dict[type, str] = {
    str: "text",
    bytes: "bytes",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
}


class RecordProblems(Exception):
    """A record that is no fact; `problems` holds every (field, reason)."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__(problems)
        self.problems = problems


class Fields:
    """One record under examination.

    Args:
        record: the JSON object.
        known: keys that its format has, any other being a problem; None for formats of others, which may have more.
    """

    def __init__(self, record: Mapping[str, Any], known: Collection[str] | None = None) -> None:
        self._record = record
        self.problems: list[tuple[str, str]] = []
        """(field, reason) in the order found."""
        if known is not None:
            for name in record:
                if name not in known:
                    self._note(_shown_key(name), unknown_key(name, known))

    def has(self, name: str) -> bool:
        """Whether the record says anything about `name`."""
        return self._record.get(name) is not None

    def raise_problems(self) -> None:
        """Raises RecordProblems where anything was noted."""
        if self.problems:
            raise RecordProblems(self.problems)

    def text(self, name: str) -> str:
        """A required text with something in it."""
        if name not in self._record:
            self._note(name, "missing")
            return ""
        return self._text(name, self._record[name])

    def verbatim(self, name: str) -> str:
        """A required text that may hold control characters too."""
        value = self._record.get(name)
        if not isinstance(value, str) or not value or value.isspace():
            return self.text(name)
        self._check_characters(name, value, controls=True)
        return value

    def optional_text(self, name: str) -> str | None:
        """A text with something in it; None where absent or null."""
        value = self._record.get(name)
        return None if value is None else self._text(name, value)

    def optional_id(self, name: str) -> str | None:
        """A text or a whole number, as text."""
        value = self._record.get(name)
        return str(value) if type(value) is int else self.optional_text(name)

    def optional_time(self, name: str) -> str | None:
        """An ISO 8601 date, also a year or a month, or a time, as written."""
        text = self.optional_text(name)
        if text and parse_time(text) is None:
            self._note(name, f"not an ISO 8601 date or time: {_shown(text)}")
        return text

    def period(self) -> tuple[str | None, str | None]:
        """`valid_from` and `valid_to`, in this order also in time."""
        if "valid_from" not in self._record and "valid_to" not in self._record:
            return None, None
        begin, end = self.optional_time("valid_from"), self.optional_time("valid_to")
        if begin and end:
            first, last = parse_time(begin), parse_time(end)
            if first and last and first > last:
                self._note("valid_to", f"{_shown(end)} is before valid_from, which is {_shown(begin)}")
        return begin, end

    def choice(self, name: str, allowed: Collection[str], default: str) -> str:
        """One of `allowed`."""
        value = self._record.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in allowed:
            self._note(name, f"must be one of {', '.join(allowed)}, not {_shown(value)}")
            return default
        return value

    def spacing(self, name: str, default: str) -> str:
        """A text that may be empty or white space."""
        value = self._record.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self._note(name, f"must be text, not {_kind(value)}")
            return default
        self._check_characters(name, value)
        return value

    def is_list(self, name: str) -> bool:
        """Whether there is a list under `name`."""
        return isinstance(self._record.get(name), list)

    def value(self, name: str) -> Any:
        """What there is under `name`, unexamined; None where absent."""
        return self._record.get(name)

    def record(self, name: str) -> Fields:
        """An object of a format that may have more keys; one without any where absent."""
        value = self._record.get(name)
        if value is not None and not isinstance(value, dict):
            self._note(name, f"must be an object, not {_kind(value)}")
        return Fields(value if isinstance(value, dict) else {})

    def texts(self, name: str, *, distinct: bool = True) -> tuple[str, ...]:
        """A list of texts, none of them twice unless they need not be `distinct`; empty where absent."""
        if name not in self._record:
            return ()
        found: list[str] = []
        first: dict[str, int] = {}
        for index, value in enumerate(self._list(name)):
            place = f"{name}[{index}]"
            text = self._text(place, value)
            if distinct and text and first.setdefault(text, index) != index:
                self._note(place, f"the same as {name}[{first[text]}]")
            found.append(text)
        return tuple(found)

    def records(self, name: str, known: Collection[str]) -> list[tuple[str, Fields]]:
        """A list of objects, each with its place, to be examined in turn; hand each to `take_problems` afterwards."""
        found: list[tuple[str, Fields]] = []
        if name not in self._record:
            return found
        for index, value in enumerate(self._list(name)):
            place = f"{name}[{index}]"
            if isinstance(value, dict):
                found.append((place, Fields(value, known)))
            else:
                self._note(place, f"must be an object with {', '.join(known)}, not {_kind(value)}")
        return found

    def take_problems(self, place: str, inner: Fields) -> None:
        """Note the problems of an inner record under `place`."""
        for field, reason in inner.problems:
            self._note(f"{place}.{field}", reason)

    def note(self, name: str, reason: str) -> None:
        """Note a problem that a format found itself."""
        self._note(name, reason)

    def _list(self, name: str) -> list[Any]:
        value = self._record.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            self._note(name, f"must be a list, not {_kind(value)}")
            return []
        return value

    def _text(self, place: str, value: Any) -> str:
        if type(value) is str and value and value.isprintable() and not value.isspace():
            return value
        if not isinstance(value, str):
            self._note(place, f"must be text, not {_kind(value)}")
            return ""
        if not value:
            self._note(place, "empty")
        elif value.isspace():
            self._note(place, "nothing but white space")
        else:
            self._check_characters(place, value)
        return value

    def _check_characters(self, place: str, text: str, *, controls: bool = False) -> None:
        if text.isprintable():
            return
        for position, character in enumerate(text):
            category = unicodedata.category(character)
            if category == "Cs":
                self._note(place, f"half a surrogate pair (U+{ord(character):04X}) at character {position}")
                return
            if not controls and category == "Cc" and character not in _ALLOWED_CONTROLS:
                self._note(place, f"control character U+{ord(character):04X} at character {position}")
                return

    def _note(self, field: str, reason: str) -> None:
        self.problems.append((field, reason))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return _KINDS.get(type(value), "an object")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _shown_key(name: str) -> str:
    return name if name.isprintable() and name and len(name) <= 60 else _shown(name)


def unknown_key(name: str, known: Collection[str]) -> str:
    """What is wrong with a key that is not `known`, and what was perhaps meant."""
    near = difflib.get_close_matches(name[:60].lower(), list(known), n=1, cutoff=0.7)
    return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known: {', '.join(known)}"


def parse_time(text: str) -> datetime | None:
    """The moment at which an ISO 8601 date, month, year or time begins, in UTC; None for anything else."""
    try:
        if _YEAR_OR_MONTH.fullmatch(text):
            text = f"{text}-01-01" if len(text) == 4 else f"{text}-01"
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
