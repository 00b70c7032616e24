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

ROUNDS = 6


@pytest.mark.parametrize(("number", "wanted"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_at_random_moments(stage: Stage, copy: Callable[[], Path], number: signal.Signals, wanted: int) -> None:
    chance, root, codes = random.Random(int(number)), copy(), []
    for _ in range(ROUNDS):
        begun = killing.state_of(root, 2) is not None
        command = stage.commands.start(root, *(["resume"] if begun else ["add", str(stage.second)]))
        # The holder of the lock is past the first lines of Python, which nobody can catch an interrupt in.
        command.wait_until(lambda command=command: str(command.pid) in (root / "memupdate.lock").read_text("utf-8"))
        time.sleep(chance.uniform(0, stage.run_s))
        command.send(number)
        codes.append(command.wait())
        assert codes[-1] in (0, wanted), command.said
        if codes[-1] == wanted:
            assert "memupdate resume" in command.said
            assert "Traceback" not in command.said
            assert killing.leftovers(root) == []
    assert wanted in codes
    begun = killing.state_of(root, 2) is not None
    done = stage.commands.run(root, *(["resume"] if begun else ["add", str(stage.second)]))
    assert done.wait() == 0, done.said
    assert killing.differences(killing.content(root), stage.after) == []
