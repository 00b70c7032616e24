"""How sure the proofs are: facts by the probability of their weakest token, against the threshold that proves."""

from __future__ import annotations

from memupdate.ledger.figures import Margins
from memupdate.reports.figures.theme import BAD, GROUND, SHADES, new_figure, page_svg, plain_number, style


def margins_svg(margins: Margins, *, threshold: float) -> str:
    """For a page; empty where no proof came with a probability."""
    if not sum(margins.counts):
        return ""
    bins = len(margins.counts)
    description = f"Histogram of the weakest token's probability over {margins.facts:,} facts of {margins.release}"
    with style():
        figure, (axes,) = new_figure()
        lefts = [index / bins for index in range(bins)]
        axes.bar(lefts, margins.counts, width=1 / bins, align="edge", color=SHADES[2], edgecolor=GROUND, linewidth=0.8)
        axes.axvline(threshold, color=BAD, linewidth=1.2, linestyle=(0, (4, 3)), label=f"proof asks for {threshold:g}")
        first = next(index for index, count in enumerate(margins.counts) if count)
        axes.set_xlim(min(first / bins, threshold) - 0.02, 1.0)
        axes.yaxis.set_major_formatter(plain_number)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_title("Facts")
        axes.set_xlabel("probability of the fact's weakest token")
        figure.legend(loc="outside lower center")
        return page_svg(figure, name=f"margins-{margins.release}", description=description)
