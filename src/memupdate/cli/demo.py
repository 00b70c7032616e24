"""The `demo` command: all of it on the embedded base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memupdate.cli.progress import progress_on_stderr
from memupdate.cli.render import emit
from memupdate.cli.session import JsonOption
from memupdate.cli.views import demo_views
from memupdate.errors import ExitCode


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("demo")(demo)


def demo(
    keep: Annotated[
        Path | None,
        typer.Option("--keep", metavar="DIR", help="Keep the workspace there instead of a temporary folder."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write, prove, serve and roll back facts on the embedded base model; some minutes on two cores."""
    from memupdate.operations.demo import run_demo

    with progress_on_stderr() as progress:
        report = run_demo(keep=keep, progress=progress)
    emit("demo", report, as_json=as_json, view=demo_views)
    if not report.rollback_ok:
        raise typer.Exit(int(ExitCode.PROOF_FAILED))
