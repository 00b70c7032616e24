"""Container files as data: their stages and what each does, in order.

Invariant: what is not understood is refused, so that no check is passed because a line was skipped. Understood is what ours use.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from string import Template

_FLAG = re.compile(r"--([a-z]+)=(\S+)\s+")


@dataclass(frozen=True)
class Mount:
    """A folder of another stage that one RUN sees."""

    stage: str
    source: str
    target: str


@dataclass(frozen=True)
class Run:
    """A line for the shell."""

    command: str
    mounts: tuple[Mount, ...] = ()


@dataclass(frozen=True)
class Copy:
    """Files from the context, or from another stage."""

    sources: tuple[str, ...]
    target: str
    stage: str | None = None


@dataclass(frozen=True)
class Variables:
    """ENV, or ARG where a build may say otherwise; values may name earlier variables."""

    values: dict[str, str]
    may_be_given: bool = False


@dataclass(frozen=True)
class Setting:
    """WORKDIR, USER, EXPOSE or ENTRYPOINT."""

    name: str
    value: str

    @property
    def words(self) -> list[str]:
        """Of the JSON form."""
        found: list[str] = json.loads(self.value)
        return found


Step = Run | Copy | Variables | Setting


@dataclass(frozen=True)
class Stage:
    """From one FROM to the next."""

    base: str
    """An image, with its variables filled in, or an earlier stage."""
    name: str
    steps: list[Step] = field(default_factory=list)

    def setting(self, name: str) -> Setting:
        """The last one of that name."""
        return [step for step in self.steps if isinstance(step, Setting) and step.name == name][-1]


def read_stages(file: Path) -> list[Stage]:
    """All stages of a container file. Raises ValueError for what is not understood."""
    stages: list[Stage] = []
    before: dict[str, str] = {}
    for keyword, rest in _instructions(file.read_text("utf-8")):
        if keyword == "FROM":
            image, _, name = Template(rest).substitute(before).partition(" AS ")
            stages.append(Stage(image, name or str(len(stages))))
        elif stages:
            stages[-1].steps.append(_step(keyword, rest))
        elif keyword == "ARG":
            before |= _variables(rest)
        else:
            raise ValueError(f"{file.name}: {keyword} before the first FROM")
    return stages


def context_files(root: Path, ignore: Path) -> Iterator[Path]:
    """What a build would be sent of a folder: paths relative to it, without those that a `.dockerignore` names."""
    patterns = [line for line in ignore.read_text("utf-8").splitlines() if line]

    def is_ignored(path: Path) -> bool:
        return any(
            fnmatch(path.name if pattern.startswith("**/") else str(path), pattern.removeprefix("**/"))
            for pattern in patterns
        )

    def walk(folder: Path) -> Iterator[Path]:
        for entry in sorted(folder.iterdir()):
            relative = entry.relative_to(root)
            if is_ignored(relative):
                continue
            if entry.is_dir() and not entry.is_symlink():
                yield from walk(entry)
            else:
                yield relative

    return walk(root)


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        keyword, _, rest = line.partition(" ")
        yield keyword, rest.strip()


def _step(keyword: str, rest: str) -> Step:
    flags, rest = _flags(rest)
    if keyword == "RUN":
        return Run(rest, tuple(_mount(value) for name, value in flags if name == "mount"))
    if keyword == "COPY":
        *sources, target = rest.split()
        return Copy(tuple(sources), target, dict(flags).get("from"))
    if flags:
        raise ValueError(f"{keyword} with flags")
    if keyword in ("ENV", "ARG"):
        return Variables(_variables(rest), keyword == "ARG")
    if keyword in ("WORKDIR", "USER", "EXPOSE", "ENTRYPOINT"):
        return Setting(keyword, rest)
    raise ValueError(f"{keyword} is not understood")


def _flags(rest: str) -> tuple[list[tuple[str, str]], str]:
    flags = []
    while found := _FLAG.match(rest):
        flags.append((found[1], found[2]))
        rest = rest[found.end() :]
    return flags, rest


def _mount(value: str) -> Mount:
    given = dict(part.split("=", 1) for part in value.split(","))
    if given.pop("type") != "bind" or set(given) != {"from", "source", "target"}:
        raise ValueError(f"the mount {value} is not understood")
    return Mount(given["from"], given["source"], given["target"])


def _variables(rest: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(rest))
