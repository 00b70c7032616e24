"""Commands about what clients are answered from: `publish`, `promote`, `abort`, `rollback`, `releases`, `serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from memupdate.cli.progress import progress_on_stderr
from memupdate.cli.render import emit
from memupdate.cli.session import JsonOption, session_of
from memupdate.errors import UsageError

AliasArgument = Annotated[
    str | None,
    typer.Argument(metavar="ALIAS", help="The model name clients ask for; the workspace's own if not given."),
]
ServedOption = Annotated[
    list[str] | None,
    typer.Option(
        "--served",
        metavar="URL",
        help="An engine that reads this workspace's registry, on whatever machine; give one for each replica. "
        "By default those that run here.",
    ),
]

releases_app = typer.Typer(no_args_is_help=True, help="List and inspect releases.")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("publish")(publish)
    app.command("promote")(promote)
    app.command("abort")(abort)
    app.command("rollback")(rollback)
    app.command("serve")(serve)
    app.add_typer(releases_app, name="releases")


def publish(
    ctx: typer.Context,
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="For example acme@v7.")],
    canary: Annotated[
        str | None,
        typer.Option(
            "--canary",
            metavar="SHARE",
            help="Only this share of the conversations, such as 10% or 0.1; `promote` or `abort` ends it.",
        ),
    ] = None,
    served: ServedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point the alias at a release, after an engine has proved it; each engine must then answer with it."""
    share = None if canary is None else parse_share(canary)
    workspace = session_of(ctx).open_workspace()
    with progress_on_stderr() as progress:
        report = workspace.publish(release, canary=share, served=served or (), progress=progress)
    emit("publish", report, as_json=as_json)


def promote(
    ctx: typer.Context, alias: AliasArgument = None, served: ServedOption = None, as_json: JsonOption = False
) -> None:
    """Give the alias's canary all conversations, after each engine has proved it again; a failing canary ends. Exit code 3 then."""
    workspace = session_of(ctx).open_workspace()
    with progress_on_stderr() as progress:
        report = workspace.promote(alias, served=served or (), progress=progress)
    emit("promote", report, as_json=as_json)


def abort(
    ctx: typer.Context,
    alias: AliasArgument = None,
    if_failing: Annotated[
        bool,
        typer.Option(
            "--if-failing",
            help="End the canaries of all aliases whose answers fall short of the policy, and no other: for a timer.",
        ),
    ] = False,
    served: ServedOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the alias's canary: all conversations go to the release again."""
    if if_failing and alias is not None:
        raise UsageError("--if-failing looks at all aliases", "leave the alias out")
    workspace = session_of(ctx).open_workspace()
    if if_failing:
        emit("abort", workspace.abort_failing(served=served or ()), as_json=as_json)
    else:
        emit("abort", workspace.abort(alias, served=served or ()), as_json=as_json)


def rollback(
    ctx: typer.Context, alias: AliasArgument = None, served: ServedOption = None, as_json: JsonOption = False
) -> None:
    """Point the alias at the release it pointed at before, or end its canary. Nothing is trained; a batch that trains is not waited for."""
    emit("rollback", session_of(ctx).open_workspace().rollback(alias, served=served or ()), as_json=as_json)


def parse_share(text: str) -> float:
    """`10%` and `0.1` are the same share. Raises UsageError for what is no number."""
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise UsageError(f"--canary: {text!r} is no share", "give one like 10% or 0.1") from None


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
