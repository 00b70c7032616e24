"""What the global options said, and the options that many commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from memupdate.operations.questions import LedgerQuestions
    from memupdate.operations.workspace import Workspace


@dataclass(frozen=True)
class Session:
    """The global options of one run."""

    root: Path
    """Workspace folder, as given."""
    debug: bool = False

    def open_workspace(self, batch_policy: str | None = None) -> Workspace:
        """Open the workspace; loads the operations, so only a command that runs may call it.

        Args:
            batch_policy: a policy whose values replace the workspace's for this run.

        Raises:
            UsageError: there is no workspace in `root`.
            PolicyError: `batch_policy` sets what one batch cannot have of its own.
        """
        from memupdate import Workspace
        from memupdate.policies import load_batch_values

        return Workspace(self.root, overrides=load_batch_values(batch_policy) if batch_policy else None)

    def open_questions(self) -> LedgerQuestions:
        """Open the workspace's ledger for questions only; starts several times as fast as `open_workspace`.

        Raises:
            UsageError: there is no workspace in `root`.
        """
        from memupdate.operations.questions import LedgerQuestions

        return LedgerQuestions(self.root)


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; all else goes to stderr.")]
CollectionOption = Annotated[
    str | None,
    typer.Option("--collection", "-c", metavar="NAME", help="The line of releases; the workspace's own if not given."),
]
SkipInvalidOption = Annotated[
    bool, typer.Option("--skip-invalid", help="Take the valid lines of the file and list the others.")
]
BatchPolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="NAME|FILE",
        help="What it sets of budget, escalation and proof holds for this batch, e.g. hotfix; all else is the workspace's policy.",
    ),
]
FactsArgument = Annotated[
    Path, typer.Argument(metavar="FACTS", help="The facts file, or - for standard input; its format is detected.")
]
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="FIELD=COLUMN,…",
        help="Which column of a table, or key of a record, has which field: prompt=Question,target=Answer.",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="NAME", help="The format of the records, not to be detected; see `facts formats`."
    ),
]


def session_of(ctx: typer.Context) -> Session:
    """The `Session` that the global options made."""
    session = ctx.obj
    if not isinstance(session, Session):
        raise TypeError(f"no session in the context: {session!r}")
    return session


def parse_numbers(text: str | None, option: str) -> list[int] | None:
    """`"4,8,16"` → `[4, 8, 16]`; None stays None.

    Raises:
        typer.BadParameter: anything that is not a comma-separated list of positive whole numbers.
    """
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of positive whole numbers like 4,8,16", param_hint=option)
    return numbers


def parse_columns(text: str | None) -> dict[str, str] | None:
    """`"prompt=Question,target=Answer"` → field → column; None stays None. A column's name may hold `=`, but no comma.

    Raises:
        typer.BadParameter: anything else, or a field twice.
    """
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    columns = {field.strip(): column.strip() for field, _, column in pairs}
    if not all(columns.values()) or len(columns) != len(pairs) or "" in columns:
        raise typer.BadParameter(f"{text!r} is not like prompt=Question,target=Answer", param_hint="--columns")
    return columns


def parse_range(text: str, option: str) -> tuple[int, int]:
    """`"20..500"` → `(20, 500)`.

    Raises:
        typer.BadParameter: anything that is not two positive whole numbers, the second larger.
    """
    low, dots, high = text.partition("..")
    if not (dots and low.isdecimal() and high.isdecimal() and 1 <= int(low) < int(high)):
        raise typer.BadParameter(f"{text!r} is not a range of whole numbers like 20..500", param_hint=option)
    return int(low), int(high)
