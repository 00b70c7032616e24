"""Commands about the facts in the ledger: `facts list`, `facts show`."""

from __future__ import annotations

from typing import Annotated

import typer

from memupdate.cli.render import emit
from memupdate.cli.session import CollectionOption, JsonOption, session_of
from memupdate.cli.views import fact_document, fact_row, fact_rows_views

facts_app = typer.Typer(no_args_is_help=True, help="Look into the ledger of facts.")

DEFAULT_LIMIT = 50
"""Facts on one screen; a ledger may hold very many."""


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(facts_app, name="facts")


@facts_app.command("list")
def facts_list(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = DEFAULT_LIMIT,
    offset: Annotated[int, typer.Option("--offset", min=0, help="Leave out so many first.")] = 0,
    collection: CollectionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Live facts, with the release that brought them."""
    rows = session_of(ctx).open_workspace().facts(limit=limit, offset=offset, collection=collection)
    emit("facts list", [fact_row(row) for row in rows], as_json=as_json, view=fact_rows_views)


@facts_app.command("show")
def facts_show(
    ctx: typer.Context,
    fact: Annotated[str, typer.Argument(metavar="ID", help="The fact's id, or its first characters.")],
    as_json: JsonOption = False,
) -> None:
    """One fact: its source, batches and proofs."""
    emit("facts show", fact_document(session_of(ctx).open_workspace().fact(fact)), as_json=as_json)
