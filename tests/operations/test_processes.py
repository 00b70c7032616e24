"""Worker processes: answers, our errors as themselves, a death told, nothing left running; also from a script without a main guard."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memupdate.errors import MemupdateError, TrainingError
from memupdate.operations.processes import processes
from memupdate.policies import load_policy


def test_answers_come_from_other_processes_with_their_threads():
    with processes(2, threads=3) as executor:
        pids = {future.result() for future in [executor.submit(os.getpid) for _ in range(6)]}
        assert executor.submit(os.getenv, "OMP_NUM_THREADS").result() == "3"
        assert executor.submit(print, "said on stdout").result() is None  # goes to stderr, and not between the answers
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_an_error_of_ours_comes_back_as_itself():
    with processes(2, threads=1) as executor, pytest.raises(MemupdateError) as caught:
        executor.submit(load_policy, "no-such-policy").result()
    with pytest.raises(type(caught.value)) as here:
        load_policy("no-such-policy")
    assert (caught.value.message, caught.value.hint) == (here.value.message, here.value.hint)


def test_a_worker_that_dies_is_told():
    with processes(2, threads=1) as executor, pytest.raises(TrainingError, match=r"died \(exit code 7\)"):
        executor.submit(os._exit, 7).result()


def test_leaving_early_ends_what_runs():
    started, pids = time.monotonic(), []

    def leave():
        with processes(2, threads=1) as executor:
            pids.append(executor.submit(os.getpid).result())
            executor.submit(time.sleep, 600)
            executor.submit(time.sleep, 600)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert time.monotonic() - started < 60
    assert not Path(f"/proc/{pids[0]}").exists()


def test_a_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom memupdate.operations.processes import processes\n"
        "with processes(2, threads=1) as executor:\n    print(executor.submit(os.getpid).result() != os.getpid())\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "True\n"
