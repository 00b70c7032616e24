"""Which memory a calibration writes next: the one that tells most about the plans an operator will ask for, for the time that it takes.

The law's own draws judge: a cell that will almost surely hold its facts, or almost surely not, teaches nothing; of the others that one
is taken whose outcome, either way, is expected to narrow `ln P*` most at the expected sizes, per second. A quarter of the time may go
to memories that are too small for hundreds of facts, which only the paper's law learns from.

Invariant: a pure function of what it is given; no cell is proposed twice, none that is not expected to end within the time left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memupdate.budget.ranks import RANK_LADDER
from memupdate.law.needed_rank import NeededRank, Size, fit_needed_rank
from memupdate.law.points import LawPoint
from memupdate.law.solver import Array

SIZES_TRIED = 7
"""Sizes on offer, about log-spaced over what is expected."""
CROWDED_FACTS, CROWDED_RANKS = 200, (1, 2, 3, 4)
"""From so many facts on so small a rank is what the paper's law is about, where it does not hold them."""
CROWDED_SHARE = 0.25
"""Of the time at most."""
ENOUGH_SD = 0.12
"""Standard deviation of ln P* (root mean square over the expected sizes) at which no further cell is worth its time."""
SUCCESS_STEPS = 0.5
"""Part of its steps that a memory takes which holds its facts: training ends when all are stored."""
MORE_STEPS = 1.8
"""The steps of a memory that does not, second attempts of half of them included."""
MARGIN = 1.25
"""A cell is begun if its expected time, this much longer, is left."""


class Cell(NamedTuple):
    """One memory to write: how many facts of which kind at which rank."""

    kind: str
    facts: int
    rank: int


@dataclass(frozen=True)
class Kind:
    """What one fact of a kind is, on average."""

    tokens: float
    """Target tokens."""
    base_loss_nats: float
    """Per target token."""
    examples: float
    """Phrasings trained on."""


@dataclass(frozen=True)
class Setting:
    """What does not change while a calibration runs."""

    kinds: Mapping[str, Kind]
    """The first is the main one."""
    expected: tuple[int, int]
    """Facts that the operator's collections hold, from and to."""
    parameters_per_rank: int
    min_rank: int
    """The policy's smallest: no plan depends on what would do with less."""
    max_rank: int
    max_kl_nats: float | None
    batch_size: int
    max_epochs: int
    min_steps: int

    def sizes(self) -> tuple[int, ...]:
        """Numbers of facts on offer."""
        low, high = self.expected
        return tuple(sorted({round(low * (high / low) ** (i / (SIZES_TRIED - 1))) for i in range(SIZES_TRIED)}))

    def seeds(self) -> tuple[Cell, ...]:
        """What to begin with: two ranks, two sizes."""
        sizes, main = self.sizes(), next(iter(self.kinds))
        return (Cell(main, sizes[len(sizes) // 3], 1), Cell(main, sizes[len(sizes) // 2], min(4, self.max_rank)))

    def candidates(self) -> list[Cell]:
        """Every cell that may be chosen."""
        ranks = [rank for rank in RANK_LADDER if rank <= min(self.max_rank, 64)]
        return [Cell(kind, size, rank) for kind in self.kinds for size in self.sizes() for rank in ranks]

    def full_steps(self, cell: Cell) -> float:
        """Optimiser steps of one attempt that is not ended early."""
        examples = cell.facts * self.kinds[cell.kind].examples
        return max(self.max_epochs * math.ceil(examples / self.batch_size), float(self.min_steps))


@dataclass(frozen=True)
class Choice:
    """What to do next."""

    cell: Cell | None
    """None: nothing is worth its time, or fits into it."""
    expected_s: float
    """How long the cell takes; 0 where nothing was measured yet."""
    sd_log: float
    """Standard deviation of ln P* at the expected sizes (root mean square), as it is; NaN before the first point."""


def next_cell(
    setting: Setting, points: Sequence[LawPoint], taken: Collection[Cell], *, time_left_s: float, crowded_left_s: float
) -> Choice:
    """The cell to write next.

    Args:
        setting: what may be chosen from.
        points: measured so far.
        taken: cells that were measured, are being written, or were given up.
        time_left_s: until the budget of time ends.
        crowded_left_s: what may still go to memories too small for their facts.
    """
    pace = _seconds_per_step(points)
    for cell in setting.seeds():
        if cell not in taken:
            expected_s = pace * setting.full_steps(cell)
            return Choice(cell if expected_s <= time_left_s else None, expected_s, math.nan)
    if not points:
        return Choice(None, 0.0, math.nan)
    law = fit_needed_rank(
        [point.effective_parameters for point in points],
        [point.target_tokens for point in points],
        [point.loss_before_nats for point in points],
        [point.all_proved and (point.kl_nats or 0.0) <= (setting.max_kl_nats or math.inf) for point in points],
        confidence=0.9,
        scored=False,
    )
    # No plan goes under the smallest rank: how far below it a small set would do is not worth a cell.
    smallest = math.log(max(setting.min_rank, 1) * setting.parameters_per_rank)
    needed = [_needed(law, setting, kind, size) for kind in setting.kinds for size in setting.sizes()]
    targets = np.maximum(np.stack(needed), smallest)
    sd = float(np.sqrt(targets.var(axis=1).mean()))
    open_cells = [cell for cell in setting.candidates() if cell not in taken]
    judged = [_judge(setting, law, targets, cell, pace) for cell in open_cells]
    affordable = [row for row in judged if MARGIN * row.seconds <= time_left_s]
    crowded = [
        row
        for row in affordable
        if _is_crowded(row) and row.seconds <= crowded_left_s and len(points) >= len(setting.seeds())
    ]
    if crowded:
        row = min(crowded, key=lambda row: (row.seconds, row.cell))
        return Choice(row.cell, row.seconds, sd)
    if sd < ENOUGH_SD or not affordable:
        return Choice(None, 0.0, sd)
    row = max(affordable, key=lambda row: (row.gain / max(row.seconds, 1e-9), row.cell))
    return Choice(row.cell if row.gain > 0 else None, row.seconds, sd)


class _Judged(NamedTuple):
    cell: Cell
    held: float
    """Probability that it holds its facts."""
    gain: float
    """Expected drop in the mean variance of ln P* at the expected sizes."""
    seconds: float


def _judge(setting: Setting, law: NeededRank, targets: Array, cell: Cell, pace: float) -> _Judged:
    draws = np.asarray(law.draws)
    log_needed = _needed(law, setting, cell.kind, cell.facts)
    distance = (math.log(cell.rank * setting.parameters_per_rank) - log_needed) / draws[:, 3]
    chance = 1 / (1 + np.exp(-np.clip(distance, -500, 500)))
    held = float(chance.mean())
    after = held * _variance(targets, chance) + (1 - held) * _variance(targets, 1 - chance)
    steps = setting.full_steps(cell) * (held * SUCCESS_STEPS + (1 - held) * MORE_STEPS)
    return _Judged(cell, held, float(targets.var(axis=1).mean()) - after, pace * steps)


def _is_crowded(row: _Judged) -> bool:
    return row.cell.facts >= CROWDED_FACTS and row.cell.rank in CROWDED_RANKS and row.held < 0.2


def _variance(targets: Array, weights: Array) -> float:
    """Mean over the targets (t, draws) of their variance under weights (draws,)."""
    total = float(weights.sum())
    if total < 1e-9:
        return float(targets.var(axis=1).mean())
    mean = targets @ weights / total
    return float((((targets - mean[:, None]) ** 2) @ weights / total).mean())


def _needed(law: NeededRank, setting: Setting, kind: str, facts: int) -> Array:
    about = setting.kinds[kind]
    return law.log_needed(Size(facts * about.tokens, about.base_loss_nats))


def _seconds_per_step(points: Sequence[LawPoint]) -> float:
    """Median over points; 0 before the first, when any cell may be begun."""
    paces = [point.duration_s / point.steps for point in points if point.steps]
    return float(np.median(paces)) if paces else 0.0
