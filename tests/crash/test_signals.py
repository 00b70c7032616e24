"""Ctrl-C and SIGTERM at random moments: exit 130 and 143, no traceback, nothing temporary left, and `resume` goes on."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import killing
from killing import Stage

MOMENTS = ("nothing", "received", "planned", "trained", "verified", "released")


@pytest.mark.parametrize(("number", "wanted"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_at_any_moment(stage: Stage, copy: Callable[[], Path], number: signal.Signals, wanted: int) -> None:
    """A little after each state is reached; what one process leaves the next goes on with."""
    chance, root, codes = random.Random(int(number)), copy(), []
    for moment in MOMENTS[:-1]:
        command = stage.commands.start(root, *go_on(stage, root))
        command.wait_until(lambda command=command: killing.holder_of(root) == command.pid)
        command.wait_until(lambda moment=moment: MOMENTS.index(reached(root)) >= MOMENTS.index(moment))
        time.sleep(chance.uniform(0, 0.05 * stage.run_s))
        command.send(number)
        codes.append(command.wait())
        assert codes[-1] in (0, wanted), command.said
        if codes[-1] == wanted:
            assert "memupdate resume" in command.said
            assert "Traceback" not in command.said
            assert killing.leftovers(root) == []
    assert codes.count(wanted) >= 2
    done = stage.commands.run(root, *go_on(stage, root))
    assert done.wait() == 0, done.said
    assert killing.differences(killing.content(root), stage.after) == []


def reached(root: Path) -> str:
    return killing.state_of(root, 2) or "nothing"


def go_on(stage: Stage, root: Path) -> tuple[str, ...]:
    """What an operator types next."""
    return ("add", str(stage.second)) if killing.state_of(root, 2) is None else ("resume",)
