"""The two interfaces of vLLM that we use, held against the installed one: an upgrade that breaks them fails here."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import json
import logging
import sys
import tomllib
from argparse import Namespace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest
from middleware_fixtures import CHAT
from serving_fixtures import BASE, add_release

from memupdate.errors import EngineError
from memupdate.layout import RegistryLayout
from memupdate.serving import compat, vllm_plugin
from memupdate.serving.access import Binding, rules_json
from memupdate.serving.compat import check_vllm_version, engine_installed, supported_range
from memupdate.serving.conversation import new_response_id, side_of
from memupdate.serving.engine import MIDDLEWARE, PLUGIN_GROUP, PLUGIN_NAME
from memupdate.serving.manifest import Manifest, with_alias, write_manifest
from memupdate.serving.middleware import INFERENCE_ROUTES

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


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A vLLM that nothing is registered with yet, of the version in `__version__`."""
    fake = MagicMock(__version__="0.32.0")
    fake.lora.resolver.LoRAResolver = object
    fake.lora.resolver.LoRAResolverRegistry.get_supported_resolvers.return_value = set()
    for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver"):
        module = fake
        for part in name.split(".")[1:]:
            module = getattr(module, part)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("MEMUPDATE_REGISTRY", str(tmp_path))
    # vLLM's loggers hand nothing on to the root, where pytest listens.
    monkeypatch.setattr(vllm_plugin, "_logger", lambda: logging.getLogger("tested"))
    return fake


@pytest.mark.parametrize(("version", "is_told"), [("0.32.1", False), ("0.34.0", True), ("1.0.0.dev7+g1", True)])
def test_an_untried_vllm_is_told_in_its_own_log_and_goes_on(
    fake_vllm: MagicMock, caplog: pytest.LogCaptureFixture, version: str, is_told: bool
) -> None:
    """An operator's own vLLM, and the images, come without `serve`, which refuses to start it."""
    fake_vllm.__version__ = version
    vllm_plugin.register()
    assert fake_vllm.lora.resolver.LoRAResolverRegistry.register_resolver.called
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == is_told
    assert all(version in line and supported_range() in line for line in told)


@pytest.mark.parametrize("what", ["registry", "class", "import"])
def test_a_resolver_that_cannot_be_registered_is_an_error_that_says_what_to_do_and_no_end_of_the_engine(
    fake_vllm: MagicMock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """vLLM calls us without a net: what we raise would end its start."""
    if what == "registry":
        fake_vllm.lora.resolver.LoRAResolverRegistry.register_resolver.side_effect = TypeError("another signature")
    elif what == "class":
        del fake_vllm.lora.resolver.LoRAResolver
    else:
        monkeypatch.setitem(sys.modules, "vllm.lora.resolver", None)
    vllm_plugin.register()
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info is not None
    assert "404" in record.getMessage()
    assert f"Install vLLM {supported_range()}" in record.getMessage()


ADMIN_ROUTES = frozenset(
    {
        "/abort_requests",
        "/adapters",
        "/adapters/{adapter_name}",
        "/cohere/v2/chat/render",
        "/collective_rpc",
        "/fault_tolerance/apply",
        "/finish_weight_update",
        "/inference/v1/abort_requests",
        "/inference/v1/generate",
        "/init_weight_transfer_engine",
        "/invocations",
        "/is_scaling_elastic_ep",
        "/pause",
        "/ping",
        "/release_kv_cache_memory",
        "/reset_encoder_cache",
        "/reset_mm_cache",
        "/reset_prefix_cache",
        "/resume",
        "/scale_elastic_ep",
        "/shutdown_weight_transfer_engine",
        "/sleep",
        "/start_draft_weight_update",
        "/start_profile",
        "/start_weight_update",
        "/stop_profile",
        "/update_weight_version",
        "/update_weights",
        "/v1/chat/completions/derender",
        "/v1/chat/completions/render",
        "/v1/completions/derender",
        "/v1/completions/render",
        "/v1/load_lora_adapter",
        "/v1/messages/render",
        "/v1/realtime",
        "/v1/responses/render",
        "/v1/unload_lora_adapter",
        "/wake_up",
        "/weight_checker",
    }
)
"""Routes of vLLM that change something, or that were looked at and are not for clients."""
CANCEL = "/v1/responses/{response_id}/cancel"
READING_ROUTES = frozenset(
    {
        "/",
        "/docs",
        "/docs/oauth2-redirect",
        "/fault_tolerance/status",
        "/get_world_size",
        "/health",
        "/is_paused",
        "/is_sleeping",
        "/kv_event_sources",
        "/load",
        "/metrics",
        "/openapi.json",
        "/ping",
        "/ready",
        "/readyz",
        "/redoc",
        "/server_info",
        "/tokenizer_info",
        "/v1/models",
        "/v1/responses/{response_id}",
        "/version",
        "/weight_info",
    }
)
_READS, _ROUTED = {"get", "head"}, {"get", "head", "post", "put", "patch", "delete", "websocket"}


def written_routes(root: Path) -> set[tuple[str, str]]:
    """(method, path) of every route in vLLM's source, also of those that only some models or flags switch on."""
    found: set[tuple[str, str]] = set()
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
                continue
            receiver, method, path = ast.unparse(node.func.value), node.func.attr, node.args[0]
            if not receiver.endswith(("router", "app")) or not isinstance(path, ast.Constant):
                continue
            if method in _ROUTED:
                found.add((method, path.value))
            elif method in {"add_api_route", "add_route", "api_route", "route"}:
                listed = next((ast.literal_eval(k.value) for k in node.keywords if k.arg == "methods"), ["GET"])
                found |= {(name.lower(), path.value) for name in listed}
    return found


def built_routes(routes: list[Any]) -> set[tuple[str, str]]:
    """(method, path) of every route of an application, as vLLM's own code and what it installs put it together."""
    found: set[tuple[str, str]] = set()
    for route in routes:
        names = getattr(route, "methods", None) or (["websocket"] if "WebSocket" in type(route).__name__ else [])
        found |= {(name.lower(), route.path) for name in names}
        if not names:
            found |= built_routes(getattr(route, "routes", None) or [])
    return found


def held(routes: set[tuple[str, str]]) -> None:
    """A route that is in no list is one that nobody has looked at yet."""
    changing = {path for method, path in routes if method not in _READS}
    assert changing - INFERENCE_ROUTES - ADMIN_ROUTES == {CANCEL}, "open to clients, or not?"
    assert {path for method, path in routes if method in _READS} <= READING_ROUTES, "may everybody read it?"


@needs_vllm
def test_every_route_that_vllm_has_was_looked_at() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    routes = written_routes(Path(spec.submodule_search_locations[0]) / "entrypoints")
    held(routes)
    posted = {path for method, path in routes if method == "post"}
    assert posted >= INFERENCE_ROUTES, "one that vLLM does not have any more"
    assert not INFERENCE_ROUTES & ADMIN_ROUTES


@needs_vllm
def test_so_was_every_route_of_the_application_that_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that vLLM brings along add routes of their own."""
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.delenv("MEMUPDATE_REGISTRY", raising=False)
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.tasks import FRONTEND_TASKS, GENERATION_TASKS, POOLING_TASKS
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out"])
    app = build_app(arguments, (*GENERATION_TASKS, *POOLING_TASKS, *FRONTEND_TASKS), MagicMock())
    routes = built_routes(app.routes)
    held(routes)
    assert {("post", "/v1/chat/completions"), ("post", "/v1/load_lora_adapter"), ("post", "/sleep")} <= routes


@needs_vllm
def test_the_id_that_a_request_brings_is_its_responses() -> None:
    """By it a later turn tells which side of the route `matched` answered."""
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse

    given = new_response_id("base")
    request = ResponsesRequest.model_validate({"model": "m", "input": "x", "request_id": given})
    response = ResponsesResponse.from_request(
        request, request.to_sampling_params(8), model_name="m", created_time=0, output=[], status="completed"
    )
    assert (response.id, side_of(response.id)) == (given, "base")
    later = ResponsesRequest.model_validate({"model": "m", "input": "y", "previous_response_id": given})
    assert side_of(later.previous_response_id) == "base"
    assert side_of(ResponsesRequest.model_validate({"model": "m", "input": "x"}).request_id) is None


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
