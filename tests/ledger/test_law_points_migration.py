"""A ledger from before law points told their kind: its points keep their ids and get the defaults, and new ones stand beside them."""

from dataclasses import asdict, replace
from pathlib import Path

from sqlite_utils import Database

from memupdate.law.points import LawPoint
from memupdate.ledger import Ledger
from memupdate.ledger.migrations import MIGRATIONS
from memupdate.storage import canonical_json, text_sha256

LATER = ("examples", "steps", "attempts", "kind")
POINT = LawPoint("sha256:a", "mlp-all", "sha256:r", 2, 23_040, 16, 66, 3.5, 0.2, 15, 0.011, 54, False, 12.5)


def old_ledger(path: Path) -> None:
    db = Database(path)
    MIGRATIONS.apply(db, stop_before="m009_law_points_of_kinds")
    values = {name: value for name, value in asdict(POINT).items() if name not in LATER}
    digest = text_sha256(canonical_json({n: float(v) if type(v) is int else v for n, v in values.items()}))
    db["law_points"].insert({"id": digest, "batch": None, **values, "created_at_utc": "2026-11-24T00:00:00+00:00"})
    db.close()


def test_old_points_are_read_with_defaults_under_their_old_ids(tmp_path):
    old_ledger(tmp_path / "ledger.db")
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        assert ledger.law_points("sha256:a", "mlp-all", "sha256:r") == [POINT]
        assert ledger.verify_law() == []
        ledger.add_law_points([POINT])  # the same point: stored once
        told = replace(POINT, kind="numbers", steps=540, attempts=2, examples=48)
        ledger.add_law_points([told])
        assert ledger.law_points("sha256:a", "mlp-all", "sha256:r") == [POINT, told]
        assert ledger.verify_law() == []


def test_what_a_law_of_another_policy_differs_in(tmp_path):
    with Ledger.create(tmp_path / "ledger.db") as ledger:
        assert ledger.calibrated_otherwise("sha256:a", "mlp-all", "sha256:r") == ()
        ledger.add_law_points([replace(POINT, origin="shipped")])
        assert ledger.calibrated_otherwise("sha256:a", "mlp-one", "sha256:r") == ()  # nothing was measured here
        ledger.add_law_points([POINT])
        assert ledger.calibrated_otherwise("sha256:a", "mlp-all", "sha256:r") == ()
        assert ledger.calibrated_otherwise("sha256:a", "mlp-one", "sha256:r") == ("placement",)
        model, policy = ledger.calibrated_otherwise("sha256:b", "mlp-all", "sha256:s")
        assert model == "base model"
        assert policy.startswith("training policy")
