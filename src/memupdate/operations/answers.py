"""What clients got from a release under an alias, read from the engines' own counters.

Invariant: only what engines say is counted. Their counters begin with each engine's start, so two readings are compared: where the
later one is smaller, an engine began anew in between, and it alone counts. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from memupdate.operations.replicas import Replica
from memupdate.operations.session import Session
from memupdate.serving.client import EngineClient

_COUNTER = "memupdate_requests"
_NOT_FOUND = 404
"""A release that an engine refuses to load is our failure, not the client's."""


@dataclass(frozen=True)
class Answers:
    """Answers to requests, over all replicas."""

    requests: int = 0
    errors: int = 0
    """Server errors, and releases that were not found."""

    @property
    def error_share(self) -> float:
        """Of the requests, 0–1."""
        return self.errors / self.requests if self.requests else 0.0

    def since(self, before: Answers) -> Answers:
        """Those that came after an earlier reading."""
        if self.requests < before.requests or self.errors < before.errors:
            return self
        return Answers(self.requests - before.requests, self.errors - before.errors)


def answers_of(session: Session, alias: str, release: str, replicas: Sequence[Replica]) -> Answers:
    """All answers of `release` to requests for `alias`. Raises EngineError where a replica cannot be reached."""
    total = Answers()
    for replica in replicas:
        with EngineClient(replica.url, session.api_key) as client:
            found = count_answers(client.metrics(), alias, release)
        total = Answers(total.requests + found.requests, total.errors + found.errors)
    return total


def count_answers(metrics: str, alias: str, release: str) -> Answers:
    """The same in one engine's counters, as Prometheus reads them."""
    requests = errors = 0
    for family in text_string_to_metric_families(metrics):
        if family.name != _COUNTER:
            continue
        for sample in family.samples:
            labels = sample.labels
            if not sample.name.endswith("_total") or (labels.get("alias"), labels.get("release")) != (alias, release):
                continue
            status = int(labels["status"])
            requests += int(sample.value)
            errors += int(sample.value) if status >= 500 or status == _NOT_FOUND else 0
    return Answers(requests, errors)
