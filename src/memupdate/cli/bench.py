"""The `bench` command: a published data set of knowledge editing through the real `add`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memupdate.cli.progress import progress_on_stderr
from memupdate.cli.render import emit
from memupdate.cli.session import FormatOption, JsonOption

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memupdate.benchmarking.report import BenchReport


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("bench")(bench)


def bench(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="zsRE, CounterFact, KnowEdit, HalluEditBench, DyKnow or any facts file, as it is."
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", metavar="PATH", help="Model folder, hub repository, or atlas (embedded).")
    ],
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="NAME|FILE", help="A shipped policy or a file of your own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="The first N edits of the file only.")
    ] = None,
    edits_per_batch: Annotated[
        str,
        typer.Option(
            "--edits-per-batch", metavar="N|all", help="Edits of one `add`, one after the other into the same memory."
        ),
    ] = "all",
    augment: Annotated[
        bool,
        typer.Option(
            "--augment",
            help="Train the policy's share of each edit's wordings and measure generalization on the others; the field trains none.",
        ),
    ] = False,
    format: FormatOption = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", dir_okay=False, help="Write the tables there too.")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", metavar="DIR", help="Keep the workspace there instead of a temporary folder."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The field's table for a file of edits: by free generation and by teacher forcing side by side, before and after.

    The edits are written by the same `add` as everything else, in a workspace of their own. What a policy refuses to release is
    measured all the same, and said to be refused.
    """
    from memupdate.operations.bench import BenchWish, run_bench

    wish = BenchWish(
        model=model,
        policy=policy,
        limit=limit,
        edits_per_batch=_parse_batch(edits_per_batch),
        augment=augment,
        format=format,
        keep=keep,
    )
    with progress_on_stderr() as progress:
        report = run_bench(file, wish, progress=progress)
    emit("bench", report, as_json=as_json, view=bench_views)
    if markdown is not None:
        from memupdate.benchmarking.markdown import markdown_report
        from memupdate.storage import write_text_atomic

        write_text_atomic(markdown, markdown_report(report))
        typer.echo(f"wrote {markdown}", err=True)


def bench_views(report: BenchReport) -> list[RenderableType]:
    """The field's table, the batches, and what neither shows."""
    from rich.text import Text

    from memupdate.benchmarking.table import (
        BATCH_HEADER,
        HEADER,
        NOTE,
        batch_cells,
        measure_cells,
        summary,
        verdicts,
    )

    return [
        _table(summary(report), HEADER, measure_cells(report)),
        Text(NOTE, style="dim"),
        _table("written by", BATCH_HEADER, batch_cells(report)),
        *(Text(line) for line in verdicts(report)),
    ]


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _parse_batch(text: str) -> int | None:
    """`"all"` → None, `"10"` → 10. Raises typer.BadParameter for anything else."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a number of edits nor all", param_hint="--edits-per-batch")
    return int(text)
