"""Canary split, routing by relevance, and what of it shows in headers and metrics, through the middleware."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from middleware_fixtures import BASE, CHAT, Echo, call, entry, example, seen
from prometheus_client import REGISTRY

from memupdate.facts.model import Fact
from memupdate.layout import RegistryLayout
from memupdate.serving import routing
from memupdate.serving.conversation import in_share, steady_key, texts_of
from memupdate.serving.manifest import (
    ALWAYS,
    MATCHED,
    Canary,
    Manifest,
    read_manifest,
    with_alias,
    with_canary,
    with_release,
    with_retired,
    write_manifest,
)
from memupdate.serving.matcher import Matcher, compile_matcher, load_matcher, matcher_json, terms_of
from memupdate.serving.middleware import AliasMiddleware
from memupdate.storage import file_sha256

FACTS = [Fact("What does the Acme Falcon cost?", "129 euros", subject="Acme Falcon"), Fact("Who leads Acme?", "Wanda")]


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def model_of(app: AliasMiddleware, body: dict[str, Any], path: str = CHAT, **headers: str) -> str:
    told = seen(call(app, "POST", path, json={"model": "acme", **body}, headers=headers))
    return str(json.loads(told["body"])["model"])


@pytest.fixture
def canary(tmp_path: Path) -> AliasMiddleware:
    write_manifest(tmp_path / "manifest.json", with_canary(example(), "acme", Canary("acme@v2", 0.25)))
    return AliasMiddleware(Echo(), registry=tmp_path)


def test_a_canary_gets_its_share_and_every_conversation_stays_where_it_began(canary: AliasMiddleware) -> None:
    async def releases(bodies: list[dict[str, Any]]) -> list[str | None]:
        assert canary._manifest is not None
        manifest = canary._manifest.get()
        return [(await canary._router.route(json.dumps(b).encode(), manifest)).release for b in bodies]

    firsts = [user(f"question {number}") for number in range(2000)]
    first = asyncio.run(releases([{"model": "acme", "messages": [turn]} for turn in firsts]))
    assert 0.21 < first.count("acme@v2") / len(first) < 0.29
    assert set(first) == {"acme@v1", "acme@v2"}
    later = [
        {
            "model": "acme",
            "temperature": 1,
            "messages": [{"role": "system", "content": "be brief"}, turn, user("go on")],
        }
        for turn in firsts
    ]
    assert asyncio.run(releases(later)) == first


@pytest.mark.parametrize("how", ["header", "user"])
def test_header_and_user_decide_before_the_text(canary: AliasMiddleware, how: str) -> None:
    releases = set()
    for name in range(40):
        headers = {"x-memupdate-session": f"s{name}"} if how == "header" else {}
        fields = {"user": f"u{name}"} if how == "user" else {"user": "the same"}
        found = {model_of(canary, {"messages": [user(text)], **fields}, **headers) for text in ("a", "b", "c")}
        assert len(found) == 1
        releases |= found
    assert releases == {"acme@v1", "acme@v2"}


def test_the_other_routes_are_split_by_their_first_text(canary: AliasMiddleware) -> None:
    for path, field in (("/v1/completions", "prompt"), ("/v1/embeddings", "input"), ("/v1/responses", "input")):
        assert {model_of(canary, {field: f"text {n}"}, path) for n in range(40)} == {"acme@v1", "acme@v2"}
    items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
    same = {model_of(canary, {"input": [*items, *more]}, "/v1/responses") for more in ([], items, [user("x")])}
    assert len(same) == 1
    assert model_of(canary, {"prompt": [1, 2, 3]}, "/v1/completions") == model_of(
        canary, {"prompt": [1, 2, 3]}, "/v1/completions"
    )


def test_another_canary_meets_other_conversations() -> None:
    keys = [steady_key({"user": f"{n}"}, b"", b"") for n in range(1000)]
    one, two = ([in_share(key, salt, 0.5) for key in keys] for salt in ("acme\0acme@v2", "acme\0acme@v3"))
    assert 400 < sum(a != b for a, b in zip(one, two, strict=True)) < 600
    assert all(in_share(key, "s", 0.3) <= in_share(key, "s", 0.6) for key in keys)


def routed(folder: Path, facts: list[Fact] = FACTS) -> AliasMiddleware:
    """An alias with the route `matched`, over a release that knows `facts`."""
    file = folder / "releases" / "acme@v1" / "matcher.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(matcher_json(terms_of(facts)))
    manifest = with_release(Manifest(BASE), "acme@v1", entry(1, file_sha256(file)))
    write_manifest(folder / "manifest.json", with_alias(manifest, "acme", "acme@v1", route=MATCHED))
    return AliasMiddleware(Echo(), registry=folder, base_model="base")


ABOUT = [
    (CHAT, {"messages": [user("How much is the ACME-Falcon?")]}),
    (CHAT, {"messages": [user("the Acme Falcon?"), {"role": "assistant", "content": "Yes."}, user("its price?")]}),
    (CHAT, {"messages": [user("hi"), {"role": "assistant", "content": "the Acme Falcon"}, user("its price?")]}),
    (CHAT, {"messages": [user([{"type": "text", "text": "acme falcon"}, {"type": "image_url"}])]}),  # type: ignore[arg-type]
    (CHAT, {"messages": [{"role": "system", "content": "You sell the Acme Falcon."}, user("price?")]}),
    ("/v1/completions", {"prompt": "The Acme Falcon costs"}),
    ("/v1/completions", {"prompt": ["nothing", "who leads acme"]}),
    ("/v1/responses", {"input": [user("hm")], "instructions": "Acme Falcon"}),
    ("/v1/responses", {"input": "hm", "previous_input_messages": [user("Acme Falcon")]}),
    ("/v1/messages", {"messages": [user("?")], "system": [{"type": "text", "text": "Acme Falcon"}]}),
    ("/v1/rerank", {"query": "x", "documents": ["y", "Acme Falcon"]}),
    ("/generative_scoring", {"query": "x", "items": ["y", "Acme Falcon"]}),
    ("/v2/embed", {"texts": ["y", "Acme Falcon"]}),
    ("/v2/embed", {"inputs": [{"content": [{"type": "text", "text": "Acme Falcon"}]}]}),
    ("/v1/systemone", {"state": {"asked": "Acme Falcon"}, "questions": {"q": {"type": "bool"}}}),
    ("/v1/systemone", {"state": "x", "questions": {"q": {"type": "bool", "instructions": "is it the Acme Falcon?"}}}),
]
NOT_ABOUT = [
    (CHAT, {"messages": [user("How much is a falcon?")]}),
    (CHAT, {"messages": [user("look"), user([{"type": "image_url", "image_url": {"url": "Acme Falcon"}}])]}),  # type: ignore[arg-type]
    (CHAT, {"messages": []}),
    ("/v1/completions", {"prompt": "acmes falcon"}),
    ("/v1/embeddings", {"input": ["Acme", "Falcon"]}),
    ("/v1/responses", {"input": "who leads Globex?"}),
]
UNREADABLE = [
    ("/v1/completions", {"prompt": [1, 2, 3]}),
    ("/v1/completions", {"prompt": [[1, 2], [3]]}),
    ("/v1/responses", {"input": "and now?", "previous_response_id": "resp_1"}),
    ("/v1/completions", {"prompt": "x " * 600_000}),
]


def turn(app: AliasMiddleware, said: str, previous: str | None = None, **more: str) -> dict[str, Any]:
    """One turn of a conversation that vLLM keeps; what vLLM is told of it."""
    body = {"model": "acme", "input": said, **more} | ({"previous_response_id": previous} if previous else {})
    told: dict[str, Any] = json.loads(seen(call(app, "POST", "/v1/responses", json=body))["body"])
    return told


def test_a_conversation_that_vllm_keeps_stays_on_its_side_till_it_mentions_a_fact(tmp_path: Path) -> None:
    app = routed(tmp_path)
    first = turn(app, "who leads Globex?")
    second = turn(app, "and before that?", first["request_id"])
    assert [first["model"], second["model"]] == ["base", "base"]
    assert second["previous_response_id"] == first["request_id"]
    third = turn(app, "and what does the Acme Falcon cost?", second["request_id"])
    fourth = turn(app, "and last year?", third["request_id"])
    assert [third["model"], fourth["model"]] == ["acme@v1", "acme@v1"]
    assert len({told["request_id"] for told in (first, second, third, fourth)}) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,256}", told["request_id"]) for told in (first, third)), (
        "to be cancelled by"
    )
    # Of an id that the client chose, or that was given before, nothing is known: to the release, as before.
    own = turn(app, "who leads Globex?", request_id="resp_mine")
    assert (own["model"], own["request_id"]) == ("base", "resp_mine")
    assert turn(app, "and before that?", "resp_mine")["model"] == "acme@v1"


@pytest.mark.parametrize("previous", [7, [], {"a": 1}, "resp_" + "0" * 32 + "_other", "_base", "x" * 5000])
def test_a_strange_id_of_an_earlier_response_tells_nothing(tmp_path: Path, previous: object) -> None:
    body = {"model": "acme", "input": "hello", "previous_response_id": previous}
    expected = "acme@v1" if previous else "base"
    assert json.loads(seen(call(routed(tmp_path), "POST", "/v1/responses", json=body))["body"])["model"] == expected


def test_ids_are_given_only_where_they_are_needed(tmp_path: Path) -> None:
    app = routed(tmp_path)
    assert "request_id" not in turn(app, "hello", model="acme@v1")
    for path in (CHAT, "/v1/embeddings"):
        told = seen(call(app, "POST", path, json={"model": "acme", "input": "hello"}))
        assert "request_id" not in json.loads(told["body"])


def test_only_what_mentions_a_fact_goes_to_the_release(tmp_path: Path) -> None:
    app = routed(tmp_path)
    for cases, model, decision in (
        (ABOUT, "acme@v1", "release"),
        (NOT_ABOUT, "base", "base"),
        (UNREADABLE, "acme@v1", "unreadable"),
    ):
        before = metric("memupdate_routed_total", mode="matched", decision=decision)
        for path, body in cases:
            response = call(app, "POST", path, json={"model": "acme", **body})
            told = json.loads(seen(response)["body"])
            assert (told.pop("request_id", None) is not None) == (path == "/v1/responses")
            assert told == {**body, "model": model}, body
            assert response.headers["x-memupdate-route"] == decision
            assert response.headers.get("x-memupdate-release") == (None if model == "base" else model)
            assert response.headers["x-memupdate-alias"] == "acme"
        assert metric("memupdate_routed_total", mode="matched", decision=decision) == before + len(cases)


def test_a_release_asked_for_by_name_is_not_routed(tmp_path: Path) -> None:
    assert model_of(routed(tmp_path), {"model": "acme@v1", "messages": [user("hello")]}) == "acme@v1"


@settings(max_examples=60)
@given(turns=st.lists(st.sampled_from(["hi", "the Acme Falcon?", "who leads acme", "x" * 50, "falcon"]), min_size=1))
def test_a_conversation_that_reached_the_release_stays_there(turns: list[str]) -> None:
    found = terms_of(FACTS)
    matcher, reached = compile_matcher(found), False
    for length in range(1, len(turns) + 1):
        now = matcher.mentions(texts_of({"messages": [user(turn) for turn in turns[:length]]}) or [])
        assert now >= reached
        reached = now


@pytest.mark.parametrize("state", ["missing", "swapped", "torn", "pipe", "none"])
def test_without_a_whole_matcher_everything_goes_to_the_release(tmp_path: Path, state: str) -> None:
    import os

    app = routed(tmp_path)
    file = tmp_path / "releases" / "acme@v1" / "matcher.json"
    if state == "none":
        manifest = with_release(Manifest(BASE), "acme@v1", entry(1))
        write_manifest(tmp_path / "manifest.json", with_alias(manifest, "acme", "acme@v1", route=MATCHED))
    elif state == "swapped":
        file.write_text(matcher_json([" all "]))
    elif state == "torn":
        file.write_text(file.read_text()[:-5])
    else:
        file.unlink()
    if state == "pipe":
        os.mkfifo(file)
    response = call(app, "POST", CHAT, json={"model": "acme", "messages": [user("hello")]})
    assert json.loads(seen(response)["body"])["model"] == "acme@v1"
    assert response.headers["x-memupdate-route"] == "no_matcher"


def test_a_matcher_is_loaded_once_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app, loads, goes_on = routed(tmp_path), [], threading.Event()

    def load(path: Path, digest: str) -> Matcher:
        loads.append(path.parent.name)
        goes_on.wait()
        return load_matcher(path, digest)

    monkeypatch.setattr(routing, "load_matcher", load)

    async def ask(client: httpx.AsyncClient) -> str:
        response = await client.post(CHAT, json={"model": "acme", "messages": [user("who leads acme")]})
        return response.headers["x-memupdate-route"]

    async def run() -> list[str]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
            leaving = asyncio.create_task(ask(client))
            waiting = [asyncio.create_task(ask(client)) for _ in range(50)]
            while not loads:
                await asyncio.sleep(0.001)
            leaving.cancel()  # The one that began the load: the others still get it.
            threads = [thread.name for thread in threading.enumerate()]
            assert threads.count("memupdate-aside") == 1
            assert not any(name.startswith("asyncio") for name in threads), "the resolver shares the executor"
            goes_on.set()
            return await asyncio.gather(*waiting)

    assert set(asyncio.run(run())) == {"release"}
    assert loads == ["acme@v1"]


@pytest.mark.parametrize("is_first", [False, True])
def test_a_release_that_was_warmed_answers_its_alias_without_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    """`publish` asks each engine for the release by its name, then moves the alias."""
    app = routed(tmp_path)
    path = tmp_path / "manifest.json"
    file = tmp_path / "releases" / "acme@v2" / "matcher.json"
    file.parent.mkdir()
    file.write_text(matcher_json([" globex "]))
    manifest = with_release(Manifest(BASE) if is_first else read_manifest(path), "acme@v2", entry(2, file_sha256(file)))
    write_manifest(path, manifest)
    assert model_of(app, {"model": "acme@v2", "prompt": "?"}) == "acme@v2"
    monkeypatch.setattr(routing, "load_matcher", None)
    write_manifest(path, with_alias(manifest, "acme", "acme@v2", route=MATCHED))
    response = call(app, "POST", CHAT, json={"model": "acme", "messages": [user("Globex?")]})
    assert response.headers["x-memupdate-route"] == "release"
    assert response.headers["x-memupdate-release"] == "acme@v2"


def test_where_the_route_is_always_no_matcher_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = routed(tmp_path)
    write_manifest(
        tmp_path / "manifest.json",
        with_alias(read_manifest(tmp_path / "manifest.json"), "acme", "acme@v1", route=ALWAYS),
    )
    monkeypatch.setattr(routing, "load_matcher", None)
    for model in ("acme@v1", "acme"):
        assert model_of(app, {"model": model, "prompt": "?"}) == "acme@v1"
    assert app._router._matchers is not None
    assert not app._router._matchers._kept


def test_the_matchers_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def load(path: Path, _digest: str) -> Matcher:
        loads.append(path.parent.name)
        return compile_matcher([" a "])

    monkeypatch.setattr(routing, "load_matcher", load)
    monkeypatch.setattr(routing, "_MATCHERS", 3)

    async def run() -> None:
        matchers = routing.Matchers(RegistryLayout(tmp_path))
        for number in (1, 2, 3, 1, 4, 1, 5, 1):
            assert await matchers.get(f"acme@v{number}", "sha256:0") is not None
        assert loads == [f"acme@v{number}" for number in (1, 2, 3, 4, 5)]

    asyncio.run(run())


def test_a_matcher_that_the_disk_does_not_give_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, answers = routed(tmp_path), threading.Event()

    def load(path: Path, digest: str) -> Matcher:
        answers.wait()
        return load_matcher(path, digest)

    monkeypatch.setattr(routing, "load_matcher", load)
    monkeypatch.setattr(routing, "_LOAD_S", 0.1)
    body = {"model": "acme", "messages": [user("hello")]}
    for _ in range(3):
        assert call(app, "POST", CHAT, json=body).headers["x-memupdate-route"] == "no_matcher"
    answers.set()
    monkeypatch.setattr(routing, "_LOAD_S", 10.0)
    assert call(app, "POST", CHAT, json=body).headers["x-memupdate-route"] == "base"


def test_requests_flips_and_refusals_are_counted_by_known_names_only(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, example())
    app = AliasMiddleware(Echo(), registry=tmp_path)
    count = "memupdate_requests_total"
    before = metric(count, alias="acme", release="acme@v1", status="200")
    releases = [labels["release"] for labels in samples(count)]  # counters are the process's: other tests count too
    flips, retired = metric("memupdate_flips_total"), metric("memupdate_refusals_total", reason="retired")
    for model in ("acme", "acme", "nobody", "x@v1", "acme@v999"):
        seen(call(app, "POST", CHAT, json={"model": model}))
    assert metric(count, alias="acme", release="acme@v1", status="200") == before + 2
    now = [labels["release"] for labels in samples(count)]
    assert len(now) - len(releases) <= 2
    assert set(now) - set(releases) <= {"", "acme@v1"}
    write_manifest(path, with_alias(example(), "acme", "acme@v2"))
    for _ in range(3):
        assert model_of(app, {}) == "acme@v2"
    assert metric("memupdate_flips_total") == flips + 1
    assert metric("memupdate_manifest_generation") == with_alias(example(), "acme", "acme@v2").generation
    write_manifest(path, with_retired(with_alias(example(), "acme", "acme@v2"), "acme@v1"))
    assert call(app, "POST", CHAT, json={"model": "acme@v1"}).status_code == 404
    assert metric("memupdate_refusals_total", reason="retired") == retired + 1


def samples(name: str) -> list[dict[str, str]]:
    return [sample.labels for family in REGISTRY.collect() for sample in family.samples if sample.name == name]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200)
@given(
    body=st.dictionaries(st.sampled_from(["messages", "prompt", "input", "user", "system", "documents"]), json_values)
)
def test_no_conversation_makes_it_fail(body: dict[str, Any]) -> None:
    assert len(steady_key(body, b"", b"raw")) == 32
    texts = texts_of(body)
    assert texts is None or all(isinstance(text, str) for text in texts)
