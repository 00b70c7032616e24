"""The commands `ledger verify` and `ledger migrate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memupdate.cli.render import emit
from memupdate.cli.session import JsonOption, session_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memupdate.operations.checking import CheckReport, MigrationReport


def register(ledger_app: typer.Typer) -> None:
    """Add this module's commands to the group `ledger`."""
    ledger_app.command("verify")(ledger_verify)
    ledger_app.command("migrate")(ledger_migrate)


def ledger_verify(
    ctx: typer.Context,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="HASH", help="A head that was noted before; it must be in the chain still."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Recompute every hash: altered, missing or added rows, and adapter files that differ from their digests. Exit code 3 if any."""
    from memupdate.operations.checking import check

    report = check(session_of(ctx).open_questions().layout, noted_head=head)
    emit("ledger verify", report, as_json=as_json, view=_check_views)
    if not report.intact:
        raise typer.Exit(int(report.exit_code))


def ledger_migrate(
    ctx: typer.Context,
    preview: Annotated[bool, typer.Option("--preview", help="Say what would change, and change nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring the ledger of an older memupdate up to date. Commands that write do it by themselves."""
    from memupdate.operations.checking import migrate

    report = migrate(session_of(ctx).open_questions().layout, preview=preview)
    emit("ledger migrate", report, as_json=as_json, view=_migration_views)


def _check_views(report: CheckReport) -> list[RenderableType]:
    from rich.text import Text

    lines = [Text(problem) for problem in report.problems]
    found = "all is as it was written" if report.intact else f"{len(report.problems)} problems"
    return [*lines, Text(f"{found}: {report.links} links, {report.files} files"), Text(f"head {report.head}")]


def _migration_views(report: MigrationReport) -> list[RenderableType]:
    from rich.text import Text

    if not report.steps:
        return [Text("the ledger is up to date")]
    done = "done" if report.applied else "to do"
    return [Text(f"{done}: {step.name}: {step.does}") for step in report.steps]
