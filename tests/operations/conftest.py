"""Small real workspaces on the embedded model, with the calibration that ships with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from memupdate import Workspace
from support import set_policy


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Anchors and baseline answers depend on model and policy only: sampled once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_workspace(tmp_path: Path, shared_cache: Path) -> Callable[..., Workspace]:
    """Makes a workspace on the embedded model; keyword arguments replace whole lines of its policy, `key="value"`."""

    def make(name: str = "acme", **lines: str) -> Workspace:
        workspace = Workspace.init(tmp_path / name, model="atlas", collection=name)
        shutil.rmtree(workspace.root / "cache")
        (workspace.root / "cache").symlink_to(shared_cache)
        if lines:
            policy = workspace.root / "policy.toml"
            set_policy(policy, lines)
            return Workspace(workspace.root)
        return workspace

    return make
