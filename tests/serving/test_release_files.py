"""A release whose files change after it was loaded: refused by the middleware, and let through again when they are whole."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from middleware_fixtures import CHAT, Echo, call
from prometheus_client import REGISTRY
from serving_fixtures import BASE, add_release

from memupdate.layout import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, RegistryLayout
from memupdate.serving import release_files
from memupdate.serving.manifest import Manifest, with_alias, write_manifest
from memupdate.serving.middleware import AliasMiddleware
from memupdate.storage import file_sha256


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RegistryLayout:
    monkeypatch.setattr(release_files, "_LOOK_S", 0.0)
    manifest = Manifest(BASE)
    for number in (1, 2):
        manifest = add_release(tmp_path, manifest, f"acme@v{number}", seed=number)
    layout = RegistryLayout(tmp_path)
    write_manifest(layout.manifest, with_alias(manifest, "acme", "acme@v1"))
    return layout


def statuses(app: AliasMiddleware, *models: str) -> list[int]:
    return [call(app, "POST", CHAT, json={"model": model}).status_code for model in models]


def answers_of_release(status: str) -> float:
    labels = {"alias": "acme", "release": "acme@v1", "status": status}
    return REGISTRY.get_sample_value("memupdate_requests_total", labels) or 0.0


@pytest.mark.parametrize("file", [ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE])
def test_altered_missing_and_restored(layout: RegistryLayout, file: str) -> None:
    app = AliasMiddleware(Echo(), registry=layout.root)
    everything = ("acme", "acme@v1", "acme@v2")
    path = layout.release("acme@v1") / file
    whole = path.read_bytes()
    assert statuses(app, *everything) == [200, 200, 200]
    os.utime(path)
    assert statuses(app, *everything) == [200, 200, 200], "touched, but the same"

    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    counted = answers_of_release("404")
    for _ in range(2):
        assert statuses(app, *everything) == [404, 404, 200]
    assert answers_of_release("404") == counted + 2, "what ends a canary"
    path.unlink()
    assert statuses(app, *everything) == [404, 404, 200]
    answer = call(app, "POST", CHAT, json={"model": "acme"}).json()["error"]
    assert (answer["code"], answer["message"]) == (404, "the release acme@v1 is damaged")
    path.write_bytes(whole)
    assert statuses(app, *everything) == [200, 200, 200]


def test_a_registry_that_is_not_there_any_more_changes_nothing(layout: RegistryLayout) -> None:
    """As on a network file system that is away: what is in the engine's memory goes on being served."""
    app = AliasMiddleware(Echo(), registry=layout.root)
    assert statuses(app, "acme") == [200]
    away = layout.root.with_name("away")
    shutil.move(layout.root, away)
    assert statuses(app, "acme", "acme@v1") == [200, 200]
    shutil.move(away, layout.root)
    assert statuses(app, "acme") == [200]


def test_a_release_that_was_never_whole_is_left_to_the_resolver(layout: RegistryLayout) -> None:
    shutil.rmtree(layout.release("acme@v2"))
    app = AliasMiddleware(Echo(), registry=layout.root)
    assert statuses(app, "acme@v2", "acme@v9") == [200, 200], "Echo answers to everything"
    assert app._files is not None
    assert app._files._seen == {}


def test_looking_is_rare(layout: RegistryLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_files, "_LOOK_S", 60.0)
    app = AliasMiddleware(Echo(), registry=layout.root)
    assert statuses(app, "acme") == [200]
    (layout.release("acme@v1") / ADAPTER_WEIGHTS_FILE).unlink()
    assert statuses(app, "acme") == [200]


def test_a_disk_that_hangs_changes_nothing_and_stops_nobody(
    layout: RegistryLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_files, "WAIT_S", 0.2)
    monkeypatch.setattr(release_files, "may_hang", lambda _: True)
    app = AliasMiddleware(Echo(), registry=layout.root)
    assert statuses(app, "acme", "acme@v2") == [200, 200]
    answers, stat = threading.Event(), os.stat

    def hangs(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(ADAPTER_WEIGHTS_FILE):
            answers.wait()
        return stat(path, **options)

    weights = layout.release("acme@v2") / ADAPTER_WEIGHTS_FILE
    weights.write_bytes(b"altered")
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", hangs)
        begun = time.monotonic()
        assert statuses(app, *["acme", "acme@v1", "acme@v2"] * 20) == [200] * 60
        assert time.monotonic() - begun < 5
        answers.set()
    assert app._files is not None
    while not all(look.done() for look, _ in app._files._looks.values()):
        time.sleep(0.01)
    assert statuses(app, "acme", "acme@v2") == [200, 404]


def test_a_release_is_not_let_through_while_its_digests_are_computed(
    layout: RegistryLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_files, "WAIT_S", 0.05)
    app = AliasMiddleware(Echo(), registry=layout.root)
    assert statuses(app, "acme") == [200]
    (layout.release("acme@v1") / ADAPTER_WEIGHTS_FILE).write_bytes(b"altered")

    def slowly(path: Path) -> str:
        time.sleep(0.3)
        return file_sha256(path)

    monkeypatch.setattr(release_files, "file_sha256", slowly)
    assert statuses(app, "acme") == [404]


def test_a_disk_that_fails_while_a_release_is_read_does_not_refuse_it_for_ever(
    layout: RegistryLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = AliasMiddleware(Echo(), registry=layout.root)
    assert statuses(app, "acme") == [200]
    os.utime(layout.release("acme@v1") / ADAPTER_WEIGHTS_FILE)

    def fails(_path: Path) -> str:
        raise OSError(errno.EIO, "for a moment")

    with monkeypatch.context() as patched:
        patched.setattr(release_files, "file_sha256", fails)
        assert statuses(app, "acme", "acme@v2") == [404, 200]
    assert statuses(app, "acme") == [200]
