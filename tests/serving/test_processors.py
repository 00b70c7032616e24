"""Replicas of a machine compute on cores of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memupdate.serving.processors import cores, shares


@given(st.sets(st.integers(0, 500), min_size=1, max_size=64), st.integers(1, 9))
def test_no_core_is_shared_and_every_engine_has_one_where_there_are_enough(found: set[int], engines: int) -> None:
    parts = shares(sorted(found), engines)
    assert len(parts) == engines
    used = [number for part in parts for number in part]
    assert len(used) == len(set(used))
    assert set(used) <= found
    assert all(parts) == (1 < engines <= len(found))
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1


def test_a_share_of_several_leaves_one_for_the_api_server() -> None:
    assert shares([0, 1], 2) == [(0,), (1,)]
    assert shares(list(range(8)), 2) == [(1, 2, 3), (5, 6, 7)]
    assert shares([0, 1, 2, 3], 1) == [()], "vLLM chooses for an engine that is alone"


def test_one_processor_of_each_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 6, 9}, raising=False)
    for number, siblings in {0: "0,4", 4: "0,4", 1: "1-2", 2: "1-2", 3: "3,7", 6: "odd"}.items():
        folder = tmp_path / f"cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert cores(tmp_path) == [2, 3, 4, 6, 9], "the last of its siblings that may be used; by itself where nobody knows"
