"""The command `facts formats`: what can be read, and by what it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from memupdate.cli.render import emit
from memupdate.cli.session import JsonOption

if TYPE_CHECKING:
    from rich.console import RenderableType

_CONTAINERS = "in JSON Lines, a JSON array, CSV, TSV or Parquet; the first four also packed with gzip or Zstandard"


def register(facts_app: typer.Typer) -> None:
    """Add this module's command to the group `facts`."""
    facts_app.command("formats")(facts_formats)


def facts_formats(as_json: JsonOption = False) -> None:
    """Formats of facts that can be read: those built in, and those of installed plug-ins."""
    from memupdate.facts.formats import FORMATS, all_formats

    rows = [{"name": known.name, "keys": known.summary, "plugin": known not in FORMATS} for known in all_formats()]
    emit("facts formats", rows, as_json=as_json, view=_views)


def _views(rows: Any) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table("format", "told by its keys", caption=_CONTAINERS)
    for row in rows:
        table.add_row(Text(row["name"] + " (plug-in)" * row["plugin"], no_wrap=True), Text(row["keys"]))
    return [table]
