"""What a batch needs: the law of this model, the policy's limits, the plan. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from memupdate.budget.plan import Limits, Plan, PlanRequest
from memupdate.budget.planner import plan_update
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
    return plan_update(
        PlanRequest(
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
    )
