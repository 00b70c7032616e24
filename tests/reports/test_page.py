"""The page asks for nothing, runs nothing, can be read without its pictures and colours, and repeats byte for byte."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from memupdate import Workspace
from memupdate.reports.figures.theme import VARIABLES
from memupdate.reports.page import html_page
from support import set_policy

VOID = {"meta", "br", "hr", "img", "link", "input"}
DRAWING = {
    "svg",
    "g",
    "defs",
    "path",
    "use",
    "rect",
    "clippath",
    "text",
    "title",
    "circle",
    "lineargradient",
    "stop",
    "image",
}
WRITING = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer", "h1", "h2", "h3", "p", "strong",
    "div", "span", "ul", "ol", "li", "i", "dl", "dt", "dd", "figure", "figcaption", "details", "summary", "table", "caption",
    "thead", "tbody", "tr", "th", "td", "bdi",
}  # fmt: skip


class Page(HTMLParser):
    """The page as a browser's parser takes it apart."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def text(reported: Workspace) -> str:
    return html_page(reported.report())


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_every_element_is_one_of_ours_and_closed(page: Page) -> None:
    assert not page.open
    assert {name for name, _ in page.elements} <= DRAWING | WRITING
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_texts_of_facts_are_texts(page: Page, reported: Workspace, hostile: tuple[str, ...]) -> None:
    shown = page.texts["bdi"]
    weak = {fact.prompt for fact in reported.report().weak_facts}
    for text in hostile[:5]:
        assert f"What is {text}?" in weak
        assert f"What is {text}?" in shown
    assert not any("\u202e" in line for line in shown)
    assert "token 2 should be “<b>”, the model says “`no`”" in " ".join(page.texts["p"])


def test_nothing_is_asked_of_a_network(text: str, page: Page) -> None:
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"):
                assert value is not None
                assert value.startswith("#")
            assert "url(" not in (value or "").replace("url(#", "")
    style = "".join(page.texts["style"])
    assert "@import" not in style
    assert "url(" not in style
    assert "<?xml" not in text
    assert "<!DOCTYPE" not in text


def test_ids_are_unique_and_references_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    values = [value for _, attributes in page.elements for value in attributes.values() if value]
    used = {found for value in values for found in re.findall(r"url\(#([^)]+)\)", value)}
    used |= {
        value[1:]
        for _, attributes in page.elements
        for name in ("href", "xlink:href")
        if (value := attributes.get(name))
    }
    assert used == set(ids)


def test_every_plot_has_words_and_a_table(page: Page) -> None:
    plots = page.all("svg")
    assert len(plots) == len(page.all("figure")) == 9
    assert len(page.all("table")) == len(plots) + 1  # placements have no plot
    assert all(plot["role"] == "img" and len(plot["aria-label"] or "") > 20 for plot in plots)
    assert len({plot["aria-label"] for plot in plots}) == len(plots)
    assert len(page.all("tr")) > 2 * len(plots)
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"
    assert [name for name, _ in page.elements if name in ("h1", "h2", "h3")][:2] == ["h1", "h2"]


def test_plots_take_every_colour_from_the_page(text: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", drawings)
    assert not re.findall(r"(?:fill|stroke): (?!var\(|none|url\()", drawings)
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", drawings))
    assert {"ink", "quiet", "ground", "grid"} <= used <= set(VARIABLES.values())


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def palettes(page: Page) -> list[dict[str, str]]:
    """The variables in light, in dark and in print."""
    style = "".join(page.texts["style"])
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    found = [dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{3,6})", block)) for block in blocks]
    return [{n: c if len(c) == 7 else "#" + "".join(2 * d for d in c[1:]) for n, c in p.items()} for p in found]


def test_contrast_holds_in_light_dark_and_print(page: Page) -> None:
    found = palettes(page)
    assert len(found) == 3
    for palette in found:
        assert set(VARIABLES.values()) <= set(palette)
        for ground in (palette["ground"], palette["page"]):
            for text in ("ink", "quiet", "bad"):
                assert contrast(palette[text], ground) >= 4.5, (text, ground)
        for mark in ("good", "bad", *(f"shade-{n}" for n in range(1, 6))):
            assert contrast(palette[mark], palette["ground"]) >= 3 - 1e-9, (mark, palette)
    pairs = re.findall(r"background: (#[0-9a-f]{6}); color: (#[0-9a-f]{3,6})", "".join(page.texts["style"]))
    assert len(pairs) == 6
    for ground, ink in pairs:
        assert contrast(ink if len(ink) == 7 else "#ffffff", ground) >= 4.5


def test_the_same_ledger_gives_the_same_bytes(text: str, reported: Workspace) -> None:
    script = "import sys\nfrom memupdate import Workspace\nfrom memupdate.reports.page import html_page\n"
    script += "sys.stdout.buffer.write(html_page(Workspace(sys.argv[1]).report()).encode())"
    done = subprocess.run([sys.executable, "-c", script, str(reported.root)], check=True, capture_output=True)
    assert done.stdout.decode() == text


def test_no_folder_of_this_machine_is_told(text: str, reported: Workspace) -> None:
    assert str(reported.root) not in text
    assert str(reported.root.parent) not in text


@pytest.mark.parametrize("guard", ["true", "false"])
def test_a_memory_before_its_first_batch_has_a_page(guard: str, uncalibrated: Workspace, with_law: Any) -> None:
    set_policy(uncalibrated.root / "policy.toml", {"guard__enabled": guard})
    report = with_law(uncalibrated.root).report()
    assert (report.limits.max_kl_nats is None) == (guard == "false")
    (capacity,) = report.collections
    assert (capacity.rank, capacity.target_tokens_live, capacity.used_share, capacity.bits_per_parameter) == (
        0,
        0,
        0,
        0,
    )
    assert capacity.now.rank == report.limits.min_rank
    text = html_page(report)
    page = Page(text)
    assert not page.open
    assert len(page.all("svg")) == 3
    assert "nothing written yet" in text
    assert "Too few batches to say: 0 released, 3 needed." in text
    assert ("policy: at most" in text) == (guard == "true")
