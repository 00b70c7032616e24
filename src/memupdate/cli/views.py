"""What people see of the reports that have tables of their own; all other reports are shown by `render.views`.

Each function takes a report of `memupdate.operations.reports` and returns what to print, top to bottom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memupdate.cli.render import shorten, to_plain, views

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memupdate.ledger.records import FactDetail, FactHistory
    from memupdate.operations.reports import AddReport, CalibrationReport, CapacityReport, PlanReport

SHOWN_ID = len("sha256:") + 12
"""Characters of a fact's id in a list; `facts show` takes a beginning of it."""
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


def capacity_views(report: CapacityReport) -> list[RenderableType]:
    """Points and law, then what is used and free."""
    from rich.text import Text

    from memupdate.reports.tables import law_table, points_table

    used = f"{report.collection}: rank {report.rank}, {report.target_tokens_live:,} target tokens written"
    return [
        points_table(report.points),
        law_table(report.fit),
        Text(f"{used}; room for about {report.target_tokens_free:,} more at the policy's loss and harm"),
    ]


def add_views(report: AddReport) -> list[RenderableType]:
    """The plan as one table, then what came of it."""
    from memupdate.reports.tables import plan_table

    plan: list[RenderableType] = [plan_table(report.plan)] if report.plan is not None else []
    return plan + views("add", to_plain(report), hide=frozenset({"plan"}))


def fact_row(history: FactHistory) -> dict[str, Any]:
    """A fact and what became of it, flat; the id, which is computed from the content, comes first."""
    plain: dict[str, Any] = to_plain(history)
    fact = plain.pop("fact")
    return {"id": history.fact.id, "prompt": fact["prompt"], "target": fact["target"], **plain}


def fact_rows_views(rows: Sequence[dict[str, Any]]) -> list[RenderableType]:
    """A table with ids short enough to read and long enough to type."""
    short = [{**row, "id": row["id"][:SHOWN_ID]} for row in rows]
    return views("facts list", short, columns=("id", "prompt", "target", "status", "release"))


def fact_document(detail: FactDetail) -> dict[str, Any]:
    """All about one fact, its id first."""
    plain: dict[str, Any] = to_plain(detail)
    history = [{key: value for key, value in row.items() if key != "fact"} for row in plain["history"]]
    return {"id": detail.fact.id, **plain.pop("fact"), **plain, "history": history}
