"""Which model a request goes to: alias → canary or release → release or base model, and what its key allows.

Invariant: decided once per request, from one snapshot of the manifest; equal conversations go the same way as long as the
manifest stays. What is not understood goes on as it came, except where keys are bound to collections: there a request
passes only if its model is known to be open to its key. This module knows nothing about ASGI.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from memupdate.layout import MATCHER_FILE, RELEASE_PATTERN, RegistryLayout
from memupdate.serving.access import Binding
from memupdate.serving.background import call_aside, settled
from memupdate.serving.conversation import in_share, new_response_id, side_of, steady_key, texts_of
from memupdate.serving.manifest import MATCHED, RETIRED, AliasEntry, Canary, Manifest
from memupdate.serving.matcher import Matcher, MatcherError, load_matcher

MAX_MODEL_CHARS = 1024
"""Longer model names are answered here: vLLM keeps a lock for every unknown name that it is ever asked for."""
MAX_SCANNED_CHARS = 1 << 20
"""Longer conversations are not looked at: it would hold up the others. They go to the release."""
_MATCHERS = 64
_RETRY_S = 30.0
_LOAD_S = 10.0
"""For how long a request waits for a matcher before it goes to the release undecided."""
_LOG = logging.getLogger("vllm.memupdate")


@dataclass(frozen=True)
class Refusal:
    """An answer given here."""

    status: int
    kind: str
    message: str
    reason: str
    """One fixed word, for the metrics."""


@dataclass(frozen=True)
class Route:
    """What becomes of a request."""

    body: bytes
    release: str | None = None
    alias: str | None = None
    decision: str | None = None
    """Of an alias: `release`, `base`, or `unreadable` and `no_matcher`, which went to the release undecided."""
    mode: str | None = None
    """The alias's route."""
    refusal: Refusal | None = None


class Matchers:
    """The matchers of a registry's releases, each loaded once in a thread of its own; the 64 used last are kept."""

    def __init__(self, layout: RegistryLayout) -> None:
        self._layout = layout
        self._kept: OrderedDict[tuple[str, str], Matcher | float] = OrderedDict()
        """Release and digest → its matcher, or until when (monotonic, seconds) one that failed is not tried again."""
        self._loads: dict[tuple[str, str], tuple[Future[None], float]] = {}
        self._lock = threading.Lock()

    async def get(self, release: str, digest: str | None) -> Matcher | None:
        """The matcher of `release`; None where it has none that is whole, which is logged, or the disk does not give it in time."""
        if digest is None:
            return None
        key, now = (release, digest), time.monotonic()
        known = self._known(key)
        if known is None:
            load, began_s = self._loads.get(key) or self._begin(key)
            await settled(load, began_s + _LOAD_S - now)
            known = self._known(key)
        return known if isinstance(known, Matcher) else None

    def _known(self, key: tuple[str, str]) -> Matcher | float | None:
        with self._lock:
            known = self._kept.get(key)
            if known is None or (isinstance(known, float) and known < time.monotonic()):
                return None
            self._kept.move_to_end(key)
            return known

    def _begin(self, key: tuple[str, str]) -> tuple[Future[None], float]:
        load = call_aside(lambda: self._load(key))
        self._loads[key] = (load, time.monotonic())
        load.add_done_callback(lambda _: self._loads.pop(key, None))
        return load, time.monotonic()

    def _load(self, key: tuple[str, str]) -> None:
        release, digest = key
        loaded: Matcher | float
        try:
            loaded = load_matcher(self._layout.release(release) / MATCHER_FILE, digest)
        except Exception as error:
            told = error.message if isinstance(error, MatcherError) else repr(error)
            _LOG.error("all requests go to %s: %s", release, told)
            loaded = time.monotonic() + _RETRY_S  # A shared file system may be late.
        with self._lock:
            self._kept[key] = loaded
            self._kept.move_to_end(key)
            while len(self._kept) > _MATCHERS:
                self._kept.popitem(last=False)


class Router:
    """Decides.

    Args:
        matchers: None where there is no registry.
        base_model: the name under which vLLM serves the untouched base model; empty where it is not known, and then
            `MATCHED` sends everything to the release.
    """

    def __init__(self, matchers: Matchers | None, base_model: str) -> None:
        self._matchers = matchers
        self._base_model = base_model

    async def route(
        self,
        body: bytes,
        manifest: Manifest | None,
        *,
        session: bytes = b"",
        binding: Binding | None = None,
        is_response: bool = False,
    ) -> Route:
        """Where the request with this JSON body goes.

        Args:
            session: the client's own name for its conversation, which keeps it on one side of a canary.
            binding: what the request's key allows; None: no keys are bound, everything is open.
            is_response: of the route `/v1/responses`, where `request_id` becomes the response's id, by which a later
                turn names it.
        """
        value = _parsed(body)
        model = value.get("model") if value is not None else None
        if isinstance(model, str) and len(model) > MAX_MODEL_CHARS:
            return _refused(body, f"no model has a name of {len(model)} characters", "name_too_long")
        if value is None or not isinstance(model, str):
            return Route(body) if binding is None else self._unnamed(body, value, model, binding)
        entry = manifest.aliases.get(model) if manifest else None
        if entry is not None and manifest is not None:
            return await self._aliased(body, value, model, entry, manifest, session, binding, is_response)
        return await self._direct(body, model, manifest, binding)

    async def _aliased(
        self,
        body: bytes,
        value: dict[str, Any],
        alias: str,
        entry: AliasEntry,
        manifest: Manifest,
        session: bytes,
        binding: Binding | None,
        is_response: bool,
    ) -> Route:
        if binding is not None and not binding.allows_release(entry.release):
            return _unknown(body, alias)
        release = entry.release
        if entry.canary is not None and takes_canary(steady_key(value, session, body), alias, entry.canary):
            release = entry.canary.release
        decision = await self._decide(value, release, entry, manifest)
        value["model"] = self._base_model if decision == "base" else release
        if is_response and entry.route == MATCHED:
            value.setdefault("request_id", new_response_id("base" if decision == "base" else "release"))
        try:
            rewritten = json.dumps(value).encode()
        except (ValueError, RecursionError):
            return Route(body) if binding is None else _not_json(body)
        return Route(rewritten, None if decision == "base" else release, alias, decision, entry.route)

    async def _decide(self, value: dict[str, Any], release: str, entry: AliasEntry, manifest: Manifest) -> str:
        if entry.route != MATCHED or self._matchers is None or not self._base_model:
            return "release"
        matcher = await self._matchers.get(release, manifest.releases[release].matcher_digest)
        if matcher is None:
            return "no_matcher"
        side = side_of(value.get("previous_response_id"))
        if side == "release":
            return "release"
        # What came before an answer of the base model mentioned nothing: this turn's words decide.
        texts = texts_of({**value, "previous_response_id": None} if side else value)
        if texts is None or sum(map(len, texts)) > MAX_SCANNED_CHARS:
            return "unreadable"
        for is_found in matcher.scan(texts):
            if is_found:
                return "release"
            await asyncio.sleep(0)  # Long texts are looked at in pieces: streams go on in between.
        return "base"

    async def _direct(self, body: bytes, model: str, manifest: Manifest | None, binding: Binding | None) -> Route:
        """A request that names no alias."""
        named = RELEASE_PATTERN.fullmatch(model)
        if named is None:
            if binding is None or (binding.base_model and self._base_model in ("", model)):
                return Route(body)
            return _unknown(body, model)
        if binding is not None and not binding.allows_release(model):
            return _unknown(body, model)
        release = manifest.releases.get(model) if manifest else None
        if release is not None and release.state == RETIRED:
            # vLLM would go on answering from an adapter that it has loaded already.
            return _refused(body, f"the release {model} is retired", "retired")
        if release is not None and manifest is not None:
            await self._prepare(named["collection"], model, manifest)
        return Route(body, release=model)

    async def _prepare(self, collection: str, release: str, manifest: Manifest) -> None:
        """Whoever proves or warms a release is about to publish it: the first request to its alias shall find its matcher loaded."""
        alias = manifest.aliases.get(collection)
        if self._matchers is not None and self._base_model and (alias is None or alias.route == MATCHED):
            await self._matchers.get(release, manifest.releases[release].matcher_digest)

    def _unnamed(self, body: bytes, value: dict[str, Any] | None, model: object, binding: Binding) -> Route:
        """A request whose model is not told, where keys are bound: vLLM would take the base model, or fail."""
        if value is None or model is not None:
            return _not_json(body)
        return Route(body) if binding.base_model else _unknown(body, "")


def takes_canary(key: bytes, alias: str, canary: Canary) -> bool:
    """Whether the conversation with `key` (of `steady_key`) goes to the canary of `alias`."""
    return in_share(key, f"{alias}\0{canary.release}", canary.share)


def _parsed(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refused(body: bytes, message: str, reason: str) -> Route:
    return Route(body, refusal=Refusal(404, "NotFoundError", message, reason))


def _unknown(body: bytes, model: str) -> Route:
    """In vLLM's own words, so that another tenant's release looks like none at all."""
    return _refused(body, f"The model `{model}` does not exist.", "not_open")


def _not_json(body: bytes) -> Route:
    refusal = Refusal(400, "BadRequestError", "the body must be a JSON object whose `model` is text", "not_json")
    return Route(body, refusal=refusal)
