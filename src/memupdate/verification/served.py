"""Proofs on the serving engine: every target token by prompt log-probabilities, and a sample by free greedy generation.

Requests go out several at a time, as clients' do, so that the engine computes in the batches that it serves with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memupdate.facts.render import Example
from memupdate.ledger.measures import Judged
from memupdate.serving.client import Completion, EngineClient, Request, chat_request, completion_request
from memupdate.verification.questions import judge_text
from memupdate.verification.recall import FactProof, judge

GENERATED = "own prompt, generated"
"""The part of recall that free answers of the engine make."""
_ROOM_TOKENS = 8
"""Tokens more than the target has: an answer that goes on is seen to go on."""
_AT_ONCE = 16
"""Requests in flight together."""


@dataclass(frozen=True)
class Generated:
    """One free answer of the engine against the fact."""

    example: Example
    text: str
    model: str
    """What the engine says answered."""
    stopped: bool
    """It ended by itself."""

    @property
    def matches(self) -> bool:
        """Word for word, and then nothing more."""
        return self.judged == "exact"

    @property
    def judged(self) -> Judged:
        """The strictest way in which it matches."""
        return judge_text(self.example.answer, self.text, stopped=self.stopped)


def prove_served(
    client: EngineClient, model: str, examples: Sequence[Example], *, min_probability: float
) -> list[FactProof]:
    """Verdicts in the order of `examples`, from one prefill each. Raises EngineError."""
    scores = client.score_targets(model, [e.prompt_ids for e in examples], [e.target_ids for e in examples])
    proofs = []
    for example, tokens in zip(examples, scores, strict=True):
        # Rank 1 is the engine's own word that nothing is likelier; a tie that it ranks 2 is not proved.
        greedy = [t.token_id if t.rank == 1 else t.top_token_id if t.top_token_id != t.token_id else -1 for t in tokens]
        names = {t.top_token_id: t.top_token for t in tokens} | {t.token_id: t.token for t in tokens} | {-1: "(a tie)"}
        probabilities = [math.exp(t.logprob) for t in tokens]
        decode = _decoder(names)
        proofs.append(judge(example, probabilities, greedy, min_probability=min_probability, decode=decode))
    return proofs


def _decoder(names: Mapping[int, str]) -> Callable[[int], str]:
    def decode(token: int) -> str:
        return names.get(token) or f"token {token}"

    return decode


def generate_served(
    client: EngineClient, model: str, examples: Sequence[Example], *, template_kwargs: Mapping[str, Any]
) -> list[Generated]:
    """Ask each example as a client would (chat or completion), greedily, with room to go on. Raises EngineError."""

    def asked(example: Example) -> Request[Completion]:
        room = len(example.target_ids) + _ROOM_TOKENS
        if example.style == "chat":
            return chat_request(model, example.messages, room, chat_template_kwargs=template_kwargs)
        return completion_request(model, example.prompt, room)

    answers = client.ask_together([asked(example) for example in examples], at_once=_AT_ONCE)
    return [
        Generated(example, answer.text, answer.model, answer.finish_reason == "stop")
        for example, answer in zip(examples, answers, strict=True)
    ]
