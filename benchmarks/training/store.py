"""Cells that are done, one JSON line each, so that an interrupted study goes on where it was.

Invariant: a line is found again only under the same study, the same cell and the same code; later lines win. Knows nothing of what a cell
is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.recording import ROOT, commit

from memupdate.storage import canonical_json, text_sha256

Row = dict[str, Any]
_OURS = ("src/memupdate/training", "src/memupdate/models/scoring.py", "policies/atlas.toml")
"""What a cell of ours depends on, besides the embedded model."""
_BASELINES = "1"
"""Counts up when a baseline is changed in a way that its cells would show."""


@cache
def code_of_ours() -> str:
    """Identity of the trainer and its settings."""
    files = [file for path in _OURS for file in _python_files(ROOT / path)]
    return text_sha256(canonical_json([file.read_text(encoding="utf-8") for file in files]))[7:19]


@cache
def code_of_baselines() -> str:
    """Identity of the baselines: their version here, and that of the packages that do their work."""
    packages = ("torch", "transformers", "peft", "trl")
    return " ".join([_BASELINES, *(f"{name}={_version(name)}" for name in packages)])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # TRL is an extra: what was measured elsewhere can be summed up without it
        return "none"


def _python_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.py")) if path.is_dir() else [path]


@dataclass
class Store:
    """The lines of one file."""

    path: Path
    rows: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Store:
        store = cls(path)
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                store.rows[_key(entry["study"], entry["cell"], entry["code"])] = entry
        return store

    def get(self, study: str, cell: Mapping[str, Any], code: str) -> Row | None:
        """The result of a cell, if it is there."""
        entry = self.rows.get(_key(study, cell, code))
        return entry["result"] if entry else None

    def get_or(self, study: str, cell: Mapping[str, Any], code: str, measure: Callable[[], Row]) -> Row:
        """The result of a cell, measured and kept where it is missing; told on a line."""
        result = self.get(study, cell, code)
        if result is None:
            result = measure()
            entry = {
                "study": study,
                "cell": dict(cell),
                "code": code,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": commit(),
                "result": result,
            }
            self.rows[_key(study, cell, code)] = entry
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        print(f"{study}: {_short(cell)} → {_short(result)}", flush=True)
        return result


def _short(values: Mapping[str, Any]) -> str:
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items() if not isinstance(v, list)}
    return ", ".join(f"{k} {v}" for k, v in shown.items() if v not in (None, ""))


def _key(study: str, cell: Mapping[str, Any], code: str) -> str:
    return canonical_json([study, dict(cell), code])
