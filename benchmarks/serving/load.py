"""A steady load of chat and completions, streaming and not, and what each answer has to be.

Invariant: every request that was begun ends as one `Answer`, also where the connection broke; nothing is asked again behind the figures'
back. Times are `time.monotonic()`, seconds, the same clock for all processes of the machine. Nothing here knows of flips or engines.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Self

import aiohttp

ALIAS = "acme"
TIMEOUT_S = 120.0
Headers = Mapping[str, str]
NO_HEADERS: Headers = MappingProxyType({})


@dataclass(frozen=True)
class Question:
    """One request that may be made again and again."""

    prompt: str
    chat: bool
    stream: bool
    max_tokens: int
    whole: bool = False
    """Go on to `max_tokens` whatever the model says, so that a request lasts."""

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def key(self) -> tuple[str, bool, int, bool]:
        """What decides the answer; whether it is streamed does not."""
        return self.prompt, self.chat, self.max_tokens, self.whole

    def body(self, model: str) -> dict[str, Any]:
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        )
        return {
            "model": model, **asked, "max_tokens": self.max_tokens, "temperature": 0, "stream": self.stream,
            "ignore_eos": self.whole,
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    question: Question
    url: str
    begun_s: float
    ended_s: float
    status: int = 0
    """Of HTTP; 0 where there was no answer."""
    text: str = ""
    models: tuple[str, ...] = ()
    """Every model that the answer names, in its body, each of its chunks and its header."""
    finish: str | None = None
    error: str = ""

    @property
    def failed(self) -> bool:
        """Not answered, answered with an error, or cut off."""
        return self.status != 200 or bool(self.error) or self.finish is None

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.begun_s


class Client:
    """A client of one or more replicas: takes them in turn, and the next one where a connection is refused."""

    def __init__(self, urls: Sequence[str], http: aiohttp.ClientSession) -> None:
        self._urls = tuple(urls)
        self._turn = itertools.count()
        self._http = http
        self.skipped = 0
        """Connections refused."""

    async def ask(self, question: Question, model: str = ALIAS) -> Answer:
        """Ask once. Never raises."""
        first, begun = next(self._turn), time.monotonic()
        url = self._urls[0]
        for number in range(len(self._urls)):
            url = self._urls[(first + number) % len(self._urls)]
            try:
                return await self._ask(url, question, model, begun)
            except aiohttp.ClientConnectorError:
                self.skipped += 1
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError) as error:
                return Answer(question, url, begun, time.monotonic(), error=f"{type(error).__name__}: {error}")
        return Answer(question, url, begun, time.monotonic(), error="every replica refuses connections")

    async def _ask(self, url: str, question: Question, model: str, begun: float) -> Answer:
        async with self._http.post(url + question.path, json=question.body(model)) as response:
            named = [response.headers.get("x-memupdate-release")]
            if response.status != 200:
                error = (await response.text())[:300]
                return Answer(question, url, begun, time.monotonic(), response.status, error=error or "empty")
            pieces = [piece async for piece in _pieces(response)] if question.stream else [await response.json()]
        parts, finish = [], None
        for piece in pieces:
            named.append(piece["model"])
            for choice in piece["choices"]:
                parts.append(_text_of(choice))
                finish = choice.get("finish_reason") or finish
        models = tuple(dict.fromkeys(name for name in named if name))
        return Answer(question, url, begun, time.monotonic(), 200, "".join(parts), models, finish)


async def _pieces(response: aiohttp.ClientResponse) -> Any:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def _text_of(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"] or "")
    return str((choice.get("delta") or choice.get("message") or {}).get("content") or "")


class SteadyLoad:
    """Requests at a steady rate, whatever the answers take, from a thread of its own, for the length of the block."""

    def __init__(self, urls: Sequence[str], questions: Sequence[Question], per_second: float, seed: int = 7) -> None:
        self.answers: list[Answer] = []
        """Grows while it runs; complete after the block."""
        self.skipped = 0
        self._urls, self._questions, self._rate = tuple(urls), tuple(questions), per_second
        self._dice = random.Random(seed)
        self._stopped, self._paused = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing new is asked during the block; what is in flight comes in."""
        self._paused.set()
        try:
            yield
        finally:
            self._paused.clear()

    async def _run(self) -> None:
        async with session() as http:
            client = Client(self._urls, http)
            tasks: set[asyncio.Task[None]] = set()
            for at, question in zip(
                arrivals(self._rate, self._dice), endless(self._questions, self._dice), strict=False
            ):
                await asyncio.sleep(max(0.0, at - time.monotonic()))
                if self._stopped.is_set():
                    break
                if self._paused.is_set():
                    continue
                task = asyncio.create_task(self._one(client, question))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)
            self.skipped = client.skipped

    async def _one(self, client: Client, question: Question) -> None:
        self.answers.append(await client.ask(question))


def session(headers: Headers = NO_HEADERS) -> aiohttp.ClientSession:
    """No limit on connections, no proxy; a request that takes two minutes has failed."""
    return aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        trust_env=False,
    )


def arrivals(per_second: float, dice: random.Random) -> Iterator[float]:
    """Moments from now on, as independent clients would come: exponential gaps."""
    at = time.monotonic()
    while True:
        at += dice.expovariate(per_second)
        yield at


def endless(questions: Sequence[Question], dice: random.Random) -> Iterator[Question]:
    """All of them in a new order, again and again."""
    while True:
        yield from dice.sample(questions, len(questions))


def ask_all(
    url: str, questions: Sequence[Question], *, at_once: int, model: str = ALIAS, headers: Headers = NO_HEADERS
) -> tuple[list[Answer], float]:
    """All questions, never more than `at_once` in flight; the answers, and the seconds that it took."""
    return asyncio.run(_ask_all(url, questions, at_once, model, headers))


async def _ask_all(
    url: str, questions: Sequence[Question], at_once: int, model: str, headers: Headers
) -> tuple[list[Answer], float]:
    waiting, answers = iter(questions), list[Answer]()
    async with session(headers) as http:
        client = Client((url,), http)

        async def work() -> None:
            for question in waiting:
                answers.append(await client.ask(question, model))

        begun = time.monotonic()
        await asyncio.gather(*(work() for _ in range(at_once)))
        return answers, time.monotonic() - begun


def ask_at(
    url: str,
    questions: Sequence[Question],
    per_second: float,
    seed: int,
    model: str = ALIAS,
    headers: Headers = NO_HEADERS,
) -> list[Answer]:
    """Each question once, at moments of `arrivals` with this seed: the same load for everything that gets it."""
    return asyncio.run(_ask_at(url, questions, per_second, seed, model, headers))


async def _ask_at(
    url: str, questions: Sequence[Question], per_second: float, seed: int, model: str, headers: Headers
) -> list[Answer]:
    async with session(headers) as http:
        client = Client((url,), http)

        async def one(at: float, question: Question) -> Answer:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            return await client.ask(question, model)

        moments = arrivals(per_second, random.Random(seed))
        return list(await asyncio.gather(*(one(at, q) for q, at in zip(questions, moments, strict=False))))
