"""What operations return: frozen data with `to_dict()`, for people through the CLI's tables and for scripts as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from memupdate.budget.plan import Plan
from memupdate.law.fit import LawFit
from memupdate.law.points import LawPoint
from memupdate.ledger.measures import MeasureCount, MeasureRecord, TextRecord
from memupdate.ledger.records import ToldCounts, ToldFact


class Report:
    """Base of all reports; children are frozen dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)  # type: ignore[call-overload]  # every child is a dataclass


@dataclass(frozen=True)
class CalibrationReport(Report):
    """A calibration and the law fitted to it."""

    fit: LawFit
    points: tuple[LawPoint, ...]
    cells_run: int
    duration_s: float
    messages: tuple[str, ...] = ()
    others: tuple[CalibrationReport, ...] = ()
    """Of further placements, where several were measured."""

    def to_dict(self) -> dict[str, Any]:
        """The fit in its own JSON form."""
        return {
            "fit": json.loads(self.fit.to_json()),
            "points": [asdict(p) for p in self.points],
            "cells_run": self.cells_run,
            "duration_s": self.duration_s,
            "messages": list(self.messages),
            "others": [report.to_dict() for report in self.others],
        }


@dataclass(frozen=True)
class PlanReport(Report):
    """What `add` would do."""

    file: str
    collection: str
    plan: Plan | None
    """None where every fact is stored already."""
    new: tuple[str, ...]
    superseding: tuple[tuple[str, str, str], ...]
    """(prompt, old target, new target)."""
    unchanged: int
    counts: ToldCounts = field(default_factory=ToldCounts)
    """Facts by what they do."""
    rows: tuple[ToldFact, ...] = ()
    """What each fact of the file does, in its order; lines that repeat an earlier one are left out."""
    skipped: tuple[str, ...] = ()
    """Bad lines that `--skip-invalid` left out."""
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProofFailure(Report):
    """One fact that could not be proved."""

    fact_id: str
    prompt: str
    explanation: str


@dataclass(frozen=True)
class NearThreshold(Report):
    """A fact whose verdict hangs on little."""

    fact_id: str
    prompt: str
    min_probability: float


@dataclass(frozen=True)
class PublishReport(Report):
    """Where an alias points now."""

    alias: str
    release: str
    previous: str | None
    served: bool
    """Whether a running engine proved the release and answers with it."""
    replicas: int = 0
    """Engines that answer with it now."""
    canary_share: float | None = None
    """Of the conversations; the others are answered by `previous`. None: all of them go to the release."""
    facts_proved_served: int | None = None
    generated: int | None = None
    """Facts that the engine also gave word for word in free greedy generation."""
    sampled: str = ""
    """Of how many, and what that says."""
    min_probability: float | None = None
    """The smallest over all facts' weakest tokens, on the engine."""
    near_threshold: tuple[NearThreshold, ...] = ()
    """Facts whose weakest token is within 0.02 of the policy's bound there."""
    duration_s: float = 0.0
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class AddReport(Report):
    """One batch, as far as it came."""

    batch_id: int | None
    """None where nothing was new."""
    collection: str
    state: str
    release: str | None
    plan: Plan | None
    rank: int | None
    """Rank in the end; above the plan's where training had to escalate."""
    attempts: int
    epochs: int
    measured_loss_nats: float | None
    kl_nats: float | None
    facts_total: int
    """Live facts in the release, older ones included."""
    facts_proved: int
    facts_new: int
    failures: tuple[ProofFailure, ...]
    probes_unchanged_share: float | None
    probes: int
    publication: PublishReport | None
    duration_s: float
    messages: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    """Bad lines that `--skip-invalid` left out."""
    generality_share: float | None = None
    """Of the phrasings that were not trained on, answered word for word; None where there are none."""
    locality_share: float | None = None
    """Of probes and of the questions nearest to the facts, answered as before where the base model was sure."""
    perplexity_ratio: float | None = None
    """Of general text, over the base model's."""


@dataclass(frozen=True)
class VerifyReport(Report):
    """A release proved again."""

    release: str
    engine: str
    """`in-process` or the URL of the serving engine."""
    facts_total: int
    facts_proved: int
    failures: tuple[ProofFailure, ...]
    min_probability: float | None
    """The smallest over all facts' weakest tokens."""
    probes: int
    probes_unchanged_share: float | None
    kl_nats: float | None
    generated: int | None
    duration_s: float
    route: str = "always"
    """How the policy routes; facts that the router misses are failures where it is `matched`."""
    facts_proved_matched: int | None = None
    """Facts proved of which every wording reaches the release where the route is `matched`; None for a release that was made
    without a matcher."""
    sampled: str = ""
    """Of which facts other wordings, or free answers of the engine, were asked, and what that says."""
    near_threshold: tuple[NearThreshold, ...] = ()
    """Facts whose weakest token is within 0.02 of the policy's bound."""
    measures: tuple[MeasureCount, ...] = ()
    text: TextRecord | None = None
    shortfalls: tuple[str, ...] = ()
    """What the policy asks for and the release does not give, besides proofs."""
    questions: tuple[MeasureRecord, ...] = ()
    """All that was asked, with what came out."""

    @property
    def passed(self) -> bool:
        """Whether every live fact was proved, every answer that the engine was asked for came word for word, and the policy's bounds
        hold."""
        return self.facts_proved == self.facts_total and not self.failures and not self.shortfalls

    def to_dict(self) -> dict[str, Any]:
        """With the shares that follow from the counts."""
        measures = [{**asdict(count), "exact_share": count.exact_share} for count in self.measures]
        text = None if self.text is None else {**asdict(self.text), "perplexity_ratio": self.text.perplexity_ratio}
        return {**super().to_dict(), "measures": measures, "text": text}


@dataclass(frozen=True)
class ReleaseRow(Report):
    """One release as `releases list` shows it."""

    name: str
    collection: str
    version: int
    rank: int
    placement: str
    facts: int
    created_at_utc: str
    digest: str
    aliases: tuple[str, ...]
    """Aliases that point at it."""


@dataclass(frozen=True)
class StatusReport(Report):
    """One look at a workspace."""

    root: str
    model: str
    base_fingerprint: str
    policy: str
    collection: str
    aliases: dict[str, str]
    facts_live: int
    rank: int
    releases: int
    unfinished_batches: tuple[tuple[int, str], ...]
    """(batch, state)."""
    law_points: int
    fit_id: str | None
    engine: dict[str, Any] | None
    messages: tuple[str, ...] = field(default=())
