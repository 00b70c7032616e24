"""The capacity report put together: the ledger's counts, the law in use, the policy's limits.

Invariant: reads only, and loads no torch; facts are counted by the ledger, never read in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from memupdate.budget.bits import bits_per_parameter, bits_stored
from memupdate.budget.forecast import Growth, forecast
from memupdate.budget.plan import Plan, plan_from_json
from memupdate.budget.planner import adapter_bytes, free_capacity
from memupdate.budget.ranks import SERVING_RANKS
from memupdate.errors import LedgerError
from memupdate.law.fit import LawFit
from memupdate.ledger.figures import Margins, ReleaseFigures, WeakFact
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.measures import OWN_PROMPT
from memupdate.ledger.records import Engine
from memupdate.operations import comparing, planning
from memupdate.operations.measuring import WORST_FACTS, generality_of, locality_of
from memupdate.operations.planning import Candidate
from memupdate.operations.session import Session
from memupdate.reports.content import (
    BatchComparison,
    CapacityReport,
    CollectionCapacity,
    Holding,
    ReleaseMeasures,
    ReleaseRow,
)

MEASURED_RELEASES = 50
"""Newest releases of each collection whose measures are counted."""
MARGIN_BINS = 20
"""Of the margins histogram: 5 % each."""
WEAK_FACTS = 20
"""Facts per collection that the report looks at one by one."""


def capacity_report(
    session: Session, ledger: Ledger, aliases: Mapping[str, str], *, collection: str | None = None
) -> CapacityReport:
    """Everything that `memupdate report` shows.

    Args:
        aliases: alias → release, as the registry has them.
        collection: only this one; None for all.

    Raises:
        LedgerError: no such collection; or there is neither a law nor a release to report on.
    """
    names = _collections(ledger, collection)
    laws = comparing.with_laws(session, ledger)
    placed = {name: _placed(session, ledger, name, laws) for name in names}
    shown = next((placed[name] for name in names if ledger.latest_release(name)), None) or _placed(
        session, ledger, "", laws
    )
    fit = shown.fit
    figures = {name: ledger.release_figures(name) for name in names}
    if fit is None and not any(figures.values()):
        raise LedgerError("no law is fitted for this model and policy", "run `memupdate calibrate`")
    newest = {name: rows[-1] for name, rows in figures.items() if rows}
    engines = {name: _engine(rows) for name, rows in newest.items()}
    every = [row for rows in figures.values() for row in rows]
    return CapacityReport(
        model=_model_name(session),
        base_fingerprint=session.fingerprint,
        policy=session.policy.name,
        placement=shown.session.shape.name,
        threshold=session.policy.proof.min_probability,
        limits=planning.limits(session),
        fit=fit,
        points=tuple(planning.points_of(shown.session, ledger)),
        collections=tuple(_capacity(placed[name], ledger, name, figures[name], aliases.get(name)) for name in names),
        batches=tuple(compared for row in every if (compared := _comparison(row)) is not None),
        releases=tuple(ReleaseRow.of(row) for row in every),
        margins=tuple(_margins(ledger, newest[name], engine) for name, engine in engines.items() if engine),
        weak_facts=tuple(
            fact for name, engine in engines.items() if engine for fact in _weak(ledger, newest[name], engine)
        ),
        placements=comparing.placement_rows(laws, ledger),
        pooling=comparing.pooling_scores(laws, ledger),
        measures=tuple(measured for rows in figures.values() for measured in _measures(ledger, rows)),
        messages=() if fit else ("no law is fitted for this model and policy: run `memupdate calibrate`",),
    )


def _measures(ledger: Ledger, rows: Sequence[ReleaseFigures]) -> list[ReleaseMeasures]:
    """Of the newest releases of one collection; the newest of all comes with its least sure tokens."""
    found = []
    for row in rows[-MEASURED_RELEASES:]:
        counts, text = tuple(ledger.measure_counts(row.name)), ledger.text_measure(row.name)
        tokens = ledger.fact_tokens(row.name, limit=WORST_FACTS) if row is rows[-1] else []
        if text is not None or any(count.part != OWN_PROMPT for count in counts):
            found.append(
                ReleaseMeasures(
                    release=row.name, collection=row.collection, counts=counts, generality_share=generality_of(counts),
                    locality_share=locality_of(counts), text=text, perplexity_ratio=text.perplexity_ratio if text else None,
                    tokens=tuple(tokens),
                )
            )  # fmt: skip
    return found


def _model_name(session: Session) -> str:
    """As the operator named it, without this machine's folders."""
    given = Path(session.config.model)
    return given.name if given.is_absolute() else session.config.model


def _collections(ledger: Ledger, wanted: str | None) -> list[str]:
    known = ledger.collections()
    if wanted is None:
        return known
    if wanted not in known:
        raise LedgerError(f"{wanted}: no such collection", f"there are: {', '.join(known)}")
    return [wanted]


@dataclass(frozen=True)
class _Placed:
    """A collection's placement, and the law for it where there is one."""

    session: Session
    fit: LawFit | None


def _placed(session: Session, ledger: Ledger, name: str, laws: Sequence[Candidate]) -> _Placed:
    """Of an empty collection the policy's placement, or the first of those that it allows with a law."""
    own = planning.placements_of(session, ledger, name)
    allowed = {placed.shape.name for placed in own}
    law = next((found for found in laws if found.session.shape.name in allowed), None)
    return _Placed(own[0], None) if law is None else _Placed(law.session, law.fit)


def _capacity(
    placed: _Placed, ledger: Ledger, name: str, rows: Sequence[ReleaseFigures], alias: str | None
) -> CollectionCapacity:
    session, fit = placed.session, placed.fit
    newest = rows[-1] if rows else None
    rank, tokens = (newest.rank, _tokens(newest)) if newest else (0, 0)
    limits = planning.limits(session)
    parameters = rank * session.shape.parameters_per_rank
    base_loss = newest.loss_before_nats if newest and newest.loss_before_nats is not None else None
    if base_loss is None:
        base_loss = fit.base_loss_nats.mid if fit else 0.0
    stored = bits_stored(base_loss, tokens)
    holdings = [
        _holding(session, fit, at, tokens)
        for at in (max(rank, limits.min_rank), max(rank, limits.max_rank), max(rank, SERVING_RANKS[-1]))
    ]
    return CollectionCapacity(
        collection=name,
        placement=session.shape.name,
        release=newest.name if newest else None,
        alias_release=alias,
        rank=rank,
        facts_live=ledger.live_count(name),
        facts_dead=ledger.dead_count(name),
        target_tokens_live=tokens,
        effective_parameters=parameters,
        adapter_bytes=adapter_bytes(session.shape, rank, limits.bytes_per_element),
        bits_stored=stored,
        bits_per_parameter=bits_per_parameter(stored, parameters) if parameters else 0.0,
        now=holdings[0],
        policy_limit=holdings[1],
        engine_limit=holdings[2],
        forecast=None
        if fit is None or holdings[1] is None or holdings[2] is None
        else forecast(
            _growth(rows), room_policy=holdings[1].free, room_engine=holdings[2].free, confidence=fit.confidence
        ),
    )


def _holding(session: Session, fit: LawFit | None, rank: int, live: int) -> Holding | None:
    if fit is None:
        return None
    total = free_capacity(fit, session.shape, rank, planning.limits(session))
    outside = fit.outside_range(rank * session.shape.parameters_per_rank, max(total, 1))
    return Holding(rank, total, max(0, total - live), outside)


def _growth(rows: Iterable[ReleaseFigures]) -> list[Growth]:
    """What each batch added; a compaction is what growth leads to, and no part of it."""
    growth, before = [], 0
    for row in rows:
        tokens = _tokens(row)
        if row.kind != "compact":
            growth.append(Growth(datetime.fromisoformat(row.created_at_utc), tokens - before))
        before = tokens
    return growth


def _tokens(row: ReleaseFigures) -> int:
    """Live target tokens of a release: measured with its batch, else as planned."""
    if row.target_tokens is not None:
        return row.target_tokens
    plan = _plan(row)
    return plan.target_tokens_live if plan else 0


def _plan(row: ReleaseFigures) -> Plan | None:
    """The plan of its batch; None also where another version of memupdate wrote it in another form."""
    try:
        return plan_from_json(row.plan_json) if row.plan_json else None
    except (ValueError, KeyError, TypeError):
        return None


def _comparison(row: ReleaseFigures) -> BatchComparison | None:
    plan = _plan(row)
    if plan is None or row.batch is None or row.loss_after_nats is None:
        return None
    measured = row.facts_measured_proved / row.facts_measured if row.facts_measured and row.facts_measured_proved else 0
    return BatchComparison(
        batch=row.batch,
        release=row.name,
        rank_planned=plan.rank,
        rank=row.rank,
        target_tokens=_tokens(row),
        predicted_loss_nats=plan.predicted_loss_nats,
        measured_loss_nats=row.loss_after_nats,
        predicted_kl_nats=plan.predicted_kl_nats,
        measured_kl_nats=row.kl_nats,
        predicted_proved_share=plan.expected_proved_share,
        measured_proved_share=measured,
        predicted_duration_s=plan.expected_duration_s,
        measured_duration_s=row.duration_s,
    )


def _engine(row: ReleaseFigures) -> Engine | None:
    """Where a release's proofs are looked at: what was served counts more than what was proved before."""
    tested = {item.engine for item in row.proofs}
    return "served" if "served" in tested else "in-process" if tested else None


def _margins(ledger: Ledger, row: ReleaseFigures, engine: Engine) -> Margins:
    return ledger.margins(row.name, engine, bins=MARGIN_BINS)


def _weak(ledger: Ledger, row: ReleaseFigures, engine: Engine) -> list[WeakFact]:
    return ledger.weak_facts(row.collection, row.name, engine, limit=WEAK_FACTS)
