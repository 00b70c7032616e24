"""The chain: a digest of every row that matters, each link over its rows and the link before it.

A *subject* is a group of rows that belong together (`batch 3`: its row and its facts). Whatever transaction changes a subject's
rows appends one link for it: `content` has the number and digest of its rows by table, `hash` is over the link itself and
`previous`, the hash of the link before. Triggers of the writing connection note what changes, so that no writer can forget.

Invariant: the newest link of a subject is that of its rows, every row belongs to a subject that has a link, and each link
follows from the one before; so an altered, missing or added row is found, and named by its subject. Whoever can write to the
file can write the whole chain anew: the newest hash, noted elsewhere, tells that too. Files are not known here.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from memupdate.storage import canonical_json, text_sha256

_CHUNK = 1_000
"""Rows that are encoded together; part of what a digest is."""

_encode = json.JSONEncoder(separators=(",", ":")).encode

GENESIS = text_sha256("memupdate ledger")
"""What the first link follows."""


@dataclass(frozen=True)
class Kind:
    """A kind of subject."""

    ids: str
    """SQL: the subjects that there are."""
    parts: tuple[tuple[str, str], ...]
    """(table, SQL: the columns that count, of the rows of subject `:id`, in a fixed order)."""


# Columns by name: one that a later schema adds is no part of what is sealed already.
KINDS: dict[str, Kind] = {
    "collection": Kind(
        "SELECT name FROM collections",
        (("collections", "SELECT name, created_at_utc FROM collections WHERE name = :id"),),
    ),
    "source": Kind(
        "SELECT id FROM sources",
        (
            ("sources", "SELECT id, path, sha256, size_bytes, format, received_at_utc FROM sources WHERE id = :id"),
            (
                "fact_sources",
                "SELECT fact, line, external_id, stated_source FROM fact_sources WHERE source = :id ORDER BY fact, line",
            ),
            (
                "recorded_facts",
                "SELECT t.id, t.collection, t.fact, t.reason, t.current, t.told_at_utc, f.created_at_utc "
                "FROM recorded_facts t JOIN facts f ON f.id = t.fact WHERE t.source = :id ORDER BY t.id",
            ),
        ),
    ),
    "batch": Kind(
        "SELECT id FROM batches",
        (
            (
                "batches",
                "SELECT id, collection, source, kind, publish, reason, facts_unchanged, policy_json, created_at_utc "
                "FROM batches WHERE id = :id",
            ),
            (
                "batch_facts",
                "SELECT bf.fact, bf.position, bf.change, bf.supersedes, f.created_at_utc "
                "FROM batch_facts bf CROSS JOIN facts f ON f.id = bf.fact WHERE bf.batch = :id ORDER BY bf.fact",
            ),
        ),
    ),
    "progress of batch": Kind(
        "SELECT id FROM batches",
        (("batches", "SELECT state, plan_json, failure_reason, updated_at_utc FROM batches WHERE id = :id"),),
    ),
    "outcomes of batch": Kind(
        "SELECT DISTINCT batch FROM batch_facts WHERE outcome IS NOT NULL",
        (("batch_facts", "SELECT fact, outcome FROM batch_facts WHERE batch = :id ORDER BY fact"),),
    ),
    "slice": Kind(
        "SELECT id FROM slices",
        (
            (
                "slices",
                "SELECT id, batch, relative_path, sha256, rank_before, rank_after, size_bytes, created_at_utc "
                "FROM slices WHERE id = :id",
            ),
        ),
    ),
    "release": Kind(
        "SELECT name FROM releases",
        (
            (
                "releases",
                "SELECT name, collection, version, batch, parent, relative_path, digest, rank, placement, "
                "base_fingerprint, created_at_utc FROM releases WHERE name = :id",
            ),
        ),
    ),
    "proofs of release": Kind(
        "SELECT DISTINCT release FROM proofs",
        (
            (
                "proofs",
                "SELECT id, fact, engine, proved, min_probability, failed_position, failed_token, emitted_token, "
                "proved_at_utc FROM proofs WHERE release = :id ORDER BY id",
            ),
        ),
    ),
    "measures of release": Kind(
        "SELECT release FROM measures UNION SELECT release FROM text_measures UNION SELECT release FROM token_probabilities",
        (
            (
                "measures",
                "SELECT id, engine, measure, part, fact, style, prompt, expected, answer, judged, min_probability, "
                "measured_at_utc FROM measures WHERE release = :id ORDER BY id",
            ),
            (
                "text_measures",
                "SELECT id, corpus, tokens, perplexity_base, perplexity, kl_nats, measured_at_utc "
                "FROM text_measures WHERE release = :id ORDER BY id",
            ),
            (
                "token_probabilities",
                "SELECT id, fact, position, token, probability, best_token, best_probability, measured_at_utc "
                "FROM token_probabilities WHERE release = :id ORDER BY id",
            ),
        ),
    ),
    "law point": Kind(
        "SELECT id FROM law_points",
        (
            (
                "law_points",
                "SELECT id, batch, base_fingerprint, placement, recipe, rank, effective_parameters, facts, target_tokens, "
                "loss_before_nats, loss_after_nats, facts_proved, kl_nats, epochs, stopped_early, duration_s, origin, "
                "created_at_utc, examples, steps, attempts, kind FROM law_points WHERE id = :id",
            ),
        ),
    ),
    "law fit": Kind(
        "SELECT seq FROM law_fits",
        (
            (
                "law_fits",
                "SELECT seq, id, base_fingerprint, placement, recipe, fit_json, created_at_utc "
                "FROM law_fits WHERE seq = :id",
            ),
        ),
    ),
    "event": Kind(
        "SELECT id FROM events",
        (
            (
                "events",
                'SELECT id, at_utc, kind, collection, batch, "release", detail_json FROM events WHERE id = :id',
            ),
        ),
    ),
}

_NOTED: tuple[tuple[str, str, str, str], ...] = (
    ("collections", "INSERT", "collection", "name"),
    ("sources", "INSERT", "source", "id"),
    ("fact_sources", "UPDATE", "source", "source"),
    ("recorded_facts", "INSERT", "source", "source"),
    ("batches", "INSERT", "batch", "id"),
    ("batches", "INSERT", "progress of batch", "id"),
    ("batches", "UPDATE OF state, plan_json, failure_reason, updated_at_utc", "progress of batch", "id"),
    ("batches", "UPDATE OF reason, policy_json", "batch", "id"),
    ("batch_facts", "UPDATE OF outcome", "outcomes of batch", "batch"),
    ("slices", "INSERT", "slice", "id"),
    ("releases", "INSERT", "release", "name"),
    ("proofs", "INSERT", "proofs of release", "release"),
    ("proofs", "UPDATE", "proofs of release", "release"),
    ("measures", "UPDATE", "measures of release", "release"),
    ("text_measures", "INSERT", "measures of release", "release"),
    ("token_probabilities", "INSERT", "measures of release", "release"),
    ("token_probabilities", "UPDATE", "measures of release", "release"),
    ("law_points", "INSERT", "law point", "id"),
    ("law_fits", "INSERT", "law fit", "seq"),
    ("events", "INSERT", "event", "id"),
    ("events", "UPDATE", "event", "id"),
)
"""(table, what happens to it, kind of subject, column with the subject's id). Facts of a batch and lines of a source come by the
million, always with their batch's row or through `note`, and have no trigger; measures come by the thousand, through `note`."""


def watch(connection: sqlite3.Connection) -> None:
    """Note from now on what this connection changes."""
    connection.execute("CREATE TEMP TABLE changed_subjects (kind TEXT, id, PRIMARY KEY (kind, id))")
    for number, (table, action, kind, column) in enumerate(_NOTED):
        connection.execute(
            f"CREATE TEMP TRIGGER note_{number} AFTER {action} ON main.{table} "
            f"BEGIN INSERT OR IGNORE INTO changed_subjects VALUES ('{kind}', NEW.{column}); END"
        )


def note(connection: sqlite3.Connection, kind: str, subject_id: int | str) -> None:
    """Have a subject sealed with the transaction."""
    connection.execute("INSERT OR IGNORE INTO changed_subjects VALUES (?, ?)", [kind, subject_id])


def seal_changes(connection: sqlite3.Connection, at_utc: str) -> None:
    """Append a link for each subject that changed since the last call; the last step of a transaction."""
    changed = connection.execute("SELECT kind, id FROM changed_subjects ORDER BY rowid").fetchall()
    if changed:
        _append(connection, [(kind, subject_id) for kind, subject_id in changed], at_utc)
        connection.execute("DELETE FROM changed_subjects")


def seal_everything(connection: sqlite3.Connection, at_utc: str) -> None:
    """Append a link for every subject that there is: how a ledger that had no chain gets one."""
    # Run by a migration: tables that later steps make are not there yet, and hold nothing.
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()}
    kinds = [kind for kind, spec in KINDS.items() if tables.issuperset(table for table, _ in spec.parts)]
    _append(connection, ((kind, subject_id) for kind in kinds for subject_id in _ids(connection, kind)), at_utc)


def head(connection: sqlite3.Connection) -> tuple[int, str]:
    """(number, hash) of the newest link; (0, `GENESIS`) where there is none."""
    row = connection.execute("SELECT seq, hash FROM links ORDER BY seq DESC LIMIT 1").fetchone()
    return (0, GENESIS) if row is None else (int(row[0]), str(row[1]))


def find_breaks(connection: sqlite3.Connection) -> list[str]:
    """What does not fit the chain, one line each; empty where all is as it was written."""
    return [*_broken_links(connection), *_changed_subjects(connection), *_unlinked(connection)]


def _append(connection: sqlite3.Connection, subjects: Iterable[tuple[str, int | str]], at_utc: str) -> None:
    seq, previous = head(connection)
    for kind, subject_id in subjects:
        seq += 1
        content = _content(connection, kind, subject_id)
        link = (seq, kind, str(subject_id), content, previous, at_utc)
        previous = _hash(link)
        connection.execute(
            "INSERT INTO links (seq, kind, subject, content_json, previous, at_utc, hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [*link, previous],
        )


def _hash(link: tuple[int | str, ...]) -> str:
    return text_sha256(canonical_json(list(link)))


def _content(connection: sqlite3.Connection, kind: str, subject_id: int | str) -> str:
    """`{table: [number of rows, digest]}` of a subject as it is now."""
    return canonical_json({table: _digest(connection, sql, subject_id) for table, sql in KINDS[kind].parts})


def _digest(connection: sqlite3.Connection, sql: str, subject_id: int | str) -> list[int | str]:
    cursor = connection.cursor()
    cursor.row_factory = None
    cursor.execute(sql, {"id": subject_id})
    digest, rows = hashlib.sha256(), 0
    while chunk := cursor.fetchmany(_CHUNK):
        digest.update(_encode(chunk).encode())
        rows += len(chunk)
    return [rows, "sha256:" + digest.hexdigest()]


def _ids(connection: sqlite3.Connection, kind: str) -> Iterator[int | str]:
    for row in connection.execute(f"SELECT * FROM ({KINDS[kind].ids}) ORDER BY 1").fetchall():
        yield row[0]


def _broken_links(connection: sqlite3.Connection) -> Iterator[str]:
    previous, expected = GENESIS, 1
    for row in connection.execute(
        "SELECT seq, kind, subject, content_json, previous, at_utc, hash FROM links ORDER BY seq"
    ):
        seq, kind, subject, *_, stored = row
        if seq != expected:
            missing = f"link {expected} is" if seq == expected + 1 else f"links {expected} to {seq - 1} are"
            yield f"links: {missing} missing"
        elif row[4] != previous:
            yield f"links: link {seq} ({kind} {subject}) does not follow from link {seq - 1}"
        if _hash(tuple(row)[:6]) != stored:
            yield f"links: link {seq} ({kind} {subject}) was altered"
        previous, expected = stored, seq + 1
    counter = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'links'").fetchone()
    if counter is not None and counter[0] >= expected:
        yield f"links: link {expected} and what follows are missing"


def _changed_subjects(connection: sqlite3.Connection) -> Iterator[str]:
    newest = (
        "SELECT kind, subject, content_json FROM links WHERE seq IN (SELECT MAX(seq) FROM links GROUP BY kind, subject) "
        "ORDER BY seq"
    )
    for kind, subject, content_json in connection.execute(newest).fetchall():
        if kind not in KINDS:
            continue
        if content_json == _content(connection, kind, subject):
            continue
        try:
            sealed: dict[str, list[int | str]] = json.loads(content_json)
        except ValueError:
            continue  # an altered link, which is named as such
        for table, sql in KINDS[kind].parts:
            was, now = sealed.get(table, [0, ""]), _digest(connection, sql, subject)
            if was[0] != now[0]:
                yield f"{table}: {kind} {subject} had {was[0]} rows and has {now[0]}"
            elif was != now:
                yield f"{table}: {kind} {subject} was altered"


def _unlinked(connection: sqlite3.Connection) -> Iterator[str]:
    for kind, spec in KINDS.items():
        linked = {row[0] for row in connection.execute("SELECT DISTINCT subject FROM links WHERE kind = ?", [kind])}
        for subject_id in _ids(connection, kind):
            if str(subject_id) not in linked:
                yield f"{spec.parts[0][0]}: {kind} {subject_id} was added from outside: it has no link"
