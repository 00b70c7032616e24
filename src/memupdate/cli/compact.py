"""The command `compact`: all live facts written afresh."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from memupdate.cli.progress import progress_on_stderr
from memupdate.cli.render import emit, to_plain, views
from memupdate.cli.session import CollectionOption, JsonOption, session_of
from memupdate.cli.views import add_views

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memupdate.operations.compacting import CompactionPlan


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("compact")(compact)


def compact(
    ctx: typer.Context,
    collection: CollectionOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan; nothing is trained.")] = False,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Stop at the release; the alias stays.")] = False,
    reason: Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Kept in the ledger.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write all live facts afresh into an empty memory, and prove that superseded and retracted answers are gone."""
    workspace = session_of(ctx).open_workspace()
    with progress_on_stderr() as progress:
        if dry_run:
            planned = workspace.plan_compaction(collection=collection, progress=progress)
            emit("compact", planned, as_json=as_json, view=compaction_views)
            return
        report = workspace.compact(collection=collection, publish=not no_publish, reason=reason, progress=progress)
    emit("compact", report, as_json=as_json, view=partial(add_views, command="compact"))


def compaction_views(report: CompactionPlan) -> list[RenderableType]:
    """The plan, then what is written and what is left out."""
    from memupdate.reports.tables import plan_table

    return [plan_table(report.plan), *views("compact", to_plain(report), hide=frozenset({"plan"}))]
