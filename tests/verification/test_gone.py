"""Dead answers on the embedded model: what a memory says and should not, and what the base model says by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from peft import PeftModel

from memupdate.budget.placement import resolve_placement
from memupdate.facts.model import Fact
from memupdate.facts.render import Renderer
from memupdate.models.base import BaseModel
from memupdate.models.folder import resolve_model
from memupdate.models.scoring import score_examples
from memupdate.training.memory import attach, detach, empty_memory, grow
from memupdate.verification.gone import DeadAnswer, look_for_dead_answers


@pytest.fixture
def fresh(atlas_base: BaseModel) -> Iterator[PeftModel]:
    """The base model with an empty memory, which computes what the base model computes."""
    shape = resolve_placement("mlp-all", resolve_model("atlas").config)
    model = attach(atlas_base.model, grow(empty_memory(shape), 2, seed="0:gone", scale=2.0))
    yield model
    atlas_base.model = detach(model)


def test_what_was_never_taught_is_gone_and_its_probability_is_that_of_the_whole(
    fresh: PeftModel, atlas_base: BaseModel, atlas_renderer: Renderer, news: list[Fact]
) -> None:
    examples = [replace(e, target_ids=e.target_ids[:-1]) for e in atlas_renderer.render_all(news[:4])]
    verdicts = look_for_dead_answers(fresh, examples, atlas_base.device, max_probability=0.1)
    scores = score_examples(fresh, examples, atlas_base.device)
    for example, verdict, score in zip(examples, verdicts, scores, strict=True):
        assert verdict.is_gone(0.1)
        assert not verdict.is_the_bases(0.1)
        product = 1.0
        for logprob in score.logprobs:
            product *= 2.718281828459045**logprob
        assert verdict.probability == pytest.approx(product)
        assert (verdict.fact_id, verdict.prompt) == (example.fact_id, example.prompt)


def test_what_the_base_model_knows_is_not_gone_but_is_no_trace_of_a_memory(
    fresh: PeftModel, atlas_base: BaseModel, atlas_renderer: Renderer, known: list[Fact]
) -> None:
    verdicts = look_for_dead_answers(
        fresh, atlas_renderer.render_all(known[:8]), atlas_base.device, max_probability=0.1
    )
    said = [v for v in verdicts if v.is_greedy]
    assert len(said) >= 6
    for verdict in said:
        assert not verdict.is_gone(0.1)
        assert verdict.is_the_bases(0.1)
        assert verdict.base_probability == pytest.approx(verdict.probability, rel=1e-4)
        assert "is still what comes out" in verdict.explain(0.1)


def test_the_verdict_weighs_the_memory_against_the_base() -> None:
    likely = DeadAnswer("f", "Q?", "A", is_greedy=False, probability=0.3, base_probability=0.01)
    assert not likely.is_gone(0.1)
    assert not likely.is_the_bases(0.1)
    assert likely.explain(0.1) == "'Q?' → 'A': has probability 0.300, less than 0.1 allowed"
    assert likely.is_gone(0.5)
    assert replace(likely, base_probability=0.2).is_the_bases(0.1)
    greedy = replace(likely, is_greedy=True, base_probability=0.2)
    assert not greedy.is_the_bases(0.1), "the base model does not say it, the memory does"
    assert not replace(likely, probability=0.01).is_the_bases(0.1), "gone is gone, whoever said it"
