"""Canary, promote, abort, rollback, retire and many replicas: real ledger, real registry, our middleware behind real HTTP.

The models behind it only say who they are: what vLLM does with a release is told in `test_served` and `tests/serving`.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from typer.testing import CliRunner

import killing
from answering import Models, engine
from memupdate import Workspace
from memupdate.cli import app as cli
from memupdate.errors import AliasMoved, EngineError, ProofFailed, UsageError, WorkspaceLocked
from memupdate.facts.model import Fact
from memupdate.ledger.ledger import Ledger
from memupdate.operations import aliases, replicas, verifying
from memupdate.operations.answers import Answers, count_answers
from memupdate.operations.matching import write_matcher
from memupdate.operations.publishing import ServedProof
from memupdate.operations.replicas import replicas_of
from memupdate.operations.reports import PublishReport
from memupdate.progress import ProgressEvent, no_progress
from memupdate.serving.client import EngineClient, EngineRefused
from memupdate.serving.manifest import RELEASED, RETIRED, AliasEntry, Canary, read_manifest, with_alias, write_manifest
from memupdate.serving.metrics import ServingMetrics
from memupdate.verification.recall import FactProof
from support import set_policy, write_facts_file

STEPS = ("published", "put back", "rolled back", "canary begun", "canary ended", "promoted", "retired", "revived")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with three releases, none published; its policy wants no served proof."""
    folder = tmp_path_factory.mktemp("rollout")
    policy = folder / "policy.toml"
    policy.write_text(killing.POLICY, encoding="utf-8")
    set_policy(policy, {"proof__served": "false", "serving__canary_min_requests": "20"})
    model = killing.make_model(folder / "model")
    workspace = Workspace.init(folder / "ws", model=str(model), policy=str(policy), collection="acme")
    workspace.calibrate(ranks=[4, 8], sizes=[2, 4])
    for number, rows in enumerate((killing.FIRST, killing.SECOND[:1], killing.SECOND[1:2])):
        workspace.add(write_facts_file(folder / f"{number}.jsonl", rows))
    assert [row.name for row in workspace.releases()] == ["acme@v3", "acme@v2", "acme@v1"]
    return workspace.root


@pytest.fixture
def make(template: Path, tmp_path: Path) -> Callable[..., Workspace]:
    def copy(name: str = "ws", **policy: str) -> Workspace:
        root = shutil.copytree(template, tmp_path / name)
        set_policy(root / "policy.toml", policy)
        return Workspace(root)

    return copy


@pytest.fixture
def workspace(make: Callable[..., Workspace]) -> Workspace:
    return make()


@pytest.fixture
def two(workspace: Workspace) -> Iterator[tuple[list[str], list[Models]]]:
    """Two engines on the workspace's registry."""
    with ExitStack() as stack:
        pairs = [stack.enter_context(engine(workspace.session.layout.registry.root)) for _ in range(2)]
        yield [url for url, _ in pairs], [models for _, models in pairs]


def entry(workspace: Workspace) -> AliasEntry | None:
    return read_manifest(workspace.session.layout.registry.manifest).aliases.get("acme")


def steps(workspace: Workspace) -> list[tuple[str, str | None]]:
    with Ledger.open(workspace.session.layout.ledger, readonly=True) as ledger:
        return [(e.kind, e.release) for e in ledger.events(limit=-1) if e.kind in STEPS]


def state(workspace: Workspace, batch: int) -> str:
    with Ledger.open(workspace.session.layout.ledger, readonly=True) as ledger:
        return ledger.batch(batch).state


def answered_by(url: str, users: int = 400) -> dict[str, int]:
    found: dict[str, int] = {}
    with EngineClient(url) as client:
        for number in range(users):
            name = client.complete("acme", "?", 1, user=f"user-{number}").model
            found[name] = found.get(name, 0) + 1
    return found


def test_a_canary_takes_its_share_on_every_replica_and_is_promoted(
    workspace: Workspace, two: tuple[list[str], list[Models]]
) -> None:
    urls, models = two
    first = workspace.publish("acme@v1", served=urls)
    assert (first.replicas, first.served, first.canary_share) == (2, True, None)
    begun = workspace.publish("acme@v2", canary=0.25, served=[urls[0], urls[1] + "/v1/"])
    assert (begun.release, begun.previous, begun.canary_share, begun.replicas) == ("acme@v2", "acme@v1", 0.25, 2)
    assert all(engine.asked[-2:] == ["acme@v2", "acme@v2"] for engine in models), "warmed, then seen to answer"
    assert entry(workspace) == AliasEntry("acme@v1", None, Canary("acme@v2", 0.25))
    shares = [answered_by(url) for url in urls]
    assert shares[0] == shares[1]
    assert 60 <= shares[0]["acme@v2"] <= 140
    (told,) = [line for line in workspace.status().messages if "promote" in line]
    assert "0.25 of the conversations go to acme@v2" in told

    done = workspace.promote(served=urls)
    assert (done.release, done.previous, done.replicas) == ("acme@v2", "acme@v1", 2)
    assert answered_by(urls[1], 20) == {"acme@v2": 20}
    assert state(workspace, 2) == "published"
    assert steps(workspace) == [("published", "acme@v1"), ("canary begun", "acme@v2"), ("promoted", "acme@v2")]
    with pytest.raises(UsageError, match="no canary runs"):
        workspace.promote(served=urls)


def test_a_canary_ends_by_hand_by_rollback_or_by_the_next_release(workspace: Workspace) -> None:
    workspace.publish("acme@v1")
    for end in (workspace.abort, workspace.rollback):
        workspace.publish("acme@v2", canary=0.1)
        back: PublishReport = end()
        assert (back.release, back.previous) == ("acme@v1", "acme@v2")
        assert entry(workspace) == AliasEntry("acme@v1")
    with pytest.raises(UsageError, match="nothing to go back to"):
        workspace.rollback()
    workspace.publish("acme@v2", canary=0.1)
    assert workspace.publish("acme@v3").messages == ("the canary acme@v2 has ended",)
    assert entry(workspace) == AliasEntry("acme@v3", "acme@v1")


@pytest.mark.parametrize(
    ("release", "share", "why"),
    [("acme@v2", 1.0, "a canary of 1 is none"), ("acme@v2", 0.0, "is none"), ("acme@v1", 0.1, "already")],
)
def test_what_cannot_be_a_canary(workspace: Workspace, release: str, share: float, why: str) -> None:
    with pytest.raises(UsageError, match="points at nothing yet"):
        workspace.publish("acme@v1", canary=0.1)
    workspace.publish("acme@v1")
    with pytest.raises(UsageError, match=why):
        workspace.publish(release, canary=share)
    assert entry(workspace) == AliasEntry("acme@v1")


def test_a_canary_whose_answers_fail_is_ended(workspace: Workspace, two: tuple[list[str], list[Models]]) -> None:
    urls, models = two
    workspace.publish("acme@v1", served=urls)
    workspace.publish("acme@v3", canary=0.5, served=urls)
    assert workspace.abort_failing(served=urls[:1]) == [], "too few answers to tell"
    models[0].broken.add("acme@v3")
    assert 20 <= failed_of(urls[0]) <= 40
    with pytest.raises(ProofFailed, match="acme@v3 is not promoted, its canary has ended"):
        workspace.promote(served=urls[:1])
    assert entry(workspace) == AliasEntry("acme@v1")

    workspace.publish("acme@v3", canary=0.5, served=urls[1:])
    assert workspace.abort_failing(served=urls[1:]) == [], "what was before it began does not count"
    assert failed_of(urls[0]) >= 20
    (report,) = workspace.abort_failing(served=urls[1:])  # both engines of this process count in one registry
    assert (report.release, report.previous) == ("acme@v1", "acme@v3")
    assert steps(workspace)[-1] == ("canary ended", "acme@v3")
    assert workspace.abort_failing(served=urls) == []


def test_serve_ends_a_failing_canary_by_itself(
    workspace: Workspace, two: tuple[list[str], list[Models]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (url, _), (engine, _) = two
    monkeypatch.setattr(
        "memupdate.operations.deployment.replicas_of", lambda session, _served=(): replicas_of(session, [url])
    )
    told: list[str] = []
    workspace.publish("acme@v1")
    workspace.end_failing_canaries(told.append)
    workspace.publish("acme@v2", canary=0.5)
    engine.broken.add("acme@v2")
    assert failed_of(url) >= 20
    with workspace.writer("add"):
        workspace.end_failing_canaries(told.append)
    assert entry(workspace) == AliasEntry("acme@v1")
    (line,) = told
    assert line.startswith("the canary of acme has ended: ")
    with Ledger.open(workspace.session.layout.ledger, readonly=True) as ledger:
        (ended,) = ledger.events("acme", kind="canary ended")
    assert ended.detail["reason"] in line
    workspace.end_failing_canaries(told.append)
    assert len(told) == 1


def failed_of(url: str) -> int:
    """How many of 60 conversations end with a server error."""
    failed = 0
    with EngineClient(url) as client:
        for number in range(60):
            try:
                client.complete("acme", "?", 1, user=f"user-{number}")
            except EngineRefused as error:
                failed += error.status == 500
    return failed


def test_answers_are_counted_by_alias_and_release() -> None:
    registry = CollectorRegistry()
    requests = ServingMetrics(registry).requests
    for alias, release, status, count in [
        ("acme", "acme@v2", 200, 90), ("acme", "acme@v2", 500, 5), ("acme", "acme@v2", 404, 3), ("acme", "acme@v2", 400, 2),
        ("acme", "acme@v1", 500, 7), ("", "acme@v2", 500, 7),
    ]:  # fmt: skip
        requests.labels(alias, release, str(status)).inc(count)
    found = count_answers(generate_latest(registry).decode(), "acme", "acme@v2")
    assert found == Answers(100, 8, 2)
    assert count_answers("", "acme", "acme@v2") == Answers()
    assert found.since(Answers(60, 8)) == Answers(40, 0, 2)
    assert Answers(10, 1).since(found) == Answers(10, 1), "an engine was started again"


def test_an_engine_that_does_not_follow_leaves_all_as_it_was(
    workspace: Workspace, two: tuple[list[str], list[Models]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second engine reads a copy of the registry: it knows the release but sees no flip."""
    monkeypatch.setattr(replicas, "_CONFIRM_S", 0.5)
    urls, _ = two
    workspace.publish("acme@v1", served=urls)
    stale = shutil.copytree(workspace.session.layout.registry.root, tmp_path / "stale")
    with engine(stale) as (url, _models):
        for canary in (None, 0.3):
            with pytest.raises(EngineError, match="is answered by acme@v1, not by acme@v2"):
                workspace.publish("acme@v2", canary=canary, served=[urls[0], url])
            assert entry(workspace) == AliasEntry("acme@v1")
            assert answered_by(urls[0], 10) == {"acme@v1": 10}
    assert state(workspace, 2) == "released", "it still waits"
    assert steps(workspace)[1:] == [
        ("published", "acme@v2"), ("put back", "acme@v2"), ("canary begun", "acme@v2"), ("put back", "acme@v2")
    ]  # fmt: skip
    with pytest.raises(EngineError, match="cannot be reached"):
        workspace.publish("acme@v2", served=[urls[0], "http://127.0.0.1:9"])
    with pytest.raises(UsageError, match="no URL of an engine"):
        workspace.publish("acme@v2", served=["gpu7:8000"])
    assert entry(workspace) == AliasEntry("acme@v1")


def test_a_flip_may_be_seen_late(workspace: Workspace, two: tuple[list[str], list[Models]], tmp_path: Path) -> None:
    """As on a network file system, where a client may show the former file for some seconds."""
    urls, _ = two
    workspace.publish("acme@v1", served=urls)
    source = workspace.session.layout.registry.manifest
    late = shutil.copytree(source.parent, tmp_path / "late")

    def follow() -> None:
        while read_manifest(source).aliases["acme"].release != "acme@v2":
            time.sleep(0.01)
        time.sleep(0.7)
        write_manifest(late / source.name, read_manifest(source))

    with engine(late) as (url, _models):
        thread = threading.Thread(target=follow)
        thread.start()
        assert workspace.publish("acme@v2", served=[*urls, url]).replicas == 3
        assert answered_by(url, 5) == {"acme@v2": 5}
        thread.join()


def test_facts_that_the_router_misses_are_not_published(make: Callable[..., Workspace]) -> None:
    workspace = make(serving__route='"matched"')
    write_matcher(workspace.layout.registry.release("acme@v2"), workspace.session, [Fact("Who built it?", "Bo")])
    assert workspace.publish("acme@v1").release == "acme@v1", "each of its facts is reached by its wording"
    for share in (None, 0.5):
        with pytest.raises(ProofFailed, match="the router would miss 2 fact") as caught:
            workspace.publish("acme@v2", canary=share)
        assert any("'Who leads Acme?'" in line for line in caught.value.details)
        assert entry(workspace) == AliasEntry("acme@v1", route="matched")

    set_policy(workspace.root / "policy.toml", {"serving__route": '"always"'})
    always = Workspace(workspace.root)
    with pytest.raises(ProofFailed, match="the router would miss"):
        always.publish("acme@v2", canary=0.5)  # the alias is routed as it was until the next publishing
    always.publish("acme@v1")
    always.publish("acme@v2", canary=0.5)
    with pytest.raises(ProofFailed, match="the router would miss"):
        workspace.promote()
    assert entry(workspace) == AliasEntry("acme@v1"), "the canary has ended"
    assert always.publish("acme@v2").release == "acme@v2"


def test_verify_measures_both_routes_and_what_the_router_misses_fails(
    make: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    matched, always = make("matched", serving__route='"matched"'), make("always")
    assert (matched.verify("acme@v2").facts_proved_matched, matched.verify("acme@v2").passed) == (2, True)
    for workspace in (matched, always):
        folder = workspace.layout.registry.release("acme@v2")
        write_matcher(folder, workspace.session, [Fact("Who leads Acme?", "Iris")])
    missed, unrouted = matched.verify("acme@v2"), always.verify("acme@v2")
    assert (missed.route, missed.facts_total, missed.facts_proved, missed.facts_proved_matched) == ("matched", 2, 2, 1)
    (failure,) = missed.failures
    assert failure.prompt == "Where is Velon Energy based?"
    assert "mentions nothing that the router knows" in failure.explanation
    assert not missed.passed
    told = CliRunner().invoke(cli, ["-w", str(matched.root), "verify", "acme@v2", "--json"])
    assert (told.exit_code, json.loads(told.stdout)["facts_proved_matched"]) == (3, 1)
    assert (unrouted.route, unrouted.facts_proved, unrouted.facts_proved_matched) == ("always", 2, 1)
    assert unrouted.failures == ()
    assert unrouted.passed

    with matched.reader() as ledger:
        proofs = tuple(
            FactProof(fact.id, fact.prompt, fact.target, True, 1.0)
            for fact in ledger.live_facts("acme", as_of_version=2)
        )
    monkeypatch.setattr(verifying, "prove_on_engine", lambda *_: ServedProof(proofs, 0, "", ()))
    served = matched.verify("acme@v2", served="http://127.0.0.1:9")
    assert (served.engine, served.facts_proved, served.facts_proved_matched) == ("http://127.0.0.1:9", 2, 1)
    assert served.failures == missed.failures


class Killed(BaseException):
    """Nothing after it runs, as after `kill -9`."""


STORIES: dict[str, tuple[list[Callable[[Workspace], object]], Callable[[Workspace], object]]] = {
    "publish": ([], lambda w: w.publish("acme@v1")),
    "publish again": ([lambda w: w.publish("acme@v1")], lambda w: w.publish("acme@v2")),
    "canary": ([lambda w: w.publish("acme@v1")], lambda w: w.publish("acme@v2", canary=0.1)),
    "promote": ([lambda w: w.publish("acme@v1"), lambda w: w.publish("acme@v2", canary=0.1)], lambda w: w.promote()),
    "abort": ([lambda w: w.publish("acme@v1"), lambda w: w.publish("acme@v2", canary=0.1)], lambda w: w.abort()),
    "rollback": ([lambda w: w.publish("acme@v1"), lambda w: w.publish("acme@v2")], lambda w: w.rollback()),
    "end by rollback": (
        [lambda w: w.publish("acme@v1"), lambda w: w.publish("acme@v2", canary=0.1)],
        lambda w: w.rollback(),
    ),
}


@pytest.mark.parametrize("story", STORIES)
def test_a_step_cut_off_before_it_is_logged_is_logged_by_the_next_command(
    make: Callable[..., Workspace], story: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, step = STORIES[story]
    peace, cut = make("peace"), make("cut")
    for workspace in (peace, cut):
        for act in before:
            act(workspace)
    step(peace)

    def killed(*_arguments: object) -> None:
        raise Killed

    def writing(path: Path, manifest: Any) -> None:
        write_manifest(path, manifest)
        monkeypatch.setattr(aliases, "log_steps", killed)

    with monkeypatch.context():
        whole = aliases.log_steps
        monkeypatch.setattr(aliases, "write_manifest", writing)
        with pytest.raises(Killed):
            step(cut)
        monkeypatch.setattr(aliases, "write_manifest", write_manifest)
        monkeypatch.setattr(aliases, "log_steps", whole)
    assert entry(cut) == entry(peace)
    assert len(steps(cut)) == len(steps(peace)) - 1
    for _ in range(2):
        with cut.writer("test") as ledger:
            aliases.sync_manifest(cut.session, ledger)
        assert steps(cut) == steps(peace)
    if story in ("publish", "publish again", "canary"):
        step(cut)
        assert steps(cut) == steps(peace), "what is so already is no step"
    assert killing.content(cut.root)["batches"] == killing.content(peace.root)["batches"]


def test_nothing_that_takes_back_waits_for_a_batch(workspace: Workspace, two: tuple[list[str], list[Models]]) -> None:
    urls, _ = two
    workspace.publish("acme@v1", served=urls)
    workspace.publish("acme@v2", served=urls)
    with workspace.writer("add news.jsonl"):  # as it is for hours while a batch trains
        assert workspace.rollback(served=urls).release == "acme@v1"
        assert answered_by(urls[1], users=5) == {"acme@v1": 5}
    workspace.publish("acme@v3", canary=0.5, served=urls)
    with workspace.writer("add news.jsonl"):
        assert workspace.abort_failing(served=urls) == []
        assert workspace.abort(served=urls).previous == "acme@v3"
        assert workspace.serve(print_command=True)
        with pytest.raises(WorkspaceLocked, match=r"`memupdate add news.jsonl`"):
            workspace.publish("acme@v2", served=urls)
    assert entry(workspace) == AliasEntry("acme@v1", "acme@v2")
    assert steps(workspace)[2:] == [
        ("rolled back", "acme@v1"), ("canary begun", "acme@v3"), ("canary ended", "acme@v3")
    ]  # fmt: skip
    assert workspace.session.layout.registry.lock.stat().st_size == 0


def test_a_release_whose_files_are_lost_is_in_nobodys_way(workspace: Workspace) -> None:
    workspace.publish("acme@v1")
    workspace.publish("acme@v2")
    registry = workspace.session.layout.registry
    value = json.loads(registry.manifest.read_text())
    del value["releases"]["acme@v3"]
    registry.manifest.write_text(json.dumps(value))
    shutil.rmtree(registry.release("acme@v3"))
    assert workspace.rollback().release == "acme@v1"
    with pytest.raises(UsageError, match=r"adapter_model.safetensors: not there"):
        workspace.publish("acme@v3")


def test_a_rollback_in_the_middle_of_a_publication_stands(
    workspace: Workspace, two: tuple[list[str], list[Models]]
) -> None:
    urls, _ = two
    workspace.publish("acme@v1", served=urls)
    workspace.publish("acme@v2", served=urls)

    def pressed(event: ProgressEvent) -> None:
        if event.stage == "warm" and (entry(workspace) or AliasEntry("")).release == "acme@v2":
            Workspace(workspace.root).rollback(served=urls)

    with pytest.raises(
        AliasMoved, match=r"moved by another command meanwhile and points at acme@v1: acme@v3 is not pub"
    ):
        workspace.publish("acme@v3", served=urls, progress=pressed)
    assert entry(workspace) == AliasEntry("acme@v1", "acme@v2")
    assert (state(workspace, 3), workspace.waiting_releases()) == ("released", ["acme@v3"])
    assert steps(workspace)[2:] == [("rolled back", "acme@v1")]
    workspace.publish("acme@v3", served=urls)
    assert entry(workspace) == AliasEntry("acme@v3", "acme@v1")


def test_steps_from_many_sides_lose_none(workspace: Workspace) -> None:
    """Whoever moves an alias, and whoever enters releases beside it, begins with what is there."""
    workspace.publish("acme@v1")
    failures: list[BaseException] = []

    def moved(to: str) -> None:
        for _ in range(10):
            try:
                other = Workspace(workspace.root)
                with other.mover("test") as ledger:
                    before = aliases.sync_manifest(other.session, ledger)
                    after = with_alias(before, to, "acme@v1" if before.aliases[to].release != "acme@v1" else "acme@v2")
                    aliases.take_step(
                        other.session, ledger, before, after, alias=to, kind="published", release=after.aliases[to].release, detail={}
                    )  # fmt: skip
            except BaseException as error:
                failures.append(error)

    path = workspace.session.layout.registry.manifest
    before = read_manifest(path)
    write_manifest(path, with_alias(before, "second", "acme@v1"))
    threads = [threading.Thread(target=moved, args=(to,)) for to in ("acme", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert read_manifest(path).generation == before.generation + 1 + 20


def test_serve_goes_on_with_what_is_published_where_what_waits_cannot_be(
    workspace: Workspace, two: tuple[list[str], list[Models]], monkeypatch: pytest.MonkeyPatch
) -> None:
    urls, _ = two
    workspace.publish("acme@v1", served=urls)
    set_policy(workspace.root / "policy.toml", {"proof__served": "true"})
    workspace = Workspace(workspace.root)
    monkeypatch.setattr(
        "memupdate.operations.deployment.replicas_of", lambda session, _served=(): replicas_of(session, urls)
    )
    told: list[str] = []
    assert workspace.waiting_releases() == ["acme@v3"]
    with workspace.writer("add"):
        assert workspace.publish_waiting(["acme@v3"], told.append) == ["acme@v3"], "it waits on"
    assert told == []
    assert workspace.publish_waiting(["acme@v3"], told.append) == []
    (line,) = told
    assert line.startswith("acme@v3 is not published: ")
    assert line.endswith("`memupdate publish acme@v3` tries again")
    assert entry(workspace) == AliasEntry("acme@v1")
    assert workspace.publish_waiting(["acme@v2"], told.append) == [], "the later one has it all"
    assert len(told) == 1


def test_resume_goes_on_with_a_canary_as_a_canary(
    workspace: Workspace, two: tuple[list[str], list[Models]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before the batch is marked: the release still waits, and must not go to everybody by that."""
    urls, _ = two
    workspace.publish("acme@v1", served=urls)

    def killed(*_arguments: object, **_named: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("memupdate.operations.publishing.confirm", killed)
        with pytest.raises(Killed):
            workspace.publish("acme@v2", canary=0.1, served=urls)
    assert state(workspace, 2) == "released"
    with workspace.writer("test") as ledger:
        # What `resume` and `serve` do with a release that waits.
        report = workspace._publish(ledger, "acme@v2", replicas.replicas_of(workspace.session, urls), no_progress)
    assert report.canary_share == 0.1
    assert entry(workspace) == AliasEntry("acme@v1", None, Canary("acme@v2", 0.1))
    assert state(workspace, 2) == "published"


def test_releases_that_nothing_can_go_back_to_are_retired_and_can_be_revived(make: Callable[..., Workspace]) -> None:
    workspace = make(serving__retire_after_s="1")
    for number in (1, 2, 3):
        workspace.publish(f"acme@v{number}")

    def states() -> list[str]:
        releases = read_manifest(workspace.session.layout.registry.manifest).releases
        return [releases[f"acme@v{number}"].state for number in (1, 2, 3)]

    assert states() == [RELEASED] * 3, "its last step was just now"
    time.sleep(1.1)
    with engine(workspace.session.layout.registry.root) as (url, _models), EngineClient(url) as client:
        client.complete("acme@v1", "?", 1)
        workspace.resume()
        assert states() == [RETIRED, RELEASED, RELEASED], "acme@v2 is what a rollback goes to"
        with pytest.raises(EngineError, match="retired"):
            client.complete("acme@v1", "?", 1)
        workspace.rollback()
        time.sleep(1.1)
        workspace.publish("acme@v1")
        assert states() == [RELEASED, RELEASED, RELEASED], "later releases wait for their turn"
        client.complete("acme@v1", "?", 1)
    assert steps(workspace)[3:] == [
        ("retired", "acme@v1"), ("rolled back", "acme@v2"), ("revived", "acme@v1"), ("published", "acme@v1")
    ]  # fmt: skip


def test_the_command_line(workspace: Workspace, two: tuple[list[str], list[Models]]) -> None:
    def run(*arguments: str) -> Any:
        done = CliRunner().invoke(cli, ["-w", str(workspace.root), *arguments, "--json"])
        return (done.exit_code, json.loads(done.stdout) if done.stdout else done.stderr)

    served = [word for url in two[0] for word in ("--served", url)]
    assert run("publish", "acme@v1", *served)[1]["replicas"] == 2
    assert run("publish", "acme@v2", "--canary", "ten", *served)[0] == 2
    assert run("publish", "acme@v2", "--canary", "10%", *served)[1]["canary_share"] == 0.1
    assert run("abort", *served)[1]["release"] == "acme@v1"
    assert run("abort", *served)[0] == 2
    assert run("publish", "acme@v2", "--canary", "0.2", *served)[1]["canary_share"] == 0.2
    assert run("abort", "--if-failing", *served)[1]["rows"] == []
    assert run("abort", "acme", "--if-failing", *served)[0] == 2
    assert run("promote", "acme", *served)[1]["release"] == "acme@v2"
    assert run("rollback", *served)[1]["release"] == "acme@v1"
    code, said = run("promote", "nobody")
    assert (code, "no such alias (there are: acme)" in said) == (2, True)
