"""Purges: a fact's text removed from the ledger for good; its id, a tombstone and its place in the history stay.

Invariant: a fact without text has a tombstone that says who purged it, when and why, and nothing of its text is in any file
of the ledger once `scrub` has returned. The schema's triggers allow this one change of append-only rows and no other. A
purged fact is in no list of live facts, supersedes what it superseded, and cannot be stored again. Weights that were
trained on it are not known here to be anything but what they were: `releases_with_purged` names them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from memupdate.errors import LedgerError
from memupdate.facts.model import Fact
from memupdate.ledger.clock import utc_now
from memupdate.ledger.content import PURGED_TEXT, parse_fact, purged_json, storable
from memupdate.ledger.database import plain_errors
from memupdate.ledger.events import Events
from memupdate.ledger.questions import Questions
from memupdate.storage import canonical_json, text_sha256

_WITH_STAND_INS = """
SELECT :fact AS fact UNION SELECT bf.fact FROM batch_facts bf WHERE bf.supersedes = :fact AND bf.change = 'retracting'
"""

_UNFINISHED = """
SELECT DISTINCT b.id, b.state FROM batches b JOIN batch_facts bf ON bf.batch = b.id
WHERE b.state IN ('received', 'planned', 'trained', 'verified') AND b.collection IN (
    SELECT other.collection FROM batch_facts its JOIN batches other ON other.id = its.batch WHERE its.fact = :fact)
"""

_MENTIONS = 5
"""Other facts that are named where a purged answer occurs in them too."""


@dataclass(frozen=True)
class Tombstone:
    """What is left of a purged fact besides its id."""

    fact: str
    at_utc: str
    purged_by: str
    reason: str | None


@dataclass(frozen=True)
class HoldingRelease:
    """A release whose weights were trained on a fact that was purged afterwards."""

    release: str
    collection: str
    version: int
    fact: str
    """Id of the purged fact."""


class Purges(Questions, Events):
    """Removing facts' texts."""

    def facts_to_purge(self, ids: Sequence[str], keys: Sequence[str]) -> list[Fact]:
        """The facts that a purge of `ids` and `keys` would take, each once, with what stands in for retracted ones.

        Args:
            ids: beginnings of facts' ids; one that is purged already is taken again, which finishes a broken purge.
            keys: keys, prompts or `SUBJECT / RELATION`, as for `history`: every value ever told, in all collections.

        Raises:
            LedgerError: something is not there, or an unfinished batch needs one of the facts; all of it is listed.
        """
        problems: list[str] = []
        found: dict[str, Fact] = {}
        for asked in ids:
            try:
                found |= self._with_stand_ins(self.fact(asked).fact.id)
            except LedgerError as error:
                problems += [error.message, *error.details]
        for asked in keys:
            try:
                for value in self.history(asked):
                    found |= self._with_stand_ins(value.fact)
            except LedgerError as error:
                problems.append(error.message)
        for fact in found:
            for row in self._rows(_UNFINISHED, {"fact": fact}):
                problems.append(f"batch {row['id']} is unfinished ({row['state']}): finish it with `memupdate resume`")
        if problems:
            listed = list(dict.fromkeys(problems))
            raise LedgerError(f"nothing was purged: {listed[0]}", "see `memupdate facts list`", listed[1:])
        return list(found.values())

    def _with_stand_ins(self, fact: str) -> dict[str, Fact]:
        ids = [row["fact"] for row in self._rows(_WITH_STAND_INS, {"fact": fact})]
        return {i: parse_fact(self._content(i)) for i in ids}

    def _content(self, fact: str) -> str:
        row = self._row("SELECT content_json FROM facts WHERE id = ?", [fact])
        assert row is not None  # ids come from the ledger
        return str(row["content_json"])

    def purge(self, facts: Sequence[Fact], *, purged_by: str, reason: str | None = None) -> None:
        """Write the tombstones and take the texts out of every row, in one transaction; `scrub` must follow.

        Args:
            facts: as `facts_to_purge` gave them.
            purged_by: who it was.
            reason: kept for good; must not repeat what is purged.
        """
        texts = [text for fact in facts for text in texts_of(fact)]
        clean_reason = redacted(reason, texts)
        now = utc_now()
        with self.transaction():
            new = [fact for fact in facts if not self.is_purged(fact.id)]
            for fact in new:
                tombstone = Tombstone(fact.id, now, purged_by, storable(clean_reason))
                self._insert("purges", {**tombstone.__dict__, "digest": _digest(tombstone)})
                self._blank(fact)
            self._redact_notes(texts)
            # Not emptied word by word: what the index once knew of a fact may lie in several of its pages.
            self.empty_index()
            if new:
                detail = {"facts": [fact.id for fact in new], "by": purged_by, "reason": clean_reason}
                self.add_event("purged", detail=detail)

    def _blank(self, fact: Fact) -> None:
        self._execute(
            "UPDATE facts SET key = 'purged:' || id, prompt = :text, target = :text, subject = NULL, relation = NULL, "
            "content_json = :content WHERE id = :fact",
            {"text": PURGED_TEXT, "content": purged_json(fact.id), "fact": fact.id},
        )
        self._execute("UPDATE fact_sources SET external_id = NULL, stated_source = NULL WHERE fact = ?", [fact.id])
        self._execute("UPDATE proofs SET failed_token = NULL, emitted_token = NULL WHERE fact = ?", [fact.id])
        # What replaced it may have been seen to come out as a piece of the old answer.
        self._execute(
            "UPDATE proofs SET emitted_token = NULL WHERE TRIM(emitted_token) <> '' AND INSTR(:target, TRIM(emitted_token)) "
            "AND fact IN (SELECT fact FROM batch_facts WHERE supersedes = :fact)",
            {"target": storable(fact.target), "fact": fact.id},
        )
        self._blank_measures(fact)

    def _blank_measures(self, fact: Fact) -> None:
        """Take a fact's texts out of what was asked of releases: its own questions, those about its subject, and answers that
        may be its own or, under what replaced it, a piece of it."""
        known = {"fact": fact.id, "target": storable(fact.target), "subject": storable(fact.subject)}
        later = "fact IN (SELECT fact FROM batch_facts WHERE supersedes = :fact)"
        mentions = " OR ".join(
            f"INSTR({column}, {text}) > 0" for column in ("prompt", "expected") for text in (":target", ":subject")
        )
        self._execute(
            f"UPDATE measures SET prompt = '{PURGED_TEXT}', expected = '{PURGED_TEXT}', answer = NULL "
            f"WHERE fact = :fact OR {mentions}",
            known,
        )
        self._execute(
            f"UPDATE measures SET answer = NULL WHERE answer IS NOT NULL AND ({later} OR INSTR(answer, :target) > 0 "
            "OR INSTR(answer, :subject) > 0)",
            known,
        )
        self._execute("UPDATE token_probabilities SET token = NULL, best_token = NULL WHERE fact = :fact", known)
        self._execute(f"UPDATE token_probabilities SET best_token = NULL WHERE best_token <> token AND {later}", known)

    def _redact_notes(self, texts: Sequence[str]) -> None:
        """Take the texts out of reasons: what people and error messages wrote may repeat them."""
        for row in self._rows("SELECT id, reason, failure_reason FROM batches"):
            for column in ("reason", "failure_reason"):
                clean = redacted(row[column], texts)
                if clean != row[column]:
                    self._execute(f"UPDATE batches SET {column} = ? WHERE id = ?", [clean, row["id"]])
        for row in self._rows(
            "SELECT id, detail_json FROM events WHERE json_extract(detail_json, '$.reason') IS NOT NULL"
        ):
            detail: dict[str, Any] = json.loads(row["detail_json"])
            clean = redacted(str(detail["reason"]), texts)
            if clean != detail["reason"]:
                changed = canonical_json({**detail, "reason": clean})
                self._execute("UPDATE events SET detail_json = ? WHERE id = ?", [changed, row["id"]])

    def scrub(self) -> None:
        """Overwrite what deleted texts left in free pages and in the write-ahead log, and make the search index anew.

        Needs free space of the ledger's size for a moment. Safe to repeat.

        Raises:
            LedgerError: the disk is full, or a reader holds on to the old state.
        """
        with plain_errors(self.path):
            self._connection.execute("PRAGMA secure_delete = ON")
            self._connection.execute("VACUUM")
        self.index_facts()
        row = self._row("PRAGMA wal_checkpoint(TRUNCATE)")
        if row is not None and row[0]:
            raise LedgerError(
                f"{self.path}: the text is purged, but another process is reading an older state of the ledger, "
                "so that its write-ahead log cannot be emptied",
                "end what is reading (a report, a backup, Datasette), then run the same command again",
            )

    def is_purged(self, fact: str) -> bool:
        """Whether a fact's text was purged."""
        return self._row("SELECT 1 FROM purges WHERE fact = ?", [fact]) is not None

    def tombstones(self) -> list[Tombstone]:
        """All purges, oldest first."""
        rows = self._rows("SELECT fact, at_utc, purged_by, reason FROM purges ORDER BY at_utc, fact")
        return [Tombstone(**dict(row)) for row in rows]

    def releases_with_purged(self, release: str | None = None) -> list[HoldingRelease]:
        """Releases whose weights still hold a purged fact, by collection and version; of one release, or of all."""
        rows = self._rows(
            "SELECT * FROM releases_with_purged WHERE :release IS NULL OR release = :release "
            "ORDER BY collection, version, fact",
            {"release": release},
        )
        return [HoldingRelease(**dict(row)) for row in rows]

    def mentions(self, facts: Iterable[Fact]) -> list[str]:
        """Ids of other facts in whose texts a purged answer occurs too, word for word; a few of them."""
        ids: dict[str, None] = {}
        for fact in facts:
            for hit in self.search(f'"{fact.target}"', limit=_MENTIONS):
                ids[hit.id] = None
        return list(ids)[:_MENTIONS]

    def verify_purges(self) -> list[str]:
        """Facts without text but without a tombstone, tombstones of facts that have their text, and altered tombstones."""
        problems: list[str] = []
        for row in self._rows("SELECT p.*, f.content_json FROM purges p LEFT JOIN facts f ON f.id = p.fact"):
            tombstone = Tombstone(row["fact"], row["at_utc"], row["purged_by"], row["reason"])
            if _digest(tombstone) != row["digest"]:
                problems.append(f"purge of {row['fact']}: its row does not have this hash")
            if row["content_json"] != purged_json(row["fact"]):
                problems.append(f"purge of {row['fact']}: the fact still has its text")
        orphans = self._rows(
            "SELECT id FROM facts WHERE key = 'purged:' || id AND id NOT IN (SELECT fact FROM purges) ORDER BY id"
        )
        return problems + [f"fact {row['id']}: its text is gone, and no purge says why" for row in orphans]


def redacted(text: str | None, secrets: Iterable[str]) -> str | None:
    """`text` without the secrets, however they were quoted; pieces of words are left alone."""
    if not text:
        return text
    forms = {form for secret in secrets for form in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1])}
    for form in sorted(filter(None, forms), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", PURGED_TEXT, text)
    return text


def texts_of(fact: Fact) -> list[str]:
    """What a fact says, as others may repeat it; the longest first."""
    return sorted({fact.prompt, fact.target, *fact.paraphrases}, key=len, reverse=True)


def _digest(tombstone: Tombstone) -> str:
    return text_sha256(canonical_json(tombstone.__dict__))
