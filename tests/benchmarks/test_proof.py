"""The study of what a proof is worth: its facts, its samples, and that a proof in one pass proves what generation gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.budget.batches import atlas_world, known_names
from benchmarks.proof import speed
from benchmarks.proof.releases import Rows, held_out_phrasings
from benchmarks.proof.worlds import WORLD_SEED, batches, world_facts, write_facts

from memupdate import Workspace
from memupdate.facts.reader import read_facts
from memupdate.policies import load_policy


def test_facts_are_new_to_the_model_and_the_same_each_time(tmp_path: Path) -> None:
    facts = world_facts(600, seed=WORLD_SEED)
    assert facts == world_facts(600, seed=WORLD_SEED)
    assert len({fact.key for fact in facts}) == 600
    assert not {fact.subject for fact in facts} & known_names(atlas_world())
    parts = list(batches(facts, 250))
    assert [len(part) for part in parts] == [250, 250, 100]
    write_facts(tmp_path / "facts.jsonl", parts[0])
    assert [located.fact for located in read_facts(tmp_path / "facts.jsonl").facts] == parts[0]
    write_facts(tmp_path / "bare.jsonl", parts[0], augmented=False)
    assert all(located.fact.paraphrases == () for located in read_facts(tmp_path / "bare.jsonl").facts)


def test_generality_is_measured_on_phrasings_that_are_not_trained(tmp_path: Path, repo_root: Path) -> None:
    policy = repo_root / "benchmarks" / "proof" / "policy.toml"
    load_policy(str(policy))
    session = Workspace.init(tmp_path / "w", model="atlas", policy=str(policy)).session
    facts = world_facts(20, seed=WORLD_SEED)
    trained = {example.prompt for example in session.training_examples(facts)}
    asked = {prompt for prompts in held_out_phrasings(session, facts).values() for prompt in prompts}
    assert (len(trained), len(asked), trained & asked) == (60, 40, set())


def test_changed_facts_are_the_same_questions_with_other_answers(repo_root: Path) -> None:
    old, new = (
        [json.loads(line) for line in (repo_root / "examples" / "endoflife" / name).read_text("utf-8").splitlines()]
        for name in ("2024-01-01.jsonl", "2025-01-01.jsonl")
    )
    assert [fact["prompt"] for fact in old] == [fact["prompt"] for fact in new]
    assert sum(a["target"] != b["target"] for a, b in zip(old, new, strict=True)) == 150
    assert len({fact["prompt"] for fact in old}) == len(old) == 200
    assert all(a.get("valid_from", "") <= b.get("valid_from", "") for a, b in zip(old, new, strict=True))


def test_a_row_is_measured_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"facts": 3}

    assert Rows(tmp_path).get("one", measure) == Rows(tmp_path).get("one", measure) == {"facts": 3}
    assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize("is_record", [False, True])
def test_what_is_generated_is_proved_in_one_pass(tmp_path: Path, is_record: bool) -> None:
    session = Workspace.init(tmp_path / "w", model="atlas").session
    questions = session.renderer.render_all(world_facts(40, seed=8_000))
    answers, row = speed.in_process(session, questions, is_record=is_record)
    assert (len(answers), row["facts"], row["proved"]) == (40, 40, 40)
    assert not is_record or {len(answer) for answer in answers} == {speed.RECORD_TOKENS}
