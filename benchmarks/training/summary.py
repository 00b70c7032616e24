"""What is made of the cells: figures, tables, and a picture.

Invariant: a figure whose cells are missing is None. A ratio against a baseline that never proved every fact is a bound: ours took at most
this share of the time that it was given; the share that it proved stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.recording import markdown_table
from benchmarks.training import density, forgetting, gpu, objectives, writing
from benchmarks.training.methods import Cell
from benchmarks.training.store import Row, Store

from memupdate.reports.figures.theme import BAD, GOOD, QUIET, new_figure, plain_number, shade_of, style, write_picture

Figures = dict[str, float | int | None]


@dataclass(frozen=True)
class Plan:
    """What the study consists of, in full or quick form."""

    sizes: tuple[writing.Size, ...]
    batches: tuple[int, int]
    sweep: objectives.Sweep
    ladders: tuple[density.Ladder, ...]
    load: gpu.Load


FULL = Plan(writing.FULL, forgetting.FULL, objectives.FULL, density.FULL, gpu.FULL)
QUICK = Plan(writing.QUICK, forgetting.QUICK, objectives.QUICK, density.QUICK, gpu.QUICK)


def figures(store: Store, plan: Plan) -> Figures:
    """Name → number; None where a cell is missing."""
    found: Figures = {}
    for size in plan.sizes:
        found |= _time_figures(store, plan, size)
    found |= _forgetting_figures(store, plan)
    for short in ("sft", "ot", "sw"):
        found[f"exact_match_{short}"] = _mean_of(store, plan, "phonebook", short, "exact_share")
        found[f"passage_prefix_share_{short}"] = _mean_of(store, plan, "passage", short, "prefix_share")
    found["bits_per_parameter"] = _densest(store, plan, "numbers")
    found["bits_per_parameter_world"] = _densest(store, plan, "world")
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def _densest(store: Store, plan: Plan, kind: str) -> float | None:
    """The most bits a parameter of all ladders of a kind."""
    rows = [density.found(store, ladder) for ladder in plan.ladders if ladder.kind == kind]
    return max((row["bits_per_parameter"] for row in rows if row), default=None)


def _time_figures(store: Store, plan: Plan, size: writing.Size) -> Figures:
    facts, rows = size.facts, _rows(store, size)
    ours = rows.get("ours")
    found: Figures = {
        f"ours_{facts}_s": ours and ours["cpu_s"],
        f"time_ratio_trl_{facts}": _ratio(ours, rows.get("trl tuned")),
        f"trl_proved_share_{facts}": _share(rows.get("trl tuned"), facts),
        f"time_ratio_trl_docs_rate_{facts}": _ratio(ours, rows.get("trl docs")),
        f"trl_docs_rate_proved_share_{facts}": _share(rows.get("trl docs"), facts),
        f"guard_cost_ratio_{facts}": _ratio(rows.get("guarded"), ours),
    }
    for placement in dict.fromkeys(placement for _, placement in size.papers):
        name = f"paper_{facts}" if placement == "mlp-all" else f"paper_one_layer_{facts}"
        own, paper = (
            rows.get("ours" if placement == "mlp-all" else f"ours {placement}"),
            rows.get(f"paper-memft-ot {placement}"),
        )
        found |= {f"time_ratio_{name}": _ratio(own, paper), f"{name}_proved_share": _share(paper, facts)}
    for placement, rank in size.elsewhere:
        found |= _figures_elsewhere(store, size, placement, rank)
    if size is plan.sizes[min(1, len(plan.sizes) - 1)]:
        found["guard_cost_ratio"] = found[f"guard_cost_ratio_{facts}"]
    return found


def _figures_elsewhere(store: Store, size: writing.Size, placement: str, rank: int) -> Figures:
    ours, guarded, *trials = writing.cells_elsewhere(size, placement, rank)
    own, best = writing.found(store, ours), writing.best_of(store, trials)
    trl, name = writing.found(store, best) if best else None, f"{size.facts}_{placement.replace('-', '_')}"
    return {
        f"ours_{name}_s": own and own["cpu_s"],
        f"time_ratio_trl_{name}": _ratio(own, trl),
        f"trl_proved_share_{name}": _share(trl, size.facts),
        f"guard_cost_ratio_{name}": _ratio(writing.found(store, guarded), own),
    }


def _rows(store: Store, size: writing.Size) -> dict[str, Row]:
    """The measured cells of a size, by a short name."""
    found = {_name(cell): writing.found(store, cell) for cell in _cells(store, size)}
    return {name: row for name, row in found.items() if row is not None}


def _cells(store: Store, size: writing.Size) -> list[Cell]:
    rate = writing.best_rate(store, size)
    return writing.cells_of(size, rate) if rate else []


def _name(cell: Cell) -> str:
    if cell.method == "trl":
        return "trl tuned" if cell.rate else "trl docs"
    if cell.method != "ours":
        return f"{cell.method} {cell.placement}"
    if cell.change:
        return f"ours, {cell.change}"
    if cell.guard and cell.leash:
        return "guarded"
    if cell.guard:
        return f"guard {cell.guard:g}"
    return "ours" if cell.placement == "mlp-all" else f"ours {cell.placement}"


def _ratio(ours: Row | None, other: Row | None) -> float | None:
    return ours["cpu_s"] / other["cpu_s"] if ours and other else None


def _share(row: Row | None, facts: int) -> float | None:
    return row["proved"] / facts if row else None


def _forgetting_figures(store: Store, plan: Plan) -> Figures:
    rows = {how: forgetting.found(store, how, plan.batches) for how in forgetting.HOWS}

    def last(how: str, value: Callable[[Row], float]) -> float | None:
        row = rows[how]
        return value(row) if row and row["batch"] and row["batch"][-1] == plan.batches[0] else None

    def older(row: Row) -> float:
        return float(row["older_proved"][-1] / row["older"][-1])

    found: Figures = {
        "known_kept": last("memupdate", lambda row: row["known_kept"][-1]),
        "known_kept_without_guard": last("no guard", lambda row: row["known_kept"][-1]),
        f"older_proved_after_{plan.batches[0]}": last("memupdate", older),
        f"older_proved_after_{plan.batches[0]}_without_replay": last("no replay", older),
        "batches_with_every_fact_proved": last("memupdate", lambda row: row["complete"]),
    }
    return found


def _mean_of(store: Store, plan: Plan, kind: str, short: str, name: str) -> float | None:
    """Mean over all cells of an objective; None while some are missing."""
    rows = objectives.found(store, plan.sweep, kind, short)
    wanted = len(objectives.cells_of(plan.sweep, kind, objectives.METHODS[kind][short]))
    return sum(row[name] for row in rows) / wanted if len(rows) == wanted else None


def tables(store: Store, plan: Plan, picture: str) -> str:
    """Markdown for people."""
    parts = [
        f"![facts against harm, and twenty batches]({picture})\n",
        _time_table(store, plan),
        _forgetting_table(store, plan),
    ]
    return "\n".join([*parts, _objectives_table(store, plan), _density_table(store, plan)])


def _time_table(store: Store, plan: Plan) -> str:
    lines: list[Sequence[object]] = []
    for size in plan.sizes:
        for cell in [*_cells(store, size), *_shown_elsewhere(store, size)]:
            row = writing.found(store, cell)
            if row is None:
                continue
            rate = f" at {cell.rate:g}" if cell.rate else ""
            where = f", {cell.placement}" if cell.rank != size.rank else ""
            lines.append((
                f"{size.facts} facts, rank {cell.rank}{where}: {_name(cell)}{rate}",
                f"{row['cpu_s']:.1f}", f"{row['wall_s']:.1f}", row["epochs"],
                row["steps"], f"{row['proved']} of {size.facts}", _end(row), f"{100 * row['known_kept']:.1f}", f"{row['kl_nats']:.3f}",
            ))  # fmt: skip
    header = ("", "processor s", "wall s", "epochs", "steps", "proved", "ended by", "known kept, %", "KL, nats")
    return "**Time to every fact proved, and harm.**\n\n" + markdown_table(header, lines)


def _shown_elsewhere(store: Store, size: writing.Size) -> list[Cell]:
    """Of TRL's rates the best."""
    shown: list[Cell] = []
    for placement, rank in size.elsewhere:
        ours, guarded, *trials = writing.cells_elsewhere(size, placement, rank)
        shown += [ours, guarded, *filter(None, [writing.best_of(store, trials)])]
    return shown


def _end(row: Row) -> str:
    return {"proved": "proof", "cap": f"cap of {row['cap_s'] or 0:.0f} s", "epochs": "its epochs"}[row["stopped"]]


def _forgetting_table(store: Store, plan: Plan) -> str:
    batches, size = plan.batches
    shown = [number for number in forgetting.LOOKS if number < batches] + [batches]
    lines: list[Sequence[object]] = []
    for how in forgetting.HOWS:
        row = forgetting.found(store, how, plan.batches)
        if row is None:
            continue
        looks = dict(zip(row["batch"], zip(row["proved"], row["facts"], row["known_kept"], strict=True), strict=True))
        proved = [f"{100 * looks[n][0] / looks[n][1]:.1f}" if n in looks else "" for n in shown]
        lines.append((f"{how}: facts proved, %", *proved))
        lines.append((f"{how}: known kept, %", *(f"{100 * looks[n][2]:.1f}" if n in looks else "" for n in shown)))
        if "refused" in row:
            lines.append((f"{how}: refused, {row['refused']}", *[""] * len(shown)))
    header = ("after batch", *shown)
    return f"**{batches} batches of {size} facts in a row.**\n\n" + markdown_table(header, lines)


def _objectives_table(store: Store, plan: Plan) -> str:
    lines = [
        (
            f"{kind}, {row['length']} tokens, rank {row['rank']}: {method}",
            f"{100 * row['exact_share']:.1f}",
            f"{100 * row['prefix_share']:.1f}",
            f"{row['loss_after_nats']:.3f}",
            row["steps"],
        )
        for kind, methods in objectives.METHODS.items()
        for short, method in methods.items()
        for row in objectives.found(store, plan.sweep, kind, short)
    ]
    header = ("", "exact match, %", "before the first mistake, %", "loss, nats", "steps")
    return "**Objectives at equal rank and steps.**\n\n" + markdown_table(header, lines)


def _density_table(store: Store, plan: Plan) -> str:
    lines = []
    for ladder in plan.ladders:
        if row := density.found(store, ladder):
            name = f"{ladder.facts} {'facts' if ladder.kind == 'world' else ladder.kind}, {ladder.placement}"
            lines.append(
                (name, row["rank"], row["parameters"], f"{row['bits']:,.0f}", f"{row['bits_per_parameter']:.3f}")
            )
    header = ("", "smallest rank", "parameters", "bits", "bits per parameter")
    return "**Density at the smallest rank that proves every fact, no guard.**\n\n" + markdown_table(header, lines)


def draw(store: Store, plan: Plan, path: Path) -> None:
    """One picture: facts proved against known facts kept, for every guard; and the share proved and kept, batch after batch."""
    with style():
        figure, (left, right) = new_figure(2)
        _draw_frontier(left, store, plan)
        _draw_batches(right, store, plan)
        write_picture(figure, path, title=path.stem)


def _draw_frontier(axes: Any, store: Store, plan: Plan) -> None:
    weights = ("ours", "guard 5", "guarded", "guard 80")
    labels = ("no guard", "guard 5", "guard 20 (policy)", "guard 80")
    kinds: Iterable[tuple[str, str, str, str]] = [
        *((name, label, shade_of(i, len(weights)), "o") for i, (name, label) in enumerate(zip(weights, labels, strict=True))),
        ("trl tuned", "TRL, tuned rate", QUIET, "s"), ("paper-memft-ot mlp-all", "paper, all layers", BAD, "D"),
        ("paper-memft-ot mlp-one", "paper, one layer", BAD, "^"),
    ]  # fmt: skip
    rows = {size.facts: _rows(store, size) for size in plan.sizes}
    for name, label, colour, mark in kinds:
        points = [(found[name]["proved"], 100 * found[name]["known_kept"]) for found in rows.values() if name in found]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=mark, markersize=4.5, linewidth=1.2, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(plain_number)
    axes.set_xticks([size.facts for size in plan.sizes])
    axes.minorticks_off()
    axes.set_ylim(-2, 102)
    axes.set_title("Known facts kept, %, against new facts proved")
    axes.set_xlabel("facts proved")
    if axes.lines:
        axes.legend(loc="lower left")


def _draw_batches(axes: Any, store: Store, plan: Plan) -> None:
    colours = dict(zip(forgetting.HOWS, (GOOD, BAD, shade_of(2, 5)), strict=True))
    for how, colour in colours.items():
        row = forgetting.found(store, how, plan.batches)
        if row is None:
            continue
        proved = [100 * p / f for p, f in zip(row["proved"], row["facts"], strict=True)]
        axes.plot(row["batch"], proved, color=colour, linewidth=1.6, label=f"{how}: proved")
        axes.plot(
            row["batch"], [100 * kept for kept in row["known_kept"]], ":", color=colour, label=f"{how}: known kept"
        )
    axes.set_ylim(-2, 102)
    axes.set_title("Batches in a row: new facts proved, known facts kept, %")
    axes.set_xlabel("batch")
    if axes.lines:
        axes.legend(loc="lower left", ncols=2)
