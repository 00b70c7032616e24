"""`serve`: vLLM with our plug-ins, this workspace's registry and safe defaults; what was released without an engine goes live."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from memupdate.budget.ranks import SERVING_RANKS, serving_rank
from memupdate.errors import EngineError, UsageError
from memupdate.ledger.ledger import Ledger
from memupdate.operations.session import Session
from memupdate.serving.engine import Engine, EngineSettings, engine_command
from memupdate.serving.engine_record import running_engine

_POLL_S = 0.5


def engine_settings(session: Session, ledger: Ledger, *, host: str, port: int) -> EngineSettings:
    """What `serve` decides: LoRA slots that fit every release and one escalation more, on the adapted matrices only."""
    serving, policy = session.policy.serving, session.policy
    ranks = [release.rank for release in ledger.releases(failed=False)]
    return EngineSettings(
        model=str(session.folder.path),
        served_model_name=base_name(session),
        registry=session.layout.registry.root,
        log_path=session.layout.logs / "engine.log",
        lora_target_modules=tuple(sorted({name.rpartition(".")[2] for name, _, _ in session.shape.matrices})),
        max_lora_rank=serving_rank(
            min(round(max([*ranks, policy.memory.min_rank]) * policy.escalation.rank_factor), SERVING_RANKS[-1])
        ),
        max_loras=serving.max_loras,
        host=host,
        port=port,
        dtype=serving.dtype,
        max_model_len=serving.max_model_len,
        kv_cache_gib=serving.kv_cache_gib,
        drain_s=serving.drain_s,
        base_fingerprint=session.fingerprint,
        api_key=session.api_key,
        access=session.layout.registry.access if session.layout.registry.access.exists() else None,
        extra_args=tuple(serving.extra_args),
    )


def base_name(session: Session) -> str:
    """The name under which clients reach the untouched base model; never the alias."""
    # Of a hub repository the folder is a snapshot, named by its commit.
    name = Path(session.config.model).name
    return f"{name}-base" if name == session.config.collection else name


def command_text(settings: EngineSettings) -> str:
    """The command and environment for an operator's own unit file or pod, as one shell line."""
    argv, environment = engine_command(settings)
    assignments = [
        f"{name}={shlex.quote(value)}" for name, value in sorted(environment.items()) if name != "VLLM_API_KEY"
    ]
    return " ".join([*assignments, shlex.join(argv)])


@contextmanager
def engine_of(session: Session, settings: EngineSettings) -> Iterator[Engine]:
    """An engine, not yet started, noted in `engine.json` once it answers so that other commands find it; stopped at the end.

    Raises:
        UsageError: this workspace has a running engine already.
    """
    if (other := running_engine(session.layout.engine)) is not None:
        raise UsageError(
            f"an engine of this workspace runs already: {other.url} (process {other.pid})", "stop it first, or use it"
        )
    engine = Engine(settings, record=session.layout.engine)
    try:
        yield engine
    finally:
        engine.stop()


def wait_until_stopped(engine: Engine) -> None:
    """Block until Ctrl-C or SIGTERM. Raises EngineError where the engine ends by itself."""
    stopped = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopped.set()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stopped.wait(_POLL_S):
            if engine.poll() is not None:
                failure: EngineError = engine.failure()
                raise failure
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
