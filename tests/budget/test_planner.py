"""Plans: the smallest rank that passes, never falling with more facts, explained, and inverted exactly."""

import dataclasses
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memupdate.budget.plan import Limits, PlacementShape, PlanRequest, plan_from_json
from memupdate.budget.planner import adapter_bytes, free_capacity, plan_update
from memupdate.budget.ranks import RANK_LADDER
from memupdate.errors import ExitCode, OverBudget
from memupdate.law.density import BaseLoss
from memupdate.law.errors import LawError
from memupdate.law.fit import at_harm, fit_laws
from memupdate.law.needed_rank import Size
from memupdate.law.points import LawPoint
from memupdate.storage import canonical_json

PLACEMENT = PlacementShape("mlp-all", tuple((f"model.layers.{i}.mlp.gate_proj", 960, 1920) for i in range(4)))
LIMITS = Limits(min_rank=8, max_rank=512, proved_share=0.99, max_kl_nats=0.03)


def points(seed=0, harm=True):
    rng = np.random.default_rng(seed)
    found = []
    for rank in (1, 2, 4, 8, 16, 32):
        for facts in (32, 64, 128, 256):
            tokens, parameters = round(4.9 * facts), rank * PLACEMENT.parameters_per_rank
            power = 1500 * parameters**-1.4 * tokens * np.exp(rng.normal(0, 0.15))
            early = bool(power < 0.03)
            share = 1.0 if early else 1 / (1 + np.exp(-(1.9 - 1.9 * np.log(power / 0.25))))
            kl = float(0.002 + 0.03 * rank**-0.7 * (tokens / 1000) ** 0.6 * np.exp(rng.normal(0, 0.2)))
            found.append(
                LawPoint(
                    "sha256:a", "mlp-all", "sha256:r", rank, parameters, facts, tokens, 5.9,
                    float(min(0.05 + power, 5.5)), int(rng.binomial(facts, share)), kl if harm else None, 30, early,
                    float(5 + 0.04 * tokens),
                )
            )  # fmt: skip
    return found


FIT = fit_laws(points(), bootstrap=80)


def request(tokens, *, rank_before=0, limits=LIMITS, fit=FIT, new=10, **changes):
    plain = PlanRequest("acme", new, 0, 0, max(1, tokens // 5), 50, tokens, rank_before, PLACEMENT, fit, limits)
    return dataclasses.replace(plain, **changes)


def passes(rank, tokens, limits=LIMITS):
    parameters = rank * PLACEMENT.parameters_per_rank
    kl = FIT.predict_kl(parameters, tokens)
    return FIT.predict_proved_share(parameters, tokens).low >= limits.proved_share and kl.high <= limits.max_kl_nats


def rank_or_none(asked):
    try:
        return plan_update(asked).rank
    except OverBudget:
        return None


def test_the_plan_is_the_smallest_rank_that_passes_and_says_why():
    plan = plan_update(request(1254))
    assert passes(plan.rank, 1254)
    smaller = RANK_LADDER[RANK_LADDER.index(plan.rank) - 1]
    assert smaller >= LIMITS.min_rank
    assert not passes(smaller, 1254)
    assert plan.reasons[0].startswith(f"rank {plan.rank} for 1,254 live target tokens: at least 99.")
    assert f"the next smaller rank, {smaller}, does not do:" in plan.reasons[1]
    assert plan.effective_parameters == plan.rank * PLACEMENT.parameters_per_rank
    assert plan.adapter_bytes == plan.effective_parameters * 4 == adapter_bytes(PLACEMENT, plan.rank, 4)
    assert plan.bits_per_parameter == pytest.approx(5.9 * 1254 / np.log(2) / plan.effective_parameters)
    assert plan.predicted_loss_nats == FIT.predict_loss(plan.effective_parameters, 1254)
    assert plan.fit_id == FIT.fit_id
    assert any("max_lora_rank" in reason for reason in plan.reasons)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([0, 8, 20, 64]))
def test_planned_rank_never_falls_when_facts_are_added(tokens, more, rank_before):
    before = rank_or_none(request(tokens, rank_before=rank_before))
    after = rank_or_none(request(tokens + more, rank_before=rank_before))
    assert before is None or before >= max(rank_before, LIMITS.min_rank)
    assert after is None or (before is not None and before <= after)


@settings(max_examples=25)
@given(st.sampled_from([rank for rank in RANK_LADDER if rank >= 8]), st.floats(0.5, 0.995), st.floats(0.005, 0.1))
def test_free_capacity_is_the_exact_inverse(rank, share, kl):
    limits = Limits(rank, rank, share, kl)
    room = free_capacity(FIT, PLACEMENT, rank, limits)
    if room:
        assert plan_update(request(room, limits=limits)).rank == rank
        assert free_capacity(FIT, PLACEMENT, rank, limits, target_tokens_live=room) == 0
        assert free_capacity(FIT, PLACEMENT, rank, limits, target_tokens_live=room - 1) == 1
    with pytest.raises(OverBudget):
        plan_update(request(room + 1, limits=limits))


WHOLE = dataclasses.replace(LIMITS, all_proved=0.6)
WHOLE_FIT = fit_laws(points(), bootstrap=40, max_kl_nats=0.03)


def test_a_plan_for_every_fact_asks_for_its_probability_and_says_so():
    plan = plan_update(request(1254, limits=WHOLE, fit=WHOLE_FIT, base_loss=BaseLoss(5.9, 0.0)))
    smaller = RANK_LADDER[RANK_LADDER.index(plan.rank) - 1]
    size = Size(1254, 5.9)
    assert plan.all_proved.low >= 0.6 > WHOLE_FIT.predict_all_proved(smaller * PLACEMENT.parameters_per_rank, size).low
    assert plan.all_proved == WHOLE_FIT.predict_all_proved(plan.effective_parameters, size)
    assert "every fact proved with a probability of at least" in plan.reasons[0]
    assert (plan.base_loss_nats.low, plan.base_loss_nats.mid) == (5.9, 5.9)
    assert plan_from_json(canonical_json(dataclasses.asdict(plan))) == plan


@settings(max_examples=40)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0.1, 9), st.floats(0.01, 9), st.sampled_from([0, 8, 64]))
def test_facts_added_never_lower_the_rank_however_cheap(tokens, more, nats, cheap, rank_before):
    def planned(count, loss):
        asked = request(count, limits=WHOLE, fit=WHOLE_FIT, base_loss=BaseLoss(loss, 0.1), rank_before=rank_before)
        return rank_or_none(asked)

    before, after = planned(tokens, nats), planned(tokens + more, (tokens * nats + more * cheap) / (tokens + more))
    assert after is None or (before is not None and before <= after)


FITS_AT = {kl: at_harm(WHOLE_FIT, points(), kl) for kl in (0.006, 0.01, 0.03, 0.06, None)}


@settings(max_examples=20)
@given(
    st.sampled_from([8, 16, 64, 512]), st.floats(0.05, 0.95), st.sampled_from([0.006, 0.03, None]), st.floats(0.5, 9)
)
def test_free_capacity_for_every_fact_is_the_exact_inverse(rank, level, kl, nats):
    fit, limits, base_loss = FITS_AT[kl], Limits(rank, rank, 0.99, kl, all_proved=level), BaseLoss(nats, 0.1)
    room = free_capacity(fit, PLACEMENT, rank, limits, base_loss=base_loss)
    if room:
        assert plan_update(request(room, limits=limits, fit=fit, base_loss=base_loss)).rank == rank
    with pytest.raises(OverBudget):
        plan_update(request(room + 1, limits=limits, fit=fit, base_loss=base_loss))


def test_capacity_follows_the_harm_allowed_on_both_sides_of_the_fits_own_budget():
    def room(fit, rank, kl):
        return free_capacity(fit, PLACEMENT, rank, dataclasses.replace(WHOLE, max_kl_nats=kl))

    rooms = [room(FITS_AT[kl], 8, kl) for kl in (0.006, 0.01, 0.03, None)]
    assert rooms == sorted(rooms)
    assert 0 < rooms[0] < rooms[-1]
    # Where harm does not bind, a tighter budget changes the law's last digits only.
    assert room(FITS_AT[0.006], 32, 0.006) == pytest.approx(room(WHOLE_FIT, 32, 0.03), rel=0.05)


def test_points_counted_at_another_harm_and_back_give_the_same_law():
    assert FITS_AT[0.03] is WHOLE_FIT
    assert FITS_AT[0.006] != WHOLE_FIT
    assert at_harm(FITS_AT[0.006], points(), 0.03) == WHOLE_FIT


@pytest.mark.parametrize("kl", [0.01, 0.06, None])
def test_a_law_that_counts_another_harm_as_held_is_refused(kl):
    limits = dataclasses.replace(WHOLE, max_kl_nats=kl)
    with pytest.raises(LawError, match=r"harm of at most 0\.03 nats"):
        plan_update(request(300, limits=limits, fit=WHOLE_FIT))
    with pytest.raises(LawError, match=r"harm"):
        free_capacity(WHOLE_FIT, PLACEMENT, 32, limits)
    assert plan_update(request(300, limits=limits, fit=FITS_AT.get(kl))).rank >= limits.min_rank


def test_planning_loads_no_torch():
    code = "import sys, memupdate.operations.planning, memupdate.budget.planner, memupdate.budget.design; "
    code += "print([m for m in ('torch', 'transformers', 'vllm', 'peft') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_capacity_grows_with_rank():
    rooms = [free_capacity(FIT, PLACEMENT, rank, LIMITS) for rank in RANK_LADDER]
    assert rooms == sorted(rooms)
    assert rooms[-1] > rooms[0]


def test_the_harm_budget_alone_can_ask_for_more_rank():
    loose, tight = Limits(8, 512, 0.5, 0.03), Limits(8, 512, 0.5, 0.006)
    easy, careful = plan_update(request(1254, limits=loose)), plan_update(request(1254, limits=tight))
    assert careful.rank > easy.rank
    assert "harm" in careful.reasons[1]
    assert careful.predicted_kl_nats.high <= 0.006


def test_a_fit_without_harm_data_plans_and_says_so():
    fit = fit_laws(points(harm=False), bootstrap=40)
    plan = plan_update(request(600, fit=fit))
    assert plan.predicted_kl_nats is None
    assert any("no harm data" in reason for reason in plan.reasons)


def test_a_memory_with_room_keeps_its_rank_and_a_full_one_grows():
    roomy = plan_update(request(300, rank_before=64))
    assert roomy.rank == roomy.rank_before == 64
    assert "has rank 64 already" in roomy.reasons[1]
    assert plan_update(request(5000, rank_before=8)).rank > 8


def test_nothing_new_changes_nothing():
    plan = plan_update(request(10**8, rank_before=16, new=0, facts_unchanged=9))
    assert plan.rank == 16
    assert plan.reasons[0].startswith("nothing new to write")


def test_the_policys_smallest_rank_is_named():
    assert "memory.min_rank = 8" in plan_update(request(50)).reasons[1]


def test_extrapolation_is_flagged():
    plan = plan_update(request(10_000))
    assert any(reason.startswith("outside the calibrated range, so widened:") for reason in plan.reasons)


def test_over_budget_says_what_is_missing_and_what_would_do():
    limits = dataclasses.replace(LIMITS, max_rank=16)
    with pytest.raises(OverBudget) as caught:
        plan_update(request(5000, limits=limits))
    error = caught.value
    needed = plan_update(request(5000)).rank
    room = free_capacity(FIT, PLACEMENT, 16, limits)
    assert error.exit_code == ExitCode.OVER_BUDGET
    assert "\n" not in error.message
    assert f"room for {room:,} target tokens, {5000 - room:,} too few" in error.message
    assert error.hint.startswith(f"raise memory.max_rank to {needed},")
    assert "split the facts" in error.hint
    assert "compact" not in error.hint, "the live facts would be the same"
    assert len(error.details) == len([rank for rank in RANK_LADDER if 8 <= rank <= 16])


def test_over_budget_by_bytes():
    limits = dataclasses.replace(LIMITS, max_adapter_bytes=adapter_bytes(PLACEMENT, 16, 4))
    with pytest.raises(OverBudget) as caught:
        plan_update(request(5000, limits=limits))
    assert "rank 16, the largest within the adapter size allowed" in caught.value.message
    assert "max_adapter_bytes" in caught.value.hint
    with pytest.raises(OverBudget, match="bytes"):
        plan_update(request(50, limits=dataclasses.replace(LIMITS, max_adapter_bytes=1)))


def test_over_budget_when_the_memory_is_above_the_limit_already():
    with pytest.raises(OverBudget, match=r"rank 80, above memory\.max_rank = 64") as caught:
        plan_update(request(50, rank_before=80, limits=dataclasses.replace(LIMITS, max_rank=64)))
    assert "`memupdate compact -c acme`" in caught.value.hint


def test_a_law_of_another_placement_is_refused():
    other = PlacementShape("mlp-one", PLACEMENT.matrices)
    with pytest.raises(LawError, match="mlp-one"):
        plan_update(request(50, placement=other))
    with pytest.raises(LawError, match="mlp-one"):
        free_capacity(FIT, other, 8, LIMITS)


def test_a_plan_for_a_hundred_thousand_facts_takes_well_under_a_second():
    started = time.perf_counter()
    rank_or_none(request(500_000))
    assert time.perf_counter() - started < 1
