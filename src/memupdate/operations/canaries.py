"""Canaries: a share of an alias's conversations on a second release, then all of them or none; ended where it falls short.

Invariant: ending a canary needs no engine and no proof. What it has shown is what the engines counted since it began, and whether they
lived through it. It is begun by `publishing.publish`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from memupdate.errors import EngineError, ProofFailed, UsageError
from memupdate.ledger.ledger import Ledger
from memupdate.operations import aliases
from memupdate.operations.aliases import entry_of, sync_manifest, take_step, wanted_share
from memupdate.operations.answers import ENGINES_BEFORE, Answers, Seen, Shown, look, parse_seen, shown_since
from memupdate.operations.matching import refuse_unreached
from memupdate.operations.publishing import check_files, flip_and_confirm, mark_published, prove_before_publishing
from memupdate.operations.replicas import NO_ENGINE_HINT, Replica, confirm
from memupdate.operations.reports import PublishReport
from memupdate.operations.session import Session
from memupdate.progress import Progress
from memupdate.serving.engine_record import engine_notes
from memupdate.serving.manifest import AliasEntry, Canary, Manifest, with_alias, with_canary

_REFUSALS_BEYOND = 0.1
"""Clients send bad requests to either side. A canary's share of client errors may be twice that of the release beside it, and this much
more, before they are taken for its own: conversations are steady, so that one busy client may be all on one side."""


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
    shown = shown_by(session, manifest, alias, replicas)
    if shown.down:
        raise EngineError(
            f"{canary.release} cannot be promoted: {', '.join(shown.down)} does not answer", NO_ENGINE_HINT
        )
    if reason := shortfall(session, alias, canary, shown):
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
    """End every canary that falls short of the policy; for a timer, and for `serve` while it watches its engines.

    Raises:
        EngineError: no engine answers, or one that does goes on answering with an ended canary.
    """
    ended = []
    manifest = sync_manifest(session, ledger)
    for alias, canary in _running(manifest).items():
        shown = shown_by(session, manifest, alias, replicas)
        if reason := shortfall(session, alias, canary, shown):
            there = [replica for replica in replicas if replica.url not in shown.down]
            ended.append(abort(session, ledger, alias, replicas=there, reason=reason))
    return ended


def failing(session: Session, manifest: Manifest, replicas: Sequence[Replica]) -> dict[str, str]:
    """Aliases whose canary falls short of the policy, and why; asks the engines only. Raises EngineError where none answers."""
    judged = {
        alias: shortfall(session, alias, canary, shown_by(session, manifest, alias, replicas))
        for alias, canary in _running(manifest).items()
    }
    return {alias: reason for alias, reason in judged.items() if reason is not None}


def canary_of(manifest: Manifest, alias: str) -> Canary:
    """The canary of `alias`. Raises UsageError where none runs."""
    canary = entry_of(manifest, alias).canary
    if canary is None:
        raise UsageError(f"{alias}: no canary runs", "begin one with `memupdate publish RELEASE --canary 10%`")
    return canary


def shown_by(session: Session, manifest: Manifest, alias: str, replicas: Sequence[Replica]) -> Shown:
    """What the running canary of `alias` has shown. Raises EngineError where no engine answers that could tell."""
    entry, canary, begun = entry_of(manifest, alias), canary_of(manifest, alias), manifest.moves.get(alias)
    detail = begun.detail if begun is not None and begun.kind == aliases.CANARY_BEGUN else {}
    before = parse_seen(str(detail.get(ENGINES_BEFORE) or "{}"))
    now = look(session, alias, canary.release, entry.release, replicas)
    shown = shown_since(before, now)
    if now and not any(now.values()) and not shown.down:
        raise EngineError(f"{', '.join(now)} cannot be reached", NO_ENGINE_HINT)
    if not before:  # begun by an earlier version, which kept the sum over all engines
        requests, errors = (int(detail.get(name) or 0) for name in ("requests_before", "errors_before"))
        shown = replace(shown, canary=shown.canary.since(Answers(requests, errors, shown.canary.refused)))
    return replace(shown, down=(*shown.down, *_dead(session, before, now)))


def shortfall(session: Session, alias: str, canary: Canary, shown: Shown) -> str | None:
    """Why the canary falls short of the policy, in one line; None where it does not, or has answered too few to tell."""
    if shown.down or shown.restarted:
        told = [f"{url} does not answer" for url in shown.down]
        told += [f"{url} was started again" for url in shown.restarted]
        return f"{', '.join(told)} since {canary.release} has a share of {alias}"
    serving, refusals = session.policy.serving, _refusals(shown)
    failed, requests = shown.canary.errors + refusals, shown.canary.requests
    if requests < serving.canary_min_requests or failed <= serving.canary_max_error_share * requests:
        return None
    of_them = f" ({refusals} refused as client errors, which the release beside it is not)" if refusals else ""
    return (
        f"{failed} of {requests} requests of {alias} to {canary.release} failed{of_them}, "
        f"{failed / requests:.1%}; the policy allows {serving.canary_max_error_share:.1%}"
    )


def _refusals(shown: Shown) -> int:
    """Of the canary's client errors, those that are its own: all, where it has far more than the release beside it."""
    mine, other = shown.canary, shown.beside
    usual = (other.refused + 1) / (other.requests + 1)  # of few requests nothing is known, and much is usual
    return mine.refused if mine.refused > mine.requests * (2 * usual + _REFUSALS_BEYOND) else shown.unloadable


def _dead(session: Session, before: Mapping[str, Seen], now: Mapping[str, Seen | None]) -> list[str]:
    """Engines that `serve` is starting again; they are not among those that can be asked."""
    notes = engine_notes(session.layout.engine)
    if any(note.is_supervisor_alive and not note.is_engine_alive and note.last_failure for note in notes):
        return [url for url in before if url not in now]
    return []


def _running(manifest: Manifest) -> dict[str, Canary]:
    return {alias: entry.canary for alias, entry in manifest.aliases.items() if entry.canary is not None}


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
