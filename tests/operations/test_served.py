"""The whole chain with the real vLLM on the embedded model: publish, flip, roll back; what was proved is what is served."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from memupdate import Workspace
from memupdate.errors import EngineError, UsageError
from memupdate.layout import ADAPTER_WEIGHTS_FILE
from memupdate.models.scoring import score_examples
from memupdate.operations.answers import ENGINES_BEFORE, look, parse_seen
from memupdate.operations.replicas import replicas_of
from memupdate.serving.client import EngineClient
from memupdate.serving.engine_record import running_engine
from memupdate.training.memory import attach, detach, load_adapter
from memupdate.verification.inprocess import generate_greedy
from support import news, set_policy, write_facts_file

pytestmark = pytest.mark.integration
FEW = 6
USERS = [f"user-{number}" for number in range(24)]
ADMIN_TOKEN = "let me in"


@dataclass
class Served:
    """A workspace with one release, made before the engine started, and its engine."""

    workspace: Workspace
    url: str
    scratch: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    scratch = tmp_path_factory.mktemp("served")
    root = Workspace.init(scratch / "acme", model="atlas", collection="acme").root
    set_policy(root / "policy.toml", {"serving__canary_min_requests": "8"})
    workspace = Workspace(root)
    first = workspace.add(write_facts_file(scratch / "first.jsonl", news(1)[:FEW]))
    assert (first.state, first.publication) == ("released", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMUPDATE_ADMIN_TOKEN", ADMIN_TOKEN)
        with workspace.engine() as url:
            yield Served(workspace, url, scratch)
    assert running_engine(workspace.session.layout.engine) is None


def ask(url: str, prompt: str, model: str = "acme") -> tuple[str, str]:
    with EngineClient(url) as client:
        answer = client.chat(model, [{"role": "user", "content": prompt}], 24)
    return answer.text, answer.model


def ask_all(url: str, prompt: str) -> set[tuple[int, str, str]]:
    """(status, text, model) of one chat each for many users; empty where there is no answer."""
    found = set()
    for user in USERS:
        body = {"model": "acme", "messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "user": user}
        got = httpx.post(
            f"{url}/v1/chat/completions", json={**body, "temperature": 0}, timeout=60, trust_env=False
        ).json()
        text = got["choices"][0]["message"]["content"] if "choices" in got else ""
        found.add((got.get("error", {}).get("code", 200), text, got.get("model", "")))
    return found


def test_what_was_released_without_an_engine_goes_live_and_flips_and_rolls_back(served: Served) -> None:
    workspace, rows = served.workspace, news(1)[:FEW]
    told: list[str] = []
    assert workspace.publish_waiting(workspace.waiting_releases(), told.append) == told == []
    assert (workspace.status().unfinished_batches, workspace.waiting_releases()) == ((), [])
    with workspace.reader() as ledger:
        (event,) = ledger.events("acme", kind="published")
    assert (event.release, event.detail["served"]) == ("acme@v1", True)
    assert ask(served.url, rows[0]["prompt"]) == (rows[0]["target"], "acme@v1")

    changed = {**rows[0], "target": "Nowhereville"}
    second = workspace.add(write_facts_file(served.scratch / "second.jsonl", [changed, *news(2)[:2]]))
    assert (second.state, second.release) == ("published", "acme@v2")
    assert second.publication is not None
    assert second.publication.previous == "acme@v1"
    assert (second.publication.facts_proved_served, second.publication.generated) == (FEW + 2, FEW + 2)
    assert ask(served.url, rows[0]["prompt"]) == ("Nowhereville", "acme@v2")
    assert ask(served.url, rows[0]["prompt"], "acme@v1") == (rows[0]["target"], "acme@v1")

    back = workspace.rollback()
    assert (back.release, back.previous) == ("acme@v1", "acme@v2")
    assert ask(served.url, rows[0]["prompt"]) == (rows[0]["target"], "acme@v1")
    assert workspace.verify("acme@v2", served=served.url).passed


def test_a_canary_takes_a_share_ends_by_itself_when_it_fails_and_is_promoted_when_it_does_not(served: Served) -> None:
    workspace, (row, *_) = served.workspace, news(1)
    old, new = (200, row["target"], "acme@v1"), (200, "Nowhereville", "acme@v2")
    told: list[str] = []
    canary = workspace.publish("acme@v2", canary=0.5)
    assert (canary.canary_share, canary.previous, canary.facts_proved_served) == (0.5, "acme@v1", FEW + 2)
    assert ask_all(served.url, row["prompt"]) == {old, new}
    workspace.end_failing_canaries(told.append)
    with workspace.reader() as ledger:
        (begun,) = ledger.events("acme", kind="canary begun")
    (now,) = look(workspace.session, "acme", "acme@v2", "acme@v1", replicas_of(workspace.session)).values()
    (before,) = parse_seen(begun.detail[ENGINES_BEFORE]).values()
    assert now is not None
    assert now.follows(before), "the same engine, by its own start"
    assert now.canary.requests >= before.canary.requests + 8, "enough to judge it by"
    assert (now.canary.errors, now.canary.refused, told) == (0, 0, [])

    weights = workspace.session.layout.registry.release("acme@v2") / ADAPTER_WEIGHTS_FILE
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    unload(served.url, "acme@v2")  # as after a restart: the engine has to read it again, and refuses it
    assert ask_all(served.url, row["prompt"]) == {old, (404, "", "")}
    workspace.end_failing_canaries(told.append)
    (line,) = told
    assert line.startswith("the canary of acme has ended: ")
    assert ask_all(served.url, row["prompt"]) == {old}

    weights.write_bytes(whole)
    assert workspace.publish("acme@v2", canary=0.5).canary_share == 0.5
    assert ask_all(served.url, row["prompt"]) == {old, new}
    promoted = workspace.promote()
    assert (promoted.release, promoted.previous, promoted.facts_proved_served) == ("acme@v2", "acme@v1", FEW + 2)
    assert ask_all(served.url, row["prompt"]) == {new}


def unload(url: str, release: str) -> None:
    headers = {"x-memupdate-admin-token": ADMIN_TOKEN}
    body = {"lora_name": release}
    answer = httpx.post(f"{url}/v1/unload_lora_adapter", json=body, headers=headers, timeout=60, trust_env=False)
    assert answer.status_code == 200


def test_engine_and_process_compute_the_same_and_emit_what_was_proved(served: Served) -> None:
    session = served.workspace.session
    base, renderer = session.base, session.renderer
    with served.workspace.reader() as ledger:
        facts = ledger.live_facts("acme", as_of_version=1)
    examples = renderer.render_all(facts)
    model = attach(base.model, load_adapter(session.layout.registry.release("acme@v1")))
    try:
        here = score_examples(model, examples, base.device)
        generated = generate_greedy(base, model, [e.prompt_ids for e in examples], 24, lambda _event: None)
    finally:
        base.model = detach(model)
    with EngineClient(served.url) as client:
        there = client.score_targets("acme@v1", [e.prompt_ids for e in examples], [e.target_ids for e in examples])
    for example, ours, theirs, ids in zip(examples, here, there, generated, strict=True):
        assert ours.greedy_ids == example.target_ids == tuple(ids)
        assert all(token.rank == 1 for token in theirs)
        torch.testing.assert_close(
            torch.tensor(ours.logprobs), torch.tensor([token.logprob for token in theirs]), atol=1e-5, rtol=0
        )
        assert min(math.exp(token.logprob) for token in theirs) > 0.5
        assert ask(served.url, example.prompt, "acme@v1") == (example.answer, "acme@v1")


def test_a_second_engine_for_the_workspace_is_refused(served: Served) -> None:
    with pytest.raises(UsageError, match="runs already"), served.workspace.engine():
        pass


def test_an_engine_with_too_small_slots_is_told_before_anything_moves(served: Served) -> None:
    record = served.workspace.session.layout.engine
    text = record.read_text(encoding="utf-8")
    before = served.workspace.status().aliases
    record.write_text(json.dumps({**json.loads(text), "max_lora_rank": 0}), encoding="utf-8")
    try:
        with pytest.raises(EngineError, match="takes up to 0"):
            served.workspace.publish("acme@v2")
    finally:
        record.write_text(text, encoding="utf-8")
    assert served.workspace.status().aliases == before


def test_the_command_line_sees_the_engine(served: Served) -> None:
    command = [sys.executable, "-m", "memupdate", "-w", str(served.workspace.root), "status", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert json.loads(done.stdout)["engine"]["url"] == served.url
