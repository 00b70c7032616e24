"""A disk that fills up or may not be written to: one clear error, nothing half applied, and `resume` afterwards."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import killing
from killing import Stage


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a real file system of a size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("a file system can only be mounted by root")
        return folder

    yield make
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill(folder: Path, free_bytes: int) -> Path:
    """Leave `free_bytes` of the file system."""
    blocks = max(0, shutil.disk_usage(folder).free - free_bytes)
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(blocks))
    return ballast


@pytest.mark.parametrize("free_kib", [0, 24, 64, 100, 140, 200])
def test_a_disk_that_fills_up(stage: Stage, mount: Callable[[str], Path], free_kib: int) -> None:
    """With ever more room the error comes ever later: before the batch, while it is planned, trained, released."""
    disk = mount("40m")
    root = Path(shutil.copytree(stage.template, disk / "ws"))
    ballast = fill(disk, free_kib * 1024)
    failed = stage.commands.run(root, "add", str(stage.second))
    assert "Traceback" not in failed.said
    if failed.wait() != 0:
        assert failed.wait() == 2, failed.said
        assert "no space left" in failed.said or "the disk is full" in failed.said, failed.said
    ballast.unlink()
    begun = killing.state_of(root, 2)
    if begun is not None and begun != "released":
        assert f"batch 2 of acme is {begun}" in failed.said, failed.said
        assert "`memupdate resume` goes on from there" in failed.said
    done = stage.commands.run(root, *(["resume"] if begun else ["add", str(stage.second)]))
    assert done.wait() == 0, done.said
    assert killing.differences(killing.content(root), stage.after) == []
    assert killing.leftovers(root) == []


@pytest.mark.parametrize("limit_kib", [4, 16, 40])
def test_files_that_may_not_grow(stage: Stage, copy: Callable[[], Path], limit_kib: int) -> None:
    """A limit on file sizes, as quotas give: what is written must say so, too."""
    root = copy()
    done = stage.commands.start(root, "add", str(stage.second), file_limit_bytes=limit_kib * 1024)
    assert done.wait() == 2, done.said
    assert "Traceback" not in done.said
    begun = killing.state_of(root, 2)
    resumed = stage.commands.run(root, *(["resume"] if begun else ["add", str(stage.second)]))
    assert resumed.wait() == 0, resumed.said
    assert killing.differences(killing.content(root), stage.after) == []


def test_a_read_only_file_system(stage: Stage, mount: Callable[[str], Path]) -> None:
    disk = mount("40m")
    root = Path(shutil.copytree(stage.template, disk / "ws"))
    remount(disk, "ro")
    failed = stage.commands.run(root, "add", str(stage.second))
    assert failed.wait() == 2, failed.said
    assert failed.said.count("error:") == 1
    assert "cannot be written" in failed.said
    assert "Traceback" not in failed.said
    for question in (["status"], ["releases", "list"], ["facts", "list"], ["report"]):
        asked = stage.commands.run(root, *question)
        assert asked.wait() == 0, (question, asked.said)
    remount(disk, "rw")
    assert killing.differences(killing.content(root), stage.before) == []
    done = stage.commands.run(root, "add", str(stage.second))
    assert done.wait() == 0, done.said
    assert killing.differences(killing.content(root), stage.after) == []
