"""Commands about the law: `calibrate`, `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memupdate.cli.progress import progress_on_stderr
from memupdate.cli.render import emit
from memupdate.cli.session import (
    CollectionOption,
    FactsArgument,
    JsonOption,
    SkipInvalidOption,
    parse_numbers,
    session_of,
)
from memupdate.cli.views import calibration_views, plan_views


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("calibrate")(calibrate)
    app.command("plan")(plan)


def calibrate(
    ctx: typer.Context,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and smaller memories: minutes, wider intervals.")
    ] = False,
    ranks: Annotated[str | None, typer.Option("--ranks", metavar="R,R,…", help="Ranks to try, e.g. 4,8,16.")] = None,
    sizes: Annotated[
        str | None, typer.Option("--sizes", metavar="N,N,…", help="Numbers of facts to write, e.g. 32,64,128.")
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option("--facts", metavar="FACTS", help="Write this file's facts, not synthetic ones."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write memories of several ranks and sizes into the base model, and fit the memory law to what they cost."""
    rank_list, size_list = parse_numbers(ranks, "--ranks"), parse_numbers(sizes, "--sizes")
    workspace = session_of(ctx).open_workspace()
    with progress_on_stderr() as progress:
        outcome = workspace.calibrate(quick=quick, ranks=rank_list, sizes=size_list, facts=facts, progress=progress)
    emit("calibrate", outcome, as_json=as_json, view=calibration_views)


def plan(
    ctx: typer.Context,
    facts: FactsArgument,
    collection: CollectionOption = None,
    skip_invalid: SkipInvalidOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what `add` would do: conflicts, tokens, rank, predicted loss, bytes and time. Changes nothing."""
    workspace = session_of(ctx).open_workspace()
    with progress_on_stderr() as progress:
        outcome = workspace.plan(facts, collection=collection, skip_invalid=skip_invalid, progress=progress)
    emit("plan", outcome, as_json=as_json, view=plan_views)
