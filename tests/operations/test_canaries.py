"""What ends a canary: its answers against those of the release beside it, and engines that do not live through it.

The ledger, the registry and the middleware are real; nothing is trained, and what the engines have counted is written by hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from answering import Models, engine
from memupdate import Workspace
from memupdate.errors import EngineError
from memupdate.facts.model import Fact
from memupdate.operations import aliases, answers, canaries
from memupdate.operations.answers import Answers, Seen, count_answers, parse_seen, seen_before, seen_json, shown_since
from memupdate.operations.replicas import replicas_of
from memupdate.serving.engine_record import process_start, write_record
from memupdate.serving.manifest import (
    RELEASED,
    RETIRED,
    Canary,
    Manifest,
    Move,
    ReleaseEntry,
    read_manifest,
    with_alias,
    with_canary,
    with_move,
    with_release,
    write_manifest,
)
from memupdate.serving.metrics import ServingMetrics
from support import record_untrained_release, set_policy

NOBODY = "http://127.0.0.1:9"
Counts = dict[tuple[str, int], int]
OLD, NEW = "acme@v1", "acme@v2"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Two releases, `acme` points at the first."""
    monkeypatch.setattr(answers, "_PAUSE_S", 0.0)
    made = Workspace.init(tmp_path / "ws", model="atlas", collection="acme")
    with made.writer("test") as ledger:
        digest = record_untrained_release(ledger, (Fact("Who leads Acme?", "Wanda"),))
        record_untrained_release(ledger, (Fact("Where is Acme?", "Leeds"),), 2)
    manifest = Manifest(digest)
    for number, name in enumerate((OLD, NEW), start=1):
        manifest = with_release(manifest, name, ReleaseEntry(digest, digest, 8, number, digest))
        made.layout.registry.release(name).mkdir(parents=True)
    write_manifest(made.layout.registry.manifest, with_alias(manifest, "acme", OLD))
    return made


@pytest.fixture
def two(workspace: Workspace) -> Iterator[tuple[list[str], list[Models]]]:
    with ExitStack() as stack:
        pairs = [stack.enter_context(engine(workspace.layout.registry.root)) for _ in range(2)]
        for _, models in pairs:
            models.metrics = counted({(NEW, 500): 30})  # of an earlier canary, which ended
        yield [url for url, _ in pairs], [models for _, models in pairs]


def counted(counts: Counts, *, started_s: float | None = 1000.0) -> bytes:
    """`/metrics` of an engine that began at `started_s`."""
    registry = CollectorRegistry()
    requests = ServingMetrics(registry).requests
    for (release, status), count in counts.items():
        requests.labels("acme", release, str(status)).inc(count)
    if started_s is not None:
        Gauge("process_start_time_seconds", "", registry=registry).set(started_s)
    return generate_latest(registry)


def begin(workspace: Workspace, urls: list[str]) -> None:
    """A canary, as `publish --canary` begins it after its proof."""
    with workspace.writer("test") as ledger:
        manifest, session = aliases.sync_manifest(workspace.session, ledger), workspace.session
        after = with_canary(manifest, "acme", Canary(NEW, 0.5))
        detail = seen_before(session, "acme", NEW, OLD, replicas_of(session, urls))
        kind = aliases.CANARY_BEGUN
        aliases.take_step(session, ledger, manifest, after, alias="acme", kind=kind, release=NEW, detail=detail)


def runs(workspace: Workspace) -> bool:
    return read_manifest(workspace.layout.registry.manifest).aliases["acme"].canary is not None


def reason(workspace: Workspace) -> str:
    with workspace.reader() as ledger:
        return str(ledger.events("acme", kind=aliases.CANARY_ENDED)[-1].detail["reason"])


WELL: Counts = {(NEW, 500): 30, (NEW, 200): 60, (OLD, 200): 60}
STORIES: dict[str, tuple[Counts, str]] = {
    "all is well": (WELL, ""),
    "server errors": (WELL | {(NEW, 500): 40}, "10 of 130 requests of acme to acme@v2 failed, 7.7%"),
    "bad requests on both sides": (WELL | {(NEW, 400): 25, (OLD, 400): 20}, ""),
    "one bad request": (WELL | {(NEW, 400): 1}, ""),
    "refused on this side only": (WELL | {(NEW, 400): 25}, "25 of 145 requests of acme to acme@v2 failed (25 refused"),
    "refused wholly, and nobody on the other side": ({(NEW, 500): 30, (NEW, 400): 20}, "20 of 80 requests"),
}


@pytest.mark.parametrize("story", STORIES)
def test_a_canary_is_judged_by_its_answers_and_by_those_beside_it(
    workspace: Workspace, two: tuple[list[str], list[Models]], story: str
) -> None:
    counts, why = STORIES[story]
    urls, models = two
    begin(workspace, urls)
    assert workspace.abort_failing(served=urls) == []
    models[0].metrics, models[1].metrics = counted(counts), counted(WELL)
    ended = workspace.abort_failing(served=urls)
    assert [report.release for report in ended] == ([OLD] if why else [])
    assert runs(workspace) is not bool(why)
    if why:
        assert reason(workspace).startswith(why)


@pytest.mark.parametrize("after", [None, 2000.0])
def test_an_engine_that_began_anew_ends_the_canary(
    workspace: Workspace, two: tuple[list[str], list[Models]], after: float | None
) -> None:
    """By its start, or, where it does not tell it, by counters that are lower."""
    urls, models = two
    models[1].metrics = counted({(NEW, 200): 5}, started_s=1000.0 if after else None)
    begin(workspace, urls)
    models[1].metrics = counted({(NEW, 200): 5}, started_s=1000.0 if after else None)
    assert workspace.abort_failing(served=urls) == []
    models[1].metrics = counted({(NEW, 200): 5} if after else {}, started_s=after)
    assert len(workspace.abort_failing(served=urls)) == 1
    assert reason(workspace) == f"{urls[1]} was started again since acme@v2 has a share of acme"


def test_an_engine_that_is_gone_ends_the_canary_and_keeps_nobody_from_it(
    workspace: Workspace, two: tuple[list[str], list[Models]]
) -> None:
    urls, _ = two
    begin(workspace, urls[:1])
    assert workspace.abort_failing(served=[urls[0], urls[1], NOBODY]) == [], "not there when it began"
    with pytest.raises(EngineError, match="cannot be reached"):
        workspace.abort_failing(served=[NOBODY])
    assert runs(workspace)
    manifest = workspace.layout.registry.manifest
    manifest.write_text(manifest.read_text().replace(urls[0], NOBODY))
    with pytest.raises(EngineError, match=r"acme@v2 cannot be promoted: http://127.0.0.1:9 does not answer"):
        canary_shown(workspace, [urls[1], NOBODY], canaries.promote)
    assert runs(workspace)
    (report,) = workspace.abort_failing(served=[urls[1], NOBODY])
    assert (report.release, report.replicas) == (OLD, 1)
    assert reason(workspace) == f"{NOBODY} does not answer since acme@v2 has a share of acme"


def canary_shown(workspace: Workspace, urls: list[str], act: Callable[..., object]) -> None:
    with workspace.writer("test") as ledger, pytest.MonkeyPatch.context() as patch:
        patch.setattr(canaries, "check_files", lambda *_: None)  # nothing was trained
        act(workspace.session, ledger, "acme", replicas=replicas_of(workspace.session, urls), progress=lambda _: None)


def test_serve_ends_a_canary_under_which_its_engine_died(
    workspace: Workspace, two: tuple[list[str], list[Models]]
) -> None:
    (url, other), _ = two
    begin(workspace, [url, other])
    manifest, rest = read_manifest(workspace.layout.registry.manifest), replicas_of(workspace.session, [other])
    assert canaries.failing(workspace.session, manifest, rest) == {}
    keeper = {"supervisor_pid": os.getpid(), "supervisor_started": process_start(os.getpid())}
    note = workspace.layout.engine
    write_record(note, {"pid": 0, "state": "restarting", "last_failure": "the engine ended with code 139", **keeper})
    found = canaries.failing(workspace.session, manifest, rest)
    assert found == {"acme": f"{url} does not answer since acme@v2 has a share of acme"}


def test_the_look_of_a_timer_retires_what_is_due(workspace: Workspace) -> None:
    path = workspace.layout.registry.manifest
    before = read_manifest(path)
    moved = with_alias(replace(before, aliases={}), "acme", NEW)
    write_manifest(
        path, with_move(moved, "acme", Move("published", NEW, moved.generation, "2026-01-01T00:00:00+00:00"))
    )
    assert aliases.due_to_retire(workspace.session) == [], "the policy retires nothing"
    set_policy(workspace.root / "policy.toml", {"serving__retire_after_s": "60"})
    workspace = Workspace(workspace.root)
    assert aliases.due_to_retire(workspace.session) == [OLD]
    assert workspace.abort_failing() == []
    assert {name: entry.state for name, entry in read_manifest(path).releases.items()} == {OLD: RETIRED, NEW: RELEASED}
    assert aliases.due_to_retire(workspace.session) == []


def test_what_was_seen_comes_back_from_its_text() -> None:
    seen = {"http://a": Seen(12.5, Answers(3, 2, 1), Answers(4)), "http://b": Seen()}
    assert parse_seen(seen_json(seen)) == seen
    shown = shown_since(
        seen, {"http://a": Seen(12.5, Answers(13, 2, 2), Answers(5)), "http://b": None, "http://c": Seen(1, Answers(7))}
    )
    assert (shown.canary, shown.beside) == (Answers(17, 0, 1), Answers(1))
    assert (shown.down, shown.restarted) == (("http://b",), ())
    found = count_answers(counted({(NEW, 200): 90, (NEW, 500): 5, (NEW, 404): 3, (NEW, 400): 2}).decode(), "acme", NEW)
    assert found == Answers(100, 8, 2)
