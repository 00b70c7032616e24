"""The processes that do one thing together; one alone is a team too.

Invariant: every member ends each method with the same numbers, so that all take the same decisions. Knows nothing of what is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """A member's view; `size` > 1 asks for an initialised process group."""

    rank: int = 0
    size: int = 1

    def mine(self, items: Sequence[T]) -> list[T]:
        """This member's share: every `size`-th."""
        return list(items[self.rank :: self.size])

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all members, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up the gradients of all members, in one message; a member without any adds nothing."""
        if self.size == 1:
            return
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = self.sum(torch.cat([gradient.flatten() for gradient in own]))
        for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def gather(self, mine: Sequence[T]) -> list[T]:
        """What all members hold, in the order of the list that `mine` took shares of."""
        if self.size == 1:
            return list(mine)
        shares: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(shares, list(mine))
        whole: list[T] = [shares[0][0]] * sum(map(len, shares)) if any(shares) else []
        for rank, share in enumerate(shares):
            whole[rank :: self.size] = share
        return whole

    def most(self, number: int) -> int:
        """The largest of all members' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """The first member's numbers for all, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


ALONE = Team()
