"""What clients get of a release beyond its facts' own prompts: questions asked and judged, general text, tokens one by one.

Invariant: rows are append-only; all rows of one run carry one time, so the newest run on an engine is found by it. Recall under
the facts' own prompts is in `proofs` and counted from there. How anything is measured is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from memupdate.ledger import chain
from memupdate.ledger.clock import utc_now
from memupdate.ledger.content import storable
from memupdate.ledger.database import LedgerDatabase
from memupdate.ledger.records import Engine

Measure = Literal["recall", "generality", "locality", "portability"]
"""Of the facts as trained; of other wordings and forms of the request; of what must not change; of what follows from the facts."""
Judged = Literal["exact", "normalised", "contained", "other"]
"""The strictest way in which an answer matches: to the character and then stopped; but for case, spaces and closing punctuation;
somewhere in a longer answer; not at all."""

OWN_PROMPT = "own prompt"
"""The part of recall that proofs make; the views name it too."""


@dataclass(frozen=True)
class MeasureRecord:
    """One question asked of one release."""

    release: str
    engine: Engine
    measure: Measure
    part: str
    """Which wording, which neighbourhood."""
    fact: str | None
    """Id of the fact that it was asked for; None for the workspace's probes."""
    style: Literal["chat", "completion"]
    prompt: str
    expected: str
    answer: str | None
    """What came out, where that is not what was expected."""
    judged: Judged
    min_probability: float | None
    """Of the expected answer's weakest token, 0 to 1; None where the answer was only generated."""
    measured_at_utc: str = ""
    """Set by the ledger."""


@dataclass(frozen=True)
class TextRecord:
    """General text under one release."""

    release: str
    corpus: str
    """A file of the workspace, or `held-out anchors`."""
    tokens: int
    perplexity_base: float
    perplexity: float
    kl_nats: float
    """Mean KL(base ‖ release) per token over the whole vocabulary, nats."""
    measured_at_utc: str = ""
    """Set by the ledger."""

    @property
    def perplexity_ratio(self) -> float:
        """Above 1 where the release predicts the text worse than the base model."""
        return self.perplexity / self.perplexity_base


@dataclass(frozen=True)
class TokenRecord:
    """One target token of one of a release's least sure facts, given the true prefix."""

    release: str
    fact: str
    """Its id."""
    position: int
    token: str | None
    """None where its text was purged."""
    probability: float
    best_token: str | None
    """The likeliest one there."""
    best_probability: float
    measured_at_utc: str = ""
    """Set by the ledger."""


@dataclass(frozen=True)
class MeasureCount:
    """Answers of one release by wording or neighbourhood; each of the three counts includes the stricter ones."""

    release: str
    engine: Engine
    measure: Measure
    part: str
    asked: int
    exact: int
    normalised: int
    contained: int
    min_probability: float | None
    """The smallest over the expected answers' weakest tokens."""

    @property
    def exact_share(self) -> float:
        """Of the answers asked for, 0 to 1."""
        return self.exact / self.asked if self.asked else 1.0


@dataclass(frozen=True)
class FactTokens:
    """The newest token probabilities of one fact in one release."""

    fact: str
    prompt: str
    target: str
    tokens: tuple[TokenRecord, ...]
    """By position."""


class Measures(LedgerDatabase):
    """Measures of releases."""

    def record_measures(
        self,
        release: str,
        measures: Sequence[MeasureRecord],
        texts: Sequence[TextRecord] = (),
        tokens: Sequence[TokenRecord] = (),
    ) -> None:
        """Store what one run measured of `release`, which must be recorded (in the same transaction will do)."""
        now = utc_now()
        with self.transaction():
            self._insert_all("measures", [_measure_row(record, now) for record in measures])
            self._insert_all("text_measures", [asdict(replace(record, measured_at_utc=now)) for record in texts])
            self._insert_all(
                "token_probabilities",
                [
                    {**asdict(record), "token": storable(record.token), "best_token": storable(record.best_token)}
                    | {"measured_at_utc": now}
                    for record in tokens
                ],
            )
            if measures or texts or tokens:
                chain.note(self._connection, "measures of release", release)

    def measure_counts(self, release: str, engine: Engine | None = None) -> list[MeasureCount]:
        """The newest run's counts on each engine, in a fixed order."""
        rows = self._rows(
            "SELECT * FROM measure_summary WHERE release = :release AND (:engine IS NULL OR engine = :engine) "
            "ORDER BY engine, CASE measure WHEN 'recall' THEN 1 WHEN 'generality' THEN 2 WHEN 'locality' THEN 3 ELSE 4 END, "
            "part <> 'own prompt', part",
            {"release": release, "engine": engine},
        )
        return [MeasureCount(**dict(row)) for row in rows]

    def measures(self, release: str, engine: Engine | None = None, *, fact: str | None = None) -> list[MeasureRecord]:
        """What the newest run on each engine asked, in its order; of one fact, or of all."""
        columns = ", ".join(MeasureRecord.__dataclass_fields__)
        rows = self._rows(
            f"SELECT {columns} FROM latest_measures WHERE release = :release AND (:engine IS NULL OR engine = :engine) "
            "AND (:fact IS NULL OR fact = :fact) ORDER BY id",
            {"release": release, "engine": engine, "fact": fact},
        )
        return [MeasureRecord(**dict(row)) for row in rows]

    def text_measure(self, release: str) -> TextRecord | None:
        """The newest of a release; None where none was taken."""
        columns = ", ".join(TextRecord.__dataclass_fields__)
        row = self._row(f"SELECT {columns} FROM text_measures WHERE release = ? ORDER BY id DESC LIMIT 1", [release])
        return None if row is None else TextRecord(**dict(row))

    def fact_tokens(self, release: str, *, limit: int) -> list[FactTokens]:
        """The facts that the newest run was the least sure of, least sure first, with their tokens."""
        columns = ", ".join(f"t.{name}" for name in TokenRecord.__dataclass_fields__)
        rows = self._rows(
            f"SELECT f.prompt, f.target, {columns} FROM token_probabilities t JOIN facts f ON f.id = t.fact "
            "WHERE t.release = :release AND t.measured_at_utc = "
            "(SELECT MAX(measured_at_utc) FROM token_probabilities WHERE release = :release) ORDER BY t.id",
            {"release": release},
        )
        found: dict[str, FactTokens] = {}
        for row in rows:
            values = dict(row)
            prompt, target = values.pop("prompt"), values.pop("target")
            one = found.setdefault(row["fact"], FactTokens(row["fact"], prompt, target, ()))
            found[row["fact"]] = replace(one, tokens=(*one.tokens, TokenRecord(**values)))
        return list(found.values())[:limit]


def _measure_row(record: MeasureRecord, now: str) -> dict[str, object]:
    texts = {name: storable(getattr(record, name)) for name in ("prompt", "expected", "answer")}
    return {**asdict(record), **texts, "measured_at_utc": now}
