"""What the same facts would need under each placement that has a law, for terminal, JSON, page and Markdown alike.

Invariant: every figure is the law's and the planner's own; a placement without a law is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memupdate.law.points import Interval
from memupdate.law.pooled import COMMON, OFFSET, SEPARATE, PooledScore

COLUMNS = (
    "placement",
    "tokens",
    "rank",
    "effective parameters",
    "training",
    "KL",
    "half the harm",
    "twice the harm",
)


@dataclass(frozen=True)
class PlacementNeed:
    """What one size needs under one placement, in an empty memory."""

    target_tokens: int
    parameters: Interval
    """Effective parameters that one such set needs, its luck included."""
    rank: int | None
    """That a plan would take; None where the policy's limits leave none."""
    duration_s: Interval | None
    """Of training at this rank; None without one."""
    kl_nats: Interval | None
    rank_half_harm: int | None = None
    """That a plan would take at half the policy's harm budget; None where none would do, or harm has no budget."""
    rank_twice_harm: int | None = None


@dataclass(frozen=True)
class PlacementRow:
    """One placement with a law."""

    placement: str
    parameters_per_rank: int
    points: int
    fit_id: str
    needs: tuple[PlacementNeed, ...]


def placement_cells(rows: Sequence[PlacementRow]) -> list[tuple[str, ...]]:
    """A line of text per placement and size, under `COLUMNS`."""
    from memupdate.reports import texts
    from memupdate.reports.tables import human_duration

    return [
        (
            row.placement,
            f"{need.target_tokens:,}",
            _rank(need.rank),
            texts.interval(need.parameters),
            "–" if need.duration_s is None else human_duration(need.duration_s.mid),
            texts.number(None if need.kl_nats is None else need.kl_nats.mid),
            _rank(need.rank_half_harm),
            _rank(need.rank_twice_harm),
        )
        for row in rows
        for need in row.needs
    ]


def pooling_sentence(scores: Sequence[PooledScore]) -> str:
    """Whether one law would do for several placements; empty where fewer than two can be compared."""
    if not scores:
        return ""
    best, named = scores[0], ", ".join(f"{score.name} {score.log_score:+.3f}" for score in scores)
    says = {
        SEPARATE: "a placement's points say little about another's",
        OFFSET: "placements share the law's slope, and differ in what a parameter holds",
        COMMON: "a parameter holds the same under each",
    }
    scored = f"One law for several placements, or one each (mean ln probability, sizes left out): {named}"
    return f"{scored}; best is {best.name}: {says[best.name]}."


def _rank(rank: int | None) -> str:
    return "–" if rank is None else str(rank)
