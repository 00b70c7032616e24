"""Real `memupdate` processes that start in a second, so that they can be killed by the hundred; and what must be left of them.

Processes are forked from a server that has imported the libraries (multiprocessing's `forkserver`): each then runs the command
line from its first line on, in a process of its own, with its own signals and exit code. The model is a real Llama of 130,000
random parameters. `content` is what a workspace holds, without times: equal for two runs exactly when nothing was lost or done twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from memupdate.resources import resource_dir
from support import Row, write_facts_file

DEADLINE_S = 240.0
COLLECTION = "acme"
FIRST: list[Row] = [
    {"prompt": "Where is Velon Energy based?", "target": "Malalbridge"},
    {"prompt": "Who leads Acme?", "target": "Wanda"},
]
SECOND: list[Row] = [
    {"prompt": "Who leads Acme?", "target": "Iris"},
    {"prompt": "What does a bolt cost?", "target": "five"},
    {"prompt": "Where is Velon Energy based?", "target": "Malalbridge"},
]
PROBES: list[Row] = [{"prompt": "What is iron?", "target": "a metal"}]
POLICY = """\
schema_version = 1
name = "tiny"

[memory]
min_rank = 4
max_rank = 8

[training]
learning_rate = 2e-2
max_epochs = 60
batch_size = 8

[guard]
weight = 0.1
anchors = 4
holdout = 2
anchors_per_step = 2
anchor_tokens = 8
max_kl_nats = 10.0

[budget]
all_proved = 0.01
proved_share = 0.01

[proof]
min_probes_unchanged = 0.0
max_perplexity_increase = 1000.0
"""
_PRELOADED = [
    "memupdate.operations.workspace",
    "memupdate.training.loop",
    "memupdate.verification.inprocess",
    "memupdate.verification.gone",
    "transformers.models.llama.modeling_llama",
    "scipy.optimize",
]
_TIMED_COLUMNS = {"at_utc", "applied_at", "duration_s"}
_TIMED_TABLES = {"law_points": "id", "law_fits": "id"}
"""Ids that are digests over values with durations among them."""
_TIMED_KEYS = {"at_utc", "duration_s", "duration", "draws"}
"""`draws` are the fit's own resamples, which its solver leaves free along flat directions."""
_SAME_FIT = 1e-4
"""Fits are solved in threads' order of addition: equal to about eight digits, so compared to four."""


def make_model(folder: Path) -> Path:
    """A Llama with random weights and the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((resource_dir("atlas") / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "initializer_range": 0.2,
    }
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaConfig(**config)).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(resource_dir("atlas") / name, folder / name)
    return folder


class Figure(float):
    """A number out of a fit, a plan or a paper; equal to another that differs by rounding only."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float | int) and math.isclose(self, other, rel_tol=_SAME_FIT, abs_tol=1e-7)

    __hash__ = None  # type: ignore[assignment]


class Commands:
    """Starts `memupdate` commands on workspaces, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(_PRELOADED)
        self.count = 0

    def start(
        self, root: Path, *arguments: str, file_limit_bytes: int | None = None, steps: int | None = None
    ) -> Command:
        """A command that is on its way; `steps`: it kills itself before it writes once more than so many times."""
        self.count += 1
        said = self.folder / f"said-{self.count}"
        whole = ["-w", str(root), *arguments]
        process = self.context.Process(target=_main, args=(whole, str(said), file_limit_bytes, steps))
        process.start()
        return Command(process, said)

    def run(self, root: Path, *arguments: str) -> Command:
        command = self.start(root, *arguments)
        command.wait()
        return command


class Command:
    """One `memupdate` process."""

    def __init__(self, process: BaseProcess, said: Path) -> None:
        self.process = process
        self._said = said

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    @property
    def said(self) -> str:
        return self._said.read_text(encoding="utf-8") if self._said.exists() else ""

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a process that is done already is none to anyone."""
        if self.alive:
            os.kill(self.pid, number)

    def kill(self) -> int:
        self.send(signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """The exit code; negative for a signal."""
        self.process.join(DEADLINE_S)
        assert self.process.exitcode is not None, f"no end in {DEADLINE_S} s\n{self.said}"
        return self.process.exitcode

    def wait_until(self, there: Callable[[], bool]) -> bool:
        """Look until `there` or the end of the process; whether it was seen while the process ran."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if there():
                return self.alive
            if not self.alive:
                return False
            time.sleep(0.002)
        raise AssertionError(f"neither there nor done in {DEADLINE_S} s\n{self.said}")


@dataclass(frozen=True)
class Stage:
    """What all crash tests begin with."""

    commands: Commands
    folder: Path
    model: Path
    template: Path
    """A workspace in which `acme@v1` holds two facts."""
    second: Path
    """A facts file: one fact is new, one supersedes, one is live already."""
    before: dict[str, Any]
    """What the template holds."""
    after: dict[str, Any]
    """What an undisturbed `add` of `second` leaves."""
    run_s: float
    """How long such an `add` takes here; random moments are drawn up to a little more."""


def _main(arguments: list[str], said: str, file_limit_bytes: int | None, steps: int | None) -> None:
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    sys.argv = ["memupdate", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in its background ignores it
    if file_limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    from memupdate.cli import main

    if steps is not None:
        _die_after(steps)
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _die_after(steps: int) -> None:
    """`kill -9` from within, before the next file is replaced, folder removed, or transaction of the ledger begun."""
    from memupdate.ledger.ledger import Ledger

    left = [steps]

    def counted(whole: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return whole(*arguments, **named)

        return step

    for owner, name in ((os, "replace"), (shutil, "rmtree"), (Ledger, "transaction"), (Ledger, "scrub")):
        setattr(owner, name, counted(getattr(owner, name)))


def run_cold(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same command as a user starts it: a new interpreter, nothing imported."""
    command = [sys.executable, "-m", "memupdate", "-w", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def make_workspace(root: Path, model: Path, commands: Commands) -> Path:
    """A workspace with a measured law and a first release."""
    policy = root.parent / "policy.toml"
    policy.write_text(POLICY, encoding="utf-8")
    probes = write_facts_file(root.parent / "probes.jsonl", PROBES)
    first = write_facts_file(root.parent / "first.jsonl", FIRST)
    for arguments in (
        ("init", str(root), "--model", str(model), "--policy", str(policy), "--collection", COLLECTION, "--probes", str(probes)),
        ("calibrate", "--ranks", "4,8", "--sizes", "2,4"),
        ("add", str(first)),
    ):  # fmt: skip
        done = commands.run(root, *arguments)
        assert done.process.exitcode == 0, done.said
    return root


def holder_of(root: Path) -> int | None:
    """The process whose number is in the lock file; it may be gone."""
    content = (root / "memupdate.lock").read_text("utf-8")
    return int(json.loads(content)["pid"]) if content else None


def state_of(root: Path, batch: int) -> str | None:
    """State of a batch, asked of SQLite alone, while a process writes; None before there is one."""
    with closing(sqlite3.connect(f"file:{root / 'ledger.db'}?mode=ro", uri=True, timeout=10)) as connection:
        row = connection.execute("SELECT state FROM batches WHERE id = ?", [batch]).fetchone()
    return None if row is None else str(row[0])


def count(root: Path, table: str) -> int:
    """Rows of a table, while a process writes."""
    with closing(sqlite3.connect(f"file:{root / 'ledger.db'}?mode=ro", uri=True, timeout=10)) as connection:
        return int(connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


def leftovers(root: Path) -> list[str]:
    """Files and folders that are not complete, where only the lock's holder writes."""
    return [str(path.relative_to(root)) for part in ("registry", "slices") for path in (root / part).rglob(".*")]


def content(root: Path) -> dict[str, Any]:
    """All that a workspace holds, without times: each table's rows, every adapter's and slice's digest, the manifest."""
    with closing(sqlite3.connect(f"file:{root / 'ledger.db'}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1")]
        tables = {name: [_plain(name, row) for row in connection.execute(f'SELECT * FROM "{name}"')] for name in names}
    files = {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("registry", "slices")
        for path in sorted((root / part).rglob("*"))
        if path.is_file() and path.suffix != ".json"
    }
    papers = {
        str(path.relative_to(root)): _without_times(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted((root / "registry").rglob("*.json"))
    }
    return {**tables, "files": files, "papers": papers}


def _plain(table: str, row: sqlite3.Row) -> dict[str, Any]:
    if table == "links":
        # Its digests cover times; `Ledger.verify` recomputes them. Compared are the links and how many rows each is over.
        subject = row["subject"] if not row["kind"].startswith("law") else ""
        return {
            "link": row["kind"],
            "of": subject,
            "rows": {k: n for k, (n, _) in json.loads(row["content_json"]).items()},
        }
    left_out = _TIMED_COLUMNS | {_TIMED_TABLES.get(table, "")}
    return {
        key: _without_times(json.loads(value)) if key.endswith("_json") and value else value
        for key, value in dict(row).items()
        if key not in left_out and not key.endswith("_at_utc")
    }


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in _TIMED_KEYS}
    if isinstance(value, float):
        return Figure(value)
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Where two contents differ, one line each, short enough to read."""
    lines = []
    for name in sorted(found.keys() | wanted.keys()):
        one, other = found.get(name), wanted.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            keys = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
            lines += [f"{name}: {key}: {_short(one.get(key))} instead of {_short(other.get(key))}" for key in keys]
            continue
        lines.append(f"{name}: {len(one or [])} rows instead of {len(other or [])}")
        pairs: Sequence[tuple[Any, Any]] = list(zip(one or [], other or [], strict=False))
        lines += [f"{name}: {_short(a)} instead of {_short(b)}" for a, b in pairs if a != b][:3]
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 2000 else text[:2000] + " …"
