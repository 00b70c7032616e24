"""The guard's anchors: text that the base model wrote itself, with what it thought of every next token.

KL(base ‖ adapted) on anchors is the harm of an update. The base's distribution is kept as its top K log-probabilities and the
mass of the rest, so the KL here is that of the distribution with the rest lumped together: a lower bound of the full KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from memupdate.models.base import BaseModel
from memupdate.progress import Progress, ProgressEvent
from memupdate.storage import new_dir_atomic
from memupdate.training.passes import Passes, WholeModel, ask_all

TOP_K = 64
_SAMPLE_BATCH = 128
_LENGTH_CHUNK = 32
_LEAST_REST = 1e-7
"""Probability of the tokens that are not among the K, at least."""
_ANCHORS_FILE = "anchors.safetensors"


@dataclass(frozen=True)
class Anchors:
    """`M` sequences of `T` tokens and the base model's view of them."""

    ids: Tensor
    """(M, T) int64."""
    top_ids: Tensor
    """(M, T−1, K) int32: the K likeliest next tokens at each position."""
    top_logprobs: Tensor
    """(M, T−1, K) float32, nats."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def tokens(self) -> int:
        """Positions with a next token: M · (T−1)."""
        return self.top_ids.shape[0] * self.top_ids.shape[1]

    def select(self, index: Tensor | slice) -> Anchors:
        """Some of the sequences."""
        return Anchors(self.ids[index], self.top_ids[index], self.top_logprobs[index])


class AnchorKL(torch.autograd.Function):
    """KL(base ‖ adapted) summed over N tokens, nats: `Σ_k b_k ln(b_k / q_k) + b_r ln(b_r / q_r)`, `b` the base model's K likeliest
    tokens, `q` the adapted model, `r` all other tokens as one.

    The gradient after logit j is `S q_j − ρ q_j (1 − q_r)`, and `S q_j + ρ q_j q_r − b_j` where j is one of the K, with `S = Σ_k b_k` and
    `ρ = b_r / q_r`: one pass over the logits, where differentiating each step would take five.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
        """`logits`: (N, V) float32; `top_ids`: (N, K) int64; `top_logprobs`: (N, K) float32. Returns a scalar."""
        whole = logits.logsumexp(-1, keepdim=True)
        adapted = logits.gather(-1, top_ids) - whole
        base = top_logprobs.exp()
        base_rest = (1 - base.sum(-1)).clamp(min=_LEAST_REST)
        adapted_rest = (1 - adapted.exp().sum(-1)).clamp(min=_LEAST_REST)
        ctx.save_for_backward(logits, whole, top_ids, base, adapted, base_rest, adapted_rest)
        inside = (base * (top_logprobs - adapted)).sum(-1)
        return (inside + base_rest * (base_rest.log() - adapted_rest.log())).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """`upstream`: a scalar."""
        logits, whole, top_ids, base, adapted, base_rest, adapted_rest = ctx.saved_tensors
        inside = base.sum(-1)
        rho = torch.where(adapted_rest > _LEAST_REST, base_rest / adapted_rest, 0.0)
        gradient = (logits - whole).exp_().mul_((upstream * (inside - rho * (1 - adapted_rest)))[:, None])
        of_top = adapted.exp() * (inside + rho * adapted_rest)[:, None] - base
        return gradient.scatter_(-1, top_ids, upstream * of_top), None, None


def guard_kl(passes: Passes, anchors: Anchors) -> Tensor:
    """KL(base ‖ adapted) summed over all tokens of `anchors`, a scalar in nats, with gradient where it is enabled."""

    def loss(logits: Tensor, here: slice) -> Tensor:
        top = (tensor.flatten(0, 1)[here].to(logits.device) for tensor in (anchors.top_ids, anchors.top_logprobs))
        top_ids, top_logprobs = top
        total: Tensor = AnchorKL.apply(logits, top_ids.long(), top_logprobs)
        return total

    return passes.summed(ask_all(anchors.ids), loss)


def model_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token logits at all positions but the last, (M, T−1, V) float32."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].float()


def measure_kl(model: nn.Module, anchors: Anchors, device: torch.device) -> float:
    """Harm of an adapted model on `anchors`, nats per token, by passes through all of it."""
    return summed_kl(WholeModel(model, device), anchors) / anchors.tokens


def passes_of(anchors: Anchors) -> int:
    """How many passes `summed_kl` makes."""
    return -(-len(anchors) // _LENGTH_CHUNK)


@torch.inference_mode()
def summed_kl(passes: Passes, anchors: Anchors) -> float:
    """Harm on `anchors`, nats, summed over their tokens."""
    parts = (anchors.select(slice(i, i + _LENGTH_CHUNK)) for i in range(0, len(anchors), _LENGTH_CHUNK))
    return sum(float(guard_kl(passes, part)) for part in parts)


def load_or_sample(
    folder: Path,
    base: BaseModel,
    prefixes: Sequence[Sequence[int]],
    *,
    count: int,
    tokens: int,
    seed: int,
    progress: Progress,
) -> Anchors:
    """Anchors from the cache folder, or sampled from the base model and put there.

    Args:
        prefixes: token ids to begin from, taken in turn: a bare beginning of text, the beginning of a user's turn.
        count: sequences; `tokens`: length of each, prefix included.
    """
    file = folder / _ANCHORS_FILE
    if not file.is_file():
        anchors = sample_anchors(base, prefixes, count=count, tokens=tokens, seed=seed, progress=progress)
        with new_dir_atomic(folder) as temporary:
            tensors = {"ids": anchors.ids, "top_ids": anchors.top_ids, "top_logprobs": anchors.top_logprobs}
            (temporary / _ANCHORS_FILE).write_bytes(save(tensors))
    tensors = load_file(file)
    return Anchors(tensors["ids"], tensors["top_ids"], tensors["top_logprobs"])


def sample_anchors(
    base: BaseModel, prefixes: Sequence[Sequence[int]], *, count: int, tokens: int, seed: int, progress: Progress
) -> Anchors:
    """Sample at temperature 1 from the base model; end tokens do not stop it, as what follows them is its text too."""
    parts: list[Tensor] = []
    generator = torch.Generator(device=base.device).manual_seed(seed)
    for number, prefix in enumerate(prefixes):
        share = count // len(prefixes) + (number < count % len(prefixes))
        for start in range(0, share, _SAMPLE_BATCH):
            parts.append(
                _sample(base, list(prefix)[: tokens - 1], min(_SAMPLE_BATCH, share - start), tokens, generator)
            )
            progress(ProgressEvent("anchors", sum(len(p) for p in parts), count, "text sampled from the base model"))
    ids = torch.cat(parts)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    top = [_top_logprobs(base, ids[i : i + _LENGTH_CHUNK]) for i in range(0, len(ids), _LENGTH_CHUNK)]
    return Anchors(ids, torch.cat([t[0] for t in top]), torch.cat([t[1] for t in top]))


@torch.inference_mode()
def _sample(base: BaseModel, prefix: list[int], rows: int, tokens: int, generator: torch.Generator) -> Tensor:
    ids = torch.tensor([prefix] * rows, device=base.device)
    output = base.model(input_ids=ids, use_cache=True)
    while ids.shape[1] < tokens:
        probabilities = output.logits[:, -1].float().softmax(-1)
        chosen = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, chosen], dim=1)
        if ids.shape[1] < tokens:
            output = base.model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True)
    return ids.cpu()


@torch.inference_mode()
def _top_logprobs(base: BaseModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = model_logits(base.model, ids.to(base.device)).log_softmax(-1)
    values, indices = logprobs.topk(min(TOP_K, logprobs.shape[-1]), dim=-1)
    return indices.int().cpu(), values.cpu()
