"""The `report` command: the capacity budget in the terminal, as JSON, as one HTML page, as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memupdate.cli.render import emit
from memupdate.cli.session import JsonOption, session_of
from memupdate.cli.views import capacity_views


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("report")(report)


def report(
    ctx: typer.Context,
    collection: Annotated[
        str | None, typer.Option("--collection", "-c", metavar="NAME", help="Only this one; all if not given.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", dir_okay=False, help="Write one self-contained page, with plots, there."
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="FILE", dir_okay=False, help="Write a summary for a pull request there."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Used and free capacity, a forecast, releases, plans against outcomes, the least sure facts, and the law."""
    found = session_of(ctx).open_workspace().report(collection)
    emit("report", found, as_json=as_json, view=capacity_views)
    if html is not None:
        from memupdate.reports.page import html_page

        _write(html, html_page(found))
    if markdown is not None:
        from memupdate.reports.markdown import markdown_summary

        _write(markdown, markdown_summary(found))


def _write(path: Path, text: str) -> None:
    from memupdate.storage import write_text_atomic

    write_text_atomic(path, text)
    typer.echo(f"wrote {path}", err=True)
