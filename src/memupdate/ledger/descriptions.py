"""What each table, view and column of the ledger means, for the reference page and for Datasette.

Invariant: every table and view of the newest schema is described; tests compare. Column comments are those of the `CREATE
TABLE` statements, which SQLite keeps word for word, so that they are written down once.
"""

from __future__ import annotations

import re
import sqlite3
from typing import Any

TABLES = {
    "sources": "Facts files that were read, and commands that made a batch.",
    "facts": "Facts by content, each once, with every field in `content_json`.",
    "fact_sources": "Where each fact was read: file and line.",
    "collections": "Independent lines of releases.",
    "batches": "Updates of a collection, from received to published, with policy and plan.",
    "batch_facts": "The facts that each batch changed, and whether they were proved.",
    "slices": "What each batch changed in the memory, as a file.",
    "releases": "Immutable releases with the digest of their adapter.",
    "proofs": "One fact tested in one release on one engine.",
    "law_points": "Memories that were measured: what the law is fitted to.",
    "law_fits": "Fits of the memory law.",
    "events": "The log.",
    "facts_fts": "Full-text index of `facts`.",
    "recorded_facts": "Facts that were told and are on record without being taught.",
    "links": "The chain of digests over all rows.",
    "purges": "Facts whose text was removed: who, when and why.",
    "measures": "Questions asked of a release beyond its facts' own prompts, and how their answers were judged.",
    "text_measures": "General text under a release and under the base model: perplexity and KL.",
    "token_probabilities": "The tokens of a release's least sure facts, one by one.",
}
"""What each table holds."""

VIEWS = {
    "good_releases": "Releases whose batch did not fail afterwards: those that later batches build on.",
    "fact_history": "Each fact in each batch, with its release and what became of it: `failed`, `pending`, `unproved`, "
    "`superseded`, `retracted`, `dropped` (by a compaction, of what stood in for a retracted fact), `purged` or `live`.",
    "live_facts": "What the newest release of each collection holds.",
    "batch_summary": "A batch with its release and the counts of its facts.",
    "latest_measures": "What the newest run on each engine measured of each release.",
    "measure_summary": "Recall, generality, locality and portability of each release by wording and neighbourhood: questions asked, and "
    "answers that match exactly, normalised (case, spaces, closing punctuation), or contain what was expected.",
    "latest_proofs": "The newest proof of each fact in each release on each engine; `id` leads to the rest in `proofs`.",
    "fact_provenance": "From a fact to its release, file, line and policy.",
    "fact_lifetimes": "Each value of a key with when it was true (`valid_…`), when it was told, since which release it is "
    "in the weights and which release put another value in its place.",
    "fact_trace": "The whole trail of a fact: file and line, batch, plan, law fit, slice, release, and whether it was proved.",
    "releases_with_purged": "Releases whose weights were trained on a fact that was purged afterwards.",
    "facts_waiting": "Facts that are in no release, and why: their batch is on its way, failed, or left them out.",
}
"""What each view answers."""

_LABELS = {"facts": "prompt", "sources": "path", "batches": "collection"}
"""Columns that Datasette shows where another table refers to a row."""

_HIDDEN = ("_sqlite_migrations", "facts_fts")

_QUERIES = {
    "known_at_release": (
        "What a release knows",
        """SELECT fact, prompt, target, since_release FROM fact_lifetimes
WHERE collection = :collection AND since_version <= :version AND (until_version IS NULL OR until_version > :version)
    AND status IN ('live', 'superseded', 'retracted', 'dropped') AND change <> 'dropped'
ORDER BY since_version""",
    ),
    "history_of_a_prompt": (
        "Every value that a prompt ever had",
        """SELECT collection, target, status, valid_from, valid_to, told_at_utc, since_release, until_release
FROM fact_lifetimes WHERE key IN (SELECT key FROM facts WHERE prompt = :prompt) ORDER BY collection, told_at_utc""",
    ),
    "where_from": (
        "Where an answer comes from",
        "SELECT * FROM fact_trace WHERE fact IN (SELECT id FROM facts WHERE prompt = :prompt) ORDER BY batch",
    ),
}
"""Name → (title, SQL): what Datasette offers beside the tables."""


def objects(connection: sqlite3.Connection, kind: str) -> list[str]:
    """Names of the `table`s or `view`s, in the order in which they were made; not those that SQLite keeps for itself."""
    # The tables behind a full-text index are its own affair.
    sql = (
        "SELECT m.name FROM sqlite_master m JOIN pragma_table_list l ON l.name = m.name WHERE m.type = ? "
        "AND l.schema = 'main' AND l.type <> 'shadow' AND m.name NOT LIKE '%sqlite_%' ORDER BY m.rowid"
    )
    return [name for (name,) in connection.execute(sql, [kind])]


def column_comments(sql: str) -> dict[str, str]:
    """Column → the comment at the end of its line of `CREATE TABLE`, and the values that a CHECK of it allows."""
    comments: dict[str, str] = {}
    # A CHECK may go on in the next line; its own line breaks carry no meaning.
    for line in re.sub(r"IN\s+\(", "IN (", sql).splitlines():
        declared = re.match(r"\s*(\w+) (?:TEXT|INTEGER|REAL)\b", line)
        if declared is None:
            continue
        column = declared.group(1)
        parts = []
        if allowed := re.search(rf"CHECK \({column} IN \(([^)]*)\)\)", line):
            parts.append(f"one of {allowed.group(1)}")
        if comment := re.search(r"--\s*(.*\S)", line):
            parts.append(comment.group(1))
        comments[column] = "; ".join(parts)
    return comments


def datasette_metadata(connection: sqlite3.Connection, database: str) -> dict[str, Any]:
    """Datasette's metadata for a ledger served under the name `database`: titles, columns, search and ready queries."""
    tables: dict[str, dict[str, Any]] = {name: {"hidden": True} for name in _HIDDEN}
    for name in objects(connection, "table"):
        (sql,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", [name]).fetchone()
        columns = {column: text for column, text in column_comments(sql).items() if text}
        label = {"label_column": _LABELS[name]} if name in _LABELS else {}
        tables.setdefault(name, {}).update({"description": TABLES[name], "columns": columns, **label})
    # The index names its table in a way that Datasette does not recognise.
    tables["facts"] |= {"fts_table": "facts_fts", "fts_pk": "rowid"}
    for name in objects(connection, "view"):
        tables[name] = {"description": VIEWS[name]}
    queries = {name: {"title": title, "sql": sql} for name, (title, sql) in _QUERIES.items()}
    about = "Facts with their sources, batches, releases and proofs. Rows are append-only."
    return {"databases": {database: {"description": about, "tables": tables, "queries": queries}}}
