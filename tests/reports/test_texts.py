"""Texts of facts cannot break what they are shown in; figures never flatter."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from memupdate import Workspace
from memupdate.reports import texts
from memupdate.reports.markdown import code, markdown_summary

ANY_TEXT = st.text(alphabet=st.characters(), max_size=300)


@given(ANY_TEXT)
def test_shown_text_is_one_safe_bounded_line(text: str) -> None:
    line = texts.shown(text)
    assert len(line) <= texts.MAX_TEXT
    assert all(unicodedata.category(c) not in ("Cc", "Cs") for c in line)
    assert all(unicodedata.category(c) != "Cf" or c in "\u200c\u200d" for c in line)
    line.encode("utf-8")


@given(ANY_TEXT | st.text(alphabet="`| \\<*[a", max_size=30))
def test_a_code_span_holds_any_text_also_in_a_table(text: str) -> None:
    table = f"| a | b |\n| --- | --- |\n| {code(text)} | end |\n"
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(table)
    cells = [token for token in tokens if token.type == "inline"]
    assert [cell.content for cell in cells[:2]] == ["a", "b"]
    first, second = cells[2:]
    assert second.content == "end"
    assert first.children is not None
    expected = texts.shown(text).replace("|", "¦")
    if expected:
        (span,) = first.children
        assert (span.type, span.content) == ("code_inline", expected)
    else:
        assert first.content == "–"


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_percentages_keep_all_and_nothing_apart_from_nearly(total: int, part: int) -> None:
    share = min(part, total) / total
    text = texts.percent(share)
    assert (text == "100.0 %") == (share == 1)
    assert (text == "0.0 %") == (share == 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.01234, "0.0123"),
        (5, "5"),
        (1234567, "1,234,567"),
        (2.5, "2.5"),
        (1234.4, "1,234"),
        (-34.7, "-34.7"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert texts.number(value) == text


def test_the_summary_is_markdown_with_the_releases_and_no_html(reported: Workspace) -> None:
    report = reported.report()
    summary = markdown_summary(report)
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(summary)
    assert not [token for token in tokens if token.type == "html_block"]
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {"text", "code_inline", "strong_open", "strong_close", "softbreak"}
    rows = sum(token.type == "tr_open" for token in tokens)
    assert rows == 1 + len(report.releases) + 1 + sum(len(row.needs) for row in report.placements)
    assert "30 of 32" in summary
    assert "unproved 1 time**" in summary
    assert math.isfinite(report.batches[0].measured_loss_nats)
