"""What a workspace's ledger answers without model and policy: as-of, export and what it imports."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memupdate.errors import LedgerError, UsageError
from memupdate.facts.model import Fact, Message, Probe, normalise
from memupdate.facts.reader import read_facts
from memupdate.ledger import Ledger
from memupdate.operations.exporting import export_facts
from memupdate.operations.questions import LedgerQuestions, end_of

LEADER = Fact("Who leads Acme?", "Wanda Kettleman", external_id="7", source="the fax")
LEADER2 = Fact("Who leads Acme?", "Otto Brandt")
PLACE = Fact("Where is Acme?", "Leeds")


def builder_class() -> Any:
    """The builder of the ledger's own tests."""
    path = Path(__file__).parents[1] / "ledger" / "conftest.py"
    spec = importlib.util.spec_from_file_location("ledger_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Builder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace of which only the ledger matters here: two releases."""
    (tmp_path / "memupdate.toml").write_text('schema_version = 1\nmodel = "atlas"\ncollection = "acme"\n')
    with Ledger.create(tmp_path / "ledger.db") as ledger:
        builder = builder_class()(ledger)
        builder.add(LEADER, PLACE)
        builder.add(LEADER2)
    return tmp_path


@pytest.fixture
def questions(root: Path) -> Iterator[LedgerQuestions]:
    return LedgerQuestions(root)


@pytest.mark.parametrize(
    ("asked", "release", "facts"),
    [
        ("v1", "acme@v1", (LEADER, PLACE)),
        ("acme@v1", "acme@v1", (LEADER, PLACE)),
        ("v2", "acme@v2", (PLACE, LEADER2)),
        ("9998", "acme@v2", (PLACE, LEADER2)),
        ("9998-02", "acme@v2", (PLACE, LEADER2)),
        ("9998-02-28T12:00+02:00", "acme@v2", (PLACE, LEADER2)),
    ],
)
def test_what_was_known_then(questions: LedgerQuestions, asked: str, release: str, facts: tuple[Fact, ...]) -> None:
    known = questions.facts_as_of(asked)
    assert (known.release, known.facts, known.facts_total) == (release, facts, 2)
    assert questions.facts_as_of(asked, limit=1, offset=1).facts == facts[1:]


def test_between_two_releases_the_first_was_known(questions: LedgerQuestions) -> None:
    with questions.reader() as ledger:
        first = ledger.release("acme@v1").created_at_utc
    assert questions.facts_as_of(first).release in ("acme@v1", "acme@v2")  # both may fall into one millisecond


@pytest.mark.parametrize("asked", ["1999", "1999-12-31", "0001-01-01T00:00Z", "nonsense", "2026-13", "v", "acme@", ""])
def test_moments_before_all_and_nonsense_are_refused(questions: LedgerQuestions, asked: str) -> None:
    with pytest.raises(UsageError):
        questions.facts_as_of(asked)


def test_releases_and_collections_that_are_not_there(questions: LedgerQuestions, tmp_path: Path) -> None:
    for asked in ("v3", "acme@v3"):
        with pytest.raises(LedgerError, match="no such release"):
            questions.facts_as_of(asked)
    with pytest.raises(UsageError, match="no such collection"):
        questions.facts_as_of("v1", collection="other")
    with pytest.raises(UsageError, match="not a memupdate workspace"):
        LedgerQuestions(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("date", "end"),
    [
        ("2024", "2024-12-31T23:59:59.999Z"),
        ("2024-02", "2024-02-29T23:59:59.999Z"),
        ("2024-12", "2024-12-31T23:59:59.999Z"),
        ("2024-02-29", "2024-02-29T23:59:59.999Z"),
        ("2024-02-29T10:00", "2024-02-29T10:00:00.000Z"),
        ("2024-02-29T10:00+02:00", "2024-02-29T08:00:00.000Z"),
    ],
)
def test_a_date_means_its_end(date: str, end: str) -> None:
    assert end_of(date) == end


def test_questions_load_neither_sqlite_utils_nor_a_policy(root: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom memupdate.operations.questions import LedgerQuestions as Q\n"
        f"q = Q(Path({str(root)!r}))\n"
        "q.facts(); q.search('acme'); q.history('Who leads Acme?'); q.facts_as_of('v1'); q.waiting()\n"
        "heavy = ['sqlite_utils', 'pydantic', 'numpy', 'torch', 'httpx', 'memupdate.policies.model']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


letters = st.characters(categories=("L", "N", "P", "S", "Zs"), include_characters='\n\t",;[{')
texts = st.text(letters, min_size=1, max_size=12).filter(lambda text: not text.isspace())
maybe = st.none() | texts
probes = st.lists(st.builds(Probe, texts, maybe), max_size=2).map(tuple)
turns = st.lists(st.tuples(texts, texts), max_size=2).map(
    lambda pairs: tuple(
        Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)
    )
)
valid_facts = st.builds(
    Fact,
    prompt=texts,
    target=texts,
    subject=maybe,
    relation=maybe,
    paraphrases=st.lists(texts, max_size=3, unique=True).map(tuple),
    locality=probes,
    portability=probes,
    source=maybe,
    valid_from=st.sampled_from([None, "2023", "2024-05", "2024-05-01", "2024-05-01T10:00:00"]),
    valid_to=st.sampled_from([None, "9024-05-01"]),
    tags=st.lists(texts, max_size=2, unique=True).map(tuple),
    rendering=st.sampled_from(["auto", "chat", "completion"]),
    separator=st.sampled_from([" ", "", "\n", ": ", '"']),
    external_id=maybe,
    context=turns,
).map(lambda fact: replace(fact, context=()) if fact.rendering == "completion" else fact)


def takeable(facts: list[Fact]) -> bool:
    """No wording comes twice: contradictions and repetitions are another matter."""
    wordings = [normalise(text) for fact in facts for text in (fact.prompt, *fact.paraphrases)]
    return len(set(wordings)) == len(wordings) and len({fact.key for fact in facts}) == len(facts)


@pytest.fixture(scope="module")
def blank_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with nothing in it, to be copied: making one takes longer than filling it."""
    path = tmp_path_factory.mktemp("blank") / "ledger.db"
    Ledger.create(path).close()
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@given(facts=st.lists(valid_facts, min_size=1, max_size=5).filter(takeable))
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_an_export_is_read_back_as_the_same_facts(
    ending: str, facts: list[Fact], blank_ledger: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Into the ledger, out to a file, and into another ledger: every field of every live fact is as it was."""
    folder = tmp_path_factory.mktemp("export")
    for name in ("one.db", "two.db"):
        shutil.copyfile(blank_ledger, folder / name)
    with Ledger.open(folder / "one.db") as one, Ledger.open(folder / "two.db") as two:
        builder_class()(one).add(*facts)
        report = export_facts(one.live_facts("acme"), folder / f"facts.{ending}", collection="acme", release="acme@v1")
        assert report.facts == len(facts)
        batch = two.receive_batch("acme", read_facts(folder / f"facts.{ending}"), "{}")
        assert batch is not None
        builder_class()(two).release(batch.id)
        assert two.live_facts("acme") == one.live_facts("acme") == facts


def test_export_knows_releases_and_never_writes_over(questions: LedgerQuestions, tmp_path: Path) -> None:
    report = questions.export(tmp_path / "then.jsonl", as_of="v1")
    assert (report.release, report.facts, report.format) == ("acme@v1", 2, "jsonl")
    lines = [json.loads(line) for line in (tmp_path / "then.jsonl").read_text().splitlines()]
    assert [line["target"] for line in lines] == ["Wanda Kettleman", "Leeds"]
    assert (lines[0]["id"], lines[0]["source"]) == ("7", "the fax")
    assert questions.export(tmp_path / "now.jsonl").release == "acme@v2"
    for name, problem in {
        "now.jsonl": "there already",
        "now.xls": "no format",
        "no/where.csv": "no such folder",
    }.items():
        with pytest.raises(UsageError, match=problem):
            questions.export(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir() if "now" in p.name) == ["now.jsonl"]
