"""How many facts a check looks at: all, a number, or so many that their success says something with a stated confidence.

If a share `f` or more of many facts fails, a random sample of `n` shows no failure with a probability of at most `(1 − f)^n`; a
sample of `n ≥ ln(1 − c) / ln(1 − f)` without a failure therefore says, with confidence `c`, that less than `f` fail. (For few
facts the true bound is tighter, since they are drawn without replacement.) Torch-free.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class SampleRule:
    """The policy's word on samples."""

    wanted: int | Literal["confident", "all"]
    confidence: float
    """0 to 1, exclusive."""
    max_failing_share: float
    """0 to 1, exclusive."""

    def size(self, total: int) -> int:
        """How many of `total` to look at."""
        if self.wanted == "all":
            return total
        wanted = confident_size(self.confidence, self.max_failing_share) if self.wanted == "confident" else self.wanted
        return min(wanted, total)

    def statement(self, looked_at: int, total: int) -> str:
        """What a sample of `looked_at` of `total` without a failure says, for people."""
        if looked_at >= total:
            return f"all {total:,}"
        confidence = 1 - (1 - self.max_failing_share) ** looked_at
        share = f"under {self.max_failing_share:.3g} of them fail"
        return f"{looked_at:,} of {total:,}, which without a failure says with {confidence:.1%} confidence that {share}"


def confident_size(confidence: float, max_failing_share: float) -> int:
    """The smallest sample that without a failure says with `confidence` that less than `max_failing_share` fail."""
    return max(1, math.ceil(math.log(1 - confidence) / math.log(1 - max_failing_share) - 1e-9))


def draw(items: Sequence[T], count: int, *, seed: int) -> list[T]:
    """At most `count` of `items`, in their order, the same ones for the same seed."""
    chosen = random.Random(seed).sample(range(len(items)), min(count, len(items)))
    return [items[index] for index in sorted(chosen)]
