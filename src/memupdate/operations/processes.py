"""Worker processes that run functions of this package, for work that would hold the interpreter: plain child processes over pipes.

Not `concurrent.futures` processes, since those import the caller's main module again, which a script without a guard does not survive.
Invariant: a worker ends with its input; what it prints goes to stderr; an error of ours comes back as itself.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from memupdate.errors import MemupdateError, TrainingError

_COMMAND = "from memupdate.operations.processes import serve; serve()"


@contextmanager
def processes(count: int, *, threads: int) -> Iterator[Executor]:
    """An executor over `count` worker processes of so many threads. Whatever ends the block early kills them.

    Functions submitted must be importable by name.
    """
    executor = _Processes(count, threads)
    try:
        yield executor
    except BaseException:
        executor.kill()
        raise
    executor.shutdown()


class _Processes(Executor):
    """Jobs wait for an idle worker in a thread each."""

    def __init__(self, count: int, threads: int) -> None:
        # What the caller can import the workers can, however its path came to be.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        self.workers = [
            subprocess.Popen(
                [sys.executable, "-c", _COMMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
            for _ in range(count)
        ]
        self.idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(count, "worker")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn` in a worker. Its result raises TrainingError where the worker died, and our own errors as they were."""
        return self.threads.submit(self._ask, pickle.dumps((fn, args, kwargs)))

    def _ask(self, job: bytes) -> Any:
        worker = self.idle.get()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(job)
            worker.stdin.flush()
            kind, value = pickle.load(worker.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            code = worker.wait()
            raise TrainingError(f"a worker process died (exit code {code})", "see its last words above") from error
        finally:
            self.idle.put(worker)
        if kind == "error":
            raise value
        return value

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers once their jobs are done."""
        self.threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait()

    def kill(self) -> None:
        """End the workers now; jobs in flight are lost."""
        for worker in self.workers:
            worker.kill()
            worker.wait()
        self.threads.shutdown(wait=True, cancel_futures=True)


def serve() -> None:
    """A worker's life: jobs from stdin, answers on what was stdout."""
    # Ctrl-C reaches the whole group; the parent is the one to act on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            function, arguments, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = ("value", function(*arguments, **options))
        except MemupdateError as error:
            answer = ("error", error)
        pickle.dump(answer, answers)
        answers.flush()
