"""Full-text search over all facts that were ever told, ranked, with the place that matched.

Invariant: every fact is found from the moment it is stored. Words are looked up in the FTS5 table `facts_fts`, and facts
that no writer has indexed yet are read one by one. No text that a user can type is an error.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from memupdate.facts.model import normalise
from memupdate.ledger.content import storable
from memupdate.ledger.database import LedgerDatabase
from memupdate.ledger.records import FactStatus, RecordedReason

MARKS = ("[", "]")
"""Around each word that matched."""

_SNIPPET_WORDS = 24
_SAME_PROMPTS = 200
"""Facts looked at for one prompt: the same words and few others rank first."""
_COLUMNS = ("prompt", "target", "subject", "relation")
_INDEXED = "COALESCE((SELECT MAX(id) FROM facts_fts_docsize), 0)"
"""Facts are never deleted and get rising row numbers: the last one indexed tells which are not."""

_PLACES = """
SELECT h.collection, h.status, h.release, h.batch FROM fact_history h
WHERE h.fact = :fact AND (:collection IS NULL OR h.collection = :collection)
    AND h.batch = (SELECT MAX(bf.batch) FROM batch_facts bf JOIN batches b ON b.id = bf.batch
        WHERE bf.fact = h.fact AND b.collection = h.collection)
UNION ALL
SELECT t.collection, t.reason, NULL, NULL FROM recorded_facts t
WHERE t.fact = :fact AND (:collection IS NULL OR t.collection = :collection) AND NOT EXISTS (
    SELECT 1 FROM batch_facts bf JOIN batches b ON b.id = bf.batch
    WHERE bf.fact = t.fact AND b.collection = t.collection)
ORDER BY 1
"""

_TOLD = """
(EXISTS (SELECT 1 FROM batch_facts bf JOIN batches b ON b.id = bf.batch
    WHERE bf.fact = f.id AND (:collection IS NULL OR b.collection = :collection))
OR EXISTS (SELECT 1 FROM recorded_facts t WHERE t.fact = f.id AND (:collection IS NULL OR t.collection = :collection)))
"""


@dataclass(frozen=True)
class SearchHit:
    """One fact that matches, as one collection has it."""

    id: str
    prompt: str
    target: str
    snippet: str
    """The text that matched best, its matching words in brackets."""
    collection: str
    status: FactStatus | RecordedReason
    """What became of it in its newest batch, or why it is only on record."""
    release: str | None
    batch: int | None


class Search(LedgerDatabase):
    """Search, and the index behind it."""

    def index_facts(self) -> int:
        """Bring the index up to date; returns how many facts it took in. Cheap where there are none."""
        with self.transaction():
            names = ", ".join(_COLUMNS)
            done = self._execute(
                f"INSERT INTO facts_fts (rowid, {names}) SELECT rowid, {names} FROM facts WHERE rowid > {_INDEXED}"
            )
            return max(0, done.rowcount)

    def empty_index(self) -> None:
        """Forget all; `index_facts` makes the index anew."""
        self._execute("INSERT INTO facts_fts (facts_fts) VALUES ('delete-all')")

    def search(self, text: str, collection: str | None = None, *, limit: int = 20) -> list[SearchHit]:
        """Facts that hold every word of `text` in prompt, target, subject or relation, the best match first.

        Args:
            text: words; `"several in quotes"` stand together, `begin*` matches what begins so. Nothing else is special.
            collection: None for all.
            limit: facts at most.
        """
        words = search_words(text)
        if not words:
            return []
        parameters = {"query": match_query(words), "collection": collection, "limit": limit}
        # Ranked first and marked afterwards: of a common word there may be a million matches to sort.
        told = "" if collection is None else f"JOIN facts f ON f.rowid = facts_fts.rowid AND {_TOLD}"
        rows = self._rows(
            f"""WITH best AS MATERIALIZED (
                SELECT facts_fts.rowid AS number, facts_fts.rank AS rank FROM facts_fts {told}
                WHERE facts_fts MATCH :query ORDER BY facts_fts.rank LIMIT :limit
            ) SELECT f.id, f.prompt, f.target,
                (SELECT snippet(facts_fts, -1, '{MARKS[0]}', '{MARKS[1]}', '…', {_SNIPPET_WORDS}) FROM facts_fts
                    WHERE facts_fts MATCH :query AND facts_fts.rowid = best.number) AS snippet
            FROM best JOIN facts f ON f.rowid = best.number ORDER BY best.rank, f.rowid""",
            parameters,
        )
        rows += self._unindexed(words, collection, limit - len(rows))
        return [
            SearchHit(row["id"], row["prompt"], row["target"], row["snippet"], **dict(place))
            for row in rows
            for place in self._rows(_PLACES, {"fact": row["id"], "collection": collection})
        ]

    def keys_of_prompt(self, prompt: str) -> list[str]:
        """Keys of the facts whose prompt a person would call the same as this one."""
        words = search_words(f'"{prompt}"' if '"' not in prompt else prompt)
        if not words:
            return []
        rows = self._rows(
            "SELECT f.key, f.prompt FROM facts_fts JOIN facts f ON f.rowid = facts_fts.rowid "
            f"WHERE facts_fts MATCH :query ORDER BY facts_fts.rank LIMIT {_SAME_PROMPTS}",
            {"query": f"prompt : ({match_query(words)})"},
        )
        rows += self._unindexed(words, None, _SAME_PROMPTS)
        asked = normalise(prompt)
        return list(dict.fromkeys(row["key"] for row in rows if normalise(row["prompt"]) == asked))

    def _unindexed(self, words: Sequence[str], collection: str | None, limit: int) -> list[sqlite3.Row]:
        """What no writer has indexed yet: facts of a batch that is being worked on."""
        tests = " AND ".join(
            "(" + " OR ".join(f"f.{column} LIKE :w{index} ESCAPE '\\'" for column in _COLUMNS) + ")"
            for index in range(len(words))
        )
        likes = {f"w{index}": f"%{_like(word.rstrip('*'))}%" for index, word in enumerate(words)}
        return self._rows(
            f"SELECT f.id, f.key, f.prompt, f.target, f.prompt AS snippet FROM facts f "
            f"WHERE f.rowid > {_INDEXED} AND {tests} AND {_TOLD} ORDER BY f.rowid LIMIT :limit",
            {**likes, "collection": collection, "limit": limit},
        )


def search_words(text: str) -> list[str]:
    """Words and quoted phrases, without the quotes; those without a letter or digit say nothing and are left out."""
    # SQLite ends a text at a NUL, and has no half surrogate pairs.
    clean = (storable(text) or "").replace("\x00", " ")
    found = [quoted or plain.replace('"', "") for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', clean)]
    return [word for word in found if any(character.isalnum() for character in word)]


def match_query(words: Sequence[str]) -> str:
    """The FTS5 expression for all of `words`, each quoted, so that none of FTS5's own signs is read in them."""
    # Side by side, not joined by AND: FTS5 then passes over a phrase in which its tokenizer finds no word.
    return " ".join(f'"{word.rstrip("*")}"' + " *" * word.endswith("*") for word in words)


def _like(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
