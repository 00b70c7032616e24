"""Asking a model attached to its memory, as cheaply as it can be told: an argmax chain first, generation for what it leaves open.

Where every token of the expected answer is the argmax given the true prefix, greedy decoding gives that answer: one forward pass over
all questions finds those. Only the others are generated, greedily, in batches, to see what comes out in its place and whether
it still says the same. Which questions there are is not known here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from memupdate.facts.render import Example
from memupdate.models.base import BaseModel
from memupdate.models.scoring import PassBounds, length_batches, logits_at, pad_batch, score_examples, vocabulary_of
from memupdate.progress import Progress, ProgressEvent
from memupdate.verification.inprocess import end_ids, generate_greedy
from memupdate.verification.questions import Answered, Question, judge_text

ROOM_TOKENS = 8
"""Tokens more than the expected answer has: an answer that goes on is seen to go on."""
_LONGEST = 1024
"""Tokens generated at most; of a longer answer the rest is not looked at."""


@dataclass(frozen=True)
class TokenView:
    """One target token, given the true prefix."""

    token: str
    probability: float
    best_token: str
    """The likeliest one there."""
    best_probability: float


def ask(base: BaseModel, model: nn.Module, questions: Sequence[Question], progress: Progress) -> list[Answered]:
    """What came out for each question, in their order."""
    scores = score_examples(model, [q.example for q in questions], base.device)
    broken = [i for i, (q, s) in enumerate(zip(questions, scores, strict=True)) if s.greedy_ids != q.example.target_ids]
    said = _generate(base, model, [questions[i].example for i in broken], progress)
    texts = dict(zip(broken, said, strict=True))
    answers = []
    for index, (question, score) in enumerate(zip(questions, scores, strict=True)):
        expected, weakest = text_of(base, question.example.target_ids), score.min_probability
        if index not in texts:
            answers.append(Answered(question, "exact", expected, None, weakest))
            continue
        text, stopped = texts[index]
        judged = judge_text(expected, text, stopped=stopped)
        answers.append(Answered(question, judged, expected, None if judged == "exact" else text, weakest))
    return answers


def text_of(base: BaseModel, ids: Sequence[int]) -> str:
    """Token ids as a client reads them."""
    return str(base.tokenizer.decode(ids, skip_special_tokens=True))


def greedy_answer(base: BaseModel, model: nn.Module, example: Example, progress: Progress) -> str:
    """What the model says to one question, with room to go on after the expected answer."""
    return _generate(base, model, [example], progress)[0][0]


def look_at_tokens(base: BaseModel, model: nn.Module, examples: Sequence[Example]) -> list[tuple[TokenView, ...]]:
    """Every target token of `examples`, in their order, with what is likeliest in its place."""
    found: dict[int, tuple[TokenView, ...]] = {}
    for indices in length_batches(examples, PassBounds.on(base.device, vocabulary_of(model))):
        batch = pad_batch([examples[i] for i in indices], base.device)
        with torch.inference_mode():
            logits = logits_at(model, batch.ids, batch.mask, batch.rows, batch.positions).log_softmax(-1)
            own = logits.gather(1, batch.targets[:, None])[:, 0].tolist()
            best, best_ids = (t.tolist() for t in logits.max(-1))
        views = [
            TokenView(_token_text(base, token), math.exp(p), _token_text(base, top), math.exp(top_p))
            for token, p, top, top_p in zip(batch.targets.tolist(), own, best_ids, best, strict=True)
        ]
        for index in indices:
            count = len(examples[index].target_ids)
            found[index], views = tuple(views[:count]), views[count:]
    return [found[i] for i in range(len(examples))]


def _token_text(base: BaseModel, token: int) -> str:
    return str(base.tokenizer.decode(token))


def _generate(
    base: BaseModel, model: nn.Module, examples: Sequence[Example], progress: Progress
) -> list[tuple[str, bool]]:
    """Greedy answers and whether each ended by itself, in the order of `examples`; answers of like length are made together."""
    by_room: dict[int, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        wanted = len(example.target_ids) + ROOM_TOKENS
        by_room[min(_LONGEST, 1 << (wanted - 1).bit_length())].append(index)
    found: dict[int, tuple[str, bool]] = {}
    stops = end_ids(base)

    def tell(event: ProgressEvent) -> None:
        progress(replace(event, stage="measure", message="answers that differ"))

    for room, indices in by_room.items():
        rows = generate_greedy(base, model, [examples[i].prompt_ids for i in indices], room, tell)
        for index, ids in zip(indices, rows, strict=True):
            found[index] = (text_of(base, ids), ids[-1] in stops)
    return [found[i] for i in range(len(examples))]
