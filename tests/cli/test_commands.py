"""Every command has help; usage errors exit with 2; global options may stand anywhere; nothing heavy is imported."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import memupdate
from memupdate.cli import app
from memupdate.cli.root import globals_first

COMMANDS = [
    ["init"],
    ["status"],
    ["calibrate"],
    ["plan"],
    ["report"],
    ["add"],
    ["resume"],
    ["verify"],
    ["publish"],
    ["promote"],
    ["abort"],
    ["rollback"],
    ["releases"],
    ["releases", "list"],
    ["releases", "show"],
    ["facts"],
    ["facts", "list"],
    ["facts", "show"],
    ["facts", "search"],
    ["facts", "history"],
    ["facts", "explain"],
    ["facts", "waiting"],
    ["facts", "export"],
    ["facts", "retract"],
    ["facts", "purge"],
    ["facts", "paraphrase"],
    ["ledger"],
    ["ledger", "backup"],
    ["ledger", "restore"],
    ["ledger", "datasette-metadata"],
    ["compact"],
    ["serve"],
    ["doctor"],
    ["demo"],
    ["bench"],
]
REPORTING = [
    command
    for command in COMMANDS
    if command not in (["releases"], ["facts"], ["ledger"], ["ledger", "datasette-metadata"], ["serve"])
]
HEAVY = ["torch", "transformers", "peft", "vllm", "scipy", "matplotlib", "sqlite_utils", "rich.progress"]

runner = CliRunner()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"], prog_name="memupdate")
    assert result.exit_code == 0, result.output
    assert f"Usage: memupdate {' '.join(command)}" in result.output


@pytest.mark.parametrize("command", REPORTING, ids=" ".join)
def test_every_reporting_command_has_json(command: list[str]) -> None:
    assert "--json" in runner.invoke(app, [*command, "--help"]).output


def test_the_list_of_commands_is_complete() -> None:
    named = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert named == {command[0] for command in COMMANDS}


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"memupdate {memupdate.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["add"],
        ["no-such-command"],
        ["status", "--no-such-option"],
        ["init", "somewhere"],
        ["serve", "--port", "70000"],
        ["serve", "--port", "http"],
        ["facts", "list", "--limit", "0"],
        ["calibrate", "--ranks", "4,x"],
        ["calibrate", "--sizes", "0"],
        ["publish"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2_and_say_nothing_on_stdout(arguments: list[str], tmp_path: Path) -> None:
    result = runner.invoke(app, ["-w", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["add", "f.jsonl", "-w", "ws"], ["-w", "ws", "add", "f.jsonl"]),
        (["add", "--workspace=ws", "f.jsonl", "--debug"], ["--workspace=ws", "--debug", "add", "f.jsonl"]),
        (["-w", "ws", "status", "--json"], ["-w", "ws", "status", "--json"]),
        (["add", "--", "-w", "ws"], ["add", "--", "-w", "ws"]),
        (["status", "-w"], ["status", "-w"]),
    ],
)
def test_global_options_may_stand_anywhere(given: list[str], expected: list[str]) -> None:
    assert globals_first(given) == expected


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "import memupdate, memupdate.cli\n"
        f"for command in {[[], *COMMANDS]!r}:\n"
        "    assert CliRunner().invoke(memupdate.cli.app, [*command, '--help']).exit_code == 0\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == []


def test_help_is_instant() -> None:
    """Processor time, the best of three, so that other work on the machine does not count."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "memupdate", "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.5


def test_the_console_script_is_installed_and_agrees(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("memupdate")
    environment = {**os.environ, "MEMUPDATE_WORKSPACE": str(tmp_path)}
    answer = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout == f"memupdate {memupdate.__version__}\n"


def test_the_package_names_its_public_api() -> None:
    assert "Workspace" in dir(memupdate)
    with pytest.raises(AttributeError, match="no attribute 'Workspaces'"):
        _ = memupdate.Workspaces
