"""One collection's releases in order: recall, what the base model kept and harm, and tokens held against room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from memupdate.reports.content import CollectionCapacity, ReleaseRow
from memupdate.reports.figures.theme import BAD, GOOD, INK, QUIET, SHADES, new_figure, page_svg, plain_number, style

_LINE = {"marker": "o", "markersize": 4.5, "linewidth": 1.5}


def recall_svg(releases: Sequence[ReleaseRow]) -> str:
    """Facts proved in per cent by engine, and regressions as bars. Empty without proofs."""
    if not any(release.proofs for release in releases):
        return ""

    def draw(axes: Any) -> None:
        lowest = 100.0
        for engine, colour, label in (
            ("in-process", SHADES[2], "proved in-process"),
            ("served", GOOD, "proved as served"),
        ):
            found = [(r.version, p) for r in releases if (p := r.proved_on(engine)) is not None and p.facts]
            if found:
                shares = [100 * proofs.proved / proofs.facts for _, proofs in found]
                lowest = min(lowest, *shares)
                axes.plot([version for version, _ in found], shares, color=colour, label=label, **_LINE)
        _mark_regressions(axes, releases)
        # So that one lost fact in ten thousand still shows.
        reach = 2.0 if lowest == 100 else 1.4 * (100 - lowest)
        axes.set_ylim(100 - reach, 100 + 0.06 * reach)
        axes.yaxis.set_major_formatter(plain_number)
        axes.yaxis.get_major_locator().set_params(nbins=5)
        axes.set_title("Facts proved, %")

    return _panel(releases, "recall", "Share of facts proved by release", draw)


def harm_svg(releases: Sequence[ReleaseRow], *, max_kl_nats: float | None) -> str:
    """KL to the base model with the policy's budget. Empty where it was never measured."""
    found = [(release.version, release.kl_nats) for release in releases if release.kl_nats is not None]
    if not found:
        return ""

    def draw(axes: Any) -> None:
        axes.plot(
            [version for version, _ in found], [kl for _, kl in found], color=SHADES[2], label="measured", **_LINE
        )
        if max_kl_nats is not None:
            axes.axhline(max_kl_nats, color=BAD, linewidth=1.2, linestyle=(0, (4, 3)), label="policy: at most")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(plain_number)
        axes.set_title("Harm: KL to the base model, nats per token")

    return _panel(releases, "harm", "Harm to the base model by release", draw)


def kept_svg(releases: Sequence[ReleaseRow]) -> str:
    """Known facts that are answered as before. Empty where none were asked."""
    found = [(r.version, 100 * r.probes_unchanged_share) for r in releases if r.probes_unchanged_share is not None]
    if not found:
        return ""

    def draw(axes: Any) -> None:
        axes.plot(
            [version for version, _ in found], [share for _, share in found], color=GOOD, label="measured", **_LINE
        )
        axes.set_ylim(min(90.0, min(share for _, share in found) - 2), 100.5)
        axes.set_title("Known facts answered as before, %")

    return _panel(releases, "kept", "Known facts kept by release", draw)


def growth_svg(releases: Sequence[ReleaseRow], capacity: CollectionCapacity) -> str:
    """Live target tokens, against what the present rank and the policy's largest hold. Empty without measurements."""
    found = [(release.version, release.target_tokens) for release in releases if release.target_tokens is not None]
    if not found:
        return ""

    def draw(axes: Any) -> None:
        axes.plot([version for version, _ in found], [n for _, n in found], color=SHADES[2], label="live", **_LINE)
        for holding, colour, label in (
            (capacity.now, INK, "holds now"),
            (capacity.policy_limit, BAD, "policy's limit"),
        ):
            if holding is not None:
                text = f"{label}: rank {holding.rank}"
                axes.axhline(holding.target_tokens, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), label=text)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(plain_number)
        axes.set_title("Target tokens")

    return _panel(releases, "growth", "Live target tokens by release", draw)


def _mark_regressions(axes: Any, releases: Sequence[ReleaseRow]) -> None:
    """A cross for each release that lost what an earlier one had proved, with how many such facts."""
    found = [release for release in releases if release.regressions]
    if not found:
        return
    axes.plot([r.version for r in found], [100.0] * len(found), "X", color=BAD, label="regressions", clip_on=False)
    for release in found:
        axes.annotate(
            str(release.regressions),
            (release.version, 100.0),
            (0, -11),
            textcoords="offset points",
            color=BAD,
            ha="center",
        )


def _panel(releases: Sequence[ReleaseRow], kind: str, description: str, draw: Callable[[Any], None]) -> str:
    collection = releases[0].collection
    with style():
        figure, (axes,) = new_figure()
        draw(axes)
        axes.set_xlabel("release")
        axes.set_xticks(*_release_ticks(releases))
        axes.tick_params(axis="y", labelcolor=QUIET)
        figure.legend(loc="outside lower center", ncols=2)
        return page_svg(figure, name=f"{kind}-{collection}", description=f"{description} of {collection}")


def _release_ticks(releases: Sequence[ReleaseRow]) -> tuple[list[int], list[str]]:
    """At most eight, the newest included."""
    versions = [release.version for release in releases]
    step = -(-len(versions) // 8)
    shown = versions[::-1][::step][::-1]
    return shown, [f"v{version}" for version in shown]
