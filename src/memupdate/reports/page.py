"""The capacity report as one self-contained HTML page: no script, no request, readable without colours or pictures.

Invariant: one report gives one page, byte for byte, with the same Matplotlib and Jinja. Whatever comes from facts,
policies and models passes through Jinja's escaping; only our own plots go in as markup. The page's policy
(`default-src 'none'`) holds a browser to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memupdate.budget.bits import KNOWLEDGE_BITS_PER_PARAMETER, MEMORISATION_BITS_PER_PARAMETER
from memupdate.budget.forecast import RULE
from memupdate.law.memory_law import is_saturated
from memupdate.ledger.figures import Margins, ReleaseProbability, WeakFact
from memupdate.reports import measures, texts
from memupdate.reports.content import CapacityReport, CollectionCapacity, ReleaseMeasures, ReleaseRow
from memupdate.reports.figures import comparison, law, margins, releases, shares
from memupdate.reports.placements import COLUMNS, placement_cells, pooling_sentence
from memupdate.reports.tables import human_bytes, human_duration, law_ranges, law_rows

MAX_RELEASES = 50
"""Newest releases of a collection that the page draws and lists; `--json` has all."""
MAX_BATCHES = 200
"""Newest batches compared with their plans; `--json` has all."""
TOKEN_STRIPS = 10
"""Least sure facts whose answers are shown token by token; the ledger has 20."""
STRIP_RELEASES = 12
"""Newest releases in a fact's strip."""


@dataclass(frozen=True)
class Plot:
    """A plot with what stands in for it."""

    title: str
    svg: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Gauge:
    """Widths of the bar's parts in per cent; together 100."""

    used: float
    free: float
    growth: float
    is_over: bool


@dataclass(frozen=True)
class Cell:
    """One release in a fact's strip."""

    release: str
    text: str
    level: str
    """`failed`, or `p0` to `p4` from unsure to sure."""


@dataclass(frozen=True)
class Strip:
    """One weak fact."""

    prompt: str
    target: str
    verdict: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class MeasuredPart:
    """What clients get of a collection's newest release beyond verbatim recall."""

    sentence: str
    plots: tuple[Plot, ...]
    strips: tuple[measures.TokenStrip, ...]


@dataclass(frozen=True)
class CollectionPart:
    """One collection's section."""

    capacity: CollectionCapacity
    gauge: Gauge | None
    sentence: str
    forecast: str
    pairs: tuple[tuple[str, str], ...]
    plots: tuple[Plot, ...]
    strips: tuple[Strip, ...]
    measured: MeasuredPart | None


def html_page(report: CapacityReport) -> str:
    """The whole page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("memupdate.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plot"] = Markup  # only for what `page_svg` made: Matplotlib escapes the texts inside
    return environment.get_template("report.html").render(
        report=report,
        facts_live=sum(item.facts_live for item in report.collections),
        collections=[_collection(report, item) for item in report.collections],
        law_plots=_law_plots(report),
        law_lines=_law_lines(report),
        law_rows=law_rows(report.fit) if report.fit else (),
        comparison=_comparison(report),
        placement_columns=COLUMNS,
        placement_rows=placement_cells(report.placements),
        pooling=pooling_sentence(report.pooling),
        rule=RULE,
        text=texts,
    )


def _collection(report: CapacityReport, capacity: CollectionCapacity) -> CollectionPart:
    rows = [row for row in report.releases if row.collection == capacity.collection][-MAX_RELEASES:]
    own = next((item for item in report.margins if item.release == capacity.release), None)
    plots = [*_release_plots(report, capacity, rows), *([_margins(report, own)] if own else [])]
    return CollectionPart(
        capacity=capacity,
        gauge=_gauge(capacity),
        sentence=texts.gauge_sentence(capacity),
        forecast=texts.forecast_sentence(capacity),
        pairs=_pairs(capacity),
        plots=tuple(plot for plot in plots if plot.svg),
        strips=tuple(_strip(fact) for fact in report.weak_facts if fact.collection == capacity.collection),
        measured=_measured(report, capacity),
    )


def _measured(report: CapacityReport, capacity: CollectionCapacity) -> MeasuredPart | None:
    own = [item for item in report.measures if item.collection == capacity.collection]
    if not own:
        return None
    newest = own[-1]
    by_kind = {
        "Answers by phrasing": [count for count in newest.counts if count.measure != "locality"],
        "Answers that must stay, by neighbourhood": [count for count in newest.counts if count.measure == "locality"],
    }
    plots = [
        Plot(
            title,
            shares.shares_svg(counts, name=f"shares-{number}-{newest.release}", title=title),
            measures.JUDGED,
            measures.COLUMNS,
            measures.measure_rows(counts),
        )
        for number, (title, counts) in enumerate(by_kind.items())
    ]
    plots.append(_measured_by_release(own[-MAX_RELEASES:]))
    strips = measures.token_strips(newest.tokens, TOKEN_STRIPS)
    return MeasuredPart(measures.summary_sentence(newest), tuple(plot for plot in plots if plot.svg), strips)


def _measured_by_release(rows: Sequence[ReleaseMeasures]) -> Plot:
    return Plot(
        "Generality and locality by release",
        shares.by_release_svg(rows),
        "Phrasings that were not trained on, answered word for word; probes and near neighbours, answered as before.",
        ("release", "generality", "locality", "perplexity over the base model's"),
        tuple(
            (
                row.release,
                texts.percent(row.generality_share),
                texts.percent(row.locality_share),
                "–" if row.perplexity_ratio is None else f"{row.perplexity_ratio:.4f}",
            )
            for row in rows
        ),
    )


def _gauge(capacity: CollectionCapacity) -> Gauge | None:
    """Used, free at this rank, free after growing, against the policy's limit; overfull bars are full."""
    if capacity.now is None or capacity.policy_limit is None:
        return None
    used, now, limit = capacity.target_tokens_live, capacity.now.target_tokens, capacity.policy_limit.target_tokens
    whole = max(used, now, limit, 1)
    used_width, now_width = 100 * used / whole, 100 * max(now, used) / whole
    return Gauge(
        round(used_width, 2), round(now_width - used_width, 2), round(100 - now_width, 2), is_over=used > max(now, 1)
    )


def _pairs(capacity: CollectionCapacity) -> tuple[tuple[str, str], ...]:
    density = capacity.bits_per_parameter
    known = f"{texts.percent(density / KNOWLEDGE_BITS_PER_PARAMETER)} of the {KNOWLEDGE_BITS_PER_PARAMETER:g}"
    noise = f"{texts.percent(density / MEMORISATION_BITS_PER_PARAMETER)} of the {MEMORISATION_BITS_PER_PARAMETER:g}"
    bits = f"{density:.3g}: {known} that models hold as knowledge, {noise} of memorised noise"
    found = [
        ("Newest release", capacity.release or "none yet"),
        ("Alias points at", capacity.alias_release or "nothing yet"),
        ("Rank", f"{capacity.rank}, {capacity.placement}"),
        ("Effective parameters", f"{capacity.effective_parameters:,}"),
        ("Adapter", human_bytes(capacity.adapter_bytes)),
        ("Live facts", f"{capacity.facts_live:,}"),
        ("Dead facts until a compaction", f"{capacity.facts_dead:,}"),
        ("Bits stored", f"{capacity.bits_stored:,.0f}"),
        ("Bits per parameter", bits),
    ]
    if capacity.now is not None:
        found.insert(2, ("Used of this rank", texts.percent(capacity.used_share)))
    holdings = [item for item in (capacity.now, capacity.policy_limit, capacity.engine_limit) if item]
    wide = {item.rank: f"rank {item.rank}: {', '.join(item.outside)}" for item in holdings if item.outside}
    if wide:
        found.append(("Beyond the law's range, so widened", "; ".join(wide.values())))
    return tuple(found)


def _release_plots(report: CapacityReport, capacity: CollectionCapacity, rows: Sequence[ReleaseRow]) -> list[Plot]:
    if not rows:
        return []
    limit = report.limits.max_kl_nats
    recall_rows = [
        (
            r.name,
            *(f"{p.proved:,} of {p.facts:,}" if p else "–" for p in (r.proved_on("in-process"), r.proved_on("served"))),
            f"{r.regressions:,}",
        )
        for r in rows
    ]
    return [
        Plot(
            "Recall and regressions by release",
            releases.recall_svg(rows),
            "A regression is a fact that an earlier release had proved and this one did not.",
            ("release", "in-process", "as served", "regressions"),
            tuple(recall_rows),
        ),
        Plot(
            "Room by release",
            releases.growth_svg(rows, capacity),
            "Live target tokens; the lines are what the law says is held within the harm budget.",
            ("release", "by", "rank", "new", "superseding", "live target tokens"),
            tuple(
                (
                    r.name,
                    r.kind or "–",
                    str(r.rank),
                    f"{r.facts_new:,}",
                    f"{r.facts_superseding:,}",
                    texts.number(r.target_tokens),
                )
                for r in rows
            ),
        ),
        Plot(
            "What the base model keeps",
            releases.kept_svg(rows),
            "Probes that the base model answers, answered the same with the release.",
            ("release", "answered as before"),
            tuple((r.name, texts.percent(r.probes_unchanged_share)) for r in rows),
        ),
        Plot(
            "Harm by release",
            releases.harm_svg(rows, max_kl_nats=limit),
            "Mean KL per token on held-out text of the base model, over all batches together.",
            ("release", "KL, nats per token"),
            tuple((r.name, texts.number(r.kl_nats)) for r in rows),
        ),
    ]


def _margins(report: CapacityReport, own: Margins) -> Plot:
    bins = len(own.counts)
    note = f"{own.release}, {'as served' if own.engine == 'served' else 'in-process'}."
    if own.unknown:
        note += f" {own.unknown:,} facts came without a probability."
    return Plot(
        "How sure the proofs are",
        margins.margins_svg(own, threshold=report.threshold),
        note,
        ("weakest token's probability", "facts"),
        tuple((f"{i / bins:.2f} to {(i + 1) / bins:.2f}", f"{count:,}") for i, count in enumerate(own.counts) if count),
    )


def _strip(fact: WeakFact) -> Strip:
    if fact.times_unproved:
        verdict = f"unproved {texts.times(fact.times_unproved)}"
        if fact.failed_token is not None:
            verdict += f"; token {(fact.failed_position or 0) + 1} should be “{texts.shown(fact.failed_token, 40)}”"
        if fact.emitted_token is not None:
            verdict += f", the model says “{texts.shown(fact.emitted_token, 40)}”"
    else:
        verdict = f"proved; its weakest token had {texts.number(fact.min_probability)}"
    if not fact.is_live:
        verdict += "; not live any more"
    return Strip(texts.shown(fact.prompt), texts.shown(fact.target), verdict, tuple(_cells(fact)))


def _cells(fact: WeakFact) -> list[Cell]:
    """The least sure of a release's engines stands for it."""
    worst: dict[str, ReleaseProbability] = {}
    for proof in fact.proofs:
        known = worst.get(proof.release)
        if known is None or (proof.proved, proof.min_probability or 0) < (known.proved, known.min_probability or 0):
            worst[proof.release] = proof
    cells = []
    for release, proof in list(worst.items())[-STRIP_RELEASES:]:
        probability = proof.min_probability
        level = f"p{min(4, max(0, int(10 * (probability or 0)) - 5))}" if proof.proved else "failed"
        cells.append(Cell(release, "?" if probability is None else f"{probability:.2f}", level))
    return cells


def _law_plots(report: CapacityReport) -> tuple[Plot, ...]:
    if report.fit is None or not report.points:
        return ()
    fit, points, limits = report.fit, report.points, report.limits
    columns = ("rank", "target tokens", "loss left", "facts proved", "KL", "loss drop is", "from")
    rows = tuple(
        (
            str(p.rank),
            f"{p.target_tokens:,}",
            texts.number(p.loss_after_nats),
            f"{p.facts_proved:,} of {p.facts:,}",
            texts.number(p.kl_nats),
            "at least" if is_saturated(p) else "measured",
            p.origin,
        )
        for p in sorted(points, key=lambda p: (p.rank, p.target_tokens, p.origin))
    )
    band = f"Bands are the law's intervals at {fit.confidence:.0%}."
    plots = [
        Plot("What is left of the loss", law.loss_svg(fit, points), band, columns, rows),
        Plot(
            "How many facts are proved",
            law.proved_svg(fit, points, wanted_share=limits.proved_share),
            band,
            *_curve_rows(report, "share of facts proved"),
        ),
        Plot(
            "What it costs the base model",
            law.harm_svg(fit, points, max_kl_nats=limits.max_kl_nats),
            band,
            *_curve_rows(report, "KL, nats per token"),
        ),
    ]
    return tuple(plot for plot in plots if plot.svg)


def _curve_rows(report: CapacityReport, what: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """What the curves say at the measured sizes' ends and middle."""
    fit, points = report.fit, report.points
    assert fit is not None
    per_rank = points[0].effective_parameters / points[0].rank
    sizes = sorted({point.target_tokens for point in points})
    rows = []
    for rank in law.chosen_ranks(points):
        for size in dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1])):
            parameters = rank * per_rank
            if what.startswith("KL"):
                value = texts.interval(fit.predict_kl(parameters, size))
            else:
                share = fit.predict_proved_share(parameters, size)
                value = f"{texts.percent(share.mid)} ({texts.percent(share.low)} to {texts.percent(share.high)})"
            rows.append((str(rank), f"{size:,}", value))
    return ("rank", "target tokens", what), tuple(rows)


def _law_lines(report: CapacityReport) -> tuple[str, ...]:
    fit = report.fit
    if fit is None:
        return report.messages
    saturated = "Saturated points have lost nearly all of their loss: they say “at least” only (hollow in the plots)."
    return (law_ranges(fit), saturated, f"Fit {fit.fit_id}")


def _comparison(report: CapacityReport) -> Plot | None:
    shown = report.batches[-MAX_BATCHES:]
    svg = comparison.comparison_svg(shown)
    if not svg:
        return None
    inside = sum(batch.loss_inside for batch in shown)
    rows = tuple(
        (
            b.release,
            str(b.rank) if b.rank == b.rank_planned else f"{b.rank_planned} → {b.rank}",
            texts.interval(b.predicted_loss_nats),
            texts.number(b.measured_loss_nats),
            texts.interval(b.predicted_kl_nats),
            texts.number(b.measured_kl_nats),
            f"{texts.percent(b.predicted_proved_share.low)} or more",
            texts.percent(b.measured_proved_share),
            human_duration(b.predicted_duration_s.mid),
            "–" if b.measured_duration_s is None else human_duration(b.measured_duration_s),
        )
        for b in shown
    )
    columns = (
        "release", "rank", "loss predicted", "measured", "KL predicted", "measured", "proved predicted", "measured",
        "time predicted", "measured",
    )  # fmt: skip
    note = f"{inside:,} of {len(shown):,} batches lie within the interval that their plan stated."
    return Plot("Predicted against measured", svg, note, columns, rows)
