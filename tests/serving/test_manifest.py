"""The manifest: pure moves, strict reading, and a cache that survives whatever state the file is in."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memupdate.serving import manifest as module
from memupdate.serving.manifest import (
    MATCHED,
    RETIRED,
    AliasEntry,
    Canary,
    Manifest,
    ManifestError,
    Move,
    ReleaseEntry,
    manifest_cache,
    manifest_json,
    parse_manifest,
    read_manifest,
    with_alias,
    with_canary,
    with_entry,
    with_move,
    with_release,
    with_retired,
    with_revived,
    write_manifest,
)

BASE = "sha256:" + "b" * 64


def entry(number: int) -> ReleaseEntry:
    return ReleaseEntry("sha256:" + f"{number:064x}", "sha256:" + "c" * 64, 16, number, BASE)


def example() -> Manifest:
    manifest = with_release(with_release(Manifest(BASE), "acme@v1", entry(1)), "acme@v2", entry(2))
    return with_alias(manifest, "acme", "acme@v1")


def test_moves_are_pure_and_counted() -> None:
    before = example()
    after = with_alias(before, "acme", "acme@v2")
    assert before.aliases["acme"].release == "acme@v1"
    assert (after.aliases["acme"].release, after.aliases["acme"].previous) == ("acme@v2", "acme@v1")
    assert after.generation == before.generation + 1 == 4
    back = with_alias(after, "acme", "acme@v1")
    assert (back.aliases["acme"].release, back.aliases["acme"].previous) == ("acme@v1", "acme@v2")
    assert with_alias(after, "acme", "acme@v2") is after
    assert with_release(after, "acme@v1", entry(1)) is after
    assert after.next_lora_int_id() == 3


def test_what_would_break_the_manifest_is_refused() -> None:
    manifest = example()
    with pytest.raises(ValueError, match="other content"):
        with_release(manifest, "acme@v1", entry(9))
    with pytest.raises(ValueError, match="share lora_int_id 2"):
        with_release(manifest, "acme@v3", entry(2))
    with pytest.raises(ValueError, match="not a release name"):
        with_release(manifest, "../acme@v3", entry(3))
    with pytest.raises(ValueError, match="not a digest"):
        with_release(manifest, "acme@v3", replace(entry(3), digest="sha256:1"))
    with pytest.raises(ValueError, match="not in the manifest"):
        with_alias(manifest, "acme", "acme@v9")
    with pytest.raises(ValueError, match="not an alias"):
        with_alias(manifest, "Acme/..", "acme@v1")
    with pytest.raises(ValueError, match="points at acme@v1, which is retired"):
        with_retired(manifest, "acme@v1")
    retired = with_retired(manifest, "acme@v2")
    assert retired.releases["acme@v2"].state == RETIRED
    with pytest.raises(ValueError, match="retired"):
        with_alias(retired, "acme", "acme@v2")
    assert retired.next_lora_int_id() == 3


def test_the_file_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "registry" / "manifest.json"
    write_manifest(path, example())
    assert read_manifest(path) == example()
    value = json.loads(path.read_text())
    assert value["aliases"]["acme"] == {"release": "acme@v1", "previous": None, "canary": None, "route": "always"}
    assert value["schema_version"] == 2
    assert set(value["releases"]["acme@v1"]) == {
        "digest",
        "config_digest",
        "rank",
        "lora_int_id",
        "base_fingerprint",
        "state",
        "matcher_digest",
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 3}, "schema_version is 3"),
        ({"schema_version": True}, "schema_version is True"),
        ({"generation": -1}, "generation"),
        ({"aliases": []}, "aliases: expected an object"),
        ({"aliases": {"acme": {"release": "acme@v7"}}}, "not in the manifest"),
        ({"aliases": {"acme": {"release": "acme@v1", "canary": {"share": 0.1}}}}, "canary: release must be text"),
        ({"aliases": {"acme": {"release": "acme@v1", "canary": {"release": "acme@v2", "share": True}}}}, "a number"),
        ({"aliases": {"acme": {"release": "acme@v1", "canary": {"release": "acme@v2", "share": 1}}}}, "share is 1"),
        ({"aliases": {"acme": {"release": "acme@v1", "canary": {"release": "acme@v1", "share": 0.5}}}}, "already"),
        ({"aliases": {"acme": {"release": "acme@v1", "canary": {"release": "acme@v9", "share": 0.5}}}}, "not in the"),
        ({"aliases": {"acme": {"release": "acme@v1", "route": "sometimes"}}}, "none of always, matched"),
        ({"moves": {"acme": {"kind": "published"}}}, "moves.acme.detail: expected an object"),
        ({"releases": {"acme@v1": {"digest": "sha256:0"}}}, "config_digest"),
    ],
)
def test_a_foreign_or_inconsistent_file_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(manifest_json(example())), **change}))
    with pytest.raises(ManifestError, match=reason):
        read_manifest(path)


def test_a_canary_begins_and_ends_by_promotion_abort_or_any_move() -> None:
    manifest = with_canary(example(), "acme", Canary("acme@v2", 0.1))
    assert manifest.aliases["acme"] == AliasEntry("acme@v1", None, Canary("acme@v2", 0.1))
    assert parse_manifest(manifest_json(manifest)) == manifest
    assert with_alias(manifest, "acme", "acme@v2").aliases["acme"] == AliasEntry("acme@v2", "acme@v1")
    assert with_alias(manifest, "acme", "acme@v1").aliases["acme"] == AliasEntry("acme@v1")
    assert with_canary(manifest, "acme", None).aliases["acme"] == AliasEntry("acme@v1")
    with pytest.raises(ValueError, match="canary of acme points at acme@v2, which is retired"):
        with_retired(manifest, "acme@v2")
    with pytest.raises(ValueError, match="share is nan"):
        with_canary(manifest, "acme", Canary("acme@v2", float("nan")))
    with pytest.raises(ValueError, match="nobody is not in the manifest"):
        with_canary(manifest, "nobody", None)


def test_the_route_stays_until_it_is_changed() -> None:
    matched = with_alias(example(), "acme", "acme@v1", route=MATCHED)
    assert matched.aliases["acme"] == AliasEntry("acme@v1", route=MATCHED)
    moved = with_alias(matched, "acme", "acme@v2")
    assert moved.aliases["acme"] == AliasEntry("acme@v2", "acme@v1", route=MATCHED)
    assert parse_manifest(manifest_json(moved)) == moved


def test_a_manifest_of_version_1_is_read() -> None:
    value = json.loads(manifest_json(example()))
    value["schema_version"] = 1
    del value["aliases"]["acme"]["route"]
    for release in value["releases"].values():
        del release["matcher_digest"]
    assert parse_manifest(json.dumps(value)) == example()


def test_the_cache_parses_a_file_once(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, example())
    cache = manifest_cache(path)
    with patch.object(module, "parse_manifest", wraps=parse_manifest) as parse:
        first = cache.get()
        assert first is not None
        assert all(cache.get() is first for _ in range(50))
        assert parse.call_count == 1
        write_manifest(path, with_alias(example(), "acme", "acme@v2"))
        moved = cache.get()
        assert moved is not None
        assert moved.aliases["acme"].release == "acme@v2"
        path.write_text("{")
        assert all(cache.get() is moved for _ in range(50))
        assert parse.call_count == 3


def test_the_cache_survives_a_missing_file_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "manifest.json"
    cache = manifest_cache(path)
    with caplog.at_level(logging.WARNING):
        assert cache.get() is None
        assert cache.get() is None
    assert len(caplog.records) == 1
    write_manifest(path, example())
    assert cache.get() == example()
    kept = path.read_bytes()
    path.unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert cache.get() == cache.get() == example()
    assert len(caplog.records) == 1
    path.write_bytes(kept)
    assert cache.get() == example()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE, errno.EIO, errno.ENOENT])
def test_a_disk_that_fails_for_a_moment_does_not_hide_a_flip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, example())
    cache = manifest_cache(path)
    assert cache.get() == example()
    flipped = with_alias(example(), "acme", "acme@v2")
    write_manifest(path, flipped)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        broken.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(number, "for a moment")))
        assert all(cache.get() == cache.last == example() for _ in range(5))
    assert len(caplog.records) == 1, "once per state, not per request"
    assert cache.get() == cache.last == flipped
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        broken.setattr(os, "stat", lambda *_: (_ for _ in ()).throw(OSError(number, "again")))
        assert all(cache.get() == flipped for _ in range(5))
    assert len(caplog.records) == 2
    write_manifest(path, example())
    assert cache.get() == example()


def test_a_manifest_cut_off_at_every_byte_leaves_the_last_good_one(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    good = example()
    write_manifest(path, good)
    cache = manifest_cache(path)
    assert cache.get() == good
    whole = manifest_json(with_alias(good, "acme", "acme@v2")).encode()
    for length in range(len(whole) - 1):  # The last byte is a newline, without which the document is whole.
        path.write_bytes(whole[:length])
        assert cache.get() == good, length
    path.write_bytes(whole)
    found = cache.get()
    assert found is not None
    assert found.aliases["acme"].release == "acme@v2"


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_manifest_never_gives_anything_inconsistent(data: st.DataObject) -> None:
    whole = bytearray(manifest_json(example()).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not whole:
            break
    try:
        found = parse_manifest(bytes(whole))
    except ValueError:
        return
    assert all(alias.release in found.releases for alias in found.aliases.values())
    assert parse_manifest(manifest_json(found)) == found


@settings(max_examples=60)
@given(targets=st.lists(st.sampled_from(["acme@v1", "acme@v2", "acme@v3"]), max_size=12))
def test_rollback_always_goes_to_where_the_alias_was(targets: list[str]) -> None:
    manifest = with_release(example(), "acme@v3", entry(3))
    history = ["acme@v1"]
    for target in targets:
        manifest = with_alias(manifest, "acme", target)
        if history[-1] != target:
            history.append(target)
    alias = manifest.aliases["acme"]
    assert alias.release == history[-1]
    assert alias.previous == (history[-2] if len(history) > 1 else None)


def test_nothing_is_written_when_the_manifest_is_inconsistent(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(ValueError, match="base_fingerprint"):
        write_manifest(path, Manifest(""))
    assert os.listdir(tmp_path) == []


def test_the_last_step_of_an_alias_travels_with_the_manifest() -> None:
    after = with_alias(example(), "acme", "acme@v2")
    named = with_move(after, "acme", Move("published", "acme@v2", after.generation, "now", {"share": 0.1, "why": None}))
    assert named.generation == after.generation
    assert parse_manifest(manifest_json(named)) == named
    back = with_entry(named, "acme", example().aliases["acme"])
    assert (back.generation, dict(back.aliases), dict(back.moves)) == (
        after.generation + 1,
        dict(example().aliases),
        dict(named.moves),
    )
    assert dict(with_entry(named, "acme", None).aliases) == {}
    with pytest.raises(ValueError, match="why must be text or a number"):
        parse_manifest(manifest_json(named).replace('"why": null', '"why": NaN'))


def test_a_retired_release_can_be_revived() -> None:
    retired = with_retired(example(), "acme@v2")
    assert with_revived(retired, "acme@v2").releases == example().releases
    assert with_revived(example(), "acme@v1") == example()
    with pytest.raises(ValueError, match="not in the manifest"):
        with_revived(retired, "acme@v9")


NAMES = ("acme@v1", "acme@v2", "acme@v3")


@settings(max_examples=120)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["move", "canary", "end", "retire", "revive"]), st.sampled_from(NAMES)), max_size=16
    )
)
def test_any_row_of_steps_keeps_what_clients_are_answered_from(steps: list[tuple[str, str]]) -> None:
    """Whatever is refused changes nothing; what is done is readable, counted, and never leaves an alias without a release."""
    manifest = with_release(example(), "acme@v3", entry(3))
    do = {
        "move": lambda m, name: with_alias(m, "acme", name),
        "canary": lambda m, name: with_canary(m, "acme", Canary(name, 0.25)),
        "end": lambda m, _name: with_canary(m, "acme", None),
        "retire": with_retired,
        "revive": with_revived,
    }
    for what, name in steps:
        try:
            after = do[what](manifest, name)
        except ValueError:
            continue
        assert after is manifest or after.generation == manifest.generation + 1
        manifest = after
        alias = manifest.aliases["acme"]
        named = {alias.release} | ({alias.canary.release} if alias.canary else set())
        assert all(manifest.releases[name].state != RETIRED for name in named)
        assert parse_manifest(manifest_json(manifest)) == manifest


def test_many_readers_never_see_half_of_what_one_writer_writes(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, example())
    done, seen = threading.Event(), set()

    def read() -> int:
        cache, last = manifest_cache(path), 0
        while not done.is_set():
            found = cache.get()
            assert found is not None
            assert found.generation >= last, "time goes forward"
            last = found.generation
            assert found.aliases["acme"].release == f"acme@v{2 - found.generation % 2}"
            seen.add(last)
        return last

    with ThreadPoolExecutor(max_workers=6) as pool:
        readers = [pool.submit(read) for _ in range(6)]
        manifest = example()
        for _ in range(120):
            target = "acme@v2" if manifest.aliases["acme"].release == "acme@v1" else "acme@v1"
            manifest = with_alias(manifest, "acme", target)
            write_manifest(path, manifest)
        done.set()
        assert all(reader.result() <= manifest.generation for reader in readers)
    assert len(seen) > 1
