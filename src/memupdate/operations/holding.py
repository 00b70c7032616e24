"""What a compaction does about dead answers that come out although nothing taught them: it holds their questions.

A memory of related facts may guess a retracted answer anew. Where it does, the question is trained like a fact, to the live
answer of its key or, without one, to the base model's own greedy answer: what the model would say had it never been told.
Invariant: only questions whose dead answer was seen to come out, or to be too likely, are held; nothing of it is a fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from memupdate.facts.model import Fact
from memupdate.facts.render import Example
from memupdate.operations.session import Session
from memupdate.progress import Progress

if TYPE_CHECKING:
    from memupdate.verification.gone import DeadAnswer

_ANSWER_TOKENS = 48
"""Longest answer of the base model that a question is held to."""


def hold_examples(
    session: Session, left: Sequence[DeadAnswer], dead: Sequence[Fact], live: Sequence[Fact], progress: Progress
) -> list[Example]:
    """What to train so that the answers in `left` do not come out, one example per phrasing, in their order."""
    from memupdate.verification.inprocess import generate_greedy

    renderer, base = session.renderer, session.base
    by_key, by_id = {fact.key: fact for fact in live}, {fact.id: fact for fact in dead}
    told = [renderer.render(by_key.get(by_id[d.fact_id].key, by_id[d.fact_id]), d.prompt) for d in left]
    open_ = [i for i, d in enumerate(left) if by_id[d.fact_id].key not in by_key]
    prompts = [told[i].prompt_ids for i in open_]
    for index, ids in zip(open_, generate_greedy(base, base.model, prompts, _ANSWER_TOKENS, progress), strict=True):
        answer = str(base.tokenizer.decode(ids, skip_special_tokens=True))
        told[index] = replace(told[index], answer=answer, target_ids=tuple(ids))
    return told
