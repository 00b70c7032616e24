"""The law in pictures: loss that is left, facts proved and harm, against the target tokens written, a curve per rank.

Invariant: nothing is fitted here; each curve with its band is what the fit predicts at its confidence, each point is one
measured memory in the shade of its rank. Hollow points are censored: their loss drop had reached the base loss, so they
say "at least" only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memupdate.law.memory_law import is_saturated
from memupdate.law.points import Interval, LawPoint
from memupdate.reports.figures.theme import BAD, GROUND, QUIET, new_figure, page_svg, plain_number, shade_of, style
from memupdate.reports.figures.theme import write_picture as _write_picture

if TYPE_CHECKING:
    from memupdate.law.fit import LawFit

MAX_CURVES = 5
"""More ranks than this would be a tangle: the smallest, the largest and some evenly between get a curve."""
_CURVE_STEPS = 40
_SMALLEST_LOSS = 1e-4

_LOSS_TITLE = "Loss that is left, nats per target token"
_PROVED_TITLE = "Facts proved, %"
_HARM_TITLE = "Harm: KL to the base model, nats per token"


def draw_law(fit: LawFit, points: Sequence[LawPoint], path: Path, *, title: str) -> None:
    """Write one picture with two panels, loss and facts proved, to `path`, as SVG or PNG by its suffix.

    Args:
        fit: the laws.
        points: what it was fitted to; all of one placement.
        path: its folder must exist.
        title: one line above both panels.
    """
    with style():
        figure, (left, right) = new_figure(2)
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.012, ha="left")
        _draw_loss(left, fit, points)
        _draw_proved(right, fit, points)
        _add_legend(figure, left, points, columns=4)
        _write_picture(figure, path, title=title)


def loss_svg(fit: LawFit, points: Sequence[LawPoint]) -> str:
    """For a page: the loss that is left."""
    description = f"Loss that is left against target tokens, one curve for each of ranks {_named(points)}"
    return _panel("law-loss", description, points, lambda axes: _draw_loss(axes, fit, points))


def proved_svg(fit: LawFit, points: Sequence[LawPoint], *, wanted_share: float) -> str:
    """For a page: the share of facts proved, with the share that the policy wants."""
    description = f"Share of facts proved against target tokens, one curve for each of ranks {_named(points)}"

    def draw(axes: Any) -> None:
        _draw_proved(axes, fit, points)
        _draw_limit(axes, 100 * wanted_share, "policy: at least")

    return _panel("law-proved", description, points, draw)


def harm_svg(fit: LawFit, points: Sequence[LawPoint], *, max_kl_nats: float | None) -> str:
    """For a page: harm, with the policy's budget. Empty where the fit has no harm data."""
    if fit.predict_kl(points[0].effective_parameters, points[0].target_tokens) is None:
        return ""
    description = f"Harm against target tokens, one curve for each of ranks {_named(points)}"

    def draw(axes: Any) -> None:
        _draw_harm(axes, fit, points)
        if max_kl_nats is not None:
            _draw_limit(axes, max_kl_nats, "policy: at most")

    return _panel("law-harm", description, points, draw)


def chosen_ranks(points: Sequence[LawPoint]) -> list[int]:
    """The ranks that get a curve, at most `MAX_CURVES`, ends included."""
    ranks = sorted({point.rank for point in points})
    if len(ranks) <= MAX_CURVES:
        return ranks
    step = (len(ranks) - 1) / (MAX_CURVES - 1)
    return [ranks[round(index * step)] for index in range(MAX_CURVES)]


def _panel(name: str, description: str, points: Sequence[LawPoint], draw: Callable[[Any], None]) -> str:
    with style():
        figure, (axes,) = new_figure()
        draw(axes)
        _add_legend(figure, axes, points, columns=3)
        return page_svg(figure, name=name, description=description)


def _draw_loss(axes: Any, fit: LawFit, points: Sequence[LawPoint]) -> None:
    _draw_curves(axes, points, lambda parameters, tokens: fit.predict_loss(parameters, tokens))
    _draw_points(axes, points, lambda point: max(point.loss_after_nats, _SMALLEST_LOSS))
    _finish(axes, points, _LOSS_TITLE)
    _log_values(axes)


def _draw_proved(axes: Any, fit: LawFit, points: Sequence[LawPoint]) -> None:
    _draw_curves(axes, points, lambda parameters, tokens: fit.predict_proved_share(parameters, tokens), scale=100)
    _draw_points(axes, points, lambda point: 100 * point.facts_proved / point.facts)
    _finish(axes, points, _PROVED_TITLE)
    low = min([100 * point.facts_proved / point.facts for point in points])
    axes.set_ylim(max(0, 10 * math.floor(low / 10) - 10), 101)


def _draw_harm(axes: Any, fit: LawFit, points: Sequence[LawPoint]) -> None:
    _draw_curves(axes, points, lambda parameters, tokens: fit.predict_kl(parameters, tokens) or Interval(0, 0, 0))
    _draw_points(axes, [point for point in points if point.kl_nats is not None], lambda point: point.kl_nats or 0.0)
    _finish(axes, points, _HARM_TITLE)
    axes.set_ylim(bottom=0)


def _draw_curves(
    axes: Any, points: Sequence[LawPoint], predict: Callable[[float, float], Interval], *, scale: float = 1
) -> None:
    ranks, sizes = chosen_ranks(points), _size_axis(points)
    per_rank = points[0].effective_parameters / points[0].rank
    for index, rank in enumerate(ranks):
        shade = shade_of(index, len(ranks))
        found = [predict(rank * per_rank, size) for size in sizes]
        axes.plot(sizes, [scale * value.mid for value in found], color=shade, linewidth=1.8, label=f"rank {rank}")
        low, high = [scale * value.low for value in found], [scale * value.high for value in found]
        axes.fill_between(sizes, low, high, color=shade, alpha=0.12, linewidth=0)


def _draw_points(axes: Any, points: Sequence[LawPoint], value: Callable[[LawPoint], float]) -> None:
    ranks = chosen_ranks(points) if points else []
    for point in sorted(points, key=lambda point: (point.rank, point.target_tokens, point.loss_after_nats)):
        # A rank without a curve takes the shade of the nearest that has one.
        nearest = min(range(len(ranks)), key=lambda index: abs(math.log(ranks[index] / point.rank)))
        axes.plot(
            [point.target_tokens],
            [value(point)],
            **_marker(
                point.origin == "batch",
                face=GROUND if is_saturated(point) else shade_of(nearest, len(ranks)),
                edge=shade_of(nearest, len(ranks)),
            ),
        )


def _marker(is_batch: bool, *, face: str, edge: str) -> dict[str, Any]:
    return {
        "marker": "D" if is_batch else "o",
        "markersize": 4.5 if is_batch else 5,
        "markerfacecolor": face,
        "markeredgecolor": edge,
        "markeredgewidth": 1.3,
        "linestyle": "none",
        "clip_on": False,
        "zorder": 3,
    }


def _draw_limit(axes: Any, value: float, label: str) -> None:
    axes.axhline(value, color=BAD, linewidth=1.2, linestyle=(0, (4, 3)), label=label)


def _size_axis(points: Sequence[LawPoint]) -> list[float]:
    low, high = min(point.target_tokens for point in points), max(point.target_tokens for point in points)
    return [low * (high / low) ** (index / (_CURVE_STEPS - 1)) for index in range(_CURVE_STEPS)]


def _finish(axes: Any, points: Sequence[LawPoint], title: str) -> None:
    axes.set_xscale("log")
    axes.margins(x=0.03)
    axes.set_xticks(_ticks(points))
    axes.xaxis.set_major_formatter(plain_number)
    axes.minorticks_off()
    axes.set_xlabel("target tokens written, ℓ")
    axes.set_title(title)


def _ticks(points: Sequence[LawPoint]) -> list[float]:
    """1, 2, 5 steps that lie within the measured sizes."""
    low, high = min(point.target_tokens for point in points), max(point.target_tokens for point in points)
    steps = [step * 10.0**power for power in range(7) for step in (1, 2, 5)]
    within = [step for step in steps if low / 1.05 <= step <= high * 1.05]
    return within if len(within) >= 2 else [float(low), float(high)]


def _log_values(axes: Any) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [step * 10.0**power for power in range(-4, 3) for step in (1, 2, 5)]
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter(plain_number)
    axes.minorticks_off()


def _add_legend(figure: Any, axes: Any, points: Sequence[LawPoint], *, columns: int) -> None:
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    marks = {"calibration": (False, QUIET), "hollow: “at least” only": (False, GROUND)}
    if any(point.origin == "batch" for point in points):
        marks["batch"] = (True, QUIET)
    for label, (is_batch, face) in marks.items():
        handles.append(Line2D([], [], **_marker(is_batch, face=face, edge=QUIET)))
        labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _named(points: Sequence[LawPoint]) -> str:
    return ", ".join(str(rank) for rank in chosen_ranks(points))
