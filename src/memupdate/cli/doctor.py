"""The command `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memupdate.cli.render import emit
from memupdate.cli.session import JsonOption, session_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memupdate.operations.findings import DoctorReport

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("doctor")(doctor)


def doctor(
    ctx: typer.Context,
    served: Annotated[
        str | None,
        typer.Option("--served", metavar="URL", help="Look at the engine that answers there instead, from outside."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What is wrong here, and how to mend it: machine, workspace, or an engine. Changes nothing. Exit code 2 or 6 if anything fails."""
    root = session_of(ctx).root
    report = _look(root) if served is None else _look_at(served, root)
    emit("doctor", report, as_json=as_json, view=_views)
    if report.exit_code:
        raise typer.Exit(int(report.exit_code))


def _look(root: Path) -> DoctorReport:
    from memupdate.operations.doctor import examine

    return examine(root)


def _look_at(url: str, root: Path) -> DoctorReport:
    """With the workspace in `root` where there is one, so that what should be served is known."""
    import os

    from memupdate.layout import WorkspaceLayout
    from memupdate.operations.doctor_served import examine_served, expected_of
    from memupdate.operations.session import Session

    expected = expected_of(Session.open(root.resolve())) if WorkspaceLayout(root).config.is_file() else None
    return examine_served(url, api_key=os.environ.get("VLLM_API_KEY") or None, expected=expected)


def _views(report: DoctorReport) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in report.findings:
        what = Text(finding.what)
        if finding.mend:
            what.append(f"\n→ {finding.mend}", style="dim")
        table.add_row(Text(finding.status, style=_STYLES[finding.status]), Text(finding.area), what)
    bad = [sum(finding.status == status for finding in report.findings) for status in ("fail", "warn")]
    summary = "all is well" if not any(bad) else f"{bad[0]} failed, {bad[1]} to look at"
    return [Text(report.target), table, Text(summary)]
