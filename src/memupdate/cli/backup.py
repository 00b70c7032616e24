"""The commands `ledger backup` and `ledger restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memupdate.cli.render import emit
from memupdate.cli.session import JsonOption, session_of


def register(ledger_app: typer.Typer) -> None:
    """Add this module's commands to the group `ledger`."""
    ledger_app.command("backup")(ledger_backup)
    ledger_app.command("restore")(ledger_restore)


def ledger_backup(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The tar file to write; must not be there yet.")],
    as_json: JsonOption = False,
) -> None:
    """Ledger, releases, slices and settings as one tar file, while others go on writing."""
    emit("ledger backup", session_of(ctx).open_workspace().backup(file), as_json=as_json)


def ledger_restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `ledger backup` wrote.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The new workspace: empty, or not there yet.")],
    as_json: JsonOption = False,
) -> None:
    """Bring a backup back as a workspace, all digests checked."""
    from memupdate.operations.backing_up import restore

    emit("ledger restore", restore(file, to), as_json=as_json)
