"""The guard's anchors: text that the base model wrote itself, with what it thought of every next token.

KL(base ‖ adapted) on anchors is the harm of an update. The base's distribution is kept as its top K log-probabilities and the
mass of the rest, so the KL here is that of the distribution with the rest lumped together: a lower bound of the full KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from memupdate.models.base import BaseModel
from memupdate.progress import Progress, ProgressEvent
from memupdate.storage import new_dir_atomic

TOP_K = 64
_SAMPLE_BATCH = 128
_LENGTH_CHUNK = 32
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

    def select(self, index: Tensor | slice) -> Anchors:
        """Some of the sequences."""
        return Anchors(self.ids[index], self.top_ids[index], self.top_logprobs[index])


def anchor_kl(logits: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """Mean KL(base ‖ adapted) per token, a scalar in nats.

    Args:
        logits: (M, T−1, V) float32 of the adapted model.
        top_ids: (M, T−1, K) int64.
        top_logprobs: (M, T−1, K) float32 of the base model.
    """
    adapted = logits.log_softmax(-1).gather(-1, top_ids)
    base = top_logprobs.exp()
    inside = (base * (top_logprobs - adapted)).sum(-1)
    base_rest = (1 - base.sum(-1)).clamp(min=1e-7)
    adapted_rest = (1 - adapted.exp().sum(-1)).clamp(min=1e-7)
    return (inside + base_rest * (base_rest.log() - adapted_rest.log())).mean()


def model_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token logits at all positions but the last, (M, T−1, V) float32."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].float()


@torch.inference_mode()
def measure_kl(model: nn.Module, anchors: Anchors, device: torch.device) -> float:
    """Harm of an adapted model on `anchors`, nats per token."""
    total = 0.0
    for start in range(0, len(anchors), _LENGTH_CHUNK):
        part = anchors.select(slice(start, start + _LENGTH_CHUNK))
        logits = model_logits(model, part.ids.to(device))
        total += float(anchor_kl(logits, part.top_ids.to(device).long(), part.top_logprobs.to(device))) * len(part)
    return total / len(anchors)


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
