"""Purging: a fact's text removed from a workspace for good, and what an operator must do about weights and copies.

Invariant: when `purge` returns, no file of the ledger and no release's papers carry the text. Adapters are not touched: the
releases whose weights were trained on it are named until a compaction has written one without it. Facts files, backups and
exports are the operator's own.
"""

from __future__ import annotations

import getpass
import json
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from memupdate.facts.model import Fact
from memupdate.layout import RELEASE_FILE, WorkspaceLayout
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.purges import redacted, texts_of
from memupdate.operations.matching import redact_matchers
from memupdate.operations.reports import Report
from memupdate.storage import write_text_atomic

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


def purge(layout: WorkspaceLayout, ledger: Ledger, facts: Sequence[Fact], reason: str | None) -> PurgeReport:
    """Remove the texts of `facts`, as `Ledger.facts_to_purge` gave them.

    Raises:
        LedgerError: the disk is full, or a reader holds on to the old state; the same call again finishes the purge.
        UsageError: a release's papers cannot be written.
    """
    ids = tuple(fact.id for fact in facts)
    named = [fact for fact in facts if not ledger.is_purged(fact.id)]
    ledger.purge(facts, purged_by=f"{_user()}@{socket.gethostname()}", reason=reason)
    ledger.scrub()
    _redact_papers(layout, ledger, named)
    redact_matchers(layout.registry, ledger, named)
    # The base model's answers to questions beside the facts; made again when they are asked for.
    for folder in layout.cache.glob("answers-*"):
        shutil.rmtree(folder)
    holding = [row for row in ledger.releases_with_purged() if row.fact in ids]
    releases = tuple(dict.fromkeys(row.release for row in holding))
    mentions = tuple(ledger.mentions(named))
    return PurgeReport(ids, releases, mentions, tuple(_advice(ledger, releases, mentions)))


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
