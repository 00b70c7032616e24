"""Deployment: the manifest kept in step with the ledger, the proof on the engine, and the alias, which is all that moves."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from memupdate.errors import EngineError, ProofFailed, UsageError
from memupdate.layout import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.records import ReleaseRecord
from memupdate.operations.matching import matcher_digest
from memupdate.operations.proving import failures_of, proof_records
from memupdate.operations.reports import ProofFailure, PublishReport
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent
from memupdate.serving.access import Binding, rules_json
from memupdate.serving.client import EngineClient
from memupdate.serving.engine_record import running_engine
from memupdate.serving.manifest import Manifest, ReleaseEntry, read_manifest, with_alias, with_release, write_manifest
from memupdate.storage import file_sha256, write_text_atomic
from memupdate.verification.recall import FactProof

NO_ENGINE_HINT = "start one with `memupdate serve`; the alias moves as soon as the engine has proved the release"


@dataclass(frozen=True)
class ServedProof:
    """What the engine showed of one release."""

    facts: tuple[FactProof, ...]
    """One per live fact, from prompt log-probabilities."""
    generated: int
    """Facts asked for by free greedy generation."""
    failures: tuple[ProofFailure, ...]
    """Facts that failed by either."""


def sync_manifest(session: Session, ledger: Ledger) -> Manifest:
    """The manifest with every release of the ledger in it; written only if something was missing (after a crash, say)."""
    path = session.layout.registry.manifest
    manifest = before = read_manifest(path) if path.exists() else Manifest(session.fingerprint)
    for release in ledger.releases(failed=False):
        if release.name in manifest.releases:
            continue
        folder = session.layout.registry.release(release.name)
        entry = ReleaseEntry(
            digest=release.digest,
            config_digest=file_sha256(folder / ADAPTER_CONFIG_FILE),
            rank=release.rank,
            lora_int_id=manifest.next_lora_int_id(),
            base_fingerprint=release.base_fingerprint,
            matcher_digest=matcher_digest(folder),
        )
        manifest = with_release(manifest, release.name, entry)
    if manifest is not before or not path.exists():
        write_manifest(path, manifest)
    sync_access(session)
    return manifest


def sync_access(session: Session) -> Path | None:
    """The file that binds API keys to collections, as the policy has them; None where none are bound.

    A file stays when the policy has no keys (any more): opening an engine to everybody is for the operator to do by hand.
    """
    path = session.layout.registry.access
    if keys := session.policy.access.keys:
        bindings = [
            (key.sha256, Binding(None if key.collections == ("*",) else frozenset(key.collections), key.base_model))
            for key in keys
        ]
        text = rules_json(bindings)
        if not path.exists() or path.read_text() != text:
            write_text_atomic(path, text)
    return path if path.exists() else None


def engine_url(session: Session) -> str | None:
    """The running engine of this workspace; None without one."""
    engine = running_engine(session.layout.engine)
    return None if engine is None else engine.url


def publish(session: Session, ledger: Ledger, name: str, *, url: str | None, progress: Progress) -> PublishReport:
    """Prove release `name` on the engine at `url`, move the alias, confirm that the alias answers with it.

    Where the policy asks for no served proof (`proof.served = false`), the alias moves without one, also without an engine.

    Raises:
        LedgerError: no such release.
        ProofFailed: the engine does not recall every fact; the alias has not moved.
        EngineError: the engine went away, or goes on answering with another release; the alias is where it was.
        UsageError: the release's files are not what the ledger says.
    """
    started = time.monotonic()
    release = ledger.release(name)
    check_files(session, release)
    manifest = sync_manifest(session, ledger)
    alias = release.collection
    previous = previous_of(manifest, alias, name)
    if session.policy.proof.served and url is None:
        raise EngineError(f"{name} cannot be proved on the engine: none is running for this workspace", NO_ENGINE_HINT)
    refuse_small_engine(session, release, url)
    proof = prove_on_engine(session, ledger, release, url, progress) if url and session.policy.proof.served else None
    if proof is not None and proof.failures:
        raise ProofFailed(
            f"{name} is not published: {len(proof.failures)} proof(s) failed on {url}",
            "serve at the dtype that was trained, or raise training.margin in the policy",
            [failure.explanation for failure in proof.failures],
        )
    move_alias(session, ledger, manifest, release, url)
    with ledger.transaction():
        mark_published(ledger, release)
        ledger.add_event(
            "published",
            collection=alias,
            release=name,
            detail={"alias": alias, "previous": previous, "served": url is not None},
        )
    return PublishReport(
        alias=alias, release=name, previous=previous, served=url is not None,
        facts_proved_served=sum(p.proved for p in proof.facts) if proof else None, generated=proof.generated if proof else None,
        duration_s=time.monotonic() - started,
    )  # fmt: skip


def previous_of(manifest: Manifest, alias: str, name: str) -> str | None:
    """What `alias` pointed at before `name`, also where a crash came between moving the alias and writing it down."""
    entry = manifest.aliases.get(alias)
    if entry is None:
        return None
    return entry.previous if entry.release == name else entry.release


def check_files(session: Session, release: ReleaseRecord) -> None:
    """Refuse a release whose adapter is not the one that was proved. Raises UsageError."""
    file = session.layout.registry.release(release.name) / ADAPTER_WEIGHTS_FILE
    if not file.is_file():
        raise UsageError(f"{file}: not there", "restore the registry from a backup")
    if file_sha256(file) != release.digest:
        raise UsageError(f"{file}: differs from what was proved and released", "restore the registry from a backup")


def prove_on_engine(
    session: Session, ledger: Ledger, release: ReleaseRecord, url: str, progress: Progress
) -> ServedProof:
    """All live facts by prompt log-probabilities, a sample by free generation; recorded in the ledger. Raises EngineError."""
    from memupdate.verification.served import generate_served, prove_served, sample_examples

    policy = session.policy
    facts = ledger.live_facts(release.collection, as_of_version=release.version)
    examples = session.renderer.render_all(facts)
    progress(ProgressEvent("prove served", 0, len(facts), f"{release.name} on {url}"))
    with EngineClient(url, session.api_key) as client:
        proofs = prove_served(client, release.name, examples, min_probability=policy.proof.min_probability)
        sample = sample_examples(examples, policy.proof.served_sample, seed=release.version)
        answers = generate_served(client, release.name, sample, template_kwargs=policy.facts.chat_template_kwargs)
    proved = sum(p.proved for p in proofs)
    progress(ProgressEvent("prove served", len(facts), len(facts), f"{proved} of {len(facts)} proved"))
    ledger.record_proofs(proof_records(release.name, "served", proofs))
    wrong = tuple(
        ProofFailure(
            a.example.fact_id,
            a.example.prompt,
            f"{a.example.prompt!r}: {a.model} generates {a.text!r}, not {a.example.answer!r}",
        )
        for a in answers
        if not a.matches
    )
    return ServedProof(tuple(proofs), len(answers), failures_of(proofs) + wrong)


def refuse_small_engine(session: Session, release: ReleaseRecord, url: str | None) -> None:
    """The engine's LoRA slots were sized when it started. Raises EngineError for a release that has outgrown them."""
    engine = running_engine(session.layout.engine)
    if engine is not None and engine.url == url and release.rank > engine.max_lora_rank:
        raise EngineError(
            f"{release.name} has rank {release.rank}, but the engine at {url} takes up to {engine.max_lora_rank}",
            "restart `memupdate serve`: it makes room for the release and publishes it",
        )


def move_alias(session: Session, ledger: Ledger, manifest: Manifest, release: ReleaseRecord, url: str | None) -> None:
    """Point the alias at `release`; where the engine then does not answer with it, put the alias back. Raises EngineError."""
    path = session.layout.registry.manifest
    moved = with_alias(manifest, release.collection, release.name, route=session.policy.serving.route)
    write_manifest(path, moved)
    if url is None:
        return
    try:
        confirm(session, ledger, release, url)
    except EngineError:
        write_manifest(path, replace(moved, generation=moved.generation + 1, aliases=manifest.aliases))
        raise


def confirm(session: Session, ledger: Ledger, release: ReleaseRecord, url: str) -> None:
    """One request to the alias must be answered by the release. Raises EngineError."""
    facts = ledger.live_facts(release.collection, as_of_version=release.version)
    prompt = facts[0].prompt if facts else "?"
    with EngineClient(url, session.api_key) as client:
        answered = client.complete(release.collection, prompt, 1).model
    if answered != release.name:
        raise EngineError(
            f"{url}: {release.collection} is answered by {answered}, not by {release.name}",
            "does this engine read this workspace's registry? see `memupdate status`",
        )


def mark_published(ledger: Ledger, release: ReleaseRecord) -> None:
    """The batch of `release` and those before it, whose facts it carries, are published now."""
    with ledger.transaction():
        for batch in ledger.batches(release.collection):
            if batch.state != "released" or batch.release is None:
                continue
            if ledger.release(batch.release).version <= release.version:
                ledger.transition(batch.id, "published", {"release": release.name})


def rollback(session: Session, ledger: Ledger, alias: str, *, url: str | None) -> PublishReport:
    """Point `alias` at the release that it pointed at before. Nothing is trained and nothing proved again.

    Raises:
        UsageError: there is nothing to go back to.
        EngineError: the alias has moved, but the running engine does not answer with it.
    """
    started = time.monotonic()
    manifest = sync_manifest(session, ledger)
    entry = manifest.aliases.get(alias)
    if entry is None:
        known = ", ".join(sorted(manifest.aliases)) or "none"
        raise UsageError(f"{alias}: no such alias (there are: {known})", "publish a release first")
    if entry.previous is None:
        raise UsageError(f"{alias}: {entry.release} is the first release published; nothing to go back to")
    target = ledger.release(entry.previous)
    check_files(session, target)
    # Not `move_alias`: a rollback stands even where the engine is too ill to confirm it.
    write_manifest(session.layout.registry.manifest, with_alias(manifest, alias, target.name))
    ledger.add_event(
        "rolled back", collection=alias, release=target.name, detail={"alias": alias, "from": entry.release}
    )
    if url is not None:
        confirm(session, ledger, target, url)
    note = f"{entry.release} stays in the registry; the next batch builds on the latest release, not on {target.name}"
    return PublishReport(
        alias=alias, release=target.name, previous=entry.release, served=url is not None,
        duration_s=time.monotonic() - started, messages=(note,),
    )  # fmt: skip
