"""Proof that dead answers are gone: what a superseded or retracted fact taught is not what comes out, and is not likely either.

A dead answer is tested under each of its phrasings, as a whole: by the argmax chain, like a proof of recall, and by its
sequence probability `p = Π p_i`. What the base model says by itself is no trace of a memory, so whoever fails is measured
on the base model too. Which answers are dead is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from peft import PeftModel

from memupdate.facts.render import Example
from memupdate.models.scoring import TargetScore, score_examples


@dataclass(frozen=True)
class DeadAnswer:
    """What became of one dead answer under one phrasing."""

    fact_id: str
    prompt: str
    answer: str
    is_greedy: bool
    """Greedy decoding still gives it."""
    probability: float
    """Of the whole answer, 0 to 1."""
    base_is_greedy: bool = False
    base_probability: float = 0.0
    """The same two of the base model without a memory; measured only where the memory's are a reason to ask."""

    def is_gone(self, max_probability: float) -> bool:
        """Neither the greedy answer nor of this probability or more."""
        return not self.is_greedy and self.probability < max_probability

    def is_the_bases(self, max_probability: float) -> bool:
        """Not gone, but the base model itself fails the same test in the same way: no memory put it there."""
        greedy = not self.is_greedy or self.base_is_greedy
        likely = self.probability < max_probability or self.base_probability >= max_probability
        return not self.is_gone(max_probability) and greedy and likely

    def explain(self, max_probability: float) -> str:
        """One line for people, of an answer that is not gone."""
        what = "is still what comes out" if self.is_greedy else f"has probability {self.probability:.3f}"
        bound = "" if self.is_greedy else f", less than {max_probability:g} allowed"
        return f"{self.prompt!r} → {self.answer!r}: {what}{bound}"


def look_for_dead_answers(
    model: PeftModel, examples: Sequence[Example], device: torch.device, *, max_probability: float
) -> list[DeadAnswer]:
    """Verdicts in the order of `examples`, whose targets are the dead answers; one forward pass, two for those that fail."""
    found = [_verdict(e, s) for e, s in zip(examples, score_examples(model, examples, device), strict=True)]
    suspects = [i for i, verdict in enumerate(found) if not verdict.is_gone(max_probability)]
    if suspects:
        with model.disable_adapter():
            scores = score_examples(model, [examples[i] for i in suspects], device)
        for index, score in zip(suspects, scores, strict=True):
            own = _verdict(examples[index], score)
            found[index] = replace(found[index], base_is_greedy=own.is_greedy, base_probability=own.probability)
    return found


def _verdict(example: Example, score: TargetScore) -> DeadAnswer:
    greedy = score.greedy_ids == example.target_ids
    return DeadAnswer(example.fact_id, example.prompt, example.answer, greedy, math.exp(sum(score.logprobs)))
