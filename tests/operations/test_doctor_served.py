"""`doctor --served`: the real middleware behind a real HTTP server, in front of an application with vLLM's routes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import generate_latest

from memupdate.errors import ExitCode
from memupdate.operations.doctor_served import Expected, examine_served
from memupdate.operations.findings import DoctorReport, Finding
from memupdate.serving.env import MAX_RANK_ENV
from memupdate.serving.manifest import Manifest, ReleaseEntry, with_alias, with_release, write_manifest
from memupdate.serving.middleware import AliasMiddleware

DIGEST = "sha256:" + "b" * 64


@dataclass
class Behaviour:
    version: str = "0.32.0"
    health: int = 200
    date: str | None = None
    has_plugins: bool = True


def vllm_routes(behaviour: Behaviour) -> FastAPI:
    """The routes of vLLM that `doctor` looks at, answered in vLLM's forms."""
    app = FastAPI()

    def error(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "NotFoundError", "code": status}}, status)

    @app.get("/health")
    def health() -> PlainTextResponse:
        headers = {"date": behaviour.date} if behaviour.date else {}
        return PlainTextResponse("", behaviour.health, headers=headers)

    @app.get("/version")
    def version() -> dict[str, str]:
        return {"version": behaviour.version}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "tiny"}]}

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest().decode() if behaviour.has_plugins else "vllm:x 1\n")

    @app.post("/v1/completions")
    async def complete(request: Request) -> Any:
        model = json.loads(await request.body())["model"]
        if model != "tiny" and not (behaviour.has_plugins and "@v" in model):
            return error(404, f"The model `{model}` does not exist.")
        return {"model": model, "choices": [{"text": "x", "finish_reason": "length"}]}

    @app.post("/v1/load_lora_adapter")
    def load() -> JSONResponse:
        return error(404, "Loading lora memupdate-doctor failed: No adapter found")

    return app


@contextmanager
def listening(app: Any, *, own_date: bool = False) -> Iterator[str]:
    """`app` behind uvicorn, as vLLM is."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="error", date_header=not own_date, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    manifest = with_release(Manifest(DIGEST), "acme@v1", ReleaseEntry(DIGEST, DIGEST, 8, 1, DIGEST))
    write_manifest(tmp_path / "manifest.json", with_alias(manifest, "acme", "acme@v1"))
    monkeypatch.setenv(MAX_RANK_ENV, "16")
    return tmp_path


def behind_middleware(registry: Path, behaviour: Behaviour) -> AliasMiddleware:
    return AliasMiddleware(vllm_routes(behaviour), registry=registry, base_model="tiny")


def expected(*, generation: int = 2, release: str = "acme@v1", max_rank: int = 8) -> Expected:
    return Expected(generation, {"acme": (release,)}, {"acme": "Who?"}, max_rank)


def bad(report: DoctorReport) -> dict[str, Finding]:
    return {finding.area: finding for finding in report.findings if finding.status != "ok"}


def test_an_engine_as_serve_starts_it_is_well(registry: Path) -> None:
    with listening(behind_middleware(registry, Behaviour())) as url:
        report = examine_served(url, expected=expected())
    assert bad(report) == {}
    assert report.exit_code == ExitCode.OK
    told = {finding.area: finding.what for finding in report.findings}
    assert told["alias acme"] == "answered by acme@v1"
    assert told["rank"] == "up to 16; the releases need 8"
    assert told["admin routes"].startswith("closed; ")


def test_every_difference_from_the_workspace_is_told(registry: Path) -> None:
    with listening(behind_middleware(registry, Behaviour(version="0.99.1"))) as url:
        report = examine_served(url, expected=expected(generation=7, release="acme@v2", max_rank=32))
    assert set(bad(report)) == {"version", "alias acme", "registry", "rank"}
    assert "answered by acme@v1, should be acme@v2" in bad(report)["alias acme"].what
    assert "generation 2, the workspace at 7" in bad(report)["registry"].what
    assert all(finding.mend for finding in bad(report).values())
    assert report.exit_code == ExitCode.UNREACHABLE


def test_an_engine_without_our_flags_is_open_and_knows_no_alias() -> None:
    with listening(vllm_routes(Behaviour(has_plugins=False))) as url:
        report = examine_served(url, expected=expected())
    found = bad(report)
    assert "POST /v1/load_lora_adapter" in found["admin routes"].what
    assert "/invocations" not in found["admin routes"].what  # not a route of this engine
    assert {"alias acme", "LoRA", "plug-ins"} <= set(found)
    assert report.exit_code == ExitCode.UNREACHABLE


def keyed(app: Any, *, shows_models: bool) -> Any:
    """Behind vLLM's own check of keys, which comes before it looks at a route; a proxy may let the list of models through."""

    async def checked(scope: Any, receive: Any, send: Any) -> None:
        is_open = not scope["path"].startswith("/v1/") or (shows_models and scope["path"] == "/v1/models")
        if is_open or (b"authorization", b"Bearer client") in scope["headers"]:
            await app(scope, receive, send)
        else:
            await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)

    return checked


def test_a_clients_key_opens_what_no_middleware_closes(registry: Path) -> None:
    plain = vllm_routes(Behaviour(has_plugins=False))
    with listening(keyed(plain, shows_models=True)) as url:
        known = bad(examine_served(url, api_key="client"))["admin routes"]
        untold = bad(examine_served(url))["admin routes"]
        wrong = bad(examine_served(url, api_key="another"))["admin routes"]
    assert (known.status, known.what) == ("fail", "open without the admin token: POST /v1/load_lora_adapter")
    assert untold.status == wrong.status == "warn"
    assert "cannot be told whether a client's key opens POST /v1/load_lora_adapter" in untold.what
    assert "asks for a client's key" in untold.what
    assert "refuses the key" in wrong.what
    with listening(keyed(plain, shows_models=False)) as url:
        (finding,) = examine_served(url).findings
    assert (finding.area, finding.status) == ("reachable", "fail")
    assert "401" in finding.what
    with listening(keyed(behind_middleware(registry, Behaviour()), shows_models=False)) as url:
        assert "admin routes" not in bad(examine_served(url, api_key="client", expected=expected()))


def test_an_unknown_engine_is_looked_at_without_a_workspace(registry: Path) -> None:
    with listening(behind_middleware(registry, Behaviour())) as url:
        report = examine_served(url)
    assert {area: finding.status for area, finding in bad(report).items()} == {"LoRA": "warn"}


def test_a_clock_that_is_off_and_an_engine_that_is_ill(registry: Path) -> None:
    late = Behaviour(date="Tue, 01 Jan 2030 00:00:00 GMT")
    with listening(behind_middleware(registry, late), own_date=True) as url:
        assert "off by" in bad(examine_served(url, expected=expected()))["clock"].what
    with listening(behind_middleware(registry, Behaviour(health=503))) as url:
        (finding,) = examine_served(url).findings
    assert (finding.status, finding.what) == ("fail", "/health answers 503")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://"])
def test_what_cannot_be_reached(url: str) -> None:
    report = examine_served(url)
    (finding,) = report.findings
    assert (finding.area, finding.status) == ("reachable", "fail")
    assert report.exit_code == ExitCode.UNREACHABLE
