"""What a run falls back on when it diverges: the last state that was known to be good, and one lower learning rate.

Invariant: keeping a state changes no number of the run and draws no random one, so that a run that never diverges gives the
same weights bit for bit as one without this net. Knows parameters and an optimizer, not what they are trained for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memupdate.errors import TrainingError

LOWERED_RATE = 0.2
"""What is left of the learning rate after the first divergence."""
DIVERGED_LOSS = 2.0
"""A mean loss of so many times a uniform guess's, or the base model's where that is larger, is divergence too."""
_NAMED = 20
"""Facts at fault that an error lists."""


class Diverged(Exception):
    """The numbers have left the ground. Caught by the loop; never seen outside of training.

    Args:
        what: what went wrong, for people.
        at_fault: prompts of the facts in whose step or check it was seen.
    """

    def __init__(self, what: str, at_fault: Sequence[str]) -> None:
        super().__init__(what)
        self.what = what
        self.at_fault = tuple(dict.fromkeys(at_fault))

    def error(self, rate: float | None = None) -> TrainingError:
        """What the operator is told; `rate` is the lower learning rate that was tried, if one was."""
        tried = "" if rate is None else f", also from the last good state at the lower rate {rate:.1g}"
        details = [f"seen at {prompt!r}" for prompt in self.at_fault[:_NAMED]]
        if len(self.at_fault) > _NAMED:
            details.append(f"and at {len(self.at_fault) - _NAMED} more facts")
        hint = "lower training.learning_rate in the policy, or leave out the facts listed"
        return TrainingError(f"training diverged: {self.what}{tried}", hint, details)


class SafetyNet:
    """Keeps the last good state of a run and goes back to it once.

    Args:
        parameters: what is trained, changed in place.
        optimizer: its state goes back too.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.parameters, self.optimizer = parameters, optimizer
        self.limit_nats = math.inf
        """Mean loss from which a finite run counts as diverged; set when the first loss is known."""
        self.rate_factor = 1.0
        """Multiplies the learning rate; 1 until the run diverges."""

    @property
    def has_stepped_back(self) -> bool:
        """Whether the run diverged and went on."""
        return self.rate_factor != 1.0

    def keep(self, active: Sequence[int]) -> None:
        """Remember this state as good, with the indices of the examples still under the goal."""
        self._tensors = [p.detach().clone() for p in self.parameters]
        self._optimizer: dict[str, Any] = copy.deepcopy(self.optimizer.state_dict())
        self._active = list(active)

    def step_back(self, fault: Diverged, learning_rate: float) -> list[int]:
        """Back to the last good state at a lower rate; returns its active examples.

        Raises:
            TrainingError: it has been done once already.
        """
        if self.has_stepped_back:
            raise fault.error(learning_rate * self.rate_factor) from fault
        self.rate_factor = LOWERED_RATE
        with torch.no_grad():
            for parameter, tensor in zip(self.parameters, self._tensors, strict=True):
                parameter.copy_(tensor)
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.load_state_dict(self._optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] *= self.rate_factor
        return list(self._active)


def loss_limit(vocabulary: int, loss_before_nats: float) -> float:
    """Mean loss (nats per token) from which a run counts as diverged."""
    return DIVERGED_LOSS * max(math.log(vocabulary), loss_before_nats)
