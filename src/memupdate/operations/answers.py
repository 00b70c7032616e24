"""What clients got from a canary and from the release beside it, read from the engines' own counters, and which engines did not live on.

Invariant: only what engines say is counted, each engine by itself. Counters begin with an engine's start and are gone with it, so
what was seen when a canary began is kept with that step, engine by engine: an engine that was there then and does not answer now, or
was started since, is told of as such, and the others count all the same. Nothing here decides anything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from memupdate.errors import EngineError
from memupdate.operations.replicas import Replica
from memupdate.operations.session import Session
from memupdate.serving.client import EngineClient
from memupdate.storage import canonical_json

ENGINES_BEFORE = "engines_before"
"""Of the step that begins a canary: what each engine had counted by then, as `seen_json` writes it."""
_COUNTER = "memupdate_requests"
_STARTED = "process_start_time_seconds"
_NOT_FOUND = 404
"""A release that an engine refuses to load is our failure, not the client's."""
_SAME_START_S = 1.0
_TIMEOUT_S = 5.0
_TRIES = 3
_PAUSE_S = 1.0
_NONE_OF = 10
"""An engine that has given so many answers of a release, all of them refusals, does not serve it: vLLM answers 400 where it finds a
release and cannot load it."""


@dataclass(frozen=True)
class Answers:
    """Answers to requests."""

    requests: int = 0
    errors: int = 0
    """Server errors, and releases that were not found."""
    refused: int = 0
    """Other client errors: bad requests, and releases that vLLM finds and cannot load."""

    def __add__(self, other: Answers) -> Answers:
        return Answers(self.requests + other.requests, self.errors + other.errors, self.refused + other.refused)

    def __sub__(self, other: Answers) -> Answers:
        return Answers(self.requests - other.requests, self.errors - other.errors, self.refused - other.refused)

    def follows(self, before: Answers) -> bool:
        """Whether counters that stood at `before` can stand here now."""
        return self.requests >= before.requests and self.errors >= before.errors and self.refused >= before.refused

    def since(self, before: Answers) -> Answers:
        """Those that came after an earlier reading; all, where the counters have begun anew."""
        return self - before if self.follows(before) else self


@dataclass(frozen=True)
class Seen:
    """One engine's counters."""

    started_s: float | None = None
    """When its process began, seconds since 1970 by its own clock; None where it does not say."""
    canary: Answers = field(default_factory=Answers)
    beside: Answers = field(default_factory=Answers)
    """Of the release that the other conversations of the alias go to."""

    def follows(self, before: Seen) -> bool:
        """Whether it is the same process as the one that was seen then."""
        if self.started_s is not None and before.started_s is not None:
            return abs(self.started_s - before.started_s) <= _SAME_START_S
        return self.canary.follows(before.canary) and self.beside.follows(before.beside)


@dataclass(frozen=True)
class Shown:
    """What a canary has shown since it began."""

    canary: Answers = field(default_factory=Answers)
    beside: Answers = field(default_factory=Answers)
    unloadable: int = 0
    """Of the canary's refused answers: those of engines that have given no other."""
    down: tuple[str, ...] = ()
    """URLs of engines that were there when it began and do not answer."""
    restarted: tuple[str, ...] = ()
    """URLs of engines that were started again since."""


def look(session: Session, alias: str, canary: str, beside: str, replicas: Sequence[Replica]) -> dict[str, Seen | None]:
    """What each engine has counted of the two releases under `alias`, by its URL; None where it does not answer in three tries."""
    return {replica.url: _look(session, alias, canary, beside, replica.url) for replica in replicas}


def seen_before(session: Session, alias: str, canary: str, beside: str, replicas: Sequence[Replica]) -> dict[str, str]:
    """The same before a canary begins, for the step's detail. Raises EngineError where an engine does not answer."""
    seen = look(session, alias, canary, beside, replicas)
    if silent := [url for url, there in seen.items() if there is None]:
        raise EngineError(f"{', '.join(silent)} cannot be reached", "a canary begins on engines that answer")
    return {ENGINES_BEFORE: seen_json({url: there for url, there in seen.items() if there is not None})}


def shown_since(before: Mapping[str, Seen], now: Mapping[str, Seen | None]) -> Shown:
    """What came between two looks. An engine that was not there at the first counts from its own start."""
    pairs = [(url, before.get(url), there) for url, there in now.items()]
    parts = [_part(then, there) for _, then, there in pairs if there]
    return Shown(
        canary=_sum(part.canary for part in parts),
        beside=_sum(part.beside for part in parts),
        unloadable=sum(p.canary.refused for p in parts if p.canary.refused == p.canary.requests >= _NONE_OF),
        down=tuple(url for url, then, there in pairs if then and not there),
        restarted=tuple(url for url, then, there in pairs if then and there and not there.follows(then)),
    )


def seen_json(seen: Mapping[str, Seen]) -> str:
    """As one text, which is what a step's detail can hold."""
    return canonical_json({url: [s.started_s, _numbers(s.canary), _numbers(s.beside)] for url, s in seen.items()})


def parse_seen(text: str) -> dict[str, Seen]:
    """What `seen_json` wrote."""
    return {
        url: Seen(started, Answers(*canary), Answers(*beside))
        for url, (started, canary, beside) in json.loads(text).items()
    }


def count_answers(metrics: str, alias: str, release: str) -> Answers:
    """All answers of `release` to requests for `alias` in one engine's counters, as Prometheus reads them."""
    total = Answers()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples if family.name == _COUNTER else ():
            labels = sample.labels
            if not sample.name.endswith("_total") or (labels.get("alias"), labels.get("release")) != (alias, release):
                continue
            status, count = int(labels["status"]), int(sample.value)
            is_error = status >= 500 or status == _NOT_FOUND
            total += Answers(count, count if is_error else 0, count if status >= 400 and not is_error else 0)
    return total


def _look(session: Session, alias: str, canary: str, beside: str, url: str) -> Seen | None:
    with EngineClient(url, session.api_key, timeout_s=_TIMEOUT_S) as client:
        for number in range(_TRIES):
            try:
                metrics = client.metrics()
                return Seen(
                    _started(metrics), count_answers(metrics, alias, canary), count_answers(metrics, alias, beside)
                )
            except EngineError:
                time.sleep(_PAUSE_S if number + 1 < _TRIES else 0)
    return None


def _started(metrics: str) -> float | None:
    """None where several processes share the counters: none of them is the engine's start."""
    families = [f for f in text_string_to_metric_families(metrics) if f.name == _STARTED]
    found = [sample.value for family in families for sample in family.samples]
    return found[0] if len(found) == 1 else None


def _part(before: Seen | None, now: Seen) -> Seen:
    """What one engine has counted since."""
    if before is None or not now.follows(before):
        return now
    return Seen(now.started_s, now.canary.since(before.canary), now.beside.since(before.beside))


def _sum(answers: Iterable[Answers]) -> Answers:
    return sum(answers, start=Answers())


def _numbers(answers: Answers) -> list[int]:
    return [answers.requests, answers.errors, answers.refused]
