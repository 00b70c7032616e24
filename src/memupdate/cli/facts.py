"""Commands that ask the ledger about facts: `facts list`, `show`, `search`, `history`, `explain`, `waiting`,
`export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memupdate.cli.facts_views import (
    as_of_document,
    explanation_views,
    fact_document,
    fact_row,
    history_views,
    rows_views,
)
from memupdate.cli.render import emit
from memupdate.cli.session import CollectionOption, JsonOption, session_of

facts_app = typer.Typer(no_args_is_help=True, help="Look into the ledger of facts.")

DEFAULT_LIMIT = 50
"""Facts on one screen; a ledger may hold very many."""

AllCollectionsOption = Annotated[
    str | None, typer.Option("--collection", "-c", metavar="NAME", help="Only this line of releases; else all.")
]
AsOfOption = Annotated[
    str | None,
    typer.Option(
        "--as-of",
        metavar="RELEASE|DATE",
        help="What the model knew then: acme@v12, v12, or the newest release made by a date or time (UTC).",
    ),
]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The fact's id, or its first characters.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(facts_app, name="facts")


@facts_app.command("list")
def facts_list(
    ctx: typer.Context,
    as_of: AsOfOption = None,
    limit: LimitOption = DEFAULT_LIMIT,
    offset: Annotated[int, typer.Option("--offset", min=0, help="Leave out so many first.")] = 0,
    collection: CollectionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Live facts, with the release that brought them."""
    questions = session_of(ctx).open_questions()
    if as_of is None:
        rows = questions.facts(limit=limit, offset=offset, collection=collection)
        emit("facts list", [fact_row(row) for row in rows], as_json=as_json, view=rows_views("facts list"))
        return
    known = questions.facts_as_of(as_of, limit=limit, offset=offset, collection=collection)
    emit(
        "facts list",
        as_of_document(known),
        as_json=as_json,
        view=lambda document: rows_views(f"{known.release} holds {known.facts_total} facts")(document["rows"]),
    )


@facts_app.command("show")
def facts_show(ctx: typer.Context, fact: IdArgument, as_json: JsonOption = False) -> None:
    """One fact: its source, batches and proofs."""
    emit("facts show", fact_document(session_of(ctx).open_questions().fact(fact)), as_json=as_json)


@facts_app.command("search")
def facts_search(
    ctx: typer.Context,
    query: Annotated[
        list[str],
        typer.Argument(metavar="WORD...", help='Words that all occur; "a phrase" in quotes, begin* for a beginning.'),
    ],
    limit: LimitOption = 20,
    collection: AllCollectionsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Full-text search over all facts ever told, the best match first."""
    hits = session_of(ctx).open_questions().search(" ".join(query), limit=limit, collection=collection)
    emit(
        "facts search",
        hits,
        as_json=as_json,
        view=rows_views("facts search", "id", "snippet", "target", "status", "release"),
    )


@facts_app.command("history")
def facts_history(
    ctx: typer.Context,
    asked: Annotated[
        str, typer.Argument(metavar="KEY|PROMPT|ID", help="A key, a prompt, `SUBJECT / RELATION`, or a fact's id.")
    ],
    collection: AllCollectionsOption = None,
    as_json: JsonOption = False,
) -> None:
    """All values of one key: when each was true, when it was told, which releases have it."""
    rows = session_of(ctx).open_questions().history(asked, collection=collection)
    emit("facts history", rows, as_json=as_json, view=history_views)


@facts_app.command("explain")
def facts_explain(ctx: typer.Context, fact: IdArgument, as_json: JsonOption = False) -> None:
    """Where an answer comes from: file and line, batch, plan, law fit, slice, release, proofs."""
    explanation = session_of(ctx).open_questions().explain(fact)
    emit("facts explain", explanation, as_json=as_json, view=explanation_views)


@facts_app.command("waiting")
def facts_waiting(
    ctx: typer.Context,
    limit: LimitOption = DEFAULT_LIMIT,
    collection: AllCollectionsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Facts that were told and are in no release: on their way, failed or left out, and why."""
    rows = session_of(ctx).open_questions().waiting(limit=limit, collection=collection)
    emit(
        "facts waiting",
        rows,
        as_json=as_json,
        view=rows_views("facts waiting", "fact", "prompt", "target", "status", "batch", "why"),
    )


@facts_app.command("export")
def facts_export(
    ctx: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A new file; .jsonl, .csv or .parquet names its format.")
    ],
    as_of: AsOfOption = None,
    collection: CollectionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Live facts as a file that `add` reads back as the same facts."""
    report = session_of(ctx).open_questions().export(file, as_of=as_of, collection=collection)
    emit("facts export", report, as_json=as_json)
