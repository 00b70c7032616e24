"""Calibration: write random facts into empty memories of several ranks and sizes under the policy's own procedure; fit the law."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from memupdate.facts.model import Fact
from memupdate.facts.reader import read_facts
from memupdate.facts.synthetic import synthetic_facts
from memupdate.law.fit import LawFit, fit_laws
from memupdate.law.points import LawPoint
from memupdate.ledger.ledger import Ledger
from memupdate.operations.planning import current_fit
from memupdate.operations.reports import CalibrationReport
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent

QUICK_GRID = ((1, 16), (4, 16), (1, 32), (4, 32), (8, 32), (16, 64))
"""(rank, facts): enough to fit every law in a few minutes; the planner widens what it has to extrapolate."""
FULL_GRID = tuple((rank, size) for size in (16, 32, 64, 128) for rank in (1, 2, 4, 8, 16))
"""(rank, facts): small ranks on many facts do not hold them all, which is where the law shows."""


def calibrate(
    session: Session,
    ledger: Ledger,
    *,
    grid: Sequence[tuple[int, int]],
    facts: Path | None,
    progress: Progress,
) -> CalibrationReport:
    """Run the cells of `grid` that are not yet in the ledger, store each as it is done, fit, store the fit.

    Raises:
        LawError: the cells do not span two ranks and two sizes.
        FactsError: `facts` cannot be read or holds fewer than the largest cell.
    """
    started = time.monotonic()
    pool = _pool(session, facts, max(size for _, size in grid))
    done = {(p.rank, p.facts) for p in points_of(session, ledger) if p.origin != "batch"}
    todo = [cell for cell in grid if cell not in done]
    for number, (rank, size) in enumerate(todo):
        progress(ProgressEvent("calibrate", number, len(todo), f"rank {rank}, {size} facts"))
        ledger.add_law_points([run_cell(session, rank, pool[:size], progress)])
    progress(ProgressEvent("calibrate", len(todo), max(len(todo), 1), f"{len(todo)} cells"))
    fit = refit(session, ledger)
    return CalibrationReport(fit, tuple(points_of(session, ledger)), len(todo), time.monotonic() - started)


def run_cell(session: Session, rank: int, facts: list[Fact], progress: Progress) -> LawPoint:
    """Write `facts` into an empty memory of `rank` and measure; losses are means over every phrasing trained on."""
    from memupdate.training.loop import write_facts
    from memupdate.training.memory import empty_memory, grow

    guard = session.guard(progress)
    memory = grow(
        empty_memory(session.shape), rank, seed=session.basis_seed("calibration"), scale=session.policy.memory.scale
    )
    examples = session.training_examples(facts)
    settings = session.training_settings()
    outcome = write_facts(session.base, memory, examples, settings, guard.train, guard.holdout, progress)
    own = list(zip(examples[: len(facts)], outcome.scores[: len(facts)], strict=True))
    return LawPoint(
        base_fingerprint=session.fingerprint,
        placement=session.shape.name,
        recipe=session.recipe,
        rank=rank,
        effective_parameters=memory.parameters,
        facts=len(facts),
        target_tokens=sum(len(e.target_ids) for e, _ in own),
        loss_before_nats=outcome.loss_before_nats,
        loss_after_nats=outcome.loss_after_nats,
        facts_proved=sum(s.greedy_ids == e.target_ids and s.min_probability >= settings.threshold for e, s in own),
        kl_nats=outcome.kl_nats,
        epochs=outcome.epochs,
        stopped_early=outcome.stopped_early,
        duration_s=outcome.duration_s,
    )


def points_of(session: Session, ledger: Ledger) -> list[LawPoint]:
    """All measured points that match the present model, placement and recipe."""
    return list(ledger.law_points(session.fingerprint, session.shape.name, session.recipe))


def refit(session: Session, ledger: Ledger) -> LawFit:
    """Fit the law to all matching points and store it as the latest. Raises LawError."""
    fit = fit_laws(points_of(session, ledger), confidence=session.policy.budget.confidence)
    ledger.add_fit(fit.base_fingerprint, fit.placement, fit.recipe, fit.to_json())
    return fit


def ensure_fit(session: Session, ledger: Ledger, progress: Progress) -> LawFit:
    """The law to plan with; calibrates shortly where the workspace has none."""
    return (
        current_fit(session, ledger) or calibrate(session, ledger, grid=QUICK_GRID, facts=None, progress=progress).fit
    )


def _pool(session: Session, facts: Path | None, count: int) -> list[Fact]:
    """Facts to calibrate with: the operator's, those shipped with the model, or random ones."""
    from memupdate.errors import FactsError

    shipped = session.folder.path / "calibration-facts.jsonl"
    file = facts or (shipped if shipped.is_file() else None)
    if file is None:
        return synthetic_facts(count, seed=session.policy.training.seed)
    pool = [located.fact for located in read_facts(file).facts]
    if len(pool) < count:
        raise FactsError(
            f"{file}: {len(pool)} facts, but the largest cell needs {count}", "give more facts or smaller --sizes"
        )
    return pool
