"""The objectives against their equations in numpy, and where they send no gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memupdate.policies.model import TrainingSection
from memupdate.training.losses import make_objective, memft_ot_full_loss, memft_ot_loss, sft_loss
from memupdate.training.tokens import TargetTokens, target_tokens

LOSSES = st.lists(st.floats(0, 20, width=32), min_size=1, max_size=40)
THRESHOLDS = st.floats(0.05, 0.95)


def one_target(count: int) -> TargetTokens:
    """Tokens of one example, all of them right."""
    nothing = torch.zeros(count, dtype=torch.long)
    return target_tokens([0], [count], epoch=1, greedy=nothing, targets=nothing)


def memft_ot_reference(nll: np.ndarray, p: float) -> float:
    """Σ w nll / Σ w with w = 1[nll > −ln p], and 0 where no token is left."""
    weights = (nll > -np.log(p)).astype(np.float64)
    return float((weights * nll).sum() / weights.sum()) if weights.any() else 0.0


def is_on_edge(values: Sequence[float], threshold: float) -> bool:
    """Whether float32 and float64 may disagree about which side of the threshold a token is on."""
    return bool(np.abs(np.array(values) + np.log(threshold)).min() < 1e-5)


@given(LOSSES)
def test_sft_is_the_mean(values: list[float]) -> None:
    assert float(sft_loss(torch.tensor(values))) == pytest.approx(float(np.mean(values)), rel=1e-5, abs=1e-6)


@given(LOSSES, THRESHOLDS)
@settings(max_examples=200)
def test_memft_ot_is_its_equation(values: list[float], threshold: float) -> None:
    if is_on_edge(values, threshold):
        return
    found = float(memft_ot_loss(threshold)(torch.tensor(values), one_target(len(values))))
    assert found == pytest.approx(memft_ot_reference(np.array(values), threshold), rel=1e-5, abs=1e-6)


@given(LOSSES, THRESHOLDS)
@settings(max_examples=200)
def test_the_full_variant_falls_back_to_the_mean(values: list[float], threshold: float) -> None:
    if is_on_edge(values, threshold):
        return
    nll = np.array(values)
    expected = memft_ot_reference(nll, threshold) if (nll > -np.log(threshold)).any() else float(nll.mean())
    found = float(memft_ot_full_loss(threshold)(torch.tensor(values), one_target(len(values))))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_where_all_is_stored_one_variant_rests_and_the_other_pushes() -> None:
    gradients = {}
    for name in ("memft-ot", "memft-ot-full"):
        nll = torch.tensor([0.1, 0.2], requires_grad=True)
        make_objective(name, 0.5)(nll, one_target(2)).backward()
        gradients[name] = nll.grad
    assert torch.equal(gradients["memft-ot"], torch.zeros(2))
    assert torch.equal(gradients["memft-ot-full"], torch.full((2,), 0.5))


@pytest.mark.parametrize("make", [memft_ot_loss, memft_ot_full_loss])
@given(values=LOSSES, threshold=THRESHOLDS)
def test_no_gradient_above_the_threshold_while_some_token_is_under_it(
    make: type, values: list[float], threshold: float
) -> None:
    nll = torch.tensor(values, requires_grad=True)
    make(threshold)(nll, one_target(len(values))).backward()
    assert nll.grad is not None
    under = nll.detach() > -math.log(threshold)
    if under.any():
        assert torch.equal(nll.grad != 0, under)
        assert torch.allclose(nll.grad[under], torch.full((int(under.sum()),), 1.0 / int(under.sum())))


def test_sft_pushes_every_token() -> None:
    nll = torch.tensor([0.001, 3.0, 0.0], requires_grad=True)
    sft_loss(nll).backward()
    assert nll.grad is not None
    assert torch.allclose(nll.grad, torch.full((3,), 1 / 3))


def test_gradient_reaches_logits_of_weak_tokens_only() -> None:
    logits = torch.tensor([[6.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([0, 0])
    memft_ot_loss(0.5)(torch.nn.functional.cross_entropy(logits, targets, reduction="none"), one_target(2)).backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert torch.allclose(logits.grad[1], torch.tensor([-2 / 3, 1 / 3, 1 / 3]))


def test_tokens_know_whose_they_are_and_where() -> None:
    greedy = torch.tensor([1, 0, 1, 1, 0])
    tokens = target_tokens([7, 3], [2, 3], epoch=4, greedy=greedy, targets=torch.tensor([1, 1, 1, 0, 0]))
    assert tokens.example.tolist() == [7, 7, 3, 3, 3]
    assert tokens.position.tolist() == [0, 1, 0, 1, 2]
    assert tokens.length.tolist() == [2, 2, 3, 3, 3]
    assert tokens.is_wrong.tolist() == [False, True, False, True, False]
    assert tokens.epoch == 4


def test_every_objective_of_the_policy_has_its_equation_and_no_other_name_has() -> None:
    nll = torch.tensor([0.1, 2.0])
    names = TrainingSection.model_fields["objective"].annotation.__args__
    found = {name: float(make_objective(name, 0.5)(nll, one_target(2))) for name in names}
    window = [1 / (1 + math.exp(-10 * (value - math.log(2)))) for value in (0.1, 2.0)]
    assert found == pytest.approx(
        {
            "sft": 1.05,
            "memft-ot": 2.0,
            "memft-ot-full": 2.0,
            "memft-sw-curriculum": 2.0,
            "memft-sw-window": (window[0] * 0.1 + window[1] * 2.0) / sum(window),
        },
        rel=1e-5,
    )
    with pytest.raises(KeyError):
        make_objective("other", 0.5)
