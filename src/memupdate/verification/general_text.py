"""What a memory does to general text: perplexity, and KL of the next token's distribution over the whole vocabulary.

`perplexity = exp(−mean ln p(token | before))` over all tokens but the first of each sequence; `KL(base ‖ memory)` is the mean over the
same positions. Both models see the same tokens in the same pass, so the ratio of the two perplexities is the memory's doing alone.
Whether the text is the base model's own or the operator's is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from memupdate.training.anchors import model_logits

_LOGITS_AT_ONCE = 32_000_000
"""Numbers of one tensor of logits: bounds memory at large vocabularies."""


@dataclass(frozen=True)
class TextMeasure:
    """One corpus under the base model and under a memory."""

    tokens: int
    """That were predicted."""
    perplexity_base: float
    perplexity: float
    kl_nats: float
    """Mean KL(base ‖ memory) per token, nats."""

    @property
    def perplexity_ratio(self) -> float:
        """Above 1 where the memory predicts the text worse."""
        return self.perplexity / self.perplexity_base


@torch.inference_mode()
def measure_text(model: PeftModel, sequences: Sequence[Sequence[int]], device: torch.device) -> TextMeasure | None:
    """Perplexity and KL on sequences of token ids; None where none of them has two tokens."""
    base_nats = nats = kl = 0.0
    tokens = 0
    for ids in _batches(sequences, int(model.config.vocab_size)):
        rows = ids.to(device)
        with model.disable_adapter():
            base = model_logits(model, rows).log_softmax(-1)
        logprobs = model_logits(model, rows).log_softmax(-1)
        targets = rows[:, 1:, None]
        base_nats -= float(base.gather(-1, targets).sum())
        nats -= float(logprobs.gather(-1, targets).sum())
        kl += float((base.exp() * (base - logprobs)).sum())
        tokens += targets.numel()
    if not tokens:
        return None
    return TextMeasure(tokens, math.exp(base_nats / tokens), math.exp(nats / tokens), max(0.0, kl / tokens))


def _batches(sequences: Sequence[Sequence[int]], vocabulary: int) -> list[Tensor]:
    """Sequences of equal length together, so without padding, at most `_LOGITS_AT_ONCE` logits each."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for ids in sequences:
        if len(ids) > 1:
            by_length.setdefault(len(ids), []).append(ids)
    batches = []
    for length, rows in by_length.items():
        at_once = max(1, _LOGITS_AT_ONCE // (length * vocabulary))
        batches += [torch.tensor(rows[i : i + at_once]) for i in range(0, len(rows), at_once)]
    return batches


def windows(ids: Sequence[int], length: int) -> list[list[int]]:
    """A long text in pieces of `length` tokens; the last one may be shorter."""
    return [list(ids[start : start + length]) for start in range(0, len(ids), length)]
