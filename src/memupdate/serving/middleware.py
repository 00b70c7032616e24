"""The middleware that vLLM runs in front of its routes: aliases become releases, keys are bound, admin routes stay closed.

`vllm serve … --middleware memupdate.serving.middleware.AliasMiddleware`, with `MEMUPDATE_REGISTRY` set. Pure ASGI.
Invariant: an alias is resolved once per request, against the manifest as it was when the request came or a newer one, so
each answer is exactly one release's; a broken or missing manifest takes effect only on requests that name an alias it
would have told, and a disk that hangs holds up nobody for longer than `background.WAIT_S`. Every POST that is not a known
inference route, every other mutating method and every websocket needs the admin token, which is apart from client keys.
Responses pass through as they come: streams are never buffered. This module
knows nothing about vLLM but its routes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from memupdate.layout import RegistryLayout
from memupdate.serving.access import Access, AccessUnreadable, Binding, presented_key
from memupdate.serving.background import SharedLook, may_hang
from memupdate.serving.env import (
    ACCESS_ENV,
    ADMIN_TOKEN_ENV,
    BASE_MODEL_ENV,
    MAX_BODY_ENV,
    MAX_RANK_ENV,
    OPERATOR_KEY_ENV,
    REGISTRY_ENV,
)
from memupdate.serving.last_good import LastGood
from memupdate.serving.manifest import Manifest, manifest_cache
from memupdate.serving.metrics import serving_metrics
from memupdate.serving.release_files import ReleaseFiles
from memupdate.serving.routing import Matchers, Refusal, Route, Router

ADMIN_TOKEN_HEADER = "x-memupdate-admin-token"
RELEASE_HEADER = "x-memupdate-release"
ALIAS_HEADER = "x-memupdate-alias"
ROUTE_HEADER = "x-memupdate-route"
"""Of a request to an alias: `release`, `base`, or why the route could not be decided (`unreadable`, `no_matcher`)."""
SESSION_HEADER = "x-memupdate-session"
"""A client's own name for a conversation, which keeps it on one side of a canary."""
DEFAULT_MAX_BODY_BYTES = 32 << 20
"""Room for a long conversation with images in it."""

INFERENCE_ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/systemone",
        "/cohere/v2/chat",
        "/generative_scoring",
        "/v1/embeddings",
        "/v2/embed",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/tokenize",
        "/detokenize",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
    }
)
"""POST routes open to clients; all take a JSON object with `model`, but for sound, which comes as a form and passes untouched.
`/invocations` is closed: a header of SageMaker's chooses the model there. So is what `--enable-scale-out` adds, which is for
other engines. A test holds all routes of the installed vLLM against this list."""
_RESPONSES_ROUTE = "/v1/responses"
_CANCEL_ROUTE = re.compile(r"/v1/responses/[A-Za-z0-9_-]{1,256}/cancel")
_READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_CLOSED_READING_ROUTES = frozenset({"/server_info"})
"""GET routes that show the server's environment."""
_MODELS_ROUTE = "/v1/models"
_KEYED_PREFIXES = ("/v1/", "/v2/", "/inference/", "/cohere/")
"""Reading routes below these need a key where keys are bound; vLLM guards the same."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class _ClientLeft(Exception):
    """The client went away before its body was complete: nobody is there to be answered."""


class _Refused(Exception):
    """The request is answered here."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


_ADMIN = Refusal(403, "PermissionDeniedError", "this route needs the admin token", "admin")
_NO_KEY = Refusal(401, "AuthenticationError", "a valid API key is needed", "no_key")
_NO_RULES = Refusal(503, "ServiceUnavailableError", "the rules of access cannot be read", "access_unreadable")
_NOT_JSON = Refusal(415, "UnsupportedMediaTypeError", "the body must be application/json", "not_json")


class AliasMiddleware:
    """Rewrites `model` from an alias to the release it points at now; keeps admin routes and other tenants' releases closed.

    Args:
        registry: the registry folder; by default `MEMUPDATE_REGISTRY`; without it no alias is known.
        admin_token: by default `MEMUPDATE_ADMIN_TOKEN`; without one admin routes are closed to everyone.
        max_body_bytes: larger request bodies get 413; by default `MEMUPDATE_MAX_BODY_BYTES` or 32 MiB.
        base_model: what vLLM calls the untouched base model; by default `MEMUPDATE_BASE_MODEL`.
    """

    def __init__(
        self,
        app: App,
        *,
        registry: Path | None = None,
        admin_token: str | None = None,
        max_body_bytes: int | None = None,
        base_model: str | None = None,
    ) -> None:
        self._app = app
        folder = registry or (Path(os.environ[REGISTRY_ENV]) if os.environ.get(REGISTRY_ENV) else None)
        layout = RegistryLayout(folder) if folder else None
        self._manifest = manifest_cache(layout.manifest) if layout else None
        self._seen: Manifest | None = None
        base = base_model if base_model is not None else os.environ.get(BASE_MODEL_ENV, "")
        self._router = Router(Matchers(layout) if layout else None, base)
        self._files = ReleaseFiles(layout) if layout else None
        self._base_model = base
        self._operator_key = os.environ.get(OPERATOR_KEY_ENV, "")
        self._access = _access(layout, self._operator_key)
        self._look = _shared_look(self._access, self._manifest)
        token = admin_token if admin_token is not None else os.environ.get(ADMIN_TOKEN_ENV, "")
        self._token_digest = hashlib.sha256(token.encode()).digest() if token else None
        self._max_body_bytes = max_body_bytes or _positive_env(MAX_BODY_ENV, DEFAULT_MAX_BODY_BYTES)
        self._metrics = serving_metrics()
        self._metrics.max_rank.set(_positive_env(MAX_RANK_ENV, 0))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            try:
                await self._http(scope, receive, send)
            except _Refused as refused:
                self._metrics.refusals.labels(refused.refusal.reason).inc()
                await _refuse(send, refused.refusal)
            except _ClientLeft:
                return
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = _route_path(scope), scope["method"]
        if method in _READING_METHODS and path not in _CLOSED_READING_ROUTES:
            await self._reading(scope, path, receive, send)
        elif method == "POST" and path in INFERENCE_ROUTES:
            await self._inference(scope, receive, send)
        elif method == "POST" and _CANCEL_ROUTE.fullmatch(path):
            await self._app((await self._let_in(scope))[0], receive, send)
        elif self._is_admin(scope):
            await self._app(scope, receive, send)
        else:
            raise _Refused(_ADMIN)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_admin(scope):
            await self._app(scope, receive, send)
            return
        self._metrics.refusals.labels(_ADMIN.reason).inc()
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": _ADMIN.message})

    async def _reading(self, scope: Scope, path: str, receive: Receive, send: Send) -> None:
        binding = None
        if scope["method"] != "OPTIONS" and path.startswith(_KEYED_PREFIXES):
            scope, binding = await self._let_in(scope)
        if binding is not None and path.rstrip("/") == _MODELS_ROUTE:
            send = _only_models(send, lambda name: self._is_shown(name, binding))
        await self._app(scope, receive, send)

    async def _inference(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope, binding = await self._let_in(scope)
        body = await self._read_body(scope, receive)
        is_json = _is_json(scope)
        if binding is not None and not is_json:
            raise _Refused(_NOT_JSON)
        manifest = self._current()
        session = _header(scope, SESSION_HEADER.encode())
        route = Route(body)
        if is_json:
            is_response = _route_path(scope) == _RESPONSES_ROUTE
            route = await self._router.route(body, manifest, session=session, binding=binding, is_response=is_response)
        if route.refusal is not None:
            raise _Refused(route.refusal)
        if not await self._is_whole(route.release, manifest):
            # Counted as an answer too: it ends a canary, as any other failure of its release does.
            self._metrics.requests.labels(route.alias or "", route.release, "404").inc()
            raise _Refused(Refusal(404, "NotFoundError", f"the release {route.release} is damaged", "damaged"))
        if route.mode is not None:
            self._metrics.routed.labels(route.mode, route.decision).inc()
        if route.body is not body:
            scope = {**scope, "headers": _with_content_length(scope["headers"], len(route.body))}
        await self._app(scope, _replay(route.body, receive), self._answering(send, route, manifest))

    async def _is_whole(self, release: str | None, manifest: Manifest | None) -> bool:
        """Whether vLLM may go on reading the release from disk; names that the manifest does not know are the resolver's."""
        entry = manifest.releases.get(release) if release is not None and manifest is not None else None
        if release is None or entry is None or self._files is None:
            return True
        return await self._files.are_whole(release, entry)

    async def _let_in(self, scope: Scope) -> tuple[Scope, Binding | None]:
        """The request as vLLM shall see it, and what its key allows; None where keys are not bound. Raises _Refused.

        From here on the request's rules and manifest are those of its own time, or newer ones.
        """
        if self._look is not None:
            await self._look.fresh()
        if self._access is None:
            return scope, None
        try:
            rules = self._access.rules()
        except AccessUnreadable:
            raise _Refused(_NO_RULES) from None
        if rules is None:
            return scope, None
        shown = {key: _header(scope, key) for key in (b"authorization", b"x-api-key")}
        binding = self._access.binding_of(rules, presented_key(shown))
        if binding is None:
            raise _Refused(_NO_KEY)
        return {**scope, "headers": _with_operator_key(scope["headers"], self._operator_key)}, binding

    def _is_shown(self, name: str, binding: Binding) -> bool:
        return binding.allows_release(name) or (binding.base_model and self._base_model in ("", name))

    def _current(self) -> Manifest | None:
        """The manifest in force; what has moved since the last request is counted."""
        manifest = self._manifest.last if self._manifest else None
        before, self._seen = self._seen, manifest
        if manifest is not None and manifest is not before:
            self._metrics.generation.set(manifest.generation)
            known = before.aliases if before else {}
            moved = [a for a, entry in manifest.aliases.items() if a in known and known[a].release != entry.release]
            self._metrics.flips.inc(len(moved))
        return manifest

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises _Refused as soon as it is known to be too large, _ClientLeft."""
        too_large = Refusal(
            413, "RequestTooLargeError", f"the body is larger than {self._max_body_bytes} bytes", "too_large"
        )
        claimed = _header(scope, b"content-length")
        if claimed.isdigit() and int(claimed[:20]) > self._max_body_bytes:
            raise _Refused(too_large)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _ClientLeft
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise _Refused(too_large)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _is_admin(self, scope: Scope) -> bool:
        given = hashlib.sha256(_header(scope, ADMIN_TOKEN_HEADER.encode())).digest()
        return self._token_digest is not None and hmac.compare_digest(given, self._token_digest)

    def _answering(self, send: Send, route: Route, manifest: Manifest | None) -> Send:
        """A `send` that names release, alias and route on the response's start, counts it, and leaves the rest as it is."""
        added = [(RELEASE_HEADER, route.release), (ALIAS_HEADER, route.alias), (ROUTE_HEADER, route.decision)]
        headers = [(name.encode(), value.encode()) for name, value in added if value is not None]
        known = route.release if manifest is not None and route.release in manifest.releases else None

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(route.alias or "", known or "", str(message["status"])).inc()
                if headers:
                    message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        return sent


def _access(layout: RegistryLayout | None, operator_key: str) -> Access | None:
    """By the file that the environment names, else by the registry's, where there is one."""
    named = os.environ.get(ACCESS_ENV)
    if not named and layout is None:
        return None
    path = Path(named) if named else layout.access if layout else Path()
    return Access(path, required=bool(named), operator_key=operator_key)


def _shared_look(access: Access | None, manifest: LastGood[Manifest] | None) -> SharedLook | None:
    """One look for both, at the rules first. Holds nothing of the middleware, so that its thread ends with that."""
    looks = [*([access.look] if access else []), *([manifest.get] if manifest else [])]
    if not looks:
        return None
    paths = [*([access.path] if access else []), *([manifest.path] if manifest else [])]
    return SharedLook(lambda: [look() for look in looks], is_aside=may_hang(*paths))


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


def _with_operator_key(headers: list[tuple[bytes, bytes]], key: str) -> list[tuple[bytes, bytes]]:
    """The client's key is checked here, vLLM's own by vLLM: a request that is let in goes on with that one."""
    if not key:
        return headers
    kept = [(name, value) for name, value in headers if name.lower() != b"authorization"]
    return [*kept, (b"authorization", b"Bearer " + key.encode())]


def _only_models(send: Send, is_shown: Callable[[str], bool]) -> Send:
    """A `send` that leaves out of a list of models what `is_shown` does not show. The list is short: it is held back whole."""
    held: dict[str, Any] = {"start": None, "body": b""}

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            held["start"] = message
            return
        held["body"] += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = _filtered(held["body"], is_shown) if held["start"]["status"] == 200 else held["body"]
        headers = _with_content_length(list(held["start"].get("headers", ())), len(body))
        await send({**held["start"], "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return sent


def _filtered(body: bytes, is_shown: Callable[[str], bool]) -> bytes:
    try:
        value = json.loads(body)
        value["data"] = [model for model in value["data"] if is_shown(str(model["id"]))]
    except (ValueError, TypeError, KeyError):
        return b'{"object": "list", "data": []}'
    return json.dumps(value).encode()


async def _refuse(send: Send, refusal: Refusal) -> None:
    """An error in the form that OpenAI clients understand."""
    param = "model" if refusal.status == 404 else None
    error = {"message": refusal.message, "type": refusal.kind, "param": param, "code": refusal.status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 413:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _positive_env(name: str, default: int) -> int:
    """A positive number from the environment; the default where it is absent or makes no sense."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() and int(value) > 0 else default
