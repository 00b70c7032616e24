"""Rich tables of plans, law fits and law points, as the command line shows them.

Invariant: rendering only; every figure comes from the dataclass, except that a unit is changed for people. Nothing
    here prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memupdate.budget.bits import KNOWLEDGE_BITS_PER_PARAMETER, MEMORISATION_BITS_PER_PARAMETER
from memupdate.budget.plan import Plan
from memupdate.law.points import Interval, LawPoint

if TYPE_CHECKING:
    from memupdate.law.fit import LawFit
    from memupdate.law.memory_law import MemoryLaw
    from memupdate.law.residual_law import ResidualLaw

_PAPER_FORM = "ΔL = C·r^α·ℓ^(−β) + b"
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def plan_table(plan: Plan) -> RenderableType:
    """One plan: what is written, the memory it needs, what it promises, and why."""
    table = _pairs(f"Plan for {plan.collection}")
    counts = f"{plan.facts_new:,} new, {plan.facts_superseding:,} superseding, {plan.facts_unchanged:,} stored already"
    table.add_row("Facts", f"{counts}; {plan.facts_live:,} live afterwards")
    table.add_row("Target tokens", f"{plan.target_tokens_new:,} new, {plan.target_tokens_live:,} live")
    table.add_row("Placement", plan.placement)
    before = f"{plan.rank_before} → " if plan.rank_before else ""
    table.add_row("Rank", f"[bold]{before}{plan.rank}[/bold] (limit {plan.rank_limit})")
    table.add_row("Effective parameters", f"{plan.effective_parameters:,}")
    table.add_row("Predicted loss", f"{_interval(plan.predicted_loss_nats)} nats per token")
    kl = plan.predicted_kl_nats
    table.add_row("Predicted harm", "not known: no harm data" if kl is None else f"KL {_interval(kl)} nats per token")
    if plan.all_proved is not None:
        table.add_row("Every fact proved", f"probability {_share_interval(plan.all_proved)}")
    table.add_row("Facts proved", _share_interval(plan.expected_proved_share))
    if plan.base_loss_nats is not None:
        table.add_row("Loss before", f"{_interval(plan.base_loss_nats)} nats per token")
    bounds = f"bounds: {KNOWLEDGE_BITS_PER_PARAMETER:g} knowledge, {MEMORISATION_BITS_PER_PARAMETER:g} memorisation"
    table.add_row("Bits per parameter", f"{plan.bits_per_parameter:.3f} ({bounds})")
    table.add_row("Adapter", human_bytes(plan.adapter_bytes))
    duration = plan.expected_duration_s
    expected = f"{human_duration(duration.mid)} ({human_duration(duration.low)} to {human_duration(duration.high)})"
    table.add_row("Expected time", expected)
    for index, reason in enumerate(plan.reasons):
        table.add_row("Why" if index == 0 else "", Text(reason))
    return table


def law_table(fit: LawFit) -> RenderableType:
    """The fitted laws: parameters with intervals, how well they fit, and the range they hold in."""
    table = Table(title=f"Memory law, {fit.placement}", title_justify="left")
    table.add_column("Law")
    table.add_column("Parameters")
    table.add_column("Fit")
    for law, parameters, quality in law_rows(fit):
        table.add_row(law, parameters, quality, end_section=True)
    return Group(table, Text(law_ranges(fit)), Text(f"fit {fit.fit_id}", style="dim"))


def law_rows(fit: LawFit) -> list[tuple[str, str, str]]:
    """(equation, parameters, how well it fits) of each law, a line of text per figure; what a page shows too."""
    memory, harm, link = fit.memory, fit.harm, fit.recall
    rows = [(_PAPER_FORM, "not fitted", fit.memory_note)]
    if memory is not None:
        parameters = _lines(("C", memory.c), ("α", memory.alpha), ("β", memory.beta), ("b", memory.b))
        quality = f"R² {_optional(memory.r2)} ({_optional(memory.r2_all)} with saturated points)"
        quality += f"\n{memory.points_used} points, {memory.points_censored} saturated: at least"
        quality += f"\n{_unseen(memory)}"
        if memory.lack_of_fit is not None:
            quality += f"\nlack of fit {memory.lack_of_fit:.1f} (1: none)"
        quality += f"\nranks {_range(memory.rank_range)}, tokens {_range(memory.tokens_range)}"
        rows = [(_PAPER_FORM, parameters, quality + (f"\n{memory.note}" if memory.note else ""))]
    rows.append(("loss = K·P^(−γ)·ℓ^δ + y0", _residual_parameters(fit.loss), _residual_quality(fit.loss)))
    harm_form = "KL = K·P^(−γ)·ℓ^δ + y0"
    if harm is not None:
        rows.append((harm_form, _residual_parameters(harm), _residual_quality(harm)))
    else:
        rows.append((harm_form, "not fitted", "fewer than four points measured harm"))
    fitted = f"mean error {link.mean_error:.1%}\nscatter between runs {link.scatter:.2f} logits"
    needed = fit.needed
    limits = _lines(("P₀", needed.level), ("η", needed.eta), ("w", needed.weight), ("s", needed.spread))
    told = f"{needed.points_held} of {needed.points} held everything"
    told += "".join(f"\n{form.log_score:+.2f} {form.name}" for form in fit.forms)
    rows.append(("P* = P₀·(ℓ·L0^w/S₀)^η", limits, told))
    rows.append(("proved = σ(a − s·x)", _lines(("a", link.intercept), ("s", link.slope)), fitted))
    return rows


def law_ranges(fit: LawFit) -> str:
    """What the laws were fitted to, in sentences."""
    ranges = f"Fitted to {fit.points} points ({fit.points_saturated} saturated), ranks {_range(fit.rank_range)}, "
    ranges += f"{_range(fit.parameters_range)} effective parameters, {_range(fit.tokens_range)} target tokens. "
    ranges += f"Base loss {_interval(fit.base_loss_nats)} nats per token. Intervals at {fit.confidence:.0%}"
    drifted = fit.drift > 1
    return ranges + (
        f", {fit.drift:.2f} times as wide as the points alone say: batches drifted from their plans."
        if drifted
        else "."
    )


def points_table(points: Sequence[LawPoint]) -> RenderableType:
    """Measured memories, by size and rank."""
    table = Table(title="Law points", title_justify="left")
    headings = (
        "Rank",
        "Parameters",
        "Facts",
        "Tokens",
        "Loss before → after",
        "Proved",
        "KL",
        "Epochs",
        "Time",
        "From",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "From" else "right")
    for point in sorted(points, key=lambda point: (point.target_tokens, point.rank)):
        table.add_row(
            str(point.rank),
            f"{point.effective_parameters:,}",
            f"{point.facts:,}",
            f"{point.target_tokens:,}",
            f"{point.loss_before_nats:.2f} → {point.loss_after_nats:.3f}{'*' if point.stopped_early else ''}",
            f"{point.facts_proved / point.facts:.1%}" if point.facts else "–",
            "–" if point.kl_nats is None else f"{point.kl_nats:.4f}",
            str(point.epochs),
            human_duration(point.duration_s),
            point.origin,
        )
    if any(point.stopped_early for point in points):
        return Group(table, Text("* stopped when every token had cleared the margin", style="dim"))
    return table


def human_bytes(count: int) -> str:
    """Bytes in binary units, three significant digits: `1.5 MiB`."""
    value = float(count)
    for unit in _BYTE_UNITS:
        if value < 1024 or unit == _BYTE_UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError("the last unit takes everything")


def human_duration(seconds: float) -> str:
    """Seconds as people say them: `8 s`, `2 min 5 s`, `3 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _pairs(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _interval(value: Interval) -> str:
    return f"{value.mid:.3g} ({value.low:.3g} to {value.high:.3g})"


def _share_interval(value: Interval) -> str:
    return f"{value.mid:.1%} ({value.low:.1%} to {value.high:.1%})"


def _optional(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _range(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:,.0f} to {bounds[1]:,.0f}"


def _lines(*named: tuple[str, Interval]) -> str:
    return "\n".join(f"{name} = {_interval(value)}" for name, value in named)


def _residual_parameters(law: ResidualLaw) -> str:
    return _lines(("K", law.k), ("γ", law.gamma), ("δ", law.delta), ("y0", law.floor))


def _residual_quality(law: ResidualLaw) -> str:
    return f"R² {_optional(law.r2)} on the log, {law.points} points\n{_unseen(law)}"


def _unseen(law: ResidualLaw | MemoryLaw) -> str:
    """Errors at what was left out of the fit, a line each."""
    lines = [f"unseen cells off by {law.mape_unseen_cell:.1%}"]
    if law.mape_unseen_rank is not None:
        lines.append(f"unseen ranks off by {law.mape_unseen_rank:.1%}")
    if law.mape_unseen_size is not None:
        lines.append(f"unseen sizes off by {law.mape_unseen_size:.1%}")
    return "\n".join(lines)
