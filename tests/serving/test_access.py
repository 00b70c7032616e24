"""Keys bound to collections: what one tenant's key opens, and that nothing of another's shows."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from middleware_fixtures import CHAT, Echo, call, seen, write_registry

from memupdate.serving import middleware
from memupdate.serving.access import EVERYTHING, Binding, parse_rules, rules_json
from memupdate.serving.manifest import Canary, read_manifest, with_canary, write_manifest
from memupdate.serving.middleware import INFERENCE_ROUTES, AliasMiddleware

ACME, GLOBEX, BASE_LESS, OPERATOR = "key-of-acme", "key-of-globex", "key-without-base", "operator"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


RULES = [
    (digest(ACME), Binding(frozenset({"acme"}))),
    (digest(GLOBEX), Binding(frozenset({"globex"}))),
    (digest(BASE_LESS), Binding(frozenset({"acme"}), base_model=False)),
]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    write_registry(tmp_path)
    (tmp_path / "access.json").write_text(rules_json(RULES))
    return tmp_path


@pytest.fixture
def app(registry: Path, monkeypatch: pytest.MonkeyPatch) -> AliasMiddleware:
    monkeypatch.setenv("VLLM_API_KEY", OPERATOR)
    return AliasMiddleware(Echo(), registry=registry, base_model="base")


def ask(app: AliasMiddleware, model: object, key: str | None, path: str = CHAT, **headers: str) -> httpx.Response:
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return call(app, "POST", path, json={"model": model, "prompt": "x"}, headers=headers)


@pytest.mark.parametrize("path", sorted(INFERENCE_ROUTES))
def test_a_key_opens_its_own_collections_only(app: AliasMiddleware, path: str) -> None:
    for model in ("acme", "acme@v1", "acme@v2", "base"):
        assert ask(app, model, ACME, path).status_code == 200
    for model in ("globex", "globex@v1", "globex@v2", "globex@v77", "other-lora", "../acme"):
        response = ask(app, model, ACME, path)
        assert response.status_code == 404
        assert response.json()["error"]["message"] == f"The model `{model}` does not exist."
        assert not {"x-memupdate-release", "x-memupdate-alias"} & set(response.headers)
    assert ask(app, "globex", GLOBEX, path).headers["x-memupdate-release"] == "globex@v1"
    for key in (None, "wrong", "", digest(ACME)):
        assert ask(app, "acme", key, path).status_code == 401


def test_unpublished_releases_of_another_look_like_none_at_all(app: AliasMiddleware) -> None:
    there, nowhere = ask(app, "globex@v2", ACME), ask(app, "globex@v3", ACME)
    assert there.status_code == nowhere.status_code == 404
    assert there.text.replace("v2", "v3") == nowhere.text
    assert dict(there.headers) == dict(nowhere.headers)


def test_the_operator_may_ask_everything_and_vllm_sees_only_its_own_key(app: AliasMiddleware) -> None:
    for model in ("acme", "globex@v2", "base", "other-lora"):
        assert ask(app, model, OPERATOR).status_code in ((200,) if model != "other-lora" else (404,))
    told = seen(ask(app, "acme", ACME))
    assert told["headers"]["authorization"] == f"Bearer {OPERATOR}"
    assert ACME not in json.dumps(told)
    by_anthropic = call(app, "POST", "/v1/messages", json={"model": "acme"}, headers={"x-api-key": ACME})
    assert by_anthropic.status_code == 200


def test_the_base_model_may_be_closed(app: AliasMiddleware) -> None:
    assert ask(app, "acme", BASE_LESS).status_code == 200
    assert ask(app, "base", BASE_LESS).status_code == 404
    assert ask(app, None, BASE_LESS).status_code == 404
    assert ask(app, None, ACME).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": ["acme"]}', b'{"model": 1}', b"\xff\xfe"])
def test_what_cannot_be_told_does_not_pass_where_keys_are_bound(app: AliasMiddleware, content: bytes) -> None:
    headers = {"authorization": f"Bearer {ACME}", "content-type": "application/json"}
    assert call(app, "POST", CHAT, content=content, headers=headers).status_code == 400
    headers["content-type"] = "text/plain"
    assert call(app, "POST", CHAT, content=content, headers=headers).status_code == 415
    assert app._app.calls == 0  # type: ignore[attr-defined]  # it is an Echo


def test_sound_passes_as_a_form_only_where_no_keys_are_bound(app: AliasMiddleware, registry: Path) -> None:
    path, form = "/v1/audio/transcriptions", b"--x\r\n\r\nsound\r\n--x--"
    headers = {"authorization": f"Bearer {ACME}", "content-type": "multipart/form-data; boundary=x"}
    assert call(app, "POST", path, content=form, headers=headers).status_code == 415
    (registry / "access.json").unlink()
    opened = AliasMiddleware(Echo(), registry=registry, base_model="base")
    assert seen(call(opened, "POST", path, content=form, headers=headers))["body"].encode() == form


def test_a_canary_of_a_collection_is_open_with_it(app: AliasMiddleware, registry: Path) -> None:
    path = registry / "manifest.json"
    write_manifest(path, with_canary(read_manifest(path), "acme", Canary("acme@v2", 0.5)))
    releases = {
        ask(app, "acme", ACME, **{"x-memupdate-session": f"{n}"}).headers["x-memupdate-release"] for n in range(32)
    }
    assert releases == {"acme@v1", "acme@v2"}


def test_the_list_of_models_shows_only_what_is_open(registry: Path) -> None:
    listed = {"object": "list", "data": [{"id": name} for name in ("base", "acme@v1", "globex@v1", "globex@v2", "x")]}

    async def models(_scope: Any, _receive: Any, send: Any) -> None:
        body = json.dumps(listed).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body[:20], "more_body": True})
        await send({"type": "http.response.body", "body": body[20:]})

    app = AliasMiddleware(models, registry=registry, base_model="base")

    def names(key: str) -> list[str]:
        response = call(app, "GET", "/v1/models", headers={"authorization": f"Bearer {key}"})
        return [model["id"] for model in response.json()["data"]]

    assert names(ACME) == ["base", "acme@v1"]
    assert names(GLOBEX) == ["base", "globex@v1", "globex@v2"]
    assert names(BASE_LESS) == ["acme@v1"]
    assert call(app, "GET", "/v1/models").status_code == 401
    assert call(app, "GET", "/v1/responses/resp_1").status_code == 401
    assert call(app, "POST", "/v1/responses/resp_1/cancel").status_code == 401
    assert call(app, "GET", "/health").status_code == 200
    assert call(app, "OPTIONS", "/v1/models").status_code == 200


def test_rules_that_break_or_go_stay_in_force(app: AliasMiddleware, registry: Path) -> None:
    assert ask(app, "globex", ACME).status_code == 404
    file = registry / "access.json"
    for change in (lambda: file.write_text("{"), file.unlink):
        change()
        assert ask(app, "globex", ACME).status_code == 404
        assert ask(app, "acme", ACME).status_code == 200
        assert ask(app, "acme", None).status_code == 401
    file.write_text(rules_json(RULES[1:]))
    assert ask(app, "acme", ACME).status_code == 401


@pytest.mark.parametrize("state", ["torn", "missing though demanded", "folder"])
def test_without_readable_rules_nobody_is_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    write_registry(tmp_path)
    if state == "torn":
        (tmp_path / "access.json").write_text(rules_json(RULES)[:-9])
    elif state == "folder":
        (tmp_path / "access.json").mkdir()
    else:
        monkeypatch.setenv("MEMUPDATE_ACCESS", str(tmp_path / "elsewhere.json"))
    app = AliasMiddleware(Echo(), registry=tmp_path)
    assert ask(app, "acme", ACME).status_code == 503
    assert call(app, "GET", "/v1/models").status_code == 503
    assert call(app, "GET", "/health").status_code == 200


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_rules_that_cannot_be_read_for_a_moment_open_nothing_and_are_read_when_they_can(
    app: AliasMiddleware, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, "for a moment")

    for broken in (("stat", "lstat"), ("stat",), ()):
        with monkeypatch.context() as patched:
            for name in broken:
                patched.setattr(os, name, fails)
            patched.setattr(Path, "open", fails)
            for key in (ACME, None):
                assert ask(app, "acme", key).status_code == 503
    assert ask(app, "acme", ACME).status_code == 200
    assert ask(app, "acme", None).status_code == 401


def test_while_nobody_can_tell_whether_there_are_rules_nobody_is_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs from the start."""
    write_registry(tmp_path)
    answers = threading.Event()
    lstat = os.lstat

    def hangs(path: object, **options: Any) -> os.stat_result:
        if str(path).endswith("access.json"):
            answers.wait()
        return lstat(path, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(middleware, "may_hang", lambda *_: True)
    app = AliasMiddleware(Echo(), registry=tmp_path)
    monkeypatch.setattr(os, "lstat", hangs)
    assert ask(app, "acme", None).status_code == 503
    assert call(app, "GET", "/health").status_code == 200
    answers.set()
    deadline = time.monotonic() + 10
    while ask(app, "acme", None).status_code != 200:  # there are none
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"keys": {}},
        {"keys": [{"sha256": digest(ACME), "collections": ["acme"]}]},
        {"keys": [{"sha256": ACME, "collections": ["acme"], "base_model": True}]},
        {"keys": [{"sha256": digest(ACME), "collections": ["../acme"], "base_model": True}]},
        {"keys": [{"sha256": digest(ACME), "collections": "acme", "base_model": True}]},
        {"keys": [{"sha256": digest(ACME), "collections": ["acme"], "base_model": 1}]},
    ],
)
def test_malformed_rules_are_refused_whole(change: dict[str, object]) -> None:
    whole = json.loads(rules_json(RULES))
    with pytest.raises(ValueError, match=r"keys|schema_version"):
        parse_rules(json.dumps({**whole, **change}).encode())


def test_rules_read_back_as_they_were_written() -> None:
    rules = parse_rules(rules_json([*RULES, (digest("all"), EVERYTHING)]).encode())
    assert rules.binding_of(ACME.encode()) == RULES[0][1]
    assert rules.binding_of(b"all") == EVERYTHING
    assert rules.binding_of(b"") is None


def test_no_event_loop_is_needed_to_make_one(registry: Path) -> None:
    made = AliasMiddleware(Echo(), registry=registry)
    assert asyncio.run(_status(made)) == 401


async def _status(app: AliasMiddleware) -> int:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
        return (await client.post(CHAT, json={"model": "acme"})).status_code
