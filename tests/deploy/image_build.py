"""Builds container files and runs pods without a container engine: each stage is a folder of overlays, entered by chroot.

Needs root and Linux, and must be run under `unshare --mount`, so that its mounts end with it. What stands for a base image such as
`python:3.11-slim` is this machine's own system with this Python; so what the real base image lacks or does differently is not seen.
Invariant: nothing outside the folder that is given is written to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from deploy.containerfile import Copy, Mount, Run, Setting, Stage, Step, Variables, context_files

_SYSTEM = {
    "/usr": ["/usr"],
    "/etc": ["/etc"],
    "/var": ["/var"],
    "/opt": ["/opt"],
    "/usr/local": list(dict.fromkeys([sys.base_prefix, "/usr/local"])),
}
"""What a base image has, and where it is taken from; everything else begins empty. Official images have their Python in /usr/local."""
_LINKS = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
_FROM_OUTSIDE = ("PIP_", "SSL_", "REQUESTS_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""How this machine's pip reaches packages; container engines hand proxies on as well."""
_PIP = '#!/bin/sh\nexec python3 -m pip "$@"\n'


@dataclass
class Root:
    """A stage's file system and what its next line would see."""

    path: Path
    layers: tuple[Path, ...] = ()
    """Upper folders, newest first."""
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: int = 0
    groups: tuple[int, ...] = ()

    def at(self, path: str) -> Path:
        """A path of the stage as seen from outside."""
        return self.path / path.lstrip("/")

    def run(self, command: Sequence[str], extra: Mapping[str, str] | None = None, **options: Any) -> Any:
        """A process inside, as the stage's user; see `subprocess.Popen`."""
        inside = {**self.environment, **(extra or {})}

        def enter() -> None:
            os.chroot(self.path)
            os.chdir(self.folder)
            if self.user:
                os.setgroups(self.groups)
                os.setgid(self.user)
                os.setuid(self.user)

        return subprocess.Popen(list(command), env=inside, preexec_fn=enter, **options)


class Builder:
    """Builds container files into `work`, which must be on another file system, or elsewhere, than the system's folders."""

    def __init__(self, work: Path, context: Path) -> None:
        self._work = work
        self._context = context
        self._count = 0

    def base(self) -> Root:
        """What stands for an official Python image."""
        root = self.on_top_of(Root(Path()))
        python = root.at("/usr/local/bin/python")
        if not python.exists():
            python.symlink_to("python3")
        root.run(
            ["/sbin/ldconfig"]
        ).wait()  # libpython may be a shared library, and another of this machine's a nearer one
        pip = root.at("/usr/local/bin/pip")
        pip.write_text(_PIP)
        pip.chmod(0o755)
        root.environment["PATH"] = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
        return root

    def build(self, stages: Sequence[Stage], bases: Mapping[str, Root], ignore: Path) -> dict[str, Root]:
        """Every stage by its name, built. `bases` stand for the images by name; raises CalledProcessError where a line fails."""
        built: dict[str, Root] = {}
        for stage in stages:
            root = self.on_top_of(built.get(stage.base) or bases[stage.base])
            built[stage.name] = root
            for step in stage.steps:
                print(f"{stage.name}: {step}", flush=True)
                self._do(root, step, built, ignore)
        return built

    def _do(self, root: Root, step: Step, built: Mapping[str, Root], ignore: Path) -> None:
        if isinstance(step, Run):
            with self._mounted(root, step.mounts, built):
                command = ["/bin/sh", "-c", step.command]
                outside = {k: v for k, v in os.environ.items() if k.upper().startswith(_FROM_OUTSIDE)}
                code = root.run(command, outside).wait()
            if code:
                raise subprocess.CalledProcessError(code, command)
        elif isinstance(step, Copy):
            self._copy(root, step, built, ignore)
        elif isinstance(step, Variables):
            for name, value in step.values.items():
                if not (step.may_be_given and not value):  # an ARG without a value is as if it were not there
                    root.environment[name] = Template(value).safe_substitute(root.environment)
        elif step.name == "WORKDIR":
            root.at(step.value).mkdir(parents=True, exist_ok=True)
            root.folder = step.value
        elif step.name == "USER":
            root.user = int(step.value)

    def _copy(self, root: Root, step: Copy, built: Mapping[str, Root], ignore: Path) -> None:
        target = root.at(step.target if step.target.startswith("/") else f"{root.folder}/{step.target}")
        if step.stage is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", "-T", built[step.stage].at(step.sources[0]), target], check=True)
        elif step.sources == (".",):
            for file in context_files(self._context, ignore):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self._context / file, target / file, follow_symlinks=False)
        else:
            for source in step.sources:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self._context / source, target)

    def on_top_of(self, base: Root) -> Root:
        """A new root on top of another: overlays over its system folders, copies of the rest."""
        self._count += 1
        top = self._work / f"layer-{self._count}"
        root = Root(top / "root", (top / "upper", *base.layers), dict(base.environment), base.folder, base.user)
        root.path.mkdir(parents=True)
        if base.layers:
            kept = {Path(folder).parts[1] for folder in _SYSTEM} | {"proc", "dev", "sys"}
            for entry in base.path.iterdir():
                if entry.name not in kept:
                    subprocess.run(["cp", "-a", entry, root.path], check=True)
        for number, (folder, sources) in enumerate(_SYSTEM.items()):
            lower = [*(str(layer / str(number)) for layer in base.layers), *sources]
            upper, work = root.layers[0] / str(number), top / "work" / str(number)
            for path in (upper, work, root.at(folder)):
                path.mkdir(parents=True, exist_ok=True)
            upper.chmod(0o755)
            options = f"lowerdir={':'.join(lower)},upperdir={upper},workdir={work}"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, root.at(folder)], check=True)
        for name in _LINKS:
            if Path("/", name).is_symlink() and not root.at(name).is_symlink():
                root.at(name).symlink_to(os.readlink(Path("/", name)))
        for name in ("proc", "dev", "sys"):
            root.at(name).mkdir(exist_ok=True)
            subprocess.run(["mount", "--rbind", f"/{name}", root.at(name)], check=True)
        for name in ("tmp", "root", "home"):
            root.at(name).mkdir(exist_ok=True)
        root.at("tmp").chmod(0o1777)
        return root

    @staticmethod
    def make_read_only(root: Root) -> None:
        """Nothing can be written to the system's folders any more; the others are root's, but for what is mounted there."""
        for folder in _SYSTEM:
            subprocess.run(["mount", "-o", "remount,ro", root.at(folder)], check=True)

    @staticmethod
    @contextmanager
    def _mounted(root: Root, mounts: Sequence[Mount], built: Mapping[str, Root]) -> Iterator[None]:
        for mount in mounts:
            root.at(mount.target).mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", built[mount.stage].at(mount.source), root.at(mount.target)], check=True)
        yield
        for mount in mounts:
            subprocess.run(["umount", root.at(mount.target)], check=True)
            root.at(mount.target).rmdir()


def entrypoint(stage: Stage) -> list[str]:
    """What a container of the stage starts."""
    found: Setting = stage.setting("ENTRYPOINT")
    return found.words
