"""Forward passes of a run: logits where they are asked for and nowhere else, from the lowest adapted matrix on where the model allows.

Invariant: both kinds of passes give the same logits to rounding. Knows sequences of token ids; what is done with the logits comes in
as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from memupdate.budget.training_memory import LOGIT_BYTES
from memupdate.facts.render import Example
from memupdate.models.base import BaseModel
from memupdate.models.scoring import logits_at
from memupdate.training.decoder import Cut, Rows, lowest_adapted, take_apart
from memupdate.training.lower_layers import CacheBounds, LowerLayers


@dataclass(frozen=True)
class Asked:
    """Sequences, and from which position on the next-token logits of each are asked for; `n` positions in all."""

    rows: Rows
    first: tuple[int, ...]

    @property
    def positions(self) -> int:
        """n."""
        return self.rows.tokens - sum(self.first)


def ask_targets(examples: Sequence[Example]) -> Asked:
    """The logits that predict each target token. The last of them is no input: nothing comes after it."""
    ids = tuple(example.prompt_ids + example.target_ids[:-1] for example in examples)
    return Asked(Rows(ids), tuple(len(example.prompt_ids) - 1 for example in examples))


def ask_all(ids: Tensor) -> Asked:
    """All next-token logits of (M, T) sequences, the last position left out: M · (T−1)."""
    return Asked(Rows(tuple(tuple(row) for row in ids[:, :-1].tolist())), (0,) * len(ids))


Loss = Callable[[Tensor, slice], Tensor]
"""From logits, (m, V) float32, of the asked positions that the slice names, to a sum over them."""


class Passes(Protocol):
    """How a model with a memory is run."""

    def prepare(self, asked: Iterable[Asked]) -> None:
        """What will be asked for in this run, so that it can be made ready."""

    def logits(self, asked: Asked) -> Tensor:
        """(n, V) float32, with gradient where it is enabled."""

    def summed(self, asked: Asked, loss: Loss) -> Tensor:
        """`loss` summed over all asked positions, a scalar with gradient where it is enabled; logits may come in parts."""


class WholeModel:
    """Runs all of a model each time: any architecture, adapted anywhere."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device

    def prepare(self, asked: Iterable[Asked]) -> None:
        """Nothing is kept."""

    def logits(self, asked: Asked) -> Tensor:
        """See `Passes`."""
        rows, first = asked.rows, asked.first
        ids = torch.zeros(len(rows.ids), rows.width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows.ids):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        places = [(n, p) for n, row in enumerate(rows.ids) for p in range(first[n], len(row))]
        index = torch.tensor(places, device=self.device).T
        return logits_at(self.model, ids.to(self.device), mask.to(self.device), index[0], index[1])

    def summed(self, asked: Asked, loss: Loss) -> Tensor:
        """See `Passes`."""
        return loss(self.logits(asked), slice(0, asked.positions))


class UpperLayers:
    """Begins at the lowest adapted matrix, with what lies below from a cache; in the last layer, only asked positions go through the MLP.

    Args:
        lower: what lies below.
        recompute: gradient checkpointing.
    """

    def __init__(self, lower: LowerLayers, *, recompute: bool = False) -> None:
        self.lower, self.decoder, self.recompute = lower, lower.decoder, recompute

    def prepare(self, asked: Iterable[Asked]) -> None:
        """Run the layers below once for each sequence."""
        self.lower.prepare(ids for one in asked for ids in one.rows.ids)

    def logits(self, asked: Asked) -> Tensor:
        """See `Passes`."""
        return self.decoder.head(self._hidden(asked)).float()

    def summed(self, asked: Asked, loss: Loss) -> Tensor:
        """See `Passes`."""
        hidden = self._hidden(asked)
        vocabulary = self.decoder.embed.weight.shape[0]
        part = max(1, LOGIT_BYTES // (4 * vocabulary))
        if len(hidden) <= part:
            return loss(self.decoder.head(hidden).float(), slice(0, len(hidden)))
        total: Tensor = _InParts.apply(hidden, self.decoder.head, loss, part)
        return total

    def _hidden(self, asked: Asked) -> Tensor:
        """(n, D), normed for the head."""
        wanted = asked.rows.tails(asked.first)
        return self.decoder.run(
            self.lower.states(asked.rows), asked.rows, start=self.lower.cut, recompute=self.recompute,
            wanted=None if wanted is None else wanted.to(self.decoder.device),
        )  # fmt: skip


class _InParts(torch.autograd.Function):
    """Head and loss over some positions at a time, so that logits of all are never held; the gradient is taken on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Module, loss: Loss, part: int) -> Tensor:
        """`hidden`: (n, D). Returns a scalar."""
        total, gradient = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        for start in range(0, len(hidden), part):
            here = slice(start, min(start + part, len(hidden)))
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                some = hidden[here].detach().requires_grad_(ctx.needs_input_grad[0])
                value = loss(head(some).float(), here)
            if ctx.needs_input_grad[0]:
                (gradient[here],) = torch.autograd.grad(value, some)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        """`upstream`: a scalar."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def make_passes(
    base: BaseModel, model: nn.Module, adapted: Iterable[str], bounds: CacheBounds, *, recompute: bool = False
) -> Passes:
    """How to run `model`, the base model with a memory over the matrices `adapted`.

    What the layers below give is kept with the base model, so that later runs over the same text find it. Not where the base model is
    sharded: what one process finds kept another may not, and all must run the same layers.
    """
    cut, decoder = lowest_adapted(adapted), take_apart(base.model)
    if cut is None or decoder is None:
        return WholeModel(model, base.device)
    if base.is_sharded:
        cut = Cut(0)
    lower = base.lower_layers.get(cut)
    if lower is None or lower.bounds != bounds or lower.decoder.embed is not decoder.embed:
        lower = base.lower_layers[cut] = LowerLayers(decoder, cut, bounds)
    return UpperLayers(lower, recompute=recompute)
