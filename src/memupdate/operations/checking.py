"""Is everything as it was written? The ledger's own hashes, then the files that it names against their digests. Torch-free.

Invariant: nothing is written, and a finding never hides another one. Proving facts anew is not done here: see `verify`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memupdate.errors import ExitCode, LedgerError
from memupdate.layout import ADAPTER_WEIGHTS_FILE, SLICE_WEIGHTS_FILE, WorkspaceLayout
from memupdate.ledger.checking import FileDigest
from memupdate.ledger.database import PendingStep
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.lock import workspace_lock
from memupdate.operations.reports import Report
from memupdate.storage import file_sha256


@dataclass(frozen=True)
class CheckReport(Report):
    """What was found."""

    intact: bool
    problems: tuple[str, ...]
    links: int
    """Links of the chain."""
    head: str
    """Hash of the newest link; noted elsewhere, it shows later that nothing before it was written anew."""
    files: int
    """Adapter and slice files compared with their digests."""

    @property
    def exit_code(self) -> ExitCode:
        """3 where something is wrong."""
        return ExitCode.OK if self.intact else ExitCode.PROOF_FAILED


@dataclass(frozen=True)
class MigrationReport(Report):
    """Steps that a ledger lacks, or lacked."""

    applied: bool
    steps: tuple[PendingStep, ...]


def check(layout: WorkspaceLayout, *, noted_head: str | None = None) -> CheckReport:
    """Recompute every hash of the ledger and every digest of a file that it names.

    Args:
        noted_head: hash of a link that was noted before; it must be in the chain still.

    Raises:
        LedgerError: the ledger cannot be opened.
    """
    with Ledger.open(layout.ledger, readonly=True) as ledger:
        problems = ledger.verify()
        if noted_head is not None and not ledger.has_link(noted_head):
            problems.append(f"links: no link has the hash {noted_head}: the chain was written anew or cut")
        files, head = ledger.file_digests(), ledger.chain_head()
    problems += [problem for file in files for problem in _file_problems(layout.root, file)]
    return CheckReport(not problems, tuple(problems), head.number, head.hash, len(files))


def migrate(layout: WorkspaceLayout, *, preview: bool = False) -> MigrationReport:
    """Bring the ledger's schema up to date, each step in a transaction of its own; with `preview`, only say how.

    Raises:
        LedgerError: no ledger, or one of a newer memupdate.
        WorkspaceLocked: another process is writing.
    """
    steps = tuple(Ledger.pending_steps(layout.ledger))
    if steps and not preview:
        with workspace_lock(layout.lock, "memupdate ledger migrate"):
            Ledger.open(layout.ledger).close()
    return MigrationReport(not preview, steps)


def _file_problems(root: Path, file: FileDigest) -> list[str]:
    weights = ADAPTER_WEIGHTS_FILE if file.name.startswith("release ") else SLICE_WEIGHTS_FILE
    path = root / file.relative_path / weights
    try:
        found = file_sha256(path)
    except FileNotFoundError:
        return [f"{file.name}: {file.relative_path}/{weights} is missing"]
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read ({error.strerror})", "check its permissions") from error
    return [] if found == file.digest else [f"{file.name}: {file.relative_path}/{weights} differs from its digest"]
