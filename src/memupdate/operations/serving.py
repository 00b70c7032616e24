"""`serve`: vLLM with our plug-ins, this workspace's registry and safe defaults, kept up until it is stopped.

Invariant: whatever way `keep_serving` is left, every engine that it started has ended.
"""

from __future__ import annotations

import shlex
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from memupdate.budget.ranks import SERVING_RANKS, serving_rank
from memupdate.errors import EngineError, UsageError
from memupdate.layout import WorkspaceLayout
from memupdate.ledger.clock import utc_now
from memupdate.ledger.ledger import Ledger
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent
from memupdate.serving.engine import Engine, EngineSettings, engine_command
from memupdate.serving.engine_record import engine_notes, record_of, running_engines
from memupdate.serving.processors import cores, shares
from memupdate.serving.supervisor import RestartBounds, Supervisor, Tell

MAX_REPLICAS = 64
_POLL_S = 0.5
_MEANWHILE_S = 5.0
_LAST_PORT = 65535


@dataclass(frozen=True)
class EngineLimits:
    """How much room an engine makes for releases, and why, one line each."""

    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    lines: tuple[str, ...]


def engine_limits(session: Session, ledger: Ledger) -> EngineLimits:
    """The smallest slots that fit what the ledger holds and one step more."""
    policy, releases = session.policy, ledger.releases(failed=False)
    lines_of_releases = max(1, len({release.collection for release in releases}))
    largest = max([*(release.rank for release in releases), policy.memory.min_rank])
    rank = serving_rank(min(round(largest * policy.escalation.rank_factor), SERVING_RANKS[-1]))
    slots = min(policy.serving.max_loras, 2 * lines_of_releases + 1)
    kept = max(slots, 4 * lines_of_releases)
    collections = f"{lines_of_releases} collection{'s' if lines_of_releases > 1 else ''}"
    return EngineLimits(
        slots,
        kept,
        rank,
        (
            f"max_lora_rank {rank}: holds rank {largest} and one escalation (× {policy.escalation.rank_factor:g}) more; "
            "every slot is paid at this rank",
            f"max_loras {slots}: {collections}, each with the release it points at and the next one, and one to prove; "
            f"at most serving.max_loras = {policy.serving.max_loras}",
            f"max_cpu_loras {kept}: the current, the previous, the next and a canary of {collections} stay in memory, "
            "so that no flip or rollback reads from disk",
        ),
    )


def engine_settings(session: Session, ledger: Ledger, *, host: str, port: int) -> EngineSettings:
    """What `serve` decides: LoRA slots as `engine_limits` says, on the matrices only that a release may adapt."""
    serving, limits = session.policy.serving, engine_limits(session, ledger)
    return EngineSettings(
        model=str(session.folder.path),
        served_model_name=base_name(session),
        registry=session.layout.registry.root,
        log_path=session.layout.logs / "engine.log",
        lora_target_modules=target_modules(session, ledger),
        max_lora_rank=limits.max_lora_rank,
        max_loras=limits.max_loras,
        max_cpu_loras=limits.max_cpu_loras,
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


def target_modules(session: Session, ledger: Ledger) -> tuple[str, ...]:
    """Last parts of the names of all matrices that a release may adapt: those of every release that an alias can point at, and of
    what the policy would plan next: its placement, or, for `auto`, those that have a law (one of them where none has)."""
    allowed = session.placements()
    with_law = [s for s in allowed if ledger.latest_fit(s.fingerprint, s.shape.name, s.recipe)] or allowed[:1]
    releases = {release.placement for release in ledger.releases(failed=False)}
    shapes = {session.with_placement(name).shape for name in releases} | {placed.shape for placed in with_law}
    return tuple(sorted({module for shape in shapes for module in shape.modules}))


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
    refuse_second(session.layout)
    engine = Engine(settings, record=session.layout.engine)
    try:
        yield engine
    finally:
        engine.stop()


def refuse_second(layout: WorkspaceLayout) -> None:
    """Raises UsageError where an engine of this workspace runs, or is being started by somebody."""
    for other in running_engines(layout.engine):
        raise UsageError(
            f"an engine of this workspace runs already: {other.url} (process {other.pid})", "stop it first, or use it"
        )
    for note in engine_notes(layout.engine):
        if note.is_supervisor_alive:
            raise UsageError(
                f"`memupdate serve` runs for this workspace already (process {note.supervisor_pid}); its engine is {note.state}",
                "stop it first, or wait for it",
            )
        note.path.unlink(missing_ok=True)  # of engines that are gone


def supervisors_of(
    session: Session, settings: EngineSettings, limits: EngineLimits, *, replicas: int, progress: Progress
) -> list[Supervisor]:
    """One supervisor per replica, nothing started yet; each replica has its own port (one after the other), log and note.

    Raises:
        UsageError: an engine of this workspace runs already, or there are no ports for so many.
    """
    refuse_second(session.layout)
    serving, tell = session.policy.serving, teller(session.layout, progress)
    bounds = RestartBounds(serving.max_restarts, serving.restart_window_s, serving.hang_s)
    found = []
    for number, own in enumerate(replica_settings(settings, replicas), start=1):
        engine = Engine(own, record=record_of(session.layout.engine, number))
        engine.notes["limits"] = limits.lines
        name = "engine" if replicas == 1 else f"engine {number}"
        found.append(Supervisor(engine, bounds, tell, name=name, progress=progress))
    return found


def replica_settings(settings: EngineSettings, replicas: int) -> list[EngineSettings]:
    """The settings of each replica: port, port + 1, …; `engine.log`, `engine-2.log`, …; its share of the cores. Raises UsageError.

    vLLM by itself would bind the CPU engines of a machine to the same cores: a replica that started again beside a busy one got no
    processor time in ten minutes.
    """
    if not 1 <= replicas <= MAX_REPLICAS or settings.port + replicas - 1 > _LAST_PORT:
        raise UsageError(
            f"{replicas} replicas from port {settings.port} on are not possible",
            f"at most {MAX_REPLICAS}, and ports up to {_LAST_PORT}",
        )
    log = settings.log_path
    return [
        replace(
            settings,
            port=settings.port + number if settings.port else 0,
            log_path=log if number == 0 else log.with_name(f"{log.stem}-{number + 1}{log.suffix}"),
            processors=share,
        )
        for number, share in enumerate(shares(cores(), replicas))
    ]


def teller(layout: WorkspaceLayout, progress: Progress) -> Tell:
    """One line for people, on the terminal and, with its time, in `logs/serve.log`. A full disk must not end a service."""
    lock = threading.Lock()

    def tell(line: str) -> None:
        progress(ProgressEvent("serve", 1, 1, line))
        with lock:
            try:
                layout.logs.mkdir(parents=True, exist_ok=True)
                with (layout.logs / "serve.log").open("a", encoding="utf-8") as file:
                    file.write(f"{utc_now()} {line}\n")
            except OSError:
                return

    return tell


def keep_serving(
    supervisors: Sequence[Supervisor],
    on_ready: Callable[[], None],
    tell: Tell,
    *,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Start all engines, call `on_ready` once all answer, and keep them until Ctrl-C or SIGTERM, which drain them.

    `meanwhile` is called every few seconds while they serve; what goes wrong in it is told once, and ends nothing.

    A replica that is given up leaves the others serving.

    Raises:
        MemupdateError: an engine could not be started, or the last one was given up.
    """
    stopped, failures = threading.Event(), list[BaseException]()

    def keep(supervisor: Supervisor) -> None:
        try:
            supervisor.run(stopped)
        except BaseException as error:
            failures.append(error)
            tell(str(error))

    threads = [threading.Thread(target=keep, args=(supervisor,), daemon=True) for supervisor in supervisors]
    try:
        with _stop_signals(stopped):
            for thread in threads:
                thread.start()
            while not stopped.wait(_POLL_S) and not failures and not all(s.ready.is_set() for s in supervisors):
                pass
        if failures:
            raise failures[0]
        if not stopped.is_set():
            on_ready()
            with _stop_signals(stopped):
                # In a thread: a look that takes long, as one that publishes, must not hold up the end.
                threading.Thread(target=_keep_looking, args=(meanwhile, stopped, tell), daemon=True).start()
                while any(thread.is_alive() for thread in threads) and not stopped.wait(_POLL_S):
                    pass
            if not stopped.is_set():
                raise failures[-1] if failures else EngineError("no engine is left")
    finally:
        stopped.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _keep_looking(look: Callable[[], None], stopped: threading.Event, tell: Tell) -> None:
    """A look every few seconds, whose failure must not end a service: it is told where nothing like it was before."""
    told = set[str]()
    while not stopped.wait(_MEANWHILE_S):
        try:
            look()
        except Exception as error:  # whatever it is, the engines are well
            if (line := f"a look at what is served failed: {type(error).__name__}: {error}") not in told:
                told.add(line)
                tell(line + "\n" + traceback.format_exc())


def engine_status(layout: WorkspaceLayout) -> tuple[dict[str, Any] | None, list[str]]:
    """The first engine that runs, as `status` shows it, and a line for every other one and for each that is not up."""
    running = running_engines(layout.engine)
    lines = [f"another engine answers at {other.url} (process {other.pid})" for other in running[1:]]
    for note in engine_notes(layout.engine):
        if not note.is_engine_alive and note.is_supervisor_alive:
            why = f": {note.last_failure}" if note.last_failure else ""
            lines.append(f"engine {note.number} is {note.state}{why}")
    lines += [
        f"the engine at {engine.url} was started again {engine.restarts} time(s): {engine.last_failure}"
        for engine in running
        if engine.restarts
    ]
    if not running:
        return None, lines
    first = running[0]
    engine = {"url": first.url, "pid": first.pid, "max_lora_rank": first.max_lora_rank, "replicas": len(running)}
    return {**engine, "restarts": first.restarts}, [*lines, *first.limits]


@contextmanager
def _stop_signals(stopped: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `stopped` for the block."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopped.set()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
