"""Deployment: the proof on the engine, and the alias moved: `publish`, `rollback`. Canaries are in `canaries`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memupdate.errors import EngineError, ProofFailed, UsageError
from memupdate.layout import ADAPTER_WEIGHTS_FILE
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.records import ReleaseRecord
from memupdate.operations import aliases
from memupdate.operations.aliases import entry_of, previous_of, put_back, revive, sync_manifest, take_step, want_canary
from memupdate.operations.answers import seen_before
from memupdate.operations.matching import refuse_unreached
from memupdate.operations.measuring import generated_records, sample_rule
from memupdate.operations.proving import failures_of, near, proof_records, smallest
from memupdate.operations.replicas import NO_ENGINE_HINT, Replica, confirm, prewarm, refuse_small_engines
from memupdate.operations.reports import ProofFailure, PublishReport
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent
from memupdate.serving.client import EngineClient
from memupdate.serving.manifest import Canary, Manifest, with_alias, with_canary
from memupdate.storage import file_sha256
from memupdate.verification.recall import FactProof
from memupdate.verification.sampling import draw

if TYPE_CHECKING:
    from memupdate.training.memory import Memory


@dataclass(frozen=True)
class ServedProof:
    """What the engine showed of one release."""

    facts: tuple[FactProof, ...]
    """One per live fact, from prompt log-probabilities."""
    generated: int
    """Facts asked for by free greedy generation."""
    sampled: str
    """Of how many, and what that says."""
    failures: tuple[ProofFailure, ...]
    """Facts that failed by either."""


def publish(
    session: Session,
    ledger: Ledger,
    name: str,
    *,
    replicas: Sequence[Replica],
    progress: Progress,
    canary_share: float | None = None,
) -> PublishReport:
    """Prove release `name` on the first of `replicas`, warm it on all, move the alias, confirm that each answers with it.

    Where the policy asks for no served proof (`proof.served = false`), the alias moves without one, also without an engine.

    Args:
        canary_share: above 0 and below 1: only this share of the conversations goes to the release; None: all.

    Raises:
        LedgerError: no such release.
        ProofFailed: the engine does not recall every fact, or the router misses one; the alias has not moved.
        EngineError: an engine went away, or goes on answering with another release; the alias is where it was.
        UsageError: the release's files are not what the ledger says, or the alias cannot have this canary.
    """
    started = time.monotonic()
    release = ledger.release(name)
    check_files(session, release)
    manifest = sync_manifest(session, ledger)
    alias, before = release.collection, manifest.aliases.get(release.collection)
    canary = None if canary_share is None else _canary_of(manifest, release, canary_share)
    if session.policy.proof.served and not replicas:
        raise EngineError(f"{name} cannot be proved on the engine: none is running for this workspace", NO_ENGINE_HINT)
    refuse_small_engines(session, release, replicas)
    # A canary is reached by the route that its alias has already.
    refuse_unreached(
        session.layout.registry, ledger, release, before.route if canary and before else session.policy.serving.route
    )
    if canary is not None:
        want_canary(ledger, release, canary.share)
    manifest = revive(session, ledger, manifest, name)
    proof = prove_before_publishing(session, ledger, release, replicas[:1], progress)
    prewarm(session, release, replicas, progress)
    previous = manifest.aliases[alias].release if canary else previous_of(manifest, alias, name)
    _flip(session, ledger, manifest, release, canary, replicas)
    mark_published(ledger, release)
    ended = before.canary.release if before and before.canary and before.canary != canary else None
    notes = (f"the canary {ended} has ended",) if ended and ended != name else ()
    return PublishReport(
        alias=alias, release=name, previous=previous, served=bool(replicas), replicas=len(replicas), canary_share=canary_share,
        facts_proved_served=sum(p.proved for p in proof.facts) if proof else None, generated=proof.generated if proof else None,
        sampled=proof.sampled if proof else "", min_probability=smallest(proof.facts) if proof else None,
        near_threshold=near(proof.facts, session.policy.proof.min_probability) if proof else (),
        duration_s=time.monotonic() - started, messages=notes,
    )  # fmt: skip


def prove_before_publishing(
    session: Session, ledger: Ledger, release: ReleaseRecord, replicas: Sequence[Replica], progress: Progress
) -> ServedProof | None:
    """The proof on each of `replicas`, the last one returned; None where the policy wants none or there is no engine.

    Raises:
        ProofFailed: an engine does not recall every fact.
    """
    proof = None
    for replica in replicas if session.policy.proof.served else ():
        proof = prove_on_engine(session, ledger, release, replica.url, progress)
        if proof.failures:
            raise ProofFailed(
                f"{release.name} is not published: {len(proof.failures)} proof(s) failed on {replica.url}",
                "serve at the dtype that was trained, or raise training.margin in the policy",
                [failure.explanation for failure in proof.failures],
            )
    return proof


def _canary_of(manifest: Manifest, release: ReleaseRecord, share: float) -> Canary:
    """Raises UsageError where the alias cannot have this canary."""
    entry = manifest.aliases.get(release.collection)
    if not 0 < share < 1:
        raise UsageError(f"a canary of {share:.4g} is none", "give a share above 0 and below 1, or publish without")
    if entry is None:
        raise UsageError(
            f"{release.collection} points at nothing yet, so all of it would be the canary", "publish without --canary"
        )
    if entry.release == release.name:
        raise UsageError(f"{release.collection} points at {release.name} already", "a canary is another release")
    return Canary(release.name, share)


def _flip(
    session: Session,
    ledger: Ledger,
    manifest: Manifest,
    release: ReleaseRecord,
    canary: Canary | None,
    replicas: Sequence[Replica],
) -> None:
    """Point the alias, or its canary, at `release`; where a replica then does not answer with it, put it back. Raises EngineError."""
    alias = release.collection
    detail: Mapping[str, str | float | bool | None]
    if canary is None:
        previous = previous_of(manifest, alias, release.name)
        after = with_alias(manifest, alias, release.name, route=session.policy.serving.route)
        kind, detail = aliases.PUBLISHED, {"previous": previous, "served": bool(replicas)}
    else:
        after = with_canary(manifest, alias, canary)
        kind, detail = aliases.CANARY_BEGUN, {"beside": manifest.aliases[alias].release, "share": canary.share}
        if after is not manifest:  # what was answered before it began says nothing about it
            detail = {**detail, **seen_before(session, alias, release.name, manifest.aliases[alias].release, replicas)}
    flip_and_confirm(session, ledger, manifest, after, release, kind, detail, replicas, canary=canary)


def flip_and_confirm(
    session: Session,
    ledger: Ledger,
    before: Manifest,
    after: Manifest,
    release: ReleaseRecord,
    kind: str,
    detail: Mapping[str, str | float | bool | None],
    replicas: Sequence[Replica],
    *,
    canary: Canary | None = None,
) -> None:
    """Take one step; where a replica then does not answer with `release`, put the alias back. Raises EngineError."""
    alias = release.collection
    moved = take_step(session, ledger, before, after, alias=alias, kind=kind, release=release.name, detail=detail)
    try:
        confirm(session, ledger, release, replicas, canary=canary)
    except EngineError as error:
        if moved is not before:
            put_back(session, ledger, moved, alias, before.aliases.get(alias), error.message)
        raise


def check_files(session: Session, release: ReleaseRecord) -> None:
    """Refuse a release whose adapter is not the one that was proved. Raises UsageError."""
    file = session.layout.registry.release(release.name) / ADAPTER_WEIGHTS_FILE
    if not file.is_file():
        raise UsageError(f"{file}: not there", "restore the registry from a backup")
    if file_sha256(file) != release.digest:
        raise UsageError(f"{file}: differs from what was proved and released", "restore the registry from a backup")


def release_memory(session: Session, release: ReleaseRecord) -> Memory:
    """The memory of a release, from its adapter as it was written.

    Raises:
        UsageError: the adapter's file is not the one that was released, or the base model is another one.
    """
    from memupdate.training.memory import load_adapter

    check_files(session, release)
    if release.base_fingerprint != session.fingerprint:
        raise UsageError(
            f"{release.name} belongs to another base model", f"its fingerprint is {release.base_fingerprint}"
        )
    return load_adapter(session.layout.registry.release(release.name))


def prove_on_engine(
    session: Session, ledger: Ledger, release: ReleaseRecord, url: str, progress: Progress
) -> ServedProof:
    """All live facts by prompt log-probabilities, a sample by free generation; recorded in the ledger. Raises EngineError."""
    from memupdate.verification.served import generate_served, prove_served

    policy = session.policy
    facts = ledger.live_facts(release.collection, as_of_version=release.version)
    examples = session.renderer.render_all(facts)
    progress(ProgressEvent("prove served", 0, len(facts), f"{release.name} on {url}"))
    with EngineClient(url, session.api_key) as client:
        proofs = prove_served(client, release.name, examples, min_probability=policy.proof.min_probability)
        rule = sample_rule(session, "served_sample")
        sample = draw(examples, rule.size(len(examples)), seed=release.version)
        progress(ProgressEvent("generate served", 0, len(sample), rule.statement(len(sample), len(examples))))
        answers = generate_served(client, release.name, sample, template_kwargs=policy.facts.chat_template_kwargs)
    proved = sum(p.proved for p in proofs)
    progress(ProgressEvent("prove served", len(facts), len(facts), f"{proved} of {len(facts)} proved"))
    with ledger.transaction():
        ledger.record_proofs(proof_records(release.name, "served", proofs))
        ledger.record_measures(release.name, generated_records(release.name, answers))
    wrong = tuple(
        ProofFailure(
            a.example.fact_id,
            a.example.prompt,
            f"{a.example.prompt!r}: {a.model} generates {a.text!r}, not {a.example.answer!r}",
        )
        for a in answers
        if not a.matches
    )
    statement = rule.statement(len(answers), len(examples))
    return ServedProof(tuple(proofs), len(answers), statement, failures_of(proofs) + wrong)


def mark_published(ledger: Ledger, release: ReleaseRecord) -> None:
    """The batch of `release` and those before it, whose facts it carries, are published now."""
    with ledger.transaction():
        for batch in ledger.batches(release.collection):
            if batch.state != "released" or batch.release is None:
                continue
            if ledger.release(batch.release).version <= release.version:
                ledger.transition(batch.id, "published", {"release": release.name})


def rollback(session: Session, ledger: Ledger, alias: str, *, replicas: Sequence[Replica]) -> PublishReport:
    """End the canary of `alias`, or, where none runs, point it at the release before. Nothing is trained and nothing proved again.

    Raises:
        UsageError: there is nothing to go back to.
        EngineError: the alias has moved, but an engine does not answer with it.
    """
    started = time.monotonic()
    manifest = sync_manifest(session, ledger)
    entry = entry_of(manifest, alias)
    left = entry.canary.release if entry.canary else entry.release
    if entry.canary is None and entry.previous is None:
        raise UsageError(f"{alias}: {entry.release} is the first release published; nothing to go back to")
    target = ledger.release(entry.release if entry.canary or entry.previous is None else entry.previous)
    check_files(session, target)
    # Not `flip_and_confirm`: a rollback stands even where an engine is too ill to confirm it.
    manifest = revive(session, ledger, manifest, target.name)
    after = with_alias(manifest, alias, target.name)
    take_step(
        session,
        ledger,
        manifest,
        after,
        alias=alias,
        kind=aliases.ROLLED_BACK,
        release=target.name,
        detail={"from": left},
    )
    confirm(session, ledger, target, replicas)
    note = f"{left} stays in the registry; the next batch builds on the latest release, not on {target.name}"
    return PublishReport(
        alias=alias, release=target.name, previous=left, served=bool(replicas), replicas=len(replicas),
        duration_s=time.monotonic() - started, messages=(note,),
    )  # fmt: skip
