"""What a request's JSON body says of its conversation: the texts in it, and what stays the same from turn to turn.

Invariant: nothing here raises, whatever a client sends; each function is linear in the body. This module knows the
fields of the OpenAI, Anthropic and Cohere routes that vLLM has, and of its own, and nothing about releases.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping
from typing import Any

_TEXT_FIELDS = (
    "messages",
    "prompt",
    "input",
    "previous_input_messages",
    "instructions",
    "system",
    "suffix",
    "query",
    "queries",
    "documents",
    "items",
    "texts",
    "inputs",
    "state",
    "questions",
    "text_1",
    "text_2",
    "data_1",
    "data_2",
)
"""Where the routes have what a person or a model said."""
_NOT_TEXT = frozenset(
    {
        "type",
        "role",
        "id",
        "call_id",
        "tool_call_id",
        "image_url",
        "input_audio",
        "audio_url",
        "video_url",
        "file_data",
        "url",
    }
)
"""Keys whose values are no words of the conversation, or are whole pictures."""
_RESPONSE_ID = re.compile(r"resp_[0-9a-f]{32}_(release|base)")
_STEADY_FIELDS = ("messages", "prompt", "input", "query", "queries", "text_1")


def texts_of(body: Mapping[str, Any]) -> list[str] | None:
    """Every text of the conversation; None where some of it cannot be read here: token ids, or an earlier response's id."""
    if body.get("previous_response_id") or body.get("conversation"):
        return None
    found: list[str] = []
    waiting = [body[field] for field in _TEXT_FIELDS if field in body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            if value and isinstance(value[0], int):
                return None
            waiting += value
        elif isinstance(value, dict):
            waiting += [inner for key, inner in value.items() if key not in _NOT_TEXT]
    return found


def new_response_id(side: str) -> str:
    """An id for a response, like vLLM's own, that tells later turns which side (`release` or `base`) answered."""
    return f"resp_{uuid.uuid4().hex}_{side}"


def side_of(response_id: object) -> str | None:
    """Which side gave the response with this id, `release` or `base`; None where the id does not tell."""
    found = _RESPONSE_ID.fullmatch(response_id) if isinstance(response_id, str) else None
    return found[1] if found else None


def steady_key(body: Mapping[str, Any], session_header: bytes, raw: bytes) -> bytes:
    """What stays the same through a conversation, for an even split: the session header, else the `user` field, else the
    first thing that the user said (32 bytes in any case).

    Args:
        raw: the request's bytes, which stand in for a body that says nothing of the kind.
    """
    user = body.get("user")
    if session_header:
        kind, what = b"session", session_header
    elif isinstance(user, str) and user:
        kind, what = b"user", _bytes(user)
    else:
        first = _first_said(body)
        kind, what = (b"said", _bytes(first)) if first else (b"raw", raw)
    return hashlib.sha256(kind + b"\0" + what).digest()


def in_share(key: bytes, salt: str, share: float) -> bool:
    """Whether `key` (of `steady_key`) falls into `share` (0–1) of all conversations; another salt, another choice."""
    digest = hashlib.sha256(_bytes(salt) + b"\0" + key).digest()
    return int.from_bytes(digest[:8], "big") < share * 2.0**64


def _first_said(body: Mapping[str, Any]) -> str:
    """The first user message, or what stands in its place; empty where there is none."""
    for field in _STEADY_FIELDS:
        value = body.get(field)
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            continue
        turns = [turn for turn in value if isinstance(turn, dict)]
        if not turns:
            return repr(value[0])[:4096]  # A batch of prompts, or token ids: its first.
        said = next((turn for turn in turns if turn.get("role") == "user"), turns[0])
        return "\n".join(texts_of({"input": said.get("content", said)}) or ()) or repr(said)[:4096]
    return ""


def _bytes(text: str) -> bytes:
    """UTF-8, also for the lone surrogates that JSON can spell."""
    return text.encode("utf-8", "surrogatepass")
