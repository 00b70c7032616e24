"""The wheel, built by way of the sdist and without network, carries all that the demo needs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which shows that the sdist is complete too."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(repo_root)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_carries_code_policies_model_and_licence(wheel: Path, repo_root: Path) -> None:
    found = names(wheel)
    policies = {f"memupdate/_data/policies/{path.name}" for path in (repo_root / "policies").glob("*.toml")}
    assert len(policies) >= 3
    assert policies <= found
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert f"memupdate/_data/atlas/{name}" in found
    assert any(name.startswith("memupdate/_data/atlas/") and name.endswith(".jsonl") for name in found)
    assert {"memupdate/__init__.py", "memupdate/py.typed", "memupdate/cli/root.py"} <= found
    assert any(name.endswith("licenses/LICENSE") for name in found)


def test_carries_nothing_else(wheel: Path) -> None:
    found = names(wheel)
    assert [name for name in found if "__pycache__" in name] == []
    assert [name for name in found if name.startswith("memupdate/_data/") and name.endswith(".py")] == []
    assert all(name.startswith(("memupdate/", "memupdate-")) for name in found)


def test_the_model_is_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.getinfo("memupdate/_data/atlas/model.safetensors").file_size <= 12_000_000


def test_declares_the_script_and_the_plugin(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    assert "memupdate = memupdate.cli:main" in text
    assert "[vllm.general_plugins]\nmemupdate = memupdate.serving.vllm_plugin:register" in text


def test_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, the package finds its own data, not the checkout's."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import memupdate\n"
        "from memupdate.policies import load_policy, shipped_policies\n"
        "from memupdate.resources import resource_dir\n"
        "print(memupdate.__file__, resource_dir('atlas'), resource_dir('policies'), sep='\\n')\n"
        "assert [load_policy(name).name for name in shipped_policies()] == shipped_policies()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert answer.returncode == 0, answer.stderr
    for line in answer.stdout.splitlines():
        assert Path(line).is_relative_to(tmp_path / "site" / "memupdate")
