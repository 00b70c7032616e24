"""Calibration: write facts into empty memories of several ranks and sizes under the policy's own procedure; fit the law.

Invariant: a cell is stored as soon as it is done and never written twice, so whatever ends a calibration, the next one goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from memupdate.budget.design import CROWDED_FACTS, CROWDED_RANKS, CROWDED_SHARE, Cell, Choice, Kind, Setting, next_cell
from memupdate.budget.placement import PLACEMENTS
from memupdate.law.density import Density
from memupdate.law.drift import drift_of
from memupdate.law.errors import LawError
from memupdate.law.fit import LawFit, fit_laws
from memupdate.ledger.ledger import Ledger
from memupdate.operations import cells
from memupdate.operations.cells import CellJob, Written
from memupdate.operations.planning import (
    Candidate,
    candidates,
    current_fit,
    placements_of,
    planned_points,
    points_of,
    unfitted,
)
from memupdate.operations.reports import CalibrationReport
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent

DEFAULT_MINUTES, QUICK_MINUTES = 10.0, 3.0
DEFAULT_EXPECTED = (8, 400)
"""Facts of a collection that nothing else is known of."""
MIN_STEPS = 480
"""Of the trainer: what a small set may take, whatever its epochs."""
_WAIT_S = 1.0


@dataclass(frozen=True)
class Wish:
    """What is asked of a calibration: `cells`, or whatever `minutes` have time for."""

    minutes: float = DEFAULT_MINUTES
    expected: tuple[int, int] = DEFAULT_EXPECTED
    facts: Path | None = None
    cells: tuple[Cell, ...] = ()
    placements: tuple[str, ...] = ()
    """To measure, each for its share of the minutes; empty: those that the policy lets an empty memory have."""


def grid(ranks: Sequence[int], sizes: Sequence[int]) -> tuple[Cell, ...]:
    """The cells of an explicit sweep."""
    return tuple(Cell(cells.FACTS, size, rank) for size in sizes for rank in ranks)


def calibrate(session: Session, ledger: Ledger, wish: Wish, progress: Progress) -> CalibrationReport:
    """Write cells that the ledger lacks, store each when it is done, fit, store the fit; for one placement after the other.

    Raises:
        PolicyError: there is no such placement.
        LawError: for one placement, the cells do not span two ranks and two sizes, or the time was too short for that; what was
            measured before, and the fits of the placements before it, are kept.
        FactsError: the file cannot be read or holds fewer facts than the largest cell.
    """
    wanted = tuple(session.with_placement(name) for name in wish.placements) or session.placements()
    for placed in wanted:
        _ = placed.shape  # an unknown name is told before anything is trained
    share = replace(wish, minutes=wish.minutes / len(wanted))
    first, *others = [_calibrate(placed, ledger, share, progress) for placed in wanted]
    return replace(first, others=tuple(others))


def _calibrate(session: Session, ledger: Ledger, wish: Wish, progress: Progress) -> CalibrationReport:
    """Calibrate one placement.

    Raises:
        LawError: the cells do not span two ranks and two sizes, or the time was too short for that.
        FactsError: the file cannot be read or holds fewer facts than the largest cell.
    """
    started = time.monotonic()
    run = _Calibration(session, ledger, wish, progress)
    for kind in cells.kinds_of(session, wish.facts):  # a file that is too short is told before anything is trained
        cells.pool(session, kind, wish.facts, run.job.sizes)
    run.run()
    try:
        fit = refit(session, ledger, density=run.density)
    except LawError as error:
        more = "" if wish.cells else f"; or give it more time: `memupdate calibrate --budget {2 * wish.minutes:g}`"
        raise LawError(error.message, f"{error.hint}{more}", (*error.details, *run.messages)) from error
    drift = drift_of(planned_points(session, ledger))
    if drift.batches:
        run.messages.append(
            f"{drift.batches} batches missed the loss of their plans by {drift.rms_z:.2f} of its deviations (root mean square), "
            f"{drift.mean_z:+.2f} on average; intervals are widened {drift.widening:.2f} times"
        )
    seconds = time.monotonic() - started
    return CalibrationReport(fit, tuple(points_of(session, ledger)), run.done, seconds, tuple(run.messages))


class _Calibration:
    """One calibration on its way."""

    def __init__(self, session: Session, ledger: Ledger, wish: Wish, progress: Progress) -> None:
        self.session, self.ledger, self.wish, self.progress = session, ledger, wish, progress
        largest = max((cell.facts for cell in wish.cells), default=wish.expected[1])
        self.job = CellJob(session.root, session.recipe, session.shape.name, wish.facts, largest)
        self.density: Density | None = None
        self.done, self.processor_s, self.crowded_s = 0, 0.0, 0.0
        self.messages: list[str] = []
        self.taken = {
            Cell(p.kind or cells.FACTS, p.facts, p.rank) for p in points_of(session, ledger) if p.origin != "batch"
        }
        self.queue = [cell for cell in wish.cells if cell not in self.taken]

    def run(self) -> None:
        """Until the time is over, the cells are done, or nothing is left to learn."""
        if self.wish.cells and not self.queue:
            return
        processes = cells.worker_count()
        if self.wish.cells:
            processes = min(processes, max(1, len(self.queue) // cells.CELLS_PER_PROCESS))
        started = time.monotonic()
        with cells.workers(processes) as executor:
            self.density = cells.submit_density(executor, self.job).result()
            setting = None if self.wish.cells else self._setting(self.density)
            self._write(
                lambda cell, deadline: cells.submit_cell(executor, self.job, cell, deadline),
                processes,
                setting,
                started,
            )
        self._sum_up(time.monotonic() - started, processes)

    def _write(
        self,
        submit: Callable[[Cell, float | None], Future[Written]],
        processes: int,
        setting: Setting | None,
        started: float,
    ) -> None:
        pending: dict[Future[Written], Cell] = {}
        total_s = 60 * self.wish.minutes
        deadline = None if setting is None else time.time() + total_s - (time.monotonic() - started)
        while True:
            while len(pending) < processes and (
                cell := self._next(setting, total_s - (time.monotonic() - started), processes)
            ):
                self.taken.add(cell)
                pending[submit(cell, deadline)] = cell
            self._tell(tuple(pending.values()), setting, time.monotonic() - started, total_s)
            if not pending:
                return
            for future in wait(pending, timeout=_WAIT_S, return_when=FIRST_COMPLETED).done:
                self._take(pending.pop(future), future.result())

    def _next(self, setting: Setting | None, left_s: float, processes: int) -> Cell | None:
        if setting is None:
            return self.queue.pop(0) if self.queue else None
        choice = self._choice(setting, left_s, processes)
        if choice.cell is not None and choice.cell.facts >= CROWDED_FACTS and choice.cell.rank in CROWDED_RANKS:
            self.crowded_s += choice.expected_s
        return choice.cell

    def _choice(self, setting: Setting, left_s: float, processes: int) -> Choice:
        crowded_s = CROWDED_SHARE * processes * 60 * self.wish.minutes - self.crowded_s
        points = points_of(self.session, self.ledger)
        return next_cell(setting, points, self.taken, time_left_s=left_s, crowded_left_s=crowded_s)

    def _take(self, cell: Cell, written: Written) -> None:
        self.processor_s += written.processor_s
        if written.point is None:
            self.messages.append(
                f"rank {cell.rank} with {cell.facts} facts ({cell.kind}) did not end in time and was left out"
            )
            return
        self.ledger.add_law_points([written.point])
        self.done += 1

    def _tell(self, running: Sequence[Cell], setting: Setting | None, spent_s: float, total_s: float) -> None:
        now = "; ".join(f"rank {cell.rank}, {cell.facts} {cell.kind}" for cell in running)
        done, total, message = spent_s, total_s, f"at most {max(0.0, total_s - spent_s) / 60:.0f} min left"
        if setting is None:
            total = len(self.wish.cells)
            done, message = total - len(self.queue) - len(running), f"{len(self.queue)} cells wait"
        if not now:
            done, message = total, "no cell is left"
        told = f"{self.session.shape.name}: {self.done} cells written, {message}{f'; now {now}' if now else ''}"
        self.progress(ProgressEvent("calibrate", min(done, total), total, told))

    def _setting(self, density: Density) -> Setting:
        session, policy = self.session, self.session.policy
        kinds = {}
        for kind in cells.kinds_of(session, self.wish.facts):
            some = cells.pool(session, kind, self.wish.facts, self.wish.expected[1])[: self.wish.expected[1]]
            counts = session.count_targets(some)
            examples = sum(1 + len(session.phrasings(fact)[0]) for fact in some)
            kinds[kind] = Kind(counts.total() / len(some), density.estimate(counts).nats, examples / len(some))
        return Setting(
            kinds, self.wish.expected, session.shape.parameters_per_rank, policy.memory.min_rank, policy.memory.max_rank,
            policy.guard.max_kl_nats if policy.guard.enabled else None, policy.training.batch_size, policy.training.max_epochs,
            MIN_STEPS,
        )  # fmt: skip

    def _sum_up(self, spent_s: float, processes: int) -> None:
        each = "one process" if processes == 1 else f"{processes} processes"
        self.messages.append(
            f"{self.done} memories in {spent_s:,.0f} s on {each}; training took {self.processor_s:,.0f} s of processor time"
        )


def refit(session: Session, ledger: Ledger, *, density: Density | None = None) -> LawFit:
    """Fit the law to all matching points and store it as the latest; what batches missed their plans by widens it.

    Args:
        session: the workspace.
        ledger: its points and earlier fits.
        density: base loss by token class; None keeps that of an earlier fit, of any placement: it is the base model's.

    Raises:
        LawError: too few points.
    """
    policy = session.policy
    fit = fit_laws(
        points_of(session, ledger),
        confidence=policy.budget.confidence,
        max_kl_nats=policy.guard.max_kl_nats if policy.guard.enabled else None,
        density=density or _known_density(session, ledger),
        drift=drift_of(planned_points(session, ledger)).widening,
    )
    ledger.add_fit(fit.base_fingerprint, fit.placement, fit.recipe, fit.to_json())
    return fit


def _known_density(session: Session, ledger: Ledger) -> Density | None:
    own = session.shape.name
    for name in (own, *(other for other in PLACEMENTS if other != own)):
        fit = current_fit(session.with_placement(name), ledger)
        if fit is not None and fit.density is not None:
            return fit.density
    return None


def ensure_laws(
    session: Session, ledger: Ledger, collection: str, progress: Progress, *, afresh: bool = False
) -> tuple[Candidate, ...]:
    """The placements that the collection's memory may have, with the laws to plan by; at least one.

    A law is made of the points that are there. Where no placement has any, the first of them gets a short calibration.

    Args:
        afresh: the memory is to be written afresh, so that it need not keep its placement.

    Raises:
        LawError: the workspace was calibrated, but for another base model, placement or training policy.
    """
    for placed in unfitted(session, ledger, collection, afresh=afresh):
        with suppress(LawError):  # points of one rank or one size
            refit(placed, ledger)
    found = candidates(session, ledger, collection, afresh=afresh)
    if found:
        return found
    first = placements_of(session, ledger, collection, afresh=afresh)[0]
    name = first.shape.name
    changed = ledger.calibrated_otherwise(first.fingerprint, name, first.recipe)
    if changed:
        raise LawError(
            f"the memory law of this workspace is of another {', '.join(changed)}: its ranks would be wrong here",
            f"run `memupdate calibrate --placement {name}` for one of this policy, or take the change back; the earlier law is kept",
        )
    return (Candidate(first, _calibrate(first, ledger, Wish(minutes=QUICK_MINUTES), progress).fit),)
