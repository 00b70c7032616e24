"""The memory in PEFT on the embedded model: growth changes nothing, slices add up, and what is written is what was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from memupdate.budget.plan import PlacementShape
from memupdate.facts.render import Example
from memupdate.layout import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from memupdate.models.base import BaseModel
from memupdate.models.scoring import pad_batch
from memupdate.serving.adapter_check import check_adapter, read_tensor_shapes
from memupdate.storage import file_sha256
from memupdate.training.loop import TrainingOutcome
from memupdate.training.memory import (
    Memory,
    apply_slice,
    attach,
    basis_rows,
    detach,
    empty_memory,
    grow,
    load_adapter,
    load_slice,
    lora_layers,
    make_slice,
    read_memory,
    save_adapter,
    save_slice,
)

SEED, SCALE = "0:test", 2.0
Batches = tuple[list[Example], list[Example]]


@torch.inference_mode()
def logits_of(model: nn.Module, examples: list[Example]) -> Tensor:
    """All logits of all examples, padding left out; (tokens, V)."""
    batch = pad_batch(examples, torch.device("cpu"))
    return model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[batch.mask.bool()]


def logits_with(base: BaseModel, memory: Memory, examples: list[Example]) -> Tensor:
    model = attach(base.model, memory)
    try:
        return logits_of(model, examples)
    finally:
        base.model = detach(model)


def same(one: Memory, other: Memory) -> bool:
    """Bit for bit."""
    return (
        one.rank == other.rank
        and one.a.keys() == other.a.keys() == one.b.keys() == other.b.keys()
        and all(torch.equal(one.a[n], other.a[n]) and torch.equal(one.b[n], other.b[n]) for n in one.a)
    )


def perturbed(memory: Memory, seed: int, *, basis: bool = False) -> Memory:
    """As if trained on: every number of `B` moved, and of `A` with `basis`."""
    generator = torch.Generator().manual_seed(seed)
    a = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in memory.a.items()} if basis else memory.a
    return replace(
        memory, a=a, b={n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in memory.b.items()}
    )


def test_growing_changes_nothing(atlas_base: BaseModel, filled: Memory, batches: Batches) -> None:
    examples = batches[0] + batches[1]
    plain, at_4 = logits_of(atlas_base.model, examples), logits_with(atlas_base, filled, examples)
    assert (at_4 - plain).abs().max() > 1  # the memory does something, or growth would show nothing
    at_8 = grow(filled, 8, seed=SEED, scale=SCALE)
    at_12 = grow(at_8, 12, seed=SEED, scale=SCALE)
    assert (at_8.rank, at_12.rank) == (8, 12)
    for grown in (at_8, at_12):
        assert torch.allclose(logits_with(atlas_base, grown, examples), at_4, atol=1e-5, rtol=0)
        assert all(not grown.b[n][:, 4:].any() and torch.equal(grown.b[n][:, :4], filled.b[n]) for n in grown.b)
        assert all(grown.a[n][4:].any(dim=1).all() for n in grown.a)


def test_an_empty_memory_of_any_rank_is_the_base_model(atlas_base: BaseModel, room: Memory, batches: Batches) -> None:
    plain = logits_of(atlas_base.model, batches[0])
    assert torch.allclose(logits_with(atlas_base, room, batches[0]), plain, atol=1e-5, rtol=0)


def test_growing_in_steps_or_at_once_is_the_same(shape: PlacementShape) -> None:
    empty = empty_memory(shape)
    steps = grow(grow(grow(empty, 4, seed=SEED, scale=SCALE), 8, seed=SEED, scale=SCALE), 12, seed=SEED, scale=SCALE)
    assert same(steps, grow(empty, 12, seed=SEED, scale=SCALE))
    assert steps.parameters == 12 * sum(d_in + d_out for _, d_in, d_out in shape.matrices)


def test_a_memory_does_not_shrink(filled: Memory) -> None:
    with pytest.raises(ValueError, match="cannot shrink"):
        grow(filled, 3, seed=SEED, scale=SCALE)


@given(st.text(max_size=12), st.sampled_from(["m.gate", "m.up"]), st.integers(0, 6), st.integers(0, 6))
@hypothesis_settings(max_examples=40)
def test_basis_rows_depend_on_seed_name_and_row_only(seed: str, name: str, first: int, more: int) -> None:
    last = first + more
    whole = basis_rows(name, 32, 0, last, seed=seed, scale=2.0)
    assert torch.equal(basis_rows(name, 32, first, last, seed=seed, scale=2.0), whole[first:])
    assert torch.equal(basis_rows(name, 32, 0, first, seed=seed, scale=2.0), whole[:first])


def test_basis_rows_differ_and_have_their_scale() -> None:
    rows = basis_rows("m", 4096, 0, 4, seed="s", scale=2.0)
    assert rows.std(dim=1).tolist() == pytest.approx([2.0 / 64] * 4, rel=0.05)
    assert len({tuple(row[:4].tolist()) for row in rows}) == 4
    assert not torch.equal(rows, basis_rows("m", 4096, 0, 4, seed="t", scale=2.0))
    assert not torch.equal(rows, basis_rows("n", 4096, 0, 4, seed="s", scale=2.0))


@pytest.mark.parametrize(("rank", "basis"), [(4, False), (8, False), (8, True)])
def test_slice_comes_back_from_disk_as_what_is_then_released(
    tmp_path: Path, filled: Memory, rank: int, basis: bool
) -> None:
    after = perturbed(grow(filled, rank, seed=SEED, scale=SCALE), 5, basis=basis)
    save_slice(tmp_path, make_slice(filled, after))
    applied = apply_slice(filled, load_slice(tmp_path))
    assert applied.rank == rank
    for name in after.a:
        assert torch.allclose(applied.b[name], after.b[name], atol=1e-7, rtol=0)  # adding ΔB rounds
        assert torch.allclose(applied.a[name], after.a[name], atol=1e-7, rtol=0)
        assert basis or torch.equal(applied.a[name], after.a[name])
    assert same(apply_slice(filled, load_slice(tmp_path)), applied)
    release = tmp_path / "release"
    release.mkdir()
    save_adapter(release, applied, base_model="atlas")
    assert same(load_adapter(release), applied)


def test_slice_on_an_empty_memory_is_the_memory(tmp_path: Path, shape: PlacementShape, filled: Memory) -> None:
    empty = empty_memory(shape)
    save_slice(tmp_path, make_slice(empty, filled))
    assert same(apply_slice(empty, load_slice(tmp_path)), filled)


def test_slice_says_nothing_of_an_untrained_basis(filled: Memory) -> None:
    after = perturbed(grow(filled, 6, seed=SEED, scale=SCALE), 5)
    tensors = make_slice(filled, after)
    assert not [name for name in tensors if name.endswith("delta_A")]
    assert {t.shape[0] for n, t in tensors.items() if n.endswith("added_A")} == {2}
    assert len([n for n in make_slice(filled, perturbed(filled, 5, basis=True)) if n.endswith("delta_A")]) == 12


def test_written_adapter_is_the_trained_model_in_plain_peft(
    tmp_path: Path, atlas_base: BaseModel, atlas_dir: Path, trained: TrainingOutcome, batches: Batches
) -> None:
    expected = logits_with(atlas_base, trained.memory, batches[0])
    save_adapter(tmp_path, trained.memory, base_model="atlas")
    fresh = AutoModelForCausalLM.from_pretrained(atlas_dir, dtype=torch.float32, local_files_only=True)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.allclose(logits_of(loaded, batches[0]), expected, atol=1e-5, rtol=0)
    merged = loaded.merge_and_unload()
    assert torch.allclose(logits_of(merged, batches[0]), expected, atol=1e-3, rtol=0)


def test_plain_peft_generates_the_trained_facts(
    tmp_path: Path, atlas_base: BaseModel, atlas_dir: Path, trained: TrainingOutcome, batches: Batches
) -> None:
    save_adapter(tmp_path, trained.memory, base_model="atlas")
    fresh = AutoModelForCausalLM.from_pretrained(atlas_dir, dtype=torch.float32, local_files_only=True)
    model = PeftModel.from_pretrained(fresh, tmp_path).eval()
    for example in batches[0]:
        ids = torch.tensor([example.prompt_ids])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=len(example.target_ids) + 8,
        )
        assert tuple(out[0, ids.shape[1] :].tolist()) == example.target_ids
        assert atlas_base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == example.answer


def test_adapter_is_an_ordinary_lora_that_the_engine_may_load(
    tmp_path: Path, atlas_dir: Path, trained: TrainingOutcome, shape: PlacementShape
) -> None:
    save_adapter(tmp_path, trained.memory, base_model="atlas")
    config = json.loads((tmp_path / ADAPTER_CONFIG_FILE).read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == trained.memory.rank
    assert config["target_modules"] == sorted(name for name, _, _ in shape.matrices)
    assert (config["task_type"], config["bias"], config["inference_mode"]) == ("CAUSAL_LM", "none", True)
    assert config["base_model_name_or_path"] == "atlas"
    info = check_adapter(
        tmp_path,
        expected_digest=file_sha256(tmp_path / ADAPTER_WEIGHTS_FILE),
        max_rank=trained.memory.rank,
        base_shapes=read_tensor_shapes(atlas_dir),
    )
    assert (info.rank, info.modules, info.dtypes) == (trained.memory.rank, 12, ("F32",))
    assert info.target_modules == ("down_proj", "gate_proj", "up_proj")


def test_attach_and_detach_leave_the_base_as_it_was(atlas_base: BaseModel, filled: Memory, batches: Batches) -> None:
    before = {name: tensor.clone() for name, tensor in atlas_base.model.state_dict().items()}
    plain = logits_of(atlas_base.model, batches[0])
    first = logits_with(atlas_base, filled, batches[0])
    for _ in range(2):
        assert torch.equal(logits_of(atlas_base.model, batches[0]), plain)
        assert torch.equal(logits_with(atlas_base, filled, batches[0]), first)
    after = atlas_base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(hasattr(module, "lora_A") for module in atlas_base.model.modules())
    assert not any(parameter.requires_grad for parameter in atlas_base.model.parameters())


@pytest.mark.filterwarnings("error")
def test_a_disabled_memory_is_the_base_model(atlas_base: BaseModel, filled: Memory, batches: Batches) -> None:
    new, old = batches
    before = logits_of(atlas_base.model, [*new, *old])
    model = attach(atlas_base.model, filled)
    try:
        with_memory = logits_of(model, [*new, *old])
        with model.disable_adapter():
            assert torch.equal(logits_of(model, [*new, *old]), before)
        assert not torch.equal(with_memory, before)
        assert torch.equal(logits_of(model, [*new, *old]), with_memory)
    finally:
        atlas_base.model = detach(model)


def test_attaching_again_warns_of_nothing(atlas_base: BaseModel, filled: Memory) -> None:
    for _ in range(2):
        atlas_base.model = detach(attach(atlas_base.model, filled))


@pytest.mark.parametrize("train_basis", [False, True])
def test_only_the_memory_asks_for_gradient(atlas_base: BaseModel, filled: Memory, train_basis: bool) -> None:
    model = attach(atlas_base.model, filled, train_basis=train_basis)
    try:
        asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        kinds = {"lora_A", "lora_B"} if train_basis else {"lora_B"}
        assert {kind for name in asking for kind in ("lora_A", "lora_B") if kind in name} == kinds
        assert all(".lora_" in name for name in asking)
        assert len(asking) == 12 * len(kinds)
        assert set(lora_layers(model)) == set(filled.a)
    finally:
        atlas_base.model = detach(model)


def test_memory_is_read_back_as_it_was_attached(atlas_base: BaseModel, filled: Memory) -> None:
    model = attach(atlas_base.model, filled)
    try:
        read = read_memory(model)
    finally:
        atlas_base.model = detach(model)
    assert same(read, filled)
