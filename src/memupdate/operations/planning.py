"""What a batch needs: the law of this model, the policy's limits, the plan. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

from memupdate.budget.plan import Limits, Plan, PlanRequest
from memupdate.budget.planner import plan_update
from memupdate.errors import OverBudget
from memupdate.facts.model import Fact
from memupdate.law.fit import LawFit
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.records import FactsDiff
from memupdate.operations.session import Session

ADAPTER_BYTES_PER_ELEMENT = 4
"""Releases are written in float32."""


def current_fit(session: Session, ledger: Ledger) -> LawFit | None:
    """The latest law of this model, placement and recipe; None where nothing that matches was calibrated."""
    record = ledger.latest_fit(session.fingerprint, session.shape.name, session.recipe)
    return None if record is None else LawFit.from_json(record.fit_json)


def limits(session: Session) -> Limits:
    """The policy's bounds on a plan."""
    policy = session.policy
    return Limits(
        min_rank=policy.memory.min_rank,
        max_rank=policy.memory.max_rank,
        max_kl_nats=policy.guard.max_kl_nats if policy.guard.enabled else None,
        proved_share=policy.budget.proved_share,
        max_adapter_bytes=policy.budget.max_adapter_bytes,
        bytes_per_element=ADAPTER_BYTES_PER_ELEMENT,
    )


def rank_now(ledger: Ledger, collection: str) -> int:
    """Rank of the collection's latest release; 0 for an empty memory."""
    latest = ledger.latest_release(collection)
    return latest.rank if latest else 0


def make_plan(
    session: Session, ledger: Ledger, collection: str, diff: FactsDiff, fit: LawFit, *, live_before: Sequence[Fact]
) -> Plan:
    """Plan for writing `diff` on top of the live facts. Raises OverBudget."""
    replaced = {old.id for _, old in diff.superseding}
    incoming = [*diff.new, *(new for new, _ in diff.superseding)]
    live = [fact for fact in live_before if fact.id not in replaced] + incoming
    request = PlanRequest(
        collection=collection,
        facts_new=len(diff.new),
        facts_superseding=len(diff.superseding),
        facts_unchanged=len(diff.unchanged),
        facts_live=len(live),
        target_tokens_new=session.count_target_tokens(incoming),
        target_tokens_live=session.count_target_tokens(live),
        rank_before=rank_now(ledger, collection),
        placement=session.shape,
        fit=fit,
        limits=limits(session),
    )
    try:
        return plan_update(request)
    except OverBudget as error:
        hint = _room_by_compacting(session, ledger, request, {fact.id for fact in live})
        raise OverBudget(error.message, f"{error.hint}{hint}", error.details) from error


def _room_by_compacting(session: Session, ledger: Ledger, request: PlanRequest, live: Set[str]) -> str:
    """What else to do about a batch that does not fit: compact, where that drops enough of what stands in for retracted facts."""
    dropped = [i.stand_in for i in ledger.stand_ins(request.collection) if i.stand_in.id in live]
    tokens = session.count_target_tokens(dropped)
    if not dropped:
        return ""
    try:
        plan_update(replace(request, target_tokens_live=request.target_tokens_live - tokens))
    except OverBudget:
        return ""
    return (
        f"; `memupdate compact -c {request.collection}` makes room: it drops {tokens:,} target tokens that stand in for "
        f"{len(dropped)} retracted facts"
    )
