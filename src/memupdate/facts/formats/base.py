"""What a format of facts is, and helpers that formats share.

Invariant: detection looks at keys only (also of what is nested), so that two records with the same keys are never read in different ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from memupdate.facts.fields import Fields, RecordProblems
from memupdate.facts.model import Fact, Probe

__all__ = ["RecordFormat", "RecordProblems", "answer_of", "checked", "paraphrases_of", "probe"]


class RecordFormat(Protocol):
    """One format of facts. Plug-ins offer instances under the entry point group `memupdate.fact_formats`."""

    @property
    def name(self) -> str:
        """As recorded in the ledger: lower case, without `+`."""

    @property
    def summary(self) -> str:
        """One line: by which keys it is known, and what they become."""

    def detect(self, record: Any) -> bool:
        """Whether the keys of `record`, a JSON object or list, are this format's. Never raises."""

    def parse(self, record: Any) -> Sequence[Fact]:
        """The facts that `record` states, mostly one. Raises RecordProblems."""


def checked(fields: Fields, *facts: Fact) -> tuple[Fact, ...]:
    """The facts, unless their record has problems. Raises RecordProblems."""
    fields.raise_problems()
    return facts


def paraphrases_of(prompt: str, others: Iterable[Any]) -> tuple[str, ...]:
    """Those of `others` that say something, each once and none like the prompt: data sets are not careful about that."""
    texts = (other for other in others if isinstance(other, str) and other.strip() and other != prompt)
    return tuple(dict.fromkeys(texts))


def probe(prompt: Any, target: Any) -> Probe | None:
    """A probe from what a data set has: None without a prompt, without a target where there is no answer."""
    question = answer_of(prompt)
    return None if question is None else Probe(question, answer_of(target))


def answer_of(value: Any) -> str | None:
    """The first text of `"a"`, `["a", "b"]` or `[["a"], ["b"]]`; None where there is none."""
    while isinstance(value, list):
        value = next((item for item in value if item), None)
    text = str(value) if type(value) is int else value
    return text if isinstance(text, str) and text.strip() else None
