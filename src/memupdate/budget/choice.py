"""The placement chosen together with the rank: one plan for each placement that the memory may have, and the cheapest of them.

Invariant: the plan chosen is the very plan that its placement alone would get, so it is within every limit (share or probability, harm,
bytes, rank) whatever the others cost. Which placements there are, and whether a memory may change its own, is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memupdate.budget.plan import Plan, PlanRequest
from memupdate.budget.planner import plan_update
from memupdate.errors import OverBudget

ALIKE = 1.1
"""Plans whose expected times differ by at most this factor cost the same time: no law knows it better."""


def plan_cheapest(requests: Sequence[PlanRequest]) -> Plan:
    """The plan that takes least training time by its law; of those within 10 % of that, the smallest adapter.

    Args:
        requests: the same update under each placement, in the order that decides where all else is equal; at least one. A single
            one is planned as `plan_update` does.

    Raises:
        OverBudget: none is within the limits; the message says what is missing under each.
        LawError: a fit is of another placement or harm budget.
    """
    if len(requests) == 1:
        return plan_update(requests[0])
    plans: list[Plan] = []
    refused: dict[str, OverBudget] = {}
    for request in requests:
        try:
            plans.append(plan_update(request))
        except OverBudget as error:
            refused[request.placement.name] = error
    if not plans:
        raise _none_fits(requests[0], refused)
    fastest = min(plan.expected_duration_s.mid for plan in plans)
    chosen = min(
        (plan for plan in plans if plan.expected_duration_s.mid <= ALIKE * fastest), key=lambda plan: plan.adapter_bytes
    )
    lost = [_why_not(plan, chosen, fastest) for plan in plans if plan is not chosen]
    lost += [f"{name} does not do: {error.message}" for name, error in refused.items()]
    names = ", ".join(request.placement.name for request in requests)
    told = f"placement {chosen.placement}, the cheapest of {names}: {_cost(chosen)}"
    return replace(chosen, reasons=(*chosen.reasons, told, *lost))


def _why_not(plan: Plan, chosen: Plan, fastest_s: float) -> str:
    """What `plan` would have cost, and on which count it lost."""
    count = "more time"
    if plan.expected_duration_s.mid <= ALIKE * fastest_s:
        larger = plan.adapter_bytes > chosen.adapter_bytes
        count = "about the same time, a larger adapter" if larger else "just as cheap"
    return f"{plan.placement} would take {_cost(plan)}: {count}"


def _cost(plan: Plan) -> str:
    return f"rank {plan.rank}, about {plan.expected_duration_s.mid:,.0f} s of training, {plan.adapter_bytes:,} bytes"


def _none_fits(request: PlanRequest, refused: dict[str, OverBudget]) -> OverBudget:
    return OverBudget(
        f"{request.collection}: no placement holds {request.target_tokens_live:,} target tokens within the policy's limits",
        next(iter(refused.values())).hint,
        [f"{name}: {error.message}" for name, error in refused.items()],
    )
