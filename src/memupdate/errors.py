"""The errors that a user can cause, each with one clear line, a hint and the exit code of the design.

Invariant: whatever the CLI prints without a traceback is a `MemupdateError`; anything else is a bug of ours and surfaces whole.
This module knows nothing about how errors are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes, the same for every command."""

    OK = 0
    INTERNAL = 1
    BAD_INPUT = 2
    PROOF_FAILED = 3
    OVER_BUDGET = 4
    LOCKED = 5
    UNREACHABLE = 6


class MemupdateError(Exception):
    """Base of all errors that a user can cause.

    Args:
        message: one line: what is wrong and where (file and line where there is one).
        hint: one line: how to mend it; may be empty.
        details: further lines, for example one per bad line of a file.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, message: str, hint: str = "", details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = tuple(details)
        self.report: object | None = None
        """What is worth showing nonetheless, before the error: a report of the operation."""


class UsageError(MemupdateError):
    """Bad arguments, a missing workspace, or a machine that cannot do what was asked (disk full, port in use)."""

    exit_code = ExitCode.BAD_INPUT


class FactsError(MemupdateError):
    """A facts file that cannot be taken; `details` carries one line per problem: file, line, field and reason."""

    exit_code = ExitCode.BAD_INPUT


class PolicyError(MemupdateError):
    """A policy file with unknown keys or values out of range; `details` carries one line per problem."""

    exit_code = ExitCode.BAD_INPUT


class LedgerError(MemupdateError):
    """The ledger cannot be read or written, or is newer than this tool."""

    exit_code = ExitCode.BAD_INPUT


class WorkspaceLocked(MemupdateError):
    """Another process writes to this workspace; the message names it."""

    exit_code = ExitCode.LOCKED


class AliasMoved(WorkspaceLocked):
    """Another command has moved the alias since this one looked at it; nothing was changed."""


class OverBudget(MemupdateError):
    """No rank within the policy's bounds holds the facts at the stated harm."""

    exit_code = ExitCode.OVER_BUDGET


class ProofFailed(MemupdateError):
    """A proof failed; `details` names each failing fact and the token at fault."""

    exit_code = ExitCode.PROOF_FAILED


class TrainingError(MemupdateError):
    """Training diverged or could not run."""

    exit_code = ExitCode.INTERNAL


class ModelError(MemupdateError):
    """The base model cannot be found, read or used."""

    exit_code = ExitCode.UNREACHABLE


class EngineError(MemupdateError):
    """The serving engine cannot be reached, did not start, or refused a release."""

    exit_code = ExitCode.UNREACHABLE
