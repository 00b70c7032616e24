"""Purging: a fact's text removed from a workspace for good, and what an operator must do about weights and copies.

Invariant: when `purge` returns, no file of the ledger and no release's papers carry the text. Adapters are not touched: the
releases whose weights were trained on it are named until a compaction has written one without it. Facts files, backups and
exports are the operator's own.

The ledger's texts go last, since papers and matchers are cleared by them; an event at the beginning and one at the end tell
which purges were cut off: the same call again finishes one, and so does `finish_begun`.
"""

from __future__ import annotations

import getpass
import json
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memupdate.errors import LedgerError
from memupdate.facts.model import Fact
from memupdate.layout import RELEASE_FILE, WorkspaceLayout
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.purges import redacted, texts_of
from memupdate.ledger.records import Event
from memupdate.operations.matching import clean_matchers, redact_matchers, settle_matchers
from memupdate.operations.reports import Report
from memupdate.storage import canonical_json, remove_leftovers, text_sha256, write_text_atomic

BEGUN = "purge begun"
"""Written before anything is taken away: the facts' ids, who wants it and why, what was asked for, as a digest, and each matcher's
digest as it is to be."""
ENDED = "purge ended"

_SHOWN_ID = len("sha256:") + 12


@dataclass(frozen=True)
class PurgeReport(Report):
    """What was purged, and where its traces are."""

    facts: tuple[str, ...]
    """Ids of the purged facts."""
    releases_holding: tuple[str, ...]
    """Releases whose weights were trained on one of them."""
    mentioned_by: tuple[str, ...]
    """Ids of other facts, a few, in which one of the purged answers occurs too."""
    messages: tuple[str, ...] = ()


def to_purge(ledger: Ledger, ids: Sequence[str], keys: Sequence[str]) -> list[Fact]:
    """What a purge of `ids` and `keys` takes: as `Ledger.facts_to_purge`, or what the same purge took when it was cut off.

    By then the ledger may have forgotten the keys. Raises LedgerError.
    """
    try:
        return ledger.facts_to_purge(ids, keys)
    except LedgerError:
        same = [event for event in begun(ledger) if event.detail["asked"] == _asked(ids, keys)]
        if not same:
            raise
        return ledger.facts_to_purge(same[-1].detail["facts"], ())


def purge(
    layout: WorkspaceLayout,
    ledger: Ledger,
    facts: Sequence[Fact],
    reason: str | None,
    *,
    ids: Sequence[str] = (),
    keys: Sequence[str] = (),
) -> PurgeReport:
    """Remove the texts of `facts`, as `to_purge` found them by `ids` and `keys`.

    Raises:
        LedgerError: the disk is full, or a reader holds on to the old state; the same call again finishes the purge.
        UsageError: a release's papers cannot be written.
    """
    named = [fact for fact in facts if not ledger.is_purged(fact.id)]
    purged_by = f"{_user()}@{socket.gethostname()}"
    if named:
        _begin(layout, ledger, named, {"by": purged_by, "asked": _asked(ids, keys)}, reason)
    for event in begun(ledger):  # a kill may have come between a matcher and the manifest
        settle_matchers(layout.registry, event.detail["matchers"])
    _redact_papers(layout, ledger, named)
    redact_matchers(layout.registry, ledger, named)
    # The base model's answers to questions beside the facts; made again when they are asked for.
    for folder in layout.cache.glob("answers-*"):
        shutil.rmtree(folder)
    ledger.purge(facts, purged_by=purged_by, reason=reason)
    ledger.scrub()
    _end(ledger)
    purged = tuple(fact.id for fact in facts)
    holding = [row for row in ledger.releases_with_purged() if row.fact in purged]
    releases = tuple(dict.fromkeys(row.release for row in holding))
    mentions = tuple(ledger.mentions(named))
    return PurgeReport(purged, releases, mentions, tuple(_advice(ledger, releases, mentions)))


def finish_begun(layout: WorkspaceLayout, ledger: Ledger) -> list[PurgeReport]:
    """Finish the purges that were cut off.

    Raises:
        LedgerError: as `purge`, or an unfinished batch needs one of the facts.
    """
    left = begun(ledger)
    return [purge(layout, ledger, ledger.facts_to_purge(e.detail["facts"], ()), e.detail["reason"]) for e in left]


def begun(ledger: Ledger) -> list[Event]:
    """Of the purges that were cut off, or are under way, the events with which they began."""
    ended = {event.detail["begun"] for event in ledger.events(kind=ENDED, limit=-1)}
    return [event for event in ledger.events(kind=BEGUN, limit=-1) if event.id not in ended]


def begun_advice(ledger: Ledger) -> list[str]:
    """One line for `status` where purges were cut off."""
    facts = {fact for event in begun(ledger) for fact in event.detail["facts"]}
    return [f"a purge of {len(facts)} fact(s) was cut off: `memupdate resume` finishes it"] if facts else []


def _begin(
    layout: WorkspaceLayout, ledger: Ledger, facts: Sequence[Fact], who: Mapping[str, str], reason: str | None
) -> None:
    texts = [text for fact in facts for text in texts_of(fact)]
    matchers = {name: text_sha256(text) for name, text in clean_matchers(layout.registry, ledger, facts)}
    told = {"facts": [fact.id for fact in facts], "reason": redacted(reason, texts), "matchers": matchers}
    ledger.add_event(BEGUN, detail={**who, **told})


def _asked(ids: Sequence[str], keys: Sequence[str]) -> str:
    """By which a purge is known again; a key is a text that is purged, so it is not kept itself."""
    return text_sha256(canonical_json([sorted(ids), sorted(keys)]))


def _end(ledger: Ledger) -> None:
    """All purges have ended whose facts have no text: papers and matchers were cleared before the ledger was."""
    for event in begun(ledger):
        if all(ledger.is_purged(fact) for fact in event.detail["facts"]):
            ledger.add_event(ENDED, detail={"begun": event.id})


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def _redact_papers(layout: WorkspaceLayout, ledger: Ledger, facts: Sequence[Fact]) -> None:
    """Papers name facts by id only, but the reason that an operator gave for a batch is in them too."""
    texts = [text for fact in facts for text in texts_of(fact)]
    for release in ledger.releases():
        path = layout.root / release.relative_path / RELEASE_FILE
        remove_leftovers(path.parent)  # of a purge that was killed
        if not path.is_file():
            continue
        papers = json.loads(path.read_text(encoding="utf-8"))
        clean = redacted(papers.get("reason"), texts)
        if clean != papers.get("reason"):
            write_text_atomic(path, json.dumps({**papers, "reason": clean}, indent=2, ensure_ascii=False) + "\n")


def _advice(ledger: Ledger, releases: Sequence[str], mentions: Sequence[str]) -> list[str]:
    lines = [advice for name in ledger.collections() if (advice := purged_advice(ledger, name))]
    if releases:
        lines.append(f"the weights of {', '.join(releases)} were trained on it; they are as they were")
    if mentions:
        shown = ", ".join(fact[:_SHOWN_ID] for fact in mentions)
        lines.append(f"the same answer occurs in other facts too, which were not purged: {shown}")
    return [*lines, "facts files, exports and backups that have the text are yours to remove"]


def purged_advice(ledger: Ledger, collection: str) -> str | None:
    """What to do about a newest release that holds purged facts; None where it holds none."""
    latest = ledger.latest_release(collection)
    held = len(ledger.releases_with_purged(latest.name)) if latest else 0
    if latest is None or not held:
        return None
    facts = "a purged fact" if held == 1 else f"{held} purged facts"
    return f"{latest.name} still holds {facts}; `memupdate compact -c {collection}` writes a release without"
