"""The law in one picture: what is left of the loss, and how many facts are proved, against the rank.

Invariant: equal fits and points give an equal SVG, byte for byte, with the same Matplotlib. Drawn on its own light
ground with dark ink, so that it reads the same on light and dark pages. Nothing is fitted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memupdate.law.memory_law import is_saturated
from memupdate.law.points import Interval, LawPoint

if TYPE_CHECKING:
    from memupdate.law.fit import LawFit

MAX_CURVES = 5
"""More sizes than this would be a tangle: the smallest, the largest and some evenly between are drawn."""

_GROUND, _INK, _QUIET, _GRID = "#fcfcfa", "#1d2733", "#5b6673", "#e3e6e9"
# One hue from light to dark, since ℓ is a magnitude; every step keeps at least 3:1 against the ground.
_SHADES = ("#4f9bd9", "#2f7fc4", "#1f64a6", "#164b82", "#0d3159")
_CURVE_STEPS = 60
_STYLE = {
    "svg.hashsalt": "memupdate",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _QUIET,
    "axes.facecolor": _GROUND,
    "figure.facecolor": _GROUND,
    "savefig.facecolor": _GROUND,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_law(fit: LawFit, points: Sequence[LawPoint], path: Path, *, title: str) -> None:
    """Write the picture to `path`, as SVG or PNG by its suffix.

    Left: residual loss (nats per target token, log axis). Right: share of facts proved. One shade per ℓ: curve,
    interval band at the fit's confidence, and the points; hollow points are saturated (they say "at least").

    Args:
        fit: the laws.
        points: what it was fitted to; all of one placement.
        path: its folder must exist.
        title: one line above both panels.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.012, ha="left")
        left, right = figure.subplots(1, 2)
        for shade, size in zip(_shades(points), chosen_sizes(points), strict=True):
            _draw_size(left, right, fit, points, size, shade)
        _finish_axes(left, right, points)
        handles, labels = left.get_legend_handles_labels()
        handles += _marker_handles()
        labels += ["measured", "measured, saturated: “at least”"]
        columns = len(labels) if len(labels) <= 6 else 4
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        metadata = {"Date": None, "Title": title} if path.suffix == ".svg" else {"Title": title}
        figure.savefig(path, dpi=150, metadata=metadata)


def chosen_sizes(points: Sequence[LawPoint]) -> list[int]:
    """The target-token counts that get a curve, at most `MAX_CURVES`, ends included."""
    sizes = sorted({point.target_tokens for point in points})
    if len(sizes) <= MAX_CURVES:
        return sizes
    step = (len(sizes) - 1) / (MAX_CURVES - 1)
    return [sizes[round(index * step)] for index in range(MAX_CURVES)]


def _shades(points: Sequence[LawPoint]) -> list[str]:
    count = len(chosen_sizes(points))
    step = (len(_SHADES) - 1) / max(count - 1, 1)
    return [_SHADES[round(index * step)] for index in range(count)]


def _draw_size(left: Any, right: Any, fit: LawFit, points: Sequence[LawPoint], size: int, shade: str) -> None:
    ranks = _rank_axis(points)
    per_rank = points[0].effective_parameters / points[0].rank
    losses = [fit.predict_loss(rank * per_rank, size) for rank in ranks]
    shares = [fit.predict_proved_share(rank * per_rank, size) for rank in ranks]
    _draw_curve(left, ranks, losses, shade, f"ℓ = {size:,} tokens")
    _draw_curve(right, ranks, shares, shade, "")
    for point in points:
        if point.target_tokens == size:
            face = _GROUND if is_saturated(point) else shade
            marker: dict[str, Any] = {
                "marker": "o",
                "markersize": 6,
                "markerfacecolor": face,
                "markeredgecolor": shade,
                "zorder": 3,
            }
            left.plot([point.rank], [max(point.loss_after_nats, 1e-4)], markeredgewidth=1.5, **marker)
            right.plot(
                [point.rank], [100 * point.facts_proved / point.facts], markeredgewidth=1.5, clip_on=False, **marker
            )


def _draw_curve(axes: Any, ranks: Sequence[float], values: Sequence[Interval], shade: str, label: str) -> None:
    scale = 1.0 if label else 100.0
    axes.plot(ranks, [scale * value.mid for value in values], color=shade, linewidth=2, label=label or None)
    low, high = [scale * value.low for value in values], [scale * value.high for value in values]
    axes.fill_between(ranks, low, high, color=shade, alpha=0.12, linewidth=0)


def _rank_axis(points: Sequence[LawPoint]) -> list[float]:
    low, high = min(point.rank for point in points), max(point.rank for point in points)
    return [low * (high / low) ** (index / (_CURVE_STEPS - 1)) for index in range(_CURVE_STEPS)]


def _finish_axes(left: Any, right: Any, points: Sequence[LawPoint]) -> None:
    ranks = sorted({point.rank for point in points})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
        axes.set_xlabel("LoRA rank")
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    left.set_yscale("log")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.set_title("Loss that is left, nats per target token", loc="left", fontsize=10)
    right.set_title("Facts proved, %", loc="left", fontsize=10)
    right.set_ylim(0, 102)


def _marker_handles() -> list[Any]:
    from matplotlib.lines import Line2D

    shared: dict[str, Any] = {
        "marker": "o",
        "linestyle": "none",
        "markersize": 6,
        "markeredgecolor": _QUIET,
        "markeredgewidth": 1.5,
    }
    return [Line2D([], [], markerfacecolor=face, **shared) for face in (_QUIET, _GROUND)]
