"""From a fitted law, limits and counts to the smallest rank that is expected to hold everything, and its inverse, free
capacity.

Invariants: a plan's rank never falls when facts are added; `free_capacity` is the largest ℓ whose plan still fits the
rank. Both rest on the law's monotone pessimistic ends. Planning costs a handful of array operations per candidate,
whatever the facts count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from memupdate.budget.bits import KNOWLEDGE_BITS_PER_PARAMETER, bits_per_parameter, bits_stored
from memupdate.budget.plan import Limits, PlacementShape, Plan, PlanRequest
from memupdate.budget.ranks import SERVING_RANKS, candidate_ranks, serving_rank
from memupdate.errors import OverBudget
from memupdate.law.density import BaseLoss
from memupdate.law.errors import LawError
from memupdate.law.fit import LawFit
from memupdate.law.needed_rank import Size
from memupdate.law.points import Interval

_SIGMAS = 1.645
"""Half of a central interval at 90 %, in standard deviations."""
MAX_CAPACITY_TOKENS = 10**9
"""Where the search for free capacity ends: a law that allows more says nothing any longer."""


@dataclass(frozen=True)
class _Check:
    """One candidate against the limits."""

    rank: int
    share: Interval
    whole: Interval
    """Probability that every fact is proved."""
    kl: Interval | None
    adapter_bytes: int
    failures: tuple[str, ...]
    """Constraints that it breaks, in words with numbers; empty where it fits."""

    @property
    def fits(self) -> bool:
        return not self.failures


def adapter_bytes(placement: PlacementShape, rank: int, bytes_per_element: int) -> int:
    """Size of the adapter's weights (A and B of every matrix), without the file's header."""
    return rank * placement.parameters_per_rank * bytes_per_element


def plan_update(request: PlanRequest) -> Plan:
    """The smallest rank on the ladder, at least the present one, whose pessimistic ends pass every limit.

    With nothing new to write, the present rank stays, whatever the law says about it now.

    Raises:
        OverBudget: no rank within the limits passes; the message says what is missing and by how much.
        LawError: the fit is of another placement or harm budget.
    """
    fit, limits, placement = request.fit, request.limits, request.placement
    _refuse_other_law(fit, placement, limits)
    if request.facts_new + request.facts_superseding == 0 and request.rank_before > 0:
        check = _check(request, request.rank_before)
        return _plan(request, check, (f"nothing new to write: the memory keeps its rank {check.rank}",))
    checks: list[_Check] = []
    for rank in candidate_ranks(limits.min_rank, limits.max_rank, request.rank_before):
        checks.append(_check(request, rank))
        if checks[-1].fits:
            return _plan(request, checks[-1], _reasons(request, checks))
    raise _over_budget(request, checks)


def free_capacity(
    fit: LawFit,
    placement: PlacementShape,
    rank: int,
    limits: Limits,
    *,
    target_tokens_live: int = 0,
    base_loss: BaseLoss | None = None,
) -> int:
    """Target tokens that a memory of `rank` can still take: the largest ℓ that passes the limits, less those it holds
    already.

    0 where it is full; at most `MAX_CAPACITY_TOKENS`.

    Args:
        fit: the law.
        placement: which matrices are adapted.
        rank: of the memory.
        limits: what must hold; its `max_kl_nats` is the harm that the capacity is at (`law.fit.at_harm` counts points anew for it).
        target_tokens_live: held already.
        base_loss: of what is to be written; None takes the fit's mean.

    Raises:
        LawError: the fit is of another placement or harm budget.
    """
    _refuse_other_law(fit, placement, limits)

    def fits(tokens: int) -> bool:
        return _measure(fit, placement, rank, _size(tokens, base_loss), limits).fits

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < MAX_CAPACITY_TOKENS and fits(high):
        low, high = high, 2 * high
    high = min(high, MAX_CAPACITY_TOKENS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(0, (high if fits(high) else low) - target_tokens_live)


def _check(request: PlanRequest, rank: int) -> _Check:
    size = _size(request.target_tokens_live, request.base_loss)
    return _measure(request.fit, request.placement, rank, size, request.limits)


def _size(tokens: int, base_loss: BaseLoss | None) -> Size:
    return Size(max(tokens, 1)) if base_loss is None else Size(max(tokens, 1), base_loss.nats, base_loss.sd_log)


def _measure(fit: LawFit, placement: PlacementShape, rank: int, what: Size, limits: Limits) -> _Check:
    parameters, tokens = rank * placement.parameters_per_rank, what.target_tokens
    share, kl = fit.predict_proved_share(parameters, tokens), fit.predict_kl(parameters, tokens)
    whole = fit.predict_all_proved(parameters, what)
    # The expected share is at least the probability that all are proved, and that law is the surer of the two.
    share = Interval(max(share.low, whole.low), max(share.mid, whole.mid), max(share.high, whole.high))
    size = adapter_bytes(placement, rank, limits.bytes_per_element)
    failures = []
    if limits.all_proved is not None and whole.low < limits.all_proved:
        failures.append(
            f"every fact proved with a probability of {whole.low:.0%} at the pessimistic end, {limits.all_proved:.0%} wanted"
        )
    elif limits.all_proved is None and share.low < limits.proved_share:
        failures.append(f"{share.low:.2%} of facts proved at the pessimistic end, {limits.proved_share:.2%} wanted")
    # A law of whole memories has the harm budget in what it calls held.
    if kl is not None and limits.max_kl_nats is not None and limits.all_proved is None and kl.high > limits.max_kl_nats:
        failures.append(f"harm {kl.high:.4f} nats at the pessimistic end, {limits.max_kl_nats:.4f} allowed")
    if limits.max_adapter_bytes and size > limits.max_adapter_bytes:
        failures.append(f"an adapter of {size:,} bytes, {limits.max_adapter_bytes:,} allowed")
    return _Check(rank, share, whole, kl, size, tuple(failures))


def _plan(request: PlanRequest, check: _Check, reasons: tuple[str, ...]) -> Plan:
    fit, tokens = request.fit, request.target_tokens_live
    parameters = check.rank * request.placement.parameters_per_rank
    base_loss = _base_loss(request)
    stored = bits_stored(base_loss.mid, tokens)
    density = bits_per_parameter(stored, parameters)
    # Time follows all live tokens: older facts are replayed and proved again with every batch.
    return Plan(
        collection=request.collection,
        facts_new=request.facts_new,
        facts_superseding=request.facts_superseding,
        facts_unchanged=request.facts_unchanged,
        facts_live=request.facts_live,
        target_tokens_new=request.target_tokens_new,
        target_tokens_live=tokens,
        placement=request.placement.name,
        rank_before=request.rank_before,
        rank=check.rank,
        rank_limit=request.limits.max_rank,
        effective_parameters=parameters,
        predicted_loss_nats=fit.predict_loss(parameters, max(tokens, 1)),
        predicted_kl_nats=check.kl,
        expected_proved_share=check.share,
        bits_stored=stored,
        bits_per_parameter=density,
        adapter_bytes=check.adapter_bytes,
        expected_duration_s=fit.predict_duration_s(parameters, max(tokens, 1)),
        fit_id=fit.fit_id,
        reasons=reasons + _remarks(request, check, density),
        all_proved=check.whole,
        base_loss_nats=base_loss,
    )


def _base_loss(request: PlanRequest) -> Interval:
    """Of the live facts: as given, with the spread of an estimate, or the fit's."""
    given = request.base_loss
    if given is None:
        return request.fit.base_loss_nats
    factor = math.exp(_SIGMAS * given.sd_log)
    return Interval(given.nats / factor, given.nats, given.nats * factor)


def _reasons(request: PlanRequest, checks: list[_Check]) -> tuple[str, ...]:
    """Why the last of `checks` (the only one that fits) and not a smaller rank."""
    chosen, limits = checks[-1], request.limits
    promise = f"at least {chosen.share.low:.2%} of facts proved (policy: {limits.proved_share:.2%})"
    if limits.all_proved is not None:
        promise = (
            f"every fact proved with a probability of at least {chosen.whole.low:.0%} (policy: {limits.all_proved:.0%})"
        )
    if chosen.kl is not None and limits.max_kl_nats is not None:
        promise += f", harm {chosen.kl.mid:.4f} nats, at most {chosen.kl.high:.4f} (policy: {limits.max_kl_nats:.4f})"
    reasons = [f"rank {chosen.rank} for {request.target_tokens_live:,} live target tokens: {promise}"]
    if len(checks) > 1:
        smaller = checks[-2]
        reasons.append(f"the next smaller rank, {smaller.rank}, does not do: {'; '.join(smaller.failures)}")
    elif request.rank_before >= max(limits.min_rank, 1):
        reasons.append(f"the memory has rank {request.rank_before} already, and it has room")
    else:
        reasons.append(f"it is the policy's smallest (memory.min_rank = {limits.min_rank})")
    return tuple(reasons)


def _remarks(request: PlanRequest, check: _Check, density: float) -> tuple[str, ...]:
    """What else an operator should know about this rank."""
    parameters = check.rank * request.placement.parameters_per_rank
    remarks = [
        f"outside the calibrated range, so widened: {line}"
        for line in request.fit.outside_range(parameters, max(request.target_tokens_live, 1))
    ]
    if check.kl is None:
        remarks.append("harm is not predicted: the fit has no harm data; the guard measures it while training")
    if density > KNOWLEDGE_BITS_PER_PARAMETER:
        remarks.append(
            f"{density:.2f} bits per parameter is above {KNOWLEDGE_BITS_PER_PARAMETER:.0f}, "
            "about what models store as knowledge"
        )
    if check.rank > SERVING_RANKS[-1]:
        remarks.append(f"vLLM serves ranks up to {SERVING_RANKS[-1]}: this release could not be served")
    else:
        remarks.append(f"vLLM holds it in slots of max_lora_rank {serving_rank(check.rank)}")
    return tuple(remarks)


def _over_budget(request: PlanRequest, checks: list[_Check]) -> OverBudget:
    limits, tokens = request.limits, request.target_tokens_live
    if not checks:
        return OverBudget(
            f"the memory has rank {request.rank_before}, above memory.max_rank = {limits.max_rank}",
            f"raise memory.max_rank in the policy, or run `memupdate compact -c {request.collection}` first",
        )
    # The candidate that comes nearest: too many bytes is no use, and otherwise the largest rank is the best there is.
    affordable = [
        check for check in checks if not limits.max_adapter_bytes or check.adapter_bytes <= limits.max_adapter_bytes
    ]
    best = affordable[-1] if affordable else checks[0]
    room = free_capacity(request.fit, request.placement, best.rank, limits, base_loss=request.base_loss)
    sized = ", the largest within the adapter size allowed" if best is not checks[-1] else ""
    message = (
        f"{request.collection}: no rank up to {limits.max_rank} holds {tokens:,} target tokens; "
        f"rank {best.rank}{sized} gives "
        f"{'; '.join(best.failures)}"
    )
    if room:
        message += f"; it has room for {room:,} target tokens, {tokens - room:,} too few"
    raising = "raise memory.max_adapter_bytes" if sized or not affordable else _raise_rank(request, checks[-1])
    return OverBudget(
        message,
        f"{raising}, or split the facts into two collections",
        [f"rank {check.rank}: {'; '.join(check.failures)}" for check in checks],
    )


def _raise_rank(request: PlanRequest, largest: _Check) -> str:
    """The advice for memory.max_rank, with the rank that would do where one of the ladder does."""
    for rank in candidate_ranks(largest.rank + 1, SERVING_RANKS[-1], 0):
        if _check(request, rank).fits:
            return f"raise memory.max_rank to {rank}"
    return f"no rank that vLLM serves (up to {SERVING_RANKS[-1]}) is expected to do: relax the limits"


def _refuse_other_law(fit: LawFit, placement: PlacementShape, limits: Limits) -> None:
    if fit.placement != placement.name:
        raise LawError(
            f"the law was fitted for placement {fit.placement}, the plan is for {placement.name}",
            "run `memupdate calibrate`",
        )
    if limits.all_proved is not None and fit.max_kl_nats != limits.max_kl_nats:
        raise LawError(
            f"the law counts as held what keeps {_harm(fit.max_kl_nats)}, the plan asks for {_harm(limits.max_kl_nats)}",
            "fit it again, or count its points at this budget with `memupdate.law.fit.at_harm`",
        )


def _harm(max_kl_nats: float | None) -> str:
    return "any harm" if max_kl_nats is None else f"harm of at most {max_kl_nats:g} nats"
