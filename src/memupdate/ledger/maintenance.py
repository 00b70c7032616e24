"""Batches that bring no file of facts: compactions, and retractions with what stands in for the facts taken back.

Invariant: a compaction's batch drops exactly the stand-ins that were live when it was received, so that what it writes is
all live facts and nothing else; no other batch of the collection can come between. How they are trained and what proves
them is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memupdate.facts.model import Fact
from memupdate.ledger.batches import Batches
from memupdate.ledger.clock import utc_now
from memupdate.ledger.content import fact_row, parse_fact, storable
from memupdate.ledger.records import Batch, BatchKind, Change
from memupdate.storage import canonical_json, text_sha256

_COMMANDS: dict[BatchKind, str] = {"compact": "memupdate compact", "retract": "memupdate facts retract"}
"""What is written down as the source of such a batch, in the place of a file's path."""

_STAND_INS = """
SELECT r.content_json AS stand_in_json, o.content_json AS retracted_json
FROM fact_history h JOIN facts r ON r.id = h.fact JOIN facts o ON o.id = h.supersedes
WHERE h.collection = :collection AND h.change = 'retracting' AND (h.status = 'live' OR h.batch = :with_batch)
ORDER BY h.batch, h.position
"""

_DEAD = """
SELECT COUNT(*) AS n FROM batch_facts bf JOIN good_releases r ON r.batch = bf.batch
WHERE r.collection = :collection AND bf.change IN ('superseding', 'retracting') AND r.version > COALESCE((
    SELECT MAX(c.version) FROM good_releases c JOIN batches b ON b.id = c.batch
    WHERE c.collection = :collection AND b.kind = 'compact'
), 0)
"""

_REPLACED = """
SELECT f.id, f.content_json FROM batch_facts gone
JOIN batches b ON b.id = gone.batch JOIN facts f ON f.id = gone.supersedes
WHERE b.collection = :collection AND gone.change IN ('superseding', 'retracting')
    AND (b.id = :with_batch OR b.id IN (SELECT batch FROM good_releases))
    AND f.id NOT IN (SELECT fact FROM purges)
    AND NOT EXISTS (SELECT 1 FROM batch_facts s JOIN batches sb ON sb.id = s.batch
        WHERE s.fact = f.id AND s.change = 'retracting' AND sb.collection = :collection)
GROUP BY f.id ORDER BY MIN(gone.batch), MIN(gone.position)
"""


@dataclass(frozen=True)
class Retraction:
    """A fact that was taken back, and what the model says in its place until a compaction."""

    retracted: Fact
    stand_in: Fact


class Maintenance(Batches):
    """Compactions and retractions."""

    def receive_compaction(
        self, collection: str, policy_json: str, *, publish: bool = True, reason: str | None = None
    ) -> Batch:
        """A batch that writes all live facts afresh and drops the stand-ins of retracted ones.

        Raises:
            LedgerError: the collection has a batch that is not released yet.
        """
        with self.transaction():
            stand_ins = self.stand_ins(collection)
            batch = self._receive(
                "compact", collection, policy_json, canonical_json({"reason": reason}), publish, reason
            )
            self._add_facts(batch, "dropped", [(item.retracted, item.stand_in) for item in stand_ins])
            return self.batch(batch)

    def receive_retraction(
        self,
        collection: str,
        retractions: Sequence[Retraction],
        policy_json: str,
        *,
        publish: bool = True,
        reason: str | None = None,
    ) -> Batch:
        """A batch in which each stand-in supersedes the fact that is taken back.

        Raises:
            LedgerError: the collection has a batch that is not released yet.
        """
        content = canonical_json({"facts": [item.retracted.id for item in retractions], "reason": reason})
        with self.transaction():
            batch = self._receive("retract", collection, policy_json, content, publish, reason)
            now = utc_now()
            self._insert_all("facts", [fact_row(item.stand_in, now) for item in retractions], ignore=True)
            self._add_facts(batch, "retracting", [(item.stand_in, item.retracted) for item in retractions])
            return self.batch(batch)

    def _receive(
        self, kind: BatchKind, collection: str, policy_json: str, content: str, publish: bool, reason: str | None
    ) -> int:
        self.ensure_collection(collection)
        self._refuse_unfinished(collection)
        now = utc_now()
        row = {
            "collection": collection,
            "source": self._store_command(_COMMANDS[kind], content),
            "state": "received",
            "publish": int(publish),
            "facts_unchanged": 0,
            "policy_json": policy_json,
            "kind": kind,
            "reason": storable(reason),
            "created_at_utc": now,
            "updated_at_utc": now,
        }
        batch = self._insert("batches", row)
        self.add_event("state", collection=collection, batch=batch, detail={"state": "received", "kind": kind})
        return batch

    def _store_command(self, command: str, content: str) -> int:
        row = {
            "path": command,
            "sha256": text_sha256(content),
            "size_bytes": len(content.encode("utf-8", "surrogatepass")),
            "format": "command",
            "received_at_utc": utc_now(),
        }
        self._insert_all("sources", [row], ignore=True)
        found = self._row("SELECT id FROM sources WHERE path = :path AND sha256 = :sha256", row)
        assert found is not None  # inserted just above, in the same transaction
        return int(found["id"])

    def _add_facts(self, batch: int, change: Change, pairs: Sequence[tuple[Fact, Fact]]) -> None:
        rows = [
            {"batch": batch, "fact": fact.id, "position": position, "change": change, "supersedes": ended.id}
            for position, (fact, ended) in enumerate(pairs)
        ]
        self._insert_all("batch_facts", rows)

    def stand_ins(self, collection: str, *, with_batch: int | None = None) -> list[Retraction]:
        """Retractions whose stand-in is live, and those of the unfinished batch `with_batch`; oldest first."""
        rows = self._rows(_STAND_INS, {"collection": collection, "with_batch": with_batch})
        return [Retraction(parse_fact(row["retracted_json"]), parse_fact(row["stand_in_json"])) for row in rows]

    def replaced_facts(self, collection: str, *, with_batch: int | None = None) -> list[Fact]:
        """Facts of the operator's that were superseded or retracted and are not live, each once; no stand-ins.

        Args:
            with_batch: an unfinished batch, taken as if it were released now.
        """
        live = {fact.id for fact in self.live_facts(collection, with_batch=with_batch)}
        rows = self._rows(_REPLACED, {"collection": collection, "with_batch": with_batch})
        return [parse_fact(row["content_json"]) for row in rows if row["id"] not in live]

    def superseded_by(self, batch: int) -> list[Fact]:
        """The facts that a batch supersedes or retracts, in its order; not the stand-ins that a compaction drops."""
        rows = self._rows(
            "SELECT f.content_json FROM batch_facts bf JOIN facts f ON f.id = bf.supersedes "
            "WHERE bf.batch = ? AND bf.change IN ('superseding', 'retracting') "
            "AND f.id NOT IN (SELECT fact FROM purges) ORDER BY bf.position",
            [batch],
        )
        return [parse_fact(row["content_json"]) for row in rows]

    def dead_count(self, collection: str) -> int:
        """Answers whose traces are still in the weights: superseded or retracted since the last compaction."""
        row = self._row(_DEAD, {"collection": collection})
        return 0 if row is None else int(row["n"])

    def measured_harm(self, release: str) -> float | None:
        """Harm of a release as its batch measured it, nats per token; None where it was not measured."""
        row = self._row(
            "SELECT p.kl_nats FROM law_points p JOIN releases r ON r.batch = p.batch WHERE r.name = ? "
            "ORDER BY p.rowid DESC LIMIT 1",
            [release],
        )
        return None if row is None else row["kl_nats"]
