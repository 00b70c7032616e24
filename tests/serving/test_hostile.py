"""Hostile names, adapters, manifests and bodies against the resolver and the middleware in this process.

An audit hook watches: no file outside the registry is opened, nothing is unpickled, run or connected to.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import NAMES, mutated
from middleware_fixtures import BASE, CHAT, Echo, entry, write_registry
from serving_fixtures import SHAPES, add_release, entry_for, lora_tensors, write_adapter

from memupdate.facts.model import Fact
from memupdate.layout import COLLECTION_PATTERN, RELEASE_PATTERN, RegistryLayout
from memupdate.serving.access import Binding, rules_json
from memupdate.serving.manifest import (
    MATCHED,
    Canary,
    Manifest,
    ReleaseEntry,
    manifest_json,
    parse_manifest,
    read_manifest,
    with_alias,
    with_canary,
    with_release,
    write_manifest,
)
from memupdate.serving.matcher import matcher_json, terms_of
from memupdate.serving.middleware import AliasMiddleware
from memupdate.serving.vllm_plugin import ReleaseFinder
from memupdate.storage import file_sha256, text_sha256

KEY = "tenant-key"
_FORBIDDEN = (
    "pickle.find_class",
    "exec",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "socket.connect",
    "marshal.loads",
)
_watched: list[tuple[str, str]] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _watched.append((event, os.fsdecode(arguments[0])))
    elif event in _FORBIDDEN:
        _watched.append((event, repr(arguments)[:200]))


for _codec in ("8_sig", "16", "16_le", "16_be", "32", "32_le", "32_be"):
    importlib.import_module(f"encodings.utf_{_codec}")  # What Python itself loads late is no file of ours.
importlib.import_module("concurrent.futures.thread")
sys.addaudithook(_hook)  # For good: Python has no way to take one away; it does nothing unless a test watches.


@contextmanager
def nothing_but(registry: Path) -> Iterator[list[tuple[str, str]]]:
    """Fails if anything was opened that is not in `registry`, or anything forbidden happened, inside the block."""
    global _watched
    _watched = []
    try:
        yield _watched
    finally:
        seen, _watched = _watched, None
    root = os.path.realpath(registry)
    outside = [
        (event, what)
        for event, what in seen
        if event != "open" or os.path.commonpath([root, os.path.realpath(what)]) != root
    ]
    assert outside == []


def finder(registry: Path) -> ReleaseFinder:
    return ReleaseFinder(registry, max_rank=8, base_fingerprint=BASE)


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """Two good releases, and files outside that nobody may read."""
    folder = tmp_path / "registry"
    manifest = Manifest(BASE)
    for version in (1, 2):
        manifest = add_release(folder, manifest, f"acme@v{version}", seed=version)
    write_manifest(folder / "manifest.json", with_alias(manifest, "acme", "acme@v1"))
    write_adapter(tmp_path / "acme@v9")
    return folder


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").write_text("x")
    with pytest.raises(AssertionError, match="out"), nothing_but(tmp_path / "in"):
        (tmp_path / "out").read_text()
    with pytest.raises(AssertionError, match="pickle"), nothing_but(tmp_path / "in"):
        pickle.loads(pickle.dumps(Path("x")))


def test_no_name_reaches_a_file_outside(registry: Path) -> None:
    found = finder(registry)
    assert found.find("acme@v1", "no-folder") is not None
    with nothing_but(registry) as opened:
        for name in NAMES:
            assert found.find(name, "no-folder") is None, name[:80]
        assert opened == []
        assert found.find("acme@v2", "no-folder") is not None


def test_a_manifest_that_names_them_is_refused() -> None:
    good = json.loads(manifest_json(with_alias(with_release(Manifest(BASE), "acme@v1", entry(1)), "acme", "acme@v1")))
    for name in NAMES:
        assert RELEASE_PATTERN.fullmatch(name) is None
        with pytest.raises(ValueError, match="not a release name"):
            parse_manifest(json.dumps({**good, "releases": {**good["releases"], name: good["releases"]["acme@v1"]}}))
        if COLLECTION_PATTERN.fullmatch(name) is None:
            with pytest.raises(ValueError, match="not an alias"):
                parse_manifest(json.dumps({**good, "aliases": {name: good["aliases"]["acme"]}}))


class Bomb:
    def __reduce__(self) -> Any:
        return (os.system, ("touch owned",))


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
    return buffer.getvalue()


def not_a_number(folder: Path) -> None:
    tensors = lora_tensors(SHAPES, 4)
    next(iter(tensors.values()))[0, 0] = np.nan
    write_adapter(folder, tensors=tensors)


def swapped_shape(folder: Path) -> None:
    tensors = lora_tensors(SHAPES, 4)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    write_adapter(folder, tensors=tensors)


def with_file(name: str, content: bytes) -> Any:
    def make(folder: Path) -> None:
        write_adapter(folder)
        (folder / name).write_bytes(content)

    return make


def linked_weights(folder: Path) -> None:
    write_adapter(folder)
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder.parents[2] / "outside.safetensors")
    weights.symlink_to(folder.parents[2] / "outside.safetensors")


def linked_folder(folder: Path) -> None:
    write_adapter(folder.parents[2] / "outside")
    folder.symlink_to(folder.parents[2] / "outside")


def piped_weights(folder: Path) -> None:
    write_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def sparse_weights(folder: Path) -> None:
    write_adapter(folder)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)


ADAPTERS = {
    "a value that is not finite": not_a_number,
    "a wrong shape": swapped_shape,
    "a pickle beside": with_file("adapter_model.bin", pickle.dumps(Bomb())),
    "a pickle as weights": with_file("adapter_model.safetensors", pickle.dumps(Bomb())),
    "a pickle as matcher": with_file("matcher.json", pickle.dumps(Bomb())),
    "a zip bomb as weights": with_file("adapter_model.safetensors", zip_bomb()),
    "a zip bomb beside": with_file("pytorch_model.zip", zip_bomb()),
    "a header without end": with_file("adapter_model.safetensors", b"\xff" * 8 + b"{"),
    "a deep header": with_file("adapter_model.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000),
    "a deep configuration": with_file("adapter_config.json", b'{"a":' * 50_000),
    "code beside": with_file("modeling.py", b"open('owned', 'w')"),
    "a link as weights": linked_weights,
    "a link as folder": linked_folder,
    "a pipe as weights": piped_weights,
    "a terabyte of holes": sparse_weights,
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_no_such_adapter_is_loaded_and_the_others_go_on(registry: Path, what: str) -> None:
    layout = RegistryLayout(registry)
    folder = layout.release("acme@v3")
    ADAPTERS[what](folder)
    weights = folder / "adapter_model.safetensors"
    # The digests are right where that can be: whoever wrote the release wrote the manifest too.
    readable = weights.is_file() and weights.stat().st_size < 1 << 30
    digest = file_sha256(weights) if readable else text_sha256("?")
    config = file_sha256(folder / "adapter_config.json")
    manifest = read_manifest(layout.manifest)
    write_manifest(layout.manifest, with_release(manifest, "acme@v3", ReleaseEntry(digest, config, 4, 3, BASE)))
    found = finder(registry)
    with nothing_but(registry):
        loaded = found.find("acme@v3", "no-folder")
        assert found.find("acme@v3", "no-folder") == loaded
        assert found.find("acme@v1", "no-folder") is not None
    # A matcher is data that the middleware checks by its own digest; vLLM never looks at it.
    assert (loaded is not None) == (what == "a pickle as matcher")
    assert not Path("owned").exists()


def test_a_swapped_digest_is_refused_until_it_is_swapped_back(registry: Path) -> None:
    layout = RegistryLayout(registry)
    one, two = (layout.release(f"acme@v{version}") / "adapter_model.safetensors" for version in (1, 2))
    good, other = one.read_bytes(), two.read_bytes()
    found = finder(registry)
    with nothing_but(registry):
        assert found.find("acme@v1", "no-folder") is not None
        one.write_bytes(other)
        assert found.find("acme@v1", "no-folder") is None
        one.write_bytes(good)
        assert found.find("acme@v1", "no-folder") == (entry_for(one.parent, 1), one.parent)


def ask(app: AliasMiddleware, path: str, body: bytes, *headers: tuple[bytes, bytes]) -> Any:
    """One request straight through the ASGI interface: (status, what the application was sent, or None)."""

    async def run() -> tuple[int, bytes | None]:
        sent: list[Any] = []
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return incoming.pop(0) if incoming else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        given = [(b"content-type", b"application/json"), (b"authorization", b"Bearer " + KEY.encode()), *headers]
        scope = {"type": "http", "method": "POST", "path": path, "headers": given}
        await app(scope, receive, send)
        reply = b"".join(message.get("body", b"") for message in sent[1:])
        status = sent[0]["status"]
        return status, json.loads(reply)["body"].encode("latin-1") if status == 200 else None

    return asyncio.run(run())


def app_of(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> AliasMiddleware:
    """The middleware over a registry of two tenants, plain, with canary and routing, or with bound keys."""
    write_registry(folder)
    path = folder / "manifest.json"
    if kind != "plain":
        file = folder / "releases" / "acme@v1" / "matcher.json"
        file.parent.mkdir(parents=True)
        file.write_text(matcher_json(terms_of([Fact("Who leads the house?", "x", subject="the house")])))
        manifest = read_manifest(path)
        value = json.loads(manifest_json(manifest))
        value["releases"]["acme@v1"]["matcher_digest"] = file_sha256(file)
        manifest = with_alias(parse_manifest(json.dumps(value)), "acme", "acme@v1", route=MATCHED)
        write_manifest(path, with_canary(manifest, "acme", Canary("acme@v2", 0.3)))
    if kind == "keys":
        binding = Binding(frozenset({"acme"}))
        (folder / "access.json").write_text(rules_json([(hashlib.sha256(KEY.encode()).hexdigest(), binding)]))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return AliasMiddleware(Echo(), registry=folder, base_model="tiny", max_body_bytes=1 << 20)


@pytest.mark.parametrize(("kind", "number"), [("plain", 3000), ("routed", 3500), ("keys", 3500)])
def test_ten_thousand_mutated_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int) -> None:
    app = app_of(kind, tmp_path, monkeypatch)
    good = json.dumps({"model": "acme", "messages": [{"role": "user", "content": "the house"}]}).encode()
    assert ask(app, CHAT, good)[0] == 200
    statuses: dict[int, int] = {}
    with nothing_but(tmp_path):
        for route, body in mutated(number, seed=number):
            status, reached = ask(app, route, body)
            statuses[status] = statuses.get(status, 0) + 1
            if reached is None or reached == body:
                assert kind != "keys" or reached is None or model_in(body) in ("acme@v1", "acme@v2", "tiny", None)
                continue
            # Rewritten: an alias, now one of its releases or the base model, all else as it was.
            before, after = json.loads(body), json.loads(reached)
            assert before.pop("model") in ("acme", "globex")
            assert after.pop("model") in ("acme@v1", "acme@v2", "globex@v1", "tiny")
            if route == "/v1/responses" and "request_id" not in before:
                # Which side of the route `matched` answers is told to later turns by the response's id.
                assert (after.pop("request_id", None) is not None) == (kind != "plain")
            assert repr(before) == repr(after)
    assert set(statuses) <= {200, 400, 404}
    assert statuses[200] > number / 20
    assert statuses[404] > (number / 20 if kind == "keys" else 5)  # Otherwise unknown names are vLLM's to answer.
    assert ask(app, CHAT, good)[0] == 200


def model_in(body: bytes) -> object:
    return json.loads(body).get("model")


def test_hostile_models_headers_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_of("keys", tmp_path, monkeypatch)
    with nothing_but(tmp_path):
        for name in NAMES:
            status, _ = ask(app, CHAT, json.dumps({"model": name}).encode())
            assert status == (413 if len(json.dumps(name)) > 1 << 20 else 404), name[:80]
        for key in (b"\xff" * 100_000, b"\x00", b"Bearer", b"Basic x"):
            assert ask(app, CHAT, b'{"model": "acme"}', (b"x-memupdate-session", key))[0] == 200
        no_key = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"authorization", b"Bearer \xff\x00")]}
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(app(no_key, receive, send))
        assert sent[0]["status"] == 401


def test_a_manifest_cut_off_at_every_byte_interrupts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_of("routed", tmp_path, monkeypatch)
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    body = json.dumps({"model": "globex", "prompt": "x"}).encode()
    assert model_in(ask(app, CHAT, body)[1]) == "globex@v1"
    with nothing_but(tmp_path):
        for length in range(len(whole) - 1):
            path.unlink()
            path.write_bytes(whole[:length])
            assert model_in(ask(app, CHAT, body)[1]) == "globex@v1", length
            if length % 7 == 0:  # An engine that starts just now knows no alias; what names a release goes on.
                fresh = AliasMiddleware(Echo(), registry=tmp_path, base_model="tiny")
                assert model_in(ask(fresh, CHAT, body)[1]) == "globex"
                assert finder(tmp_path).find("globex@v1", "no-folder") is None
        path.write_bytes(whole)
        assert model_in(ask(app, CHAT, body)[1]) == "globex@v1"
