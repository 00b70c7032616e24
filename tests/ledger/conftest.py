"""Small builders of facts files and releases, shared by the ledger's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memupdate.facts.files import FactsFile, LocatedFact
from memupdate.facts.model import Fact
from memupdate.ledger import Ledger
from memupdate.ledger.records import Batch, ReleaseRecord
from memupdate.storage import text_sha256


class Builder:
    """Drives a ledger the way operations do."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    @staticmethod
    def file(facts: list[Fact], path: str = "facts.jsonl") -> FactsFile:
        located = tuple(LocatedFact(fact, line) for line, fact in enumerate(facts, start=1))
        digest = text_sha256("".join(fact.id for fact in facts))
        return FactsFile(path, digest, 100, "native", located)

    def receive(self, facts: list[Fact], collection: str = "acme", *, publish: bool = True) -> Batch | None:
        return self.ledger.receive_batch(collection, self.file(facts), "{}", publish=publish)

    def release(self, batch: int, *, unproved: tuple[Fact, ...] = (), publish: bool = True) -> ReleaseRecord:
        """Take a received batch to its end."""
        ledger = self.ledger
        ledger.set_plan(batch, '{"rank": 8}')
        ledger.transition(batch, "planned")
        ledger.transition(batch, "trained")
        left_out = {fact.id for fact in unproved}
        ledger.set_outcomes(batch, {item.fact.id: item.fact.id not in left_out for item in ledger.batch_facts(batch)})
        ledger.transition(batch, "verified")
        record = self.record(batch)
        with ledger.transaction():
            ledger.record_release(record)
            ledger.transition(batch, "released")
        if publish:
            ledger.transition(batch, "published")
        return record

    def record(self, batch: int) -> ReleaseRecord:
        collection = self.ledger.batch(batch).collection
        version = self.ledger.next_version(collection)
        name = f"{collection}@v{version}"
        parent = self.ledger.latest_release(collection)
        return ReleaseRecord(
            name=name,
            collection=collection,
            version=version,
            batch=batch,
            parent=parent.name if parent else None,
            relative_path=f"registry/releases/{name}",
            digest=text_sha256(name),
            rank=8,
            placement="mlp-all",
            base_fingerprint=text_sha256("base"),
        )

    def add(self, *facts: Fact, unproved: tuple[Fact, ...] = ()) -> ReleaseRecord:
        batch = self.receive(list(facts))
        assert batch is not None
        return self.release(batch.id, unproved=unproved)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / "ledger.db") as opened:
        yield opened


@pytest.fixture
def build(ledger: Ledger) -> Builder:
    return Builder(ledger)


@pytest.fixture(scope="session")
def builder_of() -> type[Builder]:
    return Builder
