"""Scores against the whole model run naively: no padding, one example at a time, every logit computed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from memupdate.budget.placement import resolve_placement
from memupdate.facts.model import Fact
from memupdate.facts.render import Example, Renderer
from memupdate.models.base import BaseModel
from memupdate.models.folder import resolve_model
from memupdate.models.scoring import (
    PassBounds,
    TargetScore,
    length_batches,
    logits_at,
    mean_loss_nats,
    pad_batch,
    score_examples,
)
from memupdate.training.memory import Memory, attach, detach, empty_memory, grow

CPU = torch.device("cpu")


def example(prompt: list[int], target: list[int]) -> Example:
    return Example("sha256:0", "completion", "", "", tuple(prompt), tuple(target))


def random_examples(count: int, vocabulary: int, seed: int) -> list[Example]:
    rng = random.Random(seed)
    return [
        example(
            rng.choices(range(vocabulary), k=rng.randint(1, 12)), rng.choices(range(vocabulary), k=rng.randint(1, 5))
        )
        for _ in range(count)
    ]


@torch.inference_mode()
def naive_score(model: nn.Module, one: Example) -> TargetScore:
    """From the definition: ln p of each target token after all tokens before it."""
    logprobs, greedy = [], []
    sequence = list(one.prompt_ids)
    for token in one.target_ids:
        last = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1].double()
        logprobs.append(float(last.log_softmax(-1)[token]))
        greedy.append(int(last.argmax()))
        sequence.append(token)
    return TargetScore(tuple(logprobs), tuple(greedy))


@pytest.fixture
def adapted(atlas_base: BaseModel) -> Iterator[nn.Module]:
    """The embedded model with a memory that changes every logit."""
    shape = resolve_placement("all-linear", resolve_model("atlas").config)
    memory = grow(empty_memory(shape), 2, seed="s", scale=2.0)
    generator = torch.Generator().manual_seed(0)
    b = {n: 0.05 * torch.randn(t.shape, generator=generator) for n, t in memory.b.items()}
    model = attach(atlas_base.model, Memory(memory.rank, memory.a, b))
    yield model
    atlas_base.model = detach(model)


def assert_scores_are_naive(model: nn.Module, examples: list[Example]) -> None:
    for found, one in zip(score_examples(model, examples, CPU), examples, strict=True):
        expected = naive_score(model, one)
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert found.greedy_ids == expected.greedy_ids


def test_scores_of_facts_are_the_naive_ones(
    atlas_base: BaseModel, atlas_renderer: Renderer, news: list[Fact], known: list[Fact]
) -> None:
    examples = atlas_renderer.render_all(news[:8] + known[:8])
    examples += Renderer(atlas_base.tokenizer, rendering="completion").render_all(news[:4])
    assert len({e.length for e in examples}) > 3  # so that there is padding
    assert_scores_are_naive(atlas_base.model, examples)


def test_order_and_batching_change_nothing(atlas_base: BaseModel, atlas_renderer: Renderer, news: list[Fact]) -> None:
    examples = atlas_renderer.render_all(news[:10])
    whole = score_examples(atlas_base.model, examples, CPU)
    for bounds in (PassBounds(1, 1), PassBounds(40, 100), PassBounds(1000, 7)):
        for one, other in zip(score_examples(atlas_base.model, examples, CPU, bounds=bounds), whole, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert one.greedy_ids == other.greedy_ids
    assert [s.greedy_ids for s in score_examples(atlas_base.model, examples[::-1], CPU)] == [
        s.greedy_ids for s in reversed(whole)
    ]
    assert score_examples(atlas_base.model, [], CPU) == []


def test_scores_see_the_memory(adapted: nn.Module, atlas_renderer: Renderer, news: list[Fact]) -> None:
    examples = atlas_renderer.render_all(news[:6])
    assert_scores_are_naive(adapted, examples)
    seen = [s.loss_nats for s in score_examples(adapted, examples, CPU)]
    with adapted.disable_adapter():
        plain = [s.loss_nats for s in score_examples(adapted, examples, CPU)]
    assert all(abs(a - b) > 1e-3 for a, b in zip(seen, plain, strict=True))


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY, tie_word_embeddings=False),
        Qwen3Config(**TINY, head_dim=16),
        Gemma2Config(**TINY, head_dim=16, final_logit_softcapping=2.0),
        GraniteConfig(**TINY, logits_scaling=4.0),
        CohereConfig(**TINY, logit_scale=0.25, pad_token_id=0),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_at_are_the_full_models(config: PretrainedConfig) -> None:
    """Those that cap or scale logits after the head too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    examples = random_examples(7, 64, seed=1)
    batch = pad_batch(examples, CPU)
    with torch.inference_mode():
        found = logits_at(model, batch.ids, batch.mask, batch.rows, batch.positions)
        whole = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    assert found.shape == (sum(len(e.target_ids) for e in examples), 64)
    assert found.dtype == torch.float32
    assert torch.allclose(found, whole[batch.rows, batch.positions], atol=1e-6)
    assert_scores_are_naive(model, examples)


def test_logits_at_under_peft_are_the_full_models(adapted: nn.Module) -> None:
    batch = pad_batch(random_examples(5, 1536, seed=2), CPU)
    with torch.inference_mode():
        found = logits_at(adapted, batch.ids, batch.mask, batch.rows, batch.positions)
        whole = adapted(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    assert torch.allclose(found, whole[batch.rows, batch.positions], atol=1e-5)


LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 10)), max_size=40)


@given(LENGTHS, st.builds(PassBounds, st.integers(1, 300), st.integers(1, 60)))
def test_length_batches_cover_every_index_once_within_the_bounds(
    lengths: list[tuple[int, int]], bounds: PassBounds
) -> None:
    examples = [example([0] * p, [0] * t) for p, t in lengths]
    batches = list(length_batches(examples, bounds))
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(examples[i].length for i in batch) <= bounds.tokens
        assert len(batch) == 1 or sum(len(examples[i].target_ids) for i in batch) <= bounds.targets


@given(LENGTHS.filter(bool), st.randoms(use_true_random=False))
@hypothesis_settings(max_examples=50)
def test_padding_keeps_every_token_and_points_at_every_target(
    lengths: list[tuple[int, int]], rng: random.Random
) -> None:
    examples = [
        example([rng.randrange(1, 99) for _ in range(p)], [rng.randrange(1, 99) for _ in range(t)]) for p, t in lengths
    ]
    batch = pad_batch(examples, CPU)
    for row, one in enumerate(examples):
        sequence = [*one.prompt_ids, *one.target_ids]
        assert batch.ids[row, : len(sequence)].tolist() == sequence
        assert batch.mask[row].tolist() == [1] * len(sequence) + [0] * (batch.mask.shape[1] - len(sequence))
    assert torch.equal(batch.ids[batch.rows, batch.positions + 1], batch.targets)
    assert batch.targets.tolist() == [t for e in examples for t in e.target_ids]


def test_means_are_over_tokens_not_examples() -> None:
    scores = [TargetScore((-1.0, -2.0, -3.0), (1, 2, 3)), TargetScore((-6.0,), (1,))]
    assert mean_loss_nats(scores) == pytest.approx(3.0)
    assert scores[0].loss_nats == pytest.approx(6.0)
    assert scores[0].min_probability == pytest.approx(0.0497871, rel=1e-4)
    assert mean_loss_nats([]) == 0
