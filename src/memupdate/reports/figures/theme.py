"""How every plot looks, and how one becomes a file or a piece of a page.

Invariant: equal data give an equal SVG, byte for byte, with the same Matplotlib; a page's SVG asks for nothing from
outside, has no colour of its own (all are CSS variables of the page, so that dark mode and print work) and no id that
another plot of the page has. Text stays text. No pyplot, so no state is shared.

Matplotlib rather than SVG by hand: log axes, ticks and bands are its trade, and it is a dependency already.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

GROUND, INK, QUIET, GRID = "#fcfcfa", "#1d2733", "#5b6673", "#e3e6e9"
GOOD, BAD = "#0f7b6c", "#b3371d"
SHADES = ("#4793d3", "#2f7fc4", "#1f64a6", "#164b82", "#0d3159")
"""One hue from light to dark, for magnitudes; each step keeps at least 3:1 against the ground."""
VARIABLES = {
    GROUND: "ground",
    INK: "ink",
    QUIET: "quiet",
    GRID: "grid",
    GOOD: "good",
    BAD: "bad",
    **{shade: f"shade-{number}" for number, shade in enumerate(SHADES, start=1)},
}
"""Colour as drawn → name of the CSS variable that a page puts in its place."""

PANEL_INCHES = (4.1, 2.9)
"""One panel: its letters stay readable at the width of a phone."""
_FONT = "DejaVu Sans"
_STYLE = {
    "svg.hashsalt": "memupdate",
    "svg.fonttype": "none",
    "font.family": _FONT,
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.facecolor": GROUND,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "figure.facecolor": GROUND,
    "savefig.facecolor": GROUND,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def style() -> AbstractContextManager[None]:
    """Matplotlib's settings for the block in which a figure is drawn and saved."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def new_figure(panels: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure of so many panels side by side, and their axes. Use inside `style()`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def shade_of(index: int, count: int) -> str:
    """The shade of the `index`-th of `count` magnitudes, smallest first."""
    return SHADES[round(index * (len(SHADES) - 1) / max(count - 1, 1))]


def plain_number(value: float, _position: int | None = None) -> str:
    """A tick's label: `0.01`, `200`, `5,000`."""
    return f"{value:,.0f}" if value >= 1 and value == round(value) else f"{value:g}"


def write_picture(figure: Any, path: Path, *, title: str) -> None:
    """Save as SVG or PNG by the suffix of `path`, on the light ground with dark ink, for pages of any colour."""
    figure.savefig(path, dpi=150, metadata=_metadata(title) if path.suffix == ".svg" else {"Title": title})


def page_svg(figure: Any, *, name: str, description: str) -> str:
    """The figure as `<svg>` for inside a page.

    Args:
        name: makes its ids its own; unique in the page.
        description: what a reader who cannot see it must know.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_metadata(description))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for child in list(root):
        # Metadata says who made the file; the style rule would apply to the whole page, which has its own.
        if child.tag == f"{{{_SVG}}}metadata" or child.find(f"{{{_SVG}}}style") is not None:
            root.remove(child)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": description, "class": "plot"}
    _own_ids(root, name)
    text = ElementTree.tostring(root, encoding="unicode")
    return _with_variables(text)


def _metadata(title: str) -> dict[str, str | None]:
    return {"Date": None, "Creator": None, "Title": title}


def _own_ids(root: ElementTree.Element, name: str) -> None:
    """Ids that something refers to get the plot's name in front; all others go."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in used:
            element.attrib["id"] = f"{name}-{own}"
        for key, value in element.attrib.items():
            if key == f"{{{_XLINK}}}href":
                element.attrib[key] = value.replace("#", f"#{name}-", 1)
            elif "url(#" in value:
                element.attrib[key] = value.replace("url(#", f"url(#{name}-")


def _with_variables(text: str) -> str:
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace(f"'{_FONT}'", "system-ui, sans-serif")
