"""The serving study judges answers as it says, and its clients take replicas in turn."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import pytest
from benchmarks.serving.alone import middleware_us
from benchmarks.serving.cost import OURS, PAST, ratios
from benchmarks.serving.load import Answer, Question, SteadyLoad, ask_all, ask_at
from benchmarks.serving.stage import engine_processor_s, memory_mb, processor_s
from benchmarks.serving.verdict import Flip, References, allowed, is_mixed, judge, take_references

from answering import engine
from memupdate.layout import RegistryLayout
from memupdate.serving.manifest import Manifest, ReleaseEntry, with_alias, with_release, write_manifest

OLD, NEW = "acme@v1", "acme@v2"
ASKED = Question("Who leads Acme?", chat=True, stream=False, max_tokens=8)
ALONE = References({(OLD, ASKED.key): "Wanda", (NEW, ASKED.key): "Iris"})
FLIPS = [Flip(OLD, 0, 1), Flip(NEW, 10, 12), Flip(OLD, 20, 22)]
GOOD = Answer(ASKED, "http://a", 13, 14, 200, "Iris", (NEW,), "stop")


def test_a_right_answer_is_what_its_one_release_gives_alone() -> None:
    assert not is_mixed(GOOD, ALONE)
    assert not is_mixed(replace(GOOD, question=replace(ASKED, stream=True)), ALONE), "streamed or not is all the same"
    assert is_mixed(replace(GOOD, text="Iris "), ALONE)
    assert is_mixed(replace(GOOD, text="Wanda"), ALONE)
    assert is_mixed(replace(GOOD, models=(NEW, OLD)), ALONE)
    assert is_mixed(replace(GOOD, models=()), ALONE)


@pytest.mark.parametrize(
    ("begun", "ended", "wanted"),
    [
        (2, 3, {OLD}),
        (9, 10, {OLD}),
        (9, 11, {OLD, NEW}),
        (11, 11.5, {OLD, NEW}),
        (11, 13, {OLD, NEW}),
        (12, 13, {NEW}),
        (12.5, 25, {NEW, OLD}),
        (30, 31, {OLD}),
    ],
)
def test_who_may_answer_when(begun: float, ended: float, wanted: set[str]) -> None:
    assert allowed(replace(GOOD, begun_s=begun, ended_s=ended), FLIPS) == wanted


def test_what_is_counted() -> None:
    answers = [
        GOOD,
        replace(GOOD, text="Wanda", models=(OLD,)),
        replace(GOOD, status=500),
        replace(GOOD, finish=None),
        replace(GOOD, error="ServerDisconnectedError"),
        replace(GOOD, text="Wander", begun_s=11),
    ]
    assert judge(answers, FLIPS, ALONE) == {
        "requests": 6,
        "failed_requests": 3,
        "mixed_responses": 1,
        "answered_by_old_release": 1,
        "streamed": 0,
        "chat": 3,
        "during_a_flip": 1,
    }


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    digest = "sha256:" + "0" * 64
    manifest = Manifest(digest)
    for number, name in enumerate((OLD, NEW), start=1):
        manifest = with_release(manifest, name, ReleaseEntry(digest, digest, 8, number, digest))
    write_manifest(RegistryLayout(tmp_path).manifest, with_alias(manifest, "acme", OLD))
    return tmp_path


def test_clients_take_replicas_in_turn_and_skip_one_that_is_gone(registry: Path) -> None:
    asked = replace(ASKED, chat=False)
    with engine(registry) as (one, _), engine(registry) as (other, models):
        references = take_references(one, [asked], (OLD, NEW))
        with SteadyLoad([one, other], [asked], 80) as load:
            time.sleep(0.5)
            models.broken.add(OLD)
            time.sleep(0.3)
    urls = {answer.url for answer in load.answers}
    failed = [answer for answer in load.answers if answer.failed]
    assert urls == {one, other}
    assert {(answer.url, answer.status) for answer in failed} == {(other, 500)}
    assert judge(load.answers, [Flip(OLD, 0, 0)], references)["failed_requests"] == len(failed)
    assert all(answer.models == (OLD,) for answer in load.answers if not answer.failed)

    with engine(registry) as (one, _):
        with SteadyLoad([one, other], [asked], 80) as load:  # nobody listens at `other` any more
            time.sleep(0.4)
        assert load.skipped > 0
        assert [answer.error for answer in load.answers if answer.failed] == []
        with SteadyLoad([one], [asked], 80) as load:
            time.sleep(0.3)
            with load.paused():
                time.sleep(0.2)
                before = len(load.answers)
                time.sleep(0.3)
                assert len(load.answers) == before > 0
            time.sleep(0.3)
        assert len(load.answers) > before
        answers, seconds = ask_all(one, [asked] * 20, at_once=4)
        assert (len(answers), seconds > 0) == (20, True)
        begun = [answer.begun_s for answer in ask_at(one, [asked] * 20, 100, seed=1)]
        assert begun == sorted(begun)
        assert 0.05 < begun[-1] - begun[0] < 1


def test_the_cost_is_taken_round_by_round_and_says_how_sure_it_is() -> None:
    dice = random.Random(3)
    busy, timed = [], []
    for _ in range(40):  # a machine that is now fast, now slow, and a cost of 1 %
        pace, costs = dice.uniform(1, 3), {OURS: 1.01, PAST: 1.0}
        keys = ("wall_s", "engine_s", "api_server_s")
        busy.append(
            {w: [dict.fromkeys(keys, pace * c * dice.gauss(1, 0.005)) for _ in range(2)] for w, c in costs.items()}
        )
        timed.append({w: [[c * dice.uniform(1, 2) for _ in range(50)] for _ in range(2)] for w, c in costs.items()})
    found = ratios(busy, timed)
    for name, wanted in (("throughput", 1 / 1.01), ("cpu_per_request", 1.01), ("p50", 1.01), ("p99", 1.01)):
        low, ratio, high = (found[f"{name}_ratio{end}"] for end in ("_low", "", "_high"))
        assert low < ratio < high
        assert low <= wanted <= high
    assert found["cpu_per_request_ratio_high"] - found["cpu_per_request_ratio_low"] < 0.01


def test_processor_time_of_a_session_grows_with_its_work() -> None:
    command = [sys.executable, "-c", "sum(range(30_000_000)); print(flush=True); input()"]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        used = engine_processor_s(process.pid)
        assert used == processor_s(process.pid) > 0.1
        assert memory_mb(process.pid) > 1
        process.communicate(b"\n")


def test_what_the_middleware_takes_by_itself(registry: Path) -> None:
    asked = [replace(ASKED, stream=stream) for stream in (False, True)]
    assert 1 < middleware_us(registry, "base", asked) < 5000
