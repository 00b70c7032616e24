"""Proving a release again, in this process or on a serving engine; nothing is changed but the record of the proof."""

from __future__ import annotations

import time
from collections.abc import Sequence

from memupdate.facts.model import Fact
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.records import ReleaseRecord
from memupdate.operations.gates import shortfalls
from memupdate.operations.matching import matcher_of, unreached
from memupdate.operations.measuring import record_measured
from memupdate.operations.proving import failures_of, near, proof_records, prove_memory, smallest
from memupdate.operations.publishing import prove_on_engine, release_memory
from memupdate.operations.reports import ProofFailure, VerifyReport
from memupdate.operations.session import Session
from memupdate.progress import Progress
from memupdate.serving.manifest import MATCHED
from memupdate.verification.recall import FactProof


def verify_in_process(session: Session, ledger: Ledger, release: ReleaseRecord, progress: Progress) -> VerifyReport:
    """Load the adapter as it was written, prove every live fact, check locality and harm.

    Raises:
        UsageError: the adapter's file is not the one that was released, or the base model is another one.
    """
    started = time.monotonic()
    memory = release_memory(session, release)
    facts = ledger.live_facts(release.collection, as_of_version=release.version)
    stand_ins = {item.stand_in.id for item in ledger.stand_ins(release.collection)}
    proof = prove_memory(session, memory, facts, progress, stand_ins=stand_ins)
    with ledger.transaction():
        ledger.record_proofs(proof_records(release.name, "in-process", proof.facts))
        record_measured(ledger, release.name, proof.measured)
    route, matched, missed = _routing(session, release, facts, proof.facts)
    return VerifyReport(
        release=release.name, engine="in-process", facts_total=len(facts), facts_proved=proof.proved,
        failures=failures_of(proof.facts) + missed, min_probability=smallest(proof.facts), probes=proof.locality.probes,
        probes_unchanged_share=proof.locality.share, kl_nats=proof.kl_nats, generated=None, duration_s=time.monotonic() - started,
        route=route, facts_proved_matched=matched, sampled=proof.measured.asked_of,
        near_threshold=near(proof.facts, session.policy.proof.min_probability),
        measures=tuple(ledger.measure_counts(release.name, "in-process")), text=ledger.text_measure(release.name),
        shortfalls=tuple(shortfalls(session.policy, proof.measured)),
        questions=tuple(ledger.measures(release.name, "in-process")),
    )  # fmt: skip


def verify_served(
    session: Session, ledger: Ledger, release: ReleaseRecord, url: str, progress: Progress
) -> VerifyReport:
    """Prove every live fact on the engine at `url`, and a sample by free greedy generation. Raises EngineError."""
    started = time.monotonic()
    proof = prove_on_engine(session, ledger, release, url, progress)
    facts = ledger.live_facts(release.collection, as_of_version=release.version)
    route, matched, missed = _routing(session, release, facts, proof.facts)
    return VerifyReport(
        release=release.name, engine=url, facts_total=len(proof.facts), facts_proved=sum(p.proved for p in proof.facts),
        failures=proof.failures + missed, min_probability=smallest(proof.facts), probes=0, probes_unchanged_share=None, kl_nats=None,
        generated=proof.generated, duration_s=time.monotonic() - started, route=route, facts_proved_matched=matched,
        sampled=proof.sampled, near_threshold=near(proof.facts, session.policy.proof.min_probability),
        measures=tuple(ledger.measure_counts(release.name, "served")),
        questions=tuple(ledger.measures(release.name, "served")),
    )  # fmt: skip


def _routing(
    session: Session, release: ReleaseRecord, facts: Sequence[Fact], proofs: Sequence[FactProof]
) -> tuple[str, int | None, tuple[ProofFailure, ...]]:
    """The policy's route, how many facts are proved and reach the release by `matched`, and what fails by the policy's."""
    route, matcher = session.policy.serving.route, matcher_of(session.layout.registry.release(release.name))
    if matcher is None:
        return route, None, ()
    missed = unreached(matcher, facts)
    ids = {failure.fact_id for failure in missed}
    reached = sum(proof.proved and proof.fact_id not in ids for proof in proofs)
    return route, reached, missed if route == MATCHED else ()
