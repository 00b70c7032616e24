"""What is measured, before any law is fitted to it: one trained memory is one `LawPoint`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Interval:
    """A prediction with its uncertainty; `low <= mid <= high`, all in the unit of what is predicted."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class LawPoint:
    """One memory written and measured.

    Loss is the mean over target tokens of −ln p, in nats. `ΔL = loss_before_nats − loss_after_nats`.
    """

    base_fingerprint: str
    """Which base model, `sha256:…` of its weights."""
    placement: str
    """Which matrices are adapted, for example `mlp-all`."""
    recipe: str
    """`sha256:…` of what else the numbers depend on: objective, guard, rate, dtype. Points of other recipes are not mixed."""
    rank: int
    effective_parameters: int
    """`r · Σ (d_in + d_out)` over the adapted matrices."""
    facts: int
    target_tokens: int
    """ℓ: target tokens written, end tokens included, over all live facts in this memory."""
    loss_before_nats: float
    loss_after_nats: float
    facts_proved: int
    """How many of `facts` have every target token as the argmax."""
    kl_nats: float | None
    """Harm: mean KL(base ‖ adapted) per token on held-out anchor text; None where not measured."""
    epochs: int
    stopped_early: bool
    """True where training stopped because every token cleared the margin: capacity would allow a lower loss still."""
    duration_s: float
    origin: Literal["calibration", "shipped", "batch"] = "calibration"
