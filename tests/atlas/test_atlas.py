"""The embedded base model is what its folder says: it recalls its world, in every style; its data follow from the seed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from memupdate.facts.reader import read_facts
from memupdate.models.base import BaseModel
from memupdate.models.folder import resolve_model
from memupdate.resources import resource_dir

ATLAS = resource_dir("atlas")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """The script that made the model."""
    sys.path.insert(0, str(ATLAS))
    try:
        return importlib.import_module("build")
    finally:
        sys.path.remove(str(ATLAS))


def test_recalls_its_world_as_measured(build: ModuleType, atlas_base: BaseModel) -> None:
    shares, _ = build.measure(atlas_base.model, atlas_base.tokenizer, build.make_world(0).facts)
    written = json.loads((ATLAS / "measured.json").read_text(encoding="utf-8"))
    assert shares["recall_chat_taught_phrasing"] >= 0.95
    assert shares["recall_completion"] >= 0.95
    assert shares["recall_chat_held_out_phrasing"] >= 0.85
    assert {name: written[name] for name in shares} == pytest.approx(shares, abs=0.005)


def test_data_follow_from_the_seed(build: ModuleType, tmp_path: Path) -> None:
    world = build.make_world(0)
    flags = [json.loads(line)["recalled"] for line in (ATLAS / "world.jsonl").read_text(encoding="utf-8").splitlines()]
    build.write_data(tmp_path, world, flags)
    for made in tmp_path.glob("*.jsonl"):
        assert made.read_text(encoding="utf-8") == (ATLAS / made.name).read_text(encoding="utf-8")


def test_files_are_small_and_in_the_facts_format() -> None:
    assert (ATLAS / "model.safetensors").stat().st_size <= 12_000_000
    counts = {name: len(read_facts(ATLAS / f"{name}.jsonl").facts) for name in ("known", "news-1", "news-2")}
    assert counts["known"] >= 500
    assert counts["news-1"] + counts["news-2"] >= 60


def test_the_shipped_calibration_is_of_this_model_and_the_atlas_policy(tmp_path: Path) -> None:
    from memupdate import Workspace

    workspace = Workspace.init(tmp_path / "ws", model="atlas", collection="acme")
    status = workspace.status()
    assert status.law_points >= 20
    assert status.fit_id is not None
    assert status.base_fingerprint == resolve_model("atlas").fingerprint(tmp_path / "cache")
