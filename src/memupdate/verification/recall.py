"""Proof of recall: from one forward pass in process, or from the serving engine's prompt log-probabilities.

A fact is proved iff every target token, end token included, is the argmax given the true prefix and its probability is at least
the policy's. The first makes greedy decoding emit the target; the second is the distance that rounding has to overcome.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memupdate.facts.render import Example


@dataclass(frozen=True)
class FactProof:
    """The verdict on one fact. Positions count target tokens from 0."""

    fact_id: str
    prompt: str
    answer: str
    proved: bool
    min_probability: float
    failed_position: int | None = None
    """The first target token that is not the argmax, else the first one below the probability asked for."""
    failed_token: str | None = None
    emitted_token: str | None = None
    """What greedy decoding emits there instead."""

    def explain(self) -> str:
        """One line for people."""
        if self.proved:
            return f"{self.prompt!r} → {self.answer!r}: proved, smallest probability {self.min_probability:.3f}"
        where = f"token {self.failed_position} {self.failed_token!r}"
        if self.emitted_token != self.failed_token:
            return f"{self.prompt!r} → {self.answer!r}: {where} is not what comes out, {self.emitted_token!r} is"
        return f"{self.prompt!r} → {self.answer!r}: {where} has probability {self.min_probability:.3f} only"


def judge(
    example: Example,
    probabilities: Sequence[float],
    greedy_ids: Sequence[int],
    *,
    min_probability: float,
    decode: Callable[[int], str],
) -> FactProof:
    """Verdict on one example from its target tokens' probabilities and the argmax at each position."""
    wrong = [i for i, (best, true) in enumerate(zip(greedy_ids, example.target_ids, strict=True)) if best != true]
    weak = [i for i, p in enumerate(probabilities) if not p >= min_probability]  # NaN is weak too
    failed = next(iter(wrong + weak), None)
    return FactProof(
        fact_id=example.fact_id,
        prompt=example.prompt,
        answer=example.answer,
        proved=failed is None,
        min_probability=min(probabilities),
        failed_position=failed,
        failed_token=None if failed is None else decode(example.target_ids[failed]),
        emitted_token=None if failed is None else decode(greedy_ids[failed]),
    )
