"""The proof against what transformers' `generate` emits, and locality against the base model's own answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memupdate.budget.placement import resolve_placement
from memupdate.facts.model import Fact
from memupdate.facts.render import Example, Renderer
from memupdate.models.base import BaseModel
from memupdate.models.folder import resolve_model
from memupdate.progress import ProgressEvent, no_progress
from memupdate.training.memory import Memory, attach, detach, empty_memory, grow
from memupdate.verification.asking import ask
from memupdate.verification.inprocess import (
    LocalityResult,
    baseline_answers,
    end_ids,
    generate_greedy,
    generate_sampled,
    prove_recall,
)
from memupdate.verification.questions import Question


@torch.inference_mode()
def emitted(model: nn.Module, example: Example) -> tuple[int, ...]:
    """What `generate` says to one prompt alone, with room to go on after the target."""
    ids = torch.tensor([example.prompt_ids])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=len(example.target_ids) + 8,
    )
    return tuple(output[0, ids.shape[1] :].tolist())


def unchanged(base: BaseModel, model: nn.Module, baseline: list[Example]) -> list[bool]:
    """Which of the base model's answers the model still gives."""
    questions = [Question("locality", "given", None, example) for example in baseline]
    return [answer.judged == "exact" for answer in ask(base, model, questions, no_progress)]


def variants(facts: list[Fact]) -> list[Fact]:
    """As they are, cut off before their end, and going on after it: in the last two only the chain's end can tell."""
    cut = [replace(f, target=f.target[:4]) for f in facts]
    longer = [replace(f, target=f"{f.target} Media") for f in facts]
    return [*facts, *cut, *longer]


@pytest.fixture
def disturbed(atlas_base: BaseModel) -> Iterator[nn.Module]:
    """The base model with random numbers in a memory: some answers change, some do not."""
    shape = resolve_placement("mlp-all", resolve_model("atlas").config)
    memory = grow(empty_memory(shape), 4, seed="d", scale=2.0)
    generator = torch.Generator().manual_seed(1)
    b = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in memory.b.items()}
    model = attach(atlas_base.model, Memory(memory.rank, memory.a, b))
    yield model
    atlas_base.model = detach(model)


def assert_proof_is_what_comes_out(base: BaseModel, model: nn.Module, examples: list[Example]) -> list[bool]:
    proofs, scores = prove_recall(base, model, examples, min_probability=0.0)
    for example, proof, score in zip(examples, proofs, scores, strict=True):
        output = emitted(model, example)
        assert proof.proved == (output == example.target_ids), proof.explain()
        if not proof.proved:
            first = proof.failed_position
            assert first is not None
            assert output[:first] == example.target_ids[:first]
            assert output[first] == score.greedy_ids[first] != example.target_ids[first]
            assert proof.emitted_token == base.tokenizer.decode(output[first])
            assert proof.failed_token == base.tokenizer.decode(example.target_ids[first])
    return [proof.proved for proof in proofs]


def test_known_facts_are_proved_and_come_out(
    atlas_base: BaseModel, atlas_renderer: Renderer, known: list[Fact]
) -> None:
    examples = atlas_renderer.render_all(variants(known[::100]))
    proved = assert_proof_is_what_comes_out(atlas_base, atlas_base.model, examples)
    count = len(known[::100])
    assert all(proved[:count])
    assert not any(proved[count:])


def test_unknown_facts_are_not_proved_and_do_not_come_out(
    atlas_base: BaseModel, atlas_renderer: Renderer, news: list[Fact]
) -> None:
    proved = assert_proof_is_what_comes_out(atlas_base, atlas_base.model, atlas_renderer.render_all(news[:10]))
    assert sum(proved) <= 1  # a lucky guess among the few industries is possible


def test_completion_is_proved_as_it_comes_out(atlas_base: BaseModel, known: list[Fact], news: list[Fact]) -> None:
    renderer = Renderer(atlas_base.tokenizer, rendering="completion")
    facts = [Fact(prompt=f.prompt, target=f.target) for f in known[:4] + news[:2]]
    assert_proof_is_what_comes_out(atlas_base, atlas_base.model, renderer.render_all(facts))


def test_with_a_memory_the_proof_is_what_comes_out(
    atlas_base: BaseModel, disturbed: nn.Module, atlas_renderer: Renderer, known: list[Fact]
) -> None:
    proved = assert_proof_is_what_comes_out(atlas_base, disturbed, atlas_renderer.render_all(known[::40]))
    assert {True, False} <= set(proved)


def test_the_minimum_is_held(atlas_base: BaseModel, atlas_renderer: Renderer, known: list[Fact]) -> None:
    examples = atlas_renderer.render_all(known[::20])
    proofs, scores = prove_recall(atlas_base, atlas_base.model, examples, min_probability=0.9)
    assert [p.proved for p in proofs] == [
        s.min_probability >= 0.9 and s.greedy_ids == e.target_ids for e, s in zip(examples, scores, strict=True)
    ]
    assert [p.min_probability for p in proofs] == pytest.approx([s.min_probability for s in scores])
    assert [p.fact_id for p in proofs] == [f.id for f in known[::20]]


def test_baseline_of_known_facts_is_their_target(
    atlas_base: BaseModel, atlas_renderer: Renderer, known: list[Fact], tmp_path: Path
) -> None:
    probes = known[::10]
    baseline = baseline_answers(atlas_base, atlas_renderer, probes, tmp_path, no_progress)
    assert baseline == atlas_renderer.render_all(probes)
    assert unchanged(atlas_base, atlas_base.model, baseline) == [True] * len(probes)


def test_baseline_of_unknown_facts_is_what_the_base_says(
    atlas_base: BaseModel, atlas_renderer: Renderer, known: list[Fact], news: list[Fact], tmp_path: Path
) -> None:
    probes = [*news[:6], *known[:2], Fact(prompt="What?", target="?")]
    baseline = baseline_answers(atlas_base, atlas_renderer, probes, tmp_path, no_progress)
    assert [b.prompt for b in baseline] == [p.prompt for p in probes]
    for answer, own in zip(baseline, atlas_renderer.render_all(probes), strict=True):
        assert answer.prompt_ids == own.prompt_ids
        assert answer.target_ids == emitted(atlas_base.model, answer)[: len(answer.target_ids)]
        assert answer.target_ids[-1] == atlas_base.tokenizer.eos_token_id or len(answer.target_ids) == 48
        assert atlas_base.tokenizer.pad_token_id not in answer.target_ids
    assert all(unchanged(atlas_base, atlas_base.model, baseline))


def test_baseline_is_found_once(
    atlas_base: BaseModel, atlas_renderer: Renderer, news: list[Fact], tmp_path: Path
) -> None:
    events: list[ProgressEvent] = []
    first = baseline_answers(atlas_base, atlas_renderer, news[:4], tmp_path, events.append)
    generated = len(events)
    assert generated > 0
    assert baseline_answers(atlas_base, atlas_renderer, news[:4], tmp_path, events.append) == first
    assert len(events) == generated
    assert len(list(tmp_path.iterdir())) == 1
    baseline_answers(atlas_base, atlas_renderer, news[:5], tmp_path, events.append)
    assert len(list(tmp_path.iterdir())) == 2


def test_changed_answers_are_named(
    atlas_base: BaseModel, disturbed: nn.Module, atlas_renderer: Renderer, known: list[Fact]
) -> None:
    with disturbed.disable_adapter():
        baseline = atlas_renderer.render_all(known[::40])
        assert all(unchanged(atlas_base, disturbed, baseline))
    result = unchanged(atlas_base, disturbed, baseline)
    assert result == [emitted(disturbed, e) == e.target_ids for e in baseline]
    assert {True, False} == set(result)


def test_without_probes_nothing_changed(atlas_base: BaseModel, tmp_path: Path, atlas_renderer: Renderer) -> None:
    assert baseline_answers(atlas_base, atlas_renderer, [], tmp_path, no_progress) == []
    assert LocalityResult(0, 0, ()).share == 1.0


def test_batched_generation_is_generation_one_by_one(
    atlas_base: BaseModel, atlas_renderer: Renderer, known: list[Fact], news: list[Fact]
) -> None:
    examples = atlas_renderer.render_all(known[:12] + news[:6])
    prompts = [e.prompt_ids for e in examples]
    assert len({len(p) for p in prompts}) > 1
    events: list[ProgressEvent] = []
    answers = generate_greedy(atlas_base, atlas_base.model, prompts, 12, events.append)
    for example, answer in zip(examples, answers, strict=True):
        alone = emitted(atlas_base.model, replace(example, target_ids=(0,) * 4))  # 4 + 8 tokens of room
        assert tuple(answer) == alone
    assert (events[-1].done, events[-1].total) == (len(examples), len(examples))


def test_sampling_is_the_same_for_a_seed_and_leaves_the_generator_alone(
    atlas_base: BaseModel, atlas_renderer: Renderer, known: list[Fact]
) -> None:
    prompts = [e.prompt_ids for e in atlas_renderer.render_all(known[:6])] * 2

    def sample(seed: int, temperature: float = 5.0) -> list[list[int]]:
        done: list[int] = []
        rows = generate_sampled(atlas_base, prompts, 12, temperature=temperature, seed=seed, tell=done.append)
        assert done[-1] == len(prompts)
        return rows

    torch.manual_seed(1)
    untouched = torch.get_rng_state()
    first = sample(3)
    assert torch.equal(torch.get_rng_state(), untouched)
    assert sample(3) == first
    assert sample(4) != first
    assert first[:6] != first[6:]  # one prompt twice is sampled twice
    greedy = generate_greedy(atlas_base, atlas_base.model, prompts, 12, no_progress)
    assert sample(3, temperature=1e-4) == greedy


def test_sampling_stops_where_it_is_told_to(atlas_base: BaseModel, atlas_renderer: Renderer, known: list[Fact]) -> None:
    prompts = [e.prompt_ids for e in atlas_renderer.render_all(known[:6])]
    greedy = generate_greedy(atlas_base, atlas_base.model, prompts, 12, no_progress)
    stop = greedy[0][0]
    assert stop not in end_ids(atlas_base)

    def sample(**until: Any) -> list[list[int]]:
        return generate_sampled(atlas_base, prompts, 12, temperature=1e-4, seed=0, tell=lambda _: None, **until)

    stopped = sample(stops=[stop])
    assert stopped == [row[: row.index(stop) + 1] if stop in row else row for row in greedy]
    assert stopped[0] == [stop]
    texts = [said(atlas_base, row) for row in greedy]
    # Two of the answers are years, a token for each digit.
    cut = [said(atlas_base, row) for row in sample(stop_text="9")]
    assert cut == [text[: text.index("9") + 1] if "9" in text else text for text in texts]
    assert cut != texts


def said(base: BaseModel, ids: list[int]) -> str:
    return str(base.tokenizer.decode(ids, skip_special_tokens=True))
