"""Commands about the workspace itself: `init`, `status`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memupdate.cli.render import emit
from memupdate.cli.session import CollectionOption, JsonOption, session_of


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("init")(init)
    app.command("status")(status)


def init(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="PATH_OR_HUB_ID", help="The deployed model: a folder or a hub id.")
    ],
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="The new workspace; --workspace if not given.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            "-p",
            metavar="NAME_OR_FILE",
            help="A shipped policy's name or a TOML file; `standard` otherwise.",
        ),
    ] = None,
    collection: CollectionOption = None,
    probes: Annotated[
        Path | None,
        typer.Option("--probes", metavar="FILE", help="Questions whose answers must not change, as JSON Lines."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a workspace for one model: memupdate.toml, ledger.db, registry/."""
    from memupdate import Workspace

    root = directory or session_of(ctx).root
    workspace = Workspace.init(root, model=model, policy=policy, collection=collection, probes=probes)
    emit("init", workspace.status(), as_json=as_json)


def status(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """One look at the state: model, facts, releases, aliases, engine, unfinished work."""
    # The messages say of each unfinished batch where it stands.
    emit("status", session_of(ctx).open_workspace().status(), as_json=as_json, hide=("unfinished_batches",))
