"""Predicted against measured loss, one mark per batch: on the diagonal the law was right, and the bar is its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memupdate.reports.content import BatchComparison
from memupdate.reports.figures.theme import BAD, GOOD, QUIET, new_figure, page_svg, plain_number, style

_SMALLEST = 1e-4


def comparison_svg(batches: Sequence[BatchComparison]) -> str:
    """For a page; empty without batches."""
    if not batches:
        return ""
    inside = sum(batch.loss_inside for batch in batches)
    description = f"Predicted against measured loss of {len(batches)} batches; {inside} lie within their interval"
    with style():
        figure, (axes,) = new_figure()
        _draw(axes, batches)
        figure.legend(loc="outside lower center", ncols=3)
        return page_svg(figure, name="comparison", description=description)


def _draw(axes: Any, batches: Sequence[BatchComparison]) -> None:
    low, high = _range(batches)
    axes.plot([low, high], [low, high], color=QUIET, linewidth=1, label="as predicted")
    for chosen, colour, label in ((True, GOOD, "within its interval"), (False, BAD, "outside")):
        found = [batch for batch in batches if batch.loss_inside is chosen]
        if found:
            predicted = [max(batch.predicted_loss_nats.mid, _SMALLEST) for batch in found]
            below = [max(0.0, batch.predicted_loss_nats.mid - batch.predicted_loss_nats.low) for batch in found]
            above = [batch.predicted_loss_nats.high - batch.predicted_loss_nats.mid for batch in found]
            axes.errorbar(
                predicted,
                [max(batch.measured_loss_nats, _SMALLEST) for batch in found],
                xerr=[below, above],
                fmt="o" if chosen else "X",
                markersize=5,
                color=colour,
                elinewidth=1,
                label=label,
            )
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_title("Measured loss, nats per target token")
    axes.set_xlabel("predicted loss, with its interval")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain_number)
        axis.get_major_locator().set_params(nbins=5)


def _range(batches: Sequence[BatchComparison]) -> tuple[float, float]:
    values = [batch.measured_loss_nats for batch in batches]
    values += [end for batch in batches for end in (batch.predicted_loss_nats.low, batch.predicted_loss_nats.high)]
    reach = max(values) - min(values) or max(values) or 1.0
    return max(0.0, min(values) - 0.08 * reach), max(values) + 0.08 * reach
