"""Facts in the ledger: what is live when, what differs, where a fact came from and what became of it.

Invariant: at every release a collection has at most one live fact per key.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from typing import Any

from memupdate.errors import LedgerError
from memupdate.facts.model import Fact
from memupdate.ledger.content import fact_row, parse_fact, storable
from memupdate.ledger.database import LedgerDatabase, plain_errors
from memupdate.ledger.records import (
    FactDetail,
    FactHistory,
    FactSource,
    FactStatus,
    ProofRecord,
    Source,
)

LIVE = """
(bf.outcome IS NULL OR bf.outcome <> 'unproved') AND bf.change <> 'dropped' AND NOT EXISTS (
    SELECT 1 FROM batch_facts s CROSS JOIN line_of later ON later.batch = s.batch
    WHERE s.supersedes = bf.fact AND later.version > line_of.version
) AND NOT EXISTS (SELECT 1 FROM purges WHERE purges.fact = bf.fact)
"""
"""Of a row `bf` of `batch_facts` and the row of `line_of` with its batch and version: whether its fact is live at the end
of that line of batches. CROSS JOIN keeps SQLite to the order written, in which each step is a look into an index."""

_LINE = """
WITH line_of (batch, version) AS MATERIALIZED (
    SELECT batch, version FROM releases
    WHERE collection = :collection AND version <= :version AND batch IS NOT NULL
        AND (version = :asked OR name IN (SELECT name FROM good_releases))
    UNION ALL
    SELECT id, :version + 1 FROM batches
    WHERE id = :with_batch AND collection = :collection
        AND id NOT IN (SELECT batch FROM releases WHERE batch IS NOT NULL)
)
"""
"""Batches that lead to a release. A failed release counts only when asked for itself."""

_IN_LINE = "FROM line_of CROSS JOIN batch_facts bf ON bf.batch = line_of.batch CROSS JOIN facts f ON f.id = bf.fact"

_LIVE_FACTS = f"{_LINE} SELECT f.content_json {_IN_LINE} WHERE {LIVE} ORDER BY line_of.version, bf.position"

_LIVE_COUNT = (
    f"{_LINE} SELECT COUNT(*) AS n FROM line_of CROSS JOIN batch_facts bf ON bf.batch = line_of.batch WHERE {LIVE}"
)

_LIVE_KEY = f"""{_LINE}
SELECT f.content_json FROM facts f CROSS JOIN batch_facts bf ON bf.fact = f.id
CROSS JOIN line_of ON line_of.batch = bf.batch WHERE f.key = :key AND {LIVE}
"""

_DEAD_FACTS = f"""{_LINE}
SELECT f.content_json FROM line_of was CROSS JOIN batch_facts told ON told.batch = was.batch
CROSS JOIN facts f ON f.id = told.fact
WHERE (told.outcome IS NULL OR told.outcome <> 'unproved') AND told.change <> 'dropped' AND NOT EXISTS (
    SELECT 1 FROM batch_facts bf CROSS JOIN line_of ON line_of.batch = bf.batch WHERE bf.fact = told.fact AND {LIVE}
) AND NOT EXISTS (SELECT 1 FROM purges WHERE purges.fact = told.fact)
GROUP BY f.id ORDER BY MIN(was.version), told.position
"""

_HISTORY = "SELECT h.*, f.content_json FROM fact_history h JOIN facts f ON f.id = h.fact"


class Facts(LedgerDatabase):
    """What the ledger knows about facts."""

    def live_facts(
        self, collection: str, *, as_of_version: int | None = None, with_batch: int | None = None
    ) -> list[Fact]:
        """Facts that a release holds, in the order in which they were written.

        A fact is live at version N when its batch was released at or before N, it was not left unproved, and no later
        batch up to N superseded it (proved or not: an old value that its operator has replaced never comes back). What
        stands in for a retracted fact is live too, until a compaction drops it.

        Args:
            as_of_version: N; None for the newest release that did not fail.
            with_batch: an unfinished batch, taken as if it were released right after N.
        """
        parameters = self._line(collection, as_of_version, with_batch)
        return [parse_fact(row["content_json"]) for row in self._rows(_LIVE_FACTS, parameters)]

    def live_count(self, collection: str, *, as_of_version: int | None = None, with_batch: int | None = None) -> int:
        """How many facts `live_facts` gives; arguments as there."""
        row = self._row(_LIVE_COUNT, self._line(collection, as_of_version, with_batch))
        return 0 if row is None else int(row["n"])

    def live_fact(self, collection: str, key: str, *, as_of_version: int | None = None) -> Fact | None:
        """The fact that a release holds about one key (`Fact.key`); None where it holds none. Arguments as for `live_facts`."""
        rows = self._rows(_LIVE_KEY, {**self._line(collection, as_of_version, None), "key": storable(key)})
        facts = (parse_fact(row["content_json"]) for row in rows)
        return next((fact for fact in facts if fact.key == key), None)

    def superseded_facts(
        self, collection: str, *, as_of_version: int | None = None, with_batch: int | None = None
    ) -> list[Fact]:
        """Facts that were live before and are not any more, each once; arguments as for `live_facts`."""
        parameters = self._line(collection, as_of_version, with_batch)
        return [parse_fact(row["content_json"]) for row in self._rows(_DEAD_FACTS, parameters)]

    def _line(self, collection: str, as_of_version: int | None, with_batch: int | None) -> dict[str, Any]:
        """Parameters of `_LINE`."""
        return {
            "collection": collection,
            "version": self._newest_version(collection) if as_of_version is None else as_of_version,
            "asked": as_of_version,
            "with_batch": with_batch,
        }

    def _newest_version(self, collection: str) -> int:
        row = self._row("SELECT MAX(version) AS version FROM releases WHERE collection = ?", [collection])
        return 0 if row is None or row["version"] is None else int(row["version"])

    def facts_list(
        self,
        collection: str | None = None,
        *,
        status: FactStatus | None = "live",
        search: str | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[FactHistory]:
        """Facts as their batches brought them, oldest first.

        Args:
            collection: None for all.
            status: None for all; a fact then comes once per batch that brought it.
            search: only facts whose prompt, target, subject or relation holds this text (ASCII letters of either case).
            limit: at most so many; -1 for all.
        """
        where, parameters = _filter(collection, status, search)
        rows = self._rows(
            f"{_HISTORY} WHERE {where} ORDER BY h.batch, h.position LIMIT :limit OFFSET :offset",
            {**parameters, "limit": limit, "offset": offset},
        )
        return [_history(row) for row in rows]

    def count_facts(
        self, collection: str | None = None, *, status: FactStatus | None = "live", search: str | None = None
    ) -> int:
        """How many `facts_list` would list without a limit."""
        where, parameters = _filter(collection, status, search)
        row = self._row(
            f"SELECT COUNT(*) AS n FROM fact_history h JOIN facts f ON f.id = h.fact WHERE {where}", parameters
        )
        return 0 if row is None else int(row["n"])

    def key_history(self, key: str, collection: str | None = None) -> list[FactHistory]:
        """All that was ever taught about one key (`Fact.key`), oldest first."""
        rows = self._rows(
            f"{_HISTORY} WHERE f.key = :key AND (:collection IS NULL OR h.collection = :collection) ORDER BY h.batch",
            {"key": key, "collection": collection},
        )
        return [_history(row) for row in rows]

    def fact(self, id_prefix: str) -> FactDetail:
        """One fact by its id or a beginning of it, with or without `sha256:`.

        Raises:
            LedgerError: no fact's id begins so, or several do (listed).
        """
        fact = self._find_fact(id_prefix)
        history = [_history(row) for row in self._rows(f"{_HISTORY} WHERE h.fact = ? ORDER BY h.batch", [fact.id])]
        return FactDetail(
            fact=fact,
            sources=tuple(self._fact_sources(fact.id)),
            history=tuple(history),
            releases=tuple(self._releases_with(fact.id, history)),
            proofs=tuple(
                proof_record(row) for row in self._rows("SELECT * FROM proofs WHERE fact = ? ORDER BY id", [fact.id])
            ),
        )

    def _find_fact(self, id_prefix: str) -> Fact:
        digits = id_prefix.removeprefix("sha256:").lower()
        if re.fullmatch(r"[0-9a-f]{1,64}", digits) is None:
            raise LedgerError(f"{id_prefix}: not a fact's id", "ids are hexadecimal; see `memupdate facts list`")
        rows = self._rows(
            "SELECT id, prompt, content_json FROM facts WHERE id >= ? AND id <= ? ORDER BY id LIMIT 11",
            [f"sha256:{digits}", f"sha256:{digits}g"],
        )
        if not rows:
            raise LedgerError(f"{id_prefix}: no such fact", "see `memupdate facts list` or `memupdate facts search`")
        if len(rows) > 1:
            candidates = [f"{row['id'].removeprefix('sha256:')[:16]}  {row['prompt'][:80]}" for row in rows[:10]]
            candidates += ["and more"] * (len(rows) > 10)
            raise LedgerError(f"{id_prefix}: several facts' ids begin so", "give more of the id", candidates)
        return parse_fact(rows[0]["content_json"])

    def _fact_sources(self, fact_id: str) -> list[FactSource]:
        rows = self._rows(
            "SELECT fs.line, fs.external_id, fs.stated_source, s.* FROM fact_sources fs "
            "JOIN sources s ON s.id = fs.source WHERE fs.fact = ? ORDER BY s.id, fs.line",
            [fact_id],
        )
        return [FactSource(source_record(row), row["line"], row["external_id"], row["stated_source"]) for row in rows]

    def _releases_with(self, fact_id: str, history: Sequence[FactHistory]) -> list[str]:
        names: list[str] = []
        for entry in history:
            held = ("live", "superseded", "retracted", "dropped", "purged")
            if entry.status not in held or entry.release is None or entry.change == "dropped":
                continue
            rows = self._rows(
                """SELECT name FROM good_releases WHERE collection = :collection AND version >= :version AND version <
                COALESCE(
                    (SELECT MIN(later.version) FROM batch_facts s JOIN good_releases later ON later.batch = s.batch
                    WHERE s.supersedes = :fact AND later.collection = :collection AND later.version > :version),
                    version + 1) ORDER BY version""",
                {"collection": entry.collection, "version": entry.version, "fact": fact_id},
            )
            names.extend(row["name"] for row in rows)
        return list(dict.fromkeys(names))

    def verify_facts(self) -> list[str]:
        """Facts whose content no longer gives their id, or whose other columns no longer say what their content says."""
        problems: list[str] = []
        with plain_errors(self.path):
            rows = self._connection.execute("SELECT * FROM facts")
        for row in rows:
            try:
                fact = parse_fact(row["content_json"])
                stored = fact_row(fact, row["created_at_utc"])
            except (ValueError, TypeError, KeyError):
                problems.append(f"facts: fact {row['id']} has no readable content")
                continue
            if fact.id != row["id"]:
                problems.append(f"facts: fact {row['id']} has other content than its hash is of")
                continue
            # What `content_json` says in the version that wrote it may be less than what it would say now.
            altered = [name for name, value in stored.items() if name != "content_json" and row[name] != value]
            if altered:
                problems.append(f"facts: fact {row['id']} has other text in {', '.join(altered)} than in its content")
        return problems


def source_record(row: sqlite3.Row) -> Source:
    """A row of `sources`."""
    return Source(row["id"], row["path"], row["sha256"], row["size_bytes"], row["format"], row["received_at_utc"])


def proof_record(row: sqlite3.Row) -> ProofRecord:
    """A row of `proofs`."""
    values = {name: row[name] for name in row.keys() if name != "id"}  # noqa: SIM118  # a Row iterates over its values
    return ProofRecord(**{**values, "proved": bool(row["proved"])})


def _history(row: sqlite3.Row) -> FactHistory:
    return FactHistory(
        fact=parse_fact(row["content_json"]),
        collection=row["collection"],
        batch=row["batch"],
        batch_state=row["batch_state"],
        change=row["change"],
        supersedes=row["supersedes"],
        outcome=row["outcome"],
        release=row["release"],
        version=row["version"],
        status=row["status"],
        at_utc=row["at_utc"],
    )


def _filter(collection: str | None, status: str | None, search: str | None) -> tuple[str, dict[str, Any]]:
    where = "(:collection IS NULL OR h.collection = :collection) AND (:status IS NULL OR h.status = :status)"
    parameters: dict[str, Any] = {"collection": collection, "status": status}
    if search:
        escaped = search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        parameters["search"] = f"%{escaped}%"
        columns = ("f.prompt", "f.target", "f.subject", "f.relation")
        where += " AND (" + " OR ".join(f"{column} LIKE :search ESCAPE '\\'" for column in columns) + ")"
    return where, parameters
