"""The engines that answer for a workspace: its own and those at given URLs; warmed before a flip, asked after it.

Invariant: nothing here moves an alias. What an engine answers is compared with the release that it should be, never assumed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from memupdate.errors import EngineError, UsageError
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.records import ReleaseRecord
from memupdate.operations.matching import matcher_of
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent
from memupdate.serving.client import EngineClient
from memupdate.serving.conversation import steady_key
from memupdate.serving.engine_record import running_engines
from memupdate.serving.manifest import MATCHED, Canary
from memupdate.serving.routing import takes_canary

NO_ENGINE_HINT = "start one with `memupdate serve`; the alias moves as soon as the engine has proved the release"
_OTHER_REGISTRY = "does this engine read this workspace's registry? see `memupdate status`"
_CONFIRM_S = 15.0
"""How long a shared file system may take to show the flip to a replica; NFS clients ask again after at most 3 s for what is new."""
_CONFIRM_POLL_S = 0.2


@dataclass(frozen=True)
class Replica:
    """One engine."""

    url: str
    max_lora_rank: int | None = None
    """None: not known here, an engine of another machine."""
    target_modules: tuple[str, ...] = ()
    """What it has LoRA slots on; empty: not known here."""


def replicas_of(session: Session, served: Sequence[str] = ()) -> tuple[Replica, ...]:
    """The engines at the URLs `served`, which may run on other machines; those of this workspace where none are given.

    Raises:
        UsageError: something given is no URL.
    """
    for url in served:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no URL of an engine", "give it like http://gpu7:8000")
    if served:
        return tuple(Replica(url) for url in dict.fromkeys(u.rstrip("/").removesuffix("/v1") for u in served))
    return tuple(
        Replica(engine.url, engine.max_lora_rank, engine.target_modules)
        for engine in running_engines(session.layout.engine)
    )


def refuse_small_engines(session: Session, release: ReleaseRecord, replicas: Sequence[Replica]) -> None:
    """An engine's LoRA slots were sized and placed when it started. Raises EngineError for a release that has outgrown them."""
    modules = session.with_placement(release.placement).shape.modules
    for replica in replicas:
        if replica.target_modules and (missing := sorted(modules - set(replica.target_modules))):
            raise EngineError(
                f"{release.name} adapts {', '.join(missing)} ({release.placement}), where the engine at {replica.url} has no slots",
                "restart `memupdate serve`: it makes room for the release and publishes it",
            )
        if replica.max_lora_rank is not None and release.rank > replica.max_lora_rank:
            raise EngineError(
                f"{release.name} has rank {release.rank}, but the engine at {replica.url} takes up to {replica.max_lora_rank}",
                "restart `memupdate serve`: it makes room for the release and publishes it",
            )


def prewarm(session: Session, release: ReleaseRecord, replicas: Sequence[Replica], progress: Progress) -> None:
    """Each replica loads the release, so that no client waits for that after the flip. Raises EngineError."""
    for count, replica in enumerate(replicas):
        progress(ProgressEvent("warm", count, len(replicas), f"{release.name} on {replica.url}"))
        with EngineClient(replica.url, session.api_key) as client:
            try:
                client.complete(release.name, "?", 1)
            except EngineError as error:
                raise EngineError(error.message, error.hint or _OTHER_REGISTRY) from error


def confirm(
    session: Session,
    ledger: Ledger,
    release: ReleaseRecord,
    replicas: Sequence[Replica],
    *,
    canary: Canary | None = None,
) -> None:
    """One request to the alias must be answered by `release`, on each replica; none is made where all would go to the base model.

    Args:
        canary: where `release` is one: the request is of a conversation that goes to it.

    Raises:
        EngineError: a replica cannot be reached, or goes on answering with another release.
    """
    prompt = probe_prompt(session, ledger, release)
    if prompt is None:
        return
    user = canary_user(release.collection, canary) if canary else None
    deadline = time.monotonic() + _CONFIRM_S
    for replica in replicas:
        with EngineClient(replica.url, session.api_key) as client:
            while (answered := client.complete(release.collection, prompt, 1, user=user).model) != release.name:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{replica.url}: {release.collection} is answered by {answered}, not by {release.name}",
                        _OTHER_REGISTRY,
                    )
                time.sleep(_CONFIRM_POLL_S)


def probe_prompt(session: Session, ledger: Ledger, release: ReleaseRecord) -> str | None:
    """A question that goes to the release by either route; None where the route is `matched` and there is no such one."""
    facts = ledger.live_facts(release.collection, as_of_version=release.version)
    matcher = matcher_of(session.layout.registry.release(release.name))
    reached = [fact.prompt for fact in facts if matcher is None or matcher.mentions([fact.prompt])]
    if reached or session.policy.serving.route != MATCHED:
        return next(iter([*reached, *(fact.prompt for fact in facts)]), "?")
    return None


def canary_user(alias: str, canary: Canary) -> str:
    """A value of the OpenAI `user` field whose conversations go to the canary; found after about 1 / share tries."""
    names = (f"memupdate-confirm-{number}" for number in itertools.count())
    return next(name for name in names if takes_canary(steady_key({"user": name}, b"", b""), alias, canary))
