"""Harm measured on anchors: 0 for the base model itself, the full KL where K = V, a lower bound of it otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from memupdate.models.base import BaseModel
from memupdate.progress import ProgressEvent, no_progress
from memupdate.training import anchors as anchors_module
from memupdate.training.anchors import TOP_K, AnchorKL, Anchors, load_or_sample, measure_kl, sample_anchors
from memupdate.training.memory import Memory, attach, detach

CPU = torch.device("cpu")


def sample(base: BaseModel, *, count: int = 6, seed: int = 0) -> Anchors:
    return sample_anchors(base, [[0], [0, 3]], count=count, tokens=24, seed=seed, progress=no_progress)


@torch.inference_mode()
def log_softmax64(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)


def full_kl(base: BaseModel, memory: Memory, ids: torch.Tensor) -> float:
    """Mean over positions of Σ_v p ln(p/q), over the whole vocabulary, in float64."""
    p = log_softmax64(base.model, ids)
    model = attach(base.model, memory)
    try:
        q = log_softmax64(model, ids)
    finally:
        base.model = detach(model)
    return float((p.exp() * (p - q)).sum(-1).mean())


def kl_with(base: BaseModel, memory: Memory, anchors: Anchors) -> float:
    model = attach(base.model, memory)
    try:
        return measure_kl(model, anchors, CPU)
    finally:
        base.model = detach(model)


@pytest.fixture(scope="module")
def loud(filled: Memory) -> Memory:
    """A memory that harms plainly."""
    return Memory(filled.rank, filled.a, {n: 4 * b for n, b in filled.b.items()})


def test_the_base_model_does_itself_no_harm(atlas_base: BaseModel, anchors: Anchors, room: Memory) -> None:
    assert measure_kl(atlas_base.model, anchors, CPU) == pytest.approx(0, abs=1e-6)
    assert kl_with(atlas_base, room, anchors) == pytest.approx(0, abs=1e-6)


def test_top_k_is_a_lower_bound_of_the_full_kl(atlas_base: BaseModel, anchors: Anchors, loud: Memory) -> None:
    lumped, full = kl_with(atlas_base, loud, anchors), full_kl(atlas_base, loud, anchors.ids)
    assert 0.01 < lumped <= full + 1e-6
    assert lumped > 0.5 * full  # and not a useless one


def test_with_the_whole_vocabulary_it_is_the_full_kl(
    atlas_base: BaseModel, loud: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchors_module, "TOP_K", 1_000_000)
    anchors = sample(atlas_base)
    assert anchors.top_ids.shape == (6, 23, atlas_base.model.config.vocab_size)
    assert kl_with(atlas_base, loud, anchors) == pytest.approx(
        full_kl(atlas_base, loud, anchors.ids), rel=1e-4, abs=1e-5
    )


def test_the_rest_is_one_event_beside_the_top_k(
    atlas_base: BaseModel, loud: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL of K+1 outcomes: the K likeliest tokens and all others together, in float64; K = 2 leaves the rest its weight."""
    monkeypatch.setattr(anchors_module, "TOP_K", 2)
    anchors = sample(atlas_base)
    p = log_softmax64(atlas_base.model, anchors.ids).exp()
    model = attach(atlas_base.model, loud)
    try:
        q = log_softmax64(model, anchors.ids).exp()
    finally:
        atlas_base.model = detach(model)
    top = anchors.top_ids.long()
    lumped = [torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (p, q)]
    expected = float((lumped[0] * (lumped[0] / lumped[1]).log()).sum(-1).mean())
    assert kl_with(atlas_base, loud, anchors) == pytest.approx(expected, rel=1e-3)


def test_a_larger_change_does_more_harm(atlas_base: BaseModel, anchors: Anchors, filled: Memory) -> None:
    some = anchors.select(slice(0, 16))
    harms = []
    for size in (0.1, 0.3, 1.0):
        memory = Memory(filled.rank, filled.a, {n: size * b for n, b in filled.b.items()})
        harms.append(kl_with(atlas_base, memory, some))
    assert 0 < harms[0] < harms[1] < harms[2]


def test_harm_is_the_mean_over_sequences(atlas_base: BaseModel, anchors: Anchors, filled: Memory) -> None:
    parts = [kl_with(atlas_base, filled, anchors.select(slice(i, i + 1))) for i in range(3)]
    assert kl_with(atlas_base, filled, anchors.select(slice(0, 3))) == pytest.approx(sum(parts) / 3, rel=1e-4)
    # More sequences than one forward pass takes.
    halves = [kl_with(atlas_base, filled, anchors.select(slice(s, s + 48))) for s in (0, 48)]
    assert kl_with(atlas_base, filled, anchors) == pytest.approx(sum(halves) / 2, rel=1e-4)


def test_sampling_repeats_for_a_seed(atlas_base: BaseModel) -> None:
    one, again, other = (sample(atlas_base, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.ids, again.ids)
    assert torch.equal(one.top_ids, again.top_ids)
    assert torch.equal(one.top_logprobs, again.top_logprobs)
    texts = [{tuple(row.tolist()) for row in anchors.ids} for anchors in (one, other)]
    assert not texts[0] & texts[1]  # other text, not the same in another order


def test_every_prefix_has_its_share(atlas_base: BaseModel) -> None:
    anchors = sample_anchors(atlas_base, [[0], [0, 3], [0, 3, 460]], count=8, tokens=12, seed=0, progress=no_progress)
    assert anchors.ids.shape == (8, 12)
    assert anchors.top_ids.shape == anchors.top_logprobs.shape == (8, 11, TOP_K)
    beginnings = [tuple(row[:3].tolist()) for row in anchors.ids]
    assert all(b[0] == 0 for b in beginnings)
    assert sum(b == (0, 3, 460) for b in beginnings) >= 2
    assert sum(b[1] == 3 for b in beginnings) >= 5
    assert len({tuple(row.tolist()) for row in anchors.ids}) > 4  # sampled, not the likeliest text again and again


def test_kept_probabilities_are_the_base_models_highest(atlas_base: BaseModel) -> None:
    anchors = sample(atlas_base)
    logprobs = log_softmax64(atlas_base.model, anchors.ids)
    expected = logprobs.sort(-1, descending=True).values[..., :TOP_K]
    assert torch.allclose(anchors.top_logprobs.double(), expected, atol=1e-4)
    assert torch.allclose(logprobs.gather(-1, anchors.top_ids.long()), expected, atol=1e-4)


def test_anchors_are_sampled_once_and_then_read(atlas_base: BaseModel, tmp_path: Path) -> None:
    folder, events = tmp_path / "cache" / "anchors", []

    def load(seed: int) -> Anchors:
        return load_or_sample(
            folder, atlas_base, [[0]], count=4, tokens=16, seed=seed, progress=lambda e: events.append(e)
        )

    first = load(0)
    assert [type(e) for e in events] == [ProgressEvent]
    (file,) = folder.iterdir()
    written = file.stat().st_mtime_ns
    second = load(1)  # the caller names another folder for another seed; this one holds what it holds
    assert len(events) == 1
    assert file.stat().st_mtime_ns == written
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.top_logprobs, second.top_logprobs)
    assert measure_kl(atlas_base.model, second, CPU) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rest", [0.3, 1e-9])
def test_gradient_of_the_kl_is_the_derivative(rest: float) -> None:
    """In float64 against differences, with a rest that counts and with one that is held at its least."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    top_ids = torch.stack([torch.randperm(7, generator=generator)[:4] for _ in range(3)])
    logits = logits.scatter_add(-1, top_ids, torch.full((3, 4), 0.0 if rest > 1e-3 else 25.0, dtype=torch.float64))
    base = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    top_logprobs = (base / base.sum(-1, keepdim=True) * (1 - rest)).log()
    logits.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: 3 * AnchorKL.apply(x, top_ids, top_logprobs), logits)
    assert float(AnchorKL.apply(logits.detach(), top_ids, top_logprobs)) > 0.1
