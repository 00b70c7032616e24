"""The objectives against their equations in numpy, and where they send no gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memupdate.training.losses import make_objective, memft_ot_loss, sft_loss

LOSSES = st.lists(st.floats(0, 20, width=32), min_size=1, max_size=40)


def memft_ot_reference(nll: np.ndarray, p: float) -> float:
    """Σ w nll / Σ w with w = 1[nll > −ln p], and 0 where no token is left."""
    weights = (nll > -np.log(p)).astype(np.float64)
    return float((weights * nll).sum() / weights.sum()) if weights.any() else 0.0


@given(LOSSES)
def test_sft_is_the_mean(values: list[float]) -> None:
    assert float(sft_loss(torch.tensor(values))) == pytest.approx(float(np.mean(values)), rel=1e-5, abs=1e-6)


@given(LOSSES, st.floats(0.05, 0.95))
@settings(max_examples=200)
def test_memft_ot_is_its_equation(values: list[float], threshold: float) -> None:
    nll = np.array(values)
    if np.abs(nll + np.log(threshold)).min() < 1e-5:  # on the edge float32 and float64 may disagree
        return
    found = float(memft_ot_loss(threshold)(torch.tensor(values)))
    assert found == pytest.approx(memft_ot_reference(nll, threshold), rel=1e-5, abs=1e-6)


@given(LOSSES, st.floats(0.05, 0.95))
def test_no_gradient_above_the_threshold(values: list[float], threshold: float) -> None:
    nll = torch.tensor(values, requires_grad=True)
    memft_ot_loss(threshold)(nll).backward()
    assert nll.grad is not None
    under = nll.detach() > -math.log(threshold)
    assert torch.equal(nll.grad != 0, under)
    if under.any():
        assert torch.allclose(nll.grad[under], torch.full((int(under.sum()),), 1.0 / int(under.sum())))


def test_sft_pushes_every_token() -> None:
    nll = torch.tensor([0.001, 3.0, 0.0], requires_grad=True)
    sft_loss(nll).backward()
    assert nll.grad is not None
    assert torch.allclose(nll.grad, torch.full((3,), 1 / 3))


def test_gradient_reaches_logits_of_weak_tokens_only() -> None:
    logits = torch.tensor([[6.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([0, 0])
    memft_ot_loss(0.5)(torch.nn.functional.cross_entropy(logits, targets, reduction="none")).backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert torch.allclose(logits.grad[1], torch.tensor([-2 / 3, 1 / 3, 1 / 3]))


def test_objectives_by_name() -> None:
    nll = torch.tensor([0.1, 2.0])
    assert float(make_objective("sft", 0.5)(nll)) == pytest.approx(1.05)
    assert float(make_objective("memft-ot", 0.5)(nll)) == pytest.approx(2.0)
    with pytest.raises(KeyError):
        make_objective("other", 0.5)
