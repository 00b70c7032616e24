"""What the ledger hands out: frozen records, named as the tables are. Nothing here knows SQL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from memupdate.facts.model import Fact

BatchState = Literal["received", "planned", "trained", "verified", "released", "published", "failed"]
BatchKind = Literal["add", "compact", "retract"]
"""What a batch is for: facts of a file, all live facts written afresh, answers taken back."""
Change = Literal["new", "superseding", "retracting", "dropped"]
"""`retracting`: stands in the place of a fact that was taken back; `dropped`: a compaction left its stand-in out, so that the
model answers as its base does."""
RecordedReason = Literal["older", "ended", "future"]
"""Why a fact is on record without being taught: a later value of its key was told before it, or it is true no more, or not yet."""
Told = Literal["new", "superseding", "unchanged", "older", "ended", "future", "conflicting"]
"""What a fact does when it is told; see `memupdate.ledger.rules`. `conflicting` ones contradict another line
of their file and do nothing."""
Outcome = Literal["proved", "unproved"]
FactStatus = Literal["live", "superseded", "retracted", "dropped", "unproved", "pending", "failed", "purged"]
"""Of a fact in a batch: `pending` until the batch is released, `failed` with its batch, then one of the others. `dropped` is
said of a retraction's stand-in that a compaction left out, `retracted` of the fact itself, `purged` of a fact whose text is gone."""
Engine = Literal["in-process", "served"]


@dataclass(frozen=True)
class FactsDiff:
    """Facts against the live ones of a collection; the three parts keep the order of the facts given."""

    new: tuple[Fact, ...]
    superseding: tuple[tuple[Fact, Fact], ...]
    """(fact, live fact with the same key that it replaces)."""
    unchanged: tuple[Fact, ...]

    @property
    def is_empty(self) -> bool:
        """True where there is nothing to write."""
        return not self.new and not self.superseding


@dataclass(frozen=True)
class ToldFact:
    """One line of a facts file and what it does: a row of the table that a dry run shows."""

    told: Told
    line: int
    fact: str
    """Its id."""
    prompt: str
    target: str
    valid_from: str | None
    valid_to: str | None
    live: str | None
    """Id of the live fact with the same key; None where there is none."""
    live_target: str | None
    live_valid_from: str | None


@dataclass(frozen=True)
class ToldCounts:
    """Facts of a file by what they do. Lines that repeat an earlier line of the file count as `duplicates` only."""

    new: int = 0
    superseding: int = 0
    unchanged: int = 0
    older: int = 0
    ended: int = 0
    future: int = 0
    duplicates: int = 0
    problems: int = 0
    """Lines with problems, and those that contradict each other."""

    @property
    def taught(self) -> int:
        """Facts that a batch would write."""
        return self.new + self.superseding

    @property
    def recorded(self) -> int:
        """Facts that are kept as history without being taught."""
        return self.older + self.ended + self.future


@dataclass(frozen=True)
class RecordedFact:
    """A fact that was told and is on record, but not taught."""

    fact: Fact
    collection: str
    source: int
    reason: RecordedReason
    current: str | None
    """Id of the fact that was live under its key when it was told."""
    told_at_utc: str


@dataclass(frozen=True)
class Batch:
    """One update of a collection on its way from received to published."""

    id: int
    collection: str
    source: int
    """Id of the file that it came from."""
    state: BatchState
    publish: bool
    """Whether the operator wants its release published; without, `released` is its last state."""
    policy_json: str
    plan_json: str | None
    failure_reason: str | None
    created_at_utc: str
    updated_at_utc: str
    facts_new: int
    facts_superseding: int
    facts_unchanged: int
    facts_proved: int
    facts_unproved: int
    release: str | None
    kind: BatchKind = "add"
    reason: str | None = None
    """The operator's, for a retraction or a compaction."""
    facts_retracting: int = 0
    facts_dropped: int = 0

    @property
    def is_unfinished(self) -> bool:
        """True where `memupdate resume` has something to do."""
        if self.state == "released":
            return self.publish
        return self.state not in ("published", "failed")


@dataclass(frozen=True)
class BatchFact:
    """A fact as a batch brought it."""

    fact: Fact
    change: Change
    supersedes: str | None
    """Id of the fact that it replaces."""
    outcome: Outcome | None
    """None until the batch's facts are proved."""


@dataclass(frozen=True)
class Source:
    """A facts file that was read."""

    id: int
    path: str
    sha256: str
    size_bytes: int
    format: str
    received_at_utc: str


@dataclass(frozen=True)
class FactSource:
    """One place where a fact was read."""

    source: Source
    line: int
    external_id: str | None
    """The `id` that this file gives it."""
    stated_source: str | None
    """The `source` that this file states for it."""


@dataclass(frozen=True)
class FactHistory:
    """A fact in one batch of one collection, and what became of it."""

    fact: Fact
    collection: str
    batch: int
    batch_state: BatchState
    change: Change
    supersedes: str | None
    outcome: Outcome | None
    release: str | None
    version: int | None
    status: FactStatus
    at_utc: str
    """When the batch was received."""


@dataclass(frozen=True)
class FactDetail:
    """All that the ledger knows about one fact."""

    fact: Fact
    sources: tuple[FactSource, ...]
    history: tuple[FactHistory, ...]
    releases: tuple[str, ...]
    """Releases in which it is live, oldest first."""
    proofs: tuple[ProofRecord, ...]


@dataclass(frozen=True)
class SliceRecord:
    """What a batch changed in the memory, as a folder of the workspace."""

    batch: int
    relative_path: str
    """From the workspace's root."""
    sha256: str
    rank_before: int
    rank_after: int
    size_bytes: int
    created_at_utc: str = ""
    """Set by the ledger."""


@dataclass(frozen=True)
class ReleaseRecord:
    """One immutable release."""

    name: str
    collection: str
    version: int
    batch: int | None
    """None for a release that no batch of facts made, such as a compaction."""
    parent: str | None
    relative_path: str
    """From the workspace's root."""
    digest: str
    rank: int
    placement: str
    base_fingerprint: str
    created_at_utc: str = ""
    """Set by the ledger."""


@dataclass(frozen=True)
class ProofRecord:
    """One fact tested in one release on one engine."""

    release: str
    fact: str
    """Id of the fact."""
    engine: Engine
    proved: bool
    min_probability: float | None
    """Of the fact's weakest target token, 0 to 1; None where the engine gave none."""
    failed_position: int | None = None
    """0-based position in the target of the first token that was not the argmax."""
    failed_token: str | None = None
    """The target's token there."""
    emitted_token: str | None = None
    """What the model would emit in its place."""
    proved_at_utc: str = ""
    """Set by the ledger where empty."""


@dataclass(frozen=True)
class FitRecord:
    """A law fit as stored."""

    id: str
    base_fingerprint: str
    placement: str
    recipe: str
    fit_json: str
    created_at_utc: str


@dataclass(frozen=True)
class Event:
    """Something that happened, for the operator's log."""

    id: int
    at_utc: str
    kind: str
    collection: str | None
    batch: int | None
    release: str | None
    detail: dict[str, Any]
