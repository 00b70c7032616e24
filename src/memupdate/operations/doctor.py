"""`doctor`: is this machine fit to train and serve, and is the workspace here as it should be?

Invariant: nothing is written, no lock is taken, no model is loaded and no engine is started. The engine itself is looked at from
outside, by `doctor_served`.
"""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from memupdate.errors import ExitCode, LedgerError
from memupdate.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    MATCHER_FILE,
    RegistryLayout,
    WorkspaceLayout,
)
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.lock import lock_holder
from memupdate.operations.findings import DoctorReport, Finding, failed, gather, warned, well
from memupdate.operations.session import Session
from memupdate.serving.compat import check_vllm_version, engine_installed, is_cpu_engine, supported_range
from memupdate.serving.engine import PLUGIN_GROUP, PLUGIN_NAME
from memupdate.serving.engine_record import EngineNote, engine_notes, running_engine
from memupdate.serving.manifest import RELEASED, Manifest, ReleaseEntry, read_manifest
from memupdate.storage import file_sha256

LOW_DISK_BYTES = 2 << 30
"""Below this a training run with its checkpoints, or one more log, may fill the disk."""
FULL_DISK_BYTES = 100 << 20
_BREAKS_PEFT = ("torchvision", "torchaudio", "torchcodec")
_GIB = 1 << 30


def examine(root: Path) -> DoctorReport:
    """This machine, and the workspace at `root` where there is one."""
    root = root.resolve()
    layout = WorkspaceLayout(root)
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("vllm", _vllm),
        ("disk", partial(_disk, root)),
    ]
    if layout.config.exists():
        checks += [
            ("workspace", partial(_workspace, root)),
            ("model", partial(_model, root)),
            ("lock", partial(_lock, layout)),
            ("ledger", partial(_ledger, layout)),
            ("registry", partial(_registry, root, layout)),
            ("access", partial(_access, root, layout)),
            ("engines", partial(_engines, layout)),
        ]
    findings = gather(checks)
    if not layout.config.exists():
        what = f"{root}: no workspace here; only the machine was looked at"
        findings += (Finding("workspace", "ok", what, "memupdate init DIR --model MODEL makes one"),)
    return DoctorReport(str(root), findings)


def _python() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    yield well("python", f"{platform.python_version()}, {system}")


def _packages() -> Iterator[Finding]:
    """Every requirement of the installed memupdate, as its own metadata states it."""
    wrong = []
    needed = [Requirement(text) for text in metadata.requires("memupdate") or ()]
    plain = [req for req in needed if req.marker is None or req.marker.evaluate({"extra": ""})]
    for requirement in plain:
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    if wrong:
        yield failed(
            "packages", "; ".join(wrong), "install memupdate again into this environment, with its requirements"
        )
    else:
        shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
        yield well("packages", f"{len(plain)} requirements met; {shown}")
    foreign = [name for name in _BREAKS_PEFT if _is_cuda_build(name)]
    if is_cpu_engine() and foreign:
        yield warned(
            "packages",
            f"{', '.join(foreign)} may be built for CUDA beside a torch for the CPU: importing peft may fail",
            f"pip uninstall {' '.join(foreign)}",
        )


def _is_cuda_build(name: str) -> bool:
    try:
        return "+cpu" not in metadata.version(name)
    except metadata.PackageNotFoundError:
        return False


def _vllm() -> Iterator[Finding]:
    version, name = check_vllm_version(), engine_installed()
    where = "computes on the CPU" if is_cpu_engine() else "computes on the GPU"
    yield well("vllm", f"{name} {version}, within {supported_range()}; {where}")
    if any(point.name == PLUGIN_NAME for point in metadata.entry_points(group=PLUGIN_GROUP)):
        yield well("vllm", "finds the plug-in of memupdate")
    else:
        yield failed("vllm", "does not find the plug-in of memupdate", "pip install memupdate into this environment")


def _disk(root: Path) -> Iterator[Finding]:
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    what = f"{free / _GIB:.1f} GiB free in {there}"
    if free < FULL_DISK_BYTES:
        yield failed("disk", what, "make room: nothing can be written safely")
    elif free < LOW_DISK_BYTES:
        yield warned("disk", what, "make room; `cache/` and `logs/` of a workspace may be deleted")
    else:
        yield well("disk", what)
    if root.exists() and not os.access(root, os.W_OK):
        yield warned("disk", f"{root} cannot be written to by this user", "this user can only read and serve here")


def _workspace(root: Path) -> Iterator[Finding]:
    session = Session.open(root)
    yield well("workspace", f"{root}: collection {session.config.collection}, model {session.config.model}")
    yield well("policy", f"{session.policy.name}: every value is within its bounds")
    probes = session.config.probes
    if probes and not (root / probes).is_file():
        yield failed(
            "probes", f"{root / probes} is missing", 'restore it from a backup, or set probes = "" in memupdate.toml'
        )


def _model(root: Path) -> Iterator[Finding]:
    session = Session.open(root)
    size = sum(file.stat().st_size for file in session.folder.weight_files)
    yield well("model", f"{session.folder.path}: {size / _GIB:.2f} GiB, fingerprint {session.fingerprint[:19]}…")
    free = _free_memory()
    if free is None:
        return
    needed = 2 * size + (session.policy.serving.kv_cache_gib * _GIB if is_cpu_engine() else 0)
    what = f"{free / _GIB:.1f} GiB free; the model for training and serving takes about {needed / _GIB:.1f}"
    if free < needed:
        yield warned("memory", what, "stop other work, lower serving.kv_cache_gib, or train and serve on two machines")
    else:
        yield well("memory", what)


def _free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _lock(layout: WorkspaceLayout) -> Iterator[Finding]:
    holder = lock_holder(layout.lock)
    # Not a fault: the lock is the kernel's, and free the moment its process is gone.
    yield well("lock", "free" if holder is None else f"held by {holder.describe()}")


def _ledger(layout: WorkspaceLayout) -> Iterator[Finding]:
    steps = Ledger.pending_steps(layout.ledger)
    if steps:
        yield warned("ledger", f"made by an older memupdate; {len(steps)} step(s) to do", "memupdate ledger migrate")
    problems = _quick_check(layout.ledger)
    if problems:
        yield failed("ledger", f"damaged: {'; '.join(problems[:3])}", "memupdate ledger restore BACKUP --to DIR")
        return
    if steps:
        return
    with Ledger.open(layout.ledger, readonly=True) as ledger, ledger.snapshot():
        links, waiting = ledger.chain_head().number, len(ledger.batches(unfinished=True))
        chain = ledger.verify_chain()
    if chain:
        yield failed("ledger", f"{len(chain)} problem(s): {chain[0]}", "memupdate ledger verify says which")
    else:
        yield well(
            "ledger", f"sound; {links} links, each by its hash (`memupdate ledger verify` looks at all the rest)"
        )
    if waiting:
        yield warned("ledger", f"{waiting} unfinished batch(es)", "memupdate resume, or memupdate publish RELEASE")


def _quick_check(path: Path) -> list[str]:
    """What SQLite itself finds wrong with the file. Raises LedgerError."""
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            rows = [str(row[0]) for row in connection.execute("PRAGMA quick_check(10)")]
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise LedgerError(f"{path}: cannot be read ({error})", "memupdate ledger restore BACKUP --to DIR") from error
    return [] if rows == ["ok"] else rows


def _registry(root: Path, layout: WorkspaceLayout) -> Iterator[Finding]:
    registry = layout.registry
    if not registry.manifest.exists():
        yield well("registry", "nothing is released yet")
        return
    manifest = read_manifest(registry.manifest)
    live = {name: entry for name, entry in manifest.releases.items() if entry.state == RELEASED}
    wrong = [problem for name, entry in live.items() for problem in _release_problems(registry, name, entry)]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        yield failed("registry", wrong[0] + more, "restore the registry from a backup: memupdate ledger restore")
    else:
        yield well("registry", f"{len(live)} release(s), every file by its digest; generation {manifest.generation}")
    yield from _against_ledger(layout, manifest)
    if manifest.base_fingerprint != Session.open(root).fingerprint:
        yield failed(
            "registry",
            f"made for base model {manifest.base_fingerprint[:19]}…, which is not the one here",
            "point `model` in memupdate.toml at the model that the releases were trained on",
            exit_code=ExitCode.UNREACHABLE,
        )


def _release_problems(registry: RegistryLayout, name: str, entry: ReleaseEntry) -> Iterator[str]:
    expected = {ADAPTER_WEIGHTS_FILE: entry.digest, ADAPTER_CONFIG_FILE: entry.config_digest}
    if entry.matcher_digest is not None:
        expected[MATCHER_FILE] = entry.matcher_digest
    for file, digest in expected.items():
        path = registry.release(name) / file
        if not path.is_file():
            yield f"{name}: {file} is missing"
        elif file_sha256(path) != digest:
            yield f"{name}: {file} differs from its digest"


def _against_ledger(layout: WorkspaceLayout, manifest: Manifest) -> Iterator[Finding]:
    with Ledger.open(layout.ledger, readonly=True) as ledger:
        known = {release.name: release.digest for release in ledger.releases(failed=False)}
    absent = sorted(set(known) - set(manifest.releases))
    if absent:
        yield warned("registry", f"{', '.join(absent)}: not in the manifest", "the next command that writes adds it")
    foreign = sorted(name for name, entry in manifest.releases.items() if known.get(name, entry.digest) != entry.digest)
    if foreign:
        yield failed("registry", f"{', '.join(foreign)}: not the adapter that the ledger tells of", "restore a backup")


def _access(root: Path, layout: WorkspaceLayout) -> Iterator[Finding]:
    keys, there = len(Session.open(root).policy.access.keys), layout.registry.access.exists()
    if keys and not there:
        yield warned(
            "access",
            f"{keys} key(s) in the policy are not in force yet",
            "memupdate serve, or any publish, writes access.json",
        )
    elif there and not keys:
        yield warned(
            "access",
            "access.json binds keys, the policy has none",
            f"put the keys into the policy, or delete {layout.registry.access} to open the engine to everybody",
        )
    elif keys:
        yield well("access", f"{keys} key(s) are bound to collections")
    else:
        yield well("access", "no keys are bound: whoever reaches an engine may ask it anything")


def _engines(layout: WorkspaceLayout) -> Iterator[Finding]:
    notes = engine_notes(layout.engine)
    if not notes:
        yield well("engines", "none of this workspace is running")
    for note in notes:
        yield from _engine(note)


def _engine(note: EngineNote) -> Iterator[Finding]:
    area = "engine" if note.number == 1 else f"engine {note.number}"
    if not note.is_engine_alive and note.is_supervisor_alive:
        yield warned(
            area, f"{note.state} ({note.last_failure or 'not yet answering'})", "wait; `memupdate serve` is at it"
        )
        return
    if not note.is_engine_alive:
        yield warned(
            area, f"{note.path.name} tells of an engine that is gone", f"rm {note.path}, or start `memupdate serve`"
        )
        return
    running = running_engine(note.path)
    if running is None:
        yield failed(
            area,
            f"process {note.pid} lives but does not answer",
            "look at its log, or stop it",
            exit_code=ExitCode.UNREACHABLE,
        )
        return
    yield well(area, f"{running.url}, process {running.pid}; look at it with `memupdate doctor --served {running.url}`")
    if running.restarts:
        yield warned(
            area, f"was started again {running.restarts} time(s): {running.last_failure}", f"see {running.log_path}"
        )
    yield from _logits_wrapped(area, note.pid)


def _logits_wrapped(area: str, pid: int) -> Iterator[Finding]:
    """LoRA on the logits lets one request with `prompt_logprobs` end a CPU engine, which cannot be tried without ending it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return
    if "--enable-lora" in words and ("--lora-target-modules" not in words or "lm_head" in words):
        yield failed(
            area,
            "LoRA is on for lm_head: one request for prompt log-probabilities can end it",
            "start it with `--lora-target-modules`, without lm_head: see `memupdate serve --print-command`",
            exit_code=ExitCode.UNREACHABLE,
        )
