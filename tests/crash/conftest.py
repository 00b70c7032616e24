"""One workspace with a law and a release, made once and copied for each test; and what adding a second batch makes of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import killing
from killing import Stage
from support import write_facts_file


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("crash")
    with pytest.MonkeyPatch.context() as patch:
        # Before the fork server starts: one thread each, as the bits are compared and the cores are few.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            patch.setenv(name, "1")
        commands = killing.Commands(folder)
        model = killing.make_model(folder / "model")
        template = killing.make_workspace(folder / "template", model, commands)
        second = write_facts_file(folder / "second.jsonl", killing.SECOND)
        undisturbed = shutil.copytree(template, folder / "undisturbed")
        # A new interpreter, as a user starts it: what forked processes do is compared with that.
        done = killing.run_cold(undisturbed, "add", str(second))
        assert done.returncode == 0, done.stderr
        after = killing.content(undisturbed)
        began = time.monotonic()
        quick = commands.run(Path(shutil.copytree(template, folder / "timed")), "add", str(second))
        run_s = time.monotonic() - began
        assert quick.wait() == 0, quick.said
        yield Stage(commands, folder, model, template, second, killing.content(template), after, run_s)


@pytest.fixture
def copy(stage: Stage, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of the template."""

    def make() -> Path:
        return Path(shutil.copytree(stage.template, tmp_path / f"ws-{len(list(tmp_path.iterdir()))}"))

    return make
