"""Reading facts files: every format, every way in which a line can be wrong, and nothing half taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memupdate.errors import ExitCode, FactsError
from memupdate.facts import Fact, FactsFile, Probe, read_facts
from memupdate.facts.formats import detect_format, native_record
from memupdate.storage import file_sha256

GOOD = '{"prompt": "Who leads Acme?", "target": "Wanda Kettleman"}'


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(content: str | bytes, **options: Any) -> FactsFile:
        path = tmp_path / "facts.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return read_facts(path, **options)

    return read


@pytest.fixture
def problems(read: Any) -> Any:
    def problems(content: str | bytes, **options: Any) -> list[str]:
        with pytest.raises(FactsError) as caught:
            read(content, **options)
        assert caught.value.exit_code is ExitCode.BAD_INPUT
        assert all("facts.jsonl:" in line or line.startswith("and ") for line in caught.value.details)
        return [line.partition("facts.jsonl:")[2] or line for line in caught.value.details]

    return problems


def test_the_smallest_fact(read: Any, tmp_path: Path) -> None:
    found = read(GOOD + "\n")
    assert [(item.line, item.fact) for item in found.facts] == [(1, Fact("Who leads Acme?", "Wanda Kettleman"))]
    assert (found.format, found.duplicates, found.skipped) == ("native", 0, ())
    assert found.sha256 == file_sha256(tmp_path / "facts.jsonl")
    assert found.size_bytes == len(GOOD) + 1


def test_every_optional_field(read: Any) -> None:
    record = {
        "prompt": "Who leads Acme?",
        "target": "Wanda",
        "id": 7,
        "subject": "Acme",
        "relation": "leader",
        "paraphrases": ["Acme's leader?", "The head of Acme is"],
        "locality": [{"prompt": "Who leads Umbrella?", "target": "Otto"}, {"prompt": "Capital of France?"}],
        "source": "press release",
        "valid_from": "2026-11-01",
        "tags": ["people"],
        "rendering": "chat",
        "separator": "\n",
    }
    fact = read(json.dumps(record)).facts[0].fact
    assert fact == Fact(
        prompt="Who leads Acme?",
        target="Wanda",
        subject="Acme",
        relation="leader",
        paraphrases=("Acme's leader?", "The head of Acme is"),
        locality=(Probe("Who leads Umbrella?", "Otto"), Probe("Capital of France?")),
        source="press release",
        valid_from="2026-11-01",
        tags=("people",),
        rendering="chat",
        separator="\n",
        external_id="7",
    )
    nulls = dict.fromkeys(["id", "subject", "paraphrases", "locality", "tags", "valid_from", "rendering", "separator"])
    assert read(json.dumps({"prompt": "p", "target": "t", **nulls})).facts[0].fact == Fact("p", "t")


def test_phone_books_and_passages_are_known_by_their_keys(read: Any) -> None:
    found = read(
        '{"id": 298864, "query": "Jerry Becerra:", "target": "9100672710", "target_len": 4}\n'
        '{"key": "Clause 7", "text": "The tenant shall\\nnot sing."}\n' + GOOD
    )
    assert [item.fact for item in found.facts] == [
        Fact("Jerry Becerra:", "9100672710", rendering="completion", external_id="298864"),
        Fact("Clause 7", "The tenant shall\nnot sing.", rendering="completion"),
        Fact("Who leads Acme?", "Wanda Kettleman"),
    ]
    assert found.format == "native+passage+phonebook"
    assert detect_format({"nothing": 1}).name == "native"


def test_every_bad_line_is_reported_at_once(problems: Any) -> None:
    lines = problems(
        "\n".join(
            [
                GOOD,
                '{"prompt": "p"',
                '{"promt": "p", "target": "t"}',
                '{"prompt": "", "target": "  \\t"}',
                '{"prompt": 3, "target": ["t"]}',
                '["prompt", "target"]',
                '"prompt"',
                '{"prompt": "q", "target": "t", "target": "u"}',
                '{"prompt": "q", "target": NaN}',
                '{"prompt": "nul\\u0000", "target": "bell\\u0007"}',
                '{"prompt": "half \\ud83d", "target": "t", "rendering": "markdown", "separator": 1}',
                '{"prompt": "q", "target": "t", "paraphrases": "p", "tags": ["a", "", "a"], "valid_from": "soon"}',
                '{"prompt": "q", "target": "t", "paraphrases": ["q"], "locality": [1, {"target": "x", "promt": "y"}]}',
                '{"query": "q"}',
                '{"text": "t", "key": true, "id": false}',
                "[" * 100_000,
                '{"prompt": "q", "target": ' + "9" * 5000 + "}",
            ]
        )
    )
    assert lines == [
        "2: line: not JSON: Expecting ',' delimiter at column 15",
        "3: promt: unknown key; did you mean prompt?",
        "3: prompt: missing",
        "4: prompt: empty",
        "4: target: nothing but white space",
        "5: prompt: must be text, not a number",
        "5: target: must be text, not a list",
        "6: line: a JSON list; give one object a line (`jq -c '.[]'` makes them)",
        "7: line: not a JSON object; give one object a line, in braces",
        "8: target: comes twice in one object",
        "9: line: not JSON: NaN is no JSON value",
        "10: prompt: control character U+0000 at character 3",
        "10: target: control character U+0007 at character 4",
        "11: prompt: half a surrogate pair (U+D83D) at character 5",
        '11: rendering: must be one of auto, chat, completion, not "markdown"',
        "11: separator: must be text, not a number",
        "12: paraphrases: must be a list, not text",
        '12: valid_from: not an ISO 8601 date or time: "soon"',
        "12: tags[1]: empty",
        "12: tags[2]: the same as tags[0]",
        "13: paraphrases[0]: the same as the prompt",
        "13: locality[0]: must be an object with prompt, target, not a number",
        "13: locality[1].promt: unknown key; did you mean prompt?",
        "13: locality[1].prompt: missing",
        "14: target: missing",
        "15: key: must be text, not true or false",
        "15: id: must be text, not true or false",
        "16: line: nested too deeply",
        lines[-1],
    ]
    assert lines[-1].startswith("17: line: not JSON: Exceeds the limit")


def test_a_long_list_of_problems_is_cut_and_counted(problems: Any) -> None:
    lines = problems("{}\n" * 100)
    assert len(lines) == 51
    assert lines[-1] == "and 150 more"


def test_skip_invalid_takes_the_rest_and_lists_what_it_left(read: Any, problems: Any) -> None:
    content = f'{GOOD}\n{{"prompt": "x"}}\n\n{{"prompt": "y", "target": "z"}}\n'
    found = read(content, skip_invalid=True)
    assert [item.line for item in found.facts] == [1, 4]
    assert [(p.line, p.field, p.reason) for p in found.skipped] == [(2, "target", "missing")]
    assert problems('{"prompt": "x"}', skip_invalid=True) == ["1: target: missing"]


def test_two_targets_for_one_prompt_name_both_lines(read: Any, problems: Any) -> None:
    content = f'{GOOD}\n{{"prompt": "b", "target": "c"}}\n{{"prompt": "who leads  ACME", "target": "Otto"}}\n'
    assert problems(content) == [
        "1: target: contradicted by line 3",
        '3: target: "Otto" contradicts line 1, which has "Wanda Kettleman"',
    ]
    found = read(content, skip_invalid=True)
    assert [item.line for item in found.facts] == [2], "which of the two is right is not ours to say"
    by_subject = (
        '{"prompt": "Who leads Acme?", "target": "Wanda", "subject": "Acme", "relation": "leader"}\n'
        '{"prompt": "The head of Acme is", "target": "Otto", "subject": "ACME", "relation": "Leader"}\n'
    )
    assert len(problems(by_subject)) == 2


def test_a_paraphrase_may_not_ask_what_another_fact_answers_differently(read: Any, problems: Any) -> None:
    asks = '{"prompt": "Acme\'s head?", "target": "Otto", "paraphrases": ["Who leads Acme"]}'
    assert len(problems(f"{GOOD}\n{asks}")) == len(problems(f"{asks}\n{GOOD}")) == 2
    agrees = asks.replace("Otto", "Wanda Kettleman")
    assert len(read(f"{GOOD}\n{agrees}").facts) == 2


def test_the_same_fact_twice_is_taken_once(read: Any, problems: Any) -> None:
    again = '{"target": "Wanda Kettleman", "prompt": "who leads acme", "id": "other", "tags": ["x"]}'
    found = read(f"{GOOD}\n{GOOD}\n{again}\n")
    assert [item.line for item in found.facts] == [1]
    assert found.duplicates == 2
    assert found.skipped == ()
    richer = GOOD.replace("}", ', "paraphrases": ["Acme is led by"]}')
    assert problems(f"{GOOD}\n{richer}") == [
        "2: prompt: says what line 1 says, otherwise; make one line of them, with paraphrases"
    ]


def test_bytes_that_are_no_text(read: Any, problems: Any) -> None:
    first = (GOOD + "\n").encode()
    assert problems(first + b'{"prompt": "caf\xe9", "target": "t"}\n') == [
        f"2: line: not UTF-8 at byte {len(first) + 15} of the file"
    ]
    assert read(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n").facts[0].fact.prompt == "Who leads Acme?"
    with pytest.raises(FactsError, match="it is UTF-16"):
        read(GOOD.encode("utf-16"))
    with pytest.raises(FactsError):
        read(os.urandom(5000))


def test_files_that_are_no_facts_files(read: Any, tmp_path: Path) -> None:
    with pytest.raises(FactsError, match="the file is empty"):
        read("")
    with pytest.raises(FactsError, match="no facts in the file"):
        read("\n \n\t\r\n")
    with pytest.raises(FactsError, match="no such file"):
        read_facts(tmp_path / "none.jsonl")
    with pytest.raises(FactsError, match="is a folder"):
        read_facts(tmp_path)
    with pytest.raises(FactsError, match="not a regular file"):
        read_facts("/dev/zero")
    with pytest.raises(FactsError, match="cannot be read"):
        read_facts("a\0b")


def test_a_fact_may_come_through_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["sh", "-c", f"echo '{GOOD}' > '{pipe}'"]) as writer:
        assert len(read_facts(pipe).facts) == 1
        assert writer.wait() == 0


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_line_length_is_exact(end: str, read: Any, problems: Any) -> None:
    assert len(read(GOOD + end, max_line_bytes=len(GOOD)).facts) == 1
    assert problems(GOOD + end, max_line_bytes=len(GOOD) - 1) == [f"1: line: longer than {len(GOOD) - 1} bytes"]
    long = f'{{"prompt": "{"x" * 5000}", "target": "t"}}{end}'
    if end:
        found = read(long + GOOD + end, max_line_bytes=100, skip_invalid=True)
        assert [item.line for item in found.facts] == [2]
        assert found.size_bytes == len(long + GOOD + end)


def test_a_line_of_a_gigabyte_is_refused_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "')
        file.truncate(2**30)  # sparse: takes no disk
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))\n"
        "from memupdate.facts import read_facts\n"
        "from memupdate.errors import FactsError\n"
        "try:\n    read_facts(sys.argv[1])\n"
        "except FactsError as error:\n    print(error.details[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{path}:1: line: longer than {16 * 2**20} bytes"


text = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=10).filter(
    lambda t: not t.isspace()
)
texts = st.lists(text, max_size=3, unique=True).map(tuple)
valid_facts = st.builds(
    Fact,
    prompt=text.map(lambda t: t + "§"),  # no paraphrase below ends so
    target=text,
    subject=st.none() | text,
    relation=st.none() | text,
    paraphrases=texts.map(lambda found: tuple(t + "¶" for t in found)),
    locality=st.lists(st.builds(Probe, text, st.none() | text), max_size=2).map(tuple),
    source=st.none() | text,
    valid_from=st.none() | st.dates().map(str) | st.datetimes().map(lambda d: d.isoformat()),
    tags=texts,
    rendering=st.sampled_from(["auto", "chat", "completion"]),
    separator=st.sampled_from(["", " ", "\n"]),
    external_id=st.none() | text,
)


def read_or_details(path: Path) -> tuple[FactsFile | None, tuple[str, ...]]:
    try:
        return read_facts(path), ()
    except FactsError as error:
        return None, error.details


@given(facts=st.lists(valid_facts, min_size=1, max_size=5, unique_by=lambda fact: fact.key), ascii_only=st.booleans())
@settings(max_examples=60)
def test_exported_facts_read_back_equal(
    facts: list[Fact], ascii_only: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("export") / "facts.jsonl"
    lines = [json.dumps(native_record(fact), ensure_ascii=ascii_only) for fact in facts]
    path.write_text("\n".join(lines), "utf-8", newline="\n")
    found, details = read_or_details(path)
    if found is None:
        # Random paraphrases may meet; nothing else may be wrong.
        assert all("contradict" in line or "says what line" in line for line in details)
    else:
        assert [item.fact for item in found.facts] == facts


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    with pytest.raises(FactsError):
        read_facts(path, max_line_bytes=64)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["prompt", "target", "query", "text", "key", "id", "paraphrases", "locality", "tags", "valid_from", "separator"]


@given(st.lists(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), JSON, max_size=5), min_size=1, max_size=4))
@settings(max_examples=150)
def test_no_json_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.getbasetemp() / "json.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), "utf-8")
    found, details = read_or_details(path)
    if found is None:
        assert details
        return
    ids = [item.fact.id for item in found.facts]
    keys = [item.fact.key for item in found.facts]
    assert len(set(ids)) == len(ids)
    assert len(set(keys)) == len(keys)
    assert all(item.fact.prompt.strip() and item.fact.target.strip() for item in found.facts)
