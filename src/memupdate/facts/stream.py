"""A file of facts as a stream: unpack, split into records, tell each record's format, make it facts or problems.

Invariant: memory does not grow with the file; every record becomes facts or at least one problem that names its place and field; what a
policy refuses as a secret is in no problem's text. What facts mean to each other (the same one again, two answers to one question) is
not looked at here.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memupdate.errors import FactsError
from memupdate.facts import tables
from memupdate.facts.fields import RecordProblems, unknown_key
from memupdate.facts.files import LocatedFact, Problem, Unit
from memupdate.facts.formats import NATIVE, RecordFormat, detect_format, find_format, format_named
from memupdate.facts.json_values import ElementReader, JsonDecoder
from memupdate.facts.lines import UTF8_BOM, read_lines
from memupdate.facts.model import Fact
from memupdate.facts.plain_lines import PlainFact, PlainLines
from memupdate.facts.secrets import SecretPatterns
from memupdate.facts.sources import ByteSource

MAX_LINE_BYTES = 16 * 2**20
"""A fact is a sentence, a passage a page; a longer line is some other file."""

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_PACKED = (".gz", ".gzip", ".zst", ".zstd")
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_PARQUET_MAGIC = b"PAR1"
_HIDE_CHARACTERS = 1 << 20
"""So much of a record that cannot be read is searched for secrets before its problems are quoted."""


class _Record(NamedTuple):
    """One record as its container has it, or why there is none."""

    number: int
    value: Any
    text: str = ""
    """What it was read from, where it was text."""
    problem: tuple[tuple[str, str], ...] = ()
    plain: PlainFact | None = None
    """The fact that it is, where that is known already."""


class FactStream:
    """Iterate once over the facts and problems of a file; then `sha256`, `size_bytes`, `format` and `unit` are known.

    Args:
        path: a file of JSON Lines, a JSON array, CSV, TSV or Parquet, as it is or packed with gzip or Zstandard; `-` for
            standard input.
        columns: field of the native format → column or key of the file that has it; of the others only those with native names are
            read. None: the format is told by the keys.
        format: the name of the format that every record is in, not to be told by its keys.
        secrets: what is refused; by default keys and tokens.
        max_line_bytes: longer lines, elements and cells are problems, and are not kept in memory.

    Raises:
        FactsError: when made, for an unknown format or field; when iterated, for a file that cannot be read at all.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        columns: Mapping[str, str] | None = None,
        format: str | None = None,
        secrets: SecretPatterns | None = None,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        self._source = ByteSource(path)
        self.path = self._source.name
        self._columns = dict(columns or {})
        self._forced: RecordFormat | None = format_named(format) if format else None
        self._secrets = SecretPatterns() if secrets is None else secrets
        self._max = max_line_bytes
        self._names: set[str] = set()
        self._table_format: RecordFormat | None = None
        self._cells_are_text = False
        self.unit: Unit = "line"
        """What the `line` of its facts and problems counts."""
        for name in self._columns:
            if name not in NATIVE.keys:
                raise FactsError(f"--columns {name}: {unknown_key(name, NATIVE.keys)}", "fields go before the =")
        if columns:
            self._forced = self._forced or NATIVE

    @property
    def sha256(self) -> str:
        """Tagged digest of the file's bytes, as they lie on the disk."""
        return self._source.sha256

    @property
    def size_bytes(self) -> int:
        """Size of the file, packed as it is."""
        return self._source.size_bytes

    @property
    def format(self) -> str:
        """Names of the formats found, joined by `+` where a file mixes them."""
        return "+".join(sorted(self._names))

    def __iter__(self) -> Iterator[LocatedFact | Problem]:
        with self._source.open() as file:
            for record in self._records(file):
                if record.plain and not self._secrets.may_be_in(record.plain.texts):
                    yield LocatedFact(record.plain.fact, record.number)
                    continue
                if record.problem:
                    yield from self._problems(record, list(record.problem))
                    continue
                try:
                    facts = (record.plain.fact,) if record.plain else self._parse(record.value)
                except RecordProblems as error:
                    yield from self._problems(record, error.problems)
                    continue
                except RecursionError:  # just flat enough to be decoded
                    yield Problem(record.number, self.unit, "nested too deeply", self.unit)
                    continue
                for fact in facts:
                    if found := self._secrets.problems(fact):
                        yield from (Problem(record.number, name, reason, self.unit) for name, reason in found)
                    else:
                        yield LocatedFact(fact, record.number)

    def _parse(self, value: Any) -> Sequence[Fact]:
        known = self._table_format or self._forced
        if self._columns and isinstance(value, Mapping) and self._table_format is None:
            value = self._mapped(value)
        if known is None:
            known = detect_format(value)
            if known is NATIVE and not isinstance(value, dict):
                raise RecordProblems([(self.unit, _no_object(value, self.unit))])
        elif not known.detect(value) and not isinstance(value, dict):
            raise RecordProblems([(self.unit, f"not a record of the format {known.name}")])
        if self._cells_are_text and known is NATIVE:
            value = tables.native_cells(value)
        facts = known.parse(value)
        if not facts:
            raise RecordProblems([(self.unit, "states no fact")])
        self._names.add(known.name)
        return facts

    def _problems(self, record: _Record, problems: list[tuple[str, str]]) -> Iterator[Problem]:
        try:
            text = record.text or json.dumps(record.value, ensure_ascii=False, default=str)
        except RecursionError:
            problems, text = [("line", "nested too deeply")], ""
        for name, reason in self._secrets.without_secrets(problems, text[:_HIDE_CHARACTERS]):
            yield Problem(record.number, self.unit if name == "line" else name, reason, self.unit)

    def _records(self, file: io.BufferedReader[Any]) -> Iterator[_Record]:
        head = file.peek(4096)
        if head.startswith(_UTF16_BOMS):
            raise FactsError(f"{self.path}: not UTF-8 (it is UTF-16)", "save the file as UTF-8")
        if head.startswith(_PARQUET_MAGIC):
            self.unit = "row"
            return self._table(lambda: tables.parquet_table(self._source))
        head = head.removeprefix(UTF8_BOM)
        delimiter = self._delimiter(head)
        if delimiter:
            self._cells_are_text = True
            return self._table(lambda: tables.text_table(file, delimiter, self._max))
        start = head.lstrip()
        # A brace that stands alone opens a record over several lines, as programs print one for people.
        if start.startswith(b"[") or start.partition(b"\n")[0].rstrip() == b"{":
            self.unit = "element"
            return (_Record(e.number, e.value, "", e.problems) for e in ElementReader(file, self._max))
        return self._lines(file)

    def _lines(self, file: io.BufferedReader[Any]) -> Iterator[_Record]:
        decoder, plain = JsonDecoder(), PlainLines()
        for line in read_lines(file, self._max):
            if self._forced is None and (fact := plain.read(line.content)):
                self._names.add(NATIVE.name)
                yield _Record(line.number, None, plain=fact)
                continue
            text, problem = line.text()
            if problem:
                yield _Record(line.number, None, "", (("line", problem),))
            elif not text.isspace():
                try:
                    value = decoder.decode(text.rstrip("\r\n"))
                except RecordProblems as error:
                    yield _Record(line.number, None, text, tuple(error.problems))
                else:
                    yield _Record(line.number, value, text)

    def _table(self, opened: Callable[[], tables.Table]) -> Iterator[_Record]:
        try:
            table = opened()
            header, problems = self._header(table.header)
            yield from (_Record(1, None, "", (problem,)) for problem in problems)
            if self._table_format is None:
                return
            for row in table.rows:
                record = {name: row.record[column] for column, name in header.items() if column in row.record}
                yield _Record(row.number, record, "", ((self.unit, row.problem),) if row.problem else ())
        except FactsError as error:
            message = error.message if error.message.startswith(self.path) else f"{self.path}: {error.message}"
            raise FactsError(message, error.hint or "check the file") from error

    def _header(self, header: tuple[str, ...]) -> tuple[dict[str, str], list[tuple[str, str]]]:
        """Column → key for those to be read, and what is wrong with the header."""
        missing = [column for column in self._columns.values() if column not in header]
        if missing:
            has = ", ".join(header)
            return {}, [(column[:60], f"no such column; the header has {has[:200]}") for column in missing]
        keys = dict.fromkeys(header)
        chosen = self._mapped(keys) if self._columns else keys
        known = self._forced or find_format(chosen)
        if known is None:
            reason = "names no format's fields; say which column is which with --columns prompt=…,target=…"
            return {}, [("header", reason)]
        self._table_format = known
        names = {column: column for column in keys}
        if self._columns:
            names = {column: name for name, column in self._columns.items()}
            names |= {name: name for name in chosen if name not in self._columns}
        strange = [name for name in names.values() if name not in NATIVE.keys] if known is NATIVE else []
        kept = {column: name for column, name in names.items() if name not in strange}
        return kept, [(name[:60], unknown_key(name, NATIVE.keys)) for name in strange]

    def _mapped(self, record: Mapping[str, Any]) -> dict[str, Any]:
        taken = set(self._columns.values())
        rest = {name: value for name, value in record.items() if name in NATIVE.keys and name not in taken}
        return rest | {name: record[column] for name, column in self._columns.items() if column in record}

    def _delimiter(self, head: bytes) -> str:
        """What separates the cells of a table of text; empty for JSON."""
        suffixes = [suffix.lower() for suffix in Path(self.path).suffixes]
        while suffixes and suffixes[-1] in _PACKED:
            suffixes.pop()
        named = _DELIMITERS.get(suffixes[-1], "") if suffixes else ""
        first = head.lstrip()[:1]
        if not named and first in (b"{", b"["):
            return ""
        line = head.partition(b"\n")[0].decode("utf-8", "replace").rstrip("\r")
        likely = max(",\t;", key=line.count)
        if named:
            return named if named in line or not line.count(likely) else likely
        cells = dict.fromkeys(cell.strip().strip('"') for cell in line.split(likely))
        wanted = set(self._columns.values())
        is_table = wanted <= set(cells) if wanted else len(cells) > 1 and find_format(cells) is not None
        return likely if is_table else ""


def _no_object(value: Any, unit: str) -> str:
    if unit == "line" and isinstance(value, list):
        return "a JSON list; give one object a line (`jq -c '.[]'` makes them)"
    each = "give one object a line, in braces" if unit == "line" else "give objects in braces"
    return f"not a JSON object; {each}"
