"""The cheapest placement: always the plan that its placement alone would get, never one that is over budget."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memupdate.budget.choice import ALIKE, plan_cheapest
from memupdate.budget.plan import Limits, PlacementShape, PlanRequest
from memupdate.budget.planner import plan_update
from memupdate.errors import OverBudget
from memupdate.law.fit import fit_laws
from memupdate.law.points import LawPoint

SHAPES = {
    "mlp-all": PlacementShape("mlp-all", tuple((f"model.layers.{i}.mlp.up_proj", 256, 512) for i in range(4))),
    "mlp-one": PlacementShape("mlp-one", (("model.layers.2.mlp.up_proj", 256, 512),)),
    "all-linear": PlacementShape("all-linear", tuple((f"model.layers.{i}.m", 256, 512) for i in range(8))),
}
LIMITS = Limits(min_rank=1, max_rank=64, proved_share=0.99, max_kl_nats=0.03, all_proved=0.6)


def points(name: str, *, level: float, pace: float) -> list[LawPoint]:
    """A sweep over one placement: `level` effective parameters hold one target token, a token takes `pace` seconds to train."""
    rng, found = np.random.default_rng(len(name)), []
    for rank in (1, 2, 4, 8, 16, 32):
        for facts in (8, 16, 32, 64, 128):
            tokens, parameters = 5 * facts, rank * SHAPES[name].parameters_per_rank
            holds = parameters > level * tokens * np.exp(rng.normal(0, 0.1))
            found.append(
                LawPoint(
                    "sha256:a", name, "sha256:r", rank, parameters, facts, tokens, 3.0, 0.08 if holds else 0.5,
                    facts if holds else facts // 2, 0.01, 30, bool(holds), pace * tokens,
                )
            )  # fmt: skip
    return found


FITS = {
    "mlp-all": fit_laws(points("mlp-all", level=30, pace=0.10), bootstrap=40, max_kl_nats=0.03),
    "mlp-one": fit_laws(points("mlp-one", level=45, pace=0.06), bootstrap=40, max_kl_nats=0.03),
    "all-linear": fit_laws(points("all-linear", level=28, pace=0.15), bootstrap=40, max_kl_nats=0.03),
}


def requests(tokens, names=tuple(SHAPES), limits=LIMITS, rank_before=0):
    return [
        PlanRequest("acme", 10, 0, 0, max(1, tokens // 5), 50, tokens, rank_before, SHAPES[name], FITS[name], limits)
        for name in names
    ]


def plan_or_none(asked):
    try:
        return plan_cheapest(asked)
    except OverBudget:
        return None


@settings(max_examples=60)
@given(st.integers(1, 20_000), st.integers(0, 20_000), st.permutations(list(SHAPES)))
def test_the_choice_is_one_placements_own_plan_and_grows_with_the_facts(tokens, more, names):
    plan, later = plan_or_none(requests(tokens, names)), plan_or_none(requests(tokens + more, names))
    alone = {asked.placement.name: plan_or_none([asked]) for asked in requests(tokens, names)}
    if plan is None:
        assert not any(alone.values())
        assert later is None, "what no placement held, none holds with more facts"
        return
    own = alone[plan.placement]
    assert own is not None
    assert dataclasses.replace(plan, reasons=own.reasons) == own
    assert plan.reasons[: len(own.reasons)] == own.reasons
    feasible = [found for found in alone.values() if found is not None]
    fastest = min(found.expected_duration_s.mid for found in feasible)
    assert plan.expected_duration_s.mid <= ALIKE * fastest
    assert not any(
        found.adapter_bytes < plan.adapter_bytes and found.expected_duration_s.mid <= ALIKE * fastest
        for found in feasible
    )
    if later is not None and later.placement == plan.placement:
        assert later.rank >= plan.rank


def test_the_fastest_wins_and_the_reasons_say_why_the_others_lost():
    plan = plan_cheapest(requests(400))
    assert plan.placement == "mlp-one"
    told = [
        reason for reason in plan.reasons if "placement mlp-one, the cheapest of mlp-all, mlp-one, all-linear" in reason
    ]
    assert len(told) == 1
    for name in ("mlp-all", "all-linear"):
        (line,) = (reason for reason in plan.reasons if reason.startswith(f"{name} would take rank"))
        assert line.endswith("more time")


def test_of_placements_that_take_the_same_time_the_smaller_adapter_wins():
    same = fit_laws(points("mlp-one", level=45, pace=0.10), bootstrap=40, max_kl_nats=0.03)
    asked = [requests(400, ["mlp-all"])[0], dataclasses.replace(requests(400, ["mlp-one"])[0], fit=same)]
    plans = [plan_update(one) for one in asked]
    plan = plan_cheapest(asked)
    assert plan.adapter_bytes == min(found.adapter_bytes for found in plans)
    (line,) = (reason for reason in plan.reasons if "would take" in reason)
    assert line.endswith("about the same time, a larger adapter")


def test_a_placement_that_is_over_budget_is_never_chosen_however_fast():
    tokens = next(t for t in range(500, 50_000, 50) if plan_or_none(requests(t, ["mlp-one"])) is None)
    plan = plan_cheapest(requests(tokens))
    assert plan.placement != "mlp-one"
    assert any(reason.startswith("mlp-one does not do: acme: no rank up to 64 holds") for reason in plan.reasons)


def test_where_none_fits_each_says_what_is_missing():
    with pytest.raises(OverBudget, match="no placement holds 900,000 target tokens") as caught:
        plan_cheapest(requests(900_000))
    assert [line.split(":")[0] for line in caught.value.details] == list(SHAPES)
    assert "memory.max_rank" in caught.value.hint or "relax the limits" in caught.value.hint


def test_one_placement_is_planned_as_ever():
    (asked,) = requests(400, ["mlp-all"])
    assert plan_cheapest([asked]) == plan_update(asked)
