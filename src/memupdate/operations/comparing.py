"""Placements side by side: what each would need for the same facts, and whether one law could serve them all. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memupdate.budget.placement import PLACEMENTS
from memupdate.budget.plan import Limits, Plan, PlanRequest
from memupdate.budget.planner import plan_update
from memupdate.errors import OverBudget
from memupdate.law.fit import LawFit, at_harm
from memupdate.law.needed_rank import Size
from memupdate.law.points import LawPoint
from memupdate.law.pooled import PooledScore, compare_pooling
from memupdate.ledger.ledger import Ledger
from memupdate.operations import planning
from memupdate.operations.planning import Candidate
from memupdate.operations.session import Session
from memupdate.reports.placements import PlacementNeed, PlacementRow

SIZES = (100, 300, 1000)
"""Target tokens that placements are compared at."""


def with_laws(session: Session, ledger: Ledger) -> tuple[Candidate, ...]:
    """Every placement that has a law under this model and policy, whether or not the policy would choose it."""
    placed = [session.with_placement(name) for name in PLACEMENTS]
    found = [(each, planning.current_fit(each, ledger)) for each in placed]
    return tuple(Candidate(each, fit) for each, fit in found if fit is not None)


def placement_rows(candidates: Sequence[Candidate], ledger: Ledger) -> tuple[PlacementRow, ...]:
    """What `SIZES` need under each placement by its own law."""
    return tuple(_row(candidate, planning.points_of(candidate.session, ledger)) for candidate in candidates)


def pooling_scores(candidates: Sequence[Candidate], ledger: Ledger) -> tuple[PooledScore, ...]:
    """One law for all of them against a law for each, best first; empty where there is nothing to compare."""
    if len(candidates) < 2:
        return ()
    points = {found.session.shape.name: planning.points_of(found.session, ledger) for found in candidates}
    fit = candidates[0].fit
    return compare_pooling(points, max_kl_nats=fit.max_kl_nats, confidence=fit.confidence)


def _row(candidate: Candidate, points: Sequence[LawPoint]) -> PlacementRow:
    session, fit = candidate.session, candidate.fit
    limits = planning.limits(session)
    budget = limits.max_kl_nats
    # A budget that no law counts in has no half and no double.
    others = (
        []
        if budget is None
        else [(replace(limits, max_kl_nats=h), at_harm(fit, points, h)) for h in (budget / 2, 2 * budget)]
    )
    needs = []
    for tokens in SIZES:
        plan = _plan(session, fit, limits, tokens)
        half, twice = [
            None if (found := _plan(session, law, at, tokens)) is None else found.rank for at, law in others
        ] or [None, None]
        needs.append(
            PlacementNeed(
                target_tokens=tokens,
                parameters=fit.predict_needed(Size(tokens)),
                rank=plan.rank if plan else None,
                duration_s=plan.expected_duration_s if plan else None,
                kl_nats=plan.predicted_kl_nats if plan else None,
                rank_half_harm=half,
                rank_twice_harm=twice,
            )
        )
    shape = session.shape
    return PlacementRow(shape.name, shape.parameters_per_rank, fit.points, fit.fit_id, tuple(needs))


def _plan(session: Session, fit: LawFit, limits: Limits, tokens: int) -> Plan | None:
    """For so many tokens of the points' mean base loss in an empty memory; None over budget."""
    try:
        return plan_update(
            PlanRequest(
                collection="", facts_new=1, facts_superseding=0, facts_unchanged=0, facts_live=1, target_tokens_new=tokens,
                target_tokens_live=tokens, rank_before=0, placement=session.shape, fit=fit, limits=limits,
            )
        )  # fmt: skip
    except OverBudget:
        return None
