"""Finds, reads and checks policy files.

Invariant: a file's problems are reported all together, each with file, dotted key, value received and values allowed.
Nothing here knows what a value does.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from memupdate.errors import PolicyError
from memupdate.policies.allowed import allowed_values, field_at
from memupdate.policies.model import SCHEMA_VERSION, Origin, Policy
from memupdate.resources import resource_dir

_MAX_FILE_BYTES = 1 << 20
"""A policy is a page of text; anything larger is some other file."""
OF_A_BATCH = ("budget", "escalation", "proof")
"""Sections that one batch may have of its own: what the memory is and how it is trained stays the workspace's, so that its law holds."""
_SHIPPED_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def shipped_policies() -> list[str]:
    """Names of the policies that come with the package, sorted."""
    return sorted(path.stem for path in resource_dir("policies").glob("*.toml"))


def load_policy(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Policy:
    """Read a policy: a shipped one by its name (`standard`), any other by its path.

    Args:
        overrides: dotted key → value (`{"proof.publish": "proved"}`), from flags; checked like the file's own values.

    Raises:
        PolicyError: no such policy, unreadable, not TOML, or with problems; `details` has one line for each.
    """
    path = policy_path(name_or_path)
    return parse_policy(_read(path), where=str(path), overrides=overrides)


def load_batch_values(name_or_path: str | Path) -> dict[str, Any]:
    """What a policy states, as overrides of a workspace's policy for one batch: dotted key → value.

    Raises:
        PolicyError: see `load_policy`; or it states what a batch cannot have of its own, each with a line in `details`.
    """
    policy = load_policy(name_or_path)
    values = policy.values()
    stated = [key.split(".") for key in policy.origins if "." in key]
    alien = [f"{section}.{name}" for section, name in stated if section not in OF_A_BATCH]
    if alien:
        sections = ", ".join(f"[{name}]" for name in OF_A_BATCH)
        raise PolicyError(
            f"{name_or_path}: sets {alien[0]}, which is the workspace's to decide, not one batch's",
            f"give a policy that sets nothing but {sections}, such as hotfix; or edit the workspace's policy.toml",
            [f"{key}: not in {sections}" for key in alien],
        )
    return {f"{section}.{name}": values[section][name] for section, name in stated}


def parse_policy(text: str, *, where: str = "policy", overrides: Mapping[str, Any] | None = None) -> Policy:
    """Check the TOML `text` of a policy. `where` names it in messages. Raises PolicyError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(
            f"{where}: not TOML: {error}", "text needs quotes, lists need brackets, and each key comes once"
        ) from error
    origins: dict[str, Origin] = dict.fromkeys(_dotted_keys(data), "policy")
    for key, value in (overrides or {}).items():
        _set_dotted(data, key, value, where)
        origins[key] = "flag"
    return _check(data, origins, where)


def parse_resolved_policy(text: str, *, where: str = "stored policy") -> Policy:
    """The inverse of `Policy.resolved_json`. Raises PolicyError, also for a policy of a newer schema."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise PolicyError(f"{where}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise PolicyError(f"{where}: not a JSON object")
    origins = data.pop("origins", {})
    return _check(data, cast("dict[str, Origin]", origins), where)


def policy_path(name_or_path: str | Path) -> Path:
    """Where `load_policy` would read from: a shipped policy's file by name, else the path given. Raises PolicyError."""
    text = str(name_or_path)
    if isinstance(name_or_path, str) and _SHIPPED_NAME.fullmatch(text):
        shipped = resource_dir("policies") / f"{text}.toml"
        if shipped.is_file():
            return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    names = shipped_policies()
    near = difflib.get_close_matches(text, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    reason = "is a folder, not a policy file" if path.is_dir() else "no such policy"
    raise PolicyError(f"{text}: {reason}", f"{hint}shipped: {', '.join(names)}; or give the path of a TOML file")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror})", "check the file's permissions") from error
    if len(raw) > _MAX_FILE_BYTES:
        raise PolicyError(
            f"{path}: larger than {_MAX_FILE_BYTES} bytes, so not a policy", "give the path of a policy file"
        )
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: not UTF-8 at byte {error.start}", "save the file as UTF-8") from error


def _check(data: dict[str, Any], origins: dict[str, Origin], where: str) -> Policy:
    version = data.get("schema_version")
    if isinstance(version, bool):
        data = {**data, "schema_version": str(version).lower()}  # Python takes true for 1; the schema does not
    if type(version) is int and version > SCHEMA_VERSION:
        raise PolicyError(
            f"{where}: schema_version {version} is newer than this memupdate reads ({SCHEMA_VERSION})",
            "upgrade memupdate, or use a policy of the older schema",
        )
    try:
        policy = Policy.model_validate(data)
    except ValidationError as error:
        details = list(dict.fromkeys(_problem_line(problem, where) for problem in error.errors(include_url=False)))
        count = "1 problem" if len(details) == 1 else f"{len(details)} problems"
        raise PolicyError(f"{where}: {count} in the policy", "correct the values listed", details) from error
    # Frozen for everyone else; the loader is what fills this in, before anybody has seen the policy.
    policy._origins.update(origins)
    return policy


def _problem_line(problem: ErrorDetails, where: str) -> str:
    location = problem["loc"]
    key = ".".join(str(part) for part in location)
    owner, field = field_at(Policy, location)
    if problem["type"] == "extra_forbidden":
        return f"{where}: {key}: unknown key; {_known_keys(str(location[-1]), owner)}"
    if field is not None:
        # A union or a list adds its own parts behind the field's name; the operator's key ends at the field.
        key = ".".join(str(part) for part in location[: field.depth])
    if problem["type"] == "missing":
        return f"{where}: {key}: missing; allowed: {allowed_values(field.info) if field else 'a value'}"
    if problem["type"] == "value_error":
        return f"{where}: {key}: {problem['msg'].removeprefix('Value error, ')}"
    allowed = allowed_values(field.info) if field else problem["msg"]
    return f"{where}: {key}: got {_shown(problem['input'])}; allowed: {allowed}"


def _known_keys(key: str, owner: type[BaseModel]) -> str:
    names = list(owner.model_fields)
    near = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {near[0]}?" if near else f"allowed: {', '.join(names)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _dotted_keys(data: Mapping[str, Any]) -> list[str]:
    keys: list[str] = []
    for key, value in data.items():
        if isinstance(value, dict):
            keys.extend(f"{key}.{inner}" for inner in value)
        else:
            keys.append(key)
    return keys


def _set_dotted(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    section, _, name = key.rpartition(".")
    table = data.setdefault(section, {}) if section else data
    if not isinstance(table, dict):
        raise PolicyError(
            f"{where}: {section}: not a table, so {key} cannot be set", f"write [{section}] in the policy"
        )
    table[name] = value
