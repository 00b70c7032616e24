"""The command `ledger datasette-metadata`."""

from __future__ import annotations

import json

import typer

from memupdate.cli.session import session_of


def register(ledger_app: typer.Typer) -> None:
    """Add this module's command to the group `ledger`."""
    ledger_app.command("datasette-metadata")(ledger_datasette_metadata)


def ledger_datasette_metadata(ctx: typer.Context) -> None:
    """Print what `datasette ledger.db --metadata FILE` needs to describe tables, views and columns, as JSON."""
    typer.echo(json.dumps(session_of(ctx).open_questions().datasette_metadata(), indent=2))
