"""The middleware in front of a real ASGI application that tells what reached it."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from middleware_fixtures import CHAT, Echo, call, example, seen

from memupdate.serving import middleware, release_files
from memupdate.serving.background import WAIT_S
from memupdate.serving.manifest import manifest_json, with_alias, write_manifest
from memupdate.serving.middleware import INFERENCE_ROUTES, AliasMiddleware

TOKEN = "s3cret"


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    write_manifest(tmp_path / "manifest.json", example())
    return tmp_path


@pytest.fixture(params=["local", "network"])
def app(registry: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AliasMiddleware:
    """With its registry on a disk of either kind."""
    for module in (middleware, release_files):
        monkeypatch.setattr(module, "may_hang", lambda *_: request.param == "network")
    return AliasMiddleware(Echo(), registry=registry, admin_token=TOKEN, max_body_bytes=4096)


@pytest.mark.parametrize("path", sorted(INFERENCE_ROUTES))
def test_an_alias_becomes_its_release_on_every_inference_route(app: AliasMiddleware, path: str) -> None:
    body = {"model": "acme", "messages": [{"role": "user", "content": "ü 你好 😀"}], "seed": 2**70, "x": 1e-7}
    response = call(app, "POST", path, json=body, headers={"x-custom": "kept"})
    told = seen(response)
    assert json.loads(told["body"]) == {**body, "model": "acme@v1"}
    assert int(told["headers"]["content-length"]) == len(told["body"])
    assert told["headers"]["x-custom"] == "kept"
    assert response.headers["x-memupdate-release"] == "acme@v1"
    assert response.headers["x-memupdate-alias"] == "acme"


def test_a_flip_takes_effect_on_the_next_request(app: AliasMiddleware, registry: Path) -> None:
    for release in ("acme@v2", "acme@v1", "acme@v2"):
        write_manifest(registry / "manifest.json", with_alias(example(), "acme", release))
        told = seen(call(app, "POST", CHAT, json={"model": "acme"}))
        assert json.loads(told["body"])["model"] == release


@pytest.mark.parametrize(("model", "release"), [("acme@v2", "acme@v2"), ("acme@v77", "acme@v77"), ("base", None)])
def test_releases_and_the_base_model_pass_byte_for_byte(app: AliasMiddleware, model: str, release: str | None) -> None:
    body = f'{{ "model" :"{model}","n": 1.0 }}'.encode()
    response = call(app, "POST", CHAT, content=body, headers={"content-type": "application/json; charset=utf-8"})
    assert seen(response)["body"].encode("latin-1") == body
    assert response.headers.get("x-memupdate-release") == release
    assert "x-memupdate-alias" not in response.headers


def test_retired_releases_and_endless_names_are_answered_here(app: AliasMiddleware) -> None:
    for model in ("acme@v3", "x" * 2000):
        response = call(app, "POST", CHAT, json={"model": model})
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "NotFoundError"
        assert len(response.text) < 300


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"model": "acme"', "application/json"),
        (b'["acme"]', "application/json"),
        (b'{"model": ["acme"]}', "application/json"),
        (b'{"model": null}', "application/json"),
        (b"\xff\xfe\x00", "application/json"),
        (b"[" * 2000, "application/json"),
        (b"", "application/json"),
        (b'{"model": "acme"}', "text/plain"),
        (b"--x\r\n\r\nacme\r\n--x--", "multipart/form-data; boundary=x"),
    ],
)
def test_what_is_no_json_object_goes_on_as_it_came(app: AliasMiddleware, content: bytes, kind: str) -> None:
    response = call(app, "POST", CHAT, content=content, headers={"content-type": kind})
    assert seen(response)["body"].encode("latin-1") == content
    assert "x-memupdate-release" not in response.headers


def test_a_body_over_the_limit_is_413_and_goes_nowhere(app: AliasMiddleware) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1000

    for content in (b"x" * 5000, endless()):
        response = call(app, "POST", CHAT, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413
    assert app._app.calls == 0  # type: ignore[attr-defined]  # it is an Echo
    fits = json.dumps({"model": "acme", "pad": "x" * 4000}).encode()
    assert seen(call(app, "POST", CHAT, content=fits, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("state", ["missing", "torn", "empty", "folder"])
def test_a_broken_manifest_hurts_nothing_that_does_not_need_it(tmp_path: Path, state: str) -> None:
    path = tmp_path / "manifest.json"
    if state == "torn":
        path.write_text(manifest_json(example())[:-20])
    elif state == "empty":
        path.touch()
    elif state == "folder":
        path.mkdir()
    app = AliasMiddleware(Echo(), registry=tmp_path)
    for model in ("base", "acme@v1", "acme"):
        assert json.loads(seen(call(app, "POST", CHAT, json={"model": model}))["body"])["model"] == model
    assert seen(call(app, "GET", "/v1/models"))["path"] == "/v1/models"


def test_a_torn_manifest_leaves_the_last_good_one_in_force(app: AliasMiddleware, registry: Path) -> None:
    seen(call(app, "POST", CHAT, json={"model": "acme"}))
    (registry / "manifest.json").write_text("{")
    assert json.loads(seen(call(app, "POST", CHAT, json={"model": "acme"}))["body"])["model"] == "acme@v1"


@pytest.mark.parametrize("app", ["network"], indirect=True)
def test_a_disk_that_hangs_leaves_the_last_good_manifest_in_force_and_stops_nobody(
    app: AliasMiddleware, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a hard mount of NFS does: its `stat` never returns."""
    assert json.loads(seen(call(app, "POST", CHAT, json={"model": "acme"}))["body"])["model"] == "acme@v1"
    answers, stat, longest_s = threading.Event(), os.stat, 0.0

    def hangs(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(registry)):
            answers.wait()
        return stat(path, **options)

    async def others(stop: asyncio.Event) -> None:
        """Streams and health checks, which need the event loop and no registry."""
        nonlocal longest_s
        while not stop.is_set():
            begun = time.monotonic()
            await asyncio.sleep(0.001)
            longest_s = max(longest_s, time.monotonic() - begun)

    async def run() -> None:
        stop = asyncio.Event()
        watching = asyncio.create_task(others(stop))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
            for body in [{"model": "acme"}, {"model": "acme@v1"}, {"model": "base"}] * 5:
                response = await client.post(CHAT, json=body)
                assert response.status_code == 200
                assert response.headers.get("x-memupdate-alias") == ("acme" if body["model"] == "acme" else None)
            assert (await client.get("/health")).status_code == 200
        stop.set()
        await watching

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", hangs)
        begun = time.monotonic()
        asyncio.run(run())
        assert time.monotonic() - begun < 4 * WAIT_S, "only the first ones wait"
        assert longest_s < WAIT_S
        answers.set()
    write_manifest(registry / "manifest.json", with_alias(example(), "acme", "acme@v2"))
    assert json.loads(seen(call(app, "POST", CHAT, json={"model": "acme"}))["body"])["model"] == "acme@v2"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/adapters"),
        ("DELETE", "/adapters/acme@v1"),
        ("POST", "/invocations"),
        ("POST", "/pause"),
        ("POST", "/sleep"),
        ("POST", "/collective_rpc"),
        ("POST", "/update_weights"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/start_profile"),
        ("POST", "/scale_elastic_ep"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/v1//chat/completions"),
        ("POST", "/v1/responses/a/b/cancel"),
        ("POST", "/something-of-next-year"),
        ("PUT", CHAT),
        ("PATCH", CHAT),
        ("post", "/pause"),
        ("GET", "/server_info"),
    ],
)
def test_everything_else_needs_the_admin_token(app: AliasMiddleware, method: str, path: str) -> None:
    echo = app._app
    for headers in ({}, {"x-memupdate-admin-token": "wrong"}, {"x-memupdate-admin-token": ""}):
        response = call(app, method, path, headers=headers)
        assert response.status_code == 403
        assert response.json()["error"]["code"] == 403
    assert echo.calls == 0  # type: ignore[attr-defined]  # it is an Echo
    assert seen(call(app, method, path, headers={"X-Memupdate-Admin-Token": TOKEN}))["path"] == path


def test_without_a_token_nobody_is_admin(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMUPDATE_ADMIN_TOKEN", raising=False)
    app = AliasMiddleware(Echo(), registry=registry)
    assert call(app, "POST", "/pause", headers={"x-memupdate-admin-token": ""}).status_code == 403


def test_reading_routes_and_cancel_pass(app: AliasMiddleware) -> None:
    for method, path in (("GET", "/v1/models"), ("GET", "/health"), ("GET", "/metrics"), ("OPTIONS", CHAT)):
        assert seen(call(app, method, path))["path"] == path
    assert seen(call(app, "POST", "/v1/responses/resp_12-ab/cancel"))


def test_everything_comes_from_the_environment_by_default(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMUPDATE_REGISTRY", str(registry))
    monkeypatch.setenv("MEMUPDATE_ADMIN_TOKEN", TOKEN)
    monkeypatch.setenv("MEMUPDATE_MAX_BODY_BYTES", "64")
    app = AliasMiddleware(Echo())
    assert call(app, "POST", CHAT, json={"model": "acme", "pad": "x" * 100}).status_code == 413
    assert call(app, "POST", CHAT, json={"model": "acme"}).headers["x-memupdate-release"] == "acme@v1"
    assert call(app, "POST", "/pause", headers={"x-memupdate-admin-token": TOKEN}).status_code == 200


def test_the_mount_point_does_not_open_routes(app: AliasMiddleware) -> None:
    async def status(path: str) -> int:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "root_path": "/llm", "headers": []}
        await app(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(status("/llm/v1/chat/completions")) == 200
    assert asyncio.run(status("/llm/pause")) == 403
    assert asyncio.run(status("/llmpause")) == 403


def test_streams_pass_as_they_come_and_disconnects_are_heard(app: AliasMiddleware) -> None:
    async def run() -> None:
        echo = app._app
        assert isinstance(echo, Echo)
        sent: asyncio.Queue[Any] = asyncio.Queue()
        body = b'{"model": "acme", "stream": true}'
        incoming = [
            {"type": "http.request", "body": body[:10], "more_body": True},
            {"type": "http.request", "body": body[10:], "more_body": False},
        ]

        async def receive() -> Any:
            return incoming.pop(0)

        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "headers": [(b"content-type", b"application/json"), (b"x-stream", b"1")],
        }
        task = asyncio.create_task(app(scope, receive, sent.put))
        start = await asyncio.wait_for(sent.get(), 2)
        assert (b"x-memupdate-release", b"acme@v1") in start["headers"]
        for piece in (b"0", b"1", b"2"):
            # The application waits for us after each piece: it could not go on if anything were held back.
            assert (await asyncio.wait_for(sent.get(), 2))["body"] == piece
            assert sent.empty()
            echo.release_next.set()
        await asyncio.wait_for(task, 2)

    asyncio.run(run())


def test_a_client_that_leaves_mid_body_reaches_nobody(app: AliasMiddleware) -> None:
    async def run() -> None:
        incoming = [{"type": "http.request", "body": b'{"model"', "more_body": True}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return incoming.pop(0)

        async def send(message: Any) -> None:
            raise AssertionError(message)

        await app({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, send)

    asyncio.run(run())
    assert app._app.calls == 0  # type: ignore[attr-defined]  # it is an Echo


def test_websockets_are_closed_and_the_lifespan_passes() -> None:
    sent: list[Any] = []
    reached: list[str] = []

    async def inner(scope: Any, _receive: Any, _send: Any) -> None:
        reached.append(scope["type"])

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    guarded = AliasMiddleware(inner, admin_token=TOKEN)
    asyncio.run(guarded({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send))
    assert sent[0]["type"] == "websocket.close"
    asyncio.run(guarded({"type": "lifespan"}, receive, send))
    admin = [(b"x-memupdate-admin-token", TOKEN.encode())]
    asyncio.run(guarded({"type": "websocket", "path": "/v1/realtime", "headers": admin}, receive, send))
    assert reached == ["lifespan", "websocket"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=120)
@given(
    body=st.dictionaries(st.text(max_size=8), json_values, max_size=4),
    model=st.sampled_from(["acme", "base", "acme@v2"]),
)
def test_any_other_field_survives_the_rewriting(
    tmp_path_factory: pytest.TempPathFactory, body: dict[str, Any], model: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "shared-registry"
    if not folder.exists():
        write_manifest(folder / "manifest.json", example())
    app = AliasMiddleware(Echo(), registry=folder)
    sent = json.dumps({**body, "model": model})
    headers = {"content-type": "application/json"}
    told = seen(call(app, "POST", CHAT, content=sent.encode(), headers=headers))
    expected = {**json.loads(sent), "model": "acme@v1" if model == "acme" else model}
    assert repr(json.loads(told["body"].encode("latin-1"))) == repr(expected)  # repr, because NaN is not NaN.


@settings(max_examples=150)
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: f'{{"model": {text}}}'.encode()))
def test_no_body_makes_it_fail(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "hostile-registry"
    if not folder.exists():
        write_manifest(folder / "manifest.json", example())
    app = AliasMiddleware(Echo(), registry=folder)
    assert call(app, "POST", CHAT, content=content, headers={"content-type": "application/json"}).status_code in (
        200,
        404,
    )
