"""What people see of the reports that have tables of their own; all other reports are shown by `render.views`.

Each function takes a report of `memupdate.operations.reports` and returns what to print, top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from memupdate.cli.render import shorten, to_plain, views

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memupdate.operations.demo import DemoBatch, DemoReport
    from memupdate.operations.reports import AddReport, CalibrationReport, PlanReport
    from memupdate.reports.content import CapacityReport

TOLD_KINDS = ("conflicting", "superseding", "older", "ended", "future", "new", "unchanged")
"""What a fact may do, in the order of the table: first what needs a look."""


def calibration_views(report: CalibrationReport) -> list[RenderableType]:
    """The points, then the law fitted to them."""
    from rich.text import Text

    from memupdate.reports.tables import human_duration, law_table, points_table

    done = f"{report.cells_run} memories written in {human_duration(report.duration_s)}"
    return [
        points_table(report.points),
        law_table(report.fit),
        Text(done),
        *(Text(message) for message in report.messages),
        *(view for other in report.others for view in calibration_views(other)),
    ]


def plan_views(report: PlanReport) -> list[RenderableType]:
    """The plan, what each fact does, and what was left out."""
    from rich.text import Text

    from memupdate.reports.tables import plan_table

    shown: list[RenderableType] = [plan_table(report.plan)] if report.plan is not None else []
    if report.rows:
        shown.append(told_table(report))
    shown += [Text(f"left out: {line}") for line in report.skipped]
    return [*shown, *(Text(message) for message in report.messages)]


def told_table(report: PlanReport) -> RenderableType:
    """What facts do, the first of each kind, what changes something first; the title has the counts."""
    from rich.table import Table
    from rich.text import Text

    from memupdate.operations.telling import SHOWN

    counts = {kind: getattr(report.counts, kind) for kind in (*TOLD_KINDS[1:], "duplicates", "problems")}
    title = ", ".join(f"{number:,} {kind}" for kind, number in counts.items() if number)
    table = Table("fact", "line", "prompt", "live", "told", title=title, title_justify="left")
    for kind in TOLD_KINDS:
        rows = [row for row in report.rows if row.told == kind]
        for row in rows[:SHOWN]:
            live, told = row.live_target or "", "" if kind == "unchanged" else row.target
            table.add_row(kind, str(row.line), *(Text(shorten(text)) for text in (row.prompt, live, told)))
        more = getattr(report.counts, kind, len(rows)) - SHOWN
        if rows and more > 0:
            table.add_row(kind, "", Text(f"and {more:,} more"), "", "")
    return table


def capacity_views(report: CapacityReport) -> list[RenderableType]:
    """Each collection's gauge, forecast and releases, then the law."""
    from memupdate.reports.capacity_tables import capacity_renderables

    return capacity_renderables(report)


def add_views(report: AddReport, command: str = "add") -> list[RenderableType]:
    """The plan as one table, then what came of it; `command` is what was typed."""
    from memupdate.reports.tables import plan_table

    plan: list[RenderableType] = [plan_table(report.plan)] if report.plan is not None else []
    return plan + views(command, to_plain(report), hide=frozenset({"plan"}))


def resume_views(reports: Sequence[AddReport]) -> list[RenderableType]:
    """One row per batch that was gone on with, then what is to be said of them."""
    from rich.table import Table
    from rich.text import Text

    from memupdate.reports.tables import human_duration

    if not reports:
        return [Text("nothing is unfinished")]
    table = Table(title="resume", title_justify="left")
    for head in ("batch", "collection", "state", "release", "facts proved", "took"):
        table.add_column(head)
    for r in reports:
        proved = f"{r.facts_proved} of {r.facts_total}" if r.facts_total else "earlier"
        cells = (str(r.batch_id), r.collection, r.state, r.release or "–", proved, human_duration(r.duration_s))
        table.add_row(*(Text(cell) for cell in cells))
    return [table, *(Text(message) for report in reports for message in report.messages)]


def demo_views(report: DemoReport) -> list[RenderableType]:
    """What was written and proved, what a client saw, and the sums."""
    from rich.table import Table
    from rich.text import Text

    batches = Table(title="Batches: planned by the law, trained, proved here and on vLLM", title_justify="left")
    batches.add_column("", style="bold")
    for b in report.batches:
        batches.add_column(b.release, justify="right")
    rows: dict[str, Callable[[DemoBatch], str]] = {
        "facts written": lambda b: f"{b.facts}",
        "target tokens held": lambda b: f"{b.target_tokens}",
        "placement, rank": lambda b: f"{b.placement}, {b.rank}",
        "predicted loss (nats)": lambda b: (
            f"{b.predicted_loss_nats:.3f} ({b.predicted_loss_low:.3f} to {b.predicted_loss_high:.3f})"
        ),
        "measured loss (nats)": lambda b: f"{b.measured_loss_nats:.3f}",
        "bits per parameter": lambda b: f"{b.bits_per_parameter:.4f}",
        "facts proved in process": lambda b: f"{b.facts_proved} of {b.facts_total}",
        "facts proved on vLLM": lambda b: f"{b.facts_proved_served} of {b.facts_total}",
        "generated word for word": lambda b: f"{b.generated_served} of {b.generated_served} asked",
        "probes as before": lambda b: f"{b.probes_unchanged_share:.1%}",
        "took": lambda b: f"{b.duration_s:.0f} s",
    }
    for name, cell in rows.items():
        batches.add_row(name, *(cell(b) for b in report.batches))
    asked = Table(title=f"A client asks {report.alias!r} over HTTP", title_justify="left")
    for head in ("when", "question", "answer", "model in the response"):
        asked.add_column(head)
    for q in report.questions:
        asked.add_row(q.when, Text(q.prompt), Text(q.answer), q.model)
    sums = Table(title="In short", title_justify="left", show_header=False)
    sums.add_column(style="bold")
    sums.add_column()
    sums.add_row("facts proved", f"{report.facts_proved} of {report.facts_total}")
    sums.add_row("facts proved on vLLM", f"{report.facts_proved_served} of {report.facts_total}")
    sums.add_row("probes answered as before", f"{report.probes_unchanged_share:.1%} of {report.probes}")
    sums.add_row("rollback brought the old answer back", "yes" if report.rollback_ok else "no")
    sums.add_row("took", f"{report.duration_s:.0f} s")
    if report.workspace:
        sums.add_row("workspace", report.workspace)
    return [batches, asked, sums]
