"""The middleware that vLLM runs in front of its routes: aliases become releases, admin routes stay closed.

`vllm serve … --middleware memupdate.serving.middleware.AliasMiddleware`, with `MEMUPDATE_REGISTRY` set. Pure ASGI.
Invariant: an alias is resolved once per request, against the manifest as it is at that moment, so each answer is
exactly one release's; a broken or missing manifest takes effect only on requests that name an alias it would have
told. Every POST that is not a known inference route, every other mutating method and every websocket needs the admin
token, which is apart from client keys. Responses pass through as they come: streams are never buffered. This module
knows nothing about vLLM but its routes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memupdate.layout import RELEASE_PATTERN, RegistryLayout
from memupdate.serving.env import ADMIN_TOKEN_ENV, MAX_BODY_ENV, REGISTRY_ENV
from memupdate.serving.manifest import RETIRED, ManifestCache

ADMIN_TOKEN_HEADER = "x-memupdate-admin-token"
RELEASE_HEADER = "x-memupdate-release"
ALIAS_HEADER = "x-memupdate-alias"
DEFAULT_MAX_BODY_BYTES = 32 << 20
"""Room for a long conversation with images in it."""
MAX_MODEL_CHARS = 1024
"""Longer model names are answered here: vLLM keeps a lock for every unknown name that it is ever asked for."""

INFERENCE_ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/score",
        "/v1/rerank",
        "/tokenize",
        "/detokenize",
    }
)
"""POST routes open to clients; all take a JSON object with `model`."""
_CANCEL_ROUTE = re.compile(r"/v1/responses/[A-Za-z0-9_-]{1,256}/cancel")
_READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_CLOSED_READING_ROUTES = frozenset({"/server_info"})
"""GET routes that show the server's environment."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class _Route:
    """What became of a request's `model`."""

    body: bytes
    release: str | None = None
    alias: str | None = None
    refusal: str | None = None
    """Why it is a 404, where it is."""


class _ClientLeft(Exception):
    """The client went away before its body was complete: nobody is there to be answered."""


class AliasMiddleware:
    """Rewrites `model` from an alias to the release it points at now; keeps admin routes closed.

    Args:
        registry: the registry folder; by default `MEMUPDATE_REGISTRY`; without it no alias is known.
        admin_token: by default `MEMUPDATE_ADMIN_TOKEN`; without one admin routes are closed to everyone.
        max_body_bytes: larger request bodies get 413; by default `MEMUPDATE_MAX_BODY_BYTES` or 32 MiB.
    """

    def __init__(
        self,
        app: App,
        *,
        registry: Path | None = None,
        admin_token: str | None = None,
        max_body_bytes: int | None = None,
    ) -> None:
        self._app = app
        folder = registry or (Path(os.environ[REGISTRY_ENV]) if os.environ.get(REGISTRY_ENV) else None)
        self._manifest = ManifestCache(RegistryLayout(folder).manifest) if folder else None
        token = admin_token if admin_token is not None else os.environ.get(ADMIN_TOKEN_ENV, "")
        self._token_digest = hashlib.sha256(token.encode()).digest() if token else None
        self._max_body_bytes = max_body_bytes or _positive_env(MAX_BODY_ENV, DEFAULT_MAX_BODY_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = _route_path(scope), scope["method"]
        if method in _READING_METHODS and path not in _CLOSED_READING_ROUTES:
            await self._app(scope, receive, send)
        elif method == "POST" and path in INFERENCE_ROUTES:
            await self._inference(scope, receive, send)
        elif (method == "POST" and _CANCEL_ROUTE.fullmatch(path)) or self._is_admin(scope):
            await self._app(scope, receive, send)
        else:
            await _refuse(send, 403, "PermissionDeniedError", "this route needs the admin token")

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_admin(scope):
            await self._app(scope, receive, send)
            return
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": "this route needs the admin token"})

    async def _inference(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._read_body(scope, receive)
        except _ClientLeft:
            return
        if body is None:
            await _refuse(send, 413, "RequestTooLargeError", f"the body is larger than {self._max_body_bytes} bytes")
            return
        route = self._route(body) if _is_json(scope) else _Route(body)
        if route.refusal is not None:
            await _refuse(send, 404, "NotFoundError", route.refusal)
            return
        if route.body is not body:
            scope = {**scope, "headers": _with_content_length(scope["headers"], len(route.body))}
        await self._app(scope, _replay(route.body, receive), _with_headers(send, route))

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None as soon as it is known to be too large. Raises _ClientLeft."""
        claimed = _header(scope, b"content-length")
        if claimed.isdigit() and int(claimed[:20]) > self._max_body_bytes:
            return None
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _ClientLeft
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)

    def _route(self, body: bytes) -> _Route:
        """Where the request goes. What is not understood goes on as it came: vLLM says what is wrong with it."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return _Route(body)
        model = value.get("model") if isinstance(value, dict) else None
        if not isinstance(model, str):
            return _Route(body)
        if len(model) > MAX_MODEL_CHARS:
            return _Route(body, refusal=f"no model has a name of {len(model)} characters")
        manifest = self._manifest.get() if self._manifest else None
        entry = manifest.aliases.get(model) if manifest else None
        if entry is not None:
            value["model"] = entry.release
            try:
                return _Route(json.dumps(value).encode(), release=entry.release, alias=model)
            except (ValueError, RecursionError):
                return _Route(body)
        if RELEASE_PATTERN.fullmatch(model) is None:
            return _Route(body)
        release = manifest.releases.get(model) if manifest else None
        if release is not None and release.state == RETIRED:
            # vLLM would go on answering from an adapter that it has loaded already.
            return _Route(body, refusal=f"the release {model} is retired")
        return _Route(body, release=model)

    def _is_admin(self, scope: Scope) -> bool:
        given = hashlib.sha256(_header(scope, ADMIN_TOKEN_HEADER.encode())).digest()
        return self._token_digest is not None and hmac.compare_digest(given, self._token_digest)


def _route_path(scope: Scope) -> str:
    """The path as Starlette's router will see it: without the prefix that the application is mounted under."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and (path == root or path[len(root)] == "/"):
        return path[len(root) :]
    return path


def _header(scope: Scope, name: bytes) -> bytes:
    """A header's value, lower-case name; empty where absent."""
    for key, value in scope["headers"]:
        if key.lower() == name:
            return bytes(value)
    return b""


def _is_json(scope: Scope) -> bool:
    return _header(scope, b"content-type").split(b";", 1)[0].strip().lower() == b"application/json"


def _with_content_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    dropped = (b"content-length", b"transfer-encoding")
    kept = [(key, value) for key, value in headers if key.lower() not in dropped]
    return [*kept, (b"content-length", str(length).encode())]


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once and then what comes: the client's leaving."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _with_headers(send: Send, route: _Route) -> Send:
    """A `send` that names the release and the alias on the response's start and leaves the rest as it is."""
    added = [(RELEASE_HEADER, route.release), (ALIAS_HEADER, route.alias)]
    headers = [(name.encode(), value.encode()) for name, value in added if value is not None]
    if not headers:
        return send

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await send(message)

    return sent


async def _refuse(send: Send, status: int, kind: str, message: str) -> None:
    """An error in the form that OpenAI clients understand."""
    error = {"message": message, "type": kind, "param": "model" if status == 404 else None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 413:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _positive_env(name: str, default: int) -> int:
    """A positive number from the environment; the default where it is absent or makes no sense."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() and int(value) > 0 else default
