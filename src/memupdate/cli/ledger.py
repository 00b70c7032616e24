"""The command group `ledger`: the record as a whole, not the facts in it."""

from __future__ import annotations

import typer

from memupdate.cli import backup, checking, datasette

ledger_app = typer.Typer(no_args_is_help=True, help="Check, copy and bring back the ledger.")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(ledger_app, name="ledger")
    checking.register(ledger_app)
    backup.register(ledger_app)
    datasette.register(ledger_app)
