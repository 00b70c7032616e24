"""For `--middleware` of an engine that is measured: our middleware, or for a request that says so, none."""

from __future__ import annotations

from typing import Any

from memupdate.serving.middleware import AliasMiddleware

PAST_HEADER = "x-benchmark-past"
_PAST = PAST_HEADER.encode()


class ToggledMiddleware:
    """Sends requests through `AliasMiddleware`, and those with the header past it; looking for the header costs both the same."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._ours = AliasMiddleware(app)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        past = any(name == _PAST for name, _ in scope.get("headers", ()))
        await (self._app if past else self._ours)(scope, receive, send)
