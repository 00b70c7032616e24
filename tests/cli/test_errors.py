"""A known error is a clear line, details, a hint and its exit code; a bug surfaces whole; Ctrl-C says how to go on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from memupdate import errors
from memupdate.cli import app
from memupdate.cli import errors as cli_errors
from memupdate.cli.root import RootGroup
from memupdate.cli.session import Session

CODES = {
    errors.UsageError: 2,
    errors.FactsError: 2,
    errors.PolicyError: 2,
    errors.LedgerError: 2,
    errors.WorkspaceLocked: 5,
    errors.OverBudget: 4,
    errors.ProofFailed: 3,
    errors.TrainingError: 1,
    errors.ModelError: 6,
    errors.EngineError: 6,
}


def app_that_raises(error: BaseException, *, debug: bool = False) -> typer.Typer:
    """A small application with our group, whose only command raises `error`."""
    small = typer.Typer(cls=RootGroup, pretty_exceptions_enable=False)

    @small.callback()
    def remember(ctx: typer.Context) -> None:
        ctx.obj = Session(Path(), debug=debug)

    @small.command()
    def fail() -> None:
        raise error

    return small


def test_every_error_class_is_covered() -> None:
    assert set(errors.MemupdateError.__subclasses__()) <= set(CODES)


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.__name__)
def test_known_errors(kind: type[errors.MemupdateError]) -> None:
    error = kind("facts.jsonl:7: [bold]not JSON[/bold]", hint="mend line 7", details=("line 7: a", "line 9: b"))
    result = CliRunner().invoke(app_that_raises(error), ["fail"])
    assert result.exit_code == CODES[kind]
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: facts.jsonl:7: [bold]not JSON[/bold]",
        "  line 7: a",
        "  line 9: b",
        "hint: mend line 7",
    ]


def test_debug_shows_the_traceback_too() -> None:
    result = CliRunner().invoke(app_that_raises(errors.UsageError("wrong"), debug=True), ["fail"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: wrong"


def test_ctrl_c_says_how_to_go_on() -> None:
    result = CliRunner().invoke(app_that_raises(KeyboardInterrupt()), ["fail"])
    assert result.exit_code == 130
    assert "memupdate resume" in result.stderr


def test_a_bug_surfaces_whole_and_exits_with_1() -> None:
    code = (
        "import memupdate.cli.root as a\n"
        "@a.app.command('broken')\n"
        "def broken():\n"
        "    raise ZeroDivisionError('a bug')\n"
        "a.app(['broken'])\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert "Traceback" in answer.stderr
    assert "ZeroDivisionError: a bug" in answer.stderr


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["facts", "list"], ["releases", "list"]])
def test_a_folder_without_a_workspace_is_named(command: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["-w", str(tmp_path / "none"), *command])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert str(tmp_path / "none") in result.stderr
    assert "hint:" in result.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_that_c_code_swallowed_is_one_all_the_same(
    monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """A signal in the middle of a C extension may come out as what that failed at."""
    monkeypatch.setattr(cli_errors, "_received", [number])
    result = CliRunner().invoke(app_that_raises(ValueError("could not determine the shape")), ["fail"])
    assert result.exit_code == code
    assert "memupdate resume" in result.stderr
