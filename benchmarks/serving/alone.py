"""What the middleware itself takes: the same requests through it and past it, to an application that only answers.

Without an engine and a network it can be told to the microsecond, which on a busy machine no comparison of two engines can.
The resolver is not in it: vLLM asks it once per release.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.load import ALIAS, Question

from memupdate import Workspace
from memupdate.serving.middleware import AliasMiddleware

ROUNDS = 60
_HEADERS = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"accept", b"*/*")]
_PIECE = b'data: {"id": "x", "choices": [{"text": " a"}]}\n\n'


async def answers(_scope: Any, receive: Any, send: Any) -> None:
    """As many messages as a streamed answer of that length has; else one."""
    asked = json.loads((await receive())["body"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    for _ in range(asked["max_tokens"] if asked["stream"] else 1):
        await send({"type": "http.response.body", "body": _PIECE, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def measure(workspace: Workspace, asked: Sequence[Question]) -> dict[str, Any]:
    """Of the releases in the workspace's registry; no engine is started."""
    if ALIAS not in workspace.status().aliases:
        raise RuntimeError("nothing is published yet: run another part first")
    return {"middleware_us": middleware_us(workspace.layout.registry.root, "atlas", asked)}


def middleware_us(registry: Path, base_model: str, asked: Sequence[Question]) -> float:
    """Processor time of the middleware per request, microseconds: median over rounds of the same questions, one round past it each."""
    middleware = AliasMiddleware(answers, registry=registry, base_model=base_model)
    return 1e6 * statistics.median(asyncio.run(_rounds(middleware, [_request(question) for question in asked])))


async def _rounds(middleware: AliasMiddleware, requests: list[tuple[dict[str, Any], bytes]]) -> list[float]:
    found = []
    for number in range(ROUNDS + 1):
        taken = {}
        for app in (middleware, answers) if number % 2 else (answers, middleware):
            begun = time.process_time()
            for scope, body in requests:
                await _ask(app, scope, body)
            taken[app is middleware] = time.process_time() - begun
        found.append((taken[True] - taken[False]) / len(requests))
    return found[1:]  # the first one reads the manifest


async def _ask(app: Any, scope: dict[str, Any], body: bytes) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(_message: Any) -> None:
        return

    await app(dict(scope), receive, send)


def _request(question: Question) -> tuple[dict[str, Any], bytes]:
    body = json.dumps(question.body(ALIAS)).encode()
    length = [(b"content-length", os.fsencode(str(len(body))))]
    return {"type": "http", "method": "POST", "path": question.path, "headers": [*_HEADERS, *length]}, body
