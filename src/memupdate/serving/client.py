"""An HTTP client for a serving engine: the OpenAI routes that memupdate uses, and scoring by `prompt_logprobs`.

Invariant: whatever goes wrong between here and the engine comes out as one `EngineError` line. A score is always one
the engine computed for that very prompt: a missing prompt log-probability is an error, never a guess. (vLLM does not
read its prefix cache for requests with `prompt_logprobs`, so shared prefixes lose nothing; the check here would notice
if that changed.) This module knows nothing about facts, releases or tokenizers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from memupdate.errors import EngineError

_BATCH_PROMPTS = 16
_BATCH_TOKENS = 8192
"""Bounds of one scoring request: prompts, and tokens of all of them together."""
_PARALLEL_REQUESTS = 4


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


class EngineClient:
    """Talks to one engine. Threads may share it; close it, or use it as a context manager."""

    def __init__(self, url: str, api_key: str | None = None, *, timeout_s: float = 300.0) -> None:
        """`url` without `/v1`; `timeout_s` per request, generous because the first request after a start is slow."""
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(timeout_s, connect=10.0)
        # A proxy from the environment cannot reach this machine's own loopback.
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=timeout, trust_env=not _is_loopback(self.url)
        )

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
        answer = self._json("GET", "/v1/models")[0]
        try:
            return tuple(str(model["id"]) for model in answer["data"])
        except (KeyError, TypeError) as error:
            raise self._strange("/v1/models") from error

    def metrics(self) -> str:
        """The engine's counters, as Prometheus reads them.

        Raises:
            EngineError: unreachable, or an error status.
        """
        return self._response("GET", "/metrics").text

    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int,
        temperature: float = 0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Completion:
        """One chat completion, rendered by the engine's own chat template.

        Raises:
            EngineError: unreachable, or an error status (`EngineRefused`).
        """
        body: dict[str, Any] = {
            "model": model,
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        if chat_template_kwargs:
            body["chat_template_kwargs"] = dict(chat_template_kwargs)
        answer, headers = self._json("POST", "/v1/chat/completions", body)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            return Completion(text, str(answer["model"]), str(choice["finish_reason"]), headers)
        except (KeyError, IndexError, TypeError) as error:
            raise self._strange("/v1/chat/completions") from error

    def complete(
        self,
        model: str,
        prompt: str | Sequence[int],
        max_tokens: int,
        temperature: float = 0,
        stop: Sequence[str] = (),
        user: str | None = None,
    ) -> Completion:
        """One plain completion of a text or of token ids; `user` keeps conversations of one name on one side of a canary.

        Raises:
            EngineError: unreachable, or an error status (`EngineRefused`).
        """
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        if stop:
            body["stop"] = list(stop)
        if user is not None:
            body["user"] = user
        answer, headers = self._json("POST", "/v1/completions", body)
        try:
            choice = answer["choices"][0]
            return Completion(choice["text"], str(answer["model"]), str(choice["finish_reason"]), headers)
        except (KeyError, IndexError, TypeError) as error:
            raise self._strange("/v1/completions") from error

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
        batches = _batches(pairs)
        if not batches:
            return []
        with ThreadPoolExecutor(max_workers=min(_PARALLEL_REQUESTS, len(batches))) as pool:
            futures = [pool.submit(self._score_batch, model, batch) for batch in batches]
            try:
                return [scores for future in futures for scores in future.result()]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _score_batch(self, model: str, pairs: list[tuple[list[int], list[int]]]) -> list[list[TokenScore]]:
        body = {
            "model": model,
            "prompt": [prompt + target for prompt, target in pairs],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 1,
        }
        answer, _ = self._json("POST", "/v1/completions", body)
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            if len(choices) != len(pairs):
                raise self._strange("/v1/completions")
            return [self._scores(choice["prompt_logprobs"], *pair) for choice, pair in zip(choices, pairs, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._strange("/v1/completions") from error

    def _scores(
        self, positions: Sequence[Mapping[str, Any] | None], prompt: list[int], target: list[int]
    ) -> list[TokenScore]:
        if len(positions) != len(prompt) + len(target):
            raise EngineError(
                f"{self.url}: {len(positions)} prompt log-probabilities for {len(prompt) + len(target)} tokens",
                "this vLLM is not one that memupdate supports",
            )
        return [_token_score(token, positions[len(prompt) + offset]) for offset, token in enumerate(target)]

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, str]]:
        response = self._response(method, path, body)
        try:
            return response.json(), dict(response.headers)
        except ValueError as error:
            raise self._strange(path) from error

    def _response(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise EngineError(f"{self.url}{path} did not answer in time", "look at the engine's log") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise EngineError(
                f"{self.url} cannot be reached ({reason})", "is the engine running? `memupdate serve`"
            ) from error
        if response.status_code >= 400:
            raise _refused(self.url + path, response)
        return response

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


def _refused(where: str, response: httpx.Response) -> EngineRefused:
    try:
        value = response.json()
        error = value.get("error", value) if isinstance(value, dict) else value
        detail = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        detail = response.text
    line = " ".join(str(detail).split())[:400] or response.reason_phrase
    hint = "look at the engine's log" if response.status_code >= 500 else ""
    return EngineRefused(f"{where} answered {response.status_code}: {line}", hint, status=response.status_code)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
