"""Measured points of the memory law and the fits to them.

Invariant: a point is stored once, however often it is added. The ledger does not know the law: a fit is JSON to it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import asdict, fields

from memupdate.law.points import LawPoint
from memupdate.ledger.clock import utc_now
from memupdate.ledger.database import LedgerDatabase
from memupdate.ledger.records import FitRecord
from memupdate.storage import canonical_json, text_sha256

_POINT_COLUMNS = tuple(field.name for field in fields(LawPoint))
_ADDED_LATER = {
    field.name: field.default for field in fields(LawPoint) if field.name in ("examples", "steps", "attempts", "kind")
}
"""Columns that older ledgers lack; at these values they are no part of a point's id, so that old ids stay true."""
_SAME_RECIPE = "base_fingerprint = ? AND placement = ? AND recipe = ?"


class Law(LedgerDatabase):
    """Law points and fits."""

    def add_law_points(self, points: Iterable[LawPoint], *, batch: int | None = None) -> None:
        """Store measured points, those of a batch with its id; points that are there already are left alone."""
        now = utc_now()
        rows = [{"id": _point_id(point), "batch": batch, **asdict(point), "created_at_utc": now} for point in points]
        with self.transaction():
            self._insert_all("law_points", rows, ignore=True)

    def law_points(self, base_fingerprint: str, placement: str, recipe: str) -> list[LawPoint]:
        """Points of one base model, placement and recipe, in the order in which they were added."""
        rows = self._rows(
            f"SELECT * FROM law_points WHERE {_SAME_RECIPE} ORDER BY rowid", [base_fingerprint, placement, recipe]
        )
        return [_point(row) for row in rows]

    def planned_losses(self, base_fingerprint: str, placement: str, recipe: str) -> list[tuple[int, str, float]]:
        """(batch, its plan as JSON, mean loss measured in nats) of batches held at the rank that was planned, oldest first."""
        rows = self._rows(
            "SELECT p.batch, b.plan_json, p.loss_after_nats FROM law_points p JOIN batches b ON b.id = p.batch "
            f"WHERE {_SAME_RECIPE} AND p.rank = json_extract(b.plan_json, '$.rank') ORDER BY p.rowid",
            [base_fingerprint, placement, recipe],
        )
        return [(row["batch"], row["plan_json"], row["loss_after_nats"]) for row in rows]

    def add_fit(self, base_fingerprint: str, placement: str, recipe: str, fit_json: str) -> str:
        """Store a fit, which becomes the one in use; returns its id, the digest of its text, by which plans name it."""
        fit_id = text_sha256(fit_json)
        with self.transaction():
            latest = self.latest_fit(base_fingerprint, placement, recipe)
            if latest is None or latest.id != fit_id:
                row = {
                    "id": fit_id,
                    "base_fingerprint": base_fingerprint,
                    "placement": placement,
                    "recipe": recipe,
                    "fit_json": fit_json,
                    "created_at_utc": utc_now(),
                }
                self._insert("law_fits", row)
        return fit_id

    def latest_fit(self, base_fingerprint: str, placement: str, recipe: str) -> FitRecord | None:
        """The fit in use for one base model, placement and recipe; None before `calibrate`."""
        row = self._row(
            f"SELECT * FROM law_fits WHERE {_SAME_RECIPE} ORDER BY seq DESC LIMIT 1",
            [base_fingerprint, placement, recipe],
        )
        return None if row is None else _fit(row)

    def calibrated_otherwise(self, base_fingerprint: str, placement: str, recipe: str) -> tuple[str, ...]:
        """Where points were measured in this ledger, but none for this base model, placement and recipe: what they differ in."""
        rows = self._rows(
            "SELECT DISTINCT base_fingerprint, placement, recipe FROM law_points WHERE origin <> 'shipped'"
        )
        wanted = (base_fingerprint, placement, recipe)
        known = [(row["base_fingerprint"], row["placement"], row["recipe"]) for row in rows]
        if not known or wanted in known:
            return ()
        nearest = max(known, key=lambda found: sum(a == b for a, b in zip(found, wanted, strict=True)))
        names = ("base model", "placement", "training policy (objective, guard, dtype, steps, facts)")
        return tuple(name for name, a, b in zip(names, nearest, wanted, strict=True) if a != b)

    def fit(self, fit_id: str) -> FitRecord | None:
        """A fit by the id that a plan names."""
        row = self._row("SELECT * FROM law_fits WHERE id = ? ORDER BY seq LIMIT 1", [fit_id])
        return None if row is None else _fit(row)

    def verify_law(self) -> list[str]:
        """Points whose values no longer give their id."""
        rows = self._rows("SELECT * FROM law_points")
        return [
            f"law point {row['id']}: its values do not have this hash"
            for row in rows
            if _point_id(_point(row)) != row["id"]
        ]


def _point_id(point: LawPoint) -> str:
    # Through JSON with floats, so that 1 and 1.0 are the same point before and after SQLite.
    values = {
        name: float(value) if type(value) is int else value
        for name, value in asdict(point).items()
        if name not in _ADDED_LATER or value != _ADDED_LATER[name]
    }
    return text_sha256(canonical_json(values))


def _point(row: sqlite3.Row) -> LawPoint:
    values = {name: row[name] for name in _POINT_COLUMNS}
    return LawPoint(**{**values, "stopped_early": bool(row["stopped_early"])})


def _fit(row: sqlite3.Row) -> FitRecord:
    return FitRecord(
        row["id"], row["base_fingerprint"], row["placement"], row["recipe"], row["fit_json"], row["created_at_utc"]
    )
