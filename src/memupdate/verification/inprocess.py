"""Proofs in this process: recall and locality of a model with a memory attached, one forward pass each; and what a model goes on with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memupdate.facts.model import Fact
from memupdate.facts.render import Example, Renderer
from memupdate.models.base import BaseModel
from memupdate.models.scoring import TargetScore, score_examples
from memupdate.progress import Progress, ProgressEvent
from memupdate.storage import canonical_json, text_sha256, write_text_atomic
from memupdate.verification.recall import FactProof, judge

_ANSWER_TOKENS = 48
"""Longest baseline answer that is compared."""
_GENERATE_BATCH = 64
_TOP_P = 0.95
"""Probability of the tokens that are sampled from, the likeliest ones: the rest is mostly noise."""


def prove_recall(
    base: BaseModel, model: nn.Module, examples: Sequence[Example], *, min_probability: float
) -> tuple[list[FactProof], list[TargetScore]]:
    """Verdicts and scores in the order of `examples`."""
    scores = score_examples(model, examples, base.device)
    proofs = [
        judge(
            e,
            [math.exp(lp) for lp in s.logprobs],
            s.greedy_ids,
            min_probability=min_probability,
            decode=base.tokenizer.decode,
        )
        for e, s in zip(examples, scores, strict=True)
    ]
    return proofs, scores


@dataclass(frozen=True)
class LocalityResult:
    """What share of probes still answers as the base model did."""

    probes: int
    unchanged: int
    changed: tuple[str, ...]
    """Prompts whose answer changed."""

    @property
    def share(self) -> float:
        """1 where there are no probes."""
        return self.unchanged / self.probes if self.probes else 1.0


def baseline_answers(
    base: BaseModel, renderer: Renderer, probes: Sequence[Fact], cache_dir: Path, progress: Progress
) -> list[Example]:
    """Each probe with the base model's own greedy answer as its target, found once and cached.

    Where the base model recalls the probe's target, that is its answer; the others are generated (cut at 48 tokens).
    """
    examples = renderer.render_all(probes)
    file = (
        cache_dir / f"probes-{text_sha256(canonical_json([[e.prompt_ids, e.target_ids] for e in examples]))[7:23]}.json"
    )
    if not file.is_file():
        answers = [e.target_ids if s.greedy_ids == e.target_ids else () for e, s in _scored(base, examples)]
        unknown = [i for i, answer in enumerate(answers) if not answer]
        generated = generate_greedy(
            base, base.model, [examples[i].prompt_ids for i in unknown], _ANSWER_TOKENS, progress
        )
        for index, answer in zip(unknown, generated, strict=True):
            answers[index] = tuple(answer)
        write_text_atomic(file, canonical_json(answers))
    return [replace(e, target_ids=tuple(a)) for e, a in zip(examples, json.loads(file.read_text()), strict=True)]


def _scored(base: BaseModel, examples: Sequence[Example]) -> Iterator[tuple[Example, TargetScore]]:
    return zip(examples, score_examples(base.model, examples, base.device), strict=True)


def generate_greedy(
    base: BaseModel, model: nn.Module, prompts: Sequence[Sequence[int]], max_tokens: int, progress: Progress
) -> list[list[int]]:
    """Greedy continuations, each with its end token where it came to one within `max_tokens`."""

    def tell(done: int) -> None:
        progress(ProgressEvent("probes", done, len(prompts), "answers of the base model"))

    return _continued(base, model, prompts, end_ids(base), tell, do_sample=False, max_new_tokens=max_tokens)


def generate_sampled(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    temperature: float,
    seed: int,
    stops: Collection[int] = (),
    stop_text: str | None = None,
    tell: Callable[[int], None],
) -> list[list[int]]:
    """Sampled continuations of the base model: the same for the same seed and prompts on one machine.

    Args:
        temperature: above 0; the model's own sampling defaults, such as a repetition penalty, are not applied.
        stops: tokens at which to stop besides the model's own, such as the end of a chat's turn.
        stop_text: text after which to stop.
        tell: told how many are done.
    """
    ends = end_ids(base) | set(stops)
    until = {} if stop_text is None else {"stop_strings": [stop_text], "tokenizer": base.tokenizer}
    gpus = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):  # `generate` draws from the global generators
        torch.manual_seed(seed)
        return _continued(
            base, base.model, prompts, ends, tell, do_sample=True, max_new_tokens=max_tokens, temperature=temperature,
            top_k=0, top_p=_TOP_P, repetition_penalty=1.0, eos_token_id=sorted(ends), pad_token_id=min(ends), **until,
        )  # fmt: skip


@torch.inference_mode()
def _continued(
    base: BaseModel,
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stops: Collection[int],
    tell: Callable[[int], None],
    **how: Any,
) -> list[list[int]]:
    """Continuations through transformers' `generate`, in batches of prompts of equal length (so without padding)."""
    answers: dict[int, list[int]] = {}
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), _GENERATE_BATCH):
            chunk = indices[start : start + _GENERATE_BATCH]
            ids = torch.tensor([list(prompts[i]) for i in chunk], device=base.device)
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
            for index, row in zip(chunk, output[:, ids.shape[1] :].tolist(), strict=True):
                answers[index] = _cut_at_end(row, stops)
            tell(len(answers))
    return [answers[i] for i in range(len(prompts))]


def end_ids(base: BaseModel) -> set[int]:
    """Tokens at which generation stops."""
    ends = base.model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends]) | {base.tokenizer.eos_token_id}


def _cut_at_end(ids: list[int], stops: Collection[int]) -> list[int]:
    """The answer with its end token; padding after it dropped."""
    for position, token in enumerate(ids):
        if token in stops:
            return ids[: position + 1]
    return ids
