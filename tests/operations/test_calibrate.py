"""A policy without a law of its own is calibrated first; cells that are measured are never measured again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from memupdate import Workspace
from memupdate.law.fit import LawFit
from memupdate.progress import ProgressEvent
from support import news, write_facts_file

Make = Callable[..., Workspace]


def test_a_new_policy_is_calibrated_before_the_first_plan(make_workspace: Make, tmp_path: Path) -> None:
    workspace = make_workspace(training__seed="7")
    assert (workspace.status().law_points, workspace.status().fit_id) == (0, None)
    stages: list[str] = []

    def note(event: ProgressEvent) -> None:
        stages.append(event.stage)

    report = workspace.calibrate(ranks=[1, 4], sizes=[3, 8], progress=note)
    assert report.cells_run == 4
    assert "calibrate" in stages
    assert {(p.rank, p.facts) for p in report.points} == {(1, 3), (4, 3), (1, 8), (4, 8)}
    assert all(p.loss_before_nats > p.loss_after_nats for p in report.points)
    assert all(p.kl_nats is not None and p.kl_nats > 0 for p in report.points)
    more_room = {p.rank: p.loss_after_nats for p in report.points if p.facts == 8}
    assert more_room[4] < more_room[1]
    assert LawFit.from_json(report.fit.to_json()) == report.fit

    again = workspace.calibrate(ranks=[1, 4], sizes=[3, 8])
    assert (again.cells_run, again.fit.fit_id) == (0, report.fit.fit_id)

    planned = workspace.plan(write_facts_file(tmp_path / "facts.jsonl", news(1)[:4]))
    assert planned.plan is not None
    assert planned.plan.fit_id == report.fit.fit_id
