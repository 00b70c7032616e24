"""One forward pass over rendered facts: the log-probability of every target token and what greedy decoding would emit instead.

If every target token is the argmax given the prefix, greedy decoding emits the target verbatim (by induction over positions);
if its probability is above 0.5 no other token can be the argmax. Both the trainer and the prover look through this one function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memupdate.budget.training_memory import LOGIT_BYTES
from memupdate.facts.render import Example

_PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Of a forward pass without gradient, padding included. More would leave a CPU's caches: 8192 take one and a half times as long there."""


@dataclass(frozen=True)
class TargetScore:
    """What the model gives for one example. Lists have one entry per target token."""

    logprobs: tuple[float, ...]
    """ln p of each target token, nats."""
    greedy_ids: tuple[int, ...]
    """Argmax at each target position, given the true prefix."""

    @property
    def min_probability(self) -> float:
        """Of the weakest target token."""
        return math.exp(min(self.logprobs))

    @property
    def loss_nats(self) -> float:
        """Summed −ln p over the target tokens."""
        return -sum(self.logprobs)


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded prompts and targets. `B` examples, `T` tokens of the longest, `N` target tokens in all."""

    ids: Tensor
    """(B, T) int64."""
    mask: Tensor
    """(B, T) int64, 1 where there is a token."""
    rows: Tensor
    """(N,) int64: which example each target token belongs to."""
    positions: Tensor
    """(N,) int64: the position whose logits predict it."""
    targets: Tensor
    """(N,) int64: its token id."""


@dataclass(frozen=True)
class PassBounds:
    """What one forward pass without gradient takes at most; one example always fits."""

    tokens: int
    """Padding included."""
    targets: int
    """Target tokens: each has logits."""

    @classmethod
    def on(cls, device: torch.device, vocabulary: int) -> PassBounds:
        """For a model of so many tokens on a device."""
        return cls(_PASS_TOKENS.get(device.type, 8192), max(1, LOGIT_BYTES // (4 * vocabulary)))


def length_batches(examples: Sequence[Example], bounds: PassBounds) -> Iterator[list[int]]:
    """Indices of examples of like length, each pass within `bounds`."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    batch: list[int] = []
    targets = 0
    for index in order:
        own = len(examples[index].target_ids)
        if batch and ((len(batch) + 1) * examples[index].length > bounds.tokens or targets + own > bounds.targets):
            yield batch
            batch, targets = [], 0
        batch.append(index)
        targets += own
    if batch:
        yield batch


def vocabulary_of(model: nn.Module) -> int:
    """V: the logits that a model gives for each position."""
    core: Any = getattr(model, "get_base_model", lambda: model)()
    return int(core.get_output_embeddings().weight.shape[0])


def pad_batch(examples: Sequence[Example], device: torch.device) -> PaddedBatch:
    """Pad on the right; causal attention then leaves every real position untouched."""
    width = max(e.length for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(examples):
        sequence = example.prompt_ids + example.target_ids
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
        first = len(example.prompt_ids) - 1
        rows += [row] * len(example.target_ids)
        positions += range(first, first + len(example.target_ids))
        targets += example.target_ids
    tensors = (ids, mask, torch.tensor(rows), torch.tensor(positions), torch.tensor(targets))
    return PaddedBatch(*(t.to(device) for t in tensors))


def logits_at(model: nn.Module, ids: Tensor, mask: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Logits at N chosen positions only, (N, V) float32: the head is never run where no target is.

    Models that change logits after the head (soft capping, scaling) are run whole, since the head alone would be wrong.
    """
    core = getattr(model, "get_base_model", lambda: model)()
    body, head = getattr(core, core.base_model_prefix, None), core.get_output_embeddings()
    scaled = any(getattr(core.config, n, None) for n in ("final_logit_softcapping", "logits_scaling", "logit_scale"))
    if body is None or body is core or scaled:
        return core(input_ids=ids, attention_mask=mask, use_cache=False).logits[rows, positions].float()
    hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return head(hidden[rows, positions]).float()


def score_examples(
    model: nn.Module, examples: Sequence[Example], device: torch.device, *, bounds: PassBounds | None = None
) -> list[TargetScore]:
    """Scores in the order of `examples`; every example is run exactly once, without gradient, in passes that suit the device."""
    scores: dict[int, TargetScore] = {}
    for indices in length_batches(examples, bounds or PassBounds.on(device, vocabulary_of(model))):
        chosen = [examples[i] for i in indices]
        batch = pad_batch(chosen, device)
        with torch.inference_mode():
            logits = logits_at(model, batch.ids, batch.mask, batch.rows, batch.positions)
        scores |= dict(zip(indices, target_scores(logits, chosen), strict=True))
    return [scores[i] for i in range(len(examples))]


def target_scores(logits: Tensor, examples: Sequence[Example]) -> list[TargetScore]:
    """Scores of `examples` from the logits of all their target tokens, (N, V) float32, in order."""
    targets = torch.tensor([token for e in examples for token in e.target_ids], device=logits.device)
    logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    counts = [len(e.target_ids) for e in examples]
    parts = zip(logprobs.cpu().split(counts), logits.argmax(-1).cpu().split(counts), strict=True)
    return [TargetScore(tuple(lp.tolist()), tuple(best.tolist())) for lp, best in parts]


def mean_loss_nats(scores: Sequence[TargetScore]) -> float:
    """Mean −ln p over all target tokens of `scores`, nats per token; 0 for none."""
    tokens = sum(len(s.logprobs) for s in scores)
    return sum(s.loss_nats for s in scores) / tokens if tokens else 0.0
