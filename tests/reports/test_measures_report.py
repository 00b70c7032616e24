"""Measures in the report: counted as the ledger counts them, in terminal, page and Markdown, whatever texts the tokens hold."""

from __future__ import annotations

import io
import shutil
from html.parser import HTMLParser

import pytest
from rich.console import Console

from memupdate import Workspace
from memupdate.ledger.measures import MeasureRecord, TextRecord, TokenRecord
from memupdate.reports.capacity_tables import capacity_renderables
from memupdate.reports.content import CapacityReport
from memupdate.reports.markdown import markdown_summary
from memupdate.reports.page import html_page

HOSTILE_TOKENS = ("<script>", "}}", "`|`", " a\u202e", "")


class Page(HTMLParser):
    """Texts by the element that holds them, and what plots say to those who cannot see them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: dict[str, list[str]] = {}
        self.labels: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "svg":
            self.labels.append(dict(attrs).get("aria-label") or "")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def report(reported: Workspace, tmp_path_factory: pytest.TempPathFactory) -> CapacityReport:
    root = tmp_path_factory.mktemp("measured") / "ws"
    shutil.copytree(reported.root, root)
    workspace = Workspace(root)
    with workspace.writer("test") as ledger:
        for version, exact in ((3, 6), (4, 9)):
            name = f"acme@v{version}"
            facts = ledger.live_facts("acme", as_of_version=version)
            rows = [
                MeasureRecord(
                    name, "in-process", measure, part, facts[i].id, "chat", "Q?", "A", "B" if i >= exact else None,
                    "exact" if i < exact else judged, 0.9,
                )
                for measure, part, judged in (
                    ("generality", "held-out phrasing", "contained"),
                    ("generality", "system prompt", "other"),
                    ("locality", "same subject, another relation", "normalised"),
                    ("locality", "same subject, another relation (a guess)", "other"),
                )
                for i in range(10)
            ]  # fmt: skip
            tokens = [
                TokenRecord(name, facts[0].id, i, token, 0.4 if i == 1 else 0.95, "<b>" if i == 1 else token, 0.95)
                for i, token in enumerate(HOSTILE_TOKENS)
            ]
            ledger.record_measures(name, rows, [TextRecord(name, "own|text.txt", 100, 5.0, 5.05, 0.0123)], tokens)
    return workspace.report()


def test_newest_releases_are_counted_and_the_newest_comes_with_its_tokens(report: CapacityReport) -> None:
    third, fourth = report.measures
    assert (third.release, fourth.release) == ("acme@v3", "acme@v4")
    assert (third.generality_share, third.locality_share) == (0.6, 0.6)
    assert (fourth.generality_share, fourth.locality_share) == (0.9, 0.9), "neither other forms nor guesses count"
    assert fourth.perplexity_ratio == pytest.approx(1.01)
    assert third.tokens == ()
    assert [t.token for t in fourth.tokens[0].tokens] == list(HOSTILE_TOKENS)


def test_the_page_shows_bars_tables_and_tokens(report: CapacityReport) -> None:
    text = html_page(report)
    page = Page(text)
    assert "<script" not in text
    assert any("held-out phrasing, 90.0 % of 10 exact" in label for label in page.labels)
    assert any("same subject, another relation (a guess), 90.0 % of 10 exact" in label for label in page.labels)
    assert "Generality and locality by release" in " ".join(page.texts["h3"])
    boxes = page.texts["bdi"]
    for shown in ("<script>", "}}", "`|`", "␣a�", "(empty)", "<b>"):
        assert shown in boxes
    assert "perplexity of general text (own|text.txt) +1.00 %, KL 0.0123" in " ".join(page.texts["p"])
    assert html_page(report) == text


def test_the_same_figures_in_terminal_and_markdown(report: CapacityReport) -> None:
    summary = markdown_summary(report)
    assert "| generality | held-out phrasing | 10 | 90.0 % | 90.0 % | 100.0 % | 0.9 |" in summary
    assert "| locality | same subject, another relation | 10 | 90.0 % | 100.0 % | 100.0 % | 0.9 |" in summary
    assert "| recall, as served | own prompt | 36 |" in summary
    assert "(`own¦text.txt`) +1.00 %" in summary
    console = Console(record=True, width=160, file=io.StringIO())
    for part in capacity_renderables(report):
        console.print(part)
    shown = console.export_text()
    assert "What clients get of acme@v4" in shown
    assert "held-out phrasing" in shown


def test_without_measures_nothing_is_said(reported: Workspace) -> None:
    report = reported.report()
    assert report.measures == ()
    assert "beyond verbatim" not in html_page(report)
    assert "held-out" not in markdown_summary(report)
