"""The `memupdate` application: global options, the commands by group, and what happens when one fails.

Invariant: exit codes are those of `memupdate.errors.ExitCode`, 130 after Ctrl-C and 143 after SIGTERM; usage errors exit with 2, bugs of
ours surface whole with 1. Nothing here knows what a command does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from memupdate import __version__
from memupdate.cli import (
    bench,
    compact,
    demo,
    deploy,
    doctor,
    facts,
    formats,
    law,
    ledger,
    paraphrase,
    purge,
    report,
    retract,
    update,
    verify,
    workspace,
)
from memupdate.cli.errors import (
    INTERRUPTED_EXIT_CODE,
    interrupted_exit_code,
    raise_interrupt,
    show_error,
    show_interrupted,
)
from memupdate.cli.session import Session
from memupdate.distributed.launch import take_launch
from memupdate.errors import MemupdateError

_GLOBAL_FLAGS = frozenset({"--debug"})
_GLOBAL_VALUES = ("-w", "--workspace")


class RootGroup(TyperGroup):
    """Takes the global options in any position, and turns known errors into one clear line and their exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`memupdate add facts.jsonl -w DIR` means the same as `memupdate -w DIR add facts.jsonl`."""
        return super().parse_args(ctx, globals_first(args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a `MemupdateError` exits with its code, Ctrl-C with 130."""
        try:
            return super().invoke(ctx)
        except MemupdateError as error:
            show_error(error, debug=_is_debug(ctx))
            raise typer.Exit(int(error.exit_code)) from error
        except KeyboardInterrupt as interrupt:
            show_interrupted()
            raise typer.Exit(interrupted_exit_code() or INTERRUPTED_EXIT_CODE) from interrupt
        except (ValueError, TypeError, RuntimeError, SystemError) as error:
            if (code := interrupted_exit_code()) is None:
                raise
            show_interrupted()
            raise typer.Exit(code) from error


def globals_first(args: Sequence[str]) -> list[str]:
    """The arguments with the global options moved to the front; what follows `--` stays where it is."""
    first: list[str] = []
    rest: list[str] = []
    remaining = list(args)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--":
            rest += [argument, *remaining]
            break
        if argument in _GLOBAL_FLAGS or argument.startswith("--workspace="):
            first.append(argument)
        elif argument in _GLOBAL_VALUES and remaining:
            first += [argument, remaining.pop(0)]
        else:
            rest.append(argument)
    return first + rest


def _is_debug(ctx: Any) -> bool:
    return isinstance(ctx.obj, Session) and ctx.obj.debug


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memupdate {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="memupdate",
    cls=RootGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Writes new facts into a deployed language model as LoRA: planned by a law, proved token by token, "
    "served by vLLM.",
    epilog="-w, --workspace and --debug may stand anywhere. "
    "Exit codes: 0 done, 1 internal error, 2 bad usage or input, 3 a proof failed, 4 over budget, 5 workspace locked, "
    "6 engine or model unreachable, 130 interrupted, 143 terminated.",
)


@app.callback()
def globals_(
    ctx: typer.Context,
    workspace: Annotated[
        Path,
        typer.Option(
            "--workspace", "-w", envvar="MEMUPDATE_WORKSPACE", metavar="DIR", help="The workspace to work on."
        ),
    ] = Path("."),
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MEMUPDATE_DEBUG", help="Show the traceback of known errors too.")
    ] = False,
    version: Annotated[  # noqa: ARG001  # the callback prints it and exits
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Remember the global options for the command."""
    ctx.obj = Session(root=workspace, debug=debug)


workspace.register(app)
doctor.register(app)
law.register(app)
report.register(app)
update.register(app)
verify.register(app)
deploy.register(app)
facts.register(app)
ledger.register(app)
retract.register(facts.facts_app)
formats.register(facts.facts_app)
paraphrase.register(facts.facts_app)
purge.register(facts.facts_app)
compact.register(app)
demo.register(app)
bench.register(app)


def main() -> None:
    """Entry point of the console script."""
    # Training beside a CPU engine on the same cores: threads that spin while they wait made both five times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, raise_interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, raise_interrupt)
    launch = take_launch()
    if launch is None:
        app()
        return
    from memupdate.training.members import dismiss, help_train

    if launch.rank:
        help_train()
        return
    try:
        app()
    finally:
        dismiss()
