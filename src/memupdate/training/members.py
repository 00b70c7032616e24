"""Several processes, one command: the first runs it and owns the workspace; the others wait for a memory to train and train it with it.

Invariant: a member beside the first reads the base model's files and writes none. Members meet when the first one has something to train,
or at its end. Knows neither ledger nor policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from memupdate.errors import MemupdateError, TrainingError
from memupdate.launch import Launch, current_launch
from memupdate.training.team import ALONE, Team

if TYPE_CHECKING:
    from memupdate.models.base import Source
    from memupdate.training.loop import Job

_PATIENCE = timedelta(days=7)
"""How long members wait for the first one, which may prove, serve, or ask for hours in between."""


@dataclass
class _State:
    team: Team | None = None
    is_busy: bool = False


_state = _State()


@contextmanager
def together(source: Source | None, job: Job) -> Iterator[Team]:
    """The team that trains `job`, which the other members get here; one process alone is handed back at once.

    Args:
        source: how the members load the base model.
        job: what is to be trained; picklable.

    Raises:
        TrainingError: the base model was not loaded from a folder.
    """
    launch = current_launch()
    if launch is None:
        yield ALONE
        return
    if source is None:
        raise TrainingError("a base model that was made in memory cannot be shared", "load it from a folder")
    team = _join(launch)
    _state.is_busy = True
    _share((source, job))
    try:
        yield team
    except MemupdateError:  # all members came to it
        _state.is_busy = False
        raise
    _state.is_busy = False


def dismiss() -> None:
    """Tell the other members that the command is over. After a run that was cut short they are left to the launcher, which ends them."""
    launch = current_launch()
    if launch is None or launch.rank or _state.is_busy:
        return
    _join(launch)
    _share(None)
    dist.destroy_process_group()


def help_train() -> None:
    """The life of a member beside the first: train what it is sent until it is dismissed."""
    from memupdate.progress import no_progress
    from memupdate.training.loop import run_job

    launch = current_launch()
    assert launch is not None  # the command line asked first
    team = _join(launch)
    loaded, base = None, None
    while (sent := _share(None)) is not None:
        source, job = sent
        if base is None or source != loaded:
            loaded, base = source, source.load()
        try:
            run_job(base, job, no_progress, team)
        except MemupdateError:  # the first member came to it too, and tells
            continue
    dist.destroy_process_group()


def _join(launch: Launch) -> Team:
    """Meet the others, once."""
    if _state.team is None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(launch.local_rank)
        is_host = launch.rank == 0 and not launch.has_agent
        store = dist.TCPStore(
            launch.address, launch.port, launch.size, is_host, timeout=_PATIENCE, wait_for_workers=False
        )
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("memupdate", store),
            rank=launch.rank,
            world_size=launch.size,
            timeout=_PATIENCE,
        )
        _state.team = Team(launch.rank, launch.size)
    return _state.team


def _share(message: Any) -> Any:
    """The first member's message, to all."""
    box = [message]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]
