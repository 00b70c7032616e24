"""Ranks: the ladder that plans choose from, the next rank to try, and what the engine must allow for.

Invariant: every function is monotone: more asked for never gives a smaller rank.
"""

from __future__ import annotations

import math

from memupdate.errors import OverBudget

RANK_LADDER = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 512)
"""Ranks that a plan may choose: steps of at most a factor of two, most of 1.5, since training time follows the rank
weakly."""

SERVING_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM (0.32) allows for `max_lora_rank`; every adapter slot is allocated at that rank."""


def serving_rank(rank: int) -> int:
    """The smallest `max_lora_rank` of vLLM that a release of `rank` fits in.

    Raises:
        OverBudget: `rank` is beyond what the engine can be told to hold.
    """
    for allowed in SERVING_RANKS:
        if rank <= allowed:
            return allowed
    raise OverBudget(
        f"rank {rank} is above {SERVING_RANKS[-1]}, the largest that vLLM serves",
        "split the collection into two, or run `memupdate compact` if much of it is dead",
    )


def next_rank(rank: int, factor: float, max_rank: int) -> int | None:
    """The rank to try after a failure at `rank`: the first step of the ladder at or above `rank · factor`, at most
    `max_rank`.

    None where `max_rank` leaves nothing larger than `rank`.
    """
    if rank >= max_rank:
        return None
    wanted = max(rank + 1, math.ceil(rank * factor))
    return min(next((step for step in RANK_LADDER if step >= wanted), wanted), max_rank)


def candidate_ranks(min_rank: int, max_rank: int, rank_before: int) -> tuple[int, ...]:
    """What a plan may choose, smallest first: the ladder within the bounds, plus the present rank and `max_rank`
    themselves.

    Never below `rank_before`: a memory only grows (compaction starts an empty one). Empty where `rank_before >
    max_rank`.
    """
    floor = max(min_rank, rank_before, 1)
    return tuple(sorted({rank for rank in (*RANK_LADDER, rank_before, max_rank) if floor <= rank <= max_rank}))
