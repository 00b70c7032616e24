"""The workspace's own file, `memupdate.toml`: which model, policy, collection and probes. Small on purpose: all else is policy."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memupdate.errors import UsageError
from memupdate.layout import COLLECTION_PATTERN, WORKSPACE_FILE
from memupdate.storage import write_text_atomic

POLICY_FILE = "policy.toml"


class WorkspaceConfig(BaseModel):
    """What `memupdate init` wrote down."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: int = Field(ge=1, le=1)
    model: str = Field(min_length=1)
    """A folder, a hub repository, or `atlas` for the embedded model."""
    policy: str = POLICY_FILE
    """A file in the workspace, or the name of a shipped policy."""
    collection: str = Field(pattern=rf"^{COLLECTION_PATTERN.pattern}$")
    """The line of releases that `add` writes to, and the alias that clients ask for."""
    probes: str = ""
    """A facts file whose prompts must go on being answered as before; relative to the workspace."""


def load_config(root: Path) -> WorkspaceConfig:
    """Read `memupdate.toml`.

    Raises:
        UsageError: there is no workspace at `root`, or its file is broken.
    """
    file = root / WORKSPACE_FILE
    try:
        return WorkspaceConfig.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"{root}: not a memupdate workspace", "make one with `memupdate init DIR --model MODEL`"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file}: cannot be read ({error})", "mend the file, or restore it from a backup") from error
    except ValidationError as error:
        details = [
            f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']} (received {e['input']!r})" for e in error.errors()
        ]
        raise UsageError(f"{file}: {len(details)} bad value(s)", "mend the lines named", details) from error


def write_config(root: Path, config: WorkspaceConfig) -> None:
    """Write `memupdate.toml` with a word on every key."""
    text = f"""\
# A memupdate workspace. What can be tuned is in the policy.
schema_version = {config.schema_version}
model = {_quoted(config.model)}           # a folder, a hub repository, or "atlas" (embedded)
policy = {_quoted(config.policy)}         # a file here, or the name of a shipped policy
collection = {_quoted(config.collection)} # releases are NAME@v1, NAME@v2, …; clients ask for NAME
probes = {_quoted(config.probes)}         # facts that must go on being answered as before; "" for none
"""
    write_text_atomic(root / WORKSPACE_FILE, text)


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = "".join({"\\": "\\\\", '"': '\\"'}.get(c, c) if c >= " " else f"\\u{ord(c):04x}" for c in text)
    return f'"{escaped}"'
