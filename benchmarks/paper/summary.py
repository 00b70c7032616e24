"""What is made of measured cells: figures, tables, the law per method, and a picture.

Invariant: nothing is chosen by its outcome. Shares are means over every cell of a method; a law is fitted to every cell of its method
and kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Measured, Recipe, law_point
from benchmarks.recording import markdown_table

from memupdate.law.memory_law import MemoryLaw, fit_memory_law, is_saturated, why_not_fitted
from memupdate.reports.figures.theme import BAD, GROUND, QUIET, new_figure, plain_number, shade_of, style, write_picture

CONFIDENCE = 0.9
_BOOTSTRAP = 200
SHORT = {
    "sft": "sft",
    "memft-ot": "ot",
    "memft-ot-full": "ot_full",
    "memft-sw-curriculum": "sw",
    "memft-sw-window": "sw",
}
"""Method → its name in a figure's name."""


def laws(rows: Sequence[Measured], recipe: Recipe) -> dict[tuple[str, str], MemoryLaw | str]:
    """(kind, method) → the paper's law over its cells, or why it cannot be fitted."""
    found: dict[tuple[str, str], MemoryLaw | str] = {}
    for kind, method in dict.fromkeys((row.cell.kind, row.cell.method) for row in rows):
        points = [law_point(row, recipe) for row in rows if (row.cell.kind, row.cell.method) == (kind, method)]
        reason = why_not_fitted(points)
        found[kind, method] = reason or fit_memory_law(points, confidence=CONFIDENCE, bootstrap=_BOOTSTRAP, seed=0)
    return found


def figures(
    rows: Sequence[Measured], fitted: dict[tuple[str, str], MemoryLaw | str], *, kind: str
) -> dict[str, float | int | None]:
    """Shares over all cells of `kind`, and each method's law; laws of other kinds are named with theirs."""
    found: dict[str, float | int | None] = {"cells": len(rows)}
    for method in dict.fromkeys(row.cell.method for row in rows if row.cell.kind == kind):
        own, short = [row for row in rows if (row.cell.kind, row.cell.method) == (kind, method)], SHORT[method]
        found |= {
            f"exact_match_{short}": _mean(own, lambda row: row.exact_share),
            f"prefix_share_{short}": _mean(own, lambda row: row.prefix_share),
            f"token_match_{short}": _mean(own, lambda row: row.token_share),
            f"final_loss_nats_{short}": _mean(own, lambda row: row.loss_after_nats),
            f"steps_{short}": _mean(own, lambda row: row.steps),
        }
    for (of_kind, method), law in fitted.items():
        suffix = SHORT[method] + (f"_{of_kind}" if of_kind != kind else "")
        found[f"law_r2_{suffix}"] = law.r2 if isinstance(law, MemoryLaw) else None
        found[f"law_mape_unseen_cell_{suffix}"] = law.mape_unseen_cell if isinstance(law, MemoryLaw) else None
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def tables(rows: Sequence[Measured], fitted: dict[tuple[str, str], MemoryLaw | str], what: str) -> str:
    """Markdown: for each kind, a table of exact match and one of final loss, methods and ranks against lengths; then the laws.

    Args:
        rows: all cells.
        fitted: of `laws`.
        what: `exact` (share of examples) or `prefix` (share of the passage before the first mistake).
    """
    measures: dict[str, Callable[[Measured], float]] = {
        "exact": lambda row: row.exact_share,
        "prefix": lambda row: row.prefix_share,
    }
    names = {"exact": "Exact match, %", "prefix": "Share of the passage before the first mistake, %"}
    parts = []
    for kind in dict.fromkeys(row.cell.kind for row in rows):
        own = [row for row in rows if row.cell.kind == kind]
        of_kind = f" ({kind})" if kind else ""
        parts.append(f"**{names[what]}**{of_kind}, by method and rank against target tokens ℓ:\n")
        parts.append(_grid(own, lambda row: f"{100 * measures[what](row):.1f}"))
        parts.append(f"**Final loss**{of_kind}, nats per target token:\n")
        parts.append(_grid(own, lambda row: f"{row.loss_after_nats:.3f}"))
    parts.append("**The law** ΔL = C·r^α·ℓ^(−β) + b, over the cells that are not saturated:\n")
    parts.append(_law_table(fitted))
    return "\n".join(parts)


def draw(
    rows: Sequence[Measured],
    fitted: dict[tuple[str, str], MemoryLaw | str],
    recipe: Recipe,
    path: Path,
    *,
    kind: str,
    what: str,
) -> None:
    """One picture: the law of plain SFT with its cells, and how much each method holds at each rank, mean over lengths.

    Args:
        rows: all cells; only those of `kind` are drawn.
        fitted: of `laws`.
        recipe: of the cells.
        path: an SVG file.
        kind: of the data.
        what: `exact` or `prefix`, as in `tables`.
    """
    own = [row for row in rows if row.cell.kind == kind]
    with style():
        figure, (left, right) = new_figure(2)
        _draw_law(left, [row for row in own if row.cell.method == "sft"], fitted.get((kind, "sft")), recipe)
        _draw_methods(right, own, what)
        figure.legend(loc="outside lower center", ncols=5)
        write_picture(figure, path, title=path.stem)


def _draw_law(axes: Any, rows: Sequence[Measured], law: MemoryLaw | str | None, recipe: Recipe) -> None:
    ranks = sorted({row.cell.rank for row in rows})
    for index, rank in enumerate(ranks):
        shade, own = shade_of(index, len(ranks)), [row for row in rows if row.cell.rank == rank]
        for row in own:
            face = GROUND if is_saturated(law_point(row, recipe)) else shade
            drop = row.loss_before_nats - row.loss_after_nats
            axes.plot(
                [row.target_tokens], [drop], "o", markerfacecolor=face, markeredgecolor=shade, markersize=5, zorder=3
            )
        axes.plot([], [], "o-", color=shade, markersize=5, label=f"rank {rank}")
        if isinstance(law, MemoryLaw):
            low, high = min(row.target_tokens for row in own), max(row.target_tokens for row in own)
            axis = [low * (high / low) ** (step / 60) for step in range(61)]
            most = max(row.loss_before_nats for row in own)
            curve = [min(law.predict_drop(rank, size, CONFIDENCE).mid, most) for size in axis]
            axes.plot(axis, curve, color=shade, linewidth=1.5)
    axes.set_xscale("log")
    axes.margins(x=0.05)
    axes.set_xticks(sorted({row.cell.length for row in rows}))
    axes.xaxis.set_major_formatter(plain_number)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title("SFT: drop in loss ΔL, nats per token; hollow: saturated")
    axes.set_xlabel("target tokens written, ℓ")


def _draw_methods(axes: Any, rows: Sequence[Measured], what: str) -> None:
    marks = {"sft": (QUIET, "s"), "memft-ot": (shade_of(1, 5), "o"), "memft-ot-full": (shade_of(3, 5), "^")}
    for method in dict.fromkeys(row.cell.method for row in rows):
        own = [row for row in rows if row.cell.method == method]
        ranks = sorted({row.cell.rank for row in own})
        shares = [
            _mean(
                [row for row in own if row.cell.rank == rank],
                lambda row: row.exact_share if what == "exact" else row.prefix_share,
            )
            for rank in ranks
        ]
        colour, mark = marks.get(method, (BAD, "D"))
        axes.plot(ranks, [100 * share for share in shares], color=colour, marker=mark, markersize=4.5, label=method)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(plain_number)
    axes.set_ylim(0, 102)
    axes.set_title(f"{'Exact match' if what == 'exact' else 'Before the first mistake'}, %, mean over lengths")
    axes.set_xlabel("rank")


def _grid(rows: Sequence[Measured], show: Callable[[Measured], str]) -> str:
    lengths = sorted({row.cell.length for row in rows})
    lines = []
    for method, rank in dict.fromkeys((row.cell.method, row.cell.rank) for row in rows):
        found = {row.cell.length: row for row in rows if (row.cell.method, row.cell.rank) == (method, rank)}
        lines.append([f"{method}, rank {rank}", *(show(found[size]) if size in found else "" for size in lengths)])
    return markdown_table(["", *(f"{size:,}" for size in lengths)], lines)


def _law_table(fitted: dict[tuple[str, str], MemoryLaw | str]) -> str:
    lines: list[list[str]] = []
    for (kind, method), law in fitted.items():
        name = f"{method} {kind}".strip()
        if isinstance(law, str):
            lines.append([f"{name}: {law}", *[""] * 7])
            continue
        values = [f"{v.mid:.3g} ({v.low:.3g} to {v.high:.3g})" for v in (law.c, law.alpha, law.beta, law.b)]
        quality = ["" if law.r2 is None else f"{law.r2:.3f}", f"{100 * law.mape_unseen_cell:.1f} %"]
        lines.append([name, *values, *quality, f"{law.points_used} of {law.points_used + law.points_censored}"])
    header = ["", "C", "α", "β", "b", "R²", "MAPE, cell left out", "cells"]
    return markdown_table(header, lines)


def _mean(rows: Sequence[Measured], value: Callable[[Measured], float]) -> float:
    return sum(map(value, rows)) / len(rows)
