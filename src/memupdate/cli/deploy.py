"""Commands about what clients are answered from: `publish`, `rollback`, `releases`, `serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from memupdate.cli.progress import progress_on_stderr
from memupdate.cli.render import emit
from memupdate.cli.session import JsonOption, session_of

releases_app = typer.Typer(no_args_is_help=True, help="List and inspect releases.")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("publish")(publish)
    app.command("rollback")(rollback)
    app.command("serve")(serve)
    app.add_typer(releases_app, name="releases")


def publish(
    ctx: typer.Context,
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="For example acme@v7.")],
    as_json: JsonOption = False,
) -> None:
    """Point the alias at a release, after the engine has proved it where one runs."""
    workspace = session_of(ctx).open_workspace()
    with progress_on_stderr() as progress:
        report = workspace.publish(release, progress=progress)
    emit("publish", report, as_json=as_json)


def rollback(
    ctx: typer.Context,
    alias: Annotated[
        str | None, typer.Argument(metavar="ALIAS", help="The model name clients ask for; the only one if not given.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Point the alias at the release it pointed at before. Nothing is trained."""
    emit("rollback", session_of(ctx).open_workspace().rollback(alias), as_json=as_json)


def serve(
    ctx: typer.Context,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="TCP port to listen on.")] = 8000,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    replicas: Annotated[
        int,
        typer.Option("--replicas", min=1, max=64, help="Engines on this machine, each on the next port."),
    ] = 1,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print the vLLM command and its environment; start nothing.")
    ] = False,
) -> None:
    """Start vLLM with the releases, the alias and safe defaults, and keep it up; Ctrl-C or SIGTERM drains and stops it."""
    workspace = session_of(ctx).open_workspace()
    with progress_on_stderr() as progress:
        command = workspace.serve(
            port=port, host=host, replicas=replicas, print_command=print_command, progress=progress
        )
    if print_command:
        typer.echo(command)


@releases_app.command("list")
def releases_list(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """All releases, newest first, with the alias that points at each."""
    rows = session_of(ctx).open_workspace().releases()
    emit(
        "releases list",
        rows,
        as_json=as_json,
        columns=("name", "rank", "placement", "facts", "created_at_utc", "aliases"),
    )


@releases_app.command("show")
def releases_show(
    ctx: typer.Context,
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="For example acme@v7.")],
    as_json: JsonOption = False,
) -> None:
    """One release: its digests, plan, law, facts and proof."""
    emit("releases show", session_of(ctx).open_workspace().release(release), as_json=as_json, hide=("facts", "policy"))
