"""What people see of the reports that have tables of their own; all other reports are shown by `render.views`.

Each function takes a report of `memupdate.operations.reports` and returns what to print, top to bottom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memupdate.cli.render import shorten, to_plain, views

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memupdate.operations.reports import AddReport, CalibrationReport, PlanReport

SHOWN_CONFLICTS = 20
"""Superseded facts listed in full; the JSON document has all of them."""


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
    ]


def plan_views(report: PlanReport) -> list[RenderableType]:
    """The plan, what it supersedes, and what was left out."""
    from rich.table import Table
    from rich.text import Text

    from memupdate.reports.tables import plan_table

    shown: list[RenderableType] = [plan_table(report.plan)] if report.plan is not None else []
    if report.superseding:
        table = Table("prompt", "old", "new", title="Superseded facts", title_justify="left")
        for row in report.superseding[:SHOWN_CONFLICTS]:
            table.add_row(*(Text(shorten(text)) for text in row))
        shown.append(table)
        if len(report.superseding) > SHOWN_CONFLICTS:
            shown.append(Text(f"and {len(report.superseding) - SHOWN_CONFLICTS} more"))
    shown += [Text(f"left out: {line}") for line in report.skipped]
    return [*shown, *(Text(message) for message in report.messages)]


def add_views(report: AddReport) -> list[RenderableType]:
    """The plan as one table, then what came of it."""
    from memupdate.reports.tables import plan_table

    plan: list[RenderableType] = [plan_table(report.plan)] if report.plan is not None else []
    return plan + views("add", to_plain(report), hide=frozenset({"plan"}))
