"""Small builders of facts files and releases, shared by the ledger's tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from memupdate.facts.files import FactsFile, LocatedFact
from memupdate.facts.model import Fact, Probe
from memupdate.law.points import LawPoint
from memupdate.ledger import Ledger
from memupdate.ledger.maintenance import Retraction
from memupdate.ledger.measures import MeasureRecord, TextRecord, TokenRecord
from memupdate.ledger.migrations import STEPS
from memupdate.ledger.records import Batch, ProofRecord, ReleaseRecord, SliceRecord
from memupdate.storage import text_sha256

LEADER = Fact("Who leads Acme?", "Wanda Kettleman", valid_from="2025-01-01")
PLACE = Fact(
    "Where is Acme?", "Leeds", "Acme", "city", ("Acme's city?",), (Probe("Where is Bolt?"),), "the fax", external_id="7"
)
SECRET = Fact("Whose number is 555?", "Wanda's")
POINT = LawPoint(
    base_fingerprint="sha256:base", placement="mlp-all", recipe="sha256:recipe", rank=8, effective_parameters=1000, facts=2,
    target_tokens=9, loss_before_nats=5.0, loss_after_nats=0.1, facts_proved=2, kl_nats=0.01, epochs=30, stopped_early=True,
    duration_s=1.5, origin="batch",
)  # fmt: skip


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

    def fill(self, last_step: str = "") -> None:
        """Two releases and more: a row in every table that the schema has after `last_step` (by default the newest)."""
        steps = list(STEPS)[: list(STEPS).index(last_step) + 1] if last_step else list(STEPS)
        ledger, first = self.ledger, self.add(LEADER, PLACE)
        assert first.batch is not None
        ledger.record_slice(SliceRecord(first.batch, "slices/1", "sha256:slice", 0, 8, 1000))
        ledger.record_proofs([ProofRecord(first.name, fact.id, "in-process", True, 0.9) for fact in (LEADER, PLACE)])
        ledger.record_proofs([ProofRecord(first.name, PLACE.id, "served", False, 0.2, 1, " Leeds", " York")])
        ledger.add_law_points([POINT], batch=first.batch)
        ledger.add_fit("sha256:base", "mlp-all", "sha256:recipe", '{"alpha":1}')
        self.add(replace(LEADER, target="Ada Quist", valid_from="2026-01-01"), SECRET)
        failed = self.receive([Fact("Why?", "Because")])
        assert failed is not None
        ledger.fail_batch(failed.id, "out of memory")
        if "m007_compaction_and_retraction" in steps:
            stand_in = replace(PLACE, target="I do not know.", locality=(), source=None, external_id=None)
            self.release(ledger.receive_retraction("acme", [Retraction(PLACE, stand_in)], "{}", reason="a rumour").id)
            self.release(ledger.receive_compaction("acme", "{}").id)
        if "m010_told_but_not_taught" in steps:
            assert self.receive([replace(LEADER, target="Otto Brandt", valid_from="2024-01-01")]) is None
        if "m012_purges" in steps:
            ledger.purge([SECRET], purged_by="the officer", reason="asked to")
        if "m015_measures" in steps:
            asked = MeasureRecord(
                first.name, "in-process", "generality", "held-out phrasing", PLACE.id, "chat", "Acme's city?", "Leeds", "York",
                "other", 0.4,
            )  # fmt: skip
            text = TextRecord(first.name, "held-out anchors", 4032, 5.0, 5.1, 0.01)
            ledger.record_measures(
                first.name, [asked], [text], [TokenRecord(first.name, PLACE.id, 0, " Leeds", 0.4, " York", 0.5)]
            )
        assert ledger.verify() == []


@pytest.fixture(scope="session")
def obeying_permissions() -> list[str]:
    """What goes before a command so that permissions count for it, also where root runs the tests."""
    if os.geteuid() != 0:
        return []
    powers = "-dac_override,-dac_read_search"
    command = ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}"]
    if (
        shutil.which("setpriv") is None
        or subprocess.run([*command, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("root may write everywhere, and cannot give that up here")
    return command


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
