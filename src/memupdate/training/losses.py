"""The objectives: how much each target token's loss counts. Equations after arXiv 2605.30260; symbols: `nll = −ln p` (nats)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Objective = Callable[[Tensor], Tensor]
"""Maps the target tokens' losses, (N,) float32 nats with gradient, to one scalar to minimise."""


def sft_loss(nll: Tensor) -> Tensor:
    """Plain supervised fine-tuning: `L = (1/N) Σ nll_i`."""
    return nll.mean()


def memft_ot_loss(threshold: float) -> Objective:
    """MemFT with an optimal threshold: `L = Σ w_i nll_i / Σ w_i`, `w_i = 1` where `nll_i > −ln p*`, else 0.

    Tokens already over the threshold get no gradient; with none left under it the loss is 0 (the paper's second variant:
    the first falls back to the full loss).

    Args:
        threshold: p*, a probability above 0 and below 1.
    """
    bound = -math.log(threshold)

    def loss(nll: Tensor) -> Tensor:
        weights = (nll.detach() > bound).to(nll.dtype)
        return (weights * nll).sum() / weights.sum().clamp(min=1)

    return loss


def make_objective(name: str, threshold: float) -> Objective:
    """The objective a policy names: `memft-ot` or `sft`."""
    return {"memft-ot": memft_ot_loss(threshold), "sft": sft_loss}[name]
