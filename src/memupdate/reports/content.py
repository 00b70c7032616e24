"""What the capacity report says, before anyone renders it: frozen data, the same for terminal, JSON, HTML and Markdown.

Invariant: everything follows from the ledger, the policy and the law; no clock, no path of the machine, so one ledger
gives one report. Nothing here knows how it is shown.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from memupdate.budget.bits import KNOWLEDGE_BITS_PER_PARAMETER, MEMORISATION_BITS_PER_PARAMETER
from memupdate.budget.forecast import RULE, Forecast
from memupdate.budget.plan import Limits
from memupdate.law.points import Interval, LawPoint
from memupdate.law.pooled import PooledScore
from memupdate.ledger.figures import EngineProofs, Margins, ReleaseFigures, WeakFact
from memupdate.ledger.measures import FactTokens, MeasureCount, TextRecord
from memupdate.reports.placements import PlacementRow

if TYPE_CHECKING:
    from memupdate.law.fit import LawFit


@dataclass(frozen=True)
class Holding:
    """What one rank holds at the policy's limits, by the law's pessimistic end."""

    rank: int
    target_tokens: int
    """In all."""
    free: int
    """Of these, not used yet."""
    outside: tuple[str, ...]
    """Where the law had to leave the range that it was fitted to."""


@dataclass(frozen=True)
class CollectionCapacity:
    """One collection's gauge."""

    collection: str
    placement: str
    """Of its memory; of an empty one what the next release would have."""
    release: str | None
    """The newest; None before the first."""
    alias_release: str | None
    """Where the alias points; None where nothing is published."""
    rank: int
    facts_live: int
    facts_dead: int
    """Superseded or retracted since the last compaction: their traces are still in the weights."""
    target_tokens_live: int
    effective_parameters: int
    adapter_bytes: int
    bits_stored: float
    """What the base model did not know of the live targets, in bits."""
    bits_per_parameter: float
    now: Holding | None
    """At the present rank, or the policy's smallest for an empty memory; None without a law."""
    policy_limit: Holding | None
    """Grown to the policy's largest rank."""
    engine_limit: Holding | None
    """Grown to the largest rank that vLLM serves."""
    forecast: Forecast | None

    @property
    def used_share(self) -> float | None:
        """Live tokens over what the present rank holds, above 1 where it is overfull; None without a law."""
        if self.now is None:
            return None
        return self.target_tokens_live / max(self.now.target_tokens, 1)


@dataclass(frozen=True)
class BatchComparison:
    """What the plan of one batch promised, and what came."""

    batch: int
    release: str
    rank_planned: int
    rank: int
    """In the end; above the plan's where training had to escalate."""
    target_tokens: int
    predicted_loss_nats: Interval
    measured_loss_nats: float
    predicted_kl_nats: Interval | None
    measured_kl_nats: float | None
    predicted_proved_share: Interval
    measured_proved_share: float | None
    predicted_duration_s: Interval
    measured_duration_s: float | None

    @property
    def loss_inside(self) -> bool:
        """Whether the measured loss lies in its interval."""
        return self.predicted_loss_nats.low <= self.measured_loss_nats <= self.predicted_loss_nats.high


@dataclass(frozen=True)
class ReleaseRow:
    """One release's figures, without what only the plan needs."""

    name: str
    collection: str
    version: int
    kind: str | None
    """What its batch did: `add`, `compact` or `retract`."""
    rank: int
    created_at_utc: str
    facts_new: int
    facts_superseding: int
    facts_unproved: int
    target_tokens: int | None
    loss_nats: float | None
    kl_nats: float | None
    probes_unchanged_share: float | None
    proofs: tuple[EngineProofs, ...]
    regressions: int

    @classmethod
    def of(cls, figures: ReleaseFigures) -> ReleaseRow:
        """From the ledger's counts."""
        shared = {name: getattr(figures, name) for name in cls.__dataclass_fields__ if name != "loss_nats"}
        return cls(**shared, loss_nats=figures.loss_after_nats)

    def proved_on(self, engine: str) -> EngineProofs | None:
        """How it did on one engine; None where it was not tested there."""
        return next((item for item in self.proofs if item.engine == engine), None)


@dataclass(frozen=True)
class ReleaseMeasures:
    """What the newest run on each engine measured of one release."""

    release: str
    collection: str
    counts: tuple[MeasureCount, ...]
    generality_share: float | None
    """Of the phrasings that were not trained on, answered word for word; None where there are none."""
    locality_share: float | None
    """Of probes and near neighbours, answered as before where the base model was sure."""
    text: TextRecord | None
    perplexity_ratio: float | None
    tokens: tuple[FactTokens, ...] = ()
    """Of the least sure facts, least sure first."""


@dataclass(frozen=True)
class CapacityReport:
    """Capacity, law, batches, releases and weak facts of one workspace."""

    model: str
    base_fingerprint: str
    policy: str
    placement: str
    """Whose law and points are shown in full: that of the first collection with a release."""
    threshold: float
    """Probability that a fact's weakest token must reach, 0 to 1."""
    limits: Limits
    fit: LawFit | None
    points: tuple[LawPoint, ...]
    collections: tuple[CollectionCapacity, ...]
    batches: tuple[BatchComparison, ...]
    releases: tuple[ReleaseRow, ...]
    margins: tuple[Margins, ...]
    """Of the newest release of each collection: on the engine where it was served, else in-process."""
    weak_facts: tuple[WeakFact, ...]
    placements: tuple[PlacementRow, ...] = ()
    """Those with a law, side by side."""
    pooling: tuple[PooledScore, ...] = ()
    """One law for them all against a law for each, best first; empty where fewer than two can be compared."""
    messages: tuple[str, ...] = ()
    measures: tuple[ReleaseMeasures, ...] = ()
    """Of the newest releases, oldest first; with their tokens those of the newest of each collection."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the fit in its own JSON form."""
        plain = {
            name: _plain(getattr(self, name)) for name in self.__dataclass_fields__ if name not in ("fit", "limits")
        }
        return {
            **plain,
            "limits": asdict(self.limits),
            "fit": None if self.fit is None else json.loads(self.fit.to_json()),
            "bounds_bits_per_parameter": {
                "knowledge": KNOWLEDGE_BITS_PER_PARAMETER,
                "memorisation": MEMORISATION_BITS_PER_PARAMETER,
            },
            "forecast_rule": RULE,
        }


def _plain(value: Any) -> Any:
    """Dataclasses with their derived figures beside their fields."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, CollectionCapacity):
        return {**asdict(value), "used_share": value.used_share}
    if isinstance(value, BatchComparison):
        return {**asdict(value), "loss_inside": value.loss_inside}
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
