"""The report says what ledger, law and plans say: counted against them, one by one."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from memupdate import Workspace
from memupdate.budget.planner import free_capacity
from memupdate.cli import app
from memupdate.errors import LedgerError
from memupdate.operations import planning
from memupdate.reports.capacity_tables import capacity_renderables


@pytest.fixture(scope="module")
def report(reported: Workspace):
    return reported.report()


def text_of(report, width=120):
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in capacity_renderables(report):
        console.print(part)
    return console.export_text()


def test_the_gauge_is_the_laws_own_capacity(reported: Workspace, report) -> None:
    (capacity,) = report.collections
    session = reported.session
    with reported.reader() as ledger:
        live = ledger.live_facts("acme")
        limits = planning.limits(session)
    assert capacity.facts_live == len(live) == 12 + 10 + 10 + 4
    assert capacity.facts_dead == 1
    assert capacity.target_tokens_live == session.count_target_tokens(live)
    for holding in (capacity.now, capacity.policy_limit, capacity.engine_limit):
        whole = free_capacity(report.fit, session.shape, holding.rank, limits)
        assert (holding.target_tokens, holding.free) == (whole, max(0, whole - capacity.target_tokens_live))
    assert capacity.now.rank == capacity.rank
    assert capacity.used_share == capacity.target_tokens_live / capacity.now.target_tokens
    stored = 2.7 * capacity.target_tokens_live / math.log(2)
    assert capacity.bits_stored == pytest.approx(stored)
    assert capacity.bits_per_parameter == pytest.approx(stored / capacity.effective_parameters)


def test_releases_count_proofs_and_regressions(report) -> None:
    assert [row.name for row in report.releases] == ["acme@v1", "acme@v2", "acme@v3", "acme@v4"]
    assert [row.regressions for row in report.releases] == [0, 0, 2, 0]
    third = report.releases[2]
    assert (third.proved_on("in-process").proved, third.proved_on("in-process").facts) == (32, 32)
    assert (third.proved_on("served").proved, third.proved_on("served").min_probability) == (30, 0.41)
    assert [row.facts_superseding for row in report.releases] == [0, 0, 0, 1]
    assert [row.kl_nats for row in report.releases] == pytest.approx([0.011, 0.012, 0.013, 0.014])
    assert {row.probes_unchanged_share for row in report.releases} == {0.98}


def test_plans_are_compared_with_what_came(reported: Workspace, report) -> None:
    assert [batch.loss_inside for batch in report.batches][2] is False  # it was measured far above its plan
    with reported.reader() as ledger:
        for batch in report.batches:
            plan = json.loads(ledger.batch(batch.batch).plan_json)
            assert plan["predicted_loss_nats"]["mid"] == batch.predicted_loss_nats.mid
            assert plan["expected_duration_s"]["high"] == batch.predicted_duration_s.high
            assert batch.measured_proved_share == 1


def test_the_weakest_facts_come_first_and_carry_their_failure(report) -> None:
    failed = [fact for fact in report.weak_facts if fact.times_unproved]
    assert {fact.prompt for fact in failed} == {"Who runs shop 12?", "What is <script>alert(1)</script>?"}
    assert list(report.weak_facts[:2]) == failed
    assert all((f.failed_position, f.failed_token, f.emitted_token) == (1, " <b>", " `no`") for f in failed)
    later = [fact.proofs[-1].min_probability for fact in report.weak_facts[2:]]
    assert later == sorted(later)


def test_margins_hold_every_fact_of_the_newest_release_once(report) -> None:
    (margins,) = report.margins
    assert (margins.release, margins.engine, margins.unknown) == ("acme@v4", "served", 0)
    assert sum(margins.counts) == margins.facts == report.collections[0].facts_live
    assert not any(margins.counts[:14])
    assert margins.counts[14]


def test_json_says_the_same_and_is_one_document(reported: Workspace, report, tmp_path: Path) -> None:
    page, summary = tmp_path / "report.html", tmp_path / "report.md"
    arguments = ["report", "-w", str(reported.root), "--json", "--html", str(page), "--markdown", str(summary)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (capacity,) = document["collections"]
    assert capacity["target_tokens_live"] == report.collections[0].target_tokens_live
    assert capacity["now"]["free"] == report.collections[0].now.free
    assert capacity["forecast"]["until_policy_limit"]["mid"] == report.collections[0].forecast.until_policy_limit.mid
    assert [row["regressions"] for row in document["releases"]] == [0, 0, 2, 0]
    assert [row["loss_inside"] for row in document["batches"]] == [batch.loss_inside for batch in report.batches]
    assert len(document["points"]) == len(report.points) >= 24
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert summary.read_text(encoding="utf-8").startswith("# Capacity report")


def test_the_terminal_says_the_same(report) -> None:
    shown = text_of(report)
    (capacity,) = report.collections
    for part in (
        f"{capacity.target_tokens_live:,} target tokens",
        f"{capacity.now.free:,} free",
        "30/32",
        "ΔL",
        "At the rate of the last 4 batches",
        "What is <script>alert(1)</script>?",
    ):
        assert part in " ".join(shown.split())
    assert "\u202e" not in shown


def test_a_compaction_is_no_growth_and_clears_the_dead(reported: Workspace, tmp_path: Path) -> None:
    shutil.copytree(reported.root, tmp_path / "ws")
    workspace = Workspace(tmp_path / "ws")
    before = workspace.report()
    with workspace.writer("test") as ledger:
        latest = ledger.latest_release("acme")
        assert latest is not None
        batch = ledger.receive_compaction("acme", workspace.session.policy.resolved_json())
        ledger.set_plan(batch.id, "{}")
        for state in ("planned", "trained", "verified"):
            ledger.transition(batch.id, state)
        ledger.record_release(
            replace(latest, name="acme@v5", version=5, batch=batch.id, created_at_utc="2026-03-05T12:00:00.000Z")
        )
        ledger.transition(batch.id, "released")
    report = workspace.report()
    assert [row.kind for row in report.releases] == ["add"] * 4 + ["compact"]
    assert (before.collections[0].facts_dead, report.collections[0].facts_dead) == (1, 0)
    assert report.collections[0].forecast.batches_seen == before.collections[0].forecast.batches_seen == 4
    assert "acme@v5 (compact)" in text_of(report)


def test_one_collection_or_all(reported: Workspace) -> None:
    assert [item.collection for item in reported.report("acme").collections] == ["acme"]
    with pytest.raises(LedgerError, match="nobody: no such collection") as caught:
        reported.report("nobody")
    assert "acme" in caught.value.hint


def test_without_a_law_there_must_be_releases_to_speak_of(uncalibrated: Workspace) -> None:
    with pytest.raises(LedgerError) as caught:
        uncalibrated.report()
    assert caught.value.hint == "run `memupdate calibrate`"


def test_a_policy_without_a_law_still_reports_its_releases(reported: Workspace, tmp_path: Path) -> None:
    """After an edit of the policy no law matches any more; the releases are there all the same."""
    from memupdate.reports.markdown import markdown_summary
    from memupdate.reports.page import html_page
    from support import set_policy

    shutil.copytree(reported.root, tmp_path / "ws")
    set_policy(tmp_path / "ws" / "policy.toml", {"training__learning_rate": "1e-3"})
    report = Workspace(tmp_path / "ws").report()
    assert report.fit is None
    assert report.collections[0].now is None
    assert len(report.releases) == 4
    assert "memupdate calibrate" in html_page(report)
    assert "memupdate calibrate" in markdown_summary(report)
    assert "without a law" in text_of(report)


def test_reporting_loads_neither_torch_nor_an_engine(reported: Workspace, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom memupdate.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'vllm', 'matplotlib.pyplot'} & set(sys.modules)\nassert not heavy, heavy"
    )
    arguments = ["report", "-w", str(reported.root), "--html", str(tmp_path / "r.html")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
