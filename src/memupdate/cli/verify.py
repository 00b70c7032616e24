"""The command `verify`, and what people see of its reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memupdate.cli.progress import progress_on_stderr
from memupdate.cli.render import emit, shorten, to_plain, views
from memupdate.cli.session import JsonOption, session_of
from memupdate.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memupdate.operations.explaining import AnswerExplanation
    from memupdate.operations.reports import VerifyReport

_SHOWN_QUESTIONS = 10
"""Answers of each measure that were not as expected; the JSON document has all."""


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("verify")(verify)


def verify(
    ctx: typer.Context,
    release: Annotated[
        str | None, typer.Argument(metavar="RELEASE", help="For example acme@v7; the latest one if not given.")
    ] = None,
    served: Annotated[
        str | None, typer.Option("--served", metavar="URL", help="Prove on the engine that answers there.")
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="FACT",
            help="Look at one fact, by the beginning of its id: its tokens with probabilities, what the model says instead, which "
            "facts compete with it, and what would help.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove every fact of a release again, in-process or on the serving engine, and measure what clients get beyond that.

    Exit code 3 where a fact is not proved or the release falls short of the policy."""
    if explain is not None and served is not None:
        raise UsageError("--explain looks at the model in this process", "leave --served out")
    workspace = session_of(ctx).open_workspace()
    with progress_on_stderr() as progress:
        if explain is not None:
            explanation = workspace.explain_answer(explain, release=release, progress=progress)
        else:
            report = workspace.verify(release, served=served, progress=progress)
    if explain is not None:
        emit("verify", explanation, as_json=as_json, view=explanation_views)
        return
    emit("verify", report, as_json=as_json, view=verify_views)
    if not report.passed:
        raise typer.Exit(int(ExitCode.PROOF_FAILED))


def verify_views(report: VerifyReport) -> list[RenderableType]:
    """The verdict, the measures, and the first answers that are not as expected."""
    from rich.table import Table
    from rich.text import Text

    hidden = frozenset({"measures", "questions", "text", "shortfalls"})
    shown = views("verify", to_plain(report), hide=hidden)
    table = Table(title="Measures", title_justify="left")
    for heading in ("measure", "asked as"):
        table.add_column(heading)
    for heading in ("asked", "exact", "normalised", "contained", "least sure token"):
        table.add_column(heading, justify="right")
    for c in report.measures:
        shares = (f"{100 * n / c.asked:.1f} %" for n in (c.exact, c.normalised, c.contained))
        sure = "–" if c.min_probability is None else f"{c.min_probability:.3f}"
        table.add_row(c.measure, c.part, f"{c.asked:,}", *shares, sure)
    if report.measures:
        shown.append(table)
    if report.text is not None:
        t = report.text
        line = f"General text ({t.corpus}, {t.tokens:,} tokens): perplexity {t.perplexity:.3f} against {t.perplexity_base:.3f} of the base "
        shown.append(Text(f"{line}model ({t.perplexity_ratio - 1:+.2%}), KL {t.kl_nats:.4f} nats per token"))
    shown += [Text(line, style="bold") for line in report.shortfalls]
    for measure in ("recall", "generality", "locality", "portability"):
        differing = [q for q in report.questions if q.measure == measure and q.judged != "exact"]
        for q in differing[:_SHOWN_QUESTIONS]:
            said, wanted = shorten(q.answer or ""), shorten(q.expected)
            shown.append(
                Text(f"{measure}, {q.part}: {shorten(q.prompt)!r}: {said!r}, not {wanted!r} ({q.judged})", style="dim")
            )
        if len(differing) > _SHOWN_QUESTIONS:
            shown.append(Text(f"{measure}: and {len(differing) - _SHOWN_QUESTIONS:,} more", style="dim"))
    return shown


def explanation_views(report: AnswerExplanation) -> list[RenderableType]:
    """The answer, its tokens, its competitors, then what would help."""
    from rich.table import Table
    from rich.text import Text

    verdict = f"{'proved' if report.proved else 'not proved'} ({report.status})"
    shown: list[RenderableType] = [
        Text(f"{report.release}: {report.prompt} → {report.target}: {verdict}", style="bold"),
        Text(f"says: {report.says}"),
    ]
    tokens = Table(title="Tokens, each given the true ones before it", title_justify="left")
    for heading in ("token", "probability", "likeliest", "its probability"):
        tokens.add_column(heading, justify="right" if "probability" in heading else "left")
    for t in report.tokens:
        same = t.token == t.best_token
        cells = (
            repr(t.token),
            f"{t.probability:.4f}",
            "" if same else repr(t.best_token),
            "" if same else f"{t.best_probability:.4f}",
        )
        tokens.add_row(*(Text(cell, style="" if same else "red") for cell in cells))
    shown.append(tokens)
    if report.competitors:
        table = Table(title="What competes with it", title_justify="left")
        for heading in ("fact", "prompt", "answer", "is what came out", "live", "words in common"):
            table.add_column(heading)
        for c in report.competitors:
            flags = ("yes" if c.answers_so else "no", "yes" if c.is_live else "no", f"{c.words_in_common:.0%}")
            table.add_row(*(Text(shorten(cell)) for cell in (c.fact[:19], c.prompt, c.target, *flags)))
        shown.append(table)
    for q in report.measures:
        said = "" if q.answer is None else f": {shorten(q.answer)!r}"
        shown.append(Text(f"{q.measure}, {q.part}: {shorten(q.prompt)!r} {q.judged}{said}", style="dim"))
    return [*shown, *(Text(f"What would help: {line}") for line in report.advice)]
