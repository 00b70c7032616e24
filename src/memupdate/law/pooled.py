"""One law for several placements, beside a law for each: which foretells best whether a memory holds everything.

What placements share is the axis of effective parameters. A common level says that a parameter holds the same wherever it is; an offset
for each placement lets it hold more or less here than there, shrunk towards the same; separate laws share nothing. Each is scored as
the law's forms are: the mean ln of the probability given to what happened, each size left out, of all placements, in turn.

Invariant: all three are scored on the same points. Torch-free; knows nothing of ledgers and policies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memupdate.law.fit import holds
from memupdate.law.needed_rank import NeededRank, Runs, fit_needed_rank
from memupdate.law.points import LawPoint

SEPARATE, OFFSET, COMMON = "a law for each", "an offset for each", "one level for all"
OFFSET_SD = 0.5
"""Of ln P*, between placements: about a factor of 1.6."""


@dataclass(frozen=True)
class PooledScore:
    """One way to plan for several placements."""

    name: str
    log_score: float
    """Mean ln probability over all points."""
    by_placement: tuple[tuple[str, float], ...]
    """The same over each placement's points."""


def compare_pooling(
    points: Mapping[str, Sequence[LawPoint]], *, max_kl_nats: float | None, confidence: float
) -> tuple[PooledScore, ...]:
    """The three ways, best first; empty with fewer than two placements that have three sizes each.

    Args:
        points: of each placement, of one base model and recipe.
        max_kl_nats: harm above which a run did not hold its facts.
        confidence: of the laws' intervals, which the scores do not depend on.
    """
    runs = {name: runs_of(rows, max_kl_nats) for name, rows in points.items()}
    usable = {name: own for name, own in runs.items() if len(set(own.tokens)) >= 3}
    if len(usable) < 2:
        return ()
    scores = []
    for way in (SEPARATE, OFFSET, COMMON):
        laws = {name: pooled_law(usable, name, way, confidence=confidence) for name in usable}
        total = sum(law.log_score * law.points for law in laws.values()) / sum(law.points for law in laws.values())
        each = tuple((name, _rounded(law.log_score)) for name, law in laws.items())
        scores.append(PooledScore(way, _rounded(total), each))
    return tuple(sorted(scores, key=lambda score: -score.log_score))


def pooled_law(
    runs: Mapping[str, Runs], placement: str, way: str, *, confidence: float, scored: bool = True
) -> NeededRank:
    """The law of one placement, learnt in one of the three ways from its own runs and, but for `SEPARATE`, the others'."""
    others = [other for name, other in runs.items() if name != placement and way != SEPARATE]
    return fit_needed_rank(
        *runs[placement],
        confidence=confidence,
        scored=scored,
        others=others,
        offset_sd=OFFSET_SD if way == OFFSET else 0.0,
    )


def runs_of(points: Sequence[LawPoint], max_kl_nats: float | None) -> Runs:
    """What the law of needed rank sees of points."""
    return Runs(
        [point.effective_parameters for point in points],
        [point.target_tokens for point in points],
        [point.loss_before_nats for point in points],
        [holds(point, max_kl_nats) for point in points],
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
