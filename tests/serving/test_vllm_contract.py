"""The two interfaces of vLLM that we use, held against the installed one: an upgrade that breaks them fails here."""

from __future__ import annotations

import asyncio
import inspect
import json
import tomllib
from argparse import Namespace
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from middleware_fixtures import CHAT
from serving_fixtures import BASE, add_release

from memupdate.errors import EngineError
from memupdate.layout import RegistryLayout
from memupdate.serving import compat
from memupdate.serving.access import Binding, rules_json
from memupdate.serving.compat import check_vllm_version, engine_installed, supported_range
from memupdate.serving.engine import MIDDLEWARE, PLUGIN_GROUP, PLUGIN_NAME
from memupdate.serving.manifest import Manifest, with_alias, write_manifest

ROOT = Path(__file__).parents[2]
needs_vllm = pytest.mark.skipif(engine_installed() is None, reason="vLLM is not installed")


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0", "0.9.2", "unknown"])
def test_another_version_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(compat, "engine_installed", lambda: "vllm")
    monkeypatch.setattr(compat.metadata, "version", lambda _name: version)
    with pytest.raises(EngineError, match=r"works with vLLM >=0\.32,<0\.34") as caught:
        check_vllm_version()
    assert version in caught.value.message
    assert 'pip install "vllm>=0.32,<0.34"' in caught.value.hint


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.0rc1"])
def test_supported_versions_pass(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(compat, "engine_installed", lambda: "vllm")
    monkeypatch.setattr(compat.metadata, "version", lambda _name: version)
    assert check_vllm_version() == version


def test_without_one_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "engine_installed", lambda: None)
    with pytest.raises(EngineError, match="not installed"):
        check_vllm_version()


def test_what_pip_installs_is_the_range() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["gpu"] == [f"vllm{supported_range()}"]


@needs_vllm
def test_the_installed_one_is_supported() -> None:
    assert check_vllm_version()


@needs_vllm
def test_the_resolver_is_found_and_asked_as_we_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    assert DEFAULT_PLUGINS_GROUP == PLUGIN_GROUP
    (point,) = metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN_NAME)
    assert list(inspect.signature(LoRAResolver.resolve_lora).parameters) == ["self", "base_model_name", "lora_name"]
    assert inspect.iscoroutinefunction(LoRAResolver.resolve_lora)

    manifest = add_release(tmp_path, Manifest(BASE), "acme@v1")
    write_manifest(RegistryLayout(tmp_path).manifest, manifest)
    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    monkeypatch.delenv("MEMUPDATE_REGISTRY", raising=False)
    point.load()()
    assert set(LoRAResolverRegistry.get_supported_resolvers()) == set()
    monkeypatch.setenv("MEMUPDATE_REGISTRY", str(tmp_path))
    point.load()()
    point.load()()
    assert set(LoRAResolverRegistry.get_supported_resolvers()) == {"memupdate"}
    resolver = LoRAResolverRegistry.get_resolver("memupdate")
    found = asyncio.run(resolver.resolve_lora("base", "acme@v1"))
    assert isinstance(found, LoRARequest)
    assert (found.lora_name, found.lora_int_id) == ("acme@v1", 1)
    assert found.lora_path == str(RegistryLayout(tmp_path).release("acme@v1").resolve())
    assert asyncio.run(resolver.resolve_lora("base", "acme@v2")) is None


@needs_vllm
def test_the_middleware_is_put_in_front_of_vllms_own_key_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own code builds the application: ours must come first, and metrics end up where vLLM serves them."""
    import hashlib

    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    manifest = with_alias(add_release(tmp_path, Manifest(BASE), "acme@v1"), "acme", "acme@v1")
    write_manifest(RegistryLayout(tmp_path).manifest, manifest)
    digest = hashlib.sha256(b"tenant").hexdigest()
    (tmp_path / "access.json").write_text(rules_json([(digest, Binding(frozenset({"acme"})))]))
    monkeypatch.setenv("MEMUPDATE_REGISTRY", str(tmp_path))
    monkeypatch.setenv("VLLM_API_KEY", "operator")
    app = FastAPI()

    async def chat(request: Request) -> JSONResponse:
        return JSONResponse(await request.json())

    app.add_route(CHAT, chat, methods=["POST"])
    arguments = Namespace(
        allowed_origins=["*"],
        allow_credentials=False,
        allowed_methods=["*"],
        allowed_headers=["*"],
        api_key=None,
        enable_request_id_headers=False,
        middleware=[MIDDLEWARE],
    )
    init_entrypoints_middleware(arguments, app, ())

    async def ask(key: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
            return await client.post(CHAT, json={"model": "acme"}, headers={"authorization": f"Bearer {key}"})

    for key in ("tenant", "operator"):
        answer = asyncio.run(ask(key))
        assert (answer.status_code, answer.json()) == (200, {"model": "acme@v1"})
    assert asyncio.run(ask("other")).status_code == 401
    names = {family.name for family in get_prometheus_registry().collect()}
    assert {"memupdate_requests", "memupdate_flips", "memupdate_refusals", "memupdate_routed"} <= names
    assert json.loads(rules_json([]))["keys"] == []
