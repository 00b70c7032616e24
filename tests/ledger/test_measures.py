"""Measures of releases: kept as they were taken, counted by the newest run, sealed, and emptied by a purge."""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from memupdate.facts.model import Fact
from memupdate.ledger import Ledger
from memupdate.ledger.measures import MeasureRecord, TextRecord, TokenRecord
from memupdate.ledger.migrations import MIGRATIONS
from memupdate.ledger.records import ProofRecord

LEEDS = Fact("Where is Acme?", "Leeds", subject="Acme", relation="city", paraphrases=("Acme's city?",))
YORK = replace(LEEDS, target="York")
BOLT = Fact("Where is Bolt?", "Hull", subject="Bolt", relation="city")
JUDGED = ("exact", "normalised", "contained", "other")


def asked(release: str, fact: Fact | None = LEEDS, **values: Any) -> MeasureRecord:
    given_: dict[str, Any] = {
        "release": release, "engine": "in-process", "measure": "generality", "part": "held-out phrasing",
        "fact": fact.id if fact else None, "style": "chat", "prompt": "Acme's city?", "expected": "Leeds", "answer": None,
        "judged": "exact", "min_probability": 0.9,
    }  # fmt: skip
    return MeasureRecord(**{**given_, **values})


def test_what_was_measured_comes_back(ledger: Ledger, build: Any) -> None:
    name = build.add(LEEDS, BOLT).name
    rows = [
        asked(name),
        asked(name, None, measure="locality", part="workspace probe", answer="Hull \ud800", judged="other"),
    ]
    text = TextRecord(name, "held-out anchors", 4032, 5.0, 5.1, 0.01)
    tokens = [TokenRecord(name, LEEDS.id, i, token, 0.6, "Y", 0.3) for i, token in enumerate(("Le", "eds"))]
    ledger.record_measures(name, rows, [text], tokens)
    found = ledger.measures(name)
    assert [replace(row, measured_at_utc="") for row in found] == [rows[0], replace(rows[1], answer="Hull ?")]
    assert ledger.measures(name, fact=LEEDS.id) == found[:1]
    stored = ledger.text_measure(name)
    assert stored is not None
    assert replace(stored, measured_at_utc="") == text
    assert stored.perplexity_ratio == pytest.approx(1.02)
    (strip,) = ledger.fact_tokens(name, limit=5)
    assert (strip.prompt, strip.target, [t.token for t in strip.tokens]) == (LEEDS.prompt, LEEDS.target, ["Le", "eds"])
    assert ledger.verify() == []
    assert ledger.text_measure("acme@v9") is None
    assert ledger.fact_tokens("acme@v9", limit=5) == ledger.measures("acme@v9") == []


def test_recall_under_the_own_prompt_is_that_of_the_proofs(ledger: Ledger, build: Any) -> None:
    name = build.add(LEEDS, BOLT).name
    ledger.record_proofs(
        [ProofRecord(name, LEEDS.id, "served", True, 0.8), ProofRecord(name, BOLT.id, "served", False, 0.2)]
    )
    (count,) = ledger.measure_counts(name)
    assert (count.engine, count.measure, count.part, count.asked, count.exact, count.contained) == (
        "served", "recall", "own prompt", 2, 1, 1,
    )  # fmt: skip
    assert (count.exact_share, count.min_probability) == (0.5, 0.2)


@given(st.lists(st.tuples(st.sampled_from(JUDGED), st.sampled_from(["a", "b"])), min_size=1, max_size=12))
@settings(max_examples=25)
def test_counts_are_those_of_the_newest_run(
    builder_of: Any, tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, str]]
) -> None:
    with Ledger.create(tmp_path_factory.mktemp("counts") / "ledger.db") as ledger:
        name = builder_of(ledger).add(LEEDS).name
        ledger.record_measures(name, [asked(name, judged="other", part="old", measured_at_utc="")])
        ledger._execute("DROP TRIGGER measures_no_update")
        ledger._execute("UPDATE measures SET measured_at_utc = '2020'")
        ledger.record_measures(name, [asked(name, judged=judged, part=part) for judged, part in rows])
        expected = {part: Counter(j for j, p in rows if p == part) for _, part in rows}
        counts = {c.part: c for c in ledger.measure_counts(name)}
        assert counts.keys() == expected.keys()
        for part, found in expected.items():
            strict = [sum(found[j] for j in JUDGED[: n + 1]) for n in range(3)]
            assert [counts[part].exact, counts[part].normalised, counts[part].contained] == strict
            assert counts[part].asked == found.total()


def test_rows_are_fixed_and_sealed(ledger: Ledger, build: Any, tmp_path: Path) -> None:
    name = build.add(LEEDS).name
    ledger.record_measures(name, [asked(name)], [TextRecord(name, "c", 1, 1.0, 1.0, 0.0)], [
        TokenRecord(name, LEEDS.id, 0, "L", 0.6, "Y", 0.3)
    ])  # fmt: skip
    for change in (
        "UPDATE measures SET judged = 'other'", "DELETE FROM measures", "UPDATE text_measures SET tokens = 2",
        "DELETE FROM text_measures", "UPDATE token_probabilities SET token = NULL", "DELETE FROM token_probabilities",
    ):  # fmt: skip
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            ledger._execute(change)
    with sqlite3.connect(tmp_path / "ledger.db") as stranger:
        stranger.execute("DROP TRIGGER measures_no_update")
        stranger.execute("UPDATE measures SET judged = 'other'")
    stranger.close()
    assert f"measures: measures of release {name} was altered" in ledger.verify()


def test_a_purge_takes_the_texts_out_and_nothing_else(ledger: Ledger, build: Any, tmp_path: Path) -> None:
    first, second = build.add(LEEDS, BOLT).name, build.add(YORK).name
    ledger.record_measures(first, [asked(first)], (), [TokenRecord(first, LEEDS.id, 0, "Leeds", 0.6, "Hull", 0.3)])
    ledger.record_measures(
        second,
        [
            asked(second, YORK, prompt="Acme's place?", expected="York", answer="Leed", judged="other"),
            asked(second, BOLT, prompt="Where is Bolt?", expected="Hull", answer="Hull or Leeds", judged="contained"),
            asked(second, BOLT, measure="locality", part="same relation", prompt="Where's Cog?", expected="Goole"),
        ],
        (),
        [TokenRecord(second, YORK.id, 0, "York", 0.6, "Leeds", 0.3)],
    )
    ledger.purge(ledger.facts_to_purge([LEEDS.id], []), purged_by="tester")
    ledger.scrub()
    (own,) = ledger.measures(first)
    assert (own.prompt, own.expected, own.answer, own.judged) == ("[purged]", "[purged]", None, "exact")
    newer, other, neighbour = ledger.measures(second)
    assert newer.answer is None
    assert (other.prompt, other.expected, other.answer) == ("Where is Bolt?", "Hull", None)
    assert (neighbour.prompt, neighbour.expected) == ("Where's Cog?", "Goole")
    assert [t.token for f in ledger.fact_tokens(first, limit=1) for t in f.tokens] == [None]
    assert [(t.token, t.best_token) for f in ledger.fact_tokens(second, limit=1) for t in f.tokens] == [("York", None)]
    assert ledger.verify() == []
    assert b"Leed" not in (tmp_path / "ledger.db").read_bytes()


def test_an_old_ledger_with_releases_and_proofs_gets_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    database = Database(path)
    MIGRATIONS.apply(database, stop_before="m015_measures")
    database.execute("INSERT INTO collections VALUES ('acme', '2026')")
    database.execute("INSERT INTO facts VALUES ('f', 'k', 'Q?', 'A', NULL, NULL, '{}', '2026')")
    database.execute(
        "INSERT INTO releases (name, collection, version, relative_path, digest, rank, placement, base_fingerprint, "
        "created_at_utc) VALUES ('acme@v1', 'acme', 1, 'r', 'd', 8, 'mlp-all', 'b', '2026')"
    )
    database.execute(
        "INSERT INTO proofs (release, fact, engine, proved, min_probability, proved_at_utc) "
        "VALUES ('acme@v1', 'f', 'served', 1, 0.7, '2026')"
    )
    database.conn.commit()
    database.close()
    with Ledger.open(path) as ledger:
        assert [(c.part, c.exact) for c in ledger.measure_counts("acme@v1")] == [("own prompt", 1)]
        ledger.record_measures("acme@v1", [asked("acme@v1", None)])
        assert [(c.measure, c.exact) for c in ledger.measure_counts("acme@v1")] == [("generality", 1), ("recall", 1)]
