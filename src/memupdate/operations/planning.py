"""What a batch needs: the law of this model, the policy's limits, the plan. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memupdate.budget.choice import plan_cheapest
from memupdate.budget.placement import AUTO, PLACEMENTS
from memupdate.budget.plan import Limits, Plan, PlanRequest, plan_from_json
from memupdate.errors import OverBudget
from memupdate.facts.model import Fact
from memupdate.law.density import BaseLoss
from memupdate.law.drift import PlannedPoint
from memupdate.law.errors import LawError
from memupdate.law.fit import MIN_POINTS, LawFit
from memupdate.law.points import LawPoint
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.records import FactsDiff
from memupdate.operations.session import Session

ADAPTER_BYTES_PER_ELEMENT = 4
"""Releases are written in float32."""


@dataclass(frozen=True)
class Candidate:
    """A placement that a memory may have, and the law to plan it by."""

    session: Session
    """Under this placement."""
    fit: LawFit


def placements_of(session: Session, ledger: Ledger, collection: str, *, afresh: bool = False) -> tuple[Session, ...]:
    """The session under each placement that the collection's memory may have.

    A memory keeps the placement that its releases have, whatever the policy says since. An empty one, or one written `afresh`, has the
    policy's, or, where that is `auto`, any.
    """
    latest = None if afresh else ledger.latest_release(collection)
    return session.placements() if latest is None else (session.with_placement(latest.placement),)


def candidates(session: Session, ledger: Ledger, collection: str, *, afresh: bool = False) -> tuple[Candidate, ...]:
    """Of `placements_of`, those that have a law; none before a calibration."""
    found = [
        (placed, current_fit(placed, ledger)) for placed in placements_of(session, ledger, collection, afresh=afresh)
    ]
    return tuple(Candidate(placed, fit) for placed, fit in found if fit is not None)


def unfitted(session: Session, ledger: Ledger, collection: str, *, afresh: bool = False) -> tuple[Session, ...]:
    """Of `placements_of`, those without a law though there are points enough for one: shipped ones, or of an earlier version."""
    return tuple(
        placed
        for placed in placements_of(session, ledger, collection, afresh=afresh)
        if current_fit(placed, ledger) is None and len(points_of(placed, ledger)) >= MIN_POINTS
    )


def count_points(session: Session, ledger: Ledger, collection: str) -> int:
    """Points of all placements that the collection's memory may have."""
    return sum(len(points_of(placed, ledger)) for placed in placements_of(session, ledger, collection))


def points_of(session: Session, ledger: Ledger) -> list[LawPoint]:
    """All measured points that match the present model, placement and recipe."""
    return list(ledger.law_points(session.fingerprint, session.shape.name, session.recipe))


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
    candidates: Sequence[Candidate],
    ledger: Ledger,
    collection: str,
    diff: FactsDiff,
    *,
    live_before: Sequence[Fact],
    measure: bool = False,
) -> Plan:
    """Plan for writing `diff` on top of the live facts, under the cheapest of the placements that may hold them.

    Args:
        candidates: these placements and their laws, at least one.
        ledger: what it holds.
        collection: where to write.
        diff: what is new.
        live_before: facts that are live now.
        measure: ask the base model what the facts cost it, rather than estimating it from their tokens; loads torch.

    Raises:
        OverBudget: no rank within the policy's limits holds the live facts.
    """
    session = candidates[0].session
    replaced = {old.id for _, old in diff.superseding}
    incoming = [*diff.new, *(new for new, _ in diff.superseding)]
    kept = [fact for fact in live_before if fact.id not in replaced]
    new, old = session.count_targets(incoming), session.count_targets(kept)
    live = [*kept, *incoming]
    measured = measured_base_loss(session, live) if measure else None
    requests = [
        PlanRequest(
            collection=collection,
            facts_new=len(diff.new),
            facts_superseding=len(diff.superseding),
            facts_unchanged=len(diff.unchanged),
            facts_live=len(live),
            target_tokens_new=new.total(),
            target_tokens_live=new.total() + old.total(),
            rank_before=rank_now(ledger, collection),
            placement=candidate.session.shape,
            fit=candidate.fit,
            limits=limits(session),
            base_loss=measured or candidate.fit.base_loss(new + old),
        )
        for candidate in candidates
    ]
    try:
        plan = plan_cheapest(requests)
    except OverBudget as error:
        hint = _room_by_compacting(session, ledger, requests, live) + _room_elsewhere(session, ledger, requests)
        raise OverBudget(error.message, f"{error.hint}{hint}", error.details) from error
    more = [_kept_placement(session, plan), not_compared(candidates, plan), _phrasings(session, plan, live)]
    return replace(plan, reasons=(*plan.reasons, *filter(None, more)))


def _phrasings(session: Session, plan: Plan, live: Sequence[Fact]) -> str | None:
    """What training on further wordings costs: each is one more pass over the fact's target tokens in every epoch."""
    phrasings = sum(1 + len(session.phrasings(fact)[0]) for fact in live)
    if phrasings == len(live):
        return None
    tokens = plan.target_tokens_live * phrasings / len(live)
    return f"{phrasings:,} phrasings of {len(live):,} facts are trained on: about {tokens:,.0f} target tokens an epoch"


def _kept_placement(session: Session, plan: Plan) -> str | None:
    """Where the policy names another placement than the memory has: that it stays."""
    wanted = session.policy.memory.placement
    if plan.rank_before == 0 or wanted in (plan.placement, AUTO):
        return None
    return f"the memory is {plan.placement} and stays so; the policy's memory.placement = {wanted} holds from the next compaction on"


def not_compared(candidates: Sequence[Candidate], plan: Plan) -> str | None:
    """Where the policy leaves the placement open: those that have no law, so that they were no choice."""
    session, known = candidates[0].session, {candidate.session.shape.name for candidate in candidates}
    missing = [name for name in PLACEMENTS if name not in known]
    if plan.rank_before or session.policy.memory.placement != AUTO or not missing:
        return None
    command = " ".join(["memupdate calibrate", *(f"--placement {name}" for name in missing)])
    return f"not compared, as no law is fitted for them: {', '.join(missing)} (`{command}`)"


def measured_base_loss(session: Session, facts: Sequence[Fact]) -> BaseLoss:
    """What the base model itself says that facts cost, per target token; each set is scored once a session."""
    from memupdate.models.scoring import mean_loss_nats, score_examples

    key = tuple(fact.id for fact in facts)
    if key not in session.base_losses:
        scores = score_examples(session.base.model, session.renderer.render_all(list(facts)), session.base.device)
        session.base_losses[key] = mean_loss_nats(scores)
    return BaseLoss(session.base_losses[key], 0.0)


def _room_elsewhere(session: Session, ledger: Ledger, requests: Sequence[PlanRequest]) -> str:
    """What else to do where a memory has outgrown its placement: write it afresh under another one that has a law."""
    first = requests[0]
    if not first.rank_before:  # an empty memory had the choice
        return ""
    for name in PLACEMENTS:
        placed = session.with_placement(name)
        fit = current_fit(placed, ledger)
        if fit is None or name == first.placement.name:
            continue
        try:
            plan = plan_cheapest([replace(first, rank_before=0, placement=placed.shape, fit=fit)])
        except OverBudget:
            continue
        return (
            f'; or set memory.placement = "{name}" and run `memupdate compact -c {first.collection}`: '
            f"rank {plan.rank} would hold them there"
        )
    return ""


def _room_by_compacting(session: Session, ledger: Ledger, requests: Sequence[PlanRequest], live: Sequence[Fact]) -> str:
    """What else to do about a batch that does not fit: compact, where that drops enough of what stands in for retracted facts."""
    collection = requests[0].collection
    stand_ins = {item.stand_in.id: item.stand_in for item in ledger.stand_ins(collection)}
    if not stand_ins:  # the usual case: the identities of all live facts are not worth working out
        return ""
    dropped = [stand_ins[fact.id] for fact in live if fact.id in stand_ins]
    tokens = session.count_target_tokens(dropped)
    if not dropped:
        return ""
    try:
        plan_cheapest([replace(asked, target_tokens_live=asked.target_tokens_live - tokens) for asked in requests])
    except OverBudget:
        return ""
    return (
        f"; `memupdate compact -c {collection}` makes room: it drops {tokens:,} target tokens that stand in for "
        f"{len(dropped)} retracted facts"
    )
