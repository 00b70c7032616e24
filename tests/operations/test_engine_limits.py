"""How much room `serve` makes for releases: the smallest that fits what the ledger holds and one step more, with the reasons."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from memupdate import Workspace
from memupdate.ledger.ledger import Ledger
from memupdate.operations.serving import engine_limits


class Holding:
    """A ledger's releases, as (collection, rank)."""

    def __init__(self, *releases: tuple[str, int]) -> None:
        self._releases = [SimpleNamespace(collection=name, rank=rank) for name, rank in releases]

    def releases(self, *, failed: bool) -> list[Any]:
        assert not failed
        return self._releases


@pytest.mark.parametrize(
    ("releases", "expected"),
    [
        ([], (3, 4, 16)),
        ([("a", 8), ("a", 16)], (3, 4, 32)),
        ([("a", 16), ("b", 12)], (4, 8, 32)),
        ([("a", 20), ("b", 8), ("c", 8)], (4, 12, 64)),
        ([("a", 400)], (3, 4, 512)),
    ],
)
def test_slots_fit_what_there_is(
    releases: list[tuple[str, int]], expected: tuple[int, int, int], make_workspace: Callable[..., Workspace]
) -> None:
    workspace = make_workspace(memory__min_rank="8", serving__max_loras="4")
    limits = engine_limits(workspace.session, cast(Ledger, Holding(*releases)))
    assert (limits.max_loras, limits.max_cpu_loras, limits.max_lora_rank) == expected
    for line, name, value in zip(
        limits.lines, ("max_lora_rank", "max_loras", "max_cpu_loras"), (expected[2], *expected[:2]), strict=True
    ):
        assert line.startswith(f"{name} {value}: ")
