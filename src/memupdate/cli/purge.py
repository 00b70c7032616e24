"""The command `facts purge`: a fact's text removed for good."""

from __future__ import annotations

from typing import Annotated

import typer

from memupdate.cli.render import emit
from memupdate.cli.session import JsonOption, session_of


def register(facts_app: typer.Typer) -> None:
    """Add this module's command to the group `facts`."""
    facts_app.command("purge")(facts_purge)


def facts_purge(
    ctx: typer.Context,
    facts: Annotated[
        list[str] | None, typer.Argument(metavar="[FACT]...", help="Facts' ids, or their first characters.")
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key",
            "-k",
            metavar="KEY",
            help="A key, a prompt or `SUBJECT / RELATION`: all its values; may be repeated.",
        ),
    ] = None,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="TEXT", help="Kept for good; do not repeat what is purged.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; needed where nobody can answer.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove facts' texts from the ledger for good; ids, a tombstone and the history stay."""
    workspace = session_of(ctx).open_workspace()
    if not yes:
        found = workspace.facts_to_purge(facts or (), keys=key or ())
        for fact in found:
            typer.echo(f"{fact.id[:19]}  {fact.prompt!r} → {fact.target!r}", err=True)
        typer.confirm(f"Remove {len(found)} fact(s) for good?", abort=True, err=True)
    emit("facts purge", workspace.purge(facts or (), keys=key or (), reason=reason), as_json=as_json)
