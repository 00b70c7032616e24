"""The ground truth of a plan: at which ranks the policy's procedure proves every fact of a batch.

Each run writes a batch into an empty memory of one rank, as `memupdate add` would but without growing it: the first attempt and, where
that leaves few facts unproved, the second. Runs are kept as JSON lines, so an interrupted study goes on where it was.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.budget.batches import HeldOutBatch, held_out_batches

from memupdate import Workspace
from memupdate.budget.design import Cell
from memupdate.operations.cells import run_cell
from memupdate.operations.session import Session
from memupdate.progress import no_progress

LADDER = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Run:
    """One batch written at one rank."""

    batch: str
    kind: str
    facts: int
    examples: int
    target_tokens: int
    base_loss_nats: float
    """Mean over the target tokens of the facts' own prompts, before training."""
    rank: int
    effective_parameters: int
    proved: int
    kl_nats: float
    max_kl_nats: float
    loss_after_nats: float
    epochs: int
    attempts: int
    cut: bool
    """No second attempt was made, as hopeless."""
    duration_s: float

    @property
    def works(self) -> bool:
        """Every fact proved within the harm budget."""
        return self.proved == self.facts and self.kl_nats <= self.max_kl_nats


def embedded_session(folder: Path) -> Session:
    """A new workspace of the embedded model in `folder`, opened."""
    return Session.open(Workspace.init(folder / "workspace", model="atlas").root)


def read_runs(path: Path) -> list[Run]:
    """All runs so far."""
    return [Run(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def measure(path: Path, *, workers: int, sizes: Iterable[int] | None = None) -> list[Run]:
    """Run what is missing in `path`: for each batch down the ladder from a guess to a rank that fails, and up to one that works."""
    with tempfile.TemporaryDirectory() as folder:
        names = [batch.name for batch in held_out_batches(embedded_session(Path(folder)).count_target_tokens)]
    wanted = [name for name in names if sizes is None or int(name.rsplit("-", 1)[1]) in set(sizes)]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_measure_batch, wanted, [path] * len(wanted)))
    return read_runs(path)


_SESSION: list[Any] = []


def _session() -> Session:
    if not _SESSION:
        import torch

        torch.set_num_threads(1)
        folder = tempfile.TemporaryDirectory()
        _SESSION.extend((embedded_session(Path(folder.name)), folder))
    session: Session = _SESSION[0]
    return session


def _measure_batch(name: str, path: Path) -> None:
    session = _session()
    batch = next(b for b in held_out_batches(session.count_target_tokens) if b.name == name)
    done = {run.rank: run for run in read_runs(path) if run.batch == name}
    rank = _guess(batch, session.count_target_tokens(list(batch.facts)))
    while rank is not None:
        if rank not in done:
            done[rank] = write_batch(session, batch, rank)
            with path.open("a") as file:
                file.write(json.dumps(asdict(done[rank])) + "\n")
                file.flush()
                os.fsync(file.fileno())
        rank = _next(done)


def _guess(batch: HeldOutBatch, tokens: int) -> int:
    wanted = tokens / (100 if batch.kind == "numbers" else 260)
    return next((rank for rank in LADDER if rank >= wanted), LADDER[-1])


def _next(done: dict[int, Run]) -> int | None:
    """The rank to run next: below the lowest that works, or above the highest that does not; None when the border is known."""
    works = [rank for rank, run in done.items() if run.works]
    if not works:
        above = [rank for rank in LADDER if rank > max(done)]
        return above[0] if above else None
    below = [rank for rank in LADDER if rank < min(works)]
    return below[-1] if below and below[-1] not in done else None


def write_batch(session: Session, batch: HeldOutBatch, rank: int) -> Run:
    """One run: an empty memory of `rank`, written as a cell of a calibration is, from a basis of its own."""
    from memupdate.models.scoring import mean_loss_nats, score_examples

    facts, max_kl_nats = list(batch.facts), session.policy.guard.max_kl_nats
    own = session.training_examples(facts)[: len(facts)]
    before = mean_loss_nats(score_examples(session.base.model, own, session.base.device))
    point = run_cell(session, Cell(batch.kind, len(facts), rank), facts, no_progress, basis="budget")
    assert point.kl_nats is not None  # the atlas policy has a guard
    stored = point.all_proved and point.kl_nats <= max_kl_nats
    return Run(
        batch.name, batch.kind, len(facts), point.examples, point.target_tokens, before, rank, point.effective_parameters,
        point.facts_proved, point.kl_nats, max_kl_nats, point.loss_after_nats, point.epochs, point.attempts,
        not stored and point.attempts == 1, point.duration_s,
    )  # fmt: skip
