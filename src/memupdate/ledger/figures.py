"""What a report shows of the ledger, counted in SQL: one record per release, the weakest facts, how sure the proofs are.

Invariant: no method reads more rows into Python than it returns, whatever the ledger's size; proofs are counted from
their index alone. A fact that was proved several times on one engine counts by its newest proof there. Nothing here
knows laws or plans.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass

from memupdate.ledger.database import LedgerDatabase
from memupdate.ledger.records import Engine

_RELEASES = """
SELECT r.name, r.collection, r.version, r.rank, r.placement, r.created_at_utc, r.batch, b.kind, b.plan_json,
    COALESCE(b.facts_new, 0) AS facts_new, COALESCE(b.facts_superseding, 0) AS facts_superseding,
    COALESCE(b.facts_unproved, 0) AS facts_unproved,
    p.target_tokens, p.effective_parameters, p.facts AS point_facts, p.facts_proved AS point_proved,
    p.loss_before_nats, p.loss_after_nats, p.kl_nats, p.duration_s,
    (SELECT detail_json FROM events e WHERE e.batch = r.batch AND e.kind = 'state'
        AND json_extract(e.detail_json, '$.state') = 'verified' ORDER BY e.id DESC LIMIT 1) AS verified_json
FROM good_releases r
LEFT JOIN batch_summary b ON b.id = r.batch
LEFT JOIN law_points p ON p.rowid = (SELECT MAX(rowid) FROM law_points WHERE batch = r.batch)
WHERE :collection IS NULL OR r.collection = :collection
ORDER BY r.collection, r.version
"""

_IS_NEWEST = """NOT EXISTS (
    SELECT 1 FROM proofs n WHERE n.release = p.release AND n.engine = p.engine AND n.fact = p.fact AND n.id > p.id
)"""
"""For few rows, where `latest_proofs` would group them all."""

_PROVED = """
SELECT release, engine, COUNT(DISTINCT fact) AS facts, MIN(min_probability) AS min_probability
FROM proofs GROUP BY release, engine
"""

_UNPROVED = f"""
SELECT p.release, p.engine, COUNT(*) AS facts FROM proofs p WHERE p.proved = 0 AND {_IS_NEWEST} GROUP BY p.release, p.engine
"""

_REGRESSIONS = f"""
SELECT p.release, COUNT(DISTINCT p.fact) AS facts FROM proofs p CROSS JOIN releases r ON r.name = p.release
WHERE p.proved = 0 AND EXISTS (
    SELECT 1 FROM proofs e CROSS JOIN releases er ON er.name = e.release
    WHERE e.fact = p.fact AND e.proved = 1 AND er.collection = r.collection AND er.version < r.version
) AND {_IS_NEWEST} GROUP BY p.release
"""
"""Facts that an earlier release had proved and this one did not. CROSS JOIN keeps SQLite to the order
written, from the failures, which are few."""

_WEAKEST = """
SELECT fact FROM latest_proofs WHERE release = :release AND engine = :engine
ORDER BY COALESCE(min_probability, 0), fact LIMIT :limit
"""

_FAILED = """
SELECT fact FROM proofs WHERE proved = 0 AND release IN (SELECT name FROM releases WHERE collection = :collection)
GROUP BY +fact ORDER BY COUNT(*) DESC, fact LIMIT :limit
"""

_FACT_PROOFS = f"""
SELECT p.release, r.version, p.engine, p.proved, p.min_probability, p.failed_position, p.failed_token, p.emitted_token
FROM proofs p JOIN releases r ON r.name = p.release
WHERE p.fact = :fact AND r.collection = :collection AND {_IS_NEWEST} ORDER BY r.version, p.engine
"""


@dataclass(frozen=True)
class EngineProofs:
    """How a release did on one engine."""

    engine: Engine
    facts: int
    """Facts tested."""
    proved: int
    min_probability: float | None
    """The smallest that any proof of the release measured, 0 to 1."""


@dataclass(frozen=True)
class ReleaseFigures:
    """One release in numbers; None where nothing was measured."""

    name: str
    collection: str
    version: int
    rank: int
    placement: str
    created_at_utc: str
    batch: int | None
    kind: str | None
    """What its batch did: `add`, `compact` or `retract`."""
    plan_json: str | None
    facts_new: int
    facts_superseding: int
    facts_unproved: int
    """Facts of its own batch that are not stored."""
    facts_measured: int | None
    """Facts in the memory when its loss was measured."""
    facts_measured_proved: int | None
    target_tokens: int | None
    """Target tokens of all facts in the memory."""
    effective_parameters: int | None
    loss_before_nats: float | None
    loss_after_nats: float | None
    kl_nats: float | None
    """Harm, nats per token of held-out base-model text."""
    probes_unchanged_share: float | None
    """Share of what the base model knew that is answered as before, 0 to 1."""
    duration_s: float | None
    proofs: tuple[EngineProofs, ...]
    regressions: int
    """Facts that an earlier release had proved and this one did not, on either engine."""


@dataclass(frozen=True)
class ReleaseProbability:
    """The weakest token of one fact in one release."""

    release: str
    engine: Engine
    proved: bool
    min_probability: float | None


@dataclass(frozen=True)
class WeakFact:
    """A fact that failed a proof, or passed with little to spare."""

    fact: str
    """Its id."""
    prompt: str
    target: str
    collection: str
    is_live: bool
    proofs: tuple[ReleaseProbability, ...]
    """The newest on each engine, by release."""
    times_unproved: int
    min_probability: float | None
    """The smallest over all of these."""
    failed_position: int | None
    """Of its newest failure: 0-based token of the target."""
    failed_token: str | None
    emitted_token: str | None


@dataclass(frozen=True)
class Margins:
    """How sure the newest proofs of one release are: facts by the probability of their weakest token."""

    release: str
    engine: Engine
    counts: tuple[int, ...]
    """Facts in equal bins from 0 to 1; the last one holds 1 itself."""
    facts: int
    unknown: int
    """Facts whose proof came without a probability."""


class Figures(LedgerDatabase):
    """Counts for reports."""

    def release_figures(self, collection: str | None = None) -> list[ReleaseFigures]:
        """All releases that did not fail, by collection and version."""
        proofs, regressions = self._proofs_by_release(), self._counts(_REGRESSIONS)
        rows = self._rows(_RELEASES, {"collection": collection})
        return [_release(row, proofs.get(row["name"], ()), regressions.get(row["name"], 0)) for row in rows]

    def margins(self, release: str, engine: Engine, *, bins: int) -> Margins:
        """The histogram of one release on one engine."""
        rows = self._rows(
            "SELECT MIN(CAST(min_probability * :bins AS INTEGER), :bins - 1) AS bin, COUNT(*) AS facts "
            "FROM latest_proofs WHERE release = :release AND engine = :engine GROUP BY bin",
            {"bins": bins, "release": release, "engine": engine},
        )
        found = {row["bin"]: int(row["facts"]) for row in rows}
        unknown = found.pop(None, 0)
        return Margins(
            release, engine, tuple(found.get(index, 0) for index in range(bins)), sum(found.values()) + unknown, unknown
        )

    def weak_facts(self, collection: str, release: str, engine: Engine, *, limit: int) -> list[WeakFact]:
        """Facts that failed most often in any release, then those that `release` is the least sure of on `engine`."""
        failed = self._rows(_FAILED, {"collection": collection, "limit": limit})
        weakest = self._rows(_WEAKEST, {"release": release, "engine": engine, "limit": limit})
        ids = list(dict.fromkeys(row["fact"] for row in [*failed, *weakest]))[:limit]
        return [self._weak_fact(fact, collection) for fact in ids]

    def _weak_fact(self, fact: str, collection: str) -> WeakFact:
        text = self._row("SELECT prompt, target FROM facts WHERE id = ?", [fact])
        assert text is not None  # proofs refer to facts
        rows = self._rows(_FACT_PROOFS, {"fact": fact, "collection": collection})
        failures = [row for row in rows if not row["proved"]]
        newest = failures[-1] if failures else None
        live = self._row(
            "SELECT 1 FROM fact_history WHERE fact = ? AND collection = ? AND status = 'live'", [fact, collection]
        )
        return WeakFact(
            fact=fact,
            prompt=text["prompt"],
            target=text["target"],
            collection=collection,
            is_live=live is not None,
            proofs=tuple(
                ReleaseProbability(row["release"], row["engine"], bool(row["proved"]), row["min_probability"])
                for row in rows
            ),
            times_unproved=len(failures),
            min_probability=min((r["min_probability"] for r in rows if r["min_probability"] is not None), default=None),
            failed_position=newest["failed_position"] if newest else None,
            failed_token=newest["failed_token"] if newest else None,
            emitted_token=newest["emitted_token"] if newest else None,
        )

    def _proofs_by_release(self) -> dict[str, tuple[EngineProofs, ...]]:
        unproved = {(row["release"], row["engine"]): int(row["facts"]) for row in self._rows(_UNPROVED)}
        found: dict[str, tuple[EngineProofs, ...]] = {}
        for row in self._rows(_PROVED):
            release, engine, facts = row["release"], row["engine"], int(row["facts"])
            proved = facts - unproved.get((release, engine), 0)
            found[release] = (*found.get(release, ()), EngineProofs(engine, facts, proved, row["min_probability"]))
        return found

    def _counts(self, sql: str) -> dict[str, int]:
        return {row["release"]: int(row["facts"]) for row in self._rows(sql)}


def _release(row: sqlite3.Row, proofs: tuple[EngineProofs, ...], regressions: int) -> ReleaseFigures:
    verified = json.loads(row["verified_json"]) if row["verified_json"] else {}
    return ReleaseFigures(
        name=row["name"],
        collection=row["collection"],
        version=row["version"],
        rank=row["rank"],
        placement=row["placement"],
        created_at_utc=row["created_at_utc"],
        batch=row["batch"],
        kind=row["kind"],
        plan_json=row["plan_json"],
        facts_new=row["facts_new"],
        facts_superseding=row["facts_superseding"],
        facts_unproved=row["facts_unproved"],
        facts_measured=row["point_facts"],
        facts_measured_proved=row["point_proved"],
        target_tokens=row["target_tokens"],
        effective_parameters=row["effective_parameters"],
        loss_before_nats=row["loss_before_nats"],
        loss_after_nats=row["loss_after_nats"],
        kl_nats=verified.get("kl_nats", row["kl_nats"]),
        probes_unchanged_share=verified.get("probes_unchanged"),
        duration_s=row["duration_s"],
        proofs=proofs,
        regressions=regressions,
    )
