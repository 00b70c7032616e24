"""What tests of several packages share: lines of the embedded model's files, and policies changed by one value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memupdate.facts.files import FactsFile, LocatedFact
from memupdate.facts.model import Fact
from memupdate.ledger.records import ReleaseRecord
from memupdate.resources import resource_dir
from memupdate.storage import text_sha256

if TYPE_CHECKING:
    from memupdate import Workspace
    from memupdate.ledger.ledger import Ledger

Row = dict[str, Any]


def news(number: int) -> list[Row]:
    """The lines of one of the embedded model's news files."""
    text = (resource_dir("atlas") / f"news-{number}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_facts_file(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def set_policy(policy: Path, values: dict[str, str]) -> None:
    """Set `section__key` to a TOML value, in a section that is there already or a new one at the end."""
    lines = policy.read_text(encoding="utf-8").splitlines()
    for name, value in values.items():
        section, key = name.split("__")
        lines = [line for line in lines if not line.startswith(f"{key} =")]
        if f"[{section}]" not in lines:
            lines.append(f"[{section}]")
        lines.insert(lines.index(f"[{section}]") + 1, f"{key} = {value}")
    policy.write_text("\n".join(lines) + "\n", encoding="utf-8")


def add_points_of_the_shipped_law(workspace: Workspace, first: int | None = None) -> None:
    """A policy of its own has no calibration; give it the shipped points, so that a test need not measure for minutes.

    The `first` so many are fitted sooner, where a test does not depend on how good the law is.
    """
    from memupdate.law.points import points_from_json
    from memupdate.operations import calibrating

    session = workspace.session
    points = points_from_json((resource_dir("atlas") / "calibration.json").read_text(encoding="utf-8"))
    with workspace.writer("test") as ledger:
        ledger.add_law_points([replace(point, recipe=session.recipe) for point in points[:first]])
        calibrating.refit(session, ledger)


def record_untrained_release(
    ledger: Ledger, facts: Sequence[Fact], version: int = 1, *, collection: str = "acme"
) -> str:
    """The rows of a release `acme@v1` (or 2, …) of `facts`, of which nothing was trained; returns the digest that it states."""
    located = tuple(LocatedFact(fact, line) for line, fact in enumerate(facts, start=1))
    batch = ledger.receive_batch(
        collection, FactsFile("f.jsonl", text_sha256(f"f{version}"), 1, "native", located), "{}"
    )
    assert batch is not None
    ledger.set_plan(batch.id, '{"rank": 8}')
    for state in ("planned", "trained", "verified"):
        ledger.transition(batch.id, state)
    name, digest = f"{collection}@v{version}", text_sha256("weights")
    place = f"registry/releases/{name}"
    ledger.record_release(ReleaseRecord(name, collection, version, batch.id, None, place, digest, 8, "mlp-all", digest))
    ledger.transition(batch.id, "released")
    return digest
