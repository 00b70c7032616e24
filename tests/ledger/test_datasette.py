"""Datasette opens a ledger and shows every table, view and ready query of it, described; nothing of the schema is undescribed."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from datasette.app import Datasette
from sqlite_utils import Database

from memupdate.facts.model import Fact
from memupdate.ledger import Ledger
from memupdate.ledger.descriptions import TABLES, VIEWS, datasette_metadata, objects
from memupdate.ledger.migrations import MIGRATIONS

LEADER = Fact("Who leads Acme?", "Wanda <b>Kettleman</b>")


def schema() -> Any:
    database = Database(memory=True)
    MIGRATIONS.apply(database)
    return database.conn


def test_every_table_and_view_is_described() -> None:
    connection = schema()
    assert set(objects(connection, "table")) == set(TABLES)
    assert set(objects(connection, "view")) == set(VIEWS)


def test_columns_have_the_comments_of_the_schema() -> None:
    tables = datasette_metadata(schema(), "ledger")["databases"]["ledger"]["tables"]
    assert tables["fact_sources"]["columns"]["line"] == "1-based"
    assert tables["facts"]["label_column"] == "prompt"
    assert tables["facts_fts"]["hidden"]


@pytest.fixture
def pages(tmp_path: Path, builder_of: Any) -> Any:
    """Fetches pages of a Datasette that serves a ledger with two releases."""
    with Ledger.create(tmp_path / "ledger.db") as ledger:
        build = builder_of(ledger)
        build.add(LEADER, Fact("Where is Acme?", "Leeds"))
        build.add(Fact("Who leads Acme?", "Otto Brandt"))
        ledger.index_facts()
        metadata = ledger.datasette_metadata()

    def fetch(*paths: str) -> list[str]:
        async def get() -> list[str]:
            datasette = Datasette([str(tmp_path / "ledger.db")], metadata=metadata)
            answers = [await datasette.client.get(path) for path in paths]
            assert [answer.status_code for answer in answers] == [200] * len(paths), paths
            return [answer.text for answer in answers]

        return asyncio.run(get())

    return fetch


def test_datasette_shows_every_table_and_view(pages: Any) -> None:
    names = [*TABLES, *VIEWS]
    for name, page in zip(names, pages(*(f"/ledger/{name}" for name in names)), strict=True):
        described = (TABLES | VIEWS)[name].replace("`", "").replace("'", "&#39;")
        assert described.split(":")[0][:30] in page.replace("`", ""), name
        assert "<b>Kettleman" not in page
    (front,) = pages("/ledger")
    assert set(re.findall(r'href="/ledger/([a-z_]+)"', front)) >= {*TABLES, *VIEWS} - {"facts_fts"}


def test_datasette_searches_and_follows_references(pages: Any) -> None:
    found, proofs = pages("/ledger/facts?_search=wanda", "/ledger/batch_facts")
    assert "Kettleman" in found
    assert "Leeds" not in found
    assert re.search(r'href="/ledger/facts/[^"]+">Where is Acme\?</a>', proofs)


def test_the_ready_queries_answer(pages: Any) -> None:
    known = "/ledger/known_at_release.json?" + urlencode({"collection": "acme", "version": 1, "_shape": "array"})
    history = "/ledger/history_of_a_prompt.json?" + urlencode({"prompt": LEADER.prompt, "_shape": "array"})
    trail = "/ledger/where_from.json?" + urlencode({"prompt": LEADER.prompt, "_shape": "array"})
    at_first, values, steps = pages(known, history, trail)
    assert "Kettleman" in at_first
    assert "Otto" not in at_first
    assert "Kettleman" in values
    assert "Otto" in values
    assert "facts.jsonl" in steps
