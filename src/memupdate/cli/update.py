"""Commands that write facts: `add`, `resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from memupdate.cli.law import plan
from memupdate.cli.progress import progress_on_stderr
from memupdate.cli.render import emit
from memupdate.cli.session import (
    BatchPolicyOption,
    CollectionOption,
    ColumnsOption,
    FactsArgument,
    FormatOption,
    JsonOption,
    SkipInvalidOption,
    parse_columns,
    session_of,
)
from memupdate.cli.views import add_views, resume_views


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("add")(add)
    app.command("resume")(resume)


def add(
    ctx: typer.Context,
    facts: FactsArgument,
    collection: CollectionOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as `memupdate plan`.")] = False,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Stop at the release; the alias stays.")] = False,
    policy: BatchPolicyOption = None,
    skip_invalid: SkipInvalidOption = False,
    columns: ColumnsOption = None,
    format: FormatOption = None,
    as_json: JsonOption = False,
) -> None:
    """The main job: read, plan, train, prove, release and publish a file of facts."""
    if dry_run:
        plan(ctx, facts, collection, policy, skip_invalid, columns, format, as_json)
        return
    mapping = parse_columns(columns)
    workspace = session_of(ctx).open_workspace(policy)
    with progress_on_stderr() as progress:
        report = workspace.add(
            facts,
            collection=collection,
            publish=not no_publish,
            skip_invalid=skip_invalid,
            columns=mapping,
            format=format,
            progress=progress,
        )
    emit("add", report, as_json=as_json, view=add_views)


def resume(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """Finish what a crash or Ctrl-C left, from the last finished step."""
    workspace = session_of(ctx).open_workspace()
    with progress_on_stderr() as progress:
        reports = workspace.resume(progress=progress)
    emit("resume", reports, as_json=as_json, view=resume_views)
