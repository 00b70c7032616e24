"""The part of a `Workspace` that puts releases before clients: engines, aliases, canaries, rollback.

Invariant: an alias moves only to what the policy's proof allows, and what takes one back waits for no batch: it needs the manifest's
lock, for the moment of the step, where all else that writes holds the workspace's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from memupdate.errors import AliasMoved, MemupdateError, WorkspaceLocked
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.lock import workspace_lock
from memupdate.operations import aliases, canaries, publishing, serving
from memupdate.operations.aliases import sync_manifest
from memupdate.operations.questions import LedgerQuestions
from memupdate.operations.replicas import Replica, replicas_of
from memupdate.operations.reports import PublishReport
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent, no_progress
from memupdate.serving.engine import Engine, EngineSettings
from memupdate.serving.manifest import AliasEntry, read_manifest
from memupdate.storage import remove_leftovers


class Deployment(LedgerQuestions):
    """The workspace at `root` with its policy and base model, and what serves it.

    Args:
        root: the folder.
        overrides: dotted policy key → value, in place of the file's.

    Raises:
        UsageError: there is no workspace at `root`.
        PolicyError: its policy is not valid.
    """

    def __init__(self, root: Path | str, *, overrides: Mapping[str, Any] | None = None) -> None:
        super().__init__(root)
        self.session = Session.open(self.layout.root, overrides)

    @property
    def root(self) -> Path:
        """The workspace's folder."""
        return self.session.root

    @property
    def collection(self) -> str:
        """The collection that `add` writes to."""
        return self.session.config.collection

    @contextmanager
    def writer(self, command: str) -> Iterator[Ledger]:
        """The ledger for writing, under the workspace's lock. Raises WorkspaceLocked, which names the holder."""
        with (
            workspace_lock(self.session.layout.lock, f"memupdate {command}"),
            Ledger.open(self.session.layout.ledger) as ledger,
        ):
            for folder in self.session.layout.written_under_lock:
                remove_leftovers(folder)
            yield ledger
            ledger.index_facts()  # for search, which finds what a crash left to be indexed all the same

    @contextmanager
    def mover(self, command: str) -> Iterator[Ledger]:
        """The ledger for who only moves an alias back or reads what to serve, beside whoever holds the workspace."""
        path = self.session.layout.ledger
        # A ledger of an older memupdate is brought up to date by opening it: not under the hands of who works with it.
        with self.writer(command) if Ledger.pending_steps(path) else Ledger.open(path) as ledger:
            yield ledger

    def publish(
        self,
        release: str,
        *,
        canary: float | None = None,
        served: Sequence[str] = (),
        progress: Progress = no_progress,
    ) -> PublishReport:
        """Prove a release on an engine, warm it on all, point its alias at it, and see that each answers with it.

        Args:
            canary: share of the conversations that go to it, above 0 and below 1; None: all of them.
            served: URLs of engines that read this workspace's registry, on whatever machine; by default those that run here.
            progress: told what is being done.

        Raises:
            EngineError: no engine is running for this workspace, or one does not answer with the release.
            ProofFailed: the engine does not recall every fact.
            UsageError: the alias cannot have this canary, or a URL is none.
        """
        with self.writer(f"publish {release}") as ledger:
            return publishing.publish(
                self.session, ledger, release, replicas=replicas_of(self.session, served), progress=progress, canary_share=canary
            )  # fmt: skip

    def promote(
        self, alias: str | None = None, *, served: Sequence[str] = (), progress: Progress = no_progress
    ) -> PublishReport:
        """All conversations of the alias go to its canary, after each engine has proved it again.

        Raises:
            UsageError: no canary runs.
            ProofFailed: it fell short of the policy, and was ended.
            EngineError: no engine runs, or one does not answer with the release.
        """
        with self.writer("promote") as ledger:
            replicas = replicas_of(self.session, served)
            return canaries.promote(
                self.session, ledger, alias or self.collection, replicas=replicas, progress=progress
            )

    def abort(self, alias: str | None = None, *, served: Sequence[str] = ()) -> PublishReport:
        """End the alias's canary: all conversations go to its release again. Raises UsageError where none runs."""
        with self.mover("abort") as ledger:
            replicas = replicas_of(self.session, served)
            return canaries.abort(self.session, ledger, alias or self.collection, replicas=replicas)

    def abort_failing(self, *, served: Sequence[str] = ()) -> list[PublishReport]:
        """End the canaries, of all aliases, whose answers fall short of the policy by the engines' counters; those ended."""
        with self.mover("abort --if-failing") as ledger:
            return canaries.abort_failing(self.session, ledger, replicas=replicas_of(self.session, served))

    def rollback(self, alias: str | None = None, *, served: Sequence[str] = ()) -> PublishReport:
        """End the alias's canary, or, where none runs, point it at the release that it pointed at before; while a batch trains, too."""
        with self.mover("rollback") as ledger:
            replicas = replicas_of(self.session, served)
            return publishing.rollback(self.session, ledger, alias or self.collection, replicas=replicas)

    def _publish(self, ledger: Ledger, release: str, replicas: Sequence[Replica], progress: Progress) -> PublishReport:
        """What a batch waits for; as a canary where it was meant as one."""
        share = canaries.share_of_waiting(ledger, sync_manifest(self.session, ledger), release)
        return publishing.publish(
            self.session, ledger, release, replicas=replicas, progress=progress, canary_share=share
        )

    def serve(
        self,
        *,
        port: int = 8000,
        host: str = "127.0.0.1",
        replicas: int = 1,
        print_command: bool = False,
        progress: Progress = no_progress,
    ) -> str:
        """Run vLLM until Ctrl-C or SIGTERM, publishing first what was released while no engine ran. Engines that die are
        started again within the policy's bounds.

        Args:
            port: of the first engine; further ones take the next ports.
            host: address to listen on.
            replicas: engines on this machine.
            print_command: start nothing and return the shell line that would.
            progress: told each step.

        Raises:
            UsageError: an engine of this workspace runs already, or the port is in use.
            EngineError: vLLM did not start, or died too often.
        """
        settings, limits = self._engine_settings(host=host, port=port)
        if print_command:
            return serving.command_text(settings)
        supervisors = serving.supervisors_of(self.session, settings, limits, replicas=replicas, progress=progress)
        tell = serving.teller(self.layout, progress)
        for line in limits.lines:
            tell(line)

        waiting: list[str] = []

        def publish_and_tell() -> None:
            waiting[:] = self.publish_waiting(self.waiting_releases(), tell, progress)
            for release in waiting:
                tell(f"{release} waits for another command to finish with the workspace, and is published then")
            _say_ready(progress, "/v1, ".join(s.engine.url for s in supervisors), self._aliases())

        def look() -> None:
            waiting[:] = self.publish_waiting(waiting, tell, progress)
            self.end_failing_canaries(tell)
            self.retire_due()

        serving.keep_serving(supervisors, publish_and_tell, tell, meanwhile=look)
        return ""

    def publish_waiting(
        self, releases: Sequence[str], tell: Callable[[str], None], progress: Progress = no_progress
    ) -> list[str]:
        """Publish those of `releases` that still wait; returns those that wait on, because the workspace is locked.

        What cannot be published is told and no more tried: the engines go on with what was published before.
        """
        left = []
        for release in releases:
            try:
                with self.writer("serve") as ledger:
                    if release in _waiting(ledger):  # who held the workspace may have published it, or a later one
                        self._publish(ledger, release, replicas_of(self.session), progress)
            except MemupdateError as error:
                if isinstance(error, WorkspaceLocked) and not isinstance(error, AliasMoved):
                    left.append(release)
                else:
                    lines = (error.message, *error.details, f"`memupdate publish {release}` tries again")
                    tell(f"{release} is not published: " + "\n  ".join(lines))
        return left

    def waiting_releases(self) -> list[str]:
        """The latest release of each collection whose batch was waiting for an engine."""
        with self.reader() as ledger:
            return _waiting(ledger)

    def end_failing_canaries(self, tell: Callable[[str], None]) -> None:
        """One look at the running canaries, as `serve` takes it every few seconds: those that fall short of the policy end.

        What is in the way now, as an engine that is being started again, is left to the next look.
        """
        with suppress(MemupdateError):
            if not any(entry.canary for entry in self._entries().values()):
                return
            manifest = read_manifest(self.layout.registry.manifest)
            reasons = canaries.failing(self.session, manifest, replicas_of(self.session))
            for alias, reason in reasons.items():
                with self.mover("serve") as ledger:
                    canaries.abort(self.session, ledger, alias, replicas=(), reason=reason)
                tell(f"the canary of {alias} has ended: {reason}")

    def retire_due(self) -> None:
        """Retire the releases whose time has come by `serving.retire_after_s`, as every command that writes does."""
        if aliases.due_to_retire(self.session):
            with self.mover("serve") as ledger:
                sync_manifest(self.session, ledger)

    def _engine_settings(self, *, host: str, port: int) -> tuple[EngineSettings, serving.EngineLimits]:
        with self.mover("serve") as ledger:
            sync_manifest(self.session, ledger)
            limits = serving.engine_limits(self.session, ledger)
            return serving.engine_settings(self.session, ledger, host=host, port=port), limits

    @contextmanager
    def engine(self, *, port: int = 0, host: str = "127.0.0.1", progress: Progress = no_progress) -> Iterator[str]:
        """A running engine for the block, for notebooks, tests and the demo; yields its URL."""
        with self.engine_to_start(port=port, host=host) as engine:
            engine.start(progress)
            yield engine.url

    @contextmanager
    def engine_to_start(self, *, port: int = 0, host: str = "127.0.0.1") -> Iterator[Engine]:
        """An engine for the caller to `start`, stopped at the end of the block. Raises UsageError where one runs already."""
        settings, _ = self._engine_settings(host=host, port=port)
        with serving.engine_of(self.session, settings) as engine:
            yield engine

    def _aliases(self) -> dict[str, str]:
        return {alias: entry.release for alias, entry in self._entries().items()}

    def _entries(self) -> Mapping[str, AliasEntry]:
        path = self.session.layout.registry.manifest
        return read_manifest(path).aliases if path.exists() else {}


def _waiting(ledger: Ledger) -> list[str]:
    """The latest release of each collection whose batch waits to be published."""
    batches = ledger.batches(unfinished=True)
    return list({b.collection: b.release for b in batches if b.state == "released" and b.release}.values())


def _say_ready(progress: Progress, url: str, aliases: dict[str, str]) -> None:
    """Tell where to ask and what answers."""
    names = ", ".join(f"{alias} → {release}" for alias, release in aliases.items()) or "no release is published yet"
    progress(ProgressEvent("serve", 1, 1, f"{url}/v1  {names}  (Ctrl-C stops)"))
