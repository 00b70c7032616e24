"""Why an engine ended, from what vLLM wrote to its log. Reads only; knows vLLM's way of logging and nothing else of it."""

from __future__ import annotations

import re
from pathlib import Path

_LOG_TAIL_BYTES = 256 << 10
_ERROR_LINE = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception|Interrupt)\b(?::| \[)|\berror: |\bNo module named\b")
_LOG_PREFIX = re.compile(r"^\(\w+(?: pid=\d+)?\)\s*|^(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\]\s*")
_WARNING = re.compile(r"^(?:\(\w+(?: pid=\d+)?\)\s*)?WARNING ")
"""A warning may name an error that did not happen, as that about the limit of open files does."""
_CONSEQUENCES = (
    "Engine core initialization failed",
    "EngineDeadError",
    "SystemExit",
    "CancelledError",
    "WorkerProc initialization",
)


def failure_reason(log_path: Path) -> tuple[str, tuple[str, ...]]:
    """The most telling error line of an engine's log (empty where there is none), and its last lines."""
    try:
        with log_path.open("rb") as file:
            file.seek(max(0, log_path.stat().st_size - _LOG_TAIL_BYTES))
            raw = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return "", ()
    told = [(line, _WARNING.match(line) is not None) for line in raw]
    kept = [(shown, mild) for line, mild in told if (shown := _without_prefix(line)).strip(" ^~")]
    said = [line for line, _ in kept]
    errors = [
        at
        for at, (line, mild) in enumerate(kept)
        if not mild and _ERROR_LINE.search(line) and not line.startswith((" ", "\t"))
    ]
    causes = [at for at in errors if not any(known in said[at] for known in _CONSEQUENCES)]
    chosen = (causes or errors)[-1:]
    reason = " ".join(_with_continuation(said, at) for at in chosen)
    return reason[:500], tuple(line[:300] for line in said[-8:])


def _with_continuation(lines: list[str], at: int) -> str:
    """An error line and the indented lines after it, where a pydantic error has its substance."""
    parts = [lines[at].strip()]
    for line in lines[at + 1 : at + 4]:
        if not line.startswith(" ") or line.lstrip().startswith(("File ", "For further information")):
            break
        parts.append(line.strip().split(" [type=", 1)[0])
    return " ".join(parts)


def _without_prefix(line: str) -> str:
    """A log line without vLLM's process, level, time and place."""
    while (shorter := _LOG_PREFIX.sub("", line, count=1)) != line:
        line = shorter
    return line.rstrip()
