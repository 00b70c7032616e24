"""The quick way of reading a line says what the general way says, or nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memupdate.facts.fields import RecordProblems
from memupdate.facts.formats import NATIVE, detect_format
from memupdate.facts.json_values import JsonDecoder
from memupdate.facts.model import Fact
from memupdate.facts.plain_lines import PlainLines

PLAIN = PlainLines()
NAMES = ["prompt", "target", "id", "subject", "relation", "source", "valid_from", "valid_to"]
WHOLE = dict.fromkeys(NAMES, "text") | {"valid_from": "2024", "valid_to": "2025-01-31"}


def in_general(line: bytes) -> Fact | None:
    try:
        value = JsonDecoder().decode(line.decode())
        if detect_format(value) is not NATIVE or not isinstance(value, dict):
            return None
        (fact,) = NATIVE.parse(value)
    except (RecordProblems, UnicodeDecodeError):
        return None
    return fact


def same(line: bytes) -> bool:
    """Whether the quick way knows the line; where it does, both must say the same."""
    quick = PLAIN.read(line)
    if quick is None:
        return False
    general = in_general(line)
    assert quick.fact == general, line
    assert (quick.fact.id, quick.fact.key, hash(quick.fact)) == (general.id, general.key, hash(general))
    assert all(text in quick.texts for text in (general.prompt, general.target, general.source or ""))
    return True


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Who leads Acme?", "target": "Wanda"},
        WHOLE,
        {"target": "Wanda: \\u00e9 is not é", "prompt": "b"} | {"source": "Zürich, 東京 🦊"},
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_plain_lines_are_known(record: dict[str, str], ascii_only: bool) -> None:
    line = json.dumps(record, ensure_ascii=ascii_only).replace("\\\\", "/").encode()
    assert same(line)
    assert same(b" \t" + line.replace(b'": "', b'" :\t"') + b" \r\n")


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "p", "target": "t", "target": "u"}',
        b'{"prompt" : "p", "target":"t", "target":"u"}',
        b'{"prompt": "p", "target": "t", "target": null}',
        b'{"prompt": "p", "target": "t", "source": "a", "source" : null}',
        b'{"prompt": "p", "target": "t", "tags": []}',
        b'{"prompt": "p", "target": "t", "promt": "u"}',
        b'{"prompt": "p", "target": " "}',
        b'{"prompt": "p", "target": ""}',
        b'{"prompt": "p", "target": "\\u0000"}',
        b'{"prompt": "p", "target": "half \\ud83d"}',
        b'{"prompt": "p", "target": "caf\xe9"}',
        b'{"prompt": "p", "target": "\xed\xa0\x80"}',
        b'{"prompt": "p", "target": "t", "id": 7}',
        b'{"prompt": "p", "target": "t", "valid_from": "soon"}',
        b'{"prompt": "p", "target": "t", "valid_from": "2025", "valid_to": "2024"}',
        b'{"prompt": "p", "target": "t"} {}',
        b'[{"prompt": "p", "target": "t"}]',
        b'{"query": "p", "target": "t"}',
        b'{"prompt": "p"}',
        b"\n",
        b"",
    ],
)
def test_what_is_not_plain_is_left_to_the_general_way(line: bytes) -> None:
    assert PLAIN.read(line) is None


TEXT = st.text(min_size=1, max_size=6) | st.sampled_from(
    ["2024", "2024-05", "2023-02-30", " a", "a\\b", 'a"b', "a/b", "İﬁ"]
)
RECORDS = st.dictionaries(st.sampled_from(NAMES), TEXT | st.none() | st.integers(), min_size=2, max_size=8)


@given(RECORDS, st.booleans(), st.sampled_from([None, (", ", " : "), (",", ":")]))
@settings(max_examples=300)
def test_any_record(record: dict[str, Any], ascii_only: bool, separators: tuple[str, str] | None) -> None:
    record = {"prompt": "p", "target": "t"} | record
    same(json.dumps(record, ensure_ascii=ascii_only, separators=separators).encode("utf-8", "surrogatepass"))


@given(
    st.integers(0, 200),
    st.integers(0, 8),
    st.binary(max_size=4) | st.sampled_from([b'"', b"\\", b'","', b'":"', b"\\u0041"]),
)
@settings(max_examples=500)
@example(0, 0, b"\xef\xbb\xbf")
def test_any_bytes_in_a_line(at: int, removed: int, added: bytes) -> None:
    line = bytearray(json.dumps(WHOLE).encode())
    line[at : at + removed] = added
    same(bytes(line))
