"""Every shipped policy does its job: a handful of facts written into the embedded model under it, proved, within its gates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from memupdate import Workspace
from memupdate.errors import PolicyError
from memupdate.policies import load_batch_values, load_policy, parse_resolved_policy, shipped_policies
from memupdate.resources import resource_dir
from support import Row, add_points_of_the_shipped_law, news, set_policy, write_facts_file

FEW = 4
SMALL_GUARD = {"guard__anchors": "64", "guard__holdout": "16"}
"""A policy's own anchors are sampled for minutes; how many there are changes how well harm is measured, not the way a batch takes."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def workspace_under(policy: str, tmp_path: Path, cache: Path) -> Workspace:
    root = tmp_path / "ws"
    known = (resource_dir("atlas") / "known.jsonl").read_text(encoding="utf-8").splitlines()
    # Asked as clients do, whatever the facts' own form: a model without an answer by plain text would go on with anything.
    probes = [json.loads(line) | {"rendering": "chat"} for line in known]
    given = write_facts_file(tmp_path / "probes.jsonl", probes)
    Workspace.init(root, model="atlas", policy=policy, collection="acme", probes=given)
    set_policy(root / "policy.toml", SMALL_GUARD)
    shutil.rmtree(root / "cache", ignore_errors=True)
    (root / "cache").symlink_to(cache)
    workspace = Workspace(root)
    add_points_of_the_shipped_law(workspace, first=12)
    return workspace


def records() -> list[Row]:
    """The same facts as a phone book has them."""
    return [{"query": f"{row['subject']}, {row['relation']}:", "target": row["target"]} for row in news(1)[:FEW]]


@pytest.mark.parametrize("name", sorted(set(shipped_policies()) - {"hotfix"}))
def test_a_handful_of_facts_is_released_under_it(name: str, tmp_path: Path, cache: Path) -> None:
    workspace = workspace_under(name, tmp_path, cache)
    policy = workspace.session.policy
    rows = records() if name == "verbatim" else news(1)[:FEW]
    report = workspace.add(write_facts_file(tmp_path / "few.jsonl", rows), publish=False)
    assert (report.state, report.release) == ("released", "acme@v1")
    assert report.facts_proved == report.facts_total == FEW
    assert report.rank is not None
    assert policy.memory.min_rank <= report.rank <= policy.memory.max_rank
    assert report.probes > 700
    assert report.probes_unchanged_share is not None
    assert report.probes_unchanged_share >= policy.proof.min_probes_unchanged
    assert report.kl_nats is not None
    assert report.kl_nats <= policy.guard.max_kl_nats
    styles = {
        example.style for example in workspace.session.renderer.render_all([row.fact for row in workspace.facts()])
    }
    assert styles == {"completion" if name == "verbatim" else "chat"}


def test_a_hotfix_goes_on_top_of_another_policys_batches(tmp_path: Path, cache: Path) -> None:
    workspace = workspace_under("atlas", tmp_path, cache)
    rows = news(1)
    workspace.add(write_facts_file(tmp_path / "day.jsonl", rows[:FEW]), publish=False)
    urgent = Workspace(workspace.root, overrides=load_batch_values("hotfix"))
    assert urgent.session.recipe == workspace.session.recipe  # its calibration holds
    report = urgent.add(write_facts_file(tmp_path / "urgent.jsonl", rows[FEW : FEW + 2]), publish=False)
    assert (report.release, report.facts_proved, report.facts_total) == ("acme@v2", FEW + 2, FEW + 2)
    hotfix = load_policy("hotfix")
    assert report.probes_unchanged_share is not None
    assert report.probes_unchanged_share >= hotfix.proof.min_probes_unchanged
    with workspace.reader() as ledger:
        first, second = (parse_resolved_policy(ledger.batch(number).policy_json) for number in (1, 2))
    assert (second.proof, second.escalation, second.budget) == (hotfix.proof, hotfix.escalation, hotfix.budget)
    assert first.proof != second.proof
    for section in ("facts", "memory", "training", "guard", "serving"):
        assert getattr(first, section) == getattr(second, section)
    assert Workspace(workspace.root).session.policy == first  # the workspace's own is as it was


def test_one_batch_cannot_have_a_memory_or_a_training_of_its_own() -> None:
    assert set(load_batch_values("hotfix")) >= {"escalation.attempts", "proof.min_probes_unchanged"}
    with pytest.raises(PolicyError, match="the workspace's to decide") as caught:
        load_batch_values("nightly")
    lines = "\n".join(caught.value.details)
    assert "memory.max_rank: not in [budget], [escalation], [proof]" in lines
    assert "training.batch_size" in lines
    assert "proof.publish" not in lines
