"""Nothing that is called a facts file brings a traceback: mutated files of every format, up to the ledger."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memupdate.errors import FactsError
from memupdate.facts import Fact, FactStream, LocatedFact, Problem
from memupdate.facts.formats import FORMATS, RecordFormat, RecordProblems

KEYS = [
    "prompt",
    "target",
    "target_new",
    "subject",
    "relation",
    "paraphrases",
    "locality",
    "portability",
    "context",
    "rephrase",
    "rephrase_prompt",
    "locality_prompt",
    "locality_ground_truth",
    "ground_truth",
    "src",
    "alt",
    "loc",
    "loc_ans",
    "requested_rewrite",
    "paraphrase_prompts",
    "neighborhood_prompts",
    "str",
    "relation_id",
    "questions",
    "answers",
    "question",
    "object",
    "answer_2hop",
    "question_2hop",
    "topic",
    "messages",
    "role",
    "content",
    "type",
    "text",
    "key",
    "query",
    "matching",
    "prompt_type",
    "valid_from",
    "valid_to",
    "tags",
    "id",
    "case_id",
    "separator",
    "rendering",
    "attribute",
    "domain",
    "target_true",
]
TEXTS = st.sampled_from(
    ["p", "{}", "[MASK].", "user", "assistant", "2024", "A |S: +2024-00-00T00:00:00Z |E: +2025", "", " ", "\x00"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
RECORDS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8) | st.lists(VALUES, max_size=4)


@given(RECORDS)
@settings(max_examples=500)
@example([["a [MASK]", "b", "c"], 3])
@example({"a": {"questions": 3, "answers": {}}})
def test_no_record_breaks_a_format(record: object) -> None:
    for known in FORMATS:
        if not known.detect(record):
            continue
        facts, problems = parsed(known, record)
        assert bool(facts) != bool(problems) or record == {}
        assert all(field and reason for field, reason in problems)
        assert all(fact.prompt.strip() and fact.target.strip() and fact.id and fact.key for fact in facts)


def parsed(known: RecordFormat, record: object) -> tuple[Sequence[Fact], list[tuple[str, str]]]:
    try:
        return known.parse(record), []
    except RecordProblems as error:
        return (), error.problems


@given(
    content=st.binary(min_size=1, max_size=200),
    suffix=st.sampled_from(["json", "jsonl", "csv", "tsv", "gz", "zst", "parquet"]),
)
@settings(max_examples=1000)
@example(content=b"PAR1PAR1", suffix="parquet")
@example(content=b"\x28\xb5\x2f\xfd" * 3, suffix="zst")
@example(content=b"\x1f\x8b\x08\x00", suffix="gz")
@example(content=b"[" * 190, suffix="json")
@example(content=b'"\n' * 90, suffix="csv")
def test_no_bytes_break_the_stream(content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(content)
    items, refusal = read(path)
    assert refusal.startswith(str(path)) or not refusal
    assert all(not isinstance(item, Problem) or (item.line and item.field and item.reason) for item in items)


def read(path: Path) -> tuple[list[LocatedFact | Problem], str]:
    items: list[LocatedFact | Problem] = []
    try:
        for item in FactStream(path):
            items.append(item)
    except FactsError as error:
        return items, error.message
    return items, ""


def test_mutated_files_never_change_the_ledger(repo_root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.fuzz_facts", "--quick", "--seed", "7"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'inputs': 2000" in done.stdout
