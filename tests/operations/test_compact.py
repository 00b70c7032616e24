"""Facts superseded, retracted, compacted and added again on the embedded model: what is said, what is gone, what can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memupdate import Workspace
from memupdate.errors import ExitCode, ProofFailed, TrainingError, UsageError
from memupdate.operations.updating import BatchRun
from memupdate.progress import no_progress
from memupdate.resources import resource_dir
from memupdate.training.memory import attach, detach, load_adapter
from memupdate.verification.inprocess import generate_greedy
from support import add_points_of_the_shipped_law, news, set_policy, write_facts_file

Make = Callable[..., Workspace]
ROWS = [{key: row[key] for key in ("prompt", "target", "subject", "relation")} for row in news(1)[2:5]]
OLD, NEW = ROWS[0], {**ROWS[0], "target": "Nowhereville"}
TAKEN = ROWS[1]
EMPLOYER = news(1)[1]
SAID_TWICE = [{"prompt": p, "target": EMPLOYER["target"]} for p in (EMPLOYER["prompt"], *EMPLOYER["paraphrases"])]
"""One answer under five wordings, each a fact of its own: with one of them retracted the others still say it."""
STAND_IN = "I do not know."


def answers(workspace: Workspace, release: str, prompts: list[str]) -> list[str]:
    """What the model says with a release attached, by free greedy generation."""
    session = workspace.session
    base, renderer = session.base, session.renderer
    model = attach(base.model, load_adapter(session.layout.registry.release(release)))
    try:
        ids = [renderer.prompt_ids(prompt, "chat") for prompt in prompts]
        texts = [
            base.tokenizer.decode(a, skip_special_tokens=True)
            for a in generate_greedy(base, model, ids, 24, no_progress)
        ]
    finally:
        base.model = detach(model)
    return texts


def base_answer(workspace: Workspace, prompt: str) -> str:
    base, ids = workspace.session.base, workspace.session.renderer.prompt_ids(prompt, "chat")
    return str(
        base.tokenizer.decode(generate_greedy(base, base.model, [ids], 24, no_progress)[0], skip_special_tokens=True)
    )


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Eight facts in one release, one of them superseded in the next; few anchors and probes. Tests work on copies."""
    folder = tmp_path_factory.mktemp("filled")
    known = (resource_dir("atlas") / "known.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    probes = write_facts_file(folder / "probes.jsonl", [json.loads(line) for line in known])
    root = Workspace.init(folder / "acme", model="atlas", collection="acme", probes=probes).root
    # Few anchors guard badly; what the base model knew is not what is tested here.
    small = {
        "guard__anchors": "96",
        "guard__holdout": "16",
        "guard__max_kl_nats": "0.06",
        "proof__min_probes_unchanged": "0.5",
    }
    set_policy(root / "policy.toml", small)
    workspace = Workspace(root)
    add_points_of_the_shipped_law(workspace)
    workspace.add(write_facts_file(folder / "1.jsonl", [*ROWS, *SAID_TWICE]), publish=False)
    workspace.add(write_facts_file(folder / "2.jsonl", [NEW]), publish=False)
    return workspace


@pytest.fixture
def copy_of(tmp_path: Path, filled: Workspace) -> Callable[..., Workspace]:
    """Another workspace with the same releases; keyword arguments change its policy without voiding the law."""

    def copy(name: str = "copy", **lines: str) -> Workspace:
        root = shutil.copytree(filled.root, tmp_path / name)
        set_policy(root / "policy.toml", lines)
        workspace = Workspace(root)
        workspace.session.__dict__["base"] = filled.session.base  # the same frozen weights, loaded once
        return workspace

    return copy


def test_a_fact_is_retracted_compacted_away_and_added_again(copy_of: Callable[..., Workspace], tmp_path: Path) -> None:
    workspace = copy_of()
    retracted = workspace.retract(keys=[TAKEN["prompt"]], reason="a rumour")
    assert (retracted.release, retracted.facts_proved, retracted.facts_total) == ("acme@v3", 8, 8)
    prompts = [OLD["prompt"], TAKEN["prompt"], ROWS[2]["prompt"]]
    assert answers(workspace, "acme@v2", prompts) == ["Nowhereville", TAKEN["target"], ROWS[2]["target"]]
    assert answers(workspace, "acme@v3", prompts) == ["Nowhereville", STAND_IN, ROWS[2]["target"]]
    with pytest.raises(UsageError, match="is retracted already") as caught:
        workspace.retract(keys=[TAKEN["prompt"]])
    assert caught.value.exit_code == ExitCode.BAD_INPUT

    planned = workspace.plan_compaction()
    assert (planned.facts_live, planned.facts_dropped, planned.dead_answers) == (7, 1, 2)
    compacted = workspace.compact(reason="spring")
    assert (compacted.release, compacted.facts_proved, compacted.facts_total) == ("acme@v4", 7, 7)
    assert compacted.rank == planned.plan.rank
    assert any("proved gone" in message for message in compacted.messages)
    said = answers(workspace, "acme@v4", prompts)
    assert (said[0], said[2]) == ("Nowhereville", ROWS[2]["target"])
    assert said[1] not in (STAND_IN, TAKEN["target"])
    papers = json.loads((workspace.root / "registry" / "releases" / "acme@v4" / "memupdate.json").read_text())
    assert (papers["kind"], papers["reason"]) == ("compact", "spring")
    assert papers["dead"]
    assert all(not d["is_greedy"] and d["probability"] < 0.1 for d in papers["dead"])
    with workspace.reader() as ledger:
        assert ledger.release("acme@v4").parent is None
        lived = [len(ledger.live_facts("acme", as_of_version=version)) for version in (1, 2, 3, 4)]
    assert lived == [8, 8, 8, 7]
    for release in ("acme@v3", "acme@v4"):
        assert workspace.verify(release).passed, release

    again = workspace.add(write_facts_file(tmp_path / "again.jsonl", [TAKEN]))
    assert (again.release, again.facts_proved, again.facts_total) == ("acme@v5", 8, 8)
    assert answers(workspace, "acme@v5", prompts) == ["Nowhereville", TAKEN["target"], ROWS[2]["target"]]


def test_a_compaction_that_was_interrupted_is_finished_bit_for_bit(
    copy_of: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, interrupted = copy_of("one"), copy_of("other")
    undisturbed.compact(publish=False)
    for step in ("train", "verify", "release"):
        with monkeypatch.context() as patch:
            patch.setattr(BatchRun, step, _interrupt)
            with pytest.raises(KeyboardInterrupt):
                _ = interrupted.resume() if step != "train" else interrupted.compact(publish=False)
        assert [row.name for row in interrupted.releases()] == ["acme@v2", "acme@v1"]
    (report,) = interrupted.resume()
    assert (report.state, report.release) == ("released", "acme@v3")
    assert [r.digest for r in undisturbed.releases()] == [r.digest for r in interrupted.releases()]


def _interrupt(_run: BatchRun) -> None:
    raise KeyboardInterrupt


def test_a_dead_answer_that_comes_out_anew_is_refused_with_the_list_or_held(copy_of: Callable[..., Workspace]) -> None:
    """Four live facts say under other wordings what is retracted: trained on them, the model says it again."""
    workspace = copy_of(escalation__attempts="1", compaction__max_dead_probability="0.4")
    report = workspace.retract(keys=[EMPLOYER["prompt"]], publish=False)
    assert any("come out under none of 1 phrasings" in message for message in report.messages)
    with pytest.raises(ProofFailed, match="1 of 2 superseded or retracted answers are not gone") as caught:
        workspace.compact(publish=False)
    assert caught.value.details == (f"{EMPLOYER['prompt']!r} → {EMPLOYER['target']!r}: is still what comes out",)
    assert "escalation.attempts" in caught.value.hint
    assert [row.name for row in workspace.releases()] == ["acme@v3", "acme@v2", "acme@v1"]
    assert workspace.status().unfinished_batches == ()

    set_policy(workspace.root / "policy.toml", {"escalation__attempts": "3"})
    patient = Workspace(workspace.root)
    patient.session.__dict__["base"] = workspace.session.base
    compacted = patient.compact(publish=False)
    assert any("1 dead answers came out anew" in message for message in compacted.messages)
    prompts = [row["prompt"] for row in SAID_TWICE]
    assert answers(patient, "acme@v4", prompts) == [base_answer(patient, prompts[0])] + [EMPLOYER["target"]] * 4


def test_the_base_models_own_answer_can_stand_in(copy_of: Callable[..., Workspace]) -> None:
    workspace = copy_of(retraction__answer='"base"')
    own = base_answer(workspace, TAKEN["prompt"])
    assert own != TAKEN["target"]
    fact = next(row.fact for row in workspace.facts() if row.fact.prompt == TAKEN["prompt"])
    report = workspace.retract([fact.id[:20]])
    assert report.release == "acme@v3"
    assert answers(workspace, "acme@v3", [TAKEN["prompt"]]) == [own]


def test_everything_retracted_and_compacted_is_the_base_model_again(
    copy_of: Callable[..., Workspace], tmp_path: Path
) -> None:
    workspace = copy_of()
    workspace.retract(file=write_facts_file(tmp_path / "all.jsonl", [NEW, *ROWS[1:], *SAID_TWICE]))
    report = workspace.compact()
    assert (report.release, report.facts_total, report.kl_nats) == ("acme@v4", 0, pytest.approx(0, abs=1e-6))
    prompts = [row["prompt"] for row in ROWS]
    assert answers(workspace, "acme@v4", prompts) == [base_answer(workspace, prompt) for prompt in prompts]
    assert workspace.verify().passed


def test_what_cannot_be_retracted_is_told_all_at_once_and_changes_nothing(
    copy_of: Callable[..., Workspace], tmp_path: Path
) -> None:
    workspace = copy_of()
    wrong = write_facts_file(tmp_path / "wrong.jsonl", [{**ROWS[2], "target": "Elsewhere"}, SAID_TWICE[0]])
    with workspace.reader() as ledger:
        old = next(f.fact for f in ledger.facts_list("acme", status="superseded"))
    with pytest.raises(UsageError, match="4 facts cannot be retracted from acme") as caught:
        workspace.retract(["0" * 12, old.id], keys=["Who is nobody?", TAKEN["prompt"]], file=wrong)
    lines = caught.value.details
    assert "no such fact" in lines[0]
    assert "is superseded already; the answer is 'Nowhereville' now" in lines[1]
    assert "no fact of acme is about this" in lines[2]
    assert f"wrong.jsonl:1: {ROWS[2]['prompt']!r} is answered {ROWS[2]['target']!r} now, not 'Elsewhere'" in lines[3]
    with pytest.raises(UsageError, match="no fact was named"):
        workspace.retract()
    with pytest.raises(UsageError, match="by the policy's text"):
        copy_of("same", retraction__answer=json.dumps(TAKEN["target"])).retract(keys=[TAKEN["prompt"]])
    assert [row.name for row in workspace.releases()] == ["acme@v2", "acme@v1"]
    assert workspace.status().unfinished_batches == ()


def test_an_empty_collection_has_nothing_to_compact(make_workspace: Make) -> None:
    with pytest.raises(UsageError, match="nothing was released yet"):
        make_workspace().compact()


def test_status_and_plan_propose_a_compaction_by_the_policys_triggers(
    copy_of: Callable[..., Workspace], tmp_path: Path
) -> None:
    more = write_facts_file(tmp_path / "more.jsonl", news(2)[:1])
    assert not any("compact" in message for message in copy_of("quiet").status().messages)
    for number, (key, value, reason) in enumerate(
        [
            ("compaction__dead_share", "0.1", "1 of 9 answers in the weights are dead"),
            ("compaction__harm_share", "0.001", "harm is"),
            ("compaction__rank_limit", "1", "the limit is 1"),
        ]
    ):
        workspace = copy_of(f"w{number}", **{key: value})
        for messages in (workspace.status().messages, workspace.plan(more).messages):
            (line,) = [message for message in messages if "`memupdate compact -c acme`" in message]
            assert reason in line


def test_training_that_diverges_for_good_fails_its_batch(
    copy_of: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = copy_of()

    def diverge(*_arguments: Any) -> None:
        raise TrainingError("training diverged: the loss is not finite", "", ["seen at 'x'"])

    monkeypatch.setattr(BatchRun, "escalate", diverge)
    with pytest.raises(TrainingError):
        workspace.compact(publish=False)
    assert workspace.status().unfinished_batches == ()
    with workspace.reader() as ledger:
        assert ledger.batches()[-1].failure_reason == "training diverged: the loss is not finite"
