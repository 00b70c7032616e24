"""The sliding window against its equations, token by token in plain Python, and its memory of where an example is stuck."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memupdate.training.tokens import TargetTokens, target_tokens
from memupdate.training.window import SlidingWindow

Passage = tuple[list[float], list[bool]]
PASSAGES = st.lists(
    st.lists(st.tuples(st.floats(0, 12, width=32), st.booleans()), min_size=1, max_size=260), min_size=1, max_size=3
)


def batch(passages: Sequence[Passage], examples: Sequence[int]) -> tuple[torch.Tensor, TargetTokens]:
    """Losses and tokens of passages, each with its losses and which of its tokens greedy decoding gets wrong."""
    wrong = torch.tensor([w for _, ws in passages for w in ws])
    targets = torch.zeros(len(wrong), dtype=torch.long)
    nll = torch.tensor([v for values, _ in passages for v in values], requires_grad=True)
    lengths = [len(values) for values, _ in passages]
    return nll, target_tokens(examples, lengths, epoch=1, greedy=wrong.long(), targets=targets)


def reference(passages: Sequence[Passage], threshold: float, growth: Sequence[float]) -> float:
    weighed = total = 0.0
    for (values, wrong), g in zip(passages, growth, strict=True):
        anchor = wrong.index(True) if True in wrong else None
        for j, value in enumerate(values):
            weight = 1 / (1 + math.exp(-10 * (value + math.log(threshold))))
            if anchor is not None:
                weight *= math.exp(-max(j - anchor, 0) / 20) if j - anchor < 50 * g else 0.01
            weighed, total = weighed + weight * value, total + weight
    everything = [value for values, _ in passages for value in values]
    return weighed / total if total > 1e-5 else sum(everything) / len(everything)


@given(PASSAGES, st.floats(0.3, 0.9))
@settings(max_examples=60)
def test_the_first_step_is_its_equation(rows: list[list[tuple[float, bool]]], threshold: float) -> None:
    passages = [([v for v, _ in row], [w for _, w in row]) for row in rows]
    nll, tokens = batch(passages, range(len(passages)))
    found = float(SlidingWindow(threshold)(nll.detach(), tokens))
    assert found == pytest.approx(reference(passages, threshold, [1.0] * len(passages)), rel=1e-3, abs=1e-4)


def test_the_window_grows_while_stuck_and_falls_back_when_the_anchor_moves() -> None:
    """Weights tell the window's end: with equal losses a token inside keeps exp(−d/20), one outside a hundredth."""
    window, ends = SlidingWindow(0.5), []
    anchors = [10] * 12 + [11, 11]
    for anchor in anchors:
        passage = ([3.0] * 300, [j == anchor for j in range(300)])
        nll, tokens = batch([passage], [5])
        window(nll, tokens).backward()
        assert nll.grad is not None
        share = nll.grad / nll.grad[anchor]
        inside = [j for j in range(anchor, 300) if share[j] == pytest.approx(math.exp(-(j - anchor) / 20), rel=1e-4)]
        ends.append(inside[-1] + 1 - anchor)
        assert share[:anchor] == pytest.approx([1.0] * anchor), (
            "what is before the anchor is not lost while training it"
        )
        assert share[300 - 1] == pytest.approx(0.01)
    assert ends == [50, 50, 50, 75, 100, 125, 150, 175, 200, 200, 200, 200, 50, 50]


def test_what_an_example_is_batched_with_does_not_move_its_window() -> None:
    stuck = ([3.0] * 120, [j == 4 for j in range(120)])
    other = ([3.0] * 90, [j == 80 for j in range(90)])
    alone, together = SlidingWindow(0.5), SlidingWindow(0.5)
    for step in range(6):
        nll, tokens = batch([stuck], [2])
        alone(nll, tokens).backward()
        mixed, mixed_tokens = batch([other, stuck], [step + 10, 2])
        together(mixed, mixed_tokens).backward()
        assert nll.grad is not None
        assert mixed.grad is not None
        own = mixed.grad[90:]
        assert torch.allclose(nll.grad / nll.grad[4], own / own[4], rtol=1e-4)


def test_with_nothing_left_to_weigh_the_loss_is_the_mean() -> None:
    passage = ([0.0] * 3, [False] * 3)
    nll, tokens = batch([passage], [0])
    loss = SlidingWindow(1e-3)(nll, tokens)
    loss.backward()
    assert nll.grad is not None
    assert torch.allclose(nll.grad, torch.full((3,), 1 / 3))
