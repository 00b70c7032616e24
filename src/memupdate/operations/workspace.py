"""The public Python API: a `Workspace` in a folder, one method per command, frozen reports out, `MemupdateError` raised."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from memupdate.budget.plan import Plan
from memupdate.errors import FactsError, MemupdateError, OverBudget, UsageError
from memupdate.facts.model import Fact
from memupdate.facts.reader import collect_facts, read_facts
from memupdate.law.density import density_from
from memupdate.law.points import points_from_json
from memupdate.layout import COLLECTION_PATTERN, WorkspaceLayout
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.lock import lock_holder, workspace_lock
from memupdate.ledger.records import Batch, FactsDiff, ReleaseRecord, ToldCounts
from memupdate.ledger.staging import Staged
from memupdate.models.folder import EMBEDDED_MODEL, resolve_model
from memupdate.operations import (
    backing_up,
    calibrating,
    canaries,
    compacting,
    explaining,
    exporting,
    paraphrasing,
    planning,
    purging,
    reporting,
    retracting,
    serving,
    telling,
    verifying,
)
from memupdate.operations.aliases import sync_manifest
from memupdate.operations.backing_up import BackupReport
from memupdate.operations.config import POLICY_FILE, WorkspaceConfig, write_config
from memupdate.operations.deployment import Deployment
from memupdate.operations.replicas import NO_ENGINE_HINT, replicas_of
from memupdate.operations.reports import (
    AddReport,
    CalibrationReport,
    PlanReport,
    ReleaseRow,
    StatusReport,
    VerifyReport,
)
from memupdate.operations.room import means_for, room_line
from memupdate.operations.session import Session
from memupdate.operations.unfinished import kept, unfinished_messages
from memupdate.operations.updating import BatchRun
from memupdate.policies import load_policy, parse_resolved_policy, policy_path
from memupdate.progress import Progress, no_progress
from memupdate.reports.content import CapacityReport
from memupdate.storage import ensure_dir, readable_disk_errors, remove_leftovers, write_bytes_atomic

PROBES_FILE = "probes.jsonl"
SHIPPED_PROBES = "known.jsonl"
SHIPPED_POINTS = "calibration*.json"
"""One file for each placement, or one for several."""


class Workspace(Deployment):
    """A folder with a ledger, a registry of releases, a policy and a base model.

    Args:
        root: the folder.
        overrides: dotted policy key → value, in place of the file's; see `memupdate.policies.load_batch_values`.

    Raises:
        UsageError: there is no workspace at `root`.
        PolicyError: its policy is not valid.
    """

    @classmethod
    def init(
        cls,
        root: Path | str,
        *,
        model: str,
        policy: str | None = None,
        collection: str | None = None,
        probes: Path | None = None,
    ) -> Workspace:
        """Make a workspace; all checks come before the first write.

        Args:
            model: a folder, a hub repository, or `atlas`.
            policy: a shipped policy or a file, copied into the workspace; `atlas` for the embedded model, else `standard`.
            collection: the alias that clients will ask for; the folder's name by default.
            probes: a facts file whose prompts must go on being answered as before.

        Raises:
            UsageError: the folder is in use or the collection's name is not allowed.
            ModelError, PolicyError, FactsError: what was given cannot be used.
        """
        root = Path(root).resolve()
        layout = WorkspaceLayout(root)
        if layout.config.exists():
            raise UsageError(f"{root}: is a workspace already", "choose another folder, or use this one")
        folder = resolve_model(model)
        source = policy_path(policy or (EMBEDDED_MODEL if model == EMBEDDED_MODEL else "standard"))
        load_policy(str(source))
        name = collection or root.name.lower()
        if COLLECTION_PATTERN.fullmatch(name) is None:
            raise UsageError(
                f"{name!r} cannot name a collection", "give --collection: lower-case letters, digits, . _ -"
            )
        shipped = folder.path / SHIPPED_PROBES
        probes = probes or (shipped if shipped.is_file() else None)
        if probes is not None:
            read_facts(probes)
        local = Path(model).expanduser()
        stored_model = str(local.resolve()) if model != EMBEDDED_MODEL and local.is_dir() else model
        config = WorkspaceConfig(
            schema_version=1, model=stored_model, collection=name, probes=PROBES_FILE if probes is not None else ""
        )
        with readable_disk_errors(root):
            ensure_dir(root)
        with workspace_lock(layout.lock, f"memupdate init {root.name}"):
            if layout.config.exists():
                raise UsageError(f"{root}: has just been made a workspace", "use it, or choose another folder")
            remove_leftovers(root)
            write_bytes_atomic(root / POLICY_FILE, source.read_bytes())
            if probes is not None:
                write_bytes_atomic(root / PROBES_FILE, probes.read_bytes())
            with Ledger.create(layout.ledger) as ledger:
                ledger.ensure_collection(name)
                _take_shipped_points(Session(root, config, load_policy(str(root / POLICY_FILE))), ledger)
            write_config(root, config)  # last: with it the folder is a workspace
        return cls(root)

    def backup(self, file: Path | str) -> BackupReport:
        """Write ledger, releases, slices and settings to one tar file, at one moment, while others go on writing.

        Raises:
            UsageError: the file is there already or cannot be written.
            LedgerError: what the ledger names is missing or altered; all such files are listed.
        """
        return backing_up.back_up(self.layout, Path(file))

    @classmethod
    def restore(cls, file: Path | str, to: Path | str) -> Workspace:
        """Bring a backup back in `to`, which must be empty or not there. Raises UsageError for a damaged backup."""
        backing_up.restore(Path(file), Path(to))
        return cls(to)

    def calibrate(
        self,
        *,
        minutes: float = calibrating.DEFAULT_MINUTES,
        expected: tuple[int, int] = calibrating.DEFAULT_EXPECTED,
        ranks: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        facts: Path | None = None,
        placements: Sequence[str] = (),
        progress: Progress = no_progress,
    ) -> CalibrationReport:
        """Write memories into the base model and fit the law to what they held. Cells that are in the ledger are not run again.

        Args:
            minutes: time to spend; each cell is chosen for what it tells about plans.
            expected: facts, from and to, that collections will hold.
            ranks: with `sizes`, an explicit sweep of ranks × numbers of facts instead; `minutes` then says nothing.
            sizes: see `ranks`.
            facts: a file of facts to write instead of shipped or invented ones.
            placements: to measure, each for its share of the minutes; the policy's where none is named, which are all for `auto`.
            progress: told what is being written, and the time left.

        Raises:
            PolicyError: there is no such placement.
            LawError: fewer than two ranks or two sizes, or too little time for four memories.
            UsageError: ranks without sizes, or sizes without ranks; an empty range; no time at all.
            FactsError: `facts` cannot be read or holds too few.
        """
        if bool(ranks) != bool(sizes):
            raise UsageError("a sweep needs both ranks and sizes", "give both, or neither: cells are then chosen")
        if minutes <= 0 or not 1 <= expected[0] < expected[1]:
            raise UsageError(
                f"{minutes:g} minutes for {expected[0]} to {expected[1]} facts is no calibration",
                "give some minutes, and a range of facts such as 20..500",
            )
        cells, names = calibrating.grid(ranks or (), sizes or ()), tuple(dict.fromkeys(placements))
        wish = calibrating.Wish(minutes, expected, facts, cells, names)
        with self.writer("calibrate") as ledger:
            return calibrating.calibrate(self.session, ledger, wish, progress)

    def plan(
        self,
        facts: Path,
        *,
        collection: str | None = None,
        skip_invalid: bool = False,
        columns: Mapping[str, str] | None = None,
        format: str | None = None,
        progress: Progress = no_progress,
    ) -> PlanReport:
        """What `add` would do. Changes nothing, but for a first calibration where the workspace has none.

        Args:
            facts: a file, or `-` for standard input.
            collection: the workspace's own if not given.
            skip_invalid: take the valid records and list the others.
            columns, format: see `memupdate.facts.FactStream`.
            progress: told what is being done.

        Raises:
            FactsError: the file cannot be taken.
            OverBudget: no rank within the policy holds the facts.
                Either has as `report` what the first facts of each kind would do, a `PlanReport` without a plan.
        """
        name, stream = collection or self.collection, self.session.fact_stream(facts, columns=columns, format=format)
        with self.reader() as ledger, ledger.stage(name, stream, refuse=False) as staged:
            try:
                staged.refuse(skip_invalid=skip_invalid)
                plan, messages = self._planned(ledger, staged, progress)
            except (FactsError, OverBudget) as error:
                error.report = telling.told_report(staged, str(facts), skip_invalid=skip_invalid, limit=telling.SHOWN)
                raise
            told = telling.told_report(staged, str(facts), skip_invalid=skip_invalid)
            return replace(told, plan=plan, messages=told.messages + messages)

    def _planned(self, ledger: Ledger, staged: Staged, progress: Progress) -> tuple[Plan | None, tuple[str, ...]]:
        """The plan, None where there is nothing to write, and what else is to be said of it."""
        name = staged.collection
        laws = planning.candidates(self.session, ledger, name)
        if not laws or planning.unfitted(self.session, ledger, name):
            with self.writer("plan") as writing:
                laws = calibrating.ensure_laws(self.session, writing, name, progress)
        diff, live = staged.diff(), ledger.live_facts(name)
        plan = None if diff.is_empty else planning.make_plan(laws, ledger, name, diff, live_before=live)
        advice = compacting.advice(self.session, ledger, name, plan)
        facts = [*live, *diff.new, *(new for new, _ in diff.superseding)]
        room = () if plan is None else (room_line(self.session, plan, facts),)
        return plan, room + (() if advice is None else (advice,))

    def add(
        self,
        facts: Path,
        *,
        collection: str | None = None,
        publish: bool = True,
        skip_invalid: bool = False,
        columns: Mapping[str, str] | None = None,
        format: str | None = None,
        progress: Progress = no_progress,
    ) -> AddReport:
        """The main job: ingest, plan, train, prove, release, and publish where an engine runs.

        Args:
            facts: a file, or `-` for standard input.
            collection: the workspace's own if not given.
            publish: whether to go on after the release.
            skip_invalid: take the valid records and list the others.
            columns, format: see `memupdate.facts.FactStream`.
            progress: told what is being done.

        Raises:
            FactsError, OverBudget: before anything is stored.
            ProofFailed: the batch is refused and kept as failed.
            WorkspaceLocked: another process is writing.
        """
        facts = Path(facts)
        name, stream = collection or self.collection, self.session.fact_stream(facts, columns=columns, format=format)
        started = time.monotonic()
        with self.writer(f"add {facts.name}") as ledger:
            with ledger.stage(name, stream, skip_invalid=skip_invalid) as staged:
                # Planned before anything is stored, so that a batch that cannot be held leaves no trace.
                self._refuse_plan(ledger, name, staged.diff(), progress)
                counts, skipped, notes = staged.counts, telling.skipped_lines(staged), telling.told_messages(staged)
                batch = ledger.receive_batch(name, staged, self.session.policy.resolved_json(), publish=publish)
            if batch is None:
                return _nothing_new(name, counts, skipped, notes, time.monotonic() - started)
            report = self._advance(ledger, batch.id, progress)
            messages = (*notes, *report.messages)
            return replace(report, duration_s=time.monotonic() - started, skipped=skipped, messages=messages)

    def _refuse_plan(self, ledger: Ledger, name: str, diff: FactsDiff, progress: Progress) -> None:
        if not diff.is_empty:
            incoming, live = [*diff.new, *(new for new, _ in diff.superseding)], ledger.live_facts(name)
            self.session.renderer.render_all(incoming)
            laws = calibrating.ensure_laws(self.session, ledger, name, progress)
            plan = planning.make_plan(laws, ledger, name, diff, live_before=live, measure=True)
            means_for(
                self.session.with_placement(plan.placement),
                plan.rank,
                self.session.training_examples([*live, *incoming]),
            )

    def paraphrase(
        self,
        facts: Path,
        *,
        out: Path | None = None,
        count: int = paraphrasing.DEFAULT_COUNT,
        attempts: int = paraphrasing.DEFAULT_ATTEMPTS,
        seed: int | None = None,
        collection: str | None = None,
        skip_invalid: bool = False,
        columns: Mapping[str, str] | None = None,
        format: str | None = None,
        progress: Progress = no_progress,
    ) -> paraphrasing.ParaphraseReport:
        """A facts file with other wordings that the base model found, to be looked through and then added. The ledger is not written.

        Args:
            facts: a file, or `-` for standard input.
            out: a new file for them; None: the report has them as `written`.
            count: new wordings of each fact, at most.
            attempts: rounds of sampling `count` texts for each fact that lacks wordings still.
            seed: of the sampling; the policy's `training.seed` if not given.
            collection: whose live facts no new wording may ask for; the workspace's own if not given.
            skip_invalid: take the valid records and list the others.
            columns, format: see `memupdate.facts.FactStream`.
            progress: told what is being done.

        Raises:
            UsageError: `out` is there already or cannot be written, or no wording or round is asked for.
            FactsError: the file cannot be taken.
            ModelError: the base model cannot be loaded.
        """
        if count < 1 or attempts < 1:
            raise UsageError(f"{count} wordings in {attempts} rounds is nothing to do", "give 1 or more of both")
        if out is not None:
            exporting.check_new_file(out)
        stream = self.session.fact_stream(facts, columns=columns, format=format)
        found = collect_facts(stream, skip_invalid=skip_invalid)
        with self.reader() as ledger:
            live = ledger.live_facts(collection or self.collection)
        given = [located.fact for located in found.facts]
        wish = paraphrasing.Wish(count, attempts, self.session.policy.training.seed if seed is None else seed)
        report = paraphrasing.paraphrase(self.session, given, live, wish, progress)
        if out is not None:
            exporting.write_facts(report.written, out)
        skipped = tuple(problem.describe(found.path) for problem in found.skipped)
        return replace(report, out=None if out is None else str(out), skipped=skipped)

    def plan_compaction(
        self, *, collection: str | None = None, progress: Progress = no_progress
    ) -> compacting.CompactionPlan:
        """What `compact` would do. Changes nothing, but for a first calibration where the workspace has none.

        Raises:
            UsageError: nothing was released yet.
            OverBudget: no rank within the policy holds the live facts.
        """
        with self.writer("compact --dry-run") as ledger:
            name = self._release(ledger, None, collection).collection
            return self._preview(ledger, name, progress)

    def _preview(self, ledger: Ledger, name: str, progress: Progress) -> compacting.CompactionPlan:
        laws = calibrating.ensure_laws(self.session, ledger, name, progress, afresh=True)
        return compacting.preview(ledger, name, laws)

    def compact(
        self,
        *,
        collection: str | None = None,
        publish: bool = True,
        reason: str | None = None,
        progress: Progress = no_progress,
    ) -> AddReport:
        """Write all live facts afresh into an empty memory, prove them, and prove that the dead answers are gone.

        Raises:
            UsageError, OverBudget: before anything is stored; see `plan_compaction`.
            ProofFailed: the batch is refused and kept as failed; the alias and the latest release are as they were.
            WorkspaceLocked: another process is writing.
        """
        with self.writer("compact") as ledger:
            name = self._release(ledger, None, collection).collection
            self._preview(ledger, name, progress)
            policy = self.session.policy.resolved_json()
            batch = ledger.receive_compaction(name, policy, publish=publish, reason=reason)
            return self._advance(ledger, batch.id, progress)

    def facts_to_purge(self, facts: Sequence[str] = (), *, keys: Sequence[str] = ()) -> list[Fact]:
        """What `purge` with the same arguments would remove: stand-ins of retracted facts are among it. Raises LedgerError."""
        if not facts and not keys:
            raise UsageError("no fact was named", "give a fact's id or --key; see `memupdate facts search`")
        with self.reader() as ledger:
            return purging.to_purge(ledger, facts, keys)

    def purge(
        self, facts: Sequence[str] = (), *, keys: Sequence[str] = (), reason: str | None = None
    ) -> purging.PurgeReport:
        """Remove facts' texts from the ledger for good, in all collections; ids, tombstones and the history stay.

        Args:
            facts: beginnings of facts' ids. The same call again finishes a purge that was cut off, and so does `resume`.
            keys: keys, prompts or `SUBJECT / RELATION`, with all the values that they ever had.
            reason: kept for good.

        Raises:
            UsageError: no fact was named.
            LedgerError: something is not there, an unfinished batch needs it, or a reader keeps the old state of the file.
            WorkspaceLocked: another process is writing.
        """
        self.facts_to_purge(facts, keys=keys)  # before the lock: what cannot be done needs none
        with self.writer("facts purge") as ledger:
            found = purging.to_purge(ledger, facts, keys)
            return purging.purge(self.layout, ledger, found, reason, ids=facts, keys=keys)

    def retract(
        self,
        facts: Sequence[str] = (),
        *,
        keys: Sequence[str] = (),
        file: Path | None = None,
        reason: str | None = None,
        collection: str | None = None,
        publish: bool = True,
        progress: Progress = no_progress,
    ) -> AddReport:
        """Take facts back: a release that answers them by the policy's text until a compaction.

        Args:
            facts: beginnings of ids of live facts.
            keys: keys or prompts of live facts.
            file: a facts file whose facts are live.

        Raises:
            UsageError, FactsError, OverBudget: before anything is stored.
            ProofFailed: the batch is refused and kept as failed.
            WorkspaceLocked: another process is writing.
        """
        name = collection or self.collection
        with self.writer("facts retract") as ledger:
            found = retracting.find_facts(ledger, name, ids=facts, keys=keys, file=file)
            retractions = retracting.retractions_of(self.session, found, progress)
            diff = FactsDiff((), tuple((item.stand_in, item.retracted) for item in retractions), ())
            self._refuse_plan(ledger, name, diff, progress)
            policy = self.session.policy.resolved_json()
            batch = ledger.receive_retraction(name, retractions, policy, publish=publish, reason=reason)
            return self._advance(ledger, batch.id, progress)

    def _advance(self, ledger: Ledger, batch_id: int, progress: Progress) -> AddReport:
        """Take a batch as far as it goes: released, and published where it is wanted and an engine runs.

        Raises:
            MemupdateError: what stopped it; where the batch is not given up, with a line about how to go on.
        """
        try:
            return self._go_on(ledger, batch_id, progress)
        except MemupdateError as error:
            error.details = (*error.details, *kept(ledger, batch_id))
            raise

    def _go_on(self, ledger: Ledger, batch_id: int, progress: Progress) -> AddReport:
        run = BatchRun(self._session_of(ledger.batch(batch_id)), ledger, batch_id, progress)
        run.advance()
        sync_manifest(self.session, ledger)
        batch, publication, messages = ledger.batch(batch_id), None, []
        replicas = replicas_of(self.session)
        if batch.state == "released" and batch.publish and batch.release:
            if replicas:
                publication = self._publish(ledger, batch.release, replicas, progress)
            else:
                messages.append(f"{batch.release} is released, not published: no engine is running; {NO_ENGINE_HINT}")
        report = run.report()
        return replace(report, publication=publication, messages=(*report.messages, *messages))

    def _session_of(self, batch: Batch) -> Session:
        """This session, or one under the policy that the batch began with, if the policy has changed since."""
        if batch.policy_json == self.session.policy.resolved_json():
            return self.session
        return Session(self.root, self.session.config, parse_resolved_policy(batch.policy_json))

    def resume(self, *, progress: Progress = no_progress) -> list[AddReport]:
        """Finish what a crash, Ctrl-C or a missing engine left, each batch from its last state.

        Of several releases of a collection that wait for an engine only the latest is published: it carries all facts. A purge that
        was cut off is finished last, when no batch needs its facts any more.
        """
        with self.writer("resume") as ledger:
            sync_manifest(self.session, ledger)
            left = [batch for batch in ledger.batches(unfinished=True) if batch.state != "released"]
            reports = [self._advance(ledger, batch.id, progress) for batch in left]
            waiting = {batch.collection: batch.id for batch in ledger.batches(unfinished=True)}
            told = {report.batch_id for report in reports}
            reports += [self._advance(ledger, b, progress) for b in waiting.values() if b not in told]
            purging.finish_begun(self.layout, ledger)
            return reports

    def verify(
        self, release: str | None = None, *, served: str | None = None, progress: Progress = no_progress
    ) -> VerifyReport:
        """Prove a release again, in this process, or on the engine at the URL `served`. By default the latest release."""
        with self.writer("verify") as ledger:
            record = self._release(ledger, release)
            if served:
                return verifying.verify_served(self.session, ledger, record, served, progress)
            return verifying.verify_in_process(self.session, ledger, record, progress)

    def explain_answer(
        self, fact: str, *, release: str | None = None, progress: Progress = no_progress
    ) -> explaining.AnswerExplanation:
        """Why a fact is answered as it is, token by token; records nothing.

        Args:
            fact: the beginning of its id.
            release: by default the latest of the fact's collection, or the failed batch that was to bring the fact.
            progress: told what is being done.

        Raises:
            LedgerError: no such fact or release.
            UsageError: the release was not taught the fact.
        """
        with self.reader() as ledger:
            return explaining.explain_answer(self.session, ledger, fact, release=release, progress=progress)

    def releases(self, collection: str | None = None) -> list[ReleaseRow]:
        """All releases, newest first."""
        aliases = self._aliases()
        with self.reader() as ledger:
            rows = [
                ReleaseRow(
                    r.name, r.collection, r.version, r.rank, r.placement,
                    len(ledger.live_facts(r.collection, as_of_version=r.version)), r.created_at_utc, r.digest,
                    tuple(a for a, target in aliases.items() if target == r.name),
                )
                for r in ledger.releases(collection)
            ]  # fmt: skip
        return rows[::-1]

    def release(self, name: str) -> dict[str, object]:
        """The papers of one release: `memupdate.json`, and its proofs by engine."""

        from memupdate.layout import RELEASE_FILE

        with self.reader() as ledger:
            record = ledger.release(name)
            proofs = ledger.proofs(name)
            purged = [row.fact for row in ledger.releases_with_purged(name)]
        papers: dict[str, object] = json.loads(
            (self.session.layout.registry.release(record.name) / RELEASE_FILE).read_text()
        )
        papers["papers_version"] = papers.pop("schema_version")  # the report has a schema_version of its own
        engines = {p.engine for p in proofs}
        papers["proofs"] = {
            e: {"facts": sum(p.engine == e for p in proofs), "proved": sum(p.engine == e and p.proved for p in proofs)}
            for e in engines
        }
        if purged:  # its weights were trained on what the ledger no longer has
            papers["purged_facts"] = purged
        return papers

    def status(self) -> StatusReport:
        """One look at the workspace."""
        session = self.session
        engine, engine_lines = serving.engine_status(session.layout)
        with self.reader() as ledger:
            latest = ledger.latest_release(self.collection)
            laws = planning.candidates(session, ledger, self.collection)
            entries = self._entries()
            aliases = {alias: entry.release for alias, entry in entries.items()}
            behind = canaries.canary_messages(entries)
            behind += [
                f"{alias} points at {entry.release}; the latest release is {newest.name}"
                for alias, entry in entries.items()
                if (newest := ledger.latest_release(alias)) is not None
                and newest.name not in (entry.release, entry.canary and entry.canary.release)
            ]
            advice = compacting.advice(session, ledger, self.collection)
            behind += [] if advice is None else [advice]
            behind += [told for name in ledger.collections() if (told := purging.purged_advice(ledger, name))]
            behind += purging.begun_advice(ledger)
            behind += unfinished_messages(ledger.batches(unfinished=True), lock_holder(session.layout.lock))
            return StatusReport(
                root=str(self.root), model=session.config.model, base_fingerprint=session.fingerprint, policy=session.policy.name,
                collection=self.collection, aliases=aliases, facts_live=len(ledger.live_facts(self.collection)),
                rank=latest.rank if latest else 0, releases=len(ledger.releases()),
                unfinished_batches=tuple((b.id, b.state) for b in ledger.batches(unfinished=True)),
                law_points=planning.count_points(session, ledger, self.collection), fit_id=laws[0].fit.fit_id if laws else None,
                engine=engine, messages=(*engine_lines, *behind),
            )  # fmt: skip

    def report(self, collection: str | None = None) -> CapacityReport:
        """Capacity, law, releases and weak facts, of one collection or all. Raises LedgerError before a calibration."""
        with self.reader() as ledger:
            return reporting.capacity_report(self.session, ledger, self._aliases(), collection=collection)

    def _release(self, ledger: Ledger, name: str | None, collection: str | None = None) -> ReleaseRecord:
        if name is not None:
            return ledger.release(name)
        collection = collection or self.collection
        latest = ledger.latest_release(collection)
        if latest is None:
            raise UsageError(f"{collection}: nothing was released yet", "add facts first: `memupdate add FACTS`")
        return latest


def _take_shipped_points(session: Session, ledger: Ledger) -> None:
    """Law points measured before and shipped with the model, where they are of this very model and policy."""
    for file in sorted(session.folder.path.glob(SHIPPED_POINTS)):
        text = file.read_text(encoding="utf-8")
        own = (session.fingerprint, session.recipe)
        points = [p for p in points_from_json(text) if (p.base_fingerprint, p.recipe) == own]
        ledger.add_law_points(replace(p, origin="shipped") for p in points)
        density = density_from(json.loads(text).get("density"))
        for placed in session.placements():  # others are fitted when a policy first asks for them
            if any(p.placement == placed.shape.name for p in points):
                calibrating.refit(placed, ledger, density=density)


def _nothing_new(
    collection: str, counts: ToldCounts, skipped: tuple[str, ...], notes: tuple[str, ...], duration_s: float
) -> AddReport:
    """No fact of the file is to be taught: each is live already, or only put on record."""
    if counts.unchanged:
        number = f"all {counts.unchanged}" if not counts.recorded else str(counts.unchanged)
        notes = (f"{number} facts are stored already; nothing to do", *notes)
    return AddReport(
        batch_id=None, collection=collection, state="unchanged", release=None, plan=None, rank=None, attempts=0, epochs=0,
        measured_loss_nats=None, kl_nats=None, facts_total=0, facts_proved=0, facts_new=0, failures=(), probes_unchanged_share=None,
        probes=0, publication=None, duration_s=duration_s, messages=notes, skipped=skipped,
    )  # fmt: skip
