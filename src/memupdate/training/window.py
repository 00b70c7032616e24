"""MemFT-SW as a sliding window: in a long passage, gradient goes to the first token that greedy decoding gets wrong and to what follows it.

Invariant: the state of an example (where it is stuck, for how long) depends on its own steps only, whatever it is batched with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memupdate.training.tokens import TargetTokens

WINDOW = 50
"""Tokens from the anchor on."""
PATIENCE = 3
"""Steps at one anchor, after the first, from which the window grows."""
GROWTH = 0.5
"""Windows added at each further step at that anchor."""
LARGEST = 4.0
"""Windows, at most."""
DECAY = 20.0
"""τ, tokens: how fast weights fall behind the anchor."""
FLOOR = 0.01
"""Share of its weight that a token outside of the window keeps."""
SCALE = 10.0
"""k, per nat: how sharply weights rise around the threshold."""
_NOTHING = 1e-5
"""Summed weight up to which a batch counts as stored."""


@dataclass(frozen=True)
class _Stuck:
    """Where an example's first wrong token was in its last batch."""

    anchor: int
    """Its position; −1: there was none."""
    patience: int = 0
    growth: float = 1.0
    """The window's size in `WINDOW`s."""

    def next(self, anchor: int) -> _Stuck:
        if anchor < 0 or anchor != self.anchor:
            return _Stuck(anchor)
        patience = self.patience + 1
        return _Stuck(anchor, patience, min(self.growth + GROWTH, LARGEST) if patience >= PATIENCE else 1.0)


class SlidingWindow:
    """`L = Σ w_i nll_i / Σ w_i`, `w_i = σ(k (nll_i + ln p*)) · m_i`; token i is at place `j` of a target whose first wrong token is at `a`:

        m_i = exp(−max(j − a, 0) / τ)   where j − a < 50 g
        m_i = 0.01                      further behind
        m_i = 1                         where the example has no wrong token

    `g` is 1; when `a` has stayed the same over three more steps it grows by 0.5 a step, up to 4, and falls back to 1 when `a` moves. With
    nothing left to weigh (Σ w ≤ 1e-5) the loss is the mean. The weights carry no gradient.

    Deviation from the paper's code: it keeps `g` by a row's place in the batch, which is the example only where batches are of one passage.

    Args:
        threshold: p*, a probability above 0 and below 1.
    """

    def __init__(self, threshold: float) -> None:
        self.bound = -math.log(threshold)
        self._states: dict[int, _Stuck] = {}

    def __call__(self, nll: Tensor, tokens: TargetTokens) -> Tensor:
        """The loss of one batch, which counts as one step of each of its examples."""
        weights = torch.sigmoid(SCALE * (nll.detach() - self.bound)) * self._window(tokens)
        total = weights.sum()
        return torch.where(total > _NOTHING, (weights * nll).sum() / total.clamp(min=_NOTHING), nll.mean())

    def _window(self, tokens: TargetTokens) -> Tensor:
        """m, (N,) float32."""
        examples, row = torch.unique(tokens.example, return_inverse=True)
        none = int(tokens.length.max())
        wrong = torch.where(tokens.is_wrong, tokens.position, none)
        first = torch.full_like(examples, none).scatter_reduce(0, row, wrong, "amin")
        anchors = torch.where(first < none, first, -1)
        growth = torch.tensor(self._step(examples.tolist(), anchors.tolist()), device=row.device)
        behind = (tokens.position - anchors[row]).float()
        inside = behind < WINDOW * growth[row]
        mask = torch.where(inside, torch.exp(-behind.clamp(min=0) / DECAY), FLOOR)
        return torch.where(anchors[row] >= 0, mask, 1.0)

    def _step(self, examples: list[int], anchors: list[int]) -> list[float]:
        """Note where each example is stuck now; returns g of each."""
        for example, anchor in zip(examples, anchors, strict=True):
            self._states[example] = self._states.get(example, _Stuck(-1)).next(anchor)
        return [self._states[example].growth for example in examples]
