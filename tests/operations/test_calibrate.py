"""A policy without a law of its own is calibrated first; cells that are measured are never measured again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from memupdate import Workspace
from memupdate.budget.design import Cell
from memupdate.errors import FactsError, UsageError
from memupdate.law.density import Density, fit_density
from memupdate.law.errors import LawError
from memupdate.law.fit import LawFit
from memupdate.law.points import LawPoint
from memupdate.operations import calibrating, cells
from memupdate.operations.cells import CellJob, Written, chosen_facts, kinds_of, pool
from memupdate.progress import ProgressEvent
from support import news, write_facts_file

Make = Callable[..., Workspace]


def test_a_new_policy_is_calibrated_before_the_first_plan(make_workspace: Make, tmp_path: Path) -> None:
    workspace = make_workspace(training__seed="7")
    assert (workspace.status().law_points, workspace.status().fit_id) == (0, None)
    events: list[ProgressEvent] = []
    report = workspace.calibrate(ranks=[1, 4], sizes=[2, 5], progress=events.append)
    assert report.cells_run == 4
    assert "calibrate" in {event.stage for event in events}
    assert {(p.rank, p.facts) for p in report.points} == {(1, 2), (4, 2), (1, 5), (4, 5)}
    assert all(p.loss_before_nats > p.loss_after_nats for p in report.points)
    assert all(p.kl_nats is not None and p.kl_nats > 0 for p in report.points)
    assert all(p.kind == "facts" and p.steps > 0 and p.examples >= p.facts for p in report.points)
    assert "4 memories in" in report.messages[-1]
    assert "processor time" in report.messages[-1]
    assert LawFit.from_json(report.fit.to_json()) == report.fit
    assert report.fit.density is not None
    assert {row.name for row in report.fit.density.classes} >= {"end", "number", "name"}

    again = workspace.calibrate(ranks=[1, 4], sizes=[2, 5])
    assert (again.cells_run, again.fit.fit_id) == (0, report.fit.fit_id)

    planned = workspace.plan(write_facts_file(tmp_path / "facts.jsonl", news(1)[:4]))
    assert planned.plan is not None
    assert planned.plan.fit_id == report.fit.fit_id
    assert planned.plan.all_proved is not None
    assert planned.plan.base_loss_nats is not None
    assert planned.plan.base_loss_nats.low < planned.plan.base_loss_nats.mid  # estimated: no weights were read

    policy = workspace.root / "policy.toml"
    policy.write_text(policy.read_text().replace("max_epochs = 60", "max_epochs = 61"))
    with pytest.raises(LawError, match="of another training policy") as refused:
        Workspace(workspace.root).plan(tmp_path / "facts.jsonl")
    assert "memupdate calibrate" in refused.value.hint


def point_of(workspace: Workspace, cell: Cell) -> LawPoint:
    session = workspace.session
    return LawPoint(
        base_fingerprint=session.fingerprint, placement=session.shape.name, recipe=session.recipe, rank=cell.rank,
        effective_parameters=cell.rank * session.shape.parameters_per_rank, facts=cell.facts, target_tokens=5 * cell.facts,
        loss_before_nats=3.0, loss_after_nats=0.1, facts_proved=cell.facts if cell.rank > cell.facts / 60 else 1, kl_nats=0.01,
        epochs=10, stopped_early=True, duration_s=20.0, steps=200, kind=cell.kind,
    )  # fmt: skip


def test_ctrl_c_keeps_what_is_done_and_the_next_one_goes_on(
    make_workspace: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace(training__seed="8")
    written: list[Cell] = []

    def submit(_executor: object, _job: CellJob, cell: Cell, _deadline: float | None) -> Future[Written]:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(cell)
        future: Future[Written] = Future()
        future.set_result(Written(point_of(workspace, cell), 1.0))
        return future

    monkeypatch.setattr(cells, "worker_count", lambda: 1)
    monkeypatch.setattr(cells, "submit_cell", submit)  # training is what other tests are about
    monkeypatch.setattr(cells, "submit_density", lambda *_: _done(Density(())))
    with pytest.raises(KeyboardInterrupt):
        workspace.calibrate(ranks=[1, 4], sizes=[30, 300])
    assert workspace.status().law_points == 3
    first = list(written)
    written[:] = []
    report = workspace.calibrate(ranks=[1, 4], sizes=[30, 300])
    assert set(first) | set(written) == set(calibrating.grid([1, 4], [30, 300]))
    assert (len(written), report.cells_run) == (1, 1)


def test_cells_are_chosen_by_what_was_measured_until_the_time_is_over(
    make_workspace: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace(training__seed="9")
    told: list[ProgressEvent] = []

    def submit(_executor: object, _job: CellJob, cell: Cell, deadline: float | None) -> Future[Written]:
        assert deadline is not None
        point = point_of(workspace, cell)
        return _done(Written(None if (cell.rank, cell.facts) == (4, 57) else replace(point, duration_s=0.2), 1.0))

    monkeypatch.setattr(cells, "submit_cell", submit)
    monkeypatch.setattr(cells, "submit_density", lambda *_: _done(DENSITY))
    report = workspace.calibrate(minutes=0.1, progress=told.append)
    assert report.cells_run >= 4
    assert len({(p.kind, p.rank, p.facts) for p in report.points}) == len(report.points)
    assert any("did not end in time" in message for message in report.messages)
    assert any("min left" in event.message for event in told)


def test_too_little_time_is_told_with_what_was_left_out(make_workspace: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make_workspace(training__seed="10")
    monkeypatch.setattr(cells, "submit_cell", lambda *_: _done(Written(None, 1.0)))
    monkeypatch.setattr(cells, "submit_density", lambda *_: _done(DENSITY))
    with pytest.raises(LawError, match="no points") as caught:
        workspace.calibrate(minutes=0.1)
    assert "memupdate calibrate --budget 0.2" in caught.value.hint
    assert any("did not end in time" in line for line in caught.value.details)


def _done(value: object) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


DENSITY = fit_density([(["12", "34", ""], [8.0, 6.0, 0.1]), ([" red", ""], [4.0, 0.3])])


def test_kinds_share_subjects_and_cells_have_stretches_of_their_own(make_workspace: Make, tmp_path: Path) -> None:
    session = make_workspace().session
    facts, bare, numbers = (pool(session, kind, None, 700) for kind in kinds_of(session, None))
    assert [fact.prompt for fact in bare] == [fact.prompt for fact in facts]
    assert any(fact.paraphrases for fact in facts)
    assert not any(fact.paraphrases for fact in bare)
    assert all(fact.target.isdigit() and len(fact.target) == 7 for fact in numbers)
    assert len({fact.key for fact in numbers}) == len(numbers) >= 700
    stretches = {tuple(f.id for f in chosen_facts(facts, Cell("facts", 40, rank))) for rank in (1, 2, 4, 8)}
    assert len(stretches) == 4
    assert all(len(stretch) == 40 for stretch in stretches)

    own = write_facts_file(tmp_path / "own.jsonl", news(1)[:6])
    assert kinds_of(session, own) == ("facts",)
    assert [fact.prompt for fact in pool(session, "facts", own, 6)] == [row["prompt"] for row in news(1)[:6]]
    with pytest.raises(FactsError, match="6 facts, but the largest cell needs 9"):
        pool(session, "facts", own, 9)


def test_a_calibration_that_cannot_be_is_refused_before_anything_is_written(make_workspace: Make) -> None:
    workspace = make_workspace()
    with pytest.raises(UsageError, match="both ranks and sizes"):
        workspace.calibrate(ranks=[1, 2])
    for minutes, expected in ((0.0, (8, 400)), (5.0, (8, 8)), (5.0, (0, 9))):
        with pytest.raises(UsageError, match="is no calibration"):
            workspace.calibrate(minutes=minutes, expected=expected)
