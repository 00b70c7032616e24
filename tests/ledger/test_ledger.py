"""What the ledger promises about facts, batches and releases."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memupdate.errors import LedgerError, UsageError
from memupdate.facts.contradictions import wordings
from memupdate.facts.model import Fact, Probe
from memupdate.law.points import LawPoint
from memupdate.ledger import Ledger
from memupdate.ledger.content import fact_json, parse_fact
from memupdate.ledger.records import ProofRecord, SliceRecord
from memupdate.ledger.rules import now_instant, outside_its_time

A = Fact("Who leads Acme?", "Wanda Kettleman")
A2 = Fact("Who leads Acme?", "Otto Brandt")
B = Fact("Where is Acme?", "Leeds")
C = Fact("What does Acme make?", "Anvils")

anything = st.text(st.characters(codec=None), max_size=12)  # lone surrogates and NULs too
words = st.lists(anything, max_size=3).map(tuple)
any_fact = st.builds(
    Fact,
    prompt=anything,
    target=anything,
    subject=st.none() | anything,
    relation=st.none() | anything,
    paraphrases=words,
    locality=st.lists(st.builds(Probe, anything, st.none() | anything), max_size=2).map(tuple),
    source=st.none() | anything,
    valid_from=st.none() | anything,
    tags=words,
    rendering=st.sampled_from(["auto", "chat", "completion"]),
    separator=st.sampled_from(["", " ", "\n"]),
    external_id=st.none() | anything,
)


@given(any_fact)
def test_any_fact_survives_its_json(fact: Fact) -> None:
    again = parse_fact(fact_json(fact))
    assert again == fact
    assert (again.id, again.key) == (fact.id, fact.key)
    assert fact_json(fact).isascii()


def ask_different_questions(facts: list[Fact]) -> bool:
    asked = [question for fact in facts for question in {fact.key, *wordings(fact)}]
    return len(set(asked)) == len(asked)


@given(facts=st.lists(any_fact, min_size=1, max_size=6).filter(ask_different_questions))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_fact_in_is_the_same_fact_out(
    facts: list[Fact], tmp_path_factory: pytest.TempPathFactory, builder_of: Any
) -> None:
    with Ledger.create(tmp_path_factory.mktemp("any") / "ledger.db") as ledger:
        builder = builder_of(ledger)
        batch = builder.receive(facts)
        if batch is not None:  # None where all of them are past or to come
            told = [item.fact for item in ledger.batch_facts(batch.id)]
            assert told == [fact for fact in facts if outside_its_time(fact, now_instant()) is None]
            assert ledger.live_facts("acme") == []
            assert ledger.live_facts("acme", with_batch=batch.id) == told
            builder.release(batch.id)
            assert ledger.live_facts("acme") == told
            assert ledger.live_count("acme") == len(told)
            assert [ledger.live_fact("acme", fact.key) for fact in told] == told
            assert ledger.diff("acme", facts).unchanged == tuple(facts)
        assert ledger.verify() == []


def test_a_file_that_changes_nothing_makes_no_batch_but_is_remembered(ledger: Ledger, build: Any) -> None:
    build.add(A, B)
    again = ledger.receive_batch(
        "acme", build.file([replace(B, source="the fax", external_id="7")], "later.jsonl"), "{}"
    )
    assert again is None
    assert len(ledger.batches()) == 1
    sources = ledger.fact(B.id).sources
    assert [(s.source.path, s.line, s.stated_source, s.external_id) for s in sources] == [
        ("facts.jsonl", 2, None, None),
        ("later.jsonl", 1, "the fax", "7"),
    ]
    assert ledger.receive_batch("acme", build.file([B], "later.jsonl"), "{}") is None
    assert [event.kind for event in ledger.events()].count("unchanged") == 2


def test_diff_keeps_order_and_tells_new_from_superseding_from_unchanged(ledger: Ledger, build: Any) -> None:
    build.add(A, B)
    diff = ledger.diff("acme", [C, A2, B])
    assert diff.new == (C,)
    assert diff.superseding == ((A2, A),)
    assert diff.unchanged == (B,)
    assert ledger.diff("other", [A]).new == (A,)


def test_what_was_live_at_each_release(ledger: Ledger, build: Any) -> None:
    build.add(A, B)
    build.add(A2, C)
    assert ledger.live_facts("acme", as_of_version=1) == [A, B]
    assert ledger.live_facts("acme") == ledger.live_facts("acme", as_of_version=2) == [B, A2, C]
    assert ledger.superseded_facts("acme") == [A]
    assert ledger.superseded_facts("acme", as_of_version=1) == []
    assert ledger.live_facts("acme", as_of_version=0) == []
    # Back to the old value: the very same fact, live again.
    build.add(A)
    assert ledger.live_facts("acme") == [B, C, A]
    assert ledger.superseded_facts("acme") == [A2]
    detail = ledger.fact(A.id[:20])
    assert detail.releases == ("acme@v1", "acme@v3")
    assert [entry.status for entry in detail.history] == ["superseded", "live"]
    assert [(entry.fact, entry.status) for entry in ledger.key_history(A.key)] == [
        (A, "superseded"),
        (A2, "superseded"),
        (A, "live"),
    ]


def test_an_unfinished_batch_shows_what_will_be_live(ledger: Ledger, build: Any) -> None:
    build.add(A, B)
    batch = build.receive([A2, C])
    assert ledger.live_facts("acme") == [A, B]
    assert ledger.live_facts("acme", with_batch=batch.id) == [B, A2, C]
    assert ledger.superseded_facts("acme", with_batch=batch.id) == [A]
    ledger.set_outcomes(batch.id, {C.id: False})
    assert ledger.live_facts("acme", with_batch=batch.id) == [B, A2]
    build.release(batch.id, unproved=(C,))
    assert ledger.live_facts("acme", with_batch=batch.id) == [B, A2]
    assert ledger.live_facts("other", with_batch=batch.id) == []


def test_an_unproved_fact_is_not_live_and_its_old_value_does_not_return(ledger: Ledger, build: Any) -> None:
    build.add(A)
    build.add(A2, B, unproved=(A2,))
    assert ledger.live_facts("acme") == [B]
    assert ledger.superseded_facts("acme") == [A]
    assert {entry.fact: entry.status for entry in ledger.facts_list(status=None)} == {
        A: "superseded",
        A2: "unproved",
        B: "live",
    }
    assert ledger.diff("acme", [A2]).new == (A2,)
    build.add(A2)
    assert ledger.live_facts("acme") == [B, A2]


def test_collections_do_not_see_each_other(ledger: Ledger, build: Any) -> None:
    build.add(A)
    other = build.receive([A2], "umbrella")
    build.release(other.id)
    assert ledger.live_facts("acme") == [A]
    assert ledger.live_facts("umbrella") == [A2]
    assert ledger.collections() == ["acme", "umbrella"]
    assert [release.name for release in ledger.releases("umbrella")] == ["umbrella@v1"]
    with pytest.raises(UsageError, match="not a name for a collection"):
        build.receive([B], "../etc")


def test_facts_of_a_failed_batch_can_come_again(ledger: Ledger, build: Any) -> None:
    first = build.receive([A])
    with pytest.raises(LedgerError, match=r"batch 1 is unfinished") as caught:
        build.receive([B])
    assert "memupdate resume" in caught.value.hint
    ledger.fail_batch(first.id, "loss was NaN")
    assert ledger.batch(first.id).failure_reason == "loss was NaN"
    assert ledger.facts_list(status=None)[0].status == "failed"
    second = build.receive([A])
    assert second.id != first.id
    build.release(second.id)
    assert ledger.live_facts("acme") == [A]
    assert [entry.status for entry in ledger.fact(A.id).history] == ["failed", "live"]


def test_a_release_whose_batch_failed_afterwards_counts_nowhere(ledger: Ledger, build: Any) -> None:
    build.add(A, B)
    batch = build.receive([A2, C])
    build.release(batch.id, publish=False)
    assert ledger.live_facts("acme") == [B, A2, C]
    ledger.fail_batch(batch.id, "the engine does not recall it")
    assert ledger.live_facts("acme") == [A, B]
    assert ledger.live_facts("acme", as_of_version=2) == [B, A2, C], "asked for by name, it is what it holds"
    assert ledger.latest_release("acme").name == "acme@v1"
    assert [release.name for release in ledger.releases()] == ["acme@v1", "acme@v2"]
    assert [release.name for release in ledger.releases(failed=False)] == ["acme@v1"]
    assert ledger.fact(A.id).releases == ("acme@v1",)
    assert ledger.next_version("acme") == 3, "a version is never used twice"
    assert build.add(A2).parent == "acme@v1"
    assert ledger.live_facts("acme") == [B, A2]


def test_only_wanted_publication_leaves_a_batch_unfinished(ledger: Ledger, build: Any) -> None:
    batch = build.receive([A], publish=False)
    build.release(batch.id, publish=False)
    assert ledger.batches(unfinished=True) == []
    assert not ledger.batch(batch.id).is_unfinished
    second = build.receive([B])
    build.release(second.id, publish=False)
    assert [b.id for b in ledger.batches(unfinished=True)] == [second.id]
    assert ledger.batch(second.id).is_unfinished
    ledger.transition(batch.id, "published")


STATES = ["received", "planned", "trained", "verified", "released", "published", "failed"]
ORDER = STATES[:6]


@given(steps=st.lists(st.sampled_from(STATES), max_size=12))
@settings(max_examples=10)
def test_no_walk_leaves_the_state_machine(
    steps: list[str], tmp_path_factory: pytest.TempPathFactory, builder_of: Any
) -> None:
    with Ledger.create(tmp_path_factory.mktemp("walk") / "ledger.db") as ledger:
        builder = builder_of(ledger)
        batch = builder.receive([A]).id
        ledger.set_plan(batch, "{}")
        state = "received"
        for step in [s for known in ORDER[1:] for s in (steps.pop() if steps else known, known)]:
            wanted = state not in ("published", "failed") and (
                step == "failed" or step == ORDER[ORDER.index(state) + 1]
            )
            try:
                with ledger.transaction():
                    if step == "released" and wanted:
                        ledger.record_release(builder.record(batch))
                    if step == "failed":
                        ledger.fail_batch(batch, "because")
                    else:
                        ledger.transition(batch, step)
                assert wanted, f"{state} → {step} was let through"
                state = step
            except LedgerError:
                assert not wanted, f"{state} → {step} was refused"
            assert ledger.batch(batch).state == state
        logged = [event.detail["state"] for event in ledger.events(batch=batch, kind="state")]
        assert logged[-1] == state
        assert logged == ORDER[: len(logged)] or (logged[-1] == "failed" and logged[:-1] == ORDER[: len(logged) - 1])


def test_states_promise_what_they_say(ledger: Ledger, build: Any) -> None:
    batch = build.receive([A]).id
    with pytest.raises(LedgerError, match="has no plan"):
        ledger.transition(batch, "planned")
    ledger.set_plan(batch, "{}")
    for state in ("planned", "trained", "verified"):
        ledger.transition(batch, state)
    with pytest.raises(LedgerError, match="has no release"):
        ledger.transition(batch, "released")
    with pytest.raises(LedgerError, match="its plan is fixed"):
        ledger.set_plan(batch, "{}")
    with pytest.raises(LedgerError, match="has no fact sha256:"):
        ledger.set_outcomes(batch, {A.id: True, B.id: True})
    assert ledger.batch_facts(batch)[0].outcome is None, "the whole call was undone"
    with pytest.raises(LedgerError, match="no such batch"):
        ledger.transition(99, "planned")


def test_a_transaction_is_kept_or_undone_as_a_whole(ledger: Ledger, build: Any) -> None:
    def fall_over() -> None:
        with ledger.transaction():
            batch = build.receive([A])
            ledger.set_plan(batch.id, "{}")
            ledger.transition(batch.id, "planned")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fall_over()
    assert ledger.batches() == []
    assert ledger.events() == []
    assert ledger.collections() == []
    with ledger.transaction():
        build.receive([A])
        with pytest.raises(LedgerError):
            build.receive([B])
    assert [item.fact for item in ledger.batch_facts(ledger.batches()[0].id)] == [A]


def test_rows_are_append_only_also_for_a_plain_sqlite_shell(ledger: Ledger, build: Any, tmp_path: Path) -> None:
    release = build.add(A)
    ledger.record_proofs([ProofRecord(release.name, A.id, "served", True, 0.9)])
    with sqlite3.connect(tmp_path / "ledger.db") as plain:
        for statement in (
            "DELETE FROM facts",
            "UPDATE facts SET target = 'x'",
            "UPDATE releases SET digest = 'x'",
            "DELETE FROM proofs",
            "UPDATE batches SET policy_json = '[]'",
            "DELETE FROM batch_facts",
            "UPDATE batch_facts SET change = 'new'",
            "DELETE FROM events",
        ):
            with pytest.raises(sqlite3.IntegrityError):
                plain.execute(statement)
        row = plain.execute("SELECT release, prompt, path, line, status FROM fact_provenance").fetchone()
        assert row == ("acme@v1", A.prompt, "facts.jsonl", 1, "live")
        assert plain.execute("SELECT prompt, since_release FROM live_facts").fetchall() == [(A.prompt, "acme@v1")]
        assert plain.execute("SELECT facts_new, facts_proved FROM batch_summary").fetchall() == [(1, 1)]


def test_verify_finds_a_fact_that_was_tampered_with(ledger: Ledger, build: Any, tmp_path: Path) -> None:
    build.add(A)
    assert ledger.verify() == []
    with sqlite3.connect(tmp_path / "ledger.db") as plain:
        plain.execute("DROP TRIGGER facts_no_update")
        plain.execute("UPDATE facts SET content_json = replace(content_json, 'Wanda', 'Wilma')")
    assert ledger.verify() == [
        "schema: trigger facts_no_update is missing",
        f"facts: fact {A.id} has other content than its hash is of",
    ]


def test_releases_count_up_and_refuse_what_does_not_fit(ledger: Ledger, build: Any) -> None:
    build.add(A)
    batch = build.receive([B])
    record = build.record(batch.id)
    assert (record.name, record.parent) == ("acme@v2", "acme@v1")
    for wrong in (
        replace(record, version=3, name="acme@v3"),
        replace(record, name="acme@v1", version=1),
        replace(record, version=1),
        replace(record, parent="acme@v9"),
    ):
        with pytest.raises(LedgerError):
            ledger.record_release(wrong)
    ledger.record_release(record)
    stored = ledger.release("acme@v2")
    assert replace(stored, created_at_utc="") == record
    assert stored.created_at_utc.endswith("Z")
    with pytest.raises(LedgerError, match="acme@v7: no such release") as caught:
        ledger.release("acme@v7")
    assert "acme@v1, acme@v2" in caught.value.hint


def test_proofs_are_kept_all_and_read_by_the_newest(ledger: Ledger, build: Any) -> None:
    release = build.add(A, B).name
    failed = ProofRecord(release, A.id, "in-process", False, 0.2, 1, "Kettle", "Brandt")
    ledger.record_proofs([failed, ProofRecord(release, B.id, "in-process", True, 0.9)])
    ledger.record_proofs([ProofRecord(release, A.id, "in-process", True, 0.8)])
    ledger.record_proofs([ProofRecord(release, A.id, "served", True, None)])
    assert [(p.fact, p.proved) for p in ledger.proofs(release, "in-process")] == [(B.id, True), (A.id, True)]
    assert [p.min_probability for p in ledger.proofs(release, "served")] == [None]
    everything = ledger.proofs(release, latest=False)
    assert len(everything) == 4
    assert replace(everything[0], proved_at_utc="") == failed
    assert [p.engine for p in ledger.fact(A.id).proofs] == ["in-process", "in-process", "served"]
    with pytest.raises(sqlite3.IntegrityError):
        ledger.record_proofs([ProofRecord("acme@v9", A.id, "served", True, 0.9)])


def test_slices(ledger: Ledger, build: Any) -> None:
    batch = build.receive([A]).id
    assert ledger.slice(batch) is None
    record = SliceRecord(batch, "slices/1", "sha256:x", 0, 8, 1234)
    ledger.record_slice(record)
    ledger.record_slice(replace(record, relative_path="slices/1b"))
    newest = ledger.slice(batch)
    assert newest is not None
    assert (newest.relative_path, newest.rank_after) == ("slices/1b", 8)


def point(**changes: Any) -> LawPoint:
    base = LawPoint("sha256:b", "mlp-all", "sha256:r", 8, 2880, 64, 315, 5.92, 0.21, 62, None, 60, False, 12.5)
    return replace(base, **changes)


@given(loss=st.floats(0, 20), kl=st.none() | st.floats(0, 1), early=st.booleans(), duration=st.integers(0, 9))
@settings(max_examples=10)
def test_law_points_come_back_equal_and_once(
    loss: float, kl: float | None, early: bool, duration: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    points = [point(loss_after_nats=loss, kl_nats=kl, stopped_early=early, duration_s=duration), point(rank=16)]
    with Ledger.create(tmp_path_factory.mktemp("law") / "ledger.db") as ledger:
        ledger.add_law_points(points)
        ledger.add_law_points(points)
        assert ledger.law_points("sha256:b", "mlp-all", "sha256:r") == points
        assert ledger.law_points("sha256:b", "mlp-one", "sha256:r") == []
        assert ledger.verify_law() == []


def test_the_newest_fit_is_in_use_also_when_an_old_one_returns(ledger: Ledger) -> None:
    recipe = ("sha256:b", "mlp-all", "sha256:r")
    assert ledger.latest_fit(*recipe) is None
    first = ledger.add_fit(*recipe, '{"alpha": 0.3}')
    second = ledger.add_fit(*recipe, '{"alpha": 0.4}')
    assert ledger.add_fit(*recipe, '{"alpha": 0.4}') == second
    assert ledger.latest_fit(*recipe).id == second
    assert ledger.add_fit(*recipe, '{"alpha": 0.3}') == first
    assert ledger.latest_fit(*recipe).fit_json == '{"alpha": 0.3}'
    assert ledger.fit(second).fit_json == '{"alpha": 0.4}'
    assert ledger.fit("sha256:none") is None


def test_listing_searching_and_finding(ledger: Ledger, build: Any) -> None:
    build.add(A, B, Fact("100% of_what?", "it", subject="Percent"))
    build.add(C)
    assert [entry.fact for entry in ledger.facts_list("acme", limit=1, offset=1)] == [B]
    assert ledger.count_facts("acme") == 4
    assert [entry.fact for entry in ledger.facts_list(search="wanda")] == [A]
    assert [entry.fact.prompt for entry in ledger.facts_list(search="100%")] == ["100% of_what?"]
    assert ledger.facts_list(search="%w%") == []
    assert ledger.count_facts(search="percent") == 1
    assert ledger.count_facts("umbrella") == 0
    assert ledger.fact(A.id).fact == A
    assert ledger.fact(A.id.removeprefix("sha256:")[:12].upper()).releases == ("acme@v1", "acme@v2")
    for prefix in ("", "zz", "sha256:", "' OR 1=1"):
        with pytest.raises(LedgerError):
            ledger.fact(prefix)
    with pytest.raises(LedgerError, match="no such fact"):
        ledger.fact("f" * 64)


def test_an_ambiguous_prefix_names_the_candidates(ledger: Ledger, build: Any) -> None:
    facts = [Fact(f"q{n}", "a") for n in range(40)]
    build.add(*facts)
    by_digit: dict[str, list[Fact]] = {}
    for fact in facts:
        by_digit.setdefault(fact.id[7], []).append(fact)
    digit, several = next((digit, found) for digit, found in by_digit.items() if len(found) > 1)
    with pytest.raises(LedgerError, match="several facts' ids") as caught:
        ledger.fact(digit)
    assert len(caught.value.details) == len(several)


def test_events_are_the_newest_in_order(ledger: Ledger) -> None:
    for number in range(5):
        ledger.add_event("note", collection="acme", detail={"n": number})
    assert [event.detail["n"] for event in ledger.events(kind="note", limit=2)] == [3, 4]
    assert ledger.events("umbrella") == []
    with pytest.raises(ValueError, match="JSON"):
        ledger.add_event("note", detail={"n": float("nan")})


def test_twenty_thousand_facts(ledger: Ledger, build: Any) -> None:
    facts = [Fact(f"Who runs shop {n}?", f"Person {n}") for n in range(20_000)]
    batch = build.receive(facts)
    build.release(batch.id)
    changed = [replace(fact, target="Nobody") for fact in facts[::2]]
    second = build.receive([*changed, *facts[1::2]])
    assert (second.facts_superseding, second.facts_unchanged, second.facts_new) == (10_000, 10_000, 0)
    assert len(ledger.live_facts("acme", with_batch=second.id)) == 20_000
    assert len(ledger.superseded_facts("acme", with_batch=second.id)) == 10_000
    assert ledger.count_facts(search="shop 1999") == 11
