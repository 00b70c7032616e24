"""Asking the memory: the chain's word against what `generate` emits, tokens against the softmax, text against its definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from memupdate.budget.placement import resolve_placement
from memupdate.facts.model import Fact
from memupdate.facts.render import Renderer
from memupdate.models.base import BaseModel
from memupdate.models.folder import resolve_model
from memupdate.models.scoring import score_examples
from memupdate.progress import ProgressEvent, no_progress
from memupdate.training.memory import Memory, attach, detach, empty_memory, grow
from memupdate.verification.asking import ask, greedy_answer, look_at_tokens
from memupdate.verification.general_text import measure_text, windows
from memupdate.verification.inprocess import end_ids, generate_greedy
from memupdate.verification.questions import Question


@pytest.fixture
def disturbed(atlas_base: BaseModel) -> Iterator[PeftModel]:
    """The base model with random numbers in a memory: some answers change, some do not."""
    memory = grow(empty_memory(resolve_placement("mlp-all", resolve_model("atlas").config)), 4, seed="d", scale=2.0)
    generator = torch.Generator().manual_seed(1)
    b = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in memory.b.items()}
    model = attach(atlas_base.model, Memory(memory.rank, memory.a, b))
    yield model
    atlas_base.model = detach(model)


def questions(renderer: Renderer, facts: list[Fact]) -> list[Question]:
    """As the facts are, cut off before their end, and going on after it."""
    cut = [replace(f, target=f.target.split()[0]) for f in facts]
    longer = [replace(f, target=f"{f.target} Media") for f in facts]
    examples = renderer.render_all([*facts, *cut, *longer])
    return [Question("generality", "any", example.fact_id, example) for example in examples]


def test_judged_as_generation_would_be(
    atlas_base: BaseModel, disturbed: PeftModel, atlas_renderer: Renderer, known: list[Fact]
) -> None:
    asked = questions(atlas_renderer, known[::60])
    events: list[ProgressEvent] = []
    answers = ask(atlas_base, disturbed, asked, events.append)
    assert [a.question for a in answers] == asked
    said = generate_greedy(atlas_base, disturbed, [q.example.prompt_ids for q in asked], 24, no_progress)
    for answer, ids in zip(answers, said, strict=True):
        text = atlas_base.tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.expected == answer.question.example.answer
        assert (answer.judged == "exact") == (text == answer.expected and ids[-1] in end_ids(atlas_base))
        assert answer.answer in (None, text) or text.startswith(answer.answer)
        assert (answer.answer is None) == (answer.judged == "exact")
        if answer.judged == "contained":
            assert answer.expected.lower() in text.lower()
    assert {"exact", "contained", "other"} <= {a.judged for a in answers}
    scores = score_examples(disturbed, [q.example for q in asked], atlas_base.device)
    assert [a.min_probability for a in answers] == [s.min_probability for s in scores]
    assert {e.stage for e in events} == {"measure"}


def test_nothing_asked_nothing_said(atlas_base: BaseModel) -> None:
    assert ask(atlas_base, atlas_base.model, [], no_progress) == []


def test_the_answer_to_one_question(atlas_base: BaseModel, atlas_renderer: Renderer, known: list[Fact]) -> None:
    example = atlas_renderer.render(known[0])
    assert greedy_answer(atlas_base, atlas_base.model, example, no_progress) == known[0].target


def test_tokens_are_those_of_the_softmax(
    atlas_base: BaseModel, disturbed: PeftModel, atlas_renderer: Renderer, known: list[Fact]
) -> None:
    examples = atlas_renderer.render_all(known[::90])
    scores = score_examples(disturbed, examples, atlas_base.device)
    for example, views, score in zip(examples, look_at_tokens(atlas_base, disturbed, examples), scores, strict=True):
        assert [v.token for v in views] == [atlas_base.tokenizer.decode(t) for t in example.target_ids]
        assert [v.best_token for v in views] == [atlas_base.tokenizer.decode(t) for t in score.greedy_ids]
        assert [v.probability for v in views] == pytest.approx([math.exp(p) for p in score.logprobs], rel=1e-4)
        assert all(v.best_probability >= v.probability for v in views)


def test_perplexity_and_kl_by_their_definitions(atlas_base: BaseModel, disturbed: PeftModel) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 500, (n,), generator=generator).tolist() for n in (5, 5, 9, 1)]
    found = measure_text(disturbed, sequences, atlas_base.device)
    assert found is not None
    nats = {"base": 0.0, "memory": 0.0, "kl": 0.0}
    for ids in sequences[:3]:
        row = torch.tensor([ids])
        with torch.inference_mode():
            memory = disturbed(input_ids=row).logits[0, :-1].double().log_softmax(-1)
            with disturbed.disable_adapter():
                base = disturbed(input_ids=row).logits[0, :-1].double().log_softmax(-1)
        nats["base"] -= float(base[range(len(ids) - 1), ids[1:]].sum())
        nats["memory"] -= float(memory[range(len(ids) - 1), ids[1:]].sum())
        nats["kl"] += float((base.exp() * (base - memory)).sum())
    assert found.tokens == 4 + 4 + 8
    assert found.perplexity_base == pytest.approx(math.exp(nats["base"] / 16), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(nats["memory"] / 16), rel=1e-4)
    assert found.kl_nats == pytest.approx(nats["kl"] / 16, rel=1e-3)
    assert found.kl_nats > 0
    assert found.perplexity_ratio == pytest.approx(found.perplexity / found.perplexity_base)


def test_an_empty_memory_does_no_harm(atlas_base: BaseModel) -> None:
    shape = resolve_placement("mlp-all", resolve_model("atlas").config)
    model = attach(atlas_base.model, grow(empty_memory(shape), 1, seed="e", scale=2.0))
    try:
        found = measure_text(model, [list(range(20))], atlas_base.device)
    finally:
        atlas_base.model = detach(model)
    assert found is not None
    assert (found.perplexity_ratio, found.kl_nats) == (1.0, 0.0)
    assert measure_text(model, [[1], []], atlas_base.device) is None


def test_windows_hold_all_of_a_text() -> None:
    assert windows(range(7), 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert windows([], 3) == []
