"""MemFT-SW as a curriculum over samples: training begins with a part of the examples and takes in more at epoch boundaries.

Invariant: every stage holds the one before, and the last one all examples. Knows indices and epochs, nothing of losses.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

RATIOS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Share of the examples in each stage, as in the paper's repository."""
BOUNDARIES = (0.1, 0.2, 0.3, 0.4, 1.0)
"""Share of all epochs at whose end each stage ends: the repository's 20, 40, 60, 80 and 200 of 200 epochs."""


@dataclass(frozen=True)
class Stage:
    """Part of a curriculum."""

    examples: tuple[int, ...]
    """Indices, sorted."""
    last_epoch: int
    """Counted from 1."""


@dataclass(frozen=True)
class Curriculum:
    """Stages in order; the last one holds all examples."""

    stages: tuple[Stage, ...]

    def admitted(self, epoch: int, active: Collection[int]) -> tuple[int, ...]:
        """The examples of this epoch: those of the stage that the schedule says, or of a later one where nothing of it is left to learn.

        Args:
            epoch: from 1.
            active: indices that are still to be trained.
        """
        wanted = set(active)
        open_stages = [stage for stage in self.stages[:-1] if epoch <= stage.last_epoch]
        found = next((stage for stage in open_stages if wanted & set(stage.examples)), self.stages[-1])
        return found.examples


def whole(count: int) -> Curriculum:
    """No curriculum: all `count` examples from the first epoch on."""
    return Curriculum((Stage(tuple(range(count)), 0),))


def prefix_curriculum(
    count: int,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    ratios: Sequence[float] = RATIOS,
    boundaries: Sequence[float] = BOUNDARIES,
) -> Curriculum:
    """Stage k holds the first `⌊ratio_k · count / batch⌋ · batch` examples (one batch at least) of an order that is drawn once.

    Deviation from the paper's repository: there the examples that fill no whole batch are left out for good; here the last stage has all.

    Args:
        count: of examples.
        epochs: of the whole run.
        batch_size: examples a step; stages are of whole batches.
        seed: of the order.
        ratios: share of the examples in each stage; the last is 1.
        boundaries: share of `epochs` at whose end each stage ends.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    stages = []
    for ratio, boundary in zip(ratios[:-1], boundaries[:-1], strict=True):
        size = min(count, max(batch_size, int(count * ratio) // batch_size * batch_size))
        stages.append(Stage(tuple(sorted(order[:size])), round(boundary * epochs)))
    return Curriculum((*stages, Stage(tuple(range(count)), epochs)))


def make_curriculum(objective: str, count: int, *, epochs: int, batch_size: int, seed: int) -> Curriculum:
    """The curriculum of an objective that a policy names: stages for `memft-sw-curriculum`, all examples at once for the others."""
    if objective != "memft-sw-curriculum":
        return whole(count)
    return prefix_curriculum(count, epochs=epochs, batch_size=batch_size, seed=seed)
