"""What a workspace's ledger answers without its model and its policy: lists, search, history, the trail of a fact, export.

Invariant: reads only, never waits for a writer, and imports neither sqlite-utils nor pydantic on the way to an answer, so
that these commands start at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memupdate.errors import UsageError
from memupdate.layout import RELEASE_PATTERN, WorkspaceLayout, release_name
from memupdate.ledger.ledger import Ledger

if TYPE_CHECKING:
    from memupdate.facts.model import Fact
    from memupdate.ledger.questions import FactExplanation, FactLifetime, WaitingFact
    from memupdate.ledger.records import FactDetail, FactHistory
    from memupdate.ledger.search import SearchHit
    from memupdate.operations.exporting import ExportReport

_VERSION = re.compile(r"v([1-9][0-9]{0,8})")
_DAY_OR_LONGER = re.compile(r"(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?")


@dataclass(frozen=True)
class FactsAsOf:
    """What one release holds."""

    collection: str
    release: str
    facts: tuple[Fact, ...]
    """In the order in which they were written; a part of them where a limit was given."""
    facts_total: int


class LedgerQuestions:
    """Questions to the ledger of the workspace at `root`.

    Raises:
        UsageError: there is no workspace.
    """

    def __init__(self, root: Path | str) -> None:
        self.layout = WorkspaceLayout(Path(root).resolve())
        if not self.layout.config.is_file():
            raise UsageError(
                f"{self.layout.root}: not a memupdate workspace", "make one with `memupdate init DIR --model MODEL`"
            )

    @contextmanager
    def reader(self) -> Iterator[Ledger]:
        """The ledger for reading, as it is now: all answers are of one moment. Never waits for a writer."""
        with Ledger.open(self.layout.ledger, readonly=True) as ledger, ledger.snapshot():
            yield ledger

    def facts(self, *, limit: int = 50, offset: int = 0, collection: str | None = None) -> list[FactHistory]:
        """Live facts."""
        with self.reader() as ledger:
            return ledger.facts_list(collection, limit=limit, offset=offset)

    def facts_as_of(
        self, as_of: str, *, limit: int | None = None, offset: int = 0, collection: str | None = None
    ) -> FactsAsOf:
        """What the model knew: at a release (`acme@v12`, or `v12` of a collection), or at a date or time.

        Args:
            as_of: a date means the end of that day, month or year in UTC; the newest release made by then counts.
            collection: of a version or a date; the workspace's own if not given.

        Raises:
            UsageError: neither a release nor a date, or nothing was released by then.
            LedgerError: no such release.
        """
        with self.reader() as ledger:
            name, version = self._version(ledger, as_of, collection)
            facts = ledger.live_facts(name, as_of_version=version)
            end = len(facts) if limit is None else offset + limit
            return FactsAsOf(name, release_name(name, version), tuple(facts[offset:end]), len(facts))

    def _version(self, ledger: Ledger, as_of: str, collection: str | None) -> tuple[str, int]:
        if RELEASE_PATTERN.fullmatch(as_of):
            release = ledger.release(as_of)
            return release.collection, release.version
        name = self._collection(ledger, collection)
        if short := _VERSION.fullmatch(as_of):
            release = ledger.release(release_name(name, int(short.group(1))))
            return release.collection, release.version
        version = ledger.version_at(name, end_of(as_of))
        if not version:
            raise UsageError(f"{name}: nothing was released by {as_of}", "see `memupdate releases list`")
        return name, version

    def _collection(self, ledger: Ledger, wanted: str | None) -> str:
        """A collection that is there; the workspace's own where none is wanted. Raises UsageError for any other."""
        names = ledger.collections()
        if wanted is not None:
            if wanted not in names:
                raise UsageError(f"{wanted}: no such collection", f"there are: {', '.join(names)}")
            return wanted
        if len(names) == 1:
            return names[0]
        from memupdate.operations.config import load_config

        return load_config(self.layout.root).collection

    def fact(self, fact_id: str) -> FactDetail:
        """One fact by a prefix of its id: sources, batches, releases, proofs."""
        with self.reader() as ledger:
            return ledger.fact(fact_id)

    def search(self, text: str, *, limit: int = 20, collection: str | None = None) -> list[SearchHit]:
        """Facts that hold every word of `text`, the best match first; nothing that can be typed is an error."""
        with self.reader() as ledger:
            return ledger.search(text, collection, limit=limit)

    def history(self, asked: str, *, collection: str | None = None) -> list[FactLifetime]:
        """Every value of a key, a prompt, `SUBJECT / RELATION` or a fact's key by its id. Raises LedgerError for none."""
        with self.reader() as ledger:
            return ledger.history(asked, collection)

    def explain(self, fact_id: str) -> FactExplanation:
        """The trail of one fact: file and line, batch, plan, law fit, slice, releases, proofs."""
        with self.reader() as ledger:
            return ledger.explain(fact_id)

    def export(self, file: Path | str, *, as_of: str | None = None, collection: str | None = None) -> ExportReport:
        """Write what a collection knows, or knew, to a `.jsonl`, `.csv` or `.parquet` file that `add` reads back.

        What stands in for retracted facts is left out: a model that never learned them needs none.

        Raises:
            UsageError: the file is there already or cannot be written, or see `facts_as_of`.
        """
        from memupdate.operations.exporting import export_facts

        with self.reader() as ledger:
            if as_of is None:
                name = self._collection(ledger, collection)
                latest = ledger.latest_release(name)
                version = latest.version if latest else 0
            else:
                name, version = self._version(ledger, as_of, collection)
            stand_ins = ledger.stand_in_ids(name)
            facts = [fact for fact in ledger.live_facts(name, as_of_version=version) if fact.id not in stand_ins]
        release = release_name(name, version) if version else None
        return export_facts(facts, Path(file), collection=name, release=release)

    def datasette_metadata(self) -> dict[str, Any]:
        """Metadata with which Datasette makes sense of the ledger."""
        with self.reader() as ledger:
            return ledger.datasette_metadata()

    def waiting(self, *, collection: str | None = None, limit: int = -1) -> list[WaitingFact]:
        """Facts that were told and are in no release, and why."""
        with self.reader() as ledger:
            return ledger.waiting(collection, limit=limit)


def end_of(date: str) -> str:
    """The last moment of a day, month or year, or a time, as the ledger writes times: UTC with milliseconds.

    A time without a zone is UTC.

    Raises:
        UsageError: not an ISO 8601 date or time.
    """
    try:
        if match := _DAY_OR_LONGER.fullmatch(date):
            year, month, day = (int(part) if part else None for part in match.groups())
            assert year is not None  # the pattern has it
            first = datetime(year, month or 1, day or 1, tzinfo=UTC)
            if day:
                after = first + timedelta(days=1)
            elif month:
                after = datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)
            else:
                after = datetime(year + 1, 1, 1, tzinfo=UTC)
            moment = after - timedelta(milliseconds=1)
        else:
            moment = datetime.fromisoformat(date)
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{date}: neither a release nor a date", "give acme@v12, v12, 2026-11-24 or a time in ISO 8601"
        ) from error
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
