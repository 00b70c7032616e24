"""The command `facts retract`: facts taken back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from memupdate.cli.progress import progress_on_stderr
from memupdate.cli.render import emit
from memupdate.cli.session import CollectionOption, JsonOption, session_of
from memupdate.cli.views import add_views


def register(facts_app: typer.Typer) -> None:
    """Add this module's command to the group `facts`."""
    facts_app.command("retract")(facts_retract)


def facts_retract(
    ctx: typer.Context,
    facts: Annotated[
        list[str] | None, typer.Argument(metavar="[FACT]...", help="Facts' ids, or their first characters.")
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", "-k", metavar="KEY", help="A fact's key or its prompt; may be given again."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FACTS", help="A facts file: retract all that it states.")
    ] = None,
    reason: Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Kept in the ledger.")] = None,
    collection: CollectionOption = None,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Stop at the release; the alias stays.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take facts back: a release that answers them by the policy's text, until `compact` removes both."""
    workspace = session_of(ctx).open_workspace()
    with progress_on_stderr() as progress:
        report = workspace.retract(
            facts or (),
            keys=key or (),
            file=file,
            reason=reason,
            collection=collection,
            publish=not no_publish,
            progress=progress,
        )
    emit("facts retract", report, as_json=as_json, view=partial(add_views, command="facts retract"))
