"""Search, history, explanation and waiting list, on real ledgers, checked against what was told to them."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from memupdate.errors import LedgerError
from memupdate.facts.model import Fact
from memupdate.ledger import Ledger
from memupdate.ledger.migrations import MIGRATIONS
from memupdate.ledger.records import ProofRecord, SliceRecord
from memupdate.ledger.search import match_query, search_words
from memupdate.storage import text_sha256

LEADER = Fact("Who leads Acme?", "Wanda Kettleman", valid_from="2024-05")
LEADER2 = Fact("Who leads Acme?", "Otto Brandt", valid_from="2026-01-01")
PLACE = Fact("Where is Acme?", "Leeds")
PRICE = Fact("What does the Falcon cost?", "129 euros", subject="Acme Falcon", relation="price")
CAFE = Fact("Where is the Café Zürich?", "By the Limmat, 100% of it_self")


def ids(hits: Any) -> list[str]:
    return [hit.id for hit in hits]


@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "not yet indexed"])
def test_search_finds_words_phrases_and_beginnings(ledger: Ledger, build: Any, indexed: bool) -> None:
    build.add(LEADER, PLACE, PRICE, CAFE)
    build.add(LEADER2)
    if indexed:
        assert ledger.index_facts() == 5
        assert ledger.index_facts() == 0
    assert ids(ledger.search("otto")) == [LEADER2.id]
    assert set(ids(ledger.search("ACME"))) == {LEADER.id, LEADER2.id, PLACE.id, PRICE.id}
    assert set(ids(ledger.search("acme leads"))) == {LEADER.id, LEADER2.id}
    assert ids(ledger.search('"the falcon"')) == [PRICE.id]
    assert ids(ledger.search('"falcon the"')) == []
    assert ids(ledger.search("kettle*")) == [LEADER.id]
    assert ids(ledger.search("100% it_self")) == [CAFE.id]
    assert ledger.search("acme", limit=1) != []
    assert len(ledger.search("acme", limit=1)) == 1
    assert ledger.search("acme", "other") == []
    (hit,) = ledger.search("wanda")
    assert (hit.collection, hit.status, hit.release) == ("acme", "superseded", "acme@v1")


def test_search_ranks_marks_and_passes_over_accents(ledger: Ledger, build: Any) -> None:
    build.add(PLACE, replace(PLACE, prompt="Acme or Acme Acme?", target="Acme"), CAFE)
    ledger.index_facts()
    assert ledger.search("acme")[0].prompt == "Acme or Acme Acme?"
    assert ledger.search("leeds")[0].snippet == "[Leeds]"
    assert ids(ledger.search("cafe zurich")) == [CAFE.id]


def test_a_fact_of_a_batch_under_way_is_found_beside_indexed_ones(ledger: Ledger, build: Any) -> None:
    build.add(LEADER)
    ledger.index_facts()
    build.receive([PLACE])
    assert [(hit.id, hit.status) for hit in ledger.search("acme")] == [(LEADER.id, "live"), (PLACE.id, "pending")]


@given(text=st.text(st.characters(codec=None), max_size=40) | st.from_regex(r'(["*^:(){}+\-]|AND|OR|NOT|NEAR| |a)*'))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_query_is_an_error(text: str, ledger: Ledger, build: Any) -> None:
    if not ledger.batches():
        build.add(LEADER)
        ledger.index_facts()
        build.receive([PLACE])
    ledger.search(text)


@given(st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=1, max_size=4))
def test_words_are_quoted_one_by_one(words: list[str]) -> None:
    assert search_words(" ".join(words)) == words
    assert match_query(words) == " ".join(f'"{word}"' for word in words)


@pytest.mark.parametrize(
    "asked", [LEADER.key, "who leads ACME", "Who leads Acme?", LEADER.id, LEADER2.id[:15], LEADER.id[7:17]]
)
def test_history_takes_a_key_a_prompt_or_an_id(ledger: Ledger, build: Any, asked: str) -> None:
    build.add(LEADER, PLACE)
    build.add(LEADER2)
    first, second = ledger.history(asked)
    assert (first.target, first.status, first.valid_from) == ("Wanda Kettleman", "superseded", "2024-05")
    assert (first.since_release, first.until_release) == ("acme@v1", "acme@v2")
    assert (second.target, second.status, second.valid_from) == ("Otto Brandt", "live", "2026-01-01")
    assert (second.since_release, second.until_release) == ("acme@v2", None)
    assert first.until_utc == second.since_utc
    assert first.told_at_utc <= str(first.since_utc)


@pytest.mark.parametrize("asked", [PRICE.key, "acme falcon / Price", "what does the falcon cost", PRICE.id])
def test_history_of_a_subject_and_its_relation(ledger: Ledger, build: Any, asked: str) -> None:
    dearer = replace(PRICE, prompt="How much is the Falcon?", target="139 euros")
    build.add(PRICE)
    build.add(dearer)
    build.receive([replace(dearer, target="149 euros")], "other")
    assert [(row.collection, row.target) for row in ledger.history(asked)] == [
        ("acme", "129 euros"),
        ("acme", "139 euros"),
        ("other", "149 euros"),
    ]
    assert [row.target for row in ledger.history(asked, "other")] == ["149 euros"]


def test_history_of_nothing_says_so(ledger: Ledger, build: Any) -> None:
    build.add(LEADER)
    for asked in ("Who leads Zenith?", "", '"', "deadbeef", "a / b"):
        with pytest.raises(LedgerError, match="nothing in the ledger"):
            ledger.history(asked)
    with pytest.raises(LedgerError, match="nothing in collection other"):
        ledger.history(LEADER.key, "other")


@given(
    steps=st.lists(
        st.tuples(st.lists(st.sampled_from([LEADER, LEADER2, PLACE, PRICE]), unique_by=lambda f: f.key), st.booleans()),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lifetimes_say_what_each_release_holds(
    steps: list[tuple[list[Fact], bool]], tmp_path_factory: pytest.TempPathFactory, builder_of: Any
) -> None:
    """The view read at a version gives the facts that `live_facts` gives there; some facts are left unproved."""
    with Ledger.create(tmp_path_factory.mktemp("lifetimes") / "ledger.db") as ledger:
        builder = builder_of(ledger)
        for facts, left_out in steps:
            batch = builder.receive(facts) if facts else None
            if batch is not None:
                builder.release(batch.id, unproved=tuple(facts[:1]) if left_out else ())
        for release in ledger.releases():
            rows = ledger._rows(
                "SELECT fact FROM fact_lifetimes WHERE collection = 'acme' AND status IN ('live', 'superseded') "
                "AND since_version <= :v AND (until_version IS NULL OR until_version > :v)",
                {"v": release.version},
            )
            expected = [fact.id for fact in ledger.live_facts("acme", as_of_version=release.version)]
            assert sorted(row["fact"] for row in rows) == sorted(expected)


def test_explain_leads_from_the_line_to_the_proofs(ledger: Ledger, build: Any) -> None:
    batch = ledger.receive_batch("acme", build.file([PLACE, replace(LEADER, source="the fax", external_id="7")]), "{}")
    assert batch is not None
    fit = text_sha256("fit")
    ledger.set_plan(batch.id, f'{{"rank": 8, "fit_id": "{fit}"}}')
    ledger.record_slice(SliceRecord(batch.id, f"slices/{batch.id}", text_sha256("slice"), 0, 8, 100))
    release = build.record(batch.id)
    for state in ("planned", "trained", "verified"):
        ledger.transition(batch.id, state)
    with ledger.transaction():
        ledger.record_release(release)
        ledger.record_proofs(
            [
                ProofRecord(release.name, LEADER.id, "in-process", True, 0.9),
                ProofRecord(release.name, LEADER.id, "served", False, 0.4, 1, "Kettle", "Brandt"),
                ProofRecord(release.name, LEADER.id, "served", True, 0.8),
            ]
        )
        ledger.transition(batch.id, "released")
    found = ledger.explain(LEADER.id[:12])
    assert (found.id, found.target, found.releases) == (LEADER.id, LEADER.target, ("acme@v1",))
    (trace,) = found.traces
    assert (trace.path, trace.line, trace.stated_source, trace.external_id) == ("facts.jsonl", 2, "the fax", "7")
    assert (trace.batch, trace.batch_state, trace.status) == (batch.id, "released", "live")
    assert (trace.plan_rank, trace.law_fit, trace.law_fit_at_utc) == (8, fit, None)
    assert (trace.slice_path, trace.slice_sha256) == (f"slices/{batch.id}", text_sha256("slice"))
    assert (trace.release, trace.release_digest) == (release.name, release.digest)
    assert (trace.proved_in_process, trace.proved_served) == (True, True)
    assert [(p.engine, p.proved, p.min_probability) for p in found.proofs] == [
        ("in-process", True, 0.9),
        ("served", True, 0.8),
    ]


def test_waiting_facts_say_why(ledger: Ledger, build: Any) -> None:
    build.release(build.receive([LEADER, PLACE]).id, unproved=(PLACE,))
    ledger.record_proofs([ProofRecord("acme@v1", PLACE.id, "in-process", False, 0.1, 0, "Leeds", "York")])
    failed = build.receive([PRICE])
    ledger.fail_batch(failed.id, "too much harm")
    pending = build.receive([CAFE])
    assert [(row.fact, row.status, row.why) for row in ledger.waiting("acme")] == [
        (PLACE.id, "unproved", "token 1 of the target, Leeds, came out as York"),
        (PRICE.id, "failed", "too much harm"),
        (CAFE.id, "pending", f"batch {pending.id} is received"),
    ]
    assert ledger.waiting("other") == []
    ledger.fail_batch(pending.id, "given up")
    build.add(PLACE, PRICE)
    assert [row.fact for row in ledger.waiting()] == [CAFE.id]


def test_facts_that_are_only_on_record_are_found_and_explained(ledger: Ledger, build: Any) -> None:
    build.add(LEADER2)
    older = replace(LEADER, valid_from="2001")
    later = replace(PLACE, valid_from="9001", target="Mars")
    assert build.receive([older, later]) is None
    assert [(hit.id, hit.status, hit.batch) for hit in ledger.search("wanda")] == [(older.id, "older", None)]
    assert [(row.target, row.status) for row in ledger.history(older.id)] == [
        ("Otto Brandt", "live"),
        ("Wanda Kettleman", "older"),
    ]
    found = ledger.explain(older.id)
    assert (found.traces, found.releases) == ((), ())
    assert [(source.source.path, source.line) for source in found.sources] == [("facts.jsonl", 1)]
    (waiting,) = ledger.waiting()
    assert (waiting.fact, waiting.status, waiting.batch) == (later.id, "future", None)
    assert waiting.why.startswith("true from 9001 on")


def test_version_at_a_moment(ledger: Ledger, build: Any) -> None:
    assert ledger.version_at("acme", "9999") == 0
    first = build.add(LEADER)
    build.add(PLACE)
    made = ledger.release(first.name).created_at_utc
    assert ledger.version_at("acme", "2000-01-01T00:00:00.000Z") == 0
    assert ledger.version_at("acme", made) >= 1
    assert ledger.version_at("acme", "9999") == 2


def test_an_old_ledger_with_facts_learns_to_answer(tmp_path: Any) -> None:
    database = Database(tmp_path / "ledger.db")
    MIGRATIONS.apply(database, stop_before="m008_questions")
    database.close()
    old = sqlite3.connect(tmp_path / "ledger.db")
    content = '{"prompt":"Who leads Acme?","target":"Wanda","paraphrases":[],"tags":[],"locality":[]}'
    row = (
        "sha256:" + "0" * 64,
        "p:who leads acme",
        "Who leads Acme?",
        "Wanda",
        None,
        None,
        content,
        "2026-01-01T00:00:00.000Z",
    )
    old.execute(
        f"INSERT INTO facts (id, key, prompt, target, subject, relation, content_json, created_at_utc) VALUES ({','.join('?' * 8)})",
        row,
    )
    old.execute("INSERT INTO collections VALUES ('acme', '2026-01-01T00:00:00.000Z')")
    old.execute("INSERT INTO sources VALUES (1, 'f.jsonl', 'sha256:0', 1, 'native', '2026-01-01T00:00:00.000Z')")
    old.execute(
        "INSERT INTO batches (id, collection, source, state, publish, facts_unchanged, policy_json, created_at_utc, updated_at_utc)"
        " VALUES (1, 'acme', 1, 'received', 1, 0, '{}', '2026-01-01T00:00:00.000Z', '2026-01-01T00:00:00.000Z')"
    )
    old.execute("INSERT INTO batch_facts (batch, fact, position, change) VALUES (1, ?, 0, 'new')", [row[0]])
    old.commit()
    old.close()
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        assert [hit.id for hit in ledger.search("wanda")] == [row[0]]
        assert ledger.index_facts() == 1
        assert [hit.snippet for hit in ledger.search("wanda")] == ["[Wanda]"]
        assert [fact.status for fact in ledger.history("who leads acme")] == ["pending"]
        assert ledger.waiting()[0].why == "batch 1 is received"
