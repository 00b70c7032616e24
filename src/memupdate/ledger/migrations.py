"""The ledger's schema, as numbered steps that are never edited once released.

Invariant: each step runs in one transaction together with the note that it ran, so a crash leaves whole steps. Rows are
append-only; triggers refuse what is not, apart from a batch's state and plan and the outcome of its facts. The views
serve plain `sqlite3`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from memupdate.ledger.chain import seal_everything
from memupdate.ledger.clock import utc_now

if TYPE_CHECKING:
    from sqlite_utils import Database, Migrations

    MIGRATIONS: Migrations
    """All steps, in order, for sqlite-utils to apply."""

APPLICATION_ID = 0x6D757064
"""`mupd`: tells a ledger from any other SQLite file."""

MIGRATION_SET = "memupdate"
"""Our steps' name among those of other tools in `APPLIED_TABLE`."""

APPLIED_TABLE = "_sqlite_migrations"
"""Where sqlite-utils notes which steps have run."""

STEPS: dict[str, Callable[[Database], None]] = {}
"""Name → step, in order."""


def _step(function: Callable[[Database], None]) -> Callable[[Database], None]:
    STEPS[function.__name__] = function
    return function


@cache
def _migrations() -> Migrations:
    from sqlite_utils import Migrations

    migrations = Migrations(MIGRATION_SET)
    for function in STEPS.values():
        migrations()(function)
    return migrations


def __getattr__(name: str) -> Any:
    # Importing sqlite-utils takes longer than answering most questions, and only a ledger that is written to needs it.
    if name == "MIGRATIONS":
        return _migrations()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _run(db: Database, *statements: str) -> None:
    # One by one: `executescript` would commit the step's transaction half-way.
    for statement in statements:
        db.execute(statement)


def _append_only(db: Database, *tables: str) -> None:
    for table in tables:
        for verb in ("UPDATE", "DELETE"):
            db.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )


@_step
def m001_facts(db: Database) -> None:
    """Facts, content-addressed, and the files that they were read from."""
    _run(
        db,
        f"PRAGMA application_id = {APPLICATION_ID}",
        """CREATE TABLE sources (
            id INTEGER PRIMARY KEY,
            path TEXT NOT NULL,              -- as the operator gave it
            sha256 TEXT NOT NULL,            -- 'sha256:…' of the file's bytes
            size_bytes INTEGER NOT NULL,
            format TEXT NOT NULL,
            received_at_utc TEXT NOT NULL,
            UNIQUE (path, sha256)            -- the same file again is the same source
        )""",
        """CREATE TABLE facts (
            id TEXT PRIMARY KEY,             -- 'sha256:…' over what is taught and from when it holds
            key TEXT NOT NULL,               -- what it is about; one live fact per key and collection
            prompt TEXT NOT NULL,            -- copies out of content_json, for reading and searching
            target TEXT NOT NULL,
            subject TEXT,
            relation TEXT,
            content_json TEXT NOT NULL,      -- every field, ASCII only, enough to rebuild the fact exactly
            created_at_utc TEXT NOT NULL
        )""",
        "CREATE INDEX facts_by_key ON facts (key)",
        """CREATE TABLE fact_sources (
            fact TEXT NOT NULL REFERENCES facts (id),
            source INTEGER NOT NULL REFERENCES sources (id),
            line INTEGER NOT NULL,           -- 1-based
            external_id TEXT,                -- the id that this file gives the fact
            stated_source TEXT,              -- the source that this file states for the fact
            PRIMARY KEY (fact, source, line)
        )""",
        "CREATE INDEX fact_sources_by_source ON fact_sources (source)",
    )
    _append_only(db, "sources", "facts", "fact_sources")


@_step
def m002_batches(db: Database) -> None:
    """Collections, and the batches that change them."""
    _run(
        db,
        "CREATE TABLE collections (name TEXT PRIMARY KEY, created_at_utc TEXT NOT NULL)",
        """CREATE TABLE batches (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            collection TEXT NOT NULL REFERENCES collections (name),
            source INTEGER NOT NULL REFERENCES sources (id),
            state TEXT NOT NULL CHECK (state IN
                ('received', 'planned', 'trained', 'verified', 'released', 'published', 'failed')),
            publish INTEGER NOT NULL CHECK (publish IN (0, 1)),  -- 0: 'released' is the last state wanted
            facts_unchanged INTEGER NOT NULL,                    -- facts of the file that were live already
            policy_json TEXT NOT NULL,                           -- resolved: every value, with origins
            plan_json TEXT,
            failure_reason TEXT,
            created_at_utc TEXT NOT NULL,
            updated_at_utc TEXT NOT NULL,
            CHECK ((state = 'failed') = (failure_reason IS NOT NULL))
        )""",
        "CREATE INDEX batches_by_collection ON batches (collection, state)",
        """CREATE TABLE batch_facts (
            batch INTEGER NOT NULL REFERENCES batches (id),
            fact TEXT NOT NULL REFERENCES facts (id),
            position INTEGER NOT NULL,       -- order inside the batch, from 0
            change TEXT NOT NULL CHECK (change IN ('new', 'superseding')),
            supersedes TEXT REFERENCES facts (id),               -- the live fact with the same key
            outcome TEXT CHECK (outcome IN ('proved', 'unproved')),  -- NULL until proved or not
            PRIMARY KEY (batch, fact),
            CHECK ((change = 'superseding') = (supersedes IS NOT NULL))
        )""",
        "CREATE INDEX batch_facts_by_fact ON batch_facts (fact)",
        "CREATE INDEX batch_facts_by_supersedes ON batch_facts (supersedes) WHERE supersedes IS NOT NULL",
        """CREATE TRIGGER batches_fixed BEFORE UPDATE OF id, collection, source, publish, facts_unchanged, policy_json,
            created_at_utc ON batches BEGIN SELECT RAISE(ABORT, 'only a batch''s state and plan change'); END""",
        """CREATE TRIGGER batches_no_delete BEFORE DELETE ON batches
            BEGIN SELECT RAISE(ABORT, 'batches is append-only'); END""",
        """CREATE TRIGGER batch_facts_fixed BEFORE UPDATE OF batch, fact, position, change, supersedes ON batch_facts
            BEGIN SELECT RAISE(ABORT, 'only the outcome of a batch''s fact changes'); END""",
        """CREATE TRIGGER batch_facts_no_delete BEFORE DELETE ON batch_facts
            BEGIN SELECT RAISE(ABORT, 'batch_facts is append-only'); END""",
    )
    _append_only(db, "collections")


@_step
def m003_releases(db: Database) -> None:
    """Slices, releases and proofs."""
    _run(
        db,
        """CREATE TABLE slices (
            id INTEGER PRIMARY KEY,
            batch INTEGER NOT NULL REFERENCES batches (id),
            relative_path TEXT NOT NULL,     -- from the workspace's root
            sha256 TEXT NOT NULL,
            rank_before INTEGER NOT NULL,    -- of the memory; 0 for an empty one
            rank_after INTEGER NOT NULL,
            size_bytes INTEGER NOT NULL,
            created_at_utc TEXT NOT NULL
        )""",
        "CREATE INDEX slices_by_batch ON slices (batch)",
        """CREATE TABLE releases (
            name TEXT PRIMARY KEY,           -- 'acme@v7'
            collection TEXT NOT NULL REFERENCES collections (name),
            version INTEGER NOT NULL CHECK (version >= 1),
            batch INTEGER UNIQUE REFERENCES batches (id),        -- NULL where no batch of facts made it
            parent TEXT REFERENCES releases (name),              -- whose memory training began with
            relative_path TEXT NOT NULL,     -- from the workspace's root
            digest TEXT NOT NULL,            -- 'sha256:…' of the adapter
            rank INTEGER NOT NULL,
            placement TEXT NOT NULL,
            base_fingerprint TEXT NOT NULL,  -- of the model that it was trained on; loads on no other
            created_at_utc TEXT NOT NULL,
            UNIQUE (collection, version)
        )""",
        """CREATE TABLE proofs (
            id INTEGER PRIMARY KEY,
            release TEXT NOT NULL REFERENCES releases (name),
            fact TEXT NOT NULL REFERENCES facts (id),
            engine TEXT NOT NULL CHECK (engine IN ('in-process', 'served')),
            proved INTEGER NOT NULL CHECK (proved IN (0, 1)),
            min_probability REAL,            -- of the weakest target token
            failed_position INTEGER,         -- in the target, from 0: the first token that is not the argmax
            failed_token TEXT,
            emitted_token TEXT,              -- what the model emits in its place
            proved_at_utc TEXT NOT NULL
        )""",
        "CREATE INDEX proofs_by_release ON proofs (release, engine, fact)",
        "CREATE INDEX proofs_by_fact ON proofs (fact)",
    )
    _append_only(db, "slices", "releases", "proofs")


@_step
def m004_law_and_events(db: Database) -> None:
    """What was measured, the fits to it, and the log."""
    _run(
        db,
        """CREATE TABLE law_points (
            id TEXT PRIMARY KEY,             -- 'sha256:…' over all measured values: the same point twice is one
            batch INTEGER REFERENCES batches (id),               -- NULL for calibration and shipped points
            base_fingerprint TEXT NOT NULL,
            placement TEXT NOT NULL,
            recipe TEXT NOT NULL,            -- 'sha256:…' of what else the numbers depend on
            rank INTEGER NOT NULL,
            effective_parameters INTEGER NOT NULL,
            facts INTEGER NOT NULL,
            target_tokens INTEGER NOT NULL,
            loss_before_nats REAL NOT NULL,  -- mean over target tokens
            loss_after_nats REAL NOT NULL,
            facts_proved INTEGER NOT NULL,
            kl_nats REAL,                    -- harm per anchor token; NULL where not measured
            epochs INTEGER NOT NULL,
            stopped_early INTEGER NOT NULL CHECK (stopped_early IN (0, 1)),  -- 1: censored, capacity allows more
            duration_s REAL NOT NULL,
            origin TEXT NOT NULL CHECK (origin IN ('calibration', 'shipped', 'batch')),
            created_at_utc TEXT NOT NULL
        )""",
        "CREATE INDEX law_points_by_recipe ON law_points (base_fingerprint, placement, recipe)",
        """CREATE TABLE law_fits (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,               -- the newest fit of a recipe is the one in use
            id TEXT NOT NULL,                -- 'sha256:…' over the fit; a fit that returns keeps its id
            base_fingerprint TEXT NOT NULL,
            placement TEXT NOT NULL,
            recipe TEXT NOT NULL,
            fit_json TEXT NOT NULL,
            created_at_utc TEXT NOT NULL
        )""",
        "CREATE INDEX law_fits_by_recipe ON law_fits (base_fingerprint, placement, recipe, seq)",
        "CREATE INDEX law_fits_by_id ON law_fits (id)",
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            at_utc TEXT NOT NULL,
            kind TEXT NOT NULL,              -- 'state', 'published', 'rolled back', …
            collection TEXT,
            batch INTEGER REFERENCES batches (id),
            release TEXT,                    -- by name only: an event may speak of one that never came to be
            detail_json TEXT NOT NULL
        )""",
        "CREATE INDEX events_by_batch ON events (batch)",
    )
    _append_only(db, "law_points", "law_fits", "events")


@_step
def m005_views(db: Database) -> None:
    """Views that answer an operator's questions in one query, and that the queries here build on."""
    _run(
        db,
        # A release whose batch failed afterwards (its served proof, say) is never built on: it counts nowhere.
        """CREATE VIEW good_releases AS
            SELECT r.* FROM releases r LEFT JOIN batches b ON b.id = r.batch
            WHERE b.state IS NULL OR b.state <> 'failed'""",
        """CREATE VIEW fact_history AS
            SELECT bf.fact, b.collection, bf.batch, b.state AS batch_state, bf.position, bf.change, bf.supersedes,
                bf.outcome, r.name AS release, r.version, b.created_at_utc AS at_utc,
                CASE
                    WHEN b.state = 'failed' THEN 'failed'
                    WHEN r.name IS NULL THEN 'pending'
                    WHEN bf.outcome = 'unproved' THEN 'unproved'
                    WHEN EXISTS (
                        SELECT 1 FROM batch_facts s JOIN good_releases later ON later.batch = s.batch
                        WHERE s.supersedes = bf.fact AND later.collection = b.collection AND later.version > r.version
                    ) THEN 'superseded'
                    ELSE 'live'
                END AS status
            FROM batch_facts bf JOIN batches b ON b.id = bf.batch LEFT JOIN releases r ON r.batch = b.id""",
        """CREATE VIEW live_facts AS
            SELECT h.collection, f.id, f.key, f.prompt, f.target, h.release AS since_release, h.batch, h.position
            FROM fact_history h JOIN facts f ON f.id = h.fact WHERE h.status = 'live'""",
        """CREATE VIEW batch_summary AS
            SELECT b.*, r.name AS release,
                COUNT(bf.fact) AS facts_changed,
                COALESCE(SUM(bf.change = 'new'), 0) AS facts_new,
                COALESCE(SUM(bf.change = 'superseding'), 0) AS facts_superseding,
                COALESCE(SUM(bf.outcome = 'proved'), 0) AS facts_proved,
                COALESCE(SUM(bf.outcome = 'unproved'), 0) AS facts_unproved
            FROM batches b LEFT JOIN batch_facts bf ON bf.batch = b.id LEFT JOIN releases r ON r.batch = b.id
            GROUP BY b.id""",
        """CREATE VIEW fact_provenance AS
            SELECT h.release, h.collection, f.id AS fact, f.prompt, f.target, h.status, s.path, fs.line,
                s.sha256 AS file_sha256, fs.stated_source, h.batch, b.policy_json
            FROM fact_history h
            JOIN facts f ON f.id = h.fact
            JOIN batches b ON b.id = h.batch
            LEFT JOIN fact_sources fs ON fs.fact = f.id AND fs.source = b.source
            LEFT JOIN sources s ON s.id = fs.source""",
    )


@_step
def m006_proof_figures(db: Database) -> None:
    """Counts and smallest probabilities of proofs from the index alone, without reading the rows."""
    _run(
        db,
        "DROP INDEX proofs_by_release",
        "CREATE INDEX proofs_by_release ON proofs (release, engine, fact, proved, min_probability)",
        # A fact that was proved again counts by its newest proof; SQLite takes the other columns from MAX's row.
        """CREATE VIEW latest_proofs AS
            SELECT release, engine, fact, MAX(id) AS id, proved, min_probability
            FROM proofs GROUP BY release, engine, fact""",
    )


@_step
def m007_compaction_and_retraction(db: Database) -> None:
    """Batches that compact or retract: their kind and reason, and two more changes that they make to facts."""
    views = ("fact_provenance", "batch_summary", "live_facts", "fact_history")
    _run(
        db,
        *(f"DROP VIEW {view}" for view in views),
        "ALTER TABLE batches ADD COLUMN kind TEXT NOT NULL DEFAULT 'add' CHECK (kind IN ('add', 'compact', 'retract'))",
        "ALTER TABLE batches ADD COLUMN reason TEXT",
        """CREATE TRIGGER batches_kind_fixed BEFORE UPDATE OF kind, reason ON batches
            BEGIN SELECT RAISE(ABORT, 'only a batch''s state and plan change'); END""",
        # SQLite cannot change a CHECK: the rows move to a new table, which takes the old one's name.
        """CREATE TABLE batch_facts_with_retractions (
            batch INTEGER NOT NULL REFERENCES batches (id),
            fact TEXT NOT NULL REFERENCES facts (id),
            position INTEGER NOT NULL,       -- order inside the batch, from 0
            change TEXT NOT NULL CHECK (change IN ('new', 'superseding', 'retracting', 'dropped')),
            supersedes TEXT REFERENCES facts (id),               -- the fact that is live no longer: of the same key; of
                                             -- 'retracting' the one taken back, of 'dropped' its stand-in
            outcome TEXT CHECK (outcome IN ('proved', 'unproved')),  -- NULL until proved or not
            PRIMARY KEY (batch, fact),
            CHECK ((change = 'new') = (supersedes IS NULL))
        )""",
        "INSERT INTO batch_facts_with_retractions SELECT batch, fact, position, change, supersedes, outcome FROM batch_facts",
        "DROP TABLE batch_facts",
        "ALTER TABLE batch_facts_with_retractions RENAME TO batch_facts",
        "CREATE INDEX batch_facts_by_fact ON batch_facts (fact)",
        "CREATE INDEX batch_facts_by_supersedes ON batch_facts (supersedes) WHERE supersedes IS NOT NULL",
        """CREATE TRIGGER batch_facts_fixed BEFORE UPDATE OF batch, fact, position, change, supersedes ON batch_facts
            BEGIN SELECT RAISE(ABORT, 'only the outcome of a batch''s fact changes'); END""",
        """CREATE TRIGGER batch_facts_no_delete BEFORE DELETE ON batch_facts
            BEGIN SELECT RAISE(ABORT, 'batch_facts is append-only'); END""",
        """CREATE VIEW fact_history AS
            SELECT bf.fact, b.collection, bf.batch, b.state AS batch_state, bf.position, bf.change, bf.supersedes,
                bf.outcome, r.name AS release, r.version, b.created_at_utc AS at_utc,
                CASE
                    WHEN b.state = 'failed' THEN 'failed'
                    WHEN r.name IS NULL THEN 'pending'
                    WHEN bf.outcome = 'unproved' THEN 'unproved'
                    WHEN bf.change = 'dropped' THEN 'retracted'
                    ELSE COALESCE((
                        SELECT CASE s.change WHEN 'retracting' THEN 'retracted' WHEN 'dropped' THEN 'dropped'
                            ELSE 'superseded' END
                        FROM batch_facts s JOIN good_releases later ON later.batch = s.batch
                        WHERE s.supersedes = bf.fact AND later.collection = b.collection AND later.version > r.version
                        ORDER BY later.version LIMIT 1
                    ), 'live')
                END AS status
            FROM batch_facts bf JOIN batches b ON b.id = bf.batch LEFT JOIN releases r ON r.batch = b.id""",
        """CREATE VIEW live_facts AS
            SELECT h.collection, f.id, f.key, f.prompt, f.target, h.release AS since_release, h.batch, h.position
            FROM fact_history h JOIN facts f ON f.id = h.fact WHERE h.status = 'live'""",
        """CREATE VIEW batch_summary AS
            SELECT b.*, r.name AS release,
                COUNT(bf.fact) AS facts_changed,
                COALESCE(SUM(bf.change = 'new'), 0) AS facts_new,
                COALESCE(SUM(bf.change = 'superseding'), 0) AS facts_superseding,
                COALESCE(SUM(bf.change = 'retracting'), 0) AS facts_retracting,
                COALESCE(SUM(bf.change = 'dropped'), 0) AS facts_dropped,
                COALESCE(SUM(bf.outcome = 'proved'), 0) AS facts_proved,
                COALESCE(SUM(bf.outcome = 'unproved'), 0) AS facts_unproved
            FROM batches b LEFT JOIN batch_facts bf ON bf.batch = b.id LEFT JOIN releases r ON r.batch = b.id
            GROUP BY b.id""",
        """CREATE VIEW fact_provenance AS
            SELECT h.release, h.collection, f.id AS fact, f.prompt, f.target, h.status, s.path, fs.line,
                s.sha256 AS file_sha256, fs.stated_source, h.batch, b.policy_json
            FROM fact_history h
            JOIN facts f ON f.id = h.fact
            JOIN batches b ON b.id = h.batch
            LEFT JOIN fact_sources fs ON fs.fact = f.id AND fs.source = b.source
            LEFT JOIN sources s ON s.id = fs.source""",
    )


@_step
def m008_questions(db: Database) -> None:
    """Full-text search, and views for what an auditor asks: the life of each value, its whole trail, what is waiting."""
    _run(
        db,
        # Filled by `Search.index_facts` after a batch, not by a trigger, so that reading a large file stays quick.
        """CREATE VIRTUAL TABLE facts_fts USING fts5 (
            prompt, target, subject, relation, content = 'facts', tokenize = 'unicode61 remove_diacritics 2'
        )""",
        """CREATE VIEW fact_lifetimes AS
            SELECT h.collection, f.key, h.fact, f.prompt, f.target, h.change, h.status,
                json_extract(f.content_json, '$.valid_from') AS valid_from,
                json_extract(f.content_json, '$.valid_to') AS valid_to,
                h.batch, h.at_utc AS told_at_utc,
                h.release AS since_release, h.version AS since_version, r.created_at_utc AS since_utc,
                ended.name AS until_release, ended.version AS until_version, ended.created_at_utc AS until_utc
            FROM fact_history h JOIN facts f ON f.id = h.fact LEFT JOIN releases r ON r.name = h.release
            LEFT JOIN good_releases ended ON ended.collection = h.collection AND ended.version = (
                SELECT MIN(later.version) FROM batch_facts s JOIN good_releases later ON later.batch = s.batch
                WHERE s.supersedes = h.fact AND later.collection = h.collection AND later.version > h.version
            )""",
        """CREATE VIEW fact_trace AS
            SELECT h.fact, f.prompt, f.target, h.collection, h.status,
                s.path, fs.line, s.sha256 AS file_sha256, fs.stated_source, fs.external_id,
                h.batch, b.kind, h.batch_state, h.change, h.supersedes, h.at_utc AS received_at_utc,
                json_extract(b.plan_json, '$.rank') AS plan_rank, json_extract(b.plan_json, '$.fit_id') AS law_fit,
                (SELECT MIN(created_at_utc) FROM law_fits WHERE id = json_extract(b.plan_json, '$.fit_id')) AS law_fit_at_utc,
                sl.relative_path AS slice_path, sl.sha256 AS slice_sha256,
                h.release, r.digest AS release_digest, r.created_at_utc AS released_at_utc,
                (SELECT proved FROM proofs p WHERE p.release = h.release AND p.fact = h.fact AND p.engine = 'in-process'
                    ORDER BY p.id DESC LIMIT 1) AS proved_in_process,
                (SELECT proved FROM proofs p WHERE p.release = h.release AND p.fact = h.fact AND p.engine = 'served'
                    ORDER BY p.id DESC LIMIT 1) AS proved_served
            FROM fact_history h
            JOIN facts f ON f.id = h.fact
            JOIN batches b ON b.id = h.batch
            LEFT JOIN fact_sources fs ON fs.fact = h.fact AND fs.source = b.source
            LEFT JOIN sources s ON s.id = b.source
            LEFT JOIN slices sl ON sl.id = (SELECT MAX(id) FROM slices WHERE batch = h.batch)
            LEFT JOIN releases r ON r.name = h.release""",
        """CREATE VIEW facts_waiting AS
            SELECT h.collection, h.fact, f.prompt, f.target, h.status, h.batch, h.batch_state, h.at_utc,
                CASE h.status
                    WHEN 'pending' THEN 'batch ' || h.batch || ' is ' || h.batch_state
                    WHEN 'failed' THEN b.failure_reason
                    ELSE COALESCE((
                        SELECT 'token ' || (p.failed_position + 1) || ' of the target, ' || p.failed_token
                            || ', came out as ' || p.emitted_token
                        FROM proofs p WHERE p.fact = h.fact AND p.release = h.release AND p.failed_token IS NOT NULL
                        ORDER BY p.id DESC LIMIT 1
                    ), 'a token of the target was not sure enough')
                END AS why
            FROM fact_history h JOIN facts f ON f.id = h.fact JOIN batches b ON b.id = h.batch
            WHERE h.status IN ('pending', 'failed', 'unproved') AND NOT EXISTS (
                SELECT 1 FROM facts same JOIN batch_facts again ON again.fact = same.id
                JOIN batches later ON later.id = again.batch
                WHERE same.key = f.key AND later.collection = h.collection AND later.id > h.batch
            )""",
    )


@_step
def m009_law_points_of_kinds(db: Database) -> None:
    """What a law point was written from, and what it took."""
    _run(
        db,
        "ALTER TABLE law_points ADD COLUMN examples INTEGER NOT NULL DEFAULT 0",  # phrasings trained on; 0: not noted
        "ALTER TABLE law_points ADD COLUMN steps INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE law_points ADD COLUMN attempts INTEGER NOT NULL DEFAULT 1",
        "ALTER TABLE law_points ADD COLUMN kind TEXT NOT NULL DEFAULT ''",
    )


@_step
def m010_told_but_not_taught(db: Database) -> None:
    """Facts on record that are not in the weights: older values that came late, what is true no more or not yet."""
    _run(
        db,
        "CREATE INDEX batch_facts_by_position ON batch_facts (batch, position)",
        """CREATE TABLE recorded_facts (
            id INTEGER PRIMARY KEY,
            collection TEXT NOT NULL REFERENCES collections (name),
            fact TEXT NOT NULL REFERENCES facts (id),
            source INTEGER NOT NULL REFERENCES sources (id),
            reason TEXT NOT NULL CHECK (reason IN ('older', 'ended', 'future')),  -- older: than the live value of its key;
                                             -- ended: true no more; future: not true yet
            current TEXT REFERENCES facts (id),  -- what was live under its key when it was told
            told_at_utc TEXT NOT NULL,
            UNIQUE (collection, fact, reason)
        )""",
        "CREATE INDEX recorded_facts_by_fact ON recorded_facts (fact)",
        "CREATE INDEX recorded_facts_by_source ON recorded_facts (source)",
        "DROP VIEW fact_lifetimes",
        """CREATE VIEW fact_lifetimes AS
            SELECT h.collection, f.key, h.fact, f.prompt, f.target, h.change, h.status,
                json_extract(f.content_json, '$.valid_from') AS valid_from,
                json_extract(f.content_json, '$.valid_to') AS valid_to,
                h.batch, h.at_utc AS told_at_utc,
                h.release AS since_release, h.version AS since_version, r.created_at_utc AS since_utc,
                ended.name AS until_release, ended.version AS until_version, ended.created_at_utc AS until_utc
            FROM fact_history h JOIN facts f ON f.id = h.fact LEFT JOIN releases r ON r.name = h.release
            LEFT JOIN good_releases ended ON ended.collection = h.collection AND ended.version = (
                SELECT MIN(later.version) FROM batch_facts s JOIN good_releases later ON later.batch = s.batch
                WHERE s.supersedes = h.fact AND later.collection = h.collection AND later.version > h.version
            )
            UNION ALL
            SELECT t.collection, f.key, t.fact, f.prompt, f.target, 'historic', t.reason,
                json_extract(f.content_json, '$.valid_from'), json_extract(f.content_json, '$.valid_to'),
                NULL, t.told_at_utc, NULL, NULL, NULL, NULL, NULL, NULL
            FROM recorded_facts t JOIN facts f ON f.id = t.fact""",
    )
    _append_only(db, "recorded_facts")


@_step
def m011_links(db: Database) -> None:
    """A chain of digests over all rows, those that are there already included."""
    _run(
        db,
        """CREATE TABLE links (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            kind TEXT NOT NULL,              -- of subject: 'batch', 'release', 'proofs of release', …
            subject TEXT NOT NULL,           -- its id or name; its newest link is that of its rows as they are
            content_json TEXT NOT NULL,      -- table → [rows, digest of the rows]
            previous TEXT NOT NULL,          -- hash of the link before
            at_utc TEXT NOT NULL,
            hash TEXT NOT NULL               -- 'sha256:…' over all other columns
        )""",
        "CREATE INDEX links_by_subject ON links (kind, subject, seq)",
    )
    _append_only(db, "links")
    seal_everything(db.conn, utc_now())


@_step
def m012_purges(db: Database) -> None:
    """Purged facts: their tombstones, the one change of fixed rows that they allow, and the releases that still hold a text."""
    gone = "EXISTS (SELECT 1 FROM purges WHERE purges.fact = OLD.fact)"

    def kept(*columns: str) -> str:
        return " AND ".join(f'NEW."{column}" IS OLD."{column}"' for column in columns)

    def guarded(trigger: str, event: str, table: str, allowed: str, message: str) -> tuple[str, str]:
        return (
            f"DROP TRIGGER {trigger}",
            f"CREATE TRIGGER {trigger} BEFORE {event} ON {table} WHEN NOT ({allowed}) "
            f"BEGIN SELECT RAISE(ABORT, '{message}'); END",
        )

    _run(
        db,
        """CREATE TABLE purges (
            fact TEXT PRIMARY KEY REFERENCES facts (id),
            at_utc TEXT NOT NULL,
            purged_by TEXT NOT NULL,         -- user and machine
            reason TEXT,
            digest TEXT NOT NULL             -- 'sha256:…' over the other columns
        )""",
        *guarded(
            "facts_no_update",
            "UPDATE",
            "facts",
            """EXISTS (SELECT 1 FROM purges WHERE purges.fact = OLD.id) AND NEW.key = 'purged:' || OLD.id
            AND NEW.prompt = '[purged]' AND NEW.target = '[purged]' AND NEW.subject IS NULL AND NEW.relation IS NULL
            AND NEW.content_json = '{"purged":"' || OLD.id || '"}' AND """
            + kept("id", "created_at_utc"),
            "facts is append-only",
        ),
        *guarded(
            "fact_sources_no_update",
            "UPDATE",
            "fact_sources",
            f"{gone} AND NEW.external_id IS NULL AND NEW.stated_source IS NULL AND {kept('fact', 'source', 'line')}",
            "fact_sources is append-only",
        ),
        # A proof of what replaced a purged fact may have seen a piece of the old answer come out.
        *guarded(
            "proofs_no_update",
            "UPDATE",
            "proofs",
            f"""({gone} OR EXISTS (SELECT 1 FROM batch_facts bf JOIN purges ON purges.fact = bf.supersedes
                WHERE bf.fact = OLD.fact))
            AND (NEW.failed_token IS NULL OR {kept("failed_token")})
            AND (NEW.emitted_token IS NULL OR {kept("emitted_token")}) AND """
            + kept("id", "release", "fact", "engine", "proved", "min_probability", "failed_position", "proved_at_utc"),
            "proofs is append-only",
        ),
        *guarded(
            "events_no_update",
            "UPDATE",
            "events",
            "EXISTS (SELECT 1 FROM purges) AND INSTR(NEW.detail_json, '[purged]') AND "
            + kept("id", "at_utc", "kind", "collection", "batch", "release"),
            "events is append-only",
        ),
        *guarded(
            "batches_kind_fixed",
            "UPDATE OF kind, reason",
            "batches",
            f"EXISTS (SELECT 1 FROM purges) AND INSTR(NEW.reason, '[purged]') AND {kept('kind')}",
            "only a batch''s state and plan change",
        ),
        "DROP VIEW fact_history",
        """CREATE VIEW fact_history AS
            SELECT bf.fact, b.collection, bf.batch, b.state AS batch_state, bf.position, bf.change, bf.supersedes,
                bf.outcome, r.name AS release, r.version, b.created_at_utc AS at_utc,
                CASE
                    WHEN EXISTS (SELECT 1 FROM purges WHERE purges.fact = bf.fact) THEN 'purged'
                    WHEN b.state = 'failed' THEN 'failed'
                    WHEN r.name IS NULL THEN 'pending'
                    WHEN bf.outcome = 'unproved' THEN 'unproved'
                    WHEN bf.change = 'dropped' THEN 'retracted'
                    ELSE COALESCE((
                        SELECT CASE s.change WHEN 'retracting' THEN 'retracted' WHEN 'dropped' THEN 'dropped'
                            ELSE 'superseded' END
                        FROM batch_facts s JOIN good_releases later ON later.batch = s.batch
                        WHERE s.supersedes = bf.fact AND later.collection = b.collection AND later.version > r.version
                        ORDER BY later.version LIMIT 1
                    ), 'live')
                END AS status
            FROM batch_facts bf JOIN batches b ON b.id = bf.batch LEFT JOIN releases r ON r.batch = b.id""",
        # What a batch taught is in its release and in all that build on it, up to a compaction that wrote only what was live
        # then, the purged fact not among it.
        """CREATE VIEW releases_with_purged AS
            SELECT DISTINCT held.name AS release, held.collection, held.version, p.fact
            FROM purges p
            JOIN batch_facts bf ON bf.fact = p.fact AND bf.change <> 'dropped'
            JOIN batches b ON b.id = bf.batch
            JOIN releases r ON r.batch = b.id
            JOIN releases held ON held.collection = r.collection AND held.version >= r.version
            WHERE (b.state <> 'failed' OR held.name = r.name) AND NOT EXISTS (
                SELECT 1 FROM releases afresh JOIN batches c ON c.id = afresh.batch
                WHERE c.kind = 'compact' AND afresh.collection = r.collection
                    AND afresh.version > r.version AND afresh.version <= held.version
                    AND (c.created_at_utc >= p.at_utc OR EXISTS (
                        SELECT 1 FROM batch_facts s JOIN good_releases ended ON ended.batch = s.batch
                        WHERE s.supersedes = p.fact AND ended.collection = r.collection
                            AND ended.version > r.version AND ended.version <= afresh.version))
            )""",
    )
    _append_only(db, "purges")


@_step
def m013_views_by_index(db: Database) -> None:
    """What superseded a fact is looked up by the fact, not searched for in all that later batches brought."""
    slow, quick = "FROM batch_facts s JOIN good_releases later", "FROM batch_facts s CROSS JOIN good_releases later"
    views = [
        (row[0], row[1]) for row in db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'view' ORDER BY rowid")
    ]
    _run(db, *(f"DROP VIEW {name}" for name, _ in views), *(sql.replace(slow, quick) for _, sql in views))


@_step
def m014_waiting_for_its_time(db: Database) -> None:
    """Among the waiting facts those that are not true yet."""
    _run(
        db,
        "DROP VIEW facts_waiting",
        """CREATE VIEW facts_waiting AS
            SELECT h.collection, h.fact, f.prompt, f.target, h.status, h.batch, h.batch_state, h.at_utc,
                CASE h.status
                    WHEN 'pending' THEN 'batch ' || h.batch || ' is ' || h.batch_state
                    WHEN 'failed' THEN b.failure_reason
                    ELSE COALESCE((
                        SELECT 'token ' || (p.failed_position + 1) || ' of the target, ' || p.failed_token
                            || ', came out as ' || p.emitted_token
                        FROM proofs p WHERE p.fact = h.fact AND p.release = h.release AND p.failed_token IS NOT NULL
                        ORDER BY p.id DESC LIMIT 1
                    ), 'a token of the target was not sure enough')
                END AS why
            FROM fact_history h JOIN facts f ON f.id = h.fact JOIN batches b ON b.id = h.batch
            WHERE h.status IN ('pending', 'failed', 'unproved') AND NOT EXISTS (
                SELECT 1 FROM facts same JOIN batch_facts again ON again.fact = same.id
                JOIN batches later ON later.id = again.batch
                WHERE same.key = f.key AND later.collection = h.collection AND later.id > h.batch
            )
            UNION ALL
            SELECT t.collection, t.fact, f.prompt, f.target, t.reason, NULL, NULL, t.told_at_utc,
                'true from ' || json_extract(f.content_json, '$.valid_from') || ' on; it is taught when it is told again then'
            FROM recorded_facts t JOIN facts f ON f.id = t.fact
            WHERE t.reason = 'future' AND NOT EXISTS (SELECT 1 FROM purges WHERE purges.fact = t.fact) AND NOT EXISTS (
                SELECT 1 FROM facts same JOIN batch_facts again ON again.fact = same.id
                JOIN batches later ON later.id = again.batch
                WHERE same.key = f.key AND later.collection = t.collection AND later.created_at_utc > t.told_at_utc
            )""",
    )


@_step
def m015_measures(db: Database) -> None:
    """What clients get beyond verbatim: every question that was asked of a release, general text, and tokens one by one."""

    def kept(*columns: str) -> str:
        return " AND ".join(f'NEW."{column}" IS OLD."{column}"' for column in columns)

    _run(
        db,
        """CREATE TABLE measures (
            id INTEGER PRIMARY KEY,
            release TEXT NOT NULL REFERENCES releases (name),
            engine TEXT NOT NULL CHECK (engine IN ('in-process', 'served')),
            measure TEXT NOT NULL CHECK (measure IN ('recall', 'generality', 'locality', 'portability')),
            part TEXT NOT NULL,              -- of the measure: which wording, which neighbourhood
            fact TEXT REFERENCES facts (id), -- that it was asked for; NULL for the workspace's probes
            style TEXT NOT NULL,             -- 'chat' or 'completion'
            prompt TEXT NOT NULL,
            expected TEXT NOT NULL,          -- the fact's answer; for locality the base model's own
            answer TEXT,                     -- what came out, where that is not what was expected
            judged TEXT NOT NULL CHECK (judged IN ('exact', 'normalised', 'contained', 'other')),
            min_probability REAL,            -- of the expected answer's weakest token; NULL where it was only generated
            measured_at_utc TEXT NOT NULL    -- the same for all that one run measured
        )""",
        "CREATE INDEX measures_by_run ON measures (release, engine, measured_at_utc)",
        "CREATE INDEX measures_by_fact ON measures (fact) WHERE fact IS NOT NULL",
        """CREATE TABLE text_measures (
            id INTEGER PRIMARY KEY,
            release TEXT NOT NULL REFERENCES releases (name),
            corpus TEXT NOT NULL,            -- a file of the workspace, or 'held-out anchors'
            tokens INTEGER NOT NULL,         -- that were predicted
            perplexity_base REAL NOT NULL,
            perplexity REAL NOT NULL,
            kl_nats REAL NOT NULL,           -- mean KL(base, release) per token, over the whole vocabulary
            measured_at_utc TEXT NOT NULL
        )""",
        "CREATE INDEX text_measures_by_release ON text_measures (release)",
        """CREATE TABLE token_probabilities (
            id INTEGER PRIMARY KEY,
            release TEXT NOT NULL REFERENCES releases (name),
            fact TEXT NOT NULL REFERENCES facts (id),  -- one of the release's least sure ones, under its own prompt
            position INTEGER NOT NULL,       -- in the target, from 0
            token TEXT,                      -- NULL: purged
            probability REAL NOT NULL,
            best_token TEXT,                 -- the likeliest there
            best_probability REAL NOT NULL,
            measured_at_utc TEXT NOT NULL
        )""",
        "CREATE INDEX token_probabilities_by_fact ON token_probabilities (release, fact)",
        """CREATE VIEW latest_measures AS
            SELECT m.* FROM measures m JOIN (
                SELECT release, engine, MAX(measured_at_utc) AS at_utc FROM measures GROUP BY release, engine
            ) newest ON newest.release = m.release AND newest.engine = m.engine AND newest.at_utc = m.measured_at_utc""",
        """CREATE VIEW measure_summary AS
            SELECT release, engine, 'recall' AS measure, 'own prompt' AS part, COUNT(*) AS asked,
                SUM(proved) AS exact, SUM(proved) AS normalised, SUM(proved) AS contained,
                MIN(min_probability) AS min_probability
            FROM latest_proofs GROUP BY release, engine
            UNION ALL
            SELECT release, engine, measure, part, COUNT(*), SUM(judged = 'exact'),
                SUM(judged IN ('exact', 'normalised')), SUM(judged <> 'other'), MIN(min_probability)
            FROM latest_measures GROUP BY release, engine, measure, part""",
    )
    for table in ("measures", "text_measures", "token_probabilities"):
        _run(
            db,
            f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END",
        )
    # A purge takes texts out, and does nothing else.
    purged = "EXISTS (SELECT 1 FROM purges) AND "
    allowed = {
        "measures": purged
        + """NEW.prompt IN (OLD.prompt, '[purged]') AND NEW.expected IN (OLD.expected, '[purged]')
            AND (NEW.answer IS NULL OR NEW.answer IS OLD.answer) AND """
        + kept(
            "id",
            "release",
            "engine",
            "measure",
            "part",
            "fact",
            "style",
            "judged",
            "min_probability",
            "measured_at_utc",
        ),
        "text_measures": "0",
        "token_probabilities": purged
        + "(NEW.token IS NULL OR NEW.token IS OLD.token) AND (NEW.best_token IS NULL OR NEW.best_token IS OLD.best_token) AND "
        + kept("id", "release", "fact", "position", "probability", "best_probability", "measured_at_utc"),
    }
    for table, condition in allowed.items():
        _run(
            db,
            f"CREATE TRIGGER {table}_no_update BEFORE UPDATE ON {table} WHEN NOT ({condition}) "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END",
        )
