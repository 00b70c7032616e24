"""Counts of the report against the same counts made by hand from all rows, and that they need the index alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from memupdate.facts.model import Fact
from memupdate.ledger import Ledger, figures
from memupdate.ledger.migrations import MIGRATIONS
from memupdate.ledger.records import ProofRecord

FACTS = [Fact(f"What is {n}?", f"answer {n}") for n in range(4)]
PROOFS = st.lists(
    st.tuples(
        st.integers(0, 2),  # release
        st.integers(0, 3),  # fact
        st.sampled_from(["in-process", "served"]),
        st.booleans(),
        st.none() | st.floats(0, 1),
    ),
    max_size=40,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(proofs=PROOFS)
def test_the_newest_proof_of_each_fact_and_engine_counts(
    proofs: list[tuple[int, int, Any, bool, float | None]], tmp_path_factory: Any, builder_of: Any
) -> None:
    with Ledger.create(tmp_path_factory.mktemp("figures") / "ledger.db") as ledger:
        build = builder_of(ledger)
        names = [build.add(*FACTS).name, build.add(Fact("More?", "1")).name, build.add(Fact("Again?", "2")).name]
        ledger.record_proofs(
            [ProofRecord(names[r], FACTS[f].id, engine, proved, p) for r, f, engine, proved, p in proofs]
        )
        newest = {(r, f, engine): (proved, p) for r, f, engine, proved, p in proofs}
        found = ledger.release_figures("acme")
        for index, release in enumerate(found):
            for item in release.proofs:
                own = [proved for (r, _, engine), (proved, _) in newest.items() if (r, engine) == (index, item.engine)]
                assert (item.facts, item.proved) == (len(own), sum(own))
            assert {i.engine for i in release.proofs} == {engine for r, _, engine in newest if r == index}
            lost = {f for (r, f, _), (proved, _) in newest.items() if r == index and not proved}
            assert release.regressions == sum(any(p[0] < index and p[1] == f and p[3] for p in proofs) for f in lost)
            margins = ledger.margins(release.name, "served", bins=10)
            probabilities = [p for (r, _, engine), (_, p) in newest.items() if (r, engine) == (index, "served")]
            assert margins.facts == len(probabilities)
            assert margins.unknown == probabilities.count(None)
            known = [min(int(p * 10), 9) for p in probabilities if p is not None]
            assert margins.counts == tuple(known.count(bin_) for bin_ in range(10))


def test_weak_facts_are_those_that_failed_then_the_least_sure(build: Any, ledger: Ledger) -> None:
    release = build.add(*FACTS).name
    probabilities = (0.9, 0.6, 0.8, 0.7)
    ledger.record_proofs(
        [ProofRecord(release, f.id, "served", True, p) for f, p in zip(FACTS, probabilities, strict=True)]
    )
    ledger.record_proofs([ProofRecord(release, FACTS[0].id, "in-process", False, 0.2, 1, "a", "b")])
    weak = ledger.weak_facts("acme", release, "served", limit=3)
    assert [fact.fact for fact in weak] == [FACTS[0].id, FACTS[1].id, FACTS[3].id]
    first = weak[0]
    assert (first.times_unproved, first.min_probability, first.is_live) == (1, 0.2, True)
    assert (first.failed_position, first.failed_token, first.emitted_token) == (1, "a", "b")
    build.add(Fact(FACTS[1].prompt, "something else"))
    assert [fact.is_live for fact in ledger.weak_facts("acme", release, "served", limit=3)] == [True, False, True]
    assert ledger.live_count("acme") == len(ledger.live_facts("acme"))


@pytest.mark.parametrize("query", ["_PROVED", "_UNPROVED", "_REGRESSIONS", "_WEAKEST", "_FAILED"])
def test_proofs_are_counted_from_their_index(query: str, ledger: Ledger) -> None:
    parameters = {"collection": "acme", "release": "acme@v1", "engine": "served", "limit": 5}
    steps = [row["detail"] for row in ledger._rows(f"EXPLAIN QUERY PLAN {getattr(figures, query)}", parameters)]
    assert any("COVERING INDEX proofs_by_release" in step for step in steps), steps


def test_proofs_of_an_older_ledger_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    database = Database(path)
    MIGRATIONS.apply(database, stop_before="m006_proof_figures")
    database.execute("INSERT INTO collections VALUES ('acme', '2026-01-01')")
    database.execute(
        "INSERT INTO releases VALUES ('acme@v1', 'acme', 1, NULL, NULL, 'r', 'sha256:d', 8, 'mlp-all', 'sha256:b', '2026-01-01')"
    )
    database.execute("INSERT INTO facts VALUES ('sha256:f', 'k', 'p', 't', NULL, NULL, '{}', '2026-01-01')")
    for proved, probability in ((0, 0.3), (1, 0.8)):
        database.execute(
            "INSERT INTO proofs (release, fact, engine, proved, min_probability, proved_at_utc) VALUES (?, ?, ?, ?, ?, ?)",
            ["acme@v1", "sha256:f", "served", proved, probability, "2026-01-01"],
        )
    database.conn.commit()
    database.close()
    with Ledger.open(path) as ledger:
        (release,) = ledger.release_figures()
        assert [(item.facts, item.proved) for item in release.proofs] == [(1, 1)]
        assert ledger.margins("acme@v1", "served", bins=10).counts[8] == 1
