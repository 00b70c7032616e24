"""Turns what operations return into text for people or one JSON document for scripts.

Invariant: with `--json`, stdout carries exactly one document, `{"schema_version": 1, "command": …}` with the
report's own keys beside them, or `"rows"` where the report is a list. Tables
are built from the same `to_dict()`, so both say the same. Nothing here knows what the values mean, except by the unit
in their name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA_VERSION = 1
"""Of the JSON documents; grows when a key changes its meaning or goes away."""

_INTERVAL_KEYS = {"low", "mid", "high"}
_COPIED_KEYS = frozenset({"id", "fact"})
"""People copy these from a table: never broken over two lines."""
_LONG_TEXT = 60
"""Characters of a cell in a list; the whole text is in `show` and in the JSON document."""


@runtime_checkable
class Report(Protocol):
    """What every operation returns."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""


def emit(
    command: str,
    report: Any,
    *,
    as_json: bool,
    hide: Iterable[str] = (),
    columns: Sequence[str] | None = None,
    view: Callable[[Any], Sequence[RenderableType]] | None = None,
    on_stderr: bool = False,
) -> None:
    """Print a report, or a sequence of them.

    Args:
        command: its name, as typed, for the JSON document.
        report: has `to_dict()`, or is a sequence of such, or plain values.
        as_json: one document instead of tables.
        hide: keys that people do not need to see; JSON keeps them.
        columns: keys to show of a sequence's rows, in this order; all of them if not given.
        view: what people see, for reports with tables of their own.
        on_stderr: tables go there, for commands whose stdout is their result.
    """
    if as_json:
        print_json(command, to_plain(report))
        return
    from rich.console import Console

    console = Console(stderr=on_stderr)
    parts = view(report) if view else views(command, to_plain(report), hide=frozenset(hide), columns=columns)
    for part in parts:
        console.print(part)


def print_json(command: str, data: Any) -> None:
    """One document on stdout. ASCII, so that no locale can break it."""
    own = data if isinstance(data, Mapping) else {"rows": data}
    document = {"schema_version": SCHEMA_VERSION, "command": command, **own}
    typer.echo(json.dumps(document, indent=2, allow_nan=False))


def to_plain(value: Any) -> Any:
    """Values that JSON knows. Numbers that are not finite become null: JSON has no word for them."""
    if isinstance(value, Report):
        return to_plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return to_plain(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Iterable):
        return [to_plain(item) for item in value]
    raise TypeError(f"cannot be reported: {type(value).__name__}")


def views(
    command: str, data: Any, *, hide: frozenset[str] = frozenset(), columns: Sequence[str] | None = None
) -> list[RenderableType]:
    """Tables and lines for people, from plain data."""
    from rich.text import Text

    if isinstance(data, Mapping):
        return _record_views(command, {key: value for key, value in data.items() if key not in hide})
    if isinstance(data, list) and data and all(isinstance(row, Mapping) for row in data):
        return [_rows_table(command, data, columns, hide)]
    if isinstance(data, list) and not data:
        return [Text(f"{command}: nothing to show")]
    return [Text(format_value("", data))]


def _record_views(title: str, record: Mapping[str, Any]) -> list[RenderableType]:
    """One two-column table for the plain values, then a table per nested record or list, then the messages."""
    from rich.table import Table
    from rich.text import Text

    main = Table(title=title, title_justify="left", show_header=False)
    main.add_column(style="bold", no_wrap=True)
    main.add_column(overflow="fold")
    later: list[RenderableType] = []
    for key, value in record.items():
        if key == "messages" or value in (None, [], {}):
            continue
        if isinstance(value, Mapping) and not _is_interval(value):
            later += _record_views(label(key), value)
        elif isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
            later.append(_rows_table(label(key), value, None, frozenset()))
        else:
            main.add_row(label(key), Text(format_value(key, value)))
    messages: list[RenderableType] = [Text(str(message)) for message in record.get("messages") or []]
    return [*([main] if main.row_count else []), *later, *messages]


def _rows_table(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None, hide: frozenset[str]
) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    every = list(dict.fromkeys(key for row in rows for key in row if key not in hide))
    keys = [key for key in columns if key in every] if columns else every
    table = Table(title=title, title_justify="left")
    for key in keys:
        justify: Literal["left", "right"] = "right" if _is_numeric(rows, key) else "left"
        table.add_column(label(key), justify=justify, overflow="fold", no_wrap=key in _COPIED_KEYS)
    for row in rows:
        table.add_row(*(Text(shorten(format_value(key, row.get(key)))) for key in keys))
    return table


def _is_numeric(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    values = [row.get(key) for row in rows if row.get(key) is not None]
    return bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _is_interval(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == _INTERVAL_KEYS


def label(key: str) -> str:
    """`predicted_loss_nats` → `predicted loss (nats)`: names carry their unit, labels show it."""
    for suffix, unit in (("_nats", "nats"), ("_utc", "UTC")):
        if key.endswith(suffix):
            return f"{key.removesuffix(suffix).replace('_', ' ')} ({unit})"
    for suffix in ("_bytes", "_s"):  # the value shows its unit
        if key.endswith(suffix):
            return key.removesuffix(suffix).replace("_", " ")
    return key.replace("_", " ")


def format_value(key: str, value: Any) -> str:
    """A value as people read it, by the unit in its key."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_interval(value):
        low, mid, high = (format_value(key, value[part]) for part in ("low", "mid", "high"))
        return f"{mid} ({low} to {high})"
    if isinstance(value, Mapping):
        return ", ".join(f"{label(str(name))} {format_value(str(name), item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(format_value("", item) for item in value)
    if isinstance(value, int | float):
        return _format_number(key, value)
    return str(value)


def _format_number(key: str, value: float) -> str:
    if key.endswith("_bytes"):
        return _format_bytes(value)
    if key.endswith("_s"):
        return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
    if key.endswith("_share"):
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _format_bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def shorten(text: str) -> str:
    """One line of at most `_LONG_TEXT` characters."""
    line = " ".join(text.split())
    return line if len(line) <= _LONG_TEXT else line[: _LONG_TEXT - 1] + "…"
