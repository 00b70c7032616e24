"""The manifest kept in step with the ledger, and every step of an alias: written first, with its name, then logged.

Invariant: an alias points at one of the two releases, wherever a process is killed; and as a step is named in the manifest
that it makes, the next command that writes logs what a killed one could not. Each change of the manifest holds its lock and begins
with what is there then: a rollback beside a batch that trains loses nothing. Engines are not spoken to here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from memupdate.errors import AliasMoved, UsageError
from memupdate.layout import ADAPTER_CONFIG_FILE
from memupdate.ledger.clock import utc_now
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.lock import manifest_lock
from memupdate.ledger.records import ReleaseRecord
from memupdate.operations.matching import matcher_digest
from memupdate.operations.session import Session
from memupdate.serving.access import Binding, rules_json
from memupdate.serving.manifest import (
    RELEASED,
    RETIRED,
    AliasEntry,
    Manifest,
    Move,
    ReleaseEntry,
    read_manifest,
    with_entry,
    with_move,
    with_release,
    with_retired,
    with_revived,
    write_manifest,
)
from memupdate.storage import ensure_dir, file_sha256, remove_leftovers, write_text_atomic

PUBLISHED = "published"
PUT_BACK = "put back"
"""An alias was moved and an engine did not answer with the release."""
ROLLED_BACK = "rolled back"
CANARY_WANTED = "canary wanted"
"""No step: `publish --canary` was asked for. A release that waits goes live as it was last meant to."""
CANARY_BEGUN = "canary begun"
CANARY_ENDED = "canary ended"
PROMOTED = "promoted"
_RETIRED, _REVIVED = "retired", "revived"


def sync_manifest(session: Session, ledger: Ledger) -> Manifest:
    """The manifest with every release of the ledger in it, steps that a crash left unlogged logged, old releases retired.

    Written only if something is to be changed.
    """
    ensure_dir(session.layout.registry.root)  # a workspace that has only been made has none
    with manifest_lock(session.layout.registry, "bringing the manifest up to date"):
        return _synced(session, ledger)


def _synced(session: Session, ledger: Ledger) -> Manifest:
    remove_leftovers(session.layout.registry.root)
    path = session.layout.registry.manifest
    manifest = before = read_manifest(path) if path.exists() else Manifest(session.fingerprint)
    log_steps(ledger, manifest)
    for release in ledger.releases(failed=False):
        folder = session.layout.registry.release(release.name)
        # A release whose files are lost is for `doctor` to tell; a rollback to another one must not fail by it.
        if release.name in manifest.releases or not (folder / ADAPTER_CONFIG_FILE).is_file():
            continue
        entry = ReleaseEntry(
            digest=release.digest,
            config_digest=file_sha256(folder / ADAPTER_CONFIG_FILE),
            rank=release.rank,
            lora_int_id=_int_id(manifest, release),
            base_fingerprint=release.base_fingerprint,
            matcher_digest=matcher_digest(folder),
        )
        manifest = with_release(manifest, release.name, entry)
    for name in retirable(manifest, ledger.releases(), session.policy.serving.retire_after_s):
        manifest = with_retired(manifest, name)
    if manifest is not before or not path.exists():
        write_manifest(path, manifest)
        log_steps(ledger, manifest)
    sync_access(session)
    return manifest


def _int_id(manifest: Manifest, release: ReleaseRecord) -> int:
    """The number of its batch in the ledger, so that a manifest that was lost and is made anew has the ids that engines know: vLLM
    keeps weights by them. Earlier versions counted releases, which gave numbers at most as large."""
    taken = {entry.lora_int_id for entry in manifest.releases.values()}
    if release.batch is None or release.batch in taken:
        return manifest.next_lora_int_id()
    return release.batch


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


def entry_of(manifest: Manifest, alias: str) -> AliasEntry:
    """Where `alias` points. Raises UsageError where there is no such alias."""
    entry = manifest.aliases.get(alias)
    if entry is None:
        known = ", ".join(sorted(manifest.aliases)) or "none"
        raise UsageError(f"{alias}: no such alias (there are: {known})", "publish a release first")
    return entry


def previous_of(manifest: Manifest, alias: str, name: str) -> str | None:
    """What `alias` pointed at before `name`, also where a crash came between moving the alias and writing it down."""
    entry = manifest.aliases.get(alias)
    if entry is None:
        return None
    return entry.previous if entry.release == name else entry.release


def take_step(
    session: Session,
    ledger: Ledger,
    before: Manifest,
    after: Manifest,
    *,
    alias: str,
    kind: str,
    release: str,
    detail: Mapping[str, str | float | bool | None],
) -> Manifest:
    """Write `after`, which differs from `before` by one step of `alias`, and log the step; nothing where they are the same.

    Raises:
        AliasMoved: another command has done so since `before` was read; it stays where that one has put it.
    """
    if after is before:
        return before
    with manifest_lock(session.layout.registry, f"{alias}: {kind}"):
        now = read_manifest(session.layout.registry.manifest)
        if (moved := now.aliases.get(alias)) != before.aliases.get(alias):
            where = f"points at {moved.release}" if moved else "is gone"
            raise AliasMoved(
                f"{alias} was moved by another command meanwhile and {where}: {release} is not {kind}",
                "look at `memupdate status`, and give the command again if it is still wanted",
            )
        stepped = with_entry(now, alias, after.aliases.get(alias))
        named = with_move(stepped, alias, Move(kind, release, stepped.generation, utc_now(), detail))
        write_manifest(session.layout.registry.manifest, named)
        log_steps(ledger, named)
    return named


def want_canary(ledger: Ledger, release: ReleaseRecord, share: float) -> None:
    """Log that `release` is to begin as a canary, before anything is done: whatever finishes that must not give it everything."""
    if wanted_share(ledger, release) != share:
        ledger.add_event(CANARY_WANTED, collection=release.collection, release=release.name, detail={"share": share})


def wanted_share(ledger: Ledger, release: ReleaseRecord) -> float | None:
    """The share with which `release` was last meant to begin; None where it was meant for all, or went live since."""
    decided = (CANARY_WANTED, CANARY_ENDED, PUBLISHED, PROMOTED)
    found = [e for e in ledger.events(release.collection, limit=-1) if e.release == release.name and e.kind in decided]
    return float(found[-1].detail["share"]) if found and found[-1].kind == CANARY_WANTED else None


def put_back(
    session: Session, ledger: Ledger, manifest: Manifest, alias: str, entry: AliasEntry | None, why: str
) -> None:
    """Undo the last step of `alias`: it is as `entry` says again, None for not there."""
    after = with_entry(manifest, alias, entry)
    release = manifest.moves[alias].release
    take_step(session, ledger, manifest, after, alias=alias, kind=PUT_BACK, release=release, detail={"reason": why})


def revive(session: Session, ledger: Ledger, manifest: Manifest, name: str) -> Manifest:
    """A retired release is open to engines again; the manifest as it is then."""
    if with_revived(manifest, name) is manifest:
        return manifest
    with manifest_lock(session.layout.registry, f"opening {name} again"):
        after = with_revived(read_manifest(session.layout.registry.manifest), name)
        write_manifest(session.layout.registry.manifest, after)
        log_steps(ledger, after)
    return after


def log_steps(ledger: Ledger, manifest: Manifest) -> None:
    """Log what the manifest shows and the ledger does not know of yet: the last step of each alias, retired releases.

    A registry that is ahead of its ledger (one of them from a backup) is left alone where it names unknown releases.
    """
    known = {release.name: release for release in ledger.releases()}
    for alias, move in manifest.moves.items():
        newest = ledger.events(alias, kind=move.kind, limit=1)
        logged = bool(newest) and newest[-1].detail.get("generation") == move.generation
        if not logged and move.release in known:
            detail = {"alias": alias, **move.detail, "generation": move.generation}
            ledger.add_event(move.kind, collection=alias, release=move.release, detail=detail)
    out = Counter(event.release for event in ledger.events(kind=_RETIRED, limit=-1))
    out.subtract(event.release for event in ledger.events(kind=_REVIVED, limit=-1))
    for name, entry in manifest.releases.items():
        if name in known and (entry.state == RETIRED) != (out[name] > 0):
            kind = _RETIRED if entry.state == RETIRED else _REVIVED
            ledger.add_event(kind, collection=known[name].collection, release=name)


def due_to_retire(session: Session) -> list[str]:
    """What `sync_manifest` would retire now; takes no lock, for who looks again and again. Raises ManifestError, LedgerError."""
    path, after_s = session.layout.registry.manifest, session.policy.serving.retire_after_s
    if not after_s or not path.exists():
        return []
    with Ledger.open(session.layout.ledger, readonly=True) as ledger:
        return retirable(read_manifest(path), ledger.releases(), after_s)


def retirable(manifest: Manifest, releases: list[ReleaseRecord], retire_after_s: float) -> list[str]:
    """Releases older than their alias's that no alias, canary or rollback names, `retire_after_s` after its last step.

    0 seconds: none. A step of before steps were named in the manifest counts as just taken.
    """
    if not retire_after_s:
        return []
    versions = {release.name: (release.collection, release.version) for release in releases}
    named = {name for entry in manifest.aliases.values() for name in (entry.release, entry.previous)}
    named |= {entry.canary.release for entry in manifest.aliases.values() if entry.canary}
    found = []
    for name, entry in manifest.releases.items():
        alias, version = versions.get(name, ("", 0))
        if entry.state != RELEASED or name in named or alias not in manifest.aliases or alias not in manifest.moves:
            continue
        age_s = (datetime.now(UTC) - datetime.fromisoformat(manifest.moves[alias].at_utc)).total_seconds()
        if version < versions.get(manifest.aliases[alias].release, ("", 0))[1] and age_s >= retire_after_s:
            found.append(name)
    return found
