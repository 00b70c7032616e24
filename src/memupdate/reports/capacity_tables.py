"""The capacity report in a terminal: gauge, forecast, releases, plans against what came, weak facts, the law.

Invariant: rendering only, the same words as the page's; texts of facts are never read as Rich markup.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memupdate.budget.bits import KNOWLEDGE_BITS_PER_PARAMETER, MEMORISATION_BITS_PER_PARAMETER
from memupdate.ledger.figures import WeakFact
from memupdate.reports import measures, texts
from memupdate.reports.content import BatchComparison, CapacityReport, CollectionCapacity, ReleaseMeasures, ReleaseRow
from memupdate.reports.placements import COLUMNS, placement_cells, pooling_sentence
from memupdate.reports.tables import human_bytes, law_table

MAX_RELEASES = 10
"""Newest releases shown; the page and `--json` have more."""
MAX_WEAK = 8
GAUGE_CELLS = 50


def capacity_renderables(report: CapacityReport) -> list[RenderableType]:
    """Top to bottom: each collection, then the law."""
    shown: list[RenderableType] = [Text(message, style="bold") for message in report.messages]
    for capacity in report.collections:
        shown += _collection(report, capacity)
    if report.placements:
        shown.append(_placements(report))
    if report.fit is not None:
        shown.append(law_table(report.fit))
    return shown


def _collection(report: CapacityReport, capacity: CollectionCapacity) -> list[RenderableType]:
    name = capacity.collection
    shown: list[RenderableType] = [_gauge(capacity), Text(texts.forecast_sentence(capacity)), _memory(capacity)]
    if rows := [row for row in report.releases if row.collection == name][-MAX_RELEASES:]:
        shown.append(_releases(rows))
    names = {row.name for row in rows}
    if batches := [batch for batch in report.batches if batch.release in names]:
        shown.append(_batches(batches))
    if measured := [item for item in report.measures if item.collection == name]:
        shown += [Text(measures.summary_sentence(measured[-1])), _measures(measured[-1])]
    if weak := [fact for fact in report.weak_facts if fact.collection == name][:MAX_WEAK]:
        shown.append(_weak_facts(weak))
    return shown


def _placements(report: CapacityReport) -> RenderableType:
    table = Table(title="Placements: what an empty memory would need", title_justify="left")
    for heading in COLUMNS:
        shown = heading if heading == "KL" else heading.capitalize()
        table.add_column(shown, justify="left" if heading == "placement" else "right", no_wrap=heading == "placement")
    for cells in placement_cells(report.placements):
        table.add_row(*cells)
    sentence = pooling_sentence(report.pooling)
    return Group(table, Text(sentence)) if sentence else table


def _gauge(capacity: CollectionCapacity) -> RenderableType:
    title = Text(capacity.collection, style="bold")
    sentence = Text(texts.gauge_sentence(capacity))
    if capacity.now is None or capacity.policy_limit is None:
        return Group(title, sentence)
    used, now, limit = capacity.target_tokens_live, capacity.now.target_tokens, capacity.policy_limit.target_tokens
    whole = max(used, now, limit, 1)
    filled = min(GAUGE_CELLS, -(-GAUGE_CELLS * used // whole))
    free = max(filled, round(GAUGE_CELLS * max(used, now) / whole)) - filled
    bar = Text("█" * filled, style="red" if used > now else "blue")
    bar.append("▒" * free, style="blue").append("░" * (GAUGE_CELLS - filled - free), style="dim")
    bar.append(f"  {texts.percent(capacity.used_share)} of rank {capacity.now.rank} used")
    return Group(title, bar, sentence)


def _memory(capacity: CollectionCapacity) -> RenderableType:
    line = f"rank {capacity.rank}, {capacity.placement}: {capacity.effective_parameters:,} effective parameters, "
    line += f"{human_bytes(capacity.adapter_bytes)}; {capacity.bits_stored:,.0f} bits stored, "
    line += f"{capacity.bits_per_parameter:.3g} per parameter "
    line += f"(bounds: {KNOWLEDGE_BITS_PER_PARAMETER:g} knowledge, {MEMORISATION_BITS_PER_PARAMETER:g} memorisation)"
    if capacity.facts_dead:
        line += f"; {capacity.facts_dead:,} dead facts until a compaction"
    return Text(line, style="dim")


def _releases(rows: Sequence[ReleaseRow]) -> RenderableType:
    table = Table(title="Releases", title_justify="left")
    for heading in ("Release", "Rank", "New", "Proved", "Served", "Lost", "KL", "Kept"):
        table.add_column(heading, justify="left" if heading == "Release" else "right", no_wrap=True)
    for row in rows:
        proofs = [row.proved_on("in-process"), row.proved_on("served")]
        table.add_row(
            row.name if row.kind in (None, "add") else f"{row.name} ({row.kind})",
            str(row.rank),
            f"{row.facts_new + row.facts_superseding:,}",
            *(f"{item.proved:,}/{item.facts:,}" if item else "–" for item in proofs),
            f"{row.regressions:,}",
            texts.number(row.kl_nats),
            texts.percent(row.probes_unchanged_share),
        )
    return table


def _batches(batches: Sequence[BatchComparison]) -> RenderableType:
    inside = sum(batch.loss_inside for batch in batches)
    table = Table(title=f"Plan and outcome: {inside} of {len(batches)} losses within the plan's interval")
    table.title_justify = "left"
    for heading in ("Release", "Rank", "Loss planned", "Loss", "KL planned", "KL"):
        table.add_column(heading, justify="left" if heading == "Release" else "right")
    for batch in batches:
        rank = str(batch.rank) if batch.rank == batch.rank_planned else f"{batch.rank_planned} → {batch.rank}"
        table.add_row(
            batch.release,
            rank,
            texts.interval(batch.predicted_loss_nats),
            Text(texts.number(batch.measured_loss_nats), style="" if batch.loss_inside else "red"),
            texts.interval(batch.predicted_kl_nats),
            texts.number(batch.measured_kl_nats),
        )
    return table


def _measures(newest: ReleaseMeasures) -> RenderableType:
    table = Table(title=f"What clients get of {newest.release}", title_justify="left")
    for number, heading in enumerate(measures.COLUMNS):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for row in measures.measure_rows(newest.counts):
        table.add_row(*row)
    return table


def _weak_facts(facts: Sequence[WeakFact]) -> RenderableType:
    table = Table(title="Least sure facts", title_justify="left")
    table.add_column("Prompt", overflow="fold")
    table.add_column("Answer", overflow="fold")
    table.add_column("Weakest token", justify="right")
    table.add_column("Unproved", justify="right")
    for fact in facts:
        table.add_row(
            Text(texts.shown(fact.prompt, 60)),
            Text(texts.shown(fact.target, 40)),
            texts.number(fact.min_probability),
            f"{fact.times_unproved} of {len(fact.proofs)}",
        )
    return table
