"""The command `facts paraphrase`: other wordings of facts, by the base model, for a person to look through."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memupdate.cli.progress import progress_on_stderr
from memupdate.cli.render import emit
from memupdate.cli.session import (
    CollectionOption,
    ColumnsOption,
    FactsArgument,
    FormatOption,
    JsonOption,
    SkipInvalidOption,
    parse_columns,
    session_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memupdate.facts import Fact


def register(facts_app: typer.Typer) -> None:
    """Add this module's command to the group `facts`."""
    facts_app.command("paraphrase")(facts_paraphrase)


def facts_paraphrase(
    ctx: typer.Context,
    facts: FactsArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="A new file; .jsonl, .csv or .parquet names its format. Else stdout."
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, max=64, help="New wordings of each fact, at most.")] = 4,
    attempts: Annotated[
        int,
        typer.Option(
            "--attempts", min=1, max=64, help="Rounds; each asks again for the facts that lack wordings still."
        ),
    ] = 4,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of the sampling; the policy's training.seed if not given.")
    ] = None,
    collection: CollectionOption = None,
    skip_invalid: SkipInvalidOption = False,
    columns: ColumnsOption = None,
    format: FormatOption = None,
    as_json: JsonOption = False,
) -> None:
    """The facts with other wordings that the base model finds and a filter lets pass, to be read and then added. Changes nothing else."""
    if as_json and out is None:
        raise typer.BadParameter("needs --out FILE: without it the facts take stdout", param_hint="--json")
    mapping = parse_columns(columns)
    workspace = session_of(ctx).open_workspace()
    with progress_on_stderr() as progress:
        report = workspace.paraphrase(
            facts,
            out=out,
            count=count,
            attempts=attempts,
            seed=seed,
            collection=collection,
            skip_invalid=skip_invalid,
            columns=mapping,
            format=format,
            progress=progress,
        )
    if out is None:
        _print_facts(report.written)
    emit("facts paraphrase", report, as_json=as_json, on_stderr=out is None)


def _print_facts(facts: Iterable[Fact]) -> None:
    """UTF-8 whatever the locale, as a file is."""
    from memupdate.facts.formats import native_record
    from memupdate.operations.exporting import jsonl_line

    for fact in facts:
        typer.echo(jsonl_line(native_record(fact)).encode(), nl=False)
