"""How much room `serve` makes for releases: the smallest that fits what the ledger holds and one step more, with the reasons."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from memupdate import Workspace
from memupdate.ledger.ledger import Ledger
from memupdate.operations.serving import engine_limits
from memupdate.serving.compat import engine_installed

ROOT = Path(__file__).resolve().parents[2]


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


def several_gpus() -> list[str]:
    """The values of `extra_args` that docs/serving.md shows for several GPUs, as TOML."""
    section = (ROOT / "docs" / "serving.md").read_text("utf-8").partition("## Several GPUs")[2].partition("\n## ")[0]
    return re.findall(r"^(?:# )?extra_args = (\[.*?\])", section, flags=re.MULTILINE)


def test_the_policy_hands_engines_over_several_gpus_to_vllm(make_workspace: Callable[..., Workspace]) -> None:
    shown = several_gpus()
    assert [("ray" in value, "--tensor-parallel-size" in value) for value in shown] == [(False, True), (True, True)]
    for number, value in enumerate(shown):
        workspace = make_workspace(f"acme-{number}", serving__extra_args=value)
        command = workspace.serve(print_command=True)
        assert shlex.split(command)[-len(tomllib.loads(f"a = {value}")["a"]) :] == tomllib.loads(f"a = {value}")["a"]


@pytest.mark.slow
@pytest.mark.skipif(engine_installed() is None, reason="vLLM is not installed")
def test_vllm_takes_them() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    taken = [
        make_arg_parser(FlexibleArgumentParser()).parse_args(tomllib.loads(f"a = {v}")["a"]) for v in several_gpus()
    ]
    assert [t.tensor_parallel_size for t in taken] == [2, 8]
    assert [t.distributed_executor_backend for t in taken] == [None, "ray"]
