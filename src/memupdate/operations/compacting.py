"""Compaction: when it is worth its time, what it would need, and the plan for it. Torch-free; `BatchRun` carries it out.

Invariant: a compaction is planned for the live facts without what stands in for retracted ones, in an empty memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memupdate.budget.choice import plan_cheapest
from memupdate.budget.plan import Plan, PlanRequest
from memupdate.budget.planner import plan_update
from memupdate.errors import OverBudget
from memupdate.facts.model import Fact
from memupdate.ledger.ledger import Ledger
from memupdate.operations import planning
from memupdate.operations.planning import Candidate, limits
from memupdate.operations.reports import Report
from memupdate.operations.session import Session


@dataclass(frozen=True)
class CompactionPlan(Report):
    """What `compact` would do."""

    collection: str
    plan: Plan
    rank_before: int
    facts_live: int
    """Written afresh."""
    facts_dropped: int
    """Answers that stand in for retracted facts and are left out."""
    dead_answers: int
    """Superseded and retracted facts whose answers must be gone."""
    messages: tuple[str, ...] = ()


def command(collection: str) -> str:
    """What an operator types."""
    return f"memupdate compact -c {collection}"


def plan_compaction(candidates: Sequence[Candidate], collection: str, live: Sequence[Fact]) -> Plan:
    """Plan for `live` in an empty memory, under the cheapest of the placements that it may have. Raises OverBudget."""
    targets = candidates[0].session.count_targets(live)
    plan = plan_cheapest(
        [
            PlanRequest(
                collection=collection,
                facts_new=0,
                facts_superseding=0,
                facts_unchanged=len(live),
                facts_live=len(live),
                target_tokens_new=0,
                target_tokens_live=targets.total(),
                rank_before=0,
                placement=candidate.session.shape,
                fit=candidate.fit,
                limits=limits(candidate.session),
                base_loss=candidate.fit.base_loss(targets),
            )
            for candidate in candidates
        ]
    )
    missing = planning.not_compared(candidates, plan)
    return replace(plan, reasons=(*plan.reasons, missing)) if missing else plan


def live_without_stand_ins(ledger: Ledger, collection: str) -> tuple[list[Fact], int]:
    """What a compaction would write, and how many answers to retracted facts it would leave out."""
    dropped = {item.stand_in.id for item in ledger.stand_ins(collection)}
    live = ledger.live_facts(collection)
    return [fact for fact in live if fact.id not in dropped], len(dropped)


def preview(ledger: Ledger, collection: str, candidates: Sequence[Candidate]) -> CompactionPlan:
    """What `compact` would do; changes nothing. Raises OverBudget."""
    live, dropped = live_without_stand_ins(ledger, collection)
    latest = ledger.latest_release(collection)
    return CompactionPlan(
        collection=collection,
        plan=plan_compaction(candidates, collection, live),
        rank_before=latest.rank if latest else 0,
        facts_live=len(live),
        facts_dropped=dropped,
        dead_answers=len(ledger.replaced_facts(collection)),
    )


def reasons_to_compact(session: Session, ledger: Ledger, collection: str) -> list[str]:
    """The policy's triggers that the collection has reached, in words; cheap enough for every `status`."""
    policy, latest = session.policy, ledger.latest_release(collection)
    if latest is None:
        return []
    reasons = []
    dead, live = ledger.dead_count(collection), ledger.live_count(collection)
    if dead and dead >= policy.compaction.dead_share * (dead + live):
        reasons.append(f"{dead} of {dead + live} answers in the weights are dead")
    harm, budget = ledger.measured_harm(latest.name), policy.guard.max_kl_nats
    if policy.guard.enabled and harm is not None and harm >= policy.compaction.harm_share * budget:
        reasons.append(f"harm is {harm:.4f} of {budget:.4f} nats")
    rank_limit = policy.compaction.rank_limit or policy.memory.max_rank
    if latest.rank >= rank_limit:
        reasons.append(f"the memory has rank {latest.rank}, the limit is {rank_limit}")
    return reasons


def advice(session: Session, ledger: Ledger, collection: str, plan: Plan | None = None) -> str | None:
    """One line that proposes a compaction; None where it would win nothing, or no law tells.

    Proposed where a trigger is reached and the fresh memory is smaller or rid of dead answers; and before an update that
    makes the memory grow, where compacting first and adding then takes less time by the law, or a smaller rank.

    Args:
        plan: the update that is about to be made, if one is.
    """
    from memupdate.reports.tables import human_duration  # rich, which most callers of this module do without

    latest, reasons = ledger.latest_release(collection), reasons_to_compact(session, ledger, collection)
    grows = plan is not None and plan.rank > plan.rank_before > 0
    if latest is None or not (reasons or grows):
        return None
    candidates = planning.candidates(session, ledger, collection, afresh=True)
    if not candidates:
        return None
    live, dropped = live_without_stand_ins(ledger, collection)
    try:
        fresh = plan_compaction(candidates, collection, live)
        if plan is not None and grows:
            own = next(found for found in candidates if found.session.shape.name == fresh.placement)
            reasons += _against_growth(own, ledger, plan, fresh)
    except OverBudget:
        return None
    held_in = latest.rank * session.with_placement(latest.placement).shape.parameters_per_rank
    if not reasons or (fresh.effective_parameters >= held_in and not dropped and not ledger.dead_count(collection)):
        return None
    now = f"{latest.rank} now" if fresh.placement == latest.placement else f"{latest.placement}, {latest.rank} now"
    rank = f"rank {fresh.rank}" if fresh.placement == latest.placement else f"{fresh.placement}, rank {fresh.rank}"
    return (
        f"`{command(collection)}` is worth its time: {'; '.join(reasons)}. Afresh, the live facts take {rank} "
        f"({now}) and about {human_duration(fresh.expected_duration_s.mid)}"
    )


def _against_growth(own: Candidate, ledger: Ledger, plan: Plan, fresh: Plan) -> list[str]:
    """Why to compact before `plan`, which grows the memory: less time in all, or a smaller memory after it.

    Args:
        own: placement and law of `fresh`.
    """
    from memupdate.reports.tables import human_duration

    dropped = own.session.count_target_tokens([item.stand_in for item in ledger.stand_ins(plan.collection)])
    after = plan_update(
        PlanRequest(
            collection=plan.collection,
            facts_new=plan.facts_new,
            facts_superseding=plan.facts_superseding,
            facts_unchanged=plan.facts_unchanged,
            facts_live=plan.facts_live,
            target_tokens_new=plan.target_tokens_new,
            target_tokens_live=max(plan.target_tokens_new, plan.target_tokens_live - dropped),
            rank_before=fresh.rank,
            placement=own.session.shape,
            fit=own.fit,
            limits=limits(own.session),
        )
    )
    both = fresh.expected_duration_s.mid + after.expected_duration_s.mid
    if both < plan.expected_duration_s.mid:
        return [
            f"with the update after it {human_duration(both)}, against {human_duration(plan.expected_duration_s.mid)} "
            f"to grow to rank {plan.rank}"
        ]
    if after.adapter_bytes < plan.adapter_bytes:
        rank = f"rank {after.rank}" if after.placement == plan.placement else f"{after.placement}, rank {after.rank}"
        return [f"the update then takes {rank}, not {plan.rank}"]
    return []
