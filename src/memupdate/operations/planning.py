"""What a batch needs: the law of this model, the policy's limits, the plan. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memupdate.budget.plan import Limits, Plan, PlanRequest, plan_from_json
from memupdate.budget.planner import plan_update
from memupdate.errors import OverBudget
from memupdate.facts.model import Fact
from memupdate.law.density import BaseLoss
from memupdate.law.drift import PlannedPoint
from memupdate.law.errors import LawError
from memupdate.law.fit import LawFit
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.records import FactsDiff
from memupdate.operations.session import Session

ADAPTER_BYTES_PER_ELEMENT = 4
"""Releases are written in float32."""


def current_fit(session: Session, ledger: Ledger) -> LawFit | None:
    """The latest law of this model, placement and recipe; None where nothing that matches was calibrated, or an earlier version fitted it.

    The recipe covers what the numbers depend on, dtype, steps and guard among it: a law of another policy is never used.
    """
    record = ledger.latest_fit(session.fingerprint, session.shape.name, session.recipe)
    try:
        return None if record is None else LawFit.from_json(record.fit_json)
    except LawError:
        return None


def planned_points(session: Session, ledger: Ledger) -> list[PlannedPoint]:
    """Batches of this model, placement and recipe, as planned and as measured, oldest first; plans of other versions are passed over."""
    found = []
    for batch, text, measured in ledger.planned_losses(session.fingerprint, session.shape.name, session.recipe):
        try:
            plan = plan_from_json(text)
        except (ValueError, KeyError, TypeError):
            continue
        found.append(PlannedPoint(batch, plan.predicted_loss_nats, measured, session.policy.budget.confidence))
    return found


def limits(session: Session) -> Limits:
    """The policy's bounds on a plan."""
    policy = session.policy
    return Limits(
        min_rank=policy.memory.min_rank,
        max_rank=policy.memory.max_rank,
        max_kl_nats=policy.guard.max_kl_nats if policy.guard.enabled else None,
        proved_share=policy.budget.proved_share,
        all_proved=policy.budget.all_proved if policy.proof.publish == "all" else None,
        max_adapter_bytes=policy.budget.max_adapter_bytes,
        bytes_per_element=ADAPTER_BYTES_PER_ELEMENT,
    )


def rank_now(ledger: Ledger, collection: str) -> int:
    """Rank of the collection's latest release; 0 for an empty memory."""
    latest = ledger.latest_release(collection)
    return latest.rank if latest else 0


def make_plan(
    session: Session,
    ledger: Ledger,
    collection: str,
    diff: FactsDiff,
    fit: LawFit,
    *,
    live_before: Sequence[Fact],
    measure: bool = False,
) -> Plan:
    """Plan for writing `diff` on top of the live facts.

    Args:
        session: the workspace.
        ledger: what it holds.
        collection: where to write.
        diff: what is new.
        fit: the law.
        live_before: facts that are live now.
        measure: ask the base model what the facts cost it, rather than estimating it from their tokens; loads torch.

    Raises:
        OverBudget: no rank within the policy's limits holds the live facts.
    """
    replaced = {old.id for _, old in diff.superseding}
    incoming = [*diff.new, *(new for new, _ in diff.superseding)]
    kept = [fact for fact in live_before if fact.id not in replaced]
    new, old = session.count_targets(incoming), session.count_targets(kept)
    live = [*kept, *incoming]
    request = PlanRequest(
        collection=collection,
        facts_new=len(diff.new),
        facts_superseding=len(diff.superseding),
        facts_unchanged=len(diff.unchanged),
        facts_live=len(live),
        target_tokens_new=new.total(),
        target_tokens_live=new.total() + old.total(),
        rank_before=rank_now(ledger, collection),
        placement=session.shape,
        fit=fit,
        limits=limits(session),
        base_loss=measured_base_loss(session, live) if measure else fit.base_loss(new + old),
    )
    try:
        return plan_update(request)
    except OverBudget as error:
        hint = _room_by_compacting(session, ledger, request, live)
        raise OverBudget(error.message, f"{error.hint}{hint}", error.details) from error


def measured_base_loss(session: Session, facts: Sequence[Fact]) -> BaseLoss:
    """What the base model itself says that facts cost, per target token; each set is scored once a session."""
    from memupdate.models.scoring import mean_loss_nats, score_examples

    key = tuple(fact.id for fact in facts)
    if key not in session.base_losses:
        scores = score_examples(session.base.model, session.renderer.render_all(list(facts)), session.base.device)
        session.base_losses[key] = mean_loss_nats(scores)
    return BaseLoss(session.base_losses[key], 0.0)


def _room_by_compacting(session: Session, ledger: Ledger, request: PlanRequest, live: Sequence[Fact]) -> str:
    """What else to do about a batch that does not fit: compact, where that drops enough of what stands in for retracted facts."""
    stand_ins = {item.stand_in.id: item.stand_in for item in ledger.stand_ins(request.collection)}
    if not stand_ins:  # the usual case: the identities of all live facts are not worth working out
        return ""
    dropped = [stand_ins[fact.id] for fact in live if fact.id in stand_ins]
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
