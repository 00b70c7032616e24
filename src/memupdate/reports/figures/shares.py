"""Answers by phrasing, or by neighbourhood: the share that matches exactly, normalised, contained, and not at all; and by release."""

from __future__ import annotations

from collections.abc import Sequence

from memupdate.ledger.measures import MeasureCount
from memupdate.reports.content import ReleaseMeasures
from memupdate.reports.figures.theme import BAD, GOOD, GROUND, SHADES, new_figure, page_svg, plain_number, style

_COLOURS = (GOOD, SHADES[0], SHADES[3], BAD)
_TICKS = 8
"""Releases that are named below a plot, at most."""
_LABELS = ("exact", "normalised", "contained", "other")


def shares_svg(counts: Sequence[MeasureCount], *, name: str, title: str) -> str:
    """Stacked bars, one per part, for a page; empty where nothing was asked.

    Args:
        name: of the plot, unique in the page.
    """
    asked = [count for count in counts if count.asked][::-1]
    if not asked:
        return ""
    with style():
        figure, (axes,) = new_figure()
        lefts = [0.0] * len(asked)
        for index, (label, colour) in enumerate(zip(_LABELS, _COLOURS, strict=True)):
            widths = [100 * _numbers(count)[index] / count.asked for count in asked]
            axes.barh(range(len(asked)), widths, left=lefts, color=colour, edgecolor=GROUND, linewidth=0.8, label=label)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        axes.set_yticks(range(len(asked)), [_tick(count) for count in asked])
        axes.set_xlim(0, 100)
        axes.xaxis.set_major_formatter(plain_number)
        axes.grid(visible=False, axis="y")
        axes.set_title("% of the answers")
        figure.legend(loc="outside lower center", ncols=4)
        return page_svg(figure, name=name, description=f"{title}: " + "; ".join(map(_words, asked[::-1])))


def by_release_svg(rows: Sequence[ReleaseMeasures]) -> str:
    """Generality and locality of one collection's releases, for a page; empty where neither was measured."""
    lines = [
        ("generality", SHADES[2], [(row.release, row.generality_share) for row in rows]),
        ("locality", GOOD, [(row.release, row.locality_share) for row in rows]),
    ]
    known = [(name, colour, [(r, s) for r, s in points if s is not None]) for name, colour, points in lines]
    if not any(points for _, _, points in known):
        return ""
    with style():
        figure, (axes,) = new_figure()
        for name, colour, points in known:
            versions = [int(release.rpartition("@v")[2]) for release, _ in points]
            shares = [100 * share for _, share in points]
            axes.plot(versions, shares, color=colour, label=name, marker="o", markersize=4.5, linewidth=1.5)
        lowest = min(100 * share for _, _, points in known for _, share in points)
        axes.set_ylim(min(90.0, lowest - 2), 100.5)
        shown = [int(row.release.rpartition("@v")[2]) for row in rows][:: -(-len(rows) // _TICKS)]
        axes.set_xticks(shown, [f"v{version}" for version in shown])
        axes.set_xlabel("release")
        axes.set_title("Generality and locality, %")
        figure.legend(loc="outside lower center", ncols=2)
        collection = rows[0].collection
        return page_svg(
            figure, name=f"shares-{collection}", description=f"Generality and locality by release of {collection}"
        )


def _numbers(count: MeasureCount) -> tuple[int, int, int, int]:
    """Answers by the strictest way in which they match."""
    return (
        count.exact,
        count.normalised - count.exact,
        count.contained - count.normalised,
        count.asked - count.contained,
    )


def _tick(count: MeasureCount) -> str:
    part = count.part.replace(", another", ",\nanother").replace(" (a", "\n(a")
    return f"{part} ({count.asked:,})"


def _words(count: MeasureCount) -> str:
    return f"{count.part}, {100 * count.exact_share:.1f} % of {count.asked:,} exact"
