"""`doctor --served URL`: one engine looked at from outside, as a client and as somebody who should not get in.

Invariant: nothing that an engine does for other clients is disturbed: what is tried on closed routes names an adapter that does
not exist, so that it harms nobody where the route turns out to be open. Requests for prompt log-probabilities, which end an
engine that is set up wrongly, are not sent.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from memupdate.errors import EngineError, ExitCode
from memupdate.layout import RELEASE_PATTERN
from memupdate.ledger.ledger import Ledger
from memupdate.operations.findings import DoctorReport, Finding, failed, gather, warned, well
from memupdate.operations.session import Session
from memupdate.serving.client import EngineClient, EngineRefused
from memupdate.serving.compat import is_supported, supported_range
from memupdate.serving.env import REGISTRY_ENV
from memupdate.serving.manifest import RELEASED, read_manifest
from memupdate.serving.middleware import ALIAS_HEADER, RELEASE_HEADER, ROUTE_HEADER

MAX_SKEW_S = 5.0
"""HTTP tells whole seconds, and a request may take some."""
_NOBODY = "memupdate-doctor"
_ADMIN_REQUESTS: tuple[tuple[str, str, dict[str, Any] | None], ...] = (
    ("POST", "/v1/load_lora_adapter", {"lora_name": _NOBODY, "lora_path": f"/nonexistent/{_NOBODY}"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": _NOBODY}),
    ("POST", "/adapters", {"name": _NOBODY, "src": f"/nonexistent/{_NOBODY}"}),
    ("DELETE", f"/adapters/{_NOBODY}", None),
    ("POST", "/invocations", {}),
    ("GET", "/server_info", None),
)
"""Of the routes that must not be open, those that can be tried without doing anything."""
_EXISTING_DEPLOYMENT = "add our flags and environment to it: docs/existing-vllm.md"


@dataclass(frozen=True)
class Expected:
    """What a workspace says of its engines."""

    generation: int = 0
    """Of the manifest."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Alias → the release that it points at, and its canary's where there is one."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Alias → a question about one of its facts, so that it is answered by the release however the alias is routed."""
    max_rank: int = 0
    """The largest of all releases that may be asked for."""


def expected_of(session: Session) -> Expected:
    """What the engines of this workspace should show. Raises ManifestError, LedgerError."""
    path = session.layout.registry.manifest
    if not path.exists():
        return Expected()
    manifest = read_manifest(path)
    prompts = {}
    with Ledger.open(session.layout.ledger, readonly=True) as ledger:
        for alias, entry in manifest.aliases.items():
            release = ledger.release(entry.release)
            facts = ledger.live_facts(release.collection, as_of_version=release.version)
            prompts[alias] = facts[0].prompt if facts else "?"
    return Expected(
        manifest.generation,
        {
            alias: (entry.release, *((entry.canary.release,) if entry.canary else ()))
            for alias, entry in manifest.aliases.items()
        },
        prompts,
        max((entry.rank for entry in manifest.releases.values() if entry.state == RELEASED), default=0),
    )


def examine_served(url: str, *, api_key: str | None = None, expected: Expected | None = None) -> DoctorReport:
    """The engine at `url`, compared with what a workspace expects where one is given."""
    visit = _Visit(url.rstrip("/"), api_key, expected)
    with visit.http:
        reached = gather([("reachable", visit.reachable)])
        if any(finding.status == "fail" for finding in reached):
            return DoctorReport(visit.url, reached)
        later = gather(
            [
                ("version", visit.version),
                ("clock", visit.clock),
                *((f"alias {alias}", partial(visit.alias, alias)) for alias in (expected or Expected()).aliases),
                ("metrics", visit.read_metrics),
                ("plug-ins", visit.plugins),
                ("LoRA", visit.lora),
                ("admin routes", visit.admin_routes),
            ]
        )
    return DoctorReport(visit.url, reached + later)


class _Visit:
    """One look; later checks use what earlier ones saw."""

    def __init__(self, url: str, api_key: str | None, expected: Expected | None) -> None:
        self.url = url
        self.client = EngineClient(url, api_key, timeout_s=120.0)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.has_key = api_key is not None
        self.http = httpx.Client(headers=headers, timeout=30.0, trust_env=False)
        self.expected = expected
        self.metrics: dict[str, list[float]] = {}
        self.answered_by_release = False

    def reachable(self) -> Iterator[Finding]:
        response = self._send("GET", "/health")
        if response.status_code != 200:
            yield _unusable(
                "reachable", f"/health answers {response.status_code}", "look at the engine's log; restart it"
            )
            return
        names = self.client.models()
        yield well("reachable", f"healthy; lists {', '.join(names) or 'no model'}")

    def version(self) -> Iterator[Finding]:
        version = str(self._json("/version").get("version"))
        if is_supported(version):
            yield well("version", f"vLLM {version}, within {supported_range()}")
        else:
            yield _unusable("version", f"vLLM {version}; supported: {supported_range()}", "upgrade vLLM, or memupdate")

    def clock(self) -> Iterator[Finding]:
        before = time.time()
        response = self._send("GET", "/health")
        told = response.headers.get("date")
        if told is None:
            yield warned(
                "clock", "the engine does not tell its time", "a proxy may hide it; compare the clocks by hand"
            )
            return
        skew = parsedate_to_datetime(told).timestamp() + 0.5 - (before + time.time()) / 2
        if abs(skew) > MAX_SKEW_S:
            yield warned("clock", f"the engine's clock is off by {skew:+.0f} s", "synchronise both machines (NTP)")
        else:
            yield well("clock", f"within {MAX_SKEW_S:.0f} s of the one here")

    def alias(self, alias: str) -> Iterator[Finding]:
        assert self.expected is not None
        area, targets = f"alias {alias}", self.expected.aliases[alias]
        try:
            answer = self.client.complete(alias, self.expected.prompts.get(alias, "?"), 1)
        except EngineRefused as error:
            mend = "give it a key by VLLM_API_KEY" if error.status in (401, 403) else "does it read this registry?"
            yield _unusable(area, error.message, mend)
            return
        found = answer.headers.get(RELEASE_HEADER, answer.model)
        self.answered_by_release |= RELEASE_PATTERN.fullmatch(answer.model) is not None
        if answer.headers.get(ROUTE_HEADER) == "base":
            yield warned(
                area, "a question about one of its facts went to the base model", "memupdate verify: see its route"
            )
        elif found not in targets:
            yield _unusable(
                area, f"answered by {found}, should be {' or '.join(targets)}", "does it read this registry?"
            )
        elif answer.headers.get(ALIAS_HEADER) != alias:
            yield warned(
                area, f"{found} answers, but no header names the alias", "does a proxy drop x-memupdate-alias?"
            )
        else:
            yield well(area, f"answered by {found}")

    def read_metrics(self) -> Iterator[Finding]:
        response = self._send("GET", "/metrics")
        if response.status_code != 200:
            yield warned("metrics", f"/metrics answers {response.status_code}", "let this machine read it")
            return
        try:
            for family in text_string_to_metric_families(response.text):
                self.metrics[family.name] = [sample.value for sample in family.samples]
        except ValueError as error:
            yield warned("metrics", f"/metrics cannot be read ({error})", "is this URL vLLM itself?")
            return
        yield well("metrics", f"{sum(name.startswith('memupdate_') for name in self.metrics)} of memupdate's are there")

    def plugins(self) -> Iterator[Finding]:
        if "memupdate_manifest_generation" not in self.metrics and not self._refuses_admin():
            yield _unusable("plug-ins", "the middleware of memupdate is not active", _EXISTING_DEPLOYMENT)
            return
        yield well("plug-ins", "the middleware is active")
        if self.expected is None or not self.expected.aliases:
            return
        there = self.metrics.get("memupdate_manifest_generation", [])
        if self.answered_by_release:
            yield well("plug-ins", "the resolver is active: releases are loaded by their names")
        if there and int(there[0]) != self.expected.generation:
            yield _unusable(
                "registry",
                f"it is at generation {there[0]:.0f}, the workspace at {self.expected.generation}",
                f"mount this workspace's registry there ({REGISTRY_ENV}); a shared file system may be some seconds late",
            )

    def lora(self) -> Iterator[Finding]:
        if self.answered_by_release or self._loaded_release_answers() or "vllm:lora_requests_info" in self.metrics:
            yield well("LoRA", "on")
        elif self.expected is not None and self.expected.aliases:
            yield _unusable("LoRA", "no release answers: it may be off", f"--enable-lora; {_EXISTING_DEPLOYMENT}")
        else:
            yield warned("LoRA", "cannot be seen before a release is asked for", "publish one, then look again")
        told = self.metrics.get("memupdate_max_lora_rank", [])
        limit, needed = int(told[0]) if told else 0, self.expected.max_rank if self.expected else 0
        if not limit:
            yield warned("rank", "it does not tell the largest rank that it takes", _EXISTING_DEPLOYMENT)
        elif limit < needed:
            yield _unusable(
                "rank",
                f"it takes releases up to rank {limit}; the largest here has {needed}",
                "restart `memupdate serve`, which makes room, or raise --max-lora-rank",
            )
        else:
            yield well("rank", f"up to {limit}; the releases need {needed}" if needed else f"up to {limit}")

    def admin_routes(self) -> Iterator[Finding]:
        answers = [(f"{method} {path}", self._send(method, path, body)) for method, path, body in _ADMIN_REQUESTS]
        unknown = [route for route, response in answers if response.status_code == 401]
        open_ = [route for route, response in answers if route not in unknown and not _is_closed(response)]
        if open_:
            yield failed(
                "admin routes",
                f"open without the admin token: {', '.join(open_)}",
                f"load the middleware of memupdate, or close them in front of the engine; {_EXISTING_DEPLOYMENT}",
                exit_code=ExitCode.UNREACHABLE,
            )
        elif unknown:  # vLLM asks for a key before it looks at the route
            given = "refuses the key that it was asked with" if self.has_key else "asks for a client's key"
            yield warned(
                "admin routes",
                f"it cannot be told whether a client's key opens {', '.join(unknown)}: the engine {given}",
                "give a client's key by VLLM_API_KEY, and look again",
            )
        else:
            yield well("admin routes", f"closed; {len(answers)} tried without the admin token")

    def _refuses_admin(self) -> bool:
        response = self._send(
            "POST", "/v1/load_lora_adapter", {"lora_name": _NOBODY, "lora_path": f"/nonexistent/{_NOBODY}"}
        )
        return response.status_code == 403 and "admin token" in _message(response)

    def _loaded_release_answers(self) -> bool:
        loaded = [name for name in self.client.models() if RELEASE_PATTERN.fullmatch(name)]
        return bool(loaded) and self.client.complete(loaded[0], "?", 1).model == loaded[0]

    def _json(self, path: str) -> dict[str, Any]:
        response = self._send("GET", path)
        try:
            value = response.json()
        except ValueError:
            value = None
        if response.status_code != 200 or not isinstance(value, dict):
            raise EngineError(
                f"{self.url}{path} answers {response.status_code}, not as vLLM does", "is this URL vLLM's?"
            )
        return value

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return self.http.request(method, self.url + path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise EngineError(
                f"{self.url} cannot be reached ({reason})", "is the engine running, and is this its address?"
            ) from error


def _unusable(area: str, what: str, mend: str) -> Finding:
    return failed(area, what, mend, exit_code=ExitCode.UNREACHABLE)


def _is_closed(response: httpx.Response) -> bool:
    if response.status_code in (403, 405):
        return True
    return response.status_code == 404 and _message(response) == "Not Found"  # no such route


def _message(response: httpx.Response) -> str:
    """What an error says, in vLLM's form or FastAPI's."""
    try:
        value = response.json()
    except ValueError:
        return response.text
    if not isinstance(value, dict):
        return ""
    error = value.get("error", value)
    return str(error.get("message", error.get("detail", ""))) if isinstance(error, dict) else str(error)
