"""An HTTP client for a serving engine: the OpenAI routes that memupdate uses, and scoring by `prompt_logprobs`.

Invariant: whatever goes wrong between here and the engine comes out as one `EngineError` line. A score is always one
the engine computed for that very prompt: a missing prompt log-probability is an error, never a guess. (vLLM does not
read its prefix cache for requests with `prompt_logprobs`, so shared prefixes lose nothing; the check here would notice
if that changed.) This module knows nothing about facts, releases or tokenizers.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar
from urllib.parse import urlsplit

import httpx

from memupdate.errors import EngineError

if TYPE_CHECKING:
    import aiohttp

_BATCH_PROMPTS = 16
_BATCH_TOKENS = 8192
"""Bounds of one scoring request: prompts, and tokens of all of them together."""
_PARALLEL_REQUESTS = 4
_CONNECT_S = 10.0
T = TypeVar("T")
Headers = Mapping[str, str]
"""Of a response; lower-case names."""


class EngineRefused(EngineError):
    """The engine answered with an error status."""

    def __init__(self, message: str, hint: str = "", *, status: int) -> None:
        super().__init__(message, hint)
        self.status = status
        """The HTTP status, for example 404 for a release that it does not serve."""


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str
    model: str
    """What answered, as the engine says: a release's name, or the base model's."""
    finish_reason: str
    """`stop` where the model ended by itself, `length` where `max_tokens` cut it off."""
    headers: Mapping[str, str]
    """Response headers, lower-case names; `x-memupdate-release` and `x-memupdate-alias` among them."""


@dataclass(frozen=True)
class TokenScore:
    """What the engine says of one target token, given everything before it."""

    token_id: int
    logprob: float
    """ln p of the token, nats, at temperature 1."""
    rank: int
    """1 where no other token is as probable; a tie counts against the token."""
    top_token_id: int
    top_token: str
    """Text of the most probable token."""
    token: str = ""
    """Text of the token itself; "" where the engine does not say."""


@dataclass(frozen=True)
class Request(Generic[T]):
    """One POST to an engine, and how its answer is read."""

    path: str
    body: Mapping[str, Any]
    read: Callable[[Any, Headers], T]
    """Of the JSON and the headers. KeyError, IndexError, TypeError or ValueError say that vLLM does not answer so."""


def chat_request(
    model: str,
    messages: Sequence[Mapping[str, Any]],
    max_tokens: int,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Request[Completion]:
    """One greedy chat completion, rendered by the engine's own chat template."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [dict(message) for message in messages],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    if chat_template_kwargs:
        body["chat_template_kwargs"] = dict(chat_template_kwargs)
    return Request("/v1/chat/completions", body, _read_chat)


def completion_request(
    model: str, prompt: str | Sequence[int], max_tokens: int, *, user: str | None = None
) -> Request[Completion]:
    """One greedy plain completion of a text or of token ids; `user` keeps conversations of one name on one side of a canary."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    if user is not None:
        body["user"] = user
    return Request("/v1/completions", body, _read_completion)


class EngineClient:
    """Talks to one engine. Threads may share it; close it, or use it as a context manager."""

    def __init__(self, url: str, api_key: str | None = None, *, timeout_s: float = 300.0) -> None:
        """`url` without `/v1`; `timeout_s` per request, generous because the first request after a start is slow."""
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        # A proxy from the environment cannot reach this machine's own loopback.
        self._trust_env = not _is_loopback(self.url)
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_S)
        self._http = httpx.Client(base_url=self.url, headers=self._headers, timeout=timeout, trust_env=self._trust_env)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def health(self) -> bool:
        """Whether the engine is there and says that it can serve. Never raises."""
        try:
            return self._http.get("/health", timeout=10.0).status_code == 200
        except httpx.HTTPError:
            return False

    def models(self) -> tuple[str, ...]:
        """Names that the engine lists: the base model and the releases that it has loaded so far.

        Raises:
            EngineError: unreachable, or an error status.
        """
        response = self._response("GET", "/v1/models")
        try:
            return tuple(str(model["id"]) for model in response.json()["data"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._strange("/v1/models") from error

    def metrics(self) -> str:
        """The engine's counters, as Prometheus reads them.

        Raises:
            EngineError: unreachable, or an error status.
        """
        return self._response("GET", "/metrics").text

    def chat(self, model: str, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Completion:
        """What `chat_request` asks. Raises EngineError: unreachable, or an error status (`EngineRefused`)."""
        return self.ask(chat_request(model, messages, max_tokens))

    def complete(
        self, model: str, prompt: str | Sequence[int], max_tokens: int, *, user: str | None = None
    ) -> Completion:
        """What `completion_request` asks. Raises EngineError: unreachable, or an error status (`EngineRefused`)."""
        return self.ask(completion_request(model, prompt, max_tokens, user=user))

    def ask(self, request: Request[T]) -> T:
        """One request.

        Raises:
            EngineError: unreachable, an error status (`EngineRefused`), or an answer that is not vLLM's.
        """
        response = self._response("POST", request.path, request.body)
        return self._read(request, response.content, response.headers)

    def ask_together(self, requests: Sequence[Request[T]], *, at_once: int) -> list[T]:
        """Several requests, `at_once` in flight; the answers in their order. The first that fails ends all.

        They leave in one go, from one thread: an engine that gets them one by one may answer each alone. (vLLM's core spins while it
        waits for its worker, so on a machine of few cores hardly another request gets in until the first is done.)

        Raises:
            EngineError: as `ask`.
        """
        return _run(self._ask_together(requests, at_once))

    async def _ask_together(self, requests: Sequence[Request[T]], at_once: int) -> list[T]:
        import aiohttp  # 0.2 s, which no rollback should wait for

        tls: Any = (
            httpx.create_ssl_context() if self.url.startswith("https:") else True
        )  # the authorities that `ask` trusts
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=at_once, ssl=tls),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=self._timeout_s),
            trust_env=self._trust_env,
        ) as session:
            return await asyncio.gather(*(self._ask_in(session, request) for request in requests))

    async def _ask_in(self, session: aiohttp.ClientSession, request: Request[T]) -> T:
        from aiohttp import ClientError

        try:
            async with session.post(self.url + request.path, json=request.body) as response:
                content = await response.read()
        except TimeoutError as error:
            raise self._late(request.path) from error
        except (ClientError, ValueError) as error:  # ValueError: a URL that is none
            raise self._unreachable(error) from error
        if response.status >= 400:
            raise _refused(self.url + request.path, response.status, response.reason or "", content)
        return self._read(request, content, response.headers)

    def _read(self, request: Request[T], content: bytes, headers: Headers) -> T:
        try:
            return request.read(json.loads(content), {name.lower(): value for name, value in headers.items()})
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._strange(request.path) from error

    def score_targets(
        self, model: str, prompts_ids: Sequence[Sequence[int]], target_ids: Sequence[Sequence[int]]
    ) -> list[list[TokenScore]]:
        """Score every target token given its prompt and the target tokens before it: one prefill per prompt.

        Several prompts go into one request, several requests run at once. Prompts must not be empty: the first token
        of all has no probability.

        Raises:
            EngineError: unreachable, an error status, or a token without a score.
            ValueError: lists of different lengths, or an empty prompt.
        """
        if len(prompts_ids) != len(target_ids):
            raise ValueError(f"{len(prompts_ids)} prompts and {len(target_ids)} targets")
        if not all(prompts_ids):
            raise ValueError("a prompt is empty")
        pairs = [(list(prompt), list(target)) for prompt, target in zip(prompts_ids, target_ids, strict=True)]
        requests = [self._scoring(model, batch) for batch in _batches(pairs)]
        answers = self.ask_together(requests, at_once=_PARALLEL_REQUESTS) if requests else []
        return [scores for batch in answers for scores in batch]

    def _scoring(self, model: str, pairs: list[tuple[list[int], list[int]]]) -> Request[list[list[TokenScore]]]:
        def read(answer: Any, _: Headers) -> list[list[TokenScore]]:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            return [self._scores(choice["prompt_logprobs"], *pair) for choice, pair in zip(choices, pairs, strict=True)]

        body = {
            "model": model,
            "prompt": [prompt + target for prompt, target in pairs],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 1,
        }
        return Request("/v1/completions", body, read)

    def _scores(
        self, positions: Sequence[Mapping[str, Any] | None], prompt: list[int], target: list[int]
    ) -> list[TokenScore]:
        if len(positions) != len(prompt) + len(target):
            raise EngineError(
                f"{self.url}: {len(positions)} prompt log-probabilities for {len(prompt) + len(target)} tokens",
                "this vLLM is not one that memupdate supports",
            )
        return [_token_score(token, positions[len(prompt) + offset]) for offset, token in enumerate(target)]

    def _response(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise self._late(path) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if response.status_code >= 400:
            raise _refused(self.url + path, response.status_code, response.reason_phrase, response.content)
        return response

    def _late(self, path: str) -> EngineError:
        return EngineError(f"{self.url}{path} did not answer in time", "look at the engine's log")

    def _unreachable(self, error: Exception) -> EngineError:
        reason = str(error) or type(error).__name__
        return EngineError(f"{self.url} cannot be reached ({reason})", "is the engine running? `memupdate serve`")

    def _strange(self, path: str) -> EngineError:
        return EngineError(f"{self.url}{path} did not answer as vLLM does", "is this URL a vLLM server?")


def _batches(pairs: list[tuple[list[int], list[int]]]) -> list[list[tuple[list[int], list[int]]]]:
    """Consecutive pairs, cut where a request would grow beyond its bounds; a single long pair goes alone."""
    batches: list[list[tuple[list[int], list[int]]]] = []
    tokens = 0
    for prompt, target in pairs:
        size = len(prompt) + len(target)
        if not batches or len(batches[-1]) >= _BATCH_PROMPTS or tokens + size > _BATCH_TOKENS:
            batches.append([])
            tokens = 0
        batches[-1].append((prompt, target))
        tokens += size
    return batches


def _token_score(token: int, position: Mapping[str, Any] | None) -> TokenScore:
    """Raises KeyError or TypeError where the engine gave no score."""
    if position is None:
        raise KeyError(token)
    own = position[str(token)]
    # vLLM lists the token itself and the most probable one, whose rank is 1; they may be the same.
    top_id, top = min(position.items(), key=lambda item: (int(item[1]["rank"]), item[0] == str(token)))
    top_text, text = (str(entry.get("decoded_token") or "") for entry in (top, own))
    return TokenScore(token, float(own["logprob"]), int(own["rank"]), int(top_id), top_text, text)


def _read_chat(answer: Any, headers: Headers) -> Completion:
    choice = answer["choices"][0]
    text = choice["message"]["content"] or ""
    return Completion(text, str(answer["model"]), str(choice["finish_reason"]), headers)


def _read_completion(answer: Any, headers: Headers) -> Completion:
    choice = answer["choices"][0]
    return Completion(choice["text"], str(answer["model"]), str(choice["finish_reason"]), headers)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Its result; in a thread of its own where this one runs an event loop already, as a notebook's does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _refused(where: str, status: int, reason: str, content: bytes) -> EngineRefused:
    try:
        value = json.loads(content)
        error = value.get("error", value) if isinstance(value, dict) else value
        detail = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        detail = content.decode(errors="replace")
    line = " ".join(str(detail).split())[:400] or reason
    hint = "look at the engine's log" if status >= 500 else ""
    return EngineRefused(f"{where} answered {status}: {line}", hint, status=status)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
