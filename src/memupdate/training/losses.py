"""The objectives: how much each target token's loss counts. Equations after arXiv 2605.30260; `nll = −ln p` (nats), `p*` the threshold.

Invariant: weights carry no gradient, and an objective sees nothing but target tokens. Which examples are trained in an epoch is not decided
here (`curriculum`); the sliding window over a passage is in `window`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from memupdate.training.tokens import Objective, TargetTokens
from memupdate.training.window import SlidingWindow


def sft_loss(nll: Tensor, _: TargetTokens | None = None) -> Tensor:
    """Plain supervised fine-tuning: `L = (1/N) Σ nll_i`."""
    return nll.mean()


def memft_ot_loss(threshold: float) -> Objective:
    """MemFT with an optimal threshold: `L = Σ w_i nll_i / Σ w_i`, `w_i = 1` where `nll_i > −ln p*`, else 0.

    Tokens already over the threshold get no gradient; with none left under it the loss is 0 and the batch does nothing (the paper's
    `zero_bp`; `memft_ot_full_loss` is its other variant).

    Args:
        threshold: p*, a probability above 0 and below 1.
    """
    bound = -math.log(threshold)

    def loss(nll: Tensor, _: TargetTokens | None = None) -> Tensor:
        weights = (nll.detach() > bound).to(nll.dtype)
        return (weights * nll).sum() / weights.sum().clamp(min=1)

    return loss


def memft_ot_full_loss(threshold: float) -> Objective:
    """MemFT-OT that never rests: `L = Σ w_i nll_i / Σ w_i` while some `nll_i > −ln p*`, else `L = (1/N) Σ nll_i`.

    With no token left under the threshold it falls back to the full loss, as the paper's `only_threshold` does.

    Args:
        threshold: p*, a probability above 0 and below 1.
    """
    bound, under_threshold = -math.log(threshold), memft_ot_loss(threshold)

    def loss(nll: Tensor, tokens: TargetTokens) -> Tensor:
        # No branch on a tensor's value where one can do without: on a GPU it would wait for the whole forward pass.
        return torch.where((nll.detach() > bound).any(), under_threshold(nll, tokens), nll.mean())

    return loss


def make_objective(name: str, threshold: float) -> Objective:
    """The objective that a policy names, new for each run (a window has a memory). MemFT-SW as curriculum weighs tokens as MemFT-OT does.

    Raises:
        KeyError: there is no such objective.
    """
    makers: dict[str, Callable[[], Objective]] = {
        "sft": lambda: sft_loss,
        "memft-ot": lambda: memft_ot_loss(threshold),
        "memft-ot-full": lambda: memft_ot_full_loss(threshold),
        "memft-sw-curriculum": lambda: memft_ot_loss(threshold),
        "memft-sw-window": lambda: SlidingWindow(threshold),
    }
    return makers[name]()
