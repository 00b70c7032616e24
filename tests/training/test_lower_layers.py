"""A pass from the lowest adapted matrix on equals the model's own forward, its gradient included; what lies below is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from memupdate.budget.placement import resolve_placement
from memupdate.budget.plan import PlacementShape
from memupdate.facts.render import Example
from memupdate.models.base import BaseModel
from memupdate.training import passes as passes_module
from memupdate.training.anchors import Anchors, guard_kl
from memupdate.training.decoder import Cut, Rows, lowest_adapted, take_apart
from memupdate.training.lower_layers import CacheBounds, LowerLayers
from memupdate.training.memory import attach, detach, empty_memory, grow
from memupdate.training.passes import Asked, UpperLayers, WholeModel, ask_all, ask_targets, make_passes

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama3 rope": LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2 windows": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=12, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral window": MistralConfig(**SMALL, sliding_window=5),
    "eager": LlamaConfig(**SMALL, attn_implementation="eager"),
}  # fmt: skip
PLACEMENTS = ("mlp-all", "mlp-one", "mlp-last", "all-linear", "upper-linear")


def placement(name: str, config: Any) -> PlacementShape:
    shape = resolve_placement("all-linear" if name == "upper-linear" else name, config)
    if name != "upper-linear":
        return shape
    return replace(shape, matrices=tuple(m for m in shape.matrices if not m[0].startswith("model.layers.0.")))


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> BaseModel:
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from a model that says the same everywhere
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval().requires_grad_(False)
    return BaseModel(model, None, CPU)  # type: ignore[arg-type]


def with_memory(base: BaseModel, name: str) -> tuple[Any, list[str]]:
    """The model with a loud memory of rank 3, `A` trained too."""
    shape = placement(name, base.model.config.to_dict())
    memory = grow(empty_memory(shape), 3, seed="0:lower", scale=2.0)
    generator = torch.Generator().manual_seed(5)
    memory = replace(memory, b={n: 0.2 * torch.randn(b.shape, generator=generator) for n, b in memory.b.items()})
    return attach(base.model, memory, train_basis=True), list(memory.a)


def asked(seed: int = 0, vocabulary: int = 97) -> Asked:
    """Five sequences of different lengths, and of each some last positions."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (9, 14, 3, 14, 6)
    ids = tuple(tuple(torch.randint(1, vocabulary, (n,), generator=generator).tolist()) for n in lengths)
    return Asked(Rows(ids), (4, 11, 0, 2, 5))


def gradients(model: nn.Module, logits: Tensor) -> list[Tensor]:
    """Of a loss that weighs every logit differently."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad((weights * logits.log_softmax(-1)).sum(), parameters))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_logits_and_gradients_are_the_models_own(model: BaseModel, name: str) -> None:
    peft_model, adapted = with_memory(model, name)
    try:
        passes = make_passes(model, peft_model, adapted, CacheBounds())
        assert isinstance(passes, UpperLayers)
        one = asked()
        passes.prepare([one])
        whole = WholeModel(peft_model, CPU).logits(one)
        largest = float(whole.detach().abs().max())
        upper = passes.logits(one)
        assert upper.shape == (one.positions, 97) == (24, 97)
        assert whole.std() > 1
        assert torch.allclose(upper, whole, atol=1e-5 * largest, rtol=0)
        expected = gradients(peft_model, whole)
        for recompute in (False, True):
            passes.recompute = recompute
            for ours, theirs in zip(gradients(peft_model, passes.logits(one)), expected, strict=True):
                assert torch.allclose(ours, theirs, atol=2e-5 * float(theirs.abs().max()), rtol=0)
    finally:
        model.model = detach(peft_model)


def test_the_embedded_model_to_1e5(
    atlas_base: BaseModel, shape: PlacementShape, batches: tuple[list[Example], list[Example]], anchors: Anchors
) -> None:
    memory = grow(empty_memory(shape), 4, seed="0:test", scale=2.0)
    generator = torch.Generator().manual_seed(3)
    memory = replace(memory, b={n: 0.05 * torch.randn(b.shape, generator=generator) for n, b in memory.b.items()})
    peft_model = attach(atlas_base.model, memory)
    try:
        passes, whole = make_passes(atlas_base, peft_model, memory.a, CacheBounds()), WholeModel(peft_model, CPU)
        assert isinstance(passes, UpperLayers)
        assert passes.lower.cut == Cut(0, after_attention=True)
        for one in (ask_targets(batches[0]), ask_all(anchors.ids[:5])):
            passes.prepare([one])
            with torch.no_grad():
                assert torch.allclose(passes.logits(one), whole.logits(one), atol=1e-5, rtol=1e-5)
    finally:
        atlas_base.model = detach(peft_model)
        atlas_base.lower_layers.clear()


def test_a_loss_in_parts_is_the_loss_at_once(
    atlas_base: BaseModel, shape: PlacementShape, anchors: Anchors, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = grow(empty_memory(shape), 2, seed="0:test", scale=2.0)
    peft_model = attach(atlas_base.model, memory)
    try:
        passes, part = make_passes(atlas_base, peft_model, memory.a, CacheBounds()), anchors.select(slice(0, 3))
        with torch.no_grad():
            for layer in peft_model.modules():
                if hasattr(layer, "lora_B"):
                    layer.lora_B["default"].weight.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
        parameters = [p for p in peft_model.parameters() if p.requires_grad]
        at_once = guard_kl(passes, part)
        expected = torch.autograd.grad(2 * at_once, parameters)
        monkeypatch.setattr(passes_module, "LOGIT_BYTES", 40 * 4 * atlas_base.model.config.vocab_size)  # 93 positions
        in_parts = guard_kl(passes, part)
        assert float(in_parts.detach()) == pytest.approx(float(at_once.detach()), rel=1e-5)
        assert float(at_once.detach()) > 0.01
        for ours, theirs in zip(torch.autograd.grad(2 * in_parts, parameters), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
        with torch.inference_mode():
            assert float(guard_kl(passes, part)) == pytest.approx(float(at_once.detach()), rel=1e-5)
    finally:
        atlas_base.model = detach(peft_model)
        atlas_base.lower_layers.clear()


@pytest.fixture
def lower(model: BaseModel) -> LowerLayers:
    decoder = take_apart(model.model)
    assert decoder is not None
    return LowerLayers(decoder, Cut(2, after_attention=True), CacheBounds())


def test_lower_layers_run_once_for_each_sequence(lower: LowerLayers) -> None:
    first, second = asked(0), asked(1)
    lower.prepare(first.rows.ids + first.rows.ids)
    assert lower.computed_tokens == first.rows.tokens == 46
    kept = lower.states(first.rows)
    lower.prepare(first.rows.ids + second.rows.ids)
    assert lower.computed_tokens == 92
    assert torch.equal(lower.states(first.rows), kept)
    reordered = Rows(first.rows.ids[::-1])
    starts = [0, 9, 23, 26, 40, 46]
    expected = torch.cat([kept[a:b] for a, b in pairwise(starts)][::-1])
    assert torch.equal(lower.states(reordered), expected)
    assert lower.computed_tokens == 92
    assert not kept.requires_grad


@pytest.mark.parametrize("memory_bytes", [0, 46 * 32 * 4])
def test_what_memory_does_not_hold_is_in_a_file(lower: LowerLayers, tmp_path: Path, memory_bytes: int) -> None:
    """46 tokens a set; each set is one block."""
    first, second = asked(0), asked(1)
    lower.bounds = CacheBounds(memory_bytes=0)
    exact = [lower.states(one.rows) for one in (first, second)]
    lower.bounds = CacheBounds(memory_bytes, file_bytes=2 * 46 * 32 * 4, folder=tmp_path)
    lower.computed_tokens = 0
    lower.prepare(first.rows.ids)
    lower.prepare(second.rows.ids)
    assert lower.kept_bytes == 2 * 46 * 32 * 4
    for one, expected in zip((first, second), exact, strict=True):
        assert torch.allclose(lower.states(one.rows), expected, atol=1e-5)
    assert lower.computed_tokens == 92
    assert list(tmp_path.iterdir()) == []  # mapped, and without a name already


def test_what_fits_nowhere_is_computed_each_time(lower: LowerLayers) -> None:
    one = asked()
    lower.bounds = CacheBounds(memory_bytes=100)
    expected = lower.states(one.rows)
    lower.prepare(one.rows.ids)
    assert lower.kept_bytes == 0
    assert torch.equal(lower.states(one.rows), expected)
    assert torch.equal(lower.states(one.rows), expected)


def test_what_was_not_prepared_is_kept_when_it_is_first_asked_for(lower: LowerLayers) -> None:
    one = asked()
    first = lower.states(one.rows)
    assert torch.equal(lower.states(one.rows), first)
    assert lower.computed_tokens == one.rows.tokens
    assert lower.kept_bytes == 46 * 32 * 4


def test_what_was_first_seen_without_gradient_can_be_trained_on(model: BaseModel) -> None:
    peft_model, adapted = with_memory(model, "mlp-one")
    try:
        model.lower_layers.clear()
        passes, one = make_passes(model, peft_model, adapted, CacheBounds()), asked(7)
        with torch.inference_mode():
            passes.logits(one)
        assert all(g.any() for g in gradients(peft_model, passes.logits(one)))
    finally:
        model.model = detach(peft_model)


def test_what_an_earlier_run_kept_makes_room(lower: LowerLayers) -> None:
    lower.bounds = CacheBounds(memory_bytes=46 * 32 * 4)
    for seed in (0, 1):
        lower.prepare(asked(seed).rows.ids)
        before = lower.computed_tokens
        lower.states(asked(seed).rows)
        assert lower.computed_tokens == before
        assert lower.kept_bytes == 46 * 32 * 4
    assert sequences(lower) == set(asked(1).rows.ids)


def sequences(lower: LowerLayers) -> set[Sequence[int]]:
    return set(lower._places)


@pytest.mark.parametrize(
    ("names", "cut"),
    [
        (["model.layers.3.mlp.up_proj", "model.layers.1.mlp.down_proj"], Cut(1, True)),
        (["model.layers.10.mlp.up_proj", "model.layers.9.self_attn.q_proj"], Cut(9)),
        (["model.layers.2.mlp.up_proj", "model.layers.2.self_attn.o_proj"], Cut(2)),
        (["model.layers.0.self_attn.q_proj"], Cut(0)),
        (["model.layers.0.mlp.up_proj", "lm_head"], None),
        (["transformer.h.0.mlp.c_fc"], None),
        ([], None),
    ],
)
def test_the_cut_is_under_the_lowest_adapted_matrix(names: list[str], cut: Cut | None) -> None:
    assert lowest_adapted(names) == cut


def test_models_that_cannot_be_taken_apart_run_whole(model: BaseModel) -> None:
    torch.manual_seed(0)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)).eval()
    base = BaseModel(gpt2, None, CPU)  # type: ignore[arg-type]
    assert take_apart(gpt2) is None
    passes = make_passes(base, gpt2, ["transformer.h.0.mlp.c_fc"], CacheBounds())
    assert isinstance(passes, WholeModel)
    one = asked(vocabulary=50)
    expected = [
        gpt2(input_ids=torch.tensor([ids])).logits[0, first:]
        for ids, first in zip(one.rows.ids, one.first, strict=True)
    ]
    assert torch.allclose(passes.logits(one), torch.cat(expected), atol=1e-5)
    assert isinstance(make_passes(model, model.model, ["lm_head"], CacheBounds()), WholeModel)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_batch_are_not_taken_apart(rope: str) -> None:
    config = LlamaConfig(**SMALL)
    model = AutoModelForCausalLM.from_config(config)
    assert take_apart(model) is not None
    model.config.rope_parameters = {"rope_type": rope, "rope_theta": 10000.0}
    assert take_apart(model) is None
