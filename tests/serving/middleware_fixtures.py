"""What the middleware's tests share: an application that tells what reached it, and a registry of two tenants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from memupdate.serving.manifest import Manifest, ReleaseEntry, with_alias, with_release, with_retired, write_manifest
from memupdate.serving.middleware import AliasMiddleware

BASE = "sha256:" + "b" * 64
CHAT = "/v1/chat/completions"


class Echo:
    """Answers with what it was sent; `/stream` routes answer piece by piece, each as the test lets it."""

    def __init__(self) -> None:
        self.calls = 0
        self.release_next = asyncio.Event()

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        self.calls += 1
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        told = {"path": scope["path"], "method": scope["method"], "headers": headers, "body": body.decode("latin-1")}
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        if headers.get("x-stream"):
            for piece in range(3):
                await send({"type": "http.response.body", "body": f"{piece}".encode(), "more_body": True})
                await self.release_next.wait()
                self.release_next.clear()
            await send({"type": "http.response.body", "body": b""})
            return
        await send({"type": "http.response.body", "body": json.dumps(told).encode()})


def entry(number: int, matcher_digest: str | None = None) -> ReleaseEntry:
    return ReleaseEntry(
        "sha256:" + f"{number:064x}", "sha256:" + "c" * 64, 8, number, BASE, matcher_digest=matcher_digest
    )


def example() -> Manifest:
    manifest = Manifest(BASE)
    for number in (1, 2, 3):
        manifest = with_release(manifest, f"acme@v{number}", entry(number))
    return with_alias(with_retired(manifest, "acme@v3"), "acme", "acme@v1")


def write_registry(folder: Path) -> None:
    """Two tenants: `acme` and `globex`, each with a published release 1 and an unpublished release 2."""
    manifest = example()
    for number in (1, 2):
        manifest = with_release(manifest, f"globex@v{number}", entry(10 + number))
    write_manifest(folder / "manifest.json", with_alias(manifest, "globex", "globex@v1"))


def call(app: AliasMiddleware, method: str, path: str, **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def seen(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200
    return response.json()  # type: ignore[no-any-return]  # what Echo wrote
