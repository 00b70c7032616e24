"""Which API key may ask which collections: the rules beside the registry, and whom a request's key belongs to.

Invariant: the file holds digests, never keys; where rules are in force a request without a bound key gets nothing of a
collection, and a file that is torn or gone leaves the last good rules in force. Keys are compared in constant time, all
of them each time. This module knows nothing about HTTP but the two headers that carry keys.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memupdate.layout import COLLECTION_PATTERN, RELEASE_PATTERN
from memupdate.serving.last_good import LastGood

SCHEMA_VERSION = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Binding:
    """What the holder of one key may ask."""

    collections: frozenset[str] | None
    """Collections whose aliases and releases are open to it; None: all of them."""
    base_model: bool = True
    """Whether it may ask the untouched base model by its name."""

    def allows_release(self, name: str) -> bool:
        """Whether release `name` is open to it; False for what is no release's name."""
        matched = RELEASE_PATTERN.fullmatch(name)
        return matched is not None and (self.collections is None or matched["collection"] in self.collections)


EVERYTHING = Binding(None)
"""The operator's: whoever has vLLM's own key, which proves and publishes."""


@dataclass(frozen=True)
class Rules:
    """All bindings, by the SHA-256 of their keys."""

    bindings: tuple[tuple[bytes, Binding], ...]

    def binding_of(self, key: bytes) -> Binding | None:
        """Whose `key` is; None for an unknown one. Looks at all keys, whichever fits."""
        digest = hashlib.sha256(key).digest()
        found = None
        for known, binding in self.bindings:
            if hmac.compare_digest(digest, known):
                found = binding
        return found


class AccessUnreadable(Exception):
    """There are rules, or nobody could tell, but none could be read since the start: nobody is let in."""


class Access:
    """The rules in force.

    Args:
        path: the rules' file.
        required: refuse everything while it cannot be read; False: no file, no rules.
        operator_key: vLLM's own key, which may ask everything; empty: there is none.
    """

    def __init__(self, path: Path, *, required: bool, operator_key: str = "") -> None:
        self._file = LastGood(path, parse_rules)
        self._required = required
        self._may_exist: bool | None = None
        self._operator = hashlib.sha256(operator_key.encode()).digest() if operator_key else None

    @property
    def path(self) -> Path:
        """The rules' file."""
        return self._file.path

    def look(self) -> None:
        """Read the file if it has changed. Asks the disk, which may hang."""
        if not self._required and self._file.last is None:
            self._may_exist = _may_exist(self._file.path)
            if not self._may_exist:
                return
        self._file.get()

    def rules(self) -> Rules | None:
        """The last good rules, without a look at the disk; None where there are none. Raises AccessUnreadable."""
        rules = self._file.last  # Rules that were there and are gone stay in force.
        if rules is None and (self._required or self._may_exist is not False):
            raise AccessUnreadable
        return rules

    def binding_of(self, rules: Rules, key: bytes) -> Binding | None:
        """Whose `key` is; None for an unknown one or none."""
        bound = rules.binding_of(key)
        is_operator = self._operator is not None and hmac.compare_digest(hashlib.sha256(key).digest(), self._operator)
        return EVERYTHING if is_operator else bound


def rules_json(bindings: Sequence[tuple[str, Binding]]) -> str:
    """The file's text, from pairs of a key's SHA-256 (hexadecimal) and what its holder may ask."""
    keys = [
        {
            "sha256": digest,
            "collections": "*" if binding.collections is None else sorted(binding.collections),
            "base_model": binding.base_model,
        }
        for digest, binding in bindings
    ]
    return json.dumps({"schema_version": SCHEMA_VERSION, "keys": keys}, indent=2) + "\n"


def parse_rules(content: bytes) -> Rules:
    """The rules in a file. Raises ValueError for anything that is not exactly as `rules_json` writes it."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"no access rules of schema_version {SCHEMA_VERSION}")
    keys = value.get("keys")
    if not isinstance(keys, list):
        raise ValueError("keys: expected a list")
    return Rules(tuple(_parse_key(f"keys[{number}]", key) for number, key in enumerate(keys)))


def presented_key(headers: Mapping[bytes, bytes]) -> bytes:
    """The key that a request shows, as OpenAI's clients (`Authorization: Bearer …`) and Anthropic's (`x-api-key`) send it."""
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    return given.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def _may_exist(path: Path) -> bool:
    """False only where the disk says that nothing of that name is there; what it cannot tell may be rules."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def _parse_key(where: str, value: Any) -> tuple[bytes, Binding]:
    if not isinstance(value, dict) or set(value) != {"sha256", "collections", "base_model"}:
        raise ValueError(f"{where}: expected sha256, collections and base_model")
    digest, collections, base_model = value["sha256"], value["collections"], value["base_model"]
    if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
        raise ValueError(f"{where}.sha256: expected 64 hexadecimal digits")
    if not isinstance(base_model, bool):
        raise ValueError(f"{where}.base_model: expected true or false")
    if collections == "*":
        return bytes.fromhex(digest), Binding(None, base_model)
    if not isinstance(collections, list) or not all(
        isinstance(name, str) and COLLECTION_PATTERN.fullmatch(name) for name in collections
    ):
        raise ValueError(f'{where}.collections: expected names of collections, or "*"')
    return bytes.fromhex(digest), Binding(frozenset(collections), base_model)
