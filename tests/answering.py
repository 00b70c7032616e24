"""Engines that only say which release they were asked for: our middleware behind real HTTP, and nothing of vLLM."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import generate_latest

from memupdate.serving.middleware import AliasMiddleware


class Models:
    """Answers as vLLM does where it matters to a rollout."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        """Releases, in the order of the requests."""
        self.broken: set[str] = set()
        """Releases that fail."""
        self.answer_at_most: int | None = None
        """Requests after so many get no answer until this is None again."""
        self.metrics: bytes | None = None
        """What `/metrics` says in place of this process's counters."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] in ("/metrics", "/health"):
            await answer(send, 200, self.metrics or generate_latest(), b"text/plain")
            return
        model = json.loads((await receive())["body"])["model"]
        self.asked.append(model)
        number = len(self.asked)
        while self.answer_at_most is not None and number > self.answer_at_most:
            await asyncio.sleep(0.01)
        choice = {"text": "?", "index": 0, "finish_reason": "length"}
        status = 500 if model in self.broken else 200
        await answer(send, status, json.dumps({"model": model, "choices": [choice]}).encode(), b"application/json")


async def answer(send: Any, status: int, body: bytes, kind: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def engine(registry: Path) -> Iterator[tuple[str, Models]]:
    """One engine on the registry, in a thread of this process; yields its URL, and what is behind the middleware."""
    models = Models()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        asgi = AliasMiddleware(models, registry=registry, base_model="base")
        server = uvicorn.Server(uvicorn.Config(asgi, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", models
        models.answer_at_most = None
        server.should_exit = True
        thread.join(20)
