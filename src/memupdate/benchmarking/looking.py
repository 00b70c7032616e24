"""Putting a benchmark's questions to a model, the unedited one or one with a memory attached.

Every question is answered twice: scored in one forward pass over its expected answer, and generated greedily from its prompt alone. Neither
is derived from the other here, so that a benchmark can show where they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from memupdate.benchmarking.questions import BenchQuestion
from memupdate.benchmarking.scores import Outcome
from memupdate.ledger.measures import Judged
from memupdate.models.base import BaseModel
from memupdate.models.scoring import TargetScore, score_examples
from memupdate.progress import Progress, ProgressEvent
from memupdate.verification.inprocess import generate_greedy
from memupdate.verification.questions import judge_text

ANSWER_TOKENS = 48
"""Room of a free answer, at least: chat models wrap an answer in a sentence."""
_ROOM_TOKENS = 8
"""Tokens more than the expected answer has."""
FLUENCY_TOKENS = 100
"""Of one free continuation, as in the paper that `fluency` names."""
_TOP_K = 5
"""That paper samples among so many."""


def with_own_answers(base: BaseModel, questions: Sequence[BenchQuestion], progress: Progress) -> list[BenchQuestion]:
    """The questions, with what the unedited model says as the expected answer of specificity."""
    near = [i for i, question in enumerate(questions) if question.kind == "specificity"]
    prompts = [questions[i].example.prompt_ids for i in near]
    said = dict(zip(near, _generate(base, base.model, prompts, ANSWER_TOKENS, progress), strict=True))
    return [_expecting(question, said[i]) if i in said else question for i, question in enumerate(questions)]


def look(
    base: BaseModel, model: nn.Module, questions: Sequence[BenchQuestion], progress: Progress, *, min_probability: float
) -> list[Outcome]:
    """Outcomes in the order of `questions`.

    Args:
        base: for its tokenizer and device.
        model: who is asked.
        questions: `with_own_answers`.
        progress: told how far it is.
        min_probability: what a proof asks of every token.
    """
    scores = score_examples(model, [question.example for question in questions], base.device)
    rooms = [_room(question) for question in questions]
    said: dict[int, list[int]] = {}
    for room in sorted(set(rooms)):
        chosen = [i for i, wanted in enumerate(rooms) if wanted == room]
        prompts = [questions[i].example.prompt_ids for i in chosen]
        said |= zip(chosen, _generate(base, model, prompts, room, progress), strict=True)
    return [
        _outcome(base, question, scores[i], said[i], room=rooms[i], min_probability=min_probability)
        for i, question in enumerate(questions)
    ]


@torch.inference_mode()
def continuations(
    base: BaseModel, model: nn.Module, prompts: Sequence[Sequence[int]], *, tokens: int, seed: int
) -> list[str]:
    """One sampled text of exactly `tokens` tokens after each prompt (top 5, the end token barred), the same for the same seed."""
    texts: dict[int, str] = {}
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for length in sorted({len(prompt) for prompt in prompts}):
            chosen = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            ids = torch.tensor([list(prompts[i]) for i in chosen], device=base.device)
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=_TOP_K,
                min_new_tokens=tokens, max_new_tokens=tokens,
            )  # fmt: skip
            for index, row in zip(chosen, output[:, length:].tolist(), strict=True):
                texts[index] = _text(base, row)
    return [texts[i] for i in range(len(prompts))]


def _expecting(question: BenchQuestion, said: list[int]) -> BenchQuestion:
    """What the unedited model said as the expected answer: as far as the data set's own is long, as the field does, else to its end."""
    wanted = question.stated_tokens
    goes_on = len(said) == ANSWER_TOKENS
    if wanted and len(said) > wanted + 1:
        said, goes_on = said[:wanted], True
    return replace(question, example=replace(question.example, target_ids=tuple(said)), is_cut=goes_on)


def _room(question: BenchQuestion) -> int:
    """Tokens for a free answer; few different values, so that answers are made in batches."""
    wanted = len(question.example.target_ids) + _ROOM_TOKENS
    # What the unedited model said was cut there too, so both answers are.
    return (
        ANSWER_TOKENS if question.kind == "specificity" or wanted <= ANSWER_TOKENS else 1 << (wanted - 1).bit_length()
    )


def _outcome(
    base: BaseModel, question: BenchQuestion, score: TargetScore, said: list[int], *, room: int, min_probability: float
) -> Outcome:
    target, text = question.example.target_ids, _text(base, said)
    answer = len(target) if question.is_cut else len(target) - 1
    right = sum(a == b for a, b in zip(score.greedy_ids[:answer], target[:answer], strict=True))
    if tuple(said[: len(target)]) == target and (question.is_cut or len(said) == len(target)):
        judged: Judged = "exact"
    else:
        judged = judge_text(_text(base, target), text, stopped=len(said) < room and not question.is_cut)
    return Outcome(
        tokens_right=right / answer if answer else float(score.greedy_ids == target),
        judged=judged,
        proved=score.greedy_ids == target and score.min_probability >= min_probability,
        answer=text,
    )


def _generate(
    base: BaseModel, model: nn.Module, prompts: Sequence[Sequence[int]], room: int, progress: Progress
) -> list[list[int]]:
    def tell(event: ProgressEvent, /) -> None:
        progress(ProgressEvent("ask", event.done, event.total, f"free answers of at most {room} tokens"))

    return generate_greedy(base, model, prompts, room, tell)


def _text(base: BaseModel, ids: Sequence[int]) -> str:
    return str(base.tokenizer.decode(ids, skip_special_tokens=True))
