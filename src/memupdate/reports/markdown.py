"""The capacity report as Markdown for a pull request: what the newest releases do, how full each collection is.

Invariant: texts of facts stand in code spans that they cannot leave, so that nobody's fact becomes a link, a mention, a
heading or HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from memupdate.ledger.figures import WeakFact
from memupdate.reports import measures, texts
from memupdate.reports.content import CapacityReport, CollectionCapacity, ReleaseMeasures, ReleaseRow
from memupdate.reports.placements import COLUMNS, placement_cells, pooling_sentence

MAX_RELEASES = 10
"""Newest releases of each collection."""
MAX_WEAK = 5


def markdown_summary(report: CapacityReport) -> str:
    """The whole summary, ending in a newline."""
    parts = [f"# Capacity report: {code(report.model)}, policy {code(report.policy)}"]
    parts += [f"**{message}**" for message in report.messages]
    for capacity in report.collections:
        parts += _collection(report, capacity)
    if report.placements:
        parts.append(_placements(report))
    if report.fit is not None:
        inside = sum(batch.loss_inside for batch in report.batches)
        parts.append(
            f"Law {code(report.fit.fit_id[:19])}, {report.fit.points:,} points; {inside:,} of {len(report.batches):,} batches had "
            f"their loss within the interval that the plan stated ({report.fit.confidence:.0%})."
        )
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = False) -> str:
    """A table without a last newline; with `numbers`, all columns but the first are set to the right. Cells are taken as they are."""
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (header, rule, *rows))


def _placements(report: CapacityReport) -> str:
    sentence = pooling_sentence(report.pooling)
    table = markdown_table(COLUMNS, placement_cells(report.placements))
    return table + (f"\n\n{sentence}" if sentence else "")


def code(text: str) -> str:
    """A code span that holds any text, also inside a table."""
    line = texts.shown(text).replace("|", "¦")  # GitHub splits a table's row at a pipe even inside a code span
    if not line:
        return "–"
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence = "`" * (longest + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _collection(report: CapacityReport, capacity: CollectionCapacity) -> list[str]:
    rows = [row for row in report.releases if row.collection == capacity.collection]
    parts = [f"## {capacity.collection}", f"{texts.gauge_sentence(capacity)} {texts.forecast_sentence(capacity)}"]
    if rows:
        parts.append(_releases(rows[-MAX_RELEASES:], compared=_losses(report)))
    if measured := [item for item in report.measures if item.collection == capacity.collection]:
        parts += _measured(measured[-1])
    weak = [fact for fact in report.weak_facts if fact.collection == capacity.collection][:MAX_WEAK]
    if weak:
        parts.append("Least sure facts:\n\n" + "\n".join(f"- {_weak(fact)}" for fact in weak))
    return parts


def _losses(report: CapacityReport) -> dict[str, str]:
    return {
        batch.release: f"{texts.number(batch.measured_loss_nats)}, predicted {texts.interval(batch.predicted_loss_nats)}"
        for batch in report.batches
    }


def _releases(rows: Sequence[ReleaseRow], *, compared: dict[str, str]) -> str:
    columns = (
        "release",
        "rank",
        "new + superseding",
        "proved",
        "as served",
        "regressions",
        "loss (nats)",
        "KL",
        "kept",
    )
    lines = []
    for row in rows[::-1]:
        proofs = [row.proved_on("in-process"), row.proved_on("served")]
        cells = [
            f"`{row.name}`" if row.kind in (None, "add") else f"`{row.name}` ({row.kind})",
            str(row.rank),
            f"{row.facts_new:,} + {row.facts_superseding:,}",
            *(f"{item.proved:,} of {item.facts:,}" if item else "–" for item in proofs),
            f"{row.regressions:,}",
            compared.get(row.name, texts.number(row.loss_nats)),
            texts.number(row.kl_nats),
            texts.percent(row.probes_unchanged_share),
        ]
        lines.append(cells)
    return markdown_table(columns, lines)


def _measured(newest: ReleaseMeasures) -> list[str]:
    """Beyond verbatim: a sentence, a table by phrasing and neighbourhood."""
    corpus = "" if newest.text is None else newest.text.corpus
    return [
        measures.summary_sentence(newest).replace(texts.shown(corpus, 60), code(corpus)),
        markdown_table(measures.COLUMNS, measures.measure_rows(newest.counts)),
    ]


def _weak(fact: WeakFact) -> str:
    text = f"{code(fact.prompt)} → {code(fact.target)}: weakest token {texts.number(fact.min_probability)}"
    return text + (f", **unproved {texts.times(fact.times_unproved)}**" if fact.times_unproved else "")
