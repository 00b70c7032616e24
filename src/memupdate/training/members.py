"""Several processes, one command: the first runs it and owns the workspace; the others wait for a memory to train and train it with it.

Invariant: a member beside the first reads the base model's files and writes none. Members meet when the first one loads a base model that
is shared out among them, runs it, has something to train, or is at its end. Knows neither ledger nor policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memupdate.distributed.launch import current_launch
from memupdate.distributed.meeting import current_team, engaged, is_engaged, listen, part, tell
from memupdate.distributed.team import ALONE, Team
from memupdate.errors import MemupdateError, TrainingError
from memupdate.models.sharding import Join, Lend, lend_part

if TYPE_CHECKING:
    from memupdate.models.base import BaseModel, Source
    from memupdate.training.loop import Job


@dataclass(frozen=True)
class _Train:
    """Told to the members: write a memory with the first one."""

    source: Source
    job: Job


@contextmanager
def together(source: Source | None, job: Job) -> Iterator[Team]:
    """The team that trains `job`, which the other members get here; one process alone is handed back at once.

    Args:
        source: how the members load the base model.
        job: what is to be trained; picklable.

    Raises:
        TrainingError: the base model was not loaded from a folder.
    """
    team = current_team()
    if team is None:
        yield ALONE
        return
    if source is None:
        raise TrainingError("a base model that was made in memory cannot be shared", "load it from a folder")
    tell(_Train(source, job))
    with engaged(MemupdateError):
        yield team


def dismiss() -> None:
    """Tell the other members that the command is over. After a run that was cut short they are left to the launcher, which ends them."""
    launch = current_launch()
    if launch is None or launch.rank or is_engaged():
        return
    current_team()
    tell(None)
    part()


def help_train() -> None:
    """The life of a member beside the first: do what it is told until it is dismissed."""
    from memupdate.models.base import join_shards

    current_team()
    bases: dict[Source, BaseModel] = {}
    while (told := listen()) is not None:
        match told:
            case Join(source):
                bases[source] = join_shards(source)
            case Lend(source, number):
                lend_part(bases[source].model, number)
            case _Train(source, job):
                if source not in bases:
                    bases = {source: source.load()}
                _train(bases[source], job)
    part()


def _train(base: BaseModel, job: Job) -> None:
    from memupdate.progress import no_progress
    from memupdate.training.loop import run_job

    team = current_team()
    assert team is not None  # or nobody would have told
    try:
        run_job(base, job, no_progress, team)
    except MemupdateError:  # the first member came to it too, and tells
        return
