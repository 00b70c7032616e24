"""A disk that hangs holds up no event loop; while it answers, nobody is told what was true before he asked."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from memupdate.serving import background
from memupdate.serving.background import SharedLook, call_aside, may_hang, settled


def test_every_request_gets_a_look_that_began_after_it_and_many_share_one() -> None:
    truth, looked, looks = 0, 0, 0

    def look() -> None:
        nonlocal looked, looks
        seen = truth
        time.sleep(0.001)
        looked, looks = seen, looks + 1

    async def ask(shared: SharedLook) -> None:
        nonlocal truth
        truth += 1
        mine = truth
        await shared.fresh()
        assert looked >= mine

    async def run() -> None:
        shared = SharedLook(look, is_aside=True)
        for _ in range(20):
            await asyncio.gather(*(ask(shared) for _ in range(25)))

    asyncio.run(run())
    assert looks <= 60, "not one for each of 500"


def test_a_look_that_hangs_holds_up_the_first_for_a_while_and_the_others_not_at_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers, looks = threading.Event(), 0

    def look() -> None:
        nonlocal looks
        answers.wait()
        looks += 1

    async def run() -> None:
        shared = SharedLook(look, is_aside=True, wait_s=0.2)
        begun = time.monotonic()
        await asyncio.gather(shared.fresh(), shared.fresh(), shared.fresh())
        assert 0.15 < time.monotonic() - begun < 5
        begun = time.monotonic()
        for _ in range(1000):
            await shared.fresh()
        assert time.monotonic() - begun < 5, "not 0.2 s each"
        assert len(caplog.records) == 1, "said once"
        answers.set()
        while looks == 0:
            await asyncio.sleep(0.01)
        before = looks
        await shared.fresh()
        assert looks > before

    asyncio.run(run())
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


@pytest.mark.parametrize("is_aside", [False, True])
def test_a_look_that_fails_is_not_the_end(is_aside: bool) -> None:
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        raise RuntimeError("unexpected")

    shared = SharedLook(look, is_aside=is_aside)
    for expected in (1, 2, 3):
        asyncio.run(asyncio.wait_for(shared.fresh(), 5))  # a new event loop each time
        assert looks == expected


def test_its_thread_ends_with_it() -> None:
    shared = SharedLook(lambda: None, is_aside=True)
    asyncio.run(shared.fresh())
    thread = shared._thread
    assert thread is not None
    assert thread.daemon
    del shared
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_call_aside_is_waited_for_within_bounds_and_survives_who_leaves() -> None:
    goes_on = threading.Event()

    def call() -> int:
        goes_on.wait()
        return 7

    async def run() -> None:
        future = call_aside(call)
        assert not await settled(future, 0.02)
        assert not await settled(future, -1)
        leaving = asyncio.create_task(settled(future, None))
        await asyncio.sleep(0.02)
        leaving.cancel()
        goes_on.set()
        assert await settled(future, 5)
        assert future.result() == 7
        failed = call_aside(lambda: 1 // 0)
        assert await settled(failed, 5)
        assert isinstance(failed.exception(), ZeroDivisionError)

    asyncio.run(run())


def test_a_thread_that_is_not_run_is_waited_for_longer_than_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an overloaded machine: nothing says that the disk is away, so the request waits for what is true now."""
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1

    serve = background._serve

    def later(shared: Any) -> None:
        time.sleep(0.25)
        serve(shared)

    monkeypatch.setattr(background, "_serve", later)
    asyncio.run(SharedLook(look, is_aside=True, wait_s=0.1).fresh())
    assert looks == 1


def test_which_disks_may_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    link = tmp_path / "link"
    link.symlink_to("/mnt/a share/registry")
    mounts.write_text(
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "30 27 0:40 / /mnt rw shared:1 master:2 - tmpfs tmpfs rw\n"
        "31 30 0:41 / /mnt/a\\040share rw,relatime shared:7 - nfs4 filer:/x rw,vers=4.2,hard\n"
        "32 27 0:42 / /over rw - xfs /dev/vdb rw\n"
        "33 27 0:43 / /over rw - fuse.sshfs host:/ rw\n"
        "nonsense\n"
    )
    monkeypatch.setattr(background, "_MOUNTS", mounts)
    for path, expected in {
        "/srv/registry/manifest.json": False,
        "/mnt/registry": False,
        "/mnt/a share/registry/manifest.json": True,
        "/mnt/a shared": False,
        "/over/x": True,
        "/overt": False,
        str(link / "manifest.json"): True,
    }.items():
        assert may_hang(Path(path)) == expected, path
    assert may_hang(Path("/mnt"), Path("/over"))
    monkeypatch.setattr(background, "_MOUNTS", tmp_path / "no such file")
    assert may_hang(Path("/srv")), "nobody can tell"
