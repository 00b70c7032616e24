"""What a release is measured to do, on the embedded model: recorded with it, held to the policy, told by `verify`, explained fact by fact.

One small workspace is trained once for all tests here.
"""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from rich.console import Console
from typer.testing import CliRunner

from endpoint import Endpoint
from memupdate import Workspace
from memupdate.cli import app
from memupdate.cli.verify import verify_views
from memupdate.errors import ExitCode, ProofFailed, UsageError
from memupdate.facts.model import Fact
from memupdate.operations import explaining
from memupdate.operations.explaining import words_in_common
from memupdate.operations.publishing import release_memory
from memupdate.operations.reports import AddReport
from memupdate.training.memory import attach, detach
from memupdate.verification.neighbours import is_guess
from memupdate.verification.questions import GIVEN, HELD_OUT, RENDERING, SYSTEM, TRAINED
from memupdate.verification.served import GENERATED
from support import news, set_policy, write_facts_file


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> tuple[Workspace, AddReport]:
    folder = tmp_path_factory.mktemp("measured")
    workspace = Workspace.init(folder / "ws", model="atlas", collection="acme")
    shutil.rmtree(workspace.root / "cache")
    (workspace.root / "cache").symlink_to(shared_cache)
    rows = news(1)[:5]
    rows[0] |= {"locality": [{"prompt": "Who does Ida Fenaford work for?"}]}
    rows[1] |= {"portability": [{"prompt": "Whom does Velerco Robotics employ?", "target": "Iris Gelastrom"}]}
    report = workspace.add(write_facts_file(folder / "facts.jsonl", rows), publish=False)
    return Workspace(workspace.root), report


def test_a_release_carries_what_was_measured(released: tuple[Workspace, AddReport]) -> None:
    workspace, report = released
    assert report.release is not None
    with workspace.reader() as ledger:
        rows, counts = ledger.measures(report.release), ledger.measure_counts(report.release)
        text, tokens = ledger.text_measure(report.release), ledger.fact_tokens(report.release, limit=20)
        facts = ledger.live_facts("acme")
    by_part = {(c.measure, c.part): c for c in counts}
    assert by_part["recall", "own prompt"].exact == 5
    assert by_part["recall", TRAINED].asked == by_part["generality", HELD_OUT].asked == 10
    assert by_part["recall", TRAINED].exact >= 9
    assert by_part["generality", RENDERING].asked == by_part["generality", SYSTEM].asked == 5
    assert by_part["portability", GIVEN].asked == by_part["locality", GIVEN].asked == 1
    assert sum(c.asked for c in counts if c.measure == "locality") > 700
    assert all((row.answer is None) == (row.judged == "exact") for row in rows)
    held_out = [r for r in rows if r.part == HELD_OUT]
    assert Counter(r.fact for r in held_out) == dict.fromkeys((f.id for f in facts), 2)
    assert {r.prompt for r in held_out} == {p for f in facts for p in f.paraphrases[2:]}
    exact = sum(r.judged == "exact" for r in held_out)
    assert report.generality_share == pytest.approx(exact / 10)
    sure = [r for r in rows if r.measure == "locality" and not is_guess(r.part)]
    assert report.locality_share == pytest.approx(sum(r.judged == "exact" for r in sure) / len(sure))
    assert report.locality_share > 0.95
    assert text is not None
    assert report.perplexity_ratio == pytest.approx(text.perplexity_ratio)
    assert 0.95 < text.perplexity_ratio < 1.1
    assert {t.fact for t in tokens} == {f.id for f in facts}
    least = [min(t.probability for t in fact.tokens) for fact in tokens]
    assert least == sorted(least)
    with workspace.reader() as ledger:
        proofs = {p.fact: p.min_probability for p in ledger.proofs(report.release)}
        assert ledger.verify() == []
    assert {t.fact: pytest.approx(p, rel=1e-3) for t, p in zip(tokens, least, strict=True)} == proofs


def test_verify_measures_the_same_again(released: tuple[Workspace, AddReport]) -> None:
    workspace, report = released
    assert report.release is not None
    with workspace.reader() as ledger:
        before = [(r.part, r.prompt, r.judged) for r in ledger.measures(report.release)]
    result = CliRunner().invoke(app, ["-w", str(workspace.root), "verify", "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [(q["part"], q["prompt"], q["judged"]) for q in document["questions"]] == before
    assert document["sampled"] == "all 5"
    assert document["text"]["perplexity_ratio"] == pytest.approx(report.perplexity_ratio)
    shares = {(c["measure"], c["part"]): c["exact_share"] for c in document["measures"]}
    assert shares["recall", "own prompt"] == 1.0


def test_the_engine_is_asked_freely_for_as_many_as_the_policy_needs(released: tuple[Workspace, AddReport]) -> None:
    workspace, _ = released
    session = workspace.session
    with workspace.reader() as ledger:
        memory = release_memory(session, ledger.release("acme@v1"))
    base = session.base
    model = attach(base.model, memory)
    server = Endpoint(replace(base, model=model))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        report = workspace.verify(served=f"http://127.0.0.1:{server.server_port}")
        server.suffix = " indeed"
        bent = workspace.verify(served=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        base.model = detach(model)
    assert report.passed
    assert (report.facts_proved, report.generated, report.sampled) == (5, 5, "all 5")
    assert {(c.engine, c.part, c.asked, c.exact) for c in report.measures} == {
        ("served", "own prompt", 5, 5), ("served", GENERATED, 5, 5),
    }  # fmt: skip
    assert not bent.passed
    assert {(c.part, c.exact, c.contained) for c in bent.measures if c.part == GENERATED} == {(GENERATED, 0, 5)}
    assert all(q.answer == f"{q.expected} indeed" for q in bent.questions)


def test_one_fact_is_explained_token_by_token(released: tuple[Workspace, AddReport]) -> None:
    workspace, _ = released
    with workspace.reader() as ledger:
        fact = ledger.live_facts("acme")[1]
    found = workspace.explain_answer(fact.id[:20])
    assert (found.prompt, found.target, found.says, found.proved) == (fact.prompt, fact.target, fact.target, True)
    assert "".join(t.token or "" for t in found.tokens[:-1]) == fact.target
    assert all(t.probability >= 0.5 and t.token == t.best_token for t in found.tokens)
    assert {GIVEN, HELD_OUT} <= {m.part for m in found.measures}
    assert found.advice
    shown = CliRunner().invoke(
        app, ["-w", str(workspace.root), "verify", "--explain", fact.id[:20]], env={"COLUMNS": "200"}
    )
    assert shown.exit_code == 0
    for text in (fact.target, "likeliest", "What would help"):
        assert text in shown.stdout


def test_explain_looks_at_the_model_here(released: tuple[Workspace, AddReport]) -> None:
    workspace, _ = released
    both = CliRunner().invoke(app, ["-w", str(workspace.root), "verify", "--explain", "ab", "--served", "http://x"])
    assert both.exit_code == int(ExitCode.BAD_INPUT)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"proof__max_perplexity_increase": "0.000001"}, "perplexity of general text"),
        ({"proof__corpus": '"general.txt"', "proof__max_perplexity_increase": "0.000001"}, "(general.txt) is up by"),
    ],
)
def test_a_release_that_falls_short_of_the_policy_does_not_pass(
    released: tuple[Workspace, AddReport], values: dict[str, str], reason: str
) -> None:
    workspace, _ = released
    (workspace.root / "general.txt").write_text("Where was Ida Fenaford born? Wilimouth. " * 30, encoding="utf-8")
    policy = workspace.root / "policy.toml"
    before = policy.read_text(encoding="utf-8")
    try:
        set_policy(policy, values)
        report = Workspace(workspace.root).verify()
        assert not report.passed
        assert report.facts_proved == report.facts_total
        assert any(reason in line for line in report.shortfalls), report.shortfalls
        console = Console(record=True, width=200, file=io.StringIO())
        for part in verify_views(report):
            console.print(part)
        shown = console.export_text()
        for text in ("held-out phrasing", "same relation, another subject", "General text (", "perplexity", reason):
            assert text in shown
    finally:
        policy.write_text(before, encoding="utf-8")


def test_a_batch_that_falls_short_is_kept_explained_and_not_released(released: tuple[Workspace, AddReport]) -> None:
    """Its facts answer to their own prompts only: nothing was trained on, and everything is asked of it."""
    workspace, _ = released
    policy = workspace.root / "policy.toml"
    before = policy.read_text(encoding="utf-8")
    try:
        set_policy(policy, {"proof__min_generality": "1.0", "proof__max_perplexity_increase": "0.000001"})
        rows = [{**row, "paraphrases": ["Tell me, purple monkeys."]} for row in news(1)[10:11]]
        with pytest.raises(ProofFailed) as caught:
            Workspace(workspace.root).add(write_facts_file(workspace.root / "more.jsonl", rows), publish=False)
    finally:
        policy.write_text(before, encoding="utf-8")
    assert "generality is" in caught.value.message
    assert "100.0% wanted" in caught.value.message
    assert any("Tell me, purple monkeys." in line for line in caught.value.details)
    with workspace.reader() as ledger:
        batch = ledger.batches()[-1]
        assert batch.state == "failed"
        assert "generality is" in (batch.failure_reason or "")
        slice_ = ledger.slice(batch.id)
        assert ledger.latest_release("acme") == ledger.release("acme@v1")
        facts = {item.fact.id: item.fact for item in ledger.batch_facts(batch.id)}
    assert slice_ is not None
    assert (workspace.root / slice_.relative_path).is_dir()
    (failed,) = facts
    kept = workspace.explain_answer(failed)
    assert (kept.release, kept.status, kept.proved) == (f"batch {batch.id} (failed)", "failed", True)
    assert kept.says == facts[failed].target
    with pytest.raises(UsageError, match=r"was not taught to acme@v1"):
        workspace.explain_answer(failed, release="acme@v1")


def test_a_corpus_that_is_not_there_is_told_before_training(
    released: tuple[Workspace, AddReport], tmp_path: Path
) -> None:
    workspace, _ = released
    policy = workspace.root / "policy.toml"
    before = policy.read_text(encoding="utf-8")
    try:
        set_policy(policy, {"proof__corpus": '"nowhere.txt"'})
        with pytest.raises(UsageError, match=r"nowhere\.txt: cannot be read"):
            Workspace(workspace.root).add(write_facts_file(tmp_path / "f.jsonl", news(1)[12:13]), publish=False)
    finally:
        policy.write_text(before, encoding="utf-8")


ACME = Fact("Who leads Acme now?", "Ida", subject="Acme", relation="head")


def test_what_competes_is_what_came_out_and_what_is_asked_almost_the_same() -> None:
    said = Fact("Who leads Bolt now?", "Otto")
    near = Fact("Who leads Cog now?", "Jo")
    far = Fact("Where is the river?", "otto.")
    other = Fact("Where is the sea?", "North")
    old = Fact("Who leads Acme now?", "Otto", valid_from="2020")
    dead_and_silent = Fact("Who leads Acme, now?", "Ada")
    found = explaining.find_competitors(ACME, "Otto", [ACME, other, near, far, said], [old, dead_and_silent])
    assert [(c.fact, c.answers_so, c.is_live) for c in found] == [
        (old.id, True, False), (said.id, True, True), (far.id, True, True), (near.id, False, True),
    ]  # fmt: skip
    assert [c.words_in_common for c in found] == [1.0, 0.6, 0.0, 0.6]
    proved = explaining.find_competitors(ACME, "Ida", [ACME, other, near, far, said], [old])
    assert {c.fact for c in proved} == {near.id, said.id}
    assert not any(c.answers_so for c in proved)


def test_words_in_common() -> None:
    assert words_in_common("Who leads Acme?", "who leads ACME") == 1.0
    assert words_in_common("Who leads Acme?", "Who leads Bolt?") == pytest.approx(0.5)
    assert words_in_common("?", "?") == 1.0
