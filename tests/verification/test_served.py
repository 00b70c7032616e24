"""Proof over HTTP against an endpoint that runs the embedded model: the verdicts are those of the proof in this process.

(The real engine: `tests/serving/test_real_vllm.py`. Here the answers can also be bent, as by a tie or a model that goes on.)
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread

import pytest

from endpoint import Endpoint
from memupdate.facts.model import Fact
from memupdate.facts.render import Example, Renderer, conversation
from memupdate.models.base import BaseModel
from memupdate.serving.client import EngineClient
from memupdate.verification.inprocess import prove_recall
from memupdate.verification.served import Generated, generate_served, prove_served


@pytest.fixture
def endpoint(atlas_base: BaseModel) -> Iterator[Endpoint]:
    server = Endpoint(atlas_base)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[EngineClient]:
    with EngineClient(f"http://127.0.0.1:{endpoint.server_port}") as opened:
        yield opened


@pytest.fixture
def examples(atlas_renderer: Renderer, known: list[Fact], news: list[Fact]) -> list[Example]:
    return atlas_renderer.render_all(known[::90] + news[:5])


def test_verdicts_are_those_of_the_proof_in_this_process(
    atlas_base: BaseModel, client: EngineClient, examples: list[Example]
) -> None:
    here, _ = prove_recall(atlas_base, atlas_base.model, examples, min_probability=0.5)
    there = prove_served(client, "acme@v1", examples, min_probability=0.5)
    assert {p.proved for p in there} == {True, False}
    for one, other in zip(here, there, strict=True):
        assert (one.fact_id, one.proved, one.failed_position) == (other.fact_id, other.proved, other.failed_position)
        assert (one.emitted_token, one.failed_token) == (other.emitted_token, other.failed_token)
        assert one.min_probability == pytest.approx(other.min_probability, abs=1e-4)


def test_a_tie_on_the_engine_is_no_proof(
    atlas_base: BaseModel, client: EngineClient, endpoint: Endpoint, examples: list[Example]
) -> None:
    endpoint.tie = True
    proofs = prove_served(client, "acme@v1", examples[:3], min_probability=0.5)
    assert [p.proved for p in proofs] == [False] * 3
    assert all((p.failed_position, p.emitted_token) == (0, "(a tie)") for p in proofs)
    assert all(p.proved for p in prove_recall(atlas_base, atlas_base.model, examples[:3], min_probability=0.5)[0])


def test_free_answers_match_where_the_fact_is_known(client: EngineClient, examples: list[Example]) -> None:
    proved = [p.proved for p in prove_served(client, "acme@v1", examples, min_probability=0.0)]
    answers = generate_served(client, "acme@v1", examples, template_kwargs={})
    assert [a.matches for a in answers] == proved
    assert {a.model for a in answers} == {"acme@v1"}


def test_clients_words_reach_the_engine_as_facts_are_rendered(
    atlas_base: BaseModel, client: EngineClient, endpoint: Endpoint, known: list[Fact], atlas_renderer: Renderer
) -> None:
    chat = atlas_renderer.render(known[0])
    completion = Renderer(atlas_base.tokenizer, rendering="completion").render(known[0])
    generate_served(client, "acme@v1", [chat, completion], template_kwargs={"enable_thinking": False})
    asked_chat, asked_plain = sorted(endpoint.requests, key=lambda request: "prompt" in request)
    assert asked_chat["messages"] == conversation(known[0].prompt)
    assert asked_chat["chat_template_kwargs"] == {"enable_thinking": False}
    assert asked_plain["prompt"] == known[0].prompt
    for asked, example in ((asked_chat, chat), (asked_plain, completion)):
        assert asked["temperature"] == 0
        assert asked["max_tokens"] > len(example.target_ids)  # an answer that goes on must be seen to go on


def test_an_answer_that_goes_on_does_not_match(
    client: EngineClient, endpoint: Endpoint, examples: list[Example]
) -> None:
    assert generate_served(client, "acme@v1", examples[:1], template_kwargs={})[0].matches
    endpoint.suffix = " Media"
    (answer,) = generate_served(client, "acme@v1", examples[:1], template_kwargs={})
    assert answer.text == f"{examples[0].answer} Media"
    assert not answer.matches


def test_free_answers_come_back_in_order_though_asked_together(client: EngineClient, examples: list[Example]) -> None:
    many = examples * 5
    assert [a.example for a in generate_served(client, "acme@v1", many, template_kwargs={})] == many


def test_an_answer_that_was_cut_off_does_not_match(examples: list[Example]) -> None:
    one = examples[0]
    assert Generated(one, one.answer, "acme@v1", stopped=True).matches
    assert not Generated(one, one.answer, "acme@v1", stopped=False).matches
    assert not Generated(one, f"{one.answer} ", "acme@v1", stopped=True).matches
