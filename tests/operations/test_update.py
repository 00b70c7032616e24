"""The main job without an engine: one batch, a second on top of it, refusals that leave things as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from memupdate import Workspace
from memupdate.errors import FactsError, OverBudget, ProofFailed, UsageError, WorkspaceLocked
from memupdate.ledger.lock import workspace_lock
from memupdate.resources import resource_dir
from memupdate.serving.adapter_check import check_adapter
from memupdate.serving.manifest import read_manifest
from memupdate.storage import file_sha256
from memupdate.training import loop
from support import add_points_of_the_shipped_law, news, write_facts_file

Make = Callable[..., Workspace]
FEW = 8


@pytest.fixture
def few(tmp_path: Path) -> Path:
    return write_facts_file(tmp_path / "few.jsonl", news(1)[:FEW])


def files_of(root: Path) -> dict[str, str]:
    """What a workspace holds, but for caches, the lock and SQLite's working files."""
    return {
        str(path.relative_to(root)): file_sha256(path)
        for path in sorted(root.rglob("*"))
        if path.is_file() and "cache" not in path.parts and not path.name.endswith(("-wal", "-shm", ".lock"))
    }


def greedy_answer(adapter: Path | None, prompt: str) -> str:
    """What plain transformers and PEFT answer, without any of our code."""
    atlas = resource_dir("atlas")
    tokenizer = AutoTokenizer.from_pretrained(atlas)
    model = AutoModelForCausalLM.from_pretrained(atlas, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_two_batches_are_proved_released_and_answered_by_plain_peft(
    make_workspace: Make, few: Path, tmp_path: Path
) -> None:
    workspace, rows = make_workspace(), news(1)[:FEW]
    first = workspace.add(few)
    assert (first.state, first.release, first.facts_proved, first.facts_total) == ("released", "acme@v1", FEW, FEW)
    assert any("no engine is running" in message for message in first.messages)
    assert first.plan is not None
    assert first.rank is not None
    assert first.rank >= first.plan.rank
    assert first.probes > 700
    folder = workspace.root / "registry" / "releases" / "acme@v1"
    entry = read_manifest(workspace.root / "registry" / "manifest.json").releases["acme@v1"]
    check_adapter(folder, expected_digest=entry.digest, max_rank=64, expected_config_digest=entry.config_digest)
    papers = json.loads((folder / "memupdate.json").read_text())
    assert papers["files"]["adapter_model.safetensors"] == entry.digest
    assert len(papers["facts"]) == FEW
    assert papers["law"]["fit_id"] == first.plan.fit_id
    assert papers["law"]["loss"]["gamma"]["low"] <= papers["law"]["loss"]["gamma"]["high"]
    for row in rows[:2]:
        assert greedy_answer(folder, row["prompt"]) == row["target"]
        assert greedy_answer(None, row["prompt"]) != row["target"]

    again = workspace.add(few)
    assert (again.batch_id, again.state) == (None, "unchanged")

    changed = {**rows[0], "target": "Nowhereville"}
    second = workspace.add(write_facts_file(tmp_path / "second.jsonl", [changed, *news(2)[:3]]))
    assert (second.release, second.facts_total, second.facts_proved) == ("acme@v2", FEW + 3, FEW + 3)
    newer = workspace.root / "registry" / "releases" / "acme@v2"
    assert greedy_answer(newer, rows[0]["prompt"]) == "Nowhereville"
    assert greedy_answer(newer, rows[1]["prompt"]) == rows[1]["target"]
    assert greedy_answer(folder, rows[0]["prompt"]) == rows[0]["target"]

    report = workspace.verify("acme@v1")
    assert (report.facts_proved, report.facts_total, report.engine) == (FEW, FEW, "in-process")
    assert [row.name for row in workspace.releases()] == ["acme@v2", "acme@v1"]
    status = workspace.status()
    assert (status.facts_live, status.releases, status.law_points) == (FEW + 3, 2, status.law_points)
    detail = workspace.fact(first.failures[0].fact_id if first.failures else workspace.facts(limit=1)[0].fact.id)
    assert detail.proofs
    assert all(proof.proved for proof in detail.proofs)


def test_a_changed_adapter_file_is_not_proved_or_published(make_workspace: Make, few: Path) -> None:
    workspace = make_workspace()
    workspace.add(few)
    file = workspace.root / "registry" / "releases" / "acme@v1" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UsageError, match="differs from what was proved"):
        workspace.verify("acme@v1")


def test_unproved_facts_refuse_the_release_and_can_be_given_again(make_workspace: Make, few: Path) -> None:
    workspace = make_workspace(escalation__attempts="1", training__learning_rate="1e-6")
    add_points_of_the_shipped_law(workspace)
    with pytest.raises(ProofFailed) as caught:
        workspace.add(few)
    assert len(caught.value.details) == FEW
    assert "token" in caught.value.details[0]
    assert workspace.releases() == []
    assert workspace.status().unfinished_batches == ()
    assert not list((workspace.root / "registry" / "releases").glob("*"))


def test_over_budget_leaves_no_trace(make_workspace: Make, tmp_path: Path) -> None:
    workspace = make_workspace(memory__max_rank="1", budget__all_proved="0.99")
    before = files_of(workspace.root)
    many = write_facts_file(tmp_path / "many.jsonl", [*news(1), *news(2)[:20]])
    with pytest.raises(OverBudget, match=r"rank"):
        workspace.add(many)
    assert files_of(workspace.root) == before


def test_a_facts_file_with_one_bad_line_changes_nothing(make_workspace: Make, tmp_path: Path) -> None:
    workspace = make_workspace()
    before = files_of(workspace.root)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in news(1)[:6]) + '{"prompt": "x", \n', encoding="utf-8")
    with pytest.raises(FactsError) as caught:
        workspace.add(bad)
    assert any("bad.jsonl:7" in line for line in caught.value.details)
    assert files_of(workspace.root) == before


def test_a_second_writer_is_told_who_works(make_workspace: Make, few: Path) -> None:
    workspace = make_workspace()
    with (
        workspace_lock(workspace.root / "memupdate.lock", "memupdate add big.jsonl"),
        pytest.raises(WorkspaceLocked, match=r"add big\.jsonl"),
    ):
        workspace.add(few)


def test_the_policy_may_release_what_is_proved_and_report_the_rest(make_workspace: Make, few: Path) -> None:
    """Trained to 0.7 and asked for 0.85: some facts pass, and only those are live."""
    workspace = make_workspace(proof__publish='"proved"', proof__min_probability="0.85")
    report = workspace.add(few)
    assert report.state == "released"
    assert 0 < report.facts_proved < FEW
    assert len(report.failures) == FEW - report.facts_proved
    assert "probability" in report.failures[0].explanation
    assert workspace.status().facts_live == report.facts_proved
    assert workspace.verify().passed
    with workspace.reader() as ledger:
        assert {row.status for row in ledger.facts_list("acme", status="unproved")} == {"unproved"}


def test_training_escalates_to_the_next_rank_and_says_so(
    make_workspace: Make, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that is content with any plan begins at rank 1, which stores nothing in the steps allowed."""
    monkeypatch.setattr(loop, "_MIN_STEPS", 0)
    workspace = make_workspace(
        budget__all_proved="0.01",
        training__learning_rate="1e-3",
        training__max_epochs="12",
        escalation__attempts="5",
        escalation__epochs_factor="1.0",
        escalation__rank_factor="16.0",
    )
    add_points_of_the_shipped_law(workspace)
    report = workspace.add(few)
    assert report.plan is not None
    assert report.plan.rank == 1
    assert (report.state, report.facts_proved) == ("released", FEW)
    assert report.rank in (16, 64)
    assert report.attempts == {16: 3, 64: 4}[report.rank]
    assert any("training on" in message for message in report.messages)
    assert any("grown to rank 16" in message for message in report.messages)
    with workspace.reader() as ledger:
        states = [event.detail for event in ledger.events() if event.batch == report.batch_id]
    assert any(detail.get("state") == "trained" and detail["rank"] == report.rank for detail in states)


def test_too_many_changed_probes_tighten_the_guard_before_anything_is_refused(make_workspace: Make, few: Path) -> None:
    """A guard that is as good as none lets a first try change more than the policy allows; the next one pulls it back."""
    workspace = make_workspace(
        guard__weight="0.2", guard__max_kl_nats="2.0", proof__min_probes_unchanged="0.96", escalation__attempts="6"
    )
    add_points_of_the_shipped_law(workspace)
    report = workspace.add(few)
    assert (report.state, report.facts_proved) == ("released", FEW)
    assert report.probes_unchanged_share is not None
    assert report.probes_unchanged_share >= 0.96
    assert report.attempts > 1
    (told, *_) = (message for message in report.messages if "trained on under a guard of" in message)
    assert "probes answer as before" in told
