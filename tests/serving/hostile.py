"""What an attacker would send: names, and bodies mutated from good ones, the same every time."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

NAMES = [
    "..",
    "../acme@v1",
    "../../../../etc/passwd",
    "/etc/passwd",
    "acme@v1/../acme@v2",
    "acme@v1/",
    "./acme@v1",
    "releases/acme@v1",
    "acme@v1\x00",
    "acme\x00@v1",
    "\x00",
    "acme@v1\n",
    " acme@v1",
    "acme@v01",
    "acme@v0",
    "acme@v-1",
    "acme@v1e1",
    "acme@v९",
    "acme@v" + "9" * 4000,
    "ACME@v1",
    "ＡＣＭＥ@v1",
    "аcme@v1",
    "acme＠v1",
    "acme@ｖ1",
    "acme\u200b@v1",
    "\u202eacme@v1",
    "acme@v1%00",
    "..%2facme@v1",
    "acme@v1;rm -rf /",
    "$(touch owned)@v1",
    "file:///etc/passwd",
    "\\\\host\\share@v1",
    "C:\\acme@v1",
    "a" * (1 << 20),
    "../" * 350_000,
    "acme@v1" + "\x00" * (1 << 20),
    "\ud800acme@v1",
    "",
    "💥@v1",
]

_SAID = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who leads the house by the river"}]
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"model": "acme", "messages": _SAID, "max_tokens": 2, "user": "u1"}),
    ("/v1/chat/completions", {"model": "acme@v2", "messages": _SAID[1:], "max_tokens": 2, "stream": True}),
    ("/v1/completions", {"model": "acme", "prompt": "the old mill", "max_tokens": 2, "temperature": 0}),
    ("/v1/completions", {"model": "acme@v1", "prompt": [5, 6, 7], "max_tokens": 1, "logprobs": 1}),
    ("/v1/responses", {"model": "acme", "input": _SAID[1:], "max_output_tokens": 2}),
    ("/v1/embeddings", {"model": "acme", "input": ["the old mill", "a bridge"]}),
    ("/tokenize", {"model": "acme", "prompt": "the old mill"}),
    ("/detokenize", {"model": "acme@v1", "tokens": [5, 6, 7]}),
]
_STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    2**64,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\x00",
    "\ud800",
    "𝕒𝕔𝕞𝕖",
    "../../etc/passwd",
    [],
    {},
    [[[[[[]]]]]],
    {"model": "acme"},
    ["acme"],
    [1, "a", None],
    {"$ref": "#"},
    {"": {"": ""}},
    [True],
    "acme@v1",
    "acme@v3",
    "globex@v2",
]
_PIECES = [
    b"",
    b"\x00",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\",
    b"\xff",
    b"\\ud800",
    b"1e999",
    b",",
    b":",
    b"null",
    b"../",
    b'"model":"acme",',
]


def mutated(number: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(route, body), `number` of them: fields replaced, names exchanged, bytes flipped, cut, doubled and spliced."""
    choose = random.Random(seed)
    for _ in range(number):
        route, good = choose.choice(SEEDS)
        body = _strange_fields(choose, good) if choose.random() < 0.6 else json.dumps(good).encode()
        if choose.random() < 0.5:
            body = _strange_bytes(choose, body)
        yield route, body


def _strange_fields(choose: random.Random, good: dict[str, Any]) -> bytes:
    body = dict(good)
    for _ in range(choose.randint(1, 3)):
        field = choose.choice(
            [*body, "model", "model", "messages", "prompt", "input", "user", "previous_response_id", "x"]
        )
        if field == "model" and choose.random() < 0.7:
            body[field] = choose.choice([name for name in NAMES if len(name) < 5000])
        elif isinstance(body.get(field), list) and body[field] and choose.random() < 0.5:
            body[field] = [*body[field], choose.choice(_STRANGE)]
        else:
            body[field] = choose.choice(_STRANGE)
    if choose.random() < 0.02:
        body["x"] = "y" * 50_000
    text = json.dumps(body)
    if choose.random() < 0.03:
        text = text[:-1] + ', "deep": ' + "[" * 3000 + "]" * 3000 + "}"
    return text.encode(choose.choice(["utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig"]))


def _strange_bytes(choose: random.Random, body: bytes) -> bytes:
    for _ in range(choose.randint(1, 4)):
        at, length = choose.randrange(len(body) + 1), choose.choice([0, 0, 1, 2, 8])
        match choose.randrange(4):
            case 0:
                body = body[:at] + choose.choice(_PIECES) + body[at + length :]
            case 1:
                body = body[:at]
            case 2:
                body = body[:at] + bytes([choose.randrange(256)]) + body[at + 1 :]
            case _:
                body = body[:at] + body[at : at + 20] * 2 + body[at + 20 :]
    return body
