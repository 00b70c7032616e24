"""Cells of a calibration: which facts one writes, writing it under the policy's own procedure, and doing so in worker processes.

Invariant: a cell is trained as `memupdate add` would into an empty memory of its rank, first attempt and second, but for growing; what
it measures depends on the cell, the workspace and the facts only, not on the other cells or on who runs it. Importing loads no torch.
"""

from __future__ import annotations

import os
import random
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from memupdate.budget.design import Cell
from memupdate.errors import FactsError
from memupdate.facts.model import Fact
from memupdate.facts.reader import read_facts
from memupdate.facts.synthetic import synthetic_facts
from memupdate.law.density import Density, fit_density
from memupdate.law.points import LawPoint
from memupdate.operations.processes import processes
from memupdate.operations.room import means_for
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent

FACTS, BARE, NUMBERS = "facts", "bare", "numbers"
"""Kinds: the facts with the phrasings that they have, the same under one phrasing, and seven random digits for the same subjects.
They differ in what a token costs to write, and in the steps that a set gets."""
SHIPPED_FACTS = "calibration-facts.jsonl"
HOPELESS = 0.6
"""Share of facts stored by the first attempt under which a cell gets no second one: it counts as not holding its facts. Of cells that
lacked more steps, not room, the first attempt has stored four facts in five."""
CELLS_PER_PROCESS = 3
"""Fewer are not worth a process of their own, which takes seconds to start."""
SCORED = 256
"""Facts of each kind whose base loss is measured for the density table."""


class _OutOfTime(Exception):
    """The deadline has passed while a cell was training."""


@dataclass(frozen=True)
class CellJob:
    """What a worker needs to run cells of one workspace."""

    root: Path
    recipe: str
    """Of the session: a policy that was changed since is another job."""
    placement: str
    facts: Path | None
    """The operator's own facts; None for shipped or invented ones."""
    sizes: int
    """Facts of the largest cell."""


@dataclass(frozen=True)
class Written:
    """What came of a cell."""

    point: LawPoint | None
    """None where the deadline passed before it was done."""
    processor_s: float


def kinds_of(session: Session, facts: Path | None) -> tuple[str, ...]:
    """What a calibration writes: the operator's file as it is, else several kinds."""
    if facts is not None:
        return (FACTS,)
    has_phrasings = _shipped(session) is not None and session.policy.facts.train_paraphrases > 0
    return (FACTS, BARE, NUMBERS) if has_phrasings else (FACTS, NUMBERS)


def pool(session: Session, kind: str, facts: Path | None, count: int) -> list[Fact]:
    """At least `count` facts of a kind. Raises FactsError where the operator's file holds fewer."""
    file = facts or _shipped(session)
    seed = session.policy.training.seed
    found = [located.fact for located in read_facts(file).facts] if file else synthetic_facts(count, seed=seed)
    if len(found) < count and facts is None:  # the shipped ones are few, invented ones without end
        found += synthetic_facts(count - len(found), seed=seed)
    if len(found) < count:
        raise FactsError(
            f"{file}: {len(found)} facts, but the largest cell needs {count}", "give more facts or smaller --sizes"
        )
    if kind == BARE:
        return [replace(fact, paraphrases=()) for fact in found]
    return found if kind == FACTS else _numbers(found, count, seed)


def chosen_facts(pool: list[Fact], cell: Cell) -> list[Fact]:
    """The cell's own stretch of the pool: cells share few facts, so that the scatter between sets is seen."""
    room = len(pool) - cell.facts
    start = zlib.crc32(f"{cell.kind}-{cell.facts}-{cell.rank}".encode()) % (room + 1)
    return pool[start : start + cell.facts]


def run_cell(
    session: Session, cell: Cell, facts: list[Fact], progress: Progress, *, basis: str = "calibration"
) -> LawPoint:
    """Write `facts` into an empty memory of the cell's rank and measure; losses are means over every phrasing trained on.

    A second attempt, with the policy's factor of epochs, is made where the first left few facts unproved (`HOPELESS`). `basis` names the
    random A that it begins from.
    """
    from memupdate.training.loop import write_facts
    from memupdate.training.memory import empty_memory, grow

    policy, guard = session.policy, session.guard(progress)
    memory = grow(empty_memory(session.shape), cell.rank, seed=session.basis_seed(basis), scale=policy.memory.scale)
    examples, settings = session.training_examples(facts), session.training_settings()
    means = means_for(session, cell.rank, examples)
    before, epochs, steps, seconds, attempts = 0.0, 0, 0, 0.0, 0
    while True:
        attempts += 1
        outcome = write_facts(session.base, memory, examples, settings, guard.train, guard.holdout, progress, means)
        before = before or outcome.loss_before_nats
        epochs, steps, seconds = epochs + outcome.epochs, steps + outcome.steps, seconds + outcome.duration_s
        memory = outcome.memory
        proved = sum(s.min_probability >= settings.threshold for s in outcome.scores[: len(facts)])
        within = outcome.kl_nats is None or outcome.kl_nats <= settings.max_kl_nats
        hopeless = proved < HOPELESS * len(facts)
        if (proved == len(facts) and within) or hopeless or attempts >= min(2, policy.escalation.attempts):
            break
        settings = replace(settings, max_epochs=round(settings.max_epochs * policy.escalation.epochs_factor))
    return LawPoint(
        base_fingerprint=session.fingerprint, placement=session.shape.name, recipe=session.recipe, rank=cell.rank,
        effective_parameters=memory.parameters, facts=len(facts),
        target_tokens=sum(len(example.target_ids) for example in examples[: len(facts)]),
        loss_before_nats=before, loss_after_nats=outcome.loss_after_nats, facts_proved=proved, kl_nats=outcome.kl_nats,
        epochs=epochs, stopped_early=outcome.stopped_early, duration_s=seconds, examples=len(examples), steps=steps,
        attempts=attempts, kind=cell.kind,
    )  # fmt: skip


def measure_density(session: Session, kinds: tuple[str, ...], facts: Path | None, progress: Progress) -> Density:
    """What a target token costs, by its class: the base model's loss on some of each kind, each fact scored once."""
    from memupdate.models.scoring import score_examples

    scored = [fact for kind in kinds for fact in _some(session, kind, facts)]
    examples = session.renderer.render_all(scored)
    progress(ProgressEvent("calibrate", 0, None, f"base loss of {len(examples)} facts"))
    scores = score_examples(session.base.model, examples, session.base.device)
    rows = [
        (texts, [-value for value in score.logprobs])
        for texts, score in zip(session.target_token_texts(scored), scores, strict=True)
    ]
    # A tokenizer may join the answer's first letters with what is before them; such a fact says nothing of single tokens.
    return fit_density([(texts, nats) for texts, nats in rows if len(texts) == len(nats)])


@contextmanager
def workers(count: int) -> Iterator[Executor]:
    """`count` processes that share the cores; a Ctrl-C ends them with their parent, and cells in flight are lost. One works right here."""
    if count == 1:
        yield _Here()
        return
    with processes(count, threads=max(1, _cores() // count)) as executor:
        yield executor


def worker_count() -> int:
    """Two on a CPU with two cores or more; on a GPU one, which has it to itself."""
    from memupdate.models.base import pick_device

    return 2 if pick_device().type == "cpu" and _cores() >= 2 else 1


def submit_density(executor: Executor, job: CellJob) -> Future[Density]:
    """Measure the density table in a worker, which also leaves the guard's anchors in the cache for all."""
    return executor.submit(_density_job, job)


def submit_cell(executor: Executor, job: CellJob, cell: Cell, deadline_s: float | None) -> Future[Written]:
    """Run a cell in a worker, until `deadline_s` (of `time.time()`) at most."""
    return executor.submit(_cell_job, job, cell, deadline_s)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Here(Executor):
    """Runs each job when it is submitted, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The finished job. Whatever it raises is raised here."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@cache
def _workspace(root: Path, _recipe: str) -> Session:
    """One per worker, whatever placements it writes in: the weights are loaded once."""
    return Session.open(root)


def _session(job: CellJob) -> Session:
    return _workspace(job.root, job.recipe).with_placement(job.placement)


@cache
def _pool(job: CellJob, kind: str) -> list[Fact]:
    return pool(_session(job), kind, job.facts, job.sizes)


def _density_job(job: CellJob) -> Density:
    session = _session(job)
    session.guard(_quiet)
    return measure_density(session, kinds_of(session, job.facts), job.facts, _quiet)


def _cell_job(job: CellJob, cell: Cell, deadline_s: float | None) -> Written:
    began = time.process_time()
    parent = os.getppid()

    def watch(_: ProgressEvent, /) -> None:
        if os.getppid() != parent:  # killed: nobody is left to store this
            os._exit(1)
        if deadline_s is not None and time.time() > deadline_s:
            raise _OutOfTime

    try:
        point = run_cell(_session(job), cell, chosen_facts(_pool(job, cell.kind), cell), watch)
    except _OutOfTime:
        return Written(None, time.process_time() - began)
    return Written(point, time.process_time() - began)


def _quiet(_: ProgressEvent, /) -> None:
    """A worker draws nothing."""


def _shipped(session: Session) -> Path | None:
    file = session.folder.path / SHIPPED_FACTS
    return file if file.is_file() else None


def _some(session: Session, kind: str, facts: Path | None) -> list[Fact]:
    found = pool(session, kind, facts, 1 if facts else SCORED)
    return random.Random(kind).sample(found, min(SCORED, len(found)))


def _numbers(facts: list[Fact], count: int, seed: int) -> list[Fact]:
    """Seven digits for each subject, or, where subjects are fewer than `count`, for invented ones too."""
    invented = synthetic_facts(5 * count, seed=seed)
    subjects = list(dict.fromkeys(fact.subject for fact in [*facts, *invented] if fact.subject))[
        : max(count, len(facts))
    ]
    rng = random.Random(f"calibration-numbers-{seed}")
    return [
        Fact(
            f"What is the reference number of {subject}?", str(rng.randrange(10**6, 10**7)), subject, "reference number"
        )
        for subject in subjects
    ]
