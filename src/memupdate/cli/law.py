"""Commands about the law: `calibrate`, `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    parse_numbers,
    parse_range,
    session_of,
)
from memupdate.cli.views import calibration_views, plan_views
from memupdate.errors import MemupdateError


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("calibrate")(calibrate)
    app.command("plan")(plan)


def calibrate(
    ctx: typer.Context,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", metavar="MINUTES", help="Time to spend; each memory is chosen for what it tells. Default: 10."
        ),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(
            "--expect", metavar="N..M", help="Facts that your collections will hold, from and to. Default: 8..400."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three minutes: wider intervals, larger ranks.")] = False,
    ranks: Annotated[
        str | None, typer.Option("--ranks", metavar="R,R,…", help="With --sizes: exactly these ranks, e.g. 4,8,16.")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option("--sizes", metavar="N,N,…", help="With --ranks: exactly these numbers of facts, e.g. 32,64."),
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option("--facts", metavar="FACTS", help="Write this file's facts, not shipped or synthetic ones."),
    ] = None,
    placement: Annotated[
        list[str] | None,
        typer.Option(
            "--placement",
            metavar="NAME",
            help="Measure this placement (mlp-all, mlp-one, mlp-last, all-linear); more than one share the minutes. Default: the policy's.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write memories of several ranks and sizes into the base model, and fit the memory law to what they held.

    Each memory is chosen for what it tells about the plans that you will ask for, two at a time where there are two cores. Ctrl-C keeps
    what is done; the next calibration goes on from there.
    """
    from memupdate.operations import calibrating

    rank_list, size_list = parse_numbers(ranks, "--ranks"), parse_numbers(sizes, "--sizes")
    expected = calibrating.DEFAULT_EXPECTED if expect is None else parse_range(expect, "--expect")
    minutes = budget if budget is not None else calibrating.QUICK_MINUTES if quick else calibrating.DEFAULT_MINUTES
    workspace = session_of(ctx).open_workspace()
    with progress_on_stderr() as progress:
        outcome = workspace.calibrate(
            minutes=minutes, expected=expected, ranks=rank_list, sizes=size_list, facts=facts, placements=placement or (),
            progress=progress,
        )  # fmt: skip
    emit("calibrate", outcome, as_json=as_json, view=calibration_views)


def plan(
    ctx: typer.Context,
    facts: FactsArgument,
    collection: CollectionOption = None,
    policy: BatchPolicyOption = None,
    skip_invalid: SkipInvalidOption = False,
    columns: ColumnsOption = None,
    format: FormatOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what `add` would do: conflicts, tokens, rank, predicted loss, bytes and time. Changes nothing."""
    from memupdate.operations.reports import PlanReport

    mapping = parse_columns(columns)
    workspace = session_of(ctx).open_workspace(policy)
    with progress_on_stderr() as progress:
        try:
            outcome = workspace.plan(
                facts,
                collection=collection,
                skip_invalid=skip_invalid,
                columns=mapping,
                format=format,
                progress=progress,
            )
        except MemupdateError as error:
            if isinstance(error.report, PlanReport) and not as_json:
                emit("plan", error.report, as_json=False, view=plan_views)
            raise
    emit("plan", outcome, as_json=as_json, view=plan_views)
