"""Canaries: a share of an alias's conversations on a second release, then all of them or none; ended where it falls short.

Invariant: ending a canary needs no engine and no proof. What it has shown is what the engines counted since it began. It is
begun by `publishing.publish`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from memupdate.errors import EngineError, ProofFailed, UsageError
from memupdate.ledger.ledger import Ledger
from memupdate.operations import aliases
from memupdate.operations.aliases import entry_of, sync_manifest, take_step, wanted_share
from memupdate.operations.answers import Answers, answers_of
from memupdate.operations.matching import refuse_unreached
from memupdate.operations.publishing import check_files, flip_and_confirm, mark_published, prove_before_publishing
from memupdate.operations.replicas import NO_ENGINE_HINT, Replica, confirm
from memupdate.operations.reports import PublishReport
from memupdate.operations.session import Session
from memupdate.progress import Progress
from memupdate.serving.manifest import AliasEntry, Canary, Manifest, with_alias, with_canary


def share_of_waiting(ledger: Ledger, manifest: Manifest, name: str) -> float | None:
    """The share with which a release that waits goes live: as the canary that it is or was meant to be; None: for all."""
    release = ledger.release(name)
    entry = manifest.aliases.get(release.collection)
    if entry is None or entry.release == name:
        return None
    if entry.canary is not None and entry.canary.release == name:
        return entry.canary.share
    return wanted_share(ledger, release)


def canary_messages(entries: Mapping[str, AliasEntry]) -> list[str]:
    """One line per running canary: what it is and how it ends."""
    return [
        f"{alias}: {entry.canary.share:.4g} of the conversations go to {entry.canary.release}, the others to {entry.release}; "
        "`memupdate promote` or `memupdate abort` ends that"
        for alias, entry in entries.items()
        if entry.canary is not None
    ]


def promote(
    session: Session, ledger: Ledger, alias: str, *, replicas: Sequence[Replica], progress: Progress
) -> PublishReport:
    """All conversations of `alias` go to its canary, after each replica has proved it again; nothing is trained.

    Raises:
        UsageError: no canary runs.
        ProofFailed: the canary fell short of the policy, by its answers or by the proof, and was ended.
        EngineError: no engine runs, or one does not answer with the release; the canary goes on.
    """
    started = time.monotonic()
    manifest = sync_manifest(session, ledger)
    entry, canary = entry_of(manifest, alias), canary_of(manifest, alias)
    release = ledger.release(canary.release)
    check_files(session, release)
    if session.policy.proof.served and not replicas:
        raise EngineError(f"{release.name} cannot be proved on the engine: none is running", NO_ENGINE_HINT)
    if reason := shortfall(session, alias, canary, answers_since_begun(session, manifest, alias, replicas)):
        _end(session, ledger, manifest, alias, reason)
        raise ProofFailed(f"{canary.release} is not promoted, its canary has ended: {reason}", f"{alias} is as it was")
    try:
        refuse_unreached(session.layout.registry, ledger, release, session.policy.serving.route)
        proof = prove_before_publishing(session, ledger, release, replicas, progress)
    except ProofFailed as error:
        _end(session, ledger, manifest, alias, error.message)
        raise
    after = with_alias(manifest, alias, release.name, route=session.policy.serving.route)
    flip_and_confirm(session, ledger, manifest, after, release, aliases.PROMOTED, {"previous": entry.release}, replicas)
    mark_published(ledger, release)
    return PublishReport(
        alias=alias, release=release.name, previous=entry.release, served=bool(replicas), replicas=len(replicas),
        facts_proved_served=sum(p.proved for p in proof.facts) if proof else None, generated=proof.generated if proof else None,
        duration_s=time.monotonic() - started,
    )  # fmt: skip


def abort(
    session: Session, ledger: Ledger, alias: str, *, replicas: Sequence[Replica], reason: str = "by hand"
) -> PublishReport:
    """All conversations of `alias` go to its release again. The canary's release stays in the registry.

    Raises:
        UsageError: no canary runs.
        EngineError: the canary has ended, but an engine does not answer with the release.
    """
    started = time.monotonic()
    manifest = sync_manifest(session, ledger)
    entry, canary = entry_of(manifest, alias), canary_of(manifest, alias)
    _end(session, ledger, manifest, alias, reason)
    confirm(session, ledger, ledger.release(entry.release), replicas)
    note = (
        f"{canary.release} stays in the registry; the next batch builds on the latest release, not on {entry.release}"
    )
    return PublishReport(
        alias=alias, release=entry.release, previous=canary.release, served=bool(replicas), replicas=len(replicas),
        duration_s=time.monotonic() - started, messages=(note,),
    )  # fmt: skip


def abort_failing(session: Session, ledger: Ledger, *, replicas: Sequence[Replica]) -> list[PublishReport]:
    """End every canary whose answers fall short of the policy; for a timer, and for `serve` while it watches its engines.

    Raises:
        EngineError: a replica cannot be reached.
    """
    reasons = failing(session, sync_manifest(session, ledger), replicas)
    return [abort(session, ledger, alias, replicas=replicas, reason=reason) for alias, reason in reasons.items()]


def failing(session: Session, manifest: Manifest, replicas: Sequence[Replica]) -> dict[str, str]:
    """Aliases whose canary's answers fall short of the policy, and why; asks the engines only. Raises EngineError."""
    running = {alias: entry.canary for alias, entry in manifest.aliases.items() if entry.canary is not None}
    judged = {
        alias: shortfall(session, alias, canary, answers_since_begun(session, manifest, alias, replicas))
        for alias, canary in running.items()
    }
    return {alias: reason for alias, reason in judged.items() if reason is not None}


def canary_of(manifest: Manifest, alias: str) -> Canary:
    """The canary of `alias`. Raises UsageError where none runs."""
    canary = entry_of(manifest, alias).canary
    if canary is None:
        raise UsageError(f"{alias}: no canary runs", "begin one with `memupdate publish RELEASE --canary 10%`")
    return canary


def answers_since_begun(session: Session, manifest: Manifest, alias: str, replicas: Sequence[Replica]) -> Answers:
    """What the clients of the running canary of `alias` got. Raises EngineError where a replica cannot be reached."""
    canary, begun = canary_of(manifest, alias), manifest.moves.get(alias)
    detail = begun.detail if begun is not None and begun.kind == aliases.CANARY_BEGUN else {}
    before = Answers(int(detail.get("requests_before") or 0), int(detail.get("errors_before") or 0))
    return answers_of(session, alias, canary.release, replicas).since(before)


def shortfall(session: Session, alias: str, canary: Canary, answers: Answers) -> str | None:
    """Why the canary falls short of the policy, in one line; None where it does not, or has answered too few to tell."""
    serving = session.policy.serving
    if answers.requests < serving.canary_min_requests or answers.error_share <= serving.canary_max_error_share:
        return None
    return (
        f"{answers.errors} of {answers.requests} requests of {alias} to {canary.release} failed, "
        f"{answers.error_share:.1%}; the policy allows {serving.canary_max_error_share:.1%}"
    )


def _end(session: Session, ledger: Ledger, manifest: Manifest, alias: str, reason: str) -> None:
    canary, after = canary_of(manifest, alias), with_canary(manifest, alias, None)
    take_step(
        session,
        ledger,
        manifest,
        after,
        alias=alias,
        kind=aliases.CANARY_ENDED,
        release=canary.release,
        detail={"reason": reason},
    )
