"""What an objective is told of a batch's target tokens: whose they are, where they stand, what the model would say.

Invariant: an example has the same number in every batch of a run, so that an objective may keep something by it. Nothing is weighed
here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TargetTokens:
    """What an objective may know of the N target tokens of one batch, beside their losses; an example's are side by side, in order."""

    example: Tensor
    """(N,) int64: which example of the run each belongs to; the same in every epoch."""
    position: Tensor
    """(N,) int64: its place in its target, from 0."""
    length: Tensor
    """(N,) int64: tokens of its target."""
    epoch: int
    """From 1."""
    greedy: Tensor
    """(N,) int64: what greedy decoding would emit."""
    targets: Tensor
    """(N,) int64: the token ids that should be emitted."""

    @cached_property
    def is_wrong(self) -> Tensor:
        """(N,) bool: greedy decoding would emit another token."""
        return self.greedy != self.targets


Objective = Callable[[Tensor, TargetTokens], Tensor]
"""Maps the target tokens' losses, (N,) float32 nats with gradient, and what is known of the tokens to one scalar to minimise."""


def target_tokens(
    examples: Sequence[int], lengths: Sequence[int], *, epoch: int, greedy: Tensor, targets: Tensor
) -> TargetTokens:
    """The tokens of a batch: `examples[i]` has `lengths[i]` of them."""
    per_example = torch.tensor(lengths, device=targets.device)
    first = per_example.cumsum(0) - per_example
    return TargetTokens(
        example=torch.tensor(examples, device=targets.device).repeat_interleave(per_example),
        position=torch.arange(len(targets), device=targets.device) - first.repeat_interleave(per_example),
        length=per_example.repeat_interleave(per_example),
        epoch=epoch, greedy=greedy, targets=targets,
    )  # fmt: skip
