"""The `Plan`: what an update will cost and what it promises, before anything is trained; and what is asked for one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memupdate.law.density import BaseLoss
from memupdate.law.points import Interval

if TYPE_CHECKING:
    # numpy comes with the fit; whoever only shows a plan does without.
    from memupdate.law.fit import LawFit


@dataclass(frozen=True)
class PlacementShape:
    """A placement resolved on one base model: which matrices are adapted and their sizes."""

    name: str
    matrices: tuple[tuple[str, int, int], ...]
    """(module name as in the base model, d_in, d_out) for each adapted matrix, in model order."""

    @property
    def parameters_per_rank(self) -> int:
        """Σ (d_in + d_out): effective parameters that one rank adds."""
        return sum(d_in + d_out for _, d_in, d_out in self.matrices)

    @property
    def modules(self) -> frozenset[str]:
        """Last parts of the matrices' names, for example `up_proj`."""
        return frozenset(name.rpartition(".")[2] for name, _, _ in self.matrices)


@dataclass(frozen=True)
class Plan:
    """What one batch needs. The memory is shared: what counts is all live facts against the rank."""

    collection: str
    facts_new: int
    facts_superseding: int
    facts_unchanged: int
    """Already stored: nothing to do for these."""
    facts_live: int
    """Live facts after this batch, older ones included."""
    target_tokens_new: int
    target_tokens_live: int
    placement: str
    rank_before: int
    """Rank of the memory now; 0 for an empty one."""
    rank: int
    rank_limit: int
    """The policy's largest rank."""
    effective_parameters: int
    predicted_loss_nats: Interval
    """Mean loss over the live target tokens after training, nats per token."""
    predicted_kl_nats: Interval | None
    """Harm: KL to the base model on its own text, nats per token; None where the fit has no harm data."""
    expected_proved_share: Interval
    """Share of live facts proved, 0 to 1."""
    bits_stored: float
    """Information to store: base loss of all live target tokens, in bits."""
    bits_per_parameter: float
    adapter_bytes: int
    expected_duration_s: Interval
    fit_id: str
    reasons: tuple[str, ...]
    """Why this rank and placement, one line each."""
    all_proved: Interval | None = None
    """Probability that every live fact is proved with harm within its budget, 0 to 1; None in plans of earlier versions."""
    base_loss_nats: Interval | None = None
    """Loss of the live facts before anything is written, per target token: measured (then without spread) or estimated."""


@dataclass(frozen=True)
class Limits:
    """What the policy allows a plan."""

    min_rank: int
    max_rank: int
    proved_share: float
    """Share of live facts that the pessimistic end of the prediction must reach, 0 to 1; asked for where `all_proved` is None."""
    max_kl_nats: float | None = None
    """Harm budget that the pessimistic end must keep, nats per token; None for no budget."""
    max_adapter_bytes: int = 0
    """Largest adapter; 0 for no limit."""
    bytes_per_element: int = 4
    """Of a stored adapter weight: 4 for float32, 2 for bfloat16 and float16."""
    all_proved: float | None = None
    """Probability that every fact is proved, which its pessimistic end must reach, 0 to 1; None where a share will do."""


@dataclass(frozen=True)
class PlanRequest:
    """What is to be planned: counts only, no facts."""

    collection: str
    facts_new: int
    facts_superseding: int
    facts_unchanged: int
    facts_live: int
    """After the batch."""
    target_tokens_new: int
    target_tokens_live: int
    """After the batch."""
    rank_before: int
    """0 for an empty memory."""
    placement: PlacementShape
    fit: LawFit
    limits: Limits
    base_loss: BaseLoss | None = None
    """Of all live facts; None takes the fit's mean."""


def plan_from_json(text: str) -> Plan:
    """A plan as the ledger keeps it: `dataclasses.asdict` as JSON. Raises ValueError, KeyError or TypeError for anything else."""
    values = json.loads(text)
    given = ("predicted_loss_nats", "predicted_kl_nats", "expected_proved_share", "expected_duration_s")
    for name in (*given, "all_proved", "base_loss_nats"):
        value = values[name] if name in given else values.get(name)
        values[name] = None if value is None else Interval(**value)
    return Plan(**{**values, "reasons": tuple(values["reasons"])})
