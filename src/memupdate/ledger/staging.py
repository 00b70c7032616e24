"""A facts file on its way in: its facts in temporary tables, compared with each other and with what is live.

Invariant: the ledger itself is not touched, so that a file can be staged on a read-only connection and nothing of it is taken
before all of it was judged; memory does not grow with the file, except for facts that share a question with another one.
What the comparisons mean is in `memupdate.ledger.rules`; what is stored in the end, in `memupdate.ledger.batches`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

from memupdate.facts.contradictions import Contradictions, wordings
from memupdate.facts.files import MAX_DETAILS, FactsFile, LocatedFact, Problem, Unit, no_facts, problems_found
from memupdate.facts.model import Fact
from memupdate.ledger import rules
from memupdate.ledger.content import fact_json, parse_fact, storable
from memupdate.ledger.database import plain_errors
from memupdate.ledger.facts import LIVE, Facts
from memupdate.ledger.records import FactsDiff, ToldCounts, ToldFact

_CHUNK = 2_000
"""Rows that pass between Python and SQLite at a time."""

_TABLES = (
    """CREATE TEMP TABLE staged (
        seq INTEGER PRIMARY KEY, line INTEGER, id TEXT, key TEXT, prompt TEXT, target TEXT, subject TEXT, relation TEXT,
        external_id TEXT, stated_source TEXT, content_json TEXT, untimely TEXT,
        told TEXT,       -- NULL while nothing speaks against 'new'; else a `Told`, 'duplicate' or 'problem'
        live TEXT,       -- the live fact with the same key
        kept TEXT,       -- the fact that stands for it, where that is another one
        repeats INTEGER  -- seq of the earlier line that it repeats
    )""",
    "CREATE TEMP TABLE asked (h INTEGER, seq INTEGER)",  # a hash of each of its questions and of its key
    "CREATE TEMP TABLE shared (h INTEGER, seq INTEGER)",  # of these the ones that several facts have
    "CREATE TEMP TABLE repeated (seq INTEGER PRIMARY KEY, first INTEGER)",  # lines that repeat an earlier one
    "CREATE TEMP TABLE problems (seq INTEGER, line INTEGER, field TEXT, reason TEXT)",
    "CREATE TEMP TABLE line_of (batch INTEGER PRIMARY KEY, version INTEGER)",  # what leads to the newest release
    "CREATE TEMP TABLE verdicts (seq INTEGER PRIMARY KEY, told TEXT, live TEXT, kept TEXT)",
)
_NAMES = ("staged", "asked", "shared", "repeated", "problems", "line_of", "verdicts")

_INSERT = f"INSERT INTO staged VALUES ({', '.join('?' * 12)}, NULL, NULL, NULL, NULL)"

_SHARED = """
INSERT INTO shared SELECT h, seq FROM asked WHERE h IN (SELECT h FROM asked GROUP BY h HAVING MIN(seq) < MAX(seq))
"""
"""Facts that share a question with another one, the same fact said twice included."""

_REPEATED = """
INSERT INTO repeated SELECT seq, first FROM (
    SELECT seq, MIN(seq) OVER (PARTITION BY id) AS first FROM staged WHERE seq IN (SELECT seq FROM shared)
) WHERE seq > first
"""

_SHARING = """
WITH told AS MATERIALIZED (SELECT h, seq FROM shared WHERE seq NOT IN (SELECT seq FROM repeated))
SELECT seq, line, content_json FROM staged WHERE seq IN (
    SELECT seq FROM told WHERE h IN (SELECT h FROM told GROUP BY h HAVING MIN(seq) < MAX(seq))
) ORDER BY seq
"""
"""Of different facts those that share a question."""

_MATCHES = f"""
SELECT s.seq, s.id = f.id AS is_same, s.content_json, f.id AS live, f.content_json AS live_json
FROM staged s CROSS JOIN facts f ON f.key = s.key CROSS JOIN batch_facts bf ON bf.fact = f.id
CROSS JOIN line_of ON line_of.batch = bf.batch
WHERE s.told IS NULL AND {LIVE}
"""


_TOLD = """
SELECT s.seq, s.line, s.id, COALESCE(s.told, 'new') AS told, s.live, s.content_json, f.content_json AS live_json,
    ROW_NUMBER() OVER (PARTITION BY s.told ORDER BY s.seq) AS nth
FROM staged s LEFT JOIN facts f ON f.id = s.live WHERE s.told IS NULL OR s.told NOT IN ('duplicate', 'problem')
"""

_DIFF = """
SELECT COALESCE(s.told, 'new') AS told, s.content_json, f.content_json AS live_json
FROM staged s LEFT JOIN facts f ON f.id = s.live
WHERE s.told IS NULL OR s.told IN ('superseding', 'unchanged') ORDER BY s.seq
"""


class FactSource(Protocol):
    """What a file of facts is to the ledger; all but the path is known once all of it was read."""

    path: str
    unit: Unit

    @property
    def sha256(self) -> str:
        """Tagged digest of the file's bytes."""

    @property
    def size_bytes(self) -> int:
        """Size of the file."""

    @property
    def format(self) -> str:
        """Names of the formats found."""

    def __iter__(self) -> Iterator[LocatedFact | Problem]:
        """Its facts and problems, in the order of the file."""


class Staged:
    """The staged facts of one file, judged. Lives inside the `Staging.stage` block that made it."""

    def __init__(self, ledger: Staging, collection: str, source: FactSource | FactsFile) -> None:
        self.collection = collection
        self.path = str(source.path)
        self.sha256 = source.sha256
        self.size_bytes = source.size_bytes
        self.format = source.format
        self.unit: Unit = source.unit
        self._ledger = ledger
        self._judged_at: tuple[Any, ...] = ()
        self.counts = ToldCounts()

    def refresh(self) -> None:
        """Judge again, where the collection has changed since."""
        state = self._ledger._collection_state(self.collection)
        if state != self._judged_at:
            self._ledger._judge(self.collection, again=bool(self._judged_at))
            self.counts = self._ledger._count()
            self._judged_at = state

    def told(self, *, limit: int = -1) -> Iterator[ToldFact]:
        """What each fact does, in the order of the file, one at a time; `limit` at most so many of each kind."""
        return self._ledger._told(limit)

    def refuse(self, *, skip_invalid: bool = False) -> None:
        """Raise FactsError where the file has problems, or no fact that can be taken."""
        self._ledger._refuse(self, skip_invalid=skip_invalid)

    def problems(self, *, limit: int = -1) -> list[Problem]:
        """Problems of the file by line, at most `limit`."""
        return self._ledger._problems(self.unit, limit)

    def diff(self) -> FactsDiff:
        """All facts by what they do, in memory: what a plan and the training need."""
        return self._ledger._diff()


class Staging(Facts):
    """Facts against each other and against the live ones."""

    @contextmanager
    def stage(
        self, collection: str, source: FactSource | FactsFile, *, skip_invalid: bool = False, refuse: bool = True
    ) -> Iterator[Staged]:
        """Read `source` to its end and judge its facts; the result is good inside the block.

        Args:
            skip_invalid: leave out lines with problems (of contradicting lines all) and keep them in `problems`.
            refuse: raise for problems; a dry run that shows them does not want that.

        Raises:
            FactsError: the file cannot be read, has no facts, or has problems; `details` has one line for each.
        """
        self._clear()
        try:
            with self._unwritten():
                for statement in _TABLES:
                    self._execute(statement)
                self._fill(source.facts if isinstance(source, FactsFile) else source)
                self._settle_file(source.unit)
            staged = Staged(self, collection, source)
            staged.refresh()
            if refuse:
                staged.refuse(skip_invalid=skip_invalid)
            yield staged
        finally:
            self._clear()

    def diff(self, collection: str, facts: Iterable[Fact]) -> FactsDiff:
        """Facts against the live ones of `collection`; a collection that is not there yet has none.

        Raises:
            FactsError: two of `facts` contradict each other.
        """
        located = tuple(LocatedFact(fact, number) for number, fact in enumerate(facts, start=1))
        if not located:
            return FactsDiff((), (), ())
        with self.stage(collection, FactsFile("facts", "", 0, "", located)) as staged:
            return staged.diff()

    @contextmanager
    def _unwritten(self) -> Iterator[None]:
        """One transaction for all the temporary rows; it takes no lock on the ledger, so a reader may have it too."""
        if self._connection.in_transaction:
            yield
            return
        self._execute("BEGIN")
        try:
            yield
        finally:
            if self._connection.in_transaction:
                self._execute("COMMIT")

    def _clear(self) -> None:
        for name in _NAMES:
            self._execute(f"DROP TABLE IF EXISTS temp.{name}")

    def _fill(self, items: Iterable[LocatedFact | Problem]) -> None:
        now, iterator, seq = rules.now_instant(), iter(items), 0
        while chunk := list(islice(iterator, _CHUNK)):
            rows, asked = [], []
            for item in chunk:
                seq += 1
                if isinstance(item, Problem):
                    self._execute("INSERT INTO problems VALUES (?, ?, ?, ?)", [seq, item.line, item.field, item.reason])
                    continue
                fact = item.fact
                rows.append(_staged_row(seq, item, now))
                # Hashes only point out whom to compare, so that a collision costs a look and nothing else.
                asked += [(hash(question), seq) for question in _questions(fact)]
            self._many(_INSERT, rows)
            self._many("INSERT INTO asked VALUES (?, ?)", asked)

    def _settle_file(self, unit: Unit) -> None:
        """Find lines that repeat or contradict an earlier line."""
        self._execute(_SHARED)
        self._execute(_REPEATED)
        found = Contradictions(unit)
        for row in self._rows(_SHARING):
            found.add(row["seq"], row["line"], parse_fact(row["content_json"]))
        self._many("INSERT INTO repeated VALUES (?, ?)", found.repeats)
        # What repeats a line that itself repeats another one, otherwise worded, repeats that one.
        self._execute("UPDATE repeated SET first = again.first FROM repeated again WHERE again.seq = repeated.first")
        self._execute(
            "UPDATE staged SET told = 'duplicate', repeats = r.first FROM repeated r WHERE r.seq = staged.seq"
        )
        self._note_problems(found.refused)
        self._execute(
            "INSERT INTO problems SELECT r.seq, s.line, p.field, p.reason FROM problems p "
            "JOIN repeated r ON r.first = p.seq JOIN staged s ON s.seq = r.seq"
        )
        self._note_problems(found.contradicted)
        at_odds = [(seq,) for seq, _ in (*found.refused, *found.contradicted)]
        self._many("UPDATE staged SET told = 'conflicting' WHERE seq = ?", at_odds)
        self._refuse_purged()
        self._execute(
            "UPDATE staged SET told = 'problem' WHERE seq IN (SELECT r.seq FROM repeated r JOIN staged kept "
            "ON kept.seq = r.first WHERE kept.told IN ('problem', 'conflicting'))"
        )

    def _refuse_purged(self) -> None:
        """What was purged once is not taken in again."""
        if self._row("SELECT 1 FROM purges LIMIT 1") is None:
            return
        self._execute(
            "INSERT INTO problems SELECT s.seq, s.line, 'line', 'states a fact that was purged on ' || SUBSTR(p.at_utc, 1, 10)"
            " FROM staged s JOIN purges p ON p.fact = s.id"
        )
        self._execute("UPDATE staged SET told = 'problem' WHERE id IN (SELECT fact FROM purges)")

    def _refuse(self, staged: Staged, *, skip_invalid: bool) -> None:
        counts = staged.counts
        taken = counts.taught + counts.unchanged + counts.recorded
        if counts.problems and not (skip_invalid and taken):
            shown, found = staged.problems(limit=MAX_DETAILS), self._row("SELECT COUNT(*) AS n FROM problems")
            total = len(shown) if found is None else int(found["n"])
            raise problems_found(staged.path, shown, problems=total, lines=counts.problems)
        if not taken:
            raise no_facts(staged.path)

    def _collection_state(self, collection: str) -> tuple[Any, ...]:
        """Equal where the same facts are live."""
        row = self._row(
            "SELECT MAX(version), COUNT(*), (SELECT COUNT(*) FROM recorded_facts WHERE collection = :collection) "
            "FROM good_releases WHERE collection = :collection",
            {"collection": collection},
        )
        return () if row is None else (collection, *row)

    def _judge(self, collection: str, *, again: bool) -> None:
        """Set `told`, `live` and `kept` of all facts that the file itself settles nothing about."""
        with self._unwritten():
            if again:
                self._execute("UPDATE staged SET told = NULL, live = NULL, kept = NULL WHERE live IS NOT NULL")
                self._execute("UPDATE staged SET told = NULL WHERE told NOT IN ('duplicate', 'problem', 'conflicting')")
            self._execute("DELETE FROM line_of")
            self._execute(
                "INSERT INTO line_of SELECT batch, version FROM good_releases WHERE collection = ? AND batch IS NOT NULL",
                [collection],
            )
            if self._row("SELECT 1 FROM line_of LIMIT 1"):
                self._judge_by_live(rules.now_instant())
            self._execute("UPDATE staged SET told = untimely WHERE told IS NULL AND untimely IS NOT NULL")
            # What is on record already, or was live once, is told nothing new by being told again.
            self._execute(
                "UPDATE staged SET told = 'unchanged' WHERE told IN ('older', 'ended', 'future') AND (EXISTS ("
                "SELECT 1 FROM recorded_facts t WHERE t.fact = staged.id AND t.reason = staged.told AND t.collection = ?) "
                "OR told = 'older' AND EXISTS (SELECT 1 FROM batch_facts bf JOIN line_of ON line_of.batch = bf.batch "
                "WHERE bf.fact = staged.id))",
                [collection],
            )
            self._execute(
                "UPDATE staged SET kept = (SELECT COALESCE(r.kept, r.id) FROM staged r WHERE r.seq = staged.repeats) "
                "WHERE seq IN (SELECT seq FROM repeated) AND told = 'duplicate'"
            )

    def _judge_by_live(self, now: str) -> None:
        with plain_errors(self.path):
            matches = self._connection.execute(_MATCHES)
        while chunk := matches.fetchmany(_CHUNK):
            verdicts: list[tuple[int, str, str, str | None]] = []
            for row in chunk:
                if row["is_same"]:
                    verdicts.append((row["seq"], "unchanged", row["live"], None))
                    continue
                new, live = parse_fact(row["content_json"]), parse_fact(row["live_json"])
                if new.key == live.key:  # the column cannot tell lone surrogates apart
                    told = rules.judge(new, live, now)
                    verdicts.append((row["seq"], told, row["live"], row["live"] if told == "unchanged" else None))
            # Not into `staged`, which is being read.
            self._many("INSERT INTO verdicts VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", verdicts)
        self._execute(
            "UPDATE staged SET told = v.told, live = v.live, kept = v.kept FROM verdicts v WHERE v.seq = staged.seq"
        )
        self._execute("DELETE FROM verdicts")

    def _count(self) -> ToldCounts:
        rows = self._rows("SELECT COALESCE(told, 'new') AS told, COUNT(*) AS n FROM staged GROUP BY told")
        counts = {row["told"]: int(row["n"]) for row in rows}
        repeats = counts.pop("duplicate", 0)
        for counted_as_problems in ("problem", "conflicting"):
            counts.pop(counted_as_problems, None)
        found = self._row("SELECT COUNT(DISTINCT line) AS n FROM problems")
        return ToldCounts(**counts, duplicates=repeats, problems=0 if found is None else int(found["n"]))

    def _told(self, limit: int) -> Iterator[ToldFact]:
        with plain_errors(self.path):
            rows = self._connection.execute(
                f"SELECT * FROM ({_TOLD}) WHERE :limit < 0 OR nth <= :limit ORDER BY seq", {"limit": limit}
            )
        for row in rows:
            live = parse_fact(row["live_json"]) if row["live_json"] else None
            fact = parse_fact(row["content_json"])
            yield ToldFact(
                told=row["told"],
                line=row["line"],
                fact=row["id"],
                prompt=fact.prompt,
                target=fact.target,
                valid_from=fact.valid_from,
                valid_to=fact.valid_to,
                live=row["live"],
                live_target=live.target if live else None,
                live_valid_from=live.valid_from if live else None,
            )

    def _problems(self, unit: Unit, limit: int) -> list[Problem]:
        rows = self._rows("SELECT line, field, reason FROM problems ORDER BY line, rowid LIMIT ?", [limit])
        return [Problem(row["line"], row["field"], row["reason"], unit) for row in rows]

    def _diff(self) -> FactsDiff:
        new: list[Fact] = []
        superseding: list[tuple[Fact, Fact]] = []
        unchanged: list[Fact] = []
        for row in self._rows(_DIFF):
            fact = parse_fact(row["content_json"])
            if row["told"] == "superseding":
                superseding.append((fact, parse_fact(row["live_json"])))
            else:
                (new if row["told"] == "new" else unchanged).append(fact)
        return FactsDiff(tuple(new), tuple(superseding), tuple(unchanged))

    def _note_problems(self, problems: Iterable[tuple[int, Problem]]) -> None:
        rows = [(seq, problem.line, problem.field, problem.reason) for seq, problem in problems]
        self._many("INSERT INTO problems VALUES (?, ?, ?, ?)", rows)

    def _many(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        with plain_errors(self.path):
            self._connection.executemany(sql, rows)


def _staged_row(seq: int, located: LocatedFact, now: str) -> tuple[Any, ...]:
    fact, line = located
    untimely = None if fact.valid_from is fact.valid_to is None else rules.outside_its_time(fact, now)
    content = fact_json(fact)
    texts: Iterable[str | None]
    texts = (fact.key, fact.prompt, fact.target, fact.subject, fact.relation, fact.external_id, fact.source)
    if "\\ud" in content:  # half a surrogate pair is escaped so; nothing else keeps a text from its column
        texts = map(storable, texts)
    return (seq, line, fact.id, *texts, content, untimely)


def _questions(fact: Fact) -> set[str]:
    """Its key and its wordings: facts that share none cannot contradict each other."""
    if not fact.paraphrases:
        return {fact.key, fact.wording_key(fact.prompt)}
    return {fact.key, *wordings(fact)}
