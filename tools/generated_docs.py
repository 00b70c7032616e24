"""Writes a generated page of the documentation, or, with `--check`, says whether the one in the checkout is still right.

Invariant: with `--check` nothing is written, and the exit code is 1 where page and source have drifted apart.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_or_check(relative_path: str, text: str, description: str | None) -> None:
    """Write `text` to the page, or compare the two, as the command line says.

    Args:
        relative_path: of the page, from the checkout's root.
        description: what `--help` says.

    Raises:
        SystemExit: code 1 where `--check` finds a difference.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    check: bool = parser.parse_args().check
    page = ROOT / relative_path
    found = page.read_text(encoding="utf-8") if page.is_file() else ""
    if found == text:
        return
    if not check:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
        return
    changes = difflib.unified_diff(found.splitlines(), text.splitlines(), relative_path, "generated", lineterm="", n=1)
    print("\n".join(changes), file=sys.stderr)
    print(f"{relative_path} is out of date: run `make docs` and commit it", file=sys.stderr)
    sys.exit(1)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, one line of text each; pipes in cells are escaped."""
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
