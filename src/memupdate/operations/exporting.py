"""Facts written to a file that `memupdate add` reads back as the very same facts: JSON Lines, CSV or Parquet.

Invariant: the file is whole or not there. Every format carries the keys of the native format; in CSV, lists and separators are
JSON in their cell, and an empty cell says nothing.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memupdate.errors import UsageError
from memupdate.facts.formats import native_record
from memupdate.facts.model import Fact
from memupdate.storage import file_sha256, fsync_dir, readable_disk_errors

Record = Mapping[str, Any]


@dataclass(frozen=True)
class ExportReport:
    """A file of facts that was written."""

    file: str
    format: str
    collection: str
    release: str | None
    """The release whose facts they are; None before the first."""
    facts: int
    sha256: str
    size_bytes: int


def export_facts(facts: Sequence[Fact], file: Path, *, collection: str, release: str | None) -> ExportReport:
    """Write `facts`, those of a release, to `file`. Raises as `write_facts`."""
    write_facts(facts, file)
    return ExportReport(
        file=str(file),
        format=file.suffix.lower().removeprefix("."),
        collection=collection,
        release=release,
        facts=len(facts),
        sha256=file_sha256(file),
        size_bytes=file.stat().st_size,
    )


def check_new_file(file: Path) -> None:
    """See that facts can be written to `file`, before long work.

    Raises:
        UsageError: the ending is none of ours, the file is there already, or its folder is not.
    """
    ending = file.suffix.lower()
    if ending not in _WRITERS:
        raise UsageError(f"{file}: {ending or 'no ending'} names no format", f"end it in {', '.join(_WRITERS)}")
    if file.exists():
        raise UsageError(f"{file}: is there already", "give another name")
    if not file.parent.is_dir():
        raise UsageError(f"{file.parent}: no such folder", "make it first, or give another place")


def write_facts(facts: Sequence[Fact], file: Path) -> None:
    """Write `facts` to a new file, in the format that its ending names.

    Raises:
        UsageError: as `check_new_file`, or it cannot be written.
    """
    check_new_file(file)
    ending = file.suffix.lower()
    with readable_disk_errors(file):
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=ending, dir=file.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            _WRITERS[ending](temporary, [native_record(fact) for fact in facts])
            fsync_dir(temporary)  # the same call syncs a file
            os.chmod(temporary, 0o644)
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_dir(file.parent)


def jsonl_line(record: Record) -> str:
    """A record as one line of JSON Lines, its end included."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def _write_jsonl(path: Path, records: Sequence[Record]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(jsonl_line, records))


def _write_csv(path: Path, records: Sequence[Record]) -> None:
    columns = _columns(records)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    for record in records:
        writer.writerow([_cell(column, record.get(column)) for column in columns])
    path.write_text(text.getvalue(), encoding="utf-8", newline="")


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    # A separator may be white space or nothing, which a cell could not say.
    return value if isinstance(value, str) and column != "separator" else json.dumps(value, ensure_ascii=False)


def _write_parquet(path: Path, records: Sequence[Record]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = _columns(records)
    # Column by column: pyarrow takes the columns of rows from the first row alone.
    table = pyarrow.table({name: [record.get(name) for record in records] for name in columns})
    parquet.write_table(table, path)


def _columns(records: Sequence[Record]) -> list[str]:
    """Every key that occurs, in the order of the native format; prompt and target also where there are no facts."""
    return list(dict.fromkeys(("prompt", "target", *(key for record in records for key in record))))


_WRITERS: dict[str, Callable[[Path, Sequence[Record]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
