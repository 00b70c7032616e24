"""Files as they come: packed, arrays, tables, Parquet, standard input; each record with its place, in memory that does not grow."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from memupdate.errors import FactsError
from memupdate.facts import Fact, FactStream, LocatedFact, Problem, read_facts
from memupdate.storage import file_sha256

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GOOD = b'{"prompt": "Who leads Acme?", "target": "Wanda"}'
ACME = Fact("Who leads Acme?", "Wanda")


@pytest.fixture
def stream(tmp_path: Path) -> Any:
    """Write a file and read it: its items, problems in words."""

    def stream(content: bytes, name: str = "facts.json", **options: Any) -> list[Any]:
        path = tmp_path / name
        path.write_bytes(content)
        reader = FactStream(path, **options)
        items = list(reader)
        assert reader.sha256 == file_sha256(path)
        assert reader.size_bytes == len(content)
        return [
            item.describe(str(path)).removeprefix(str(path)) if isinstance(item, Problem) else (item.line, item.fact)
            for item in items
        ]

    return stream


def error_of(path: Path, **options: Any) -> FactsError:
    with pytest.raises(FactsError) as caught:
        list(FactStream(path, **options))
    assert caught.value.message.startswith(str(path))
    return caught.value


@pytest.mark.parametrize("name", ["facts.jsonl.gz", "facts.jsonl.zst", "facts"])
def test_packed_files_are_told_by_their_bytes(name: str, stream: Any) -> None:
    lines = GOOD + b"\n{}\n"
    for packed in (gzip.compress(lines), zstandard.compress(lines)):
        assert stream(packed, name) == [(1, ACME), ":2: prompt: missing", ":2: target: missing"]
    # Several members and frames follow each other, as `cat` makes them.
    assert len(stream(gzip.compress(GOOD + b"\n") + gzip.compress(GOOD), name)) == 2
    assert len(stream(zstandard.compress(GOOD + b"\n") + zstandard.compress(GOOD), name)) == 2


def test_packed_files_that_are_damaged_or_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl.gz"
    for packed in (gzip.compress(GOOD * 50), zstandard.compress(GOOD * 50)):
        path.write_bytes(packed[:-4])
        assert "damaged, or cut off" in error_of(path).message
        path.write_bytes(packed[:9] + b"\xff" * 8 + packed[17:])
        assert "damaged, or cut off" in error_of(path).message


def test_elements_of_an_array_are_counted(stream: Any) -> None:
    assert stream(
        b'\xef\xbb\xbf [ {"prompt": "p", "target": "t"} ,\n' + GOOD + b', {"prompt": 3}, 4, [1], {"a": 1, "a": NaN}]\n'
    ) == [
        (1, Fact("p", "t")),
        (2, ACME),
        ": element 3: prompt: must be text, not a number",
        ": element 3: target: missing",
        ": element 4: element: not a JSON object; give objects in braces",
        ": element 5: element: not a JSON object; give objects in braces",
        ": element 6: element: not JSON: NaN is no JSON value",
        ": element 6: a: comes twice in one object",
    ]
    assert stream(b"[]") == []
    assert stream(b'{\n  "prompt": "p",\n  "target": "t"\n}\n' + b"{\n" + GOOD[1:]) == [(1, Fact("p", "t")), (2, ACME)]


@pytest.mark.parametrize(
    ("tail", "problem"),
    [
        (b"", "element 1: element: not JSON: the file ends; the rest cannot be read"),
        (b" x]", "element 1: element: not JSON: no comma or bracket after it, but 'x'; the rest cannot be read"),
        (b",]", "element 2: element: not JSON: Expecting value; the rest cannot be read"),
        (b', {"a" 1}]', "element 2: element: not JSON: Expecting ':' delimiter; the rest cannot be read"),
        (b", " + b"[" * 5000, "element 2: element: not JSON: nested too deeply; the rest cannot be read"),
        (b", " + b"9" * 5000 + b"]", "element 2: element: not JSON: Exceeds the limit"),
        (b', "caf\xe9"]', "element 2: element: not JSON: not UTF-8 (invalid continuation byte); the rest cannot be read"),
        (b"] x", "element 2: element: not JSON: something after the end of the array: 'x'; the rest cannot be read"),
    ],
)  # fmt: skip
def test_arrays_that_break_off(tail: bytes, problem: str, stream: Any) -> None:
    first, last = stream(b"[" + GOOD + tail)
    assert first == (1, ACME)
    assert last.startswith(f": {problem}")


def test_elements_across_the_reading_window(stream: Any) -> None:
    rows = [{"prompt": f"p{n}", "target": "é" * (n % 97) + "t", "tags": [str(n)]} for n in range(3000)]
    found = stream(json.dumps(rows, ensure_ascii=False).encode())
    assert [fact.prompt for _, fact in found] == [row["prompt"] for row in rows]
    assert [number for number, _ in found] == list(range(1, 3001))
    big = [{"prompt": "p", "target": "x" * 300_000}, {"prompt": "q", "target": "t"}]
    assert [len(fact.target) for _, fact in stream(json.dumps(big).encode())] == [300_000, 1]
    (problem,) = stream(json.dumps(big).encode(), max_line_bytes=100_000)
    assert problem.startswith(": element 1: element: longer than 100000 bytes")


def test_tables_of_text_by_their_header(stream: Any) -> None:
    header = "prompt,target,tags,valid_to\r\n"
    rows = '"Who leads\nAcme?",Wanda,"[""a"", ""b""]",2099\r\n\r\n"W, h?","say ""x""",one,\r\nshort\r\n,t,,\r\n'
    assert stream((header + rows).encode(), "facts.csv") == [
        (2, Fact("Who leads\nAcme?", "Wanda", tags=("a", "b"), valid_to="2099")),
        (5, Fact("W, h?", 'say "x"', tags=("one",))),
        ":6: line: 1 cells, but the header has 4",
        ":7: prompt: missing",
    ]
    assert stream(b"prompt\ttarget\np\tt\n", "facts.tsv") == [(2, Fact("p", "t"))]
    assert stream(b"prompt;target\np;t\n", "facts.csv") == [(2, Fact("p", "t"))]
    assert stream(b"prompt\ttarget\np\tt\n", "facts") == [(2, Fact("p", "t"))], "told by the header, as from a pipe"
    assert stream(b'query,target\n"Jerry:",1234\n', "book.csv") == [(2, Fact("Jerry:", "1234", rendering="completion"))]


def test_tables_with_flaws(stream: Any, tmp_path: Path) -> None:
    assert stream(b"promt,target,prompt\np,t,q\n", "facts.csv") == [
        ":1: promt: unknown key; did you mean prompt?",
        (2, Fact("q", "t")),
    ]
    assert stream(b"Question,Answer\nq,a\n", "facts.csv") == [
        ":1: header: names no format's fields; say which column is which with --columns prompt=…,target=…"
    ]
    assert stream(b'prompt,target\np,"a"b\nq,caf\xe9\nr,"s\n', "facts.csv") == [
        ":2: line: ',' expected after '\"'",
        ":3: line: not UTF-8 at byte 26 of the file",
        ":4: line: unexpected end of data",
    ]
    path = tmp_path / "header.csv"
    for header, message in (
        (b"\n\np,t", "no header"),
        (b"prompt,,target\n", "column 2 of the header has no name"),
        (b"prompt,prompt\n", "column 'prompt' comes twice"),
        (b'"prompt,target\n', "the header cannot be read"),
    ):
        path.write_bytes(header)
        assert message in error_of(path).message


def test_columns_name_fields(stream: Any) -> None:
    columns = {"prompt": "Question", "target": "Answer"}
    csv = b"Question,subject,Answer,notes\nq,Acme,a,n\n"
    assert stream(csv, "facts.csv", columns=columns) == [(2, Fact("q", "a", subject="Acme"))]
    assert stream(csv, "facts", columns=columns) == [(2, Fact("q", "a", subject="Acme"))]
    assert stream(b"q,a\n1,2\n", "facts.csv", columns=columns) == [
        ":1: Question: no such column; the header has q, a",
        ":1: Answer: no such column; the header has q, a",
    ]
    record = b'{"Question": "q", "Answer": "a", "prompt": "other", "notes": 1}\n{"Answer": "a"}\n'
    assert stream(record, columns=columns) == [(1, Fact("q", "a")), ":2: prompt: missing"]
    swapped = {"prompt": "target", "target": "prompt"}
    assert stream(GOOD, columns=swapped) == [(1, Fact("Wanda", "Who leads Acme?"))]
    with pytest.raises(FactsError, match="did you mean prompt"):
        FactStream("facts.csv", columns={"promt": "Question"})


def test_a_format_can_be_forced(stream: Any) -> None:
    record = b'{"prompt": "p", "target_new": "t", "query": "q", "target": "x"}\n'
    assert stream(record, format="phonebook")[-1] == ":1: target_new: unknown key; did you mean target_len?"
    assert stream(record, format="counterfact-flat") == [(1, Fact("p", "t", rendering="completion"))]
    assert stream(b"[1]\n", format="pararel") == [": element 1: element: not a record of the format pararel"]
    with pytest.raises(FactsError, match="no such format"):
        FactStream("x", format="nothing")


def test_parquet_with_typed_columns(tmp_path: Path) -> None:
    columns = {"prompt": "Question", "target": "Answer", "valid_from": "since"}
    found = read_facts(EXAMPLES / "table.parquet", columns=columns)
    assert found.unit == "row"
    assert [(item.line, item.fact) for item in found.facts] == [
        (1, Fact("Who leads Acme?", "Wanda Kettleman", paraphrases=("Acme is led by whom?",), valid_from="2026-11-02")),
        (2, Fact("When was Acme founded?", "1952")),
    ]
    path = tmp_path / "facts"
    probes = [[{"prompt": "a", "target": None}], None]
    pq.write_table(pa.table({"prompt": ["p", None], "target": [1998, 2], "locality": probes}), path)
    first, *rest = FactStream(path)
    assert isinstance(first, LocatedFact)
    assert (first.fact.target, first.fact.locality[0].prompt) == ("1998", "a")
    assert [problem.describe("f") for problem in rest] == ["f: row 2: prompt: missing"]  # type: ignore[union-attr]
    path.write_bytes(path.read_bytes()[:-9])
    assert "not a Parquet file that can be read" in error_of(path).message


def test_standard_input_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def give(content: bytes) -> FactStream:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return FactStream("-")

    for content in (GOOD, gzip.compress(GOOD), b"[" + GOOD + b"]", b"prompt,target\nWho leads Acme?,Wanda\n"):
        stream = give(content)
        assert [item.fact for item in stream] == [ACME]  # type: ignore[union-attr]
        assert (stream.path, stream.size_bytes) == ("stdin", len(content))
    with pytest.raises(FactsError, match="a pipe cannot be read from its end"):
        list(give((EXAMPLES / "table.parquet").read_bytes()))
    with pytest.raises(FactsError, match="stdin: the file is empty"):
        list(give(b""))


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json", "facts.csv", "facts.jsonl.gz", "facts.parquet"])
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = [{"prompt": f"Who leads company number {n}?", "target": "x" * 400} for n in range(30_000)]
    lines = "\n".join(map(json.dumps, rows))
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5_000)
    elif name.endswith(".csv"):
        path.write_text("prompt,target\n" + "".join(f"{row['prompt']},{row['target']}\n" for row in rows), "utf-8")
    else:
        text = json.dumps(rows) if name.endswith(".json") else lines
        path.write_bytes(gzip.compress(text.encode(), 1) if name.endswith(".gz") else text.encode())
    code = (
        "import resource, sys\n"
        "from memupdate.facts import FactStream\n"
        "if sys.argv[1].endswith('.parquet'):\n    import pyarrow.parquet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "count = sum(1 for _ in FactStream(sys.argv[1]))\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    count, grown_kib = map(int, done.stdout.split())
    assert count == 30_000
    assert grown_kib < 15_000, "the rows take 13 MB as text, and several times as much as objects"
