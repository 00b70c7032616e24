"""What `doctor` found: each finding says what is, whether it is well, and how to mend it.

Invariant: no check hides another one: whatever a check raises as a `MemupdateError` becomes a finding of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from memupdate.errors import ExitCode, MemupdateError
from memupdate.operations.reports import Report

Health = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding(Report):
    """One thing that was looked at."""

    area: str
    """One or two words: `ledger`, `admin routes`."""
    status: Health
    what: str
    """One line."""
    mend: str = ""
    """One line; empty where there is nothing to mend."""
    exit_code: ExitCode = ExitCode.BAD_INPUT
    """What `doctor` exits with where this fails."""


@dataclass(frozen=True)
class DoctorReport(Report):
    """All findings, in the order in which they were made."""

    target: str
    """What was looked at: a folder or a URL."""
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> ExitCode:
        """0 where nothing failed; 6 where an engine or model cannot be used, else 2."""
        failed = {finding.exit_code for finding in self.findings if finding.status == "fail"}
        return max(failed, default=ExitCode.OK)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `failed` and `warned` are numbers of findings."""
        return {
            "target": self.target,
            "failed": sum(finding.status == "fail" for finding in self.findings),
            "warned": sum(finding.status == "warn" for finding in self.findings),
            "findings": [
                {"area": found.area, "status": found.status, "what": found.what, "mend": found.mend}
                for found in self.findings
            ],
        }


def gather(checks: Iterable[tuple[str, Callable[[], Iterable[Finding]]]]) -> tuple[Finding, ...]:
    """Run every check, (area, function); one that raises a MemupdateError or OSError is a failed finding."""
    found: list[Finding] = []
    for area, check in checks:
        try:
            found += check()
        except MemupdateError as error:
            details = f" ({'; '.join(error.details[:3])})" if error.details else ""
            found.append(failed(area, error.message + details, error.hint, exit_code=_doctor_code(error)))
        except OSError as error:
            found.append(failed(area, f"cannot be read ({error})", "check its permissions and the disk"))
    return tuple(found)


def well(area: str, what: str) -> Finding:
    """Nothing to mend."""
    return Finding(area, "ok", what)


def warned(area: str, what: str, mend: str) -> Finding:
    """Works, but not as it should."""
    return Finding(area, "warn", what, mend)


def failed(area: str, what: str, mend: str, *, exit_code: ExitCode = ExitCode.BAD_INPUT) -> Finding:
    """Something will not work, or is not safe."""
    return Finding(area, "fail", what, mend, exit_code)


def _doctor_code(error: MemupdateError) -> ExitCode:
    return ExitCode.UNREACHABLE if error.exit_code == ExitCode.UNREACHABLE else ExitCode.BAD_INPUT
