"""Where the processes of one launch meet: the first one tells, the others listen.

Invariant: the others answer every message by the same collective calls that the first process makes after it. What a message means is
for its receiver, `training.members`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from memupdate.distributed.launch import Launch, current_launch
from memupdate.distributed.team import Team

_PATIENCE = timedelta(days=7)
"""How long members wait for the first one, which may prove, serve, or ask for hours in between."""


@dataclass
class _State:
    team: Team | None = None
    is_engaged: bool = False


_state = _State()


def current_team() -> Team | None:
    """All processes of the launch, met on the first call; None for a process alone."""
    launch = current_launch()
    if launch is None:
        return None
    if _state.team is None:
        _state.team = _join(launch)
    return _state.team


def tell(message: Any) -> None:
    """The first process: send `message`, which can be pickled, to all others."""
    dist.broadcast_object_list([message], src=0, device=torch.device("cpu"))


def listen() -> Any:
    """The other processes: the next message."""
    box = [None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def engage() -> None:
    """From here until `release` the others are in the midst of something with this process, and listen to nothing."""
    _state.is_engaged = True


def release() -> None:
    """They listen again."""
    _state.is_engaged = False


def is_engaged() -> bool:
    """Whether a message would reach nobody."""
    return _state.is_engaged


@contextmanager
def engaged(errors_of_all: type[Exception]) -> Iterator[None]:
    """Engaged for a block. Left so by any error but `errors_of_all`, to which all processes come: the others cannot be reached then."""
    engage()
    try:
        yield
    except errors_of_all:
        release()
        raise
    release()


def part() -> None:
    """Leave the others, who leave too."""
    dist.destroy_process_group()


def _join(launch: Launch) -> Team:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
    is_host = launch.rank == 0 and not launch.has_agent
    store = dist.TCPStore(launch.address, launch.port, launch.size, is_host, timeout=_PATIENCE, wait_for_workers=False)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("memupdate", store),
        rank=launch.rank,
        world_size=launch.size,
        timeout=_PATIENCE,
    )
    return Team(launch.rank, launch.size)
