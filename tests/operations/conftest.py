"""Small real workspaces on the embedded model, with the calibration that ships with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from memupdate import Workspace
from support import set_policy


@pytest.fixture
def make_workspace(tmp_path: Path) -> Callable[..., Workspace]:
    """Makes a workspace on the embedded model; keyword arguments replace whole lines of its policy, `key="value"`."""

    def make(name: str = "acme", **lines: str) -> Workspace:
        workspace = Workspace.init(tmp_path / name, model="atlas", collection=name)
        if lines:
            policy = workspace.root / "policy.toml"
            set_policy(policy, lines)
            return Workspace(workspace.root)
        return workspace

    return make
