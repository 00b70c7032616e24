"""Each rule of docs/ledger-rules.md, on a real ledger, and the staging against the in-memory reader."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memupdate.errors import FactsError
from memupdate.facts.files import FactsFile
from memupdate.facts.model import Fact
from memupdate.facts.reader import read_facts
from memupdate.facts.stream import FactStream
from memupdate.ledger import Ledger
from memupdate.ledger.rules import instant
from memupdate.ledger.staging import Staged

LIVE = Fact("Who leads Acme?", "Wanda", valid_from="2025-03", subject="Acme", relation="leader")


def verdict(ledger: Ledger, build: Any, *facts: Fact) -> list[str]:
    with ledger.stage("acme", build.file(list(facts))) as staged:
        return [row.told for row in staged.told()]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (Fact("Where is Acme?", "Leeds"), "new"),
        (LIVE, "unchanged"),
        (replace(LIVE, source="another file", tags=("x",)), "unchanged"),
        (replace(LIVE, valid_from="2025-06-01"), "unchanged"),
        (replace(LIVE, prompt="who leads  acme"), "unchanged"),
        (replace(LIVE, paraphrases=("Acme's head?",)), "superseding"),
        (replace(LIVE, target="Otto"), "superseding"),
        (replace(LIVE, target="Otto", valid_from=None), "superseding"),
        (replace(LIVE, target="Otto", valid_from="2025-03-02"), "superseding"),
        (replace(LIVE, target="Otto", valid_from="2025"), "older"),
        (replace(LIVE, target="Otto", valid_from="2025-02-28T23:59:59"), "older"),
        (replace(LIVE, target="Otto", valid_from="2025-03-01T00:30:00+01:00"), "older"),
        (replace(LIVE, valid_to="2025-09"), "ended"),
        (replace(LIVE, target="Otto", valid_to="2025-09-01"), "ended"),
        (replace(LIVE, target="Otto", valid_to="2999"), "superseding"),
        (replace(LIVE, target="Otto", valid_from="2999"), "future"),
        (replace(LIVE, valid_from="2999"), "unchanged"),
        (Fact("Who was first?", "Ada", valid_to="1852-11-27"), "ended"),
    ],
)
def test_what_a_fact_does(told: Fact, expected: str, ledger: Ledger, build: Any) -> None:
    build.add(LIVE)
    assert verdict(ledger, build, told) == [expected]
    batch = build.receive([told])
    assert (batch is not None) == (expected in ("new", "superseding"))
    kept = ledger._rows("SELECT fact, reason, current FROM recorded_facts")
    if expected in ("older", "ended", "future"):
        assert [(row["fact"], row["reason"]) for row in kept] == [(told.id, expected)]
        assert ledger.live_facts("acme") == [LIVE]
        assert verdict(ledger, build, told) == ["unchanged"], "what is on record is no news"
        [lifetime] = [row for row in ledger.history(told.key) if row.change == "historic"]
        assert (lifetime.status, lifetime.valid_to) == (expected, told.valid_to)
    else:
        assert kept == []
    assert ledger.verify() == []


def test_an_unchanged_line_is_one_more_source_of_the_live_fact(ledger: Ledger, build: Any) -> None:
    build.add(LIVE)
    later = replace(LIVE, valid_from="2025-06", source="the fax")
    assert ledger.receive_batch("acme", build.file([later], "later.jsonl"), "{}") is None
    sources = ledger.fact(LIVE.id).sources
    assert [(found.source.path, found.stated_source) for found in sources] == [
        ("facts.jsonl", None),
        ("later.jsonl", "the fax"),
    ]
    assert len(ledger._rows("SELECT id FROM facts")) == 1


def test_a_value_that_was_live_once_is_not_put_on_record_again(ledger: Ledger, build: Any) -> None:
    newer = replace(LIVE, target="Otto", valid_from="2026-01")
    build.add(LIVE)
    build.add(newer)
    assert verdict(ledger, build, LIVE) == ["unchanged"]
    assert build.receive([LIVE]) is None
    assert ledger.live_facts("acme") == [newer]


def test_a_file_staged_before_something_changed_is_judged_again(ledger: Ledger, build: Any, builder_of: Any) -> None:
    with ledger.stage("acme", build.file([LIVE])) as staged:
        assert staged.counts.new == 1
        with Ledger.open(ledger.path) as other:
            builder_of(other).add(replace(LIVE, target="Otto", valid_from="2025-01"))
        batch = ledger.receive_batch("acme", staged, "{}")
        assert batch is not None
        assert (batch.facts_new, batch.facts_superseding) == (0, 1)


def test_a_reader_may_stage_and_leaves_no_trace(ledger: Ledger, build: Any) -> None:
    build.add(LIVE)
    with Ledger.open(ledger.path, readonly=True) as reader:
        assert verdict(reader, build, replace(LIVE, target="Otto")) == ["superseding"]
        assert reader._rows("SELECT name FROM temp.sqlite_master WHERE type = 'table'") == []
    assert ledger.verify() == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024", "2024-01-01"),
        ("2024-05", "2024-05-01"),
        ("2024-05-06", "2024-05-06"),
        ("2024-05-06T00:00:00Z", "2024-05-06"),
        ("2024-05-06T00:30:00+01:00", "2024-05-05T23:30:00"),
        ("0001-01-01T00:00:00+05:00", "0001-01-01"),
        ("soon", None),
        (None, None),
    ],
)
def test_instants_sort_by_time(text: str | None, expected: str | None) -> None:
    assert instant(text) == expected


facts_of_few_words = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["a", "A?", "b", "c"]), "target": st.sampled_from(["x", "y"])},
    optional={
        "subject": st.sampled_from(["s", "S"]),
        "relation": st.just("r"),
        "paraphrases": st.lists(st.sampled_from(["d", "e", "b!"]), max_size=2, unique=True),
        "valid_from": st.sampled_from(["2024", "2025"]),
    },
)


@given(records=st.lists(facts_of_few_words, min_size=1, max_size=8))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_is_judged_as_the_reader_judges_it(records: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    with Ledger.create(tmp_path / "ledger.db") as ledger:
        for skip_invalid in (False, True):
            read, refusal = read_or_refuse(file, skip_invalid)
            if read is None:
                with pytest.raises(FactsError) as caught, staged_stream(ledger, file, skip_invalid):
                    pass
                assert (caught.value.message, caught.value.details) == refusal
                continue
            with staged_stream(ledger, file, skip_invalid) as staged:
                assert staged.diff().new == tuple(located.fact for located in read.facts)
                assert tuple(staged.problems()) == read.skipped


def read_or_refuse(file: Path, skip_invalid: bool) -> tuple[FactsFile | None, tuple[str, tuple[str, ...]]]:
    try:
        return read_facts(file, skip_invalid=skip_invalid), ("", ())
    except FactsError as error:
        return None, (error.message, error.details)


def staged_stream(ledger: Ledger, file: Path, skip_invalid: bool) -> AbstractContextManager[Staged]:
    return ledger.stage("acme", FactStream(file), skip_invalid=skip_invalid)
