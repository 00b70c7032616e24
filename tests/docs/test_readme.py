"""The README and its sisters say what the code does: every command, every policy, every link, every example."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main

from memupdate import Workspace
from memupdate.cli import app
from memupdate.errors import ExitCode
from memupdate.facts.formats import FORMATS
from memupdate.facts.model import Fact
from memupdate.facts.reader import read_facts
from memupdate.layout import WorkspaceLayout
from memupdate.policies import shipped_policies

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "examples/README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(group: Any, prefix: str = "memupdate") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, command in group.commands.items():
        path = f"{prefix} {name}"
        found += commands(command, path) if hasattr(command, "commands") else [(path, command)]
    return found


COMMANDS = commands(typer.main.get_command(app))


@pytest.mark.parametrize("path", [path for path, _ in COMMANDS])
def test_every_command_is_in_the_readme(path: str) -> None:
    assert any(re.search(rf"\b{re.escape(path)}\b", block) for block in blocks(readme(), "sh")), path


@pytest.mark.parametrize("page", ["README.md", "examples/README.md"])
def test_every_command_line_shown_is_one_that_exists(page: str) -> None:
    known = dict(COMMANDS)
    shown = [
        line.split("#")[0].split()
        for block in blocks((ROOT / page).read_text(encoding="utf-8"), "sh")
        for line in block.splitlines()
        if line.startswith("memupdate ")
    ]
    assert shown
    for words in shown:
        name = next((" ".join(words[:n]) for n in (3, 2) if " ".join(words[:n]) in known), None)
        assert name is not None, words
        options = {option for parameter in known[name].params for option in parameter.opts} | {"-w", "--workspace"}
        assert {word for word in words if word.startswith("-")} <= options, words


@pytest.mark.parametrize("policy", shipped_policies())
def test_every_policy_is_in_the_readme(policy: str) -> None:
    assert f"(policies/{policy}.toml)" in readme()


@pytest.mark.parametrize("code", list(ExitCode), ids=str)
def test_every_exit_code_is_in_the_readme(code: ExitCode) -> None:
    assert re.search(rf"^\| {int(code)} \| \w", readme(), flags=re.MULTILINE)


def test_every_field_of_a_fact_is_in_the_readme() -> None:
    (table,) = re.findall(r"^\| field \| meaning \|\n(.*?)\n\n", readme(), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`(\w+)`", table))
    missing = {field.name for field in fields(Fact)} - {"external_id"} - named
    assert not missing


def test_every_format_has_its_row() -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert all(f"| `{known.name}`" in page for known in FORMATS)


def test_the_files_of_a_workspace_are_in_the_readme() -> None:
    layout = WorkspaceLayout(Path("ws"))
    registry = layout.registry
    paths = [layout.config, layout.ledger, layout.lock, registry.manifest, registry.release("acme@v1"), layout.slices]
    for path in [*paths, layout.cache, layout.logs, layout.engine]:
        assert f"`{path.relative_to('ws')}" in readme(), path


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_resolves(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    anchors = {slug(line) for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines() if line[:1] == "#"}
    for target in _LINK.findall(text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        if path:
            assert ((ROOT / page).parent / path).resolve().exists(), f"{page}: {target}"
        else:
            assert anchor in anchors, f"{page}: {target}"


def slug(heading: str) -> str:
    """The link target that Markdown renderers give to a heading."""
    plain = re.sub(r"[^\w\- ]", "", heading.lstrip("#").strip().lower())
    return plain.replace(" ", "-")


def test_the_facts_in_the_readme_are_facts(tmp_path: Path) -> None:
    examples = blocks(readme(), "jsonl")
    assert examples
    formats: set[str] = set()
    for number, block in enumerate(examples):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(block, encoding="utf-8")
        found = read_facts(file)
        assert len(found.facts) == len(block.splitlines())
        formats |= set(found.format.split("+"))
    assert {"native", "passage", "phonebook"} <= formats <= {known.name for known in FORMATS}


@pytest.mark.parametrize(
    ("name", "format_"),
    [
        ("native.jsonl", "native"),
        ("passages.jsonl", "passage"),
        ("phonebook.jsonl", "phonebook"),
        ("chat.jsonl", "chat"),
        ("counterfact.json", "counterfact"),
        ("knowedit.json", "knowedit"),
        ("long-text.jsonl", "long-text"),
        ("table.csv", "native"),
        ("table.tsv", "native"),
    ],
)
def test_the_samples_are_facts(name: str, format_: str) -> None:
    found = read_facts(ROOT / "examples" / name)
    assert (found.format, found.skipped, found.duplicates) == (format_, (), 0)
    assert f"({name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


def test_the_python_example_uses_what_the_library_has() -> None:
    (example,) = blocks(readme(), "python")
    used = {
        node.attr
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("workspace", "Workspace")
    }
    assert used
    assert all(hasattr(Workspace, name) for name in used), used


def test_the_demo_output_has_its_place() -> None:
    text = readme()
    assert text.count("<!-- demo-output:start -->") == text.count("<!-- demo-output:end -->") == 1
    assert text.index("<!-- demo-output:start -->") < text.index("<!-- demo-output:end -->")
