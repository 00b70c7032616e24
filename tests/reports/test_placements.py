"""Placements side by side: the planner's own ranks, the same figures in terminal, JSON, page and Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from memupdate import Workspace
from memupdate.budget.plan import PlanRequest
from memupdate.budget.planner import plan_update
from memupdate.errors import OverBudget
from memupdate.law.fit import at_harm
from memupdate.law.needed_rank import Size
from memupdate.operations import calibrating, planning
from memupdate.reports.capacity_tables import capacity_renderables
from memupdate.reports.content import CapacityReport
from memupdate.reports.markdown import markdown_summary
from memupdate.reports.page import html_page
from support import set_policy


@pytest.fixture(scope="module")
def two_laws(tmp_path_factory: pytest.TempPathFactory, with_law: Callable[[Path], Workspace]) -> Workspace:
    """`auto`, with laws for two placements: in the second a parameter holds half as much and a token takes half the time."""
    root = Workspace.init(tmp_path_factory.mktemp("two") / "ws", model="atlas", collection="acme").root
    set_policy(root / "policy.toml", {"budget__proved_share": "0.9", "training__seed": "3"})
    first = with_law(root)
    session = first.session
    with first.writer("test") as ledger:
        other = session.with_placement("mlp-one")
        per_rank = session.shape.parameters_per_rank
        moved = [
            dataclasses.replace(
                point, placement="mlp-one", rank=max(1, 2 * point.effective_parameters // other.shape.parameters_per_rank),
                effective_parameters=2 * point.effective_parameters, duration_s=point.duration_s / 2,
                kl_nats=0.035 if point.rank * per_rank < 40_000 else point.kl_nats,
            )
            for point in planning.points_of(session, ledger)
        ]  # fmt: skip
        ledger.add_law_points(moved)
        calibrating.refit(other, ledger)
    set_policy(root / "policy.toml", {"memory__placement": '"auto"'})
    return Workspace(root)


@pytest.fixture(scope="module")
def report(two_laws: Workspace) -> CapacityReport:
    return two_laws.report()


def test_each_row_is_what_the_planner_says_for_that_placement(two_laws: Workspace, report: CapacityReport) -> None:
    assert [row.placement for row in report.placements] == ["mlp-all", "mlp-one"]
    with two_laws.reader() as ledger:
        for row in report.placements:
            placed = two_laws.session.with_placement(row.placement)
            fit = planning.current_fit(placed, ledger)
            assert fit is not None
            assert (row.points, row.fit_id) == (fit.points, fit.fit_id)
            limits = planning.limits(placed)
            assert limits.max_kl_nats is not None
            at = {h: at_harm(fit, planning.points_of(placed, ledger), h * limits.max_kl_nats) for h in (0.5, 1.0, 2.0)}

            def rank(tokens: int, harm: float, placed=placed, limits=limits, at=at) -> int | None:
                asked = dataclasses.replace(limits, max_kl_nats=harm * limits.max_kl_nats)
                try:
                    return plan_update(
                        PlanRequest("", 1, 0, 0, 1, tokens, tokens, 0, placed.shape, at[harm], asked)
                    ).rank
                except OverBudget:
                    return None

            for need in row.needs:
                tokens = need.target_tokens
                assert (need.rank_half_harm, need.rank, need.rank_twice_harm) == (
                    rank(tokens, 0.5), rank(tokens, 1.0), rank(tokens, 2.0)
                )  # fmt: skip
                assert need.parameters == fit.predict_needed(Size(tokens))
    assert [need.target_tokens for need in report.placements[0].needs] == [100, 300, 1000]


def test_a_looser_harm_budget_frees_the_small_memories_that_it_alone_held_back(report: CapacityReport) -> None:
    needs = report.placements[1].needs
    assert any(
        need.rank is not None and need.rank_twice_harm is not None and need.rank_twice_harm < need.rank
        for need in needs
    )


def test_an_empty_collection_under_auto_is_shown_by_the_first_placement_with_a_law(report: CapacityReport) -> None:
    assert report.placement == "mlp-all"
    assert [capacity.placement for capacity in report.collections] == ["mlp-all"]
    assert report.fit is not None
    assert {point.placement for point in report.points} == {"mlp-all"}


def test_every_rendering_has_the_table_and_says_whether_one_law_would_do(report: CapacityReport) -> None:
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in capacity_renderables(report):
        console.print(part)
    for text in (console.export_text(), html_page(report), markdown_summary(report)):
        assert "twice the harm" in text.lower()
        assert "mlp-one" in text
        assert "One law for several placements, or one each" in text
        assert f"best is {report.pooling[0].name}" in text.replace("\n", " ")
    document = report.to_dict()
    assert [row["placement"] for row in document["placements"]] == ["mlp-all", "mlp-one"]
    assert len(document["placements"][0]["needs"]) == 3
    assert [score["name"] for score in document["pooling"]] == [score.name for score in report.pooling]
