"""Whether this process is one of several that `accelerate launch` (or torchrun) started, and which.

Invariant: what the launcher left in the environment is taken out of it, so that no child process takes itself for a member. Torch-free.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_OTHERS = (_AGENT_STORE, "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together."""

    rank: int
    """0 runs the command; the others train with it."""
    size: int
    local_rank: int
    """Among those of this machine: which of its GPUs is this process's own."""
    address: str
    port: int
    """Where the members meet."""
    has_agent: bool
    """The launcher itself keeps that place open; else the first member does."""


_current: Launch | None = None


def take_launch() -> Launch | None:
    """Read the launcher's variables and remove them. None where there is no launcher or it started one process only."""
    global _current
    values = [os.environ.get(name) for name in _NAMES]
    if any(value is None for value in values):
        return _current
    rank, size, local_rank, address, port = (value or "" for value in values)
    has_agent = os.environ.get(_AGENT_STORE) == "True"
    for name in (*_NAMES, *_OTHERS):
        os.environ.pop(name, None)
    if int(size) > 1:
        _current = Launch(int(rank), int(size), int(local_rank), address, int(port), has_agent)
    return _current


def current_launch() -> Launch | None:
    """What `take_launch` found."""
    return _current
