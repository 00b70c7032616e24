"""A purge takes a text out of every byte of the ledger, leaves the history standing, and nothing else may do so."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memupdate.errors import FactsError, LedgerError
from memupdate.facts.model import Fact, Probe
from memupdate.ledger import Ledger
from memupdate.ledger.maintenance import Retraction
from memupdate.ledger.purges import redacted
from memupdate.ledger.records import ProofRecord

SECRET = Fact(
    "What is the badge of Zelda Quirrel?",
    "Vermilion seven Oxpecker",
    subject="Zelda Quirrel",
    relation="badge",
    paraphrases=("Which badge has Zelda Quirrel?",),
    locality=(Probe("Who is Zelda?"),),
    source="personnel file of Quirrel",
    external_id="quirrel-1",
    tags=("quirrel",),
)
NEWER = replace(SECRET, target="Cobalt nine Bittern", source=None, external_id=None, tags=(), locality=())
OTHER = Fact("Where is Acme?", "Leeds")
WORDS = ("Vermilion", "Oxpecker", "Quirrel", "quirrel", "Zelda", "zelda")


def purge(ledger: Ledger, *ids: str, keys: tuple[str, ...] = (), reason: str | None = None) -> list[Fact]:
    facts = ledger.facts_to_purge(ids, keys)
    ledger.purge(facts, purged_by="tester@here", reason=reason)
    ledger.scrub()
    return facts


def bytes_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file())


def found(folder: Path, words: tuple[str, ...] = WORDS) -> list[str]:
    content = bytes_of(folder)
    return [word for word in words if word.encode() in content]


def test_no_byte_of_the_text_is_left_in_any_file(ledger: Ledger, build: Any, tmp_path: Path) -> None:
    first = build.add(SECRET, OTHER)
    ledger.index_facts()
    ledger.record_proofs(
        [
            ProofRecord(first.name, SECRET.id, "in-process", False, 0.1, 0, "Vermilion", "Oxpecker"),
            ProofRecord(first.name, OTHER.id, "in-process", True, 0.9),
        ]
    )
    failed = build.receive([NEWER])
    ledger.fail_batch(failed.id, f"diverged at {SECRET.prompt!r} → {SECRET.target!r}, {NEWER.target}")
    assert found(tmp_path) == list(WORDS)
    purged = purge(ledger, keys=(SECRET.key,), reason=f"asked by Zelda Quirrel: {SECRET.prompt}")
    assert {fact.id for fact in purged} == {SECRET.id, NEWER.id}
    # The reason is the operator's own text: only what the fact itself said is taken out of it.
    assert found(tmp_path) == ["Quirrel", "Zelda"]
    assert ledger.tombstones()[0].reason == "asked by Zelda Quirrel: [purged]"
    assert ledger.batch(failed.id).failure_reason == "diverged at '[purged]' → '[purged]', [purged]"
    assert found(tmp_path, ("badge", "Cobalt", "Bittern", "personnel")) == []
    assert ledger.verify() == []
    assert [hit.id for hit in ledger.search("leeds")] == [OTHER.id]
    assert ledger.search("vermilion") == ledger.search("badge") == []


def test_the_history_stands_without_the_text(ledger: Ledger, build: Any, tmp_path: Path) -> None:
    build.add(SECRET, OTHER)
    build.add(NEWER)
    purge(ledger, SECRET.id[:20], reason="they asked")
    detail = ledger.fact(SECRET.id)
    assert (detail.fact.id, detail.fact.prompt, detail.fact.target) == (SECRET.id, "[purged]", "[purged]")
    assert [(entry.batch, entry.status, entry.release) for entry in detail.history] == [(1, "purged", "acme@v1")]
    assert detail.releases == ("acme@v1",)
    (source,) = detail.sources
    assert (source.source.path, source.line, source.external_id, source.stated_source) == ("facts.jsonl", 1, None, None)
    (row,) = ledger.history(SECRET.id)
    assert (row.status, row.since_release, row.until_release) == ("purged", "acme@v1", "acme@v2")
    (tombstone,) = ledger.tombstones()
    assert (tombstone.fact, tombstone.purged_by, tombstone.reason) == (SECRET.id, "tester@here", "they asked")
    assert ledger.events(kind="purged")[0].detail["facts"] == [SECRET.id]
    # The newer value has the same prompt and stays; only the old answer is gone.
    assert found(tmp_path, ("Vermilion", "Oxpecker", "personnel")) == []
    assert ledger.live_facts("acme") == [OTHER, NEWER]


def test_what_is_live_without_a_purged_fact(ledger: Ledger, build: Any) -> None:
    build.add(SECRET, OTHER)
    build.add(NEWER)
    purge(ledger, NEWER.id)
    assert ledger.live_facts("acme") == [OTHER]  # what it superseded does not come back
    assert ledger.live_facts("acme", as_of_version=1) == [SECRET, OTHER]
    assert ledger.live_count("acme") == 1
    assert [row.fact.id for row in ledger.facts_list("acme")] == [OTHER.id]
    purge(ledger, SECRET.id)
    assert ledger.live_facts("acme", as_of_version=1) == [OTHER]
    assert ledger.superseded_facts("acme") == ledger.replaced_facts("acme") == []
    assert ledger.waiting() == []


def test_a_purged_fact_is_not_stored_again(ledger: Ledger, build: Any) -> None:
    build.add(SECRET)
    purge(ledger, SECRET.id)
    with pytest.raises(FactsError) as error:
        build.receive([OTHER, SECRET])
    assert "facts.jsonl:2: line: states a fact that was purged on" in error.value.details[0]
    assert ledger.live_facts("acme") == []
    build.add(OTHER, replace(SECRET, target="something else"))


def test_what_stands_in_for_a_retracted_fact_goes_with_it(ledger: Ledger, build: Any, tmp_path: Path) -> None:
    build.add(SECRET, OTHER)
    stand_in = replace(SECRET, target="I do not know.", source=None, external_id=None, tags=(), locality=())
    batch = ledger.receive_retraction("acme", [Retraction(SECRET, stand_in)], "{}", reason=f"not {SECRET.target}")
    build.release(batch.id)
    assert {fact.id for fact in purge(ledger, SECRET.id)} == {SECRET.id, stand_in.id}
    assert found(tmp_path) == []
    assert ledger.batch(batch.id).reason == "not [purged]"
    assert ledger.stand_ins("acme") == []
    assert ledger.verify() == []


def test_releases_hold_it_until_a_compaction_without_it(ledger: Ledger, build: Any) -> None:
    def held() -> list[tuple[str, str]]:
        return [(row.release, row.fact) for row in ledger.releases_with_purged()]

    def compact() -> None:
        build.release(ledger.receive_compaction("acme", "{}").id)

    build.add(OTHER)
    build.add(SECRET)
    compact()  # v3 is written afresh, with it
    build.add(NEWER)  # v4
    compact()  # v5 holds the newer value only
    build.add(Fact("Unrelated?", "Yes"))  # v6
    assert held() == []
    purge(ledger, SECRET.id)
    assert held() == [(f"acme@v{v}", SECRET.id) for v in (2, 3, 4)]
    purge(ledger, NEWER.id)
    newest = [(f"acme@v{v}", NEWER.id) for v in (4, 5, 6)]
    assert sorted(held()) == sorted([(f"acme@v{v}", SECRET.id) for v in (2, 3, 4)] + newest)
    assert [row.fact for row in ledger.releases_with_purged("acme@v6")] == [NEWER.id]
    compact()  # v7
    assert ledger.releases_with_purged("acme@v7") == []
    build.add(Fact("More?", "Yes"))
    assert ledger.releases_with_purged("acme@v8") == []


def test_a_purge_waits_for_an_unfinished_batch_and_names_what_is_not_there(ledger: Ledger, build: Any) -> None:
    build.add(OTHER)
    batch = build.receive([SECRET])
    with pytest.raises(LedgerError, match="nothing was purged: batch 2 is unfinished"):
        ledger.facts_to_purge([SECRET.id], [])
    with pytest.raises(LedgerError) as error:
        ledger.facts_to_purge(["abcdef"], ["no such question"])
    assert "abcdef: no such fact" in error.value.message
    assert "no such question: nothing in the ledger is about this" in error.value.details[0]
    ledger.fail_batch(batch.id, "given up")
    purge(ledger, SECRET.id)
    again = ledger.facts_to_purge([SECRET.id], [])
    ledger.purge(again, purged_by="tester@here")  # finishing a purge that was cut off
    assert len(ledger.tombstones()) == len(ledger.events(kind="purged")) == 1


def test_a_reader_that_holds_on_to_the_old_state_is_told_of(ledger: Ledger, build: Any, tmp_path: Path) -> None:
    build.add(SECRET)
    ledger.index_facts()
    ledger._execute("PRAGMA busy_timeout = 50")
    reader = sqlite3.connect(tmp_path / "ledger.db")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM facts").fetchall()
    with pytest.raises(LedgerError, match=r"another process is reading|busy|writing"):
        purge(ledger, SECRET.id)
    reader.close()
    purge(ledger, SECRET.id)
    assert found(tmp_path) == []


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE facts SET prompt = '[purged]' WHERE id = :other",
        "UPDATE facts SET content_json = '{\"purged\":\"' || id || '\"}', key = 'purged:' || id, prompt = '[purged]', "
        "target = '[purged]', subject = NULL, relation = NULL WHERE id = :other",
        "UPDATE facts SET prompt = 'Who?' WHERE id = :purged",
        "UPDATE facts SET created_at_utc = 'then' WHERE id = :purged",
        "UPDATE fact_sources SET line = 7 WHERE fact = :purged",
        "UPDATE fact_sources SET stated_source = NULL WHERE fact = :other",
        "UPDATE proofs SET proved = 1 WHERE fact = :purged",
        "UPDATE proofs SET failed_token = NULL WHERE fact = :other",
        "UPDATE events SET detail_json = '{}'",
        "UPDATE batches SET reason = 'because'",
        "UPDATE batches SET kind = 'compact', reason = '[purged]'",
        "UPDATE purges SET reason = 'none'",
        "DELETE FROM purges",
        "DELETE FROM facts WHERE id = :purged",
    ],
)
def test_nothing_else_may_be_changed(ledger: Ledger, build: Any, statement: str) -> None:
    release = build.add(SECRET, OTHER)
    ledger.record_proofs(
        [ProofRecord(release.name, fact.id, "in-process", False, 0.1, 0, "a", "b") for fact in (SECRET, OTHER)]
    )
    purge(ledger, SECRET.id)
    with pytest.raises(sqlite3.IntegrityError):
        ledger._execute(statement, {"other": OTHER.id, "purged": SECRET.id})


def test_verify_tells_a_purge_from_tampering(ledger: Ledger, build: Any, tmp_path: Path) -> None:
    build.add(SECRET, OTHER)
    purge(ledger, SECRET.id)
    assert ledger.verify() == []
    raw = sqlite3.connect(tmp_path / "ledger.db")
    for (trigger,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        raw.execute(f"DROP TRIGGER {trigger}")
    raw.execute("UPDATE purges SET reason = 'a lie'")
    raw.execute(
        "UPDATE facts SET content_json = '{\"purged\":\"' || id || '\"}', key = 'purged:' || id WHERE id = ?",
        [OTHER.id],
    )
    raw.commit()
    problems = ledger.verify_purges()
    assert f"purge of {SECRET.id}: its row does not have this hash" in problems
    assert f"fact {OTHER.id}: its text is gone, and no purge says why" in problems
    raw.execute("UPDATE facts SET content_json = '{}' WHERE id = ?", [SECRET.id])
    raw.commit()
    raw.close()
    assert f"purge of {SECRET.id}: the fact still has its text" in ledger.verify_purges()


@given(secret=st.text(min_size=1, max_size=10).filter(lambda text: text.isalnum()))
def test_whole_words_are_taken_out_however_they_are_quoted(secret: str) -> None:
    for text in (secret, f"+ {secret}!", f"{secret!r}", f"«{secret}» {secret}"):
        assert secret not in str(redacted(text, [secret])).replace("[purged]", "")
    assert redacted(f"{secret}x", [secret]) == f"{secret}x"
    assert redacted(None, [secret]) is None
