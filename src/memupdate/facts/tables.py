"""Rows of CSV, TSV and Parquet as records.

Invariant: at most one row of text, or one small batch of a Parquet file, is in memory. A cell without anything in it is absent from its
record. Nothing here knows formats of facts, but for how a cell of the native format holds a list.
"""

from __future__ import annotations

import csv
import datetime as dt
import decimal
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from memupdate.errors import FactsError
from memupdate.facts.lines import Line, read_lines
from memupdate.facts.sources import ByteSource

JSON_CELLS = frozenset({"paraphrases", "locality", "portability", "tags", "context"})
"""Native fields that are lists: a cell holds one as JSON, or else its only text."""
_BATCH_ROWS = 128
_BUFFER_BYTES = 1 << 20


class Row(NamedTuple):
    """One row, or why there is none."""

    number: int
    """The line on which it begins, in text; the row, without a header, in Parquet. 1-based."""
    record: dict[str, Any]
    problem: str = ""


class Table(NamedTuple):
    """A header and its rows."""

    header: tuple[str, ...]
    rows: Iterator[Row]


def text_table(file: BinaryIO, delimiter: str, max_line_bytes: int) -> Table:
    """A table of text; quoting is that of RFC 4180.

    Raises:
        FactsError: no header, or one with a name missing or twice.
    """
    lines = _Lines(read_lines(file, max_line_bytes))
    csv.field_size_limit(max(max_line_bytes, csv.field_size_limit()))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = tuple(name.strip() for name in next(reader, []))
    except (csv.Error, _BadLine) as error:
        raise FactsError(f"the header cannot be read: {error}") from error
    _check_header(header)
    return Table(header, _text_rows(reader, lines, header))


def _text_rows(reader: Iterator[list[str]], lines: _Lines, header: Sequence[str]) -> Iterator[Row]:
    while True:
        start = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (csv.Error, _BadLine) as error:
            yield Row(start, {}, str(error))
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            yield Row(start, {}, f"{len(cells)} cells, but the header has {len(header)}")
            continue
        yield Row(start, {name: cell for name, cell in zip(header, cells, strict=True) if cell})


class _BadLine(Exception):
    pass


class _Lines:
    """Lines of text for the `csv` module; a bad one raises, and the next call goes on behind it."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number = line.number
        text, problem = line.text()
        if problem:
            raise _BadLine(problem)
        return text


def _check_header(header: Sequence[str]) -> None:
    if not any(header):
        raise FactsError("no header in the first line")
    for number, name in enumerate(header, start=1):
        if not name:
            raise FactsError(f"column {number} of the header has no name")
        if name in header[: number - 1]:
            raise FactsError(f"column {name[:60]!r} comes twice in the header")


def native_cells(record: Mapping[str, Any]) -> dict[str, Any]:
    """Cells of text as fields of the native format: lists from JSON, and a separator in quotes, where white space would be lost."""
    return {name: _native_cell(name, cell) for name, cell in record.items()}


def _native_cell(name: str, cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    if name in JSON_CELLS:
        value = _parsed(cell) if cell.lstrip().startswith("[") else None
        return value if isinstance(value, list) else [cell]
    if name == "separator" and cell.startswith('"'):
        value = _parsed(cell)
        return value if isinstance(value, str) else cell
    return cell


def _parsed(cell: str) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return None


def parquet_table(source: ByteSource) -> Table:
    """A Parquet file, hashed first and then read in small batches.

    Raises:
        FactsError: not Parquet, damaged, or from a pipe.
    """
    import pyarrow.parquet as pq

    opened = source.reread()
    with _plain_arrow_errors():
        file = pq.ParquetFile(opened, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        header = tuple(file.schema_arrow.names)
    _check_header(header)
    return Table(header, _parquet_rows(file))


def _parquet_rows(file: Any) -> Iterator[Row]:
    number = 0
    with _plain_arrow_errors(), file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
            for record in batch.to_pylist():
                number += 1
                yield Row(number, {name: _plain(cell) for name, cell in record.items() if cell is not None})


def _plain(cell: Any) -> Any:
    """Whole numbers, decimals, dates and times as text, as a person would write them; the rest as it is."""
    if isinstance(cell, bool):
        return cell
    if isinstance(cell, int | decimal.Decimal):
        return str(cell)
    return cell.isoformat() if isinstance(cell, dt.date | dt.datetime | dt.time) else cell


class _plain_arrow_errors:
    """Whatever Arrow finds wrong with a file becomes a FactsError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FactsError) or not isinstance(error, Exception):
            return
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise FactsError(f"not a Parquet file that can be read ({reason})", "write it again") from error
