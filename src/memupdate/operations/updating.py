"""The main job: one batch from received to released, one committed transition at a time, so that `resume` can go on from any.

Batches that add facts, that retract some and that compact go the same way; they differ in the memory that they begin with and
in what must be gone in the end.

Invariant: before each transition its files are safely in place; after it they are named in the ledger. Every step reads what it
needs from ledger and disk, so a step does not know whether the one before ran in this process.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from memupdate import __version__
from memupdate.budget.plan import Plan, plan_from_json
from memupdate.budget.ranks import next_rank
from memupdate.errors import ProofFailed, TrainingError
from memupdate.facts.model import Fact
from memupdate.facts.render import Example
from memupdate.law.errors import LawError
from memupdate.law.fit import LawFit
from memupdate.law.points import LawPoint
from memupdate.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    MATCHER_FILE,
    RELEASE_FILE,
    SLICE_WEIGHTS_FILE,
    release_name,
)
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.records import Batch, ReleaseRecord, SliceRecord
from memupdate.operations.calibrating import ensure_laws, refit
from memupdate.operations.compacting import plan_compaction
from memupdate.operations.gates import Gates
from memupdate.operations.holding import hold_examples
from memupdate.operations.matching import write_matcher
from memupdate.operations.measuring import corpus_text, record_measured
from memupdate.operations.planning import make_plan
from memupdate.operations.proving import (
    MemoryProof,
    failures_of,
    look_at_dead,
    look_at_probes,
    proof_records,
    prove_memory,
)
from memupdate.operations.reports import AddReport
from memupdate.operations.room import means_for
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent
from memupdate.storage import canonical_json, file_sha256, new_dir_atomic, write_text_atomic

if TYPE_CHECKING:
    from memupdate.training.loop import TrainingOutcome, TrainingSettings
    from memupdate.training.memory import Memory
    from memupdate.verification.gone import DeadAnswer


@dataclass
class BatchRun:
    """One batch on its way, and what is to be told about it in the end."""

    session: Session
    ledger: Ledger
    batch_id: int
    progress: Progress
    started: float = field(default_factory=time.monotonic)
    proof: MemoryProof | None = None
    attempts: int = 0
    epochs: int = 0
    steps: int = 0
    outgrown: list[LawPoint] = field(default_factory=list)
    """What ranks measured that did not hold the facts: the law learns from them too."""
    training_s: float = 0.0
    """All attempts together, as `epochs`."""
    messages: list[str] = field(default_factory=list)

    @property
    def batch(self) -> Batch:
        """The batch as the ledger has it now."""
        return self.ledger.batch(self.batch_id)

    @property
    def plan(self) -> Plan:
        """Its plan, as stored."""
        text = self.batch.plan_json
        assert text is not None  # every state after `received` has a plan
        return plan_from_json(text)

    @property
    def placed(self) -> Session:
        """The session under the plan's placement."""
        return self.session.with_placement(self.plan.placement)

    def advance(self) -> None:
        """Go on from the batch's state until it is released.

        Raises:
            OverBudget: no rank within the policy holds the facts.
            ProofFailed: facts unproved, too much harm, or too many probes changed; the batch is then `failed`.
        """
        steps = {"received": self.make_plan, "planned": self.train, "trained": self.verify, "verified": self.release}
        while (state := self.batch.state) in steps:
            steps[state]()

    def make_plan(self) -> None:
        """received → planned."""
        ledger, collection = self.ledger, self.batch.collection
        corpus_text(self.session)  # a corpus that cannot be read is better told now than after training
        afresh = self.batch.kind == "compact"
        laws = ensure_laws(self.session, ledger, collection, self.progress, afresh=afresh)
        facts = [row.fact for row in ledger.batch_facts(self.batch_id)]
        live = ledger.live_facts(collection)
        if afresh:
            plan = plan_compaction(laws, collection, self.facts())
        else:
            diff = ledger.diff(collection, facts)
            plan = make_plan(laws, ledger, collection, diff, live_before=live, measure=True)
        with ledger.transaction():
            ledger.set_plan(self.batch_id, canonical_json(asdict(plan)))
            ledger.transition(self.batch_id, "planned", {"rank": plan.rank, "fit": plan.fit_id})

    def train(self) -> None:
        """planned → trained: write the live facts as they will be, escalate within the policy's bounds, keep the slice."""
        from memupdate.training.memory import make_slice, save_slice

        parent = self.parent_memory()
        facts = self.facts()
        outcome = self.write(parent, facts)
        folder = self.session.layout.slices / str(self.batch_id)
        if folder.exists():  # left by a crash between the rename and the transition below
            shutil.rmtree(folder)
        with new_dir_atomic(folder) as temporary:
            save_slice(temporary, make_slice(parent, outcome.memory))
        weights = folder / SLICE_WEIGHTS_FILE
        with self.ledger.transaction():
            self.ledger.record_slice(
                SliceRecord(
                    batch=self.batch_id, relative_path=str(folder.relative_to(self.session.root)), sha256=file_sha256(weights),
                    rank_before=parent.rank, rank_after=outcome.memory.rank, size_bytes=weights.stat().st_size,
                )
            )  # fmt: skip
            if facts:
                points = [*self.outgrown, self.law_point(facts, outcome)]
                self.ledger.add_law_points(points, batch=self.batch_id)
            detail = {
                "epochs": self.epochs,
                "attempts": self.attempts,
                "rank": outcome.memory.rank,
                "loss_nats": outcome.loss_after_nats,
            }
            self.ledger.transition(self.batch_id, "trained", detail)
            if facts:
                self.refit()

    def refit(self) -> None:
        """The law, with what this batch taught it. A law that cannot be fitted must not cost the batch."""
        try:
            refit(self.placed, self.ledger)
        except LawError as error:
            self.messages.append(f"planning goes on with the law as it was: {error.message}")

    def write(self, parent: Memory, facts: list[Fact]) -> TrainingOutcome:
        """`escalate`; a run that diverges for good fails the batch, since it would diverge again. Raises TrainingError."""
        try:
            return self.escalate(parent, facts)
        except TrainingError as error:
            self.ledger.fail_batch(self.batch_id, error.message)
            raise

    def training_examples(self, facts: list[Fact]) -> list[Example]:
        """What is trained on. What stands in for a retracted fact is trained under all phrasings: none may bring it back."""
        stand_ins = self.ledger.stand_ins(self.batch.collection, with_batch=self.batch_id)
        return self.session.training_examples(facts, whole={item.stand_in.id for item in stand_ins})

    def escalate(self, parent: Memory, facts: list[Fact]) -> TrainingOutcome:
        """Train; where facts stay under the threshold, first more epochs, then the next rank, as the policy allows.

        Where all is stored and a compaction guesses dead answers anew, their questions are trained too, then to a higher
        probability. Where all is stored and too many probes have changed, the guard is tightened.
        """
        from memupdate.training.loop import write_facts
        from memupdate.training.memory import grow

        session, policy = self.session, self.session.policy
        guard, settings = session.guard(self.progress), session.training_settings()
        seed, scale = session.basis_seed(self.batch.collection), policy.memory.scale
        sure = 1 - policy.compaction.max_dead_probability  # leaves a dead answer less than it may have
        memory, examples = grow(parent, self.plan.rank, seed=seed, scale=scale), self.training_examples(facts)
        while True:
            self.attempts += 1
            means = means_for(self.placed, memory.rank, examples)
            outcome = write_facts(
                session.base, memory, examples, settings, guard.train, guard.holdout, self.progress, means
            )
            self.epochs, self.steps = self.epochs + outcome.epochs, self.steps + outcome.steps
            self.training_s += outcome.duration_s
            if outcome.stepped_back:
                self.messages.append("training diverged once and went on from its last good state at a lower rate")
            proved = sum(s.min_probability >= settings.threshold for s in outcome.scores[: len(facts)])
            within = outcome.kl_nats is None or outcome.kl_nats <= policy.guard.max_kl_nats
            stored = proved == len(facts) and within
            left = self.left_over(outcome.memory, facts) if stored else []
            if self.attempts >= policy.escalation.attempts:
                return outcome
            changed = self.probes_short(outcome, facts) if stored and not left else ""
            if stored and not left and not changed:
                return outcome
            memory = outcome.memory
            missing = changed or self.lacking(outcome, proved, len(facts))
            if left:
                missing = f"{len(left)} dead answers still come out"
                held = hold_examples(session, left, self.dead(), facts, self.progress)
            if left and (fresh := [example for example in held if example not in examples]):
                examples += fresh
                self.messages.append(
                    f"{len(fresh)} dead answers came out anew: their questions are held to what the model says without them"
                )
            elif left and settings.goal < sure:
                settings = replace(settings, goal=sure)
                self.messages.append(f"{missing}: trained on until what replaces them has probability {sure:.2g}")
            elif changed:
                settings = tightened(settings, outcome)
                self.messages.append(
                    f"{missing}: trained on under a guard of {settings.guard_weight:g} to half of the harm"
                )
            elif self.attempts == 1:
                settings = replace(settings, max_epochs=round(settings.max_epochs * policy.escalation.epochs_factor))
                self.messages.append(f"{missing}: training on, {settings.max_epochs} epochs more")
            elif (rank := next_rank(memory.rank, policy.escalation.rank_factor, policy.memory.max_rank)) is not None:
                self.outgrown.append(self.law_point(facts, outcome))
                memory = grow(memory, rank, seed=seed, scale=scale)
                self.messages.append(f"{missing}: memory grown to rank {rank}")

    def lacking(self, outcome: TrainingOutcome, proved: int, facts: int) -> str:
        """What an attempt has left undone, in words: facts, or else harm."""
        if proved < facts or outcome.kl_nats is None:
            return f"{facts - proved} of {facts} facts unproved"
        budget = self.session.policy.guard.max_kl_nats
        return f"harm of {outcome.kl_nats:.3f} nats a token, over the budget of {budget:g}"

    def probes_short(self, outcome: TrainingOutcome, facts: list[Fact]) -> str:
        """By how much a memory misses the share of unchanged probes, in words; empty where it does not or there is no guard to mend it."""
        wanted = self.session.policy.proof.min_probes_unchanged
        if not wanted or outcome.kl_nats is None:
            return ""
        found = look_at_probes(self.session, outcome.memory, facts, self.progress)
        return "" if found.share >= wanted else f"{found.share:.1%} of {found.probes} probes answer as before"

    def law_point(self, facts: list[Fact], outcome: TrainingOutcome) -> LawPoint:
        """What this batch teaches the law: all live facts at the rank they are held in."""
        from memupdate.models.scoring import mean_loss_nats, score_examples

        session, own = self.placed, outcome.scores[: len(facts)]
        # Against the base model, not against the memory that this batch began with.
        examples = self.training_examples(facts)
        base = score_examples(session.base.model, examples, session.base.device)
        return LawPoint(
            base_fingerprint=session.fingerprint, placement=session.shape.name, recipe=session.recipe, rank=outcome.memory.rank,
            effective_parameters=outcome.memory.parameters, facts=len(facts), target_tokens=sum(len(s.logprobs) for s in own),
            loss_before_nats=mean_loss_nats(base), loss_after_nats=outcome.loss_after_nats,
            facts_proved=sum(s.min_probability >= session.policy.training.threshold for s in own), kl_nats=outcome.kl_nats,
            epochs=self.epochs, stopped_early=outcome.stopped_early, duration_s=self.training_s, origin="batch",
            examples=len(examples), steps=self.steps, attempts=self.attempts,
        )  # fmt: skip

    def verify(self) -> None:
        """trained → verified: prove the memory as it will be written, and hold the policy's gates."""
        facts = self.facts()
        self.proof = proof = self.prove(facts)
        gates = self.gates()
        if reasons := gates.reasons(proof):
            self.ledger.fail_batch(self.batch_id, "; ".join(reasons))
            raise ProofFailed(
                f"batch {self.batch_id} is refused: {'; '.join(reasons)}", gates.advice(proof), gates.details(proof)
            )
        self.messages += gates.remarks(proof)
        with self.ledger.transaction():
            self.ledger.set_outcomes(
                self.batch_id, {p.fact_id: p.proved for p in proof.facts if p.fact_id in gates.own}
            )
            detail = {
                "proved": proof.proved,
                "facts": len(facts),
                "probes_unchanged": proof.locality.share,
                "kl_nats": proof.kl_nats,
            }
            self.ledger.transition(self.batch_id, "verified", detail)

    def gates(self) -> Gates:
        """What this batch must pass."""
        own = {row.fact.id for row in self.ledger.batch_facts(self.batch_id)}
        return Gates(self.session.policy, self.batch, own)

    def left_over(self, memory: Memory, facts: list[Fact]) -> list[DeadAnswer]:
        """Dead answers that would hold a compaction back; other batches train the answers that replace them."""
        if self.batch.kind != "compact":
            return []
        return self.gates().left_over(look_at_dead(self.session, memory, facts, self.dead()))

    def release(self) -> None:
        """verified → released: one ordinary PEFT adapter in the registry, with its papers."""
        from memupdate.training.memory import save_adapter

        collection, memory = self.batch.collection, self.memory()
        if (
            self.proof is None
        ):  # resumed in a new process: the proof goes into the ledger with the release, so it is made again
            self.proof = self.prove(self.facts())
        parent = self.parent_release()
        version = self.ledger.next_version(collection)
        name = release_name(collection, version)
        folder = self.session.layout.registry.release(name)
        if folder.exists():  # left by a crash between the rename and the transition below; no row names it
            shutil.rmtree(folder)
        with new_dir_atomic(folder) as temporary:
            save_adapter(temporary, memory, base_model=str(self.session.folder.path))
            write_matcher(temporary, self.session, self.facts())
            papers = self.papers(
                name, {f: file_sha256(temporary / f) for f in (ADAPTER_WEIGHTS_FILE, ADAPTER_CONFIG_FILE, MATCHER_FILE)}
            )
            write_text_atomic(temporary / RELEASE_FILE, papers)
        digest = file_sha256(folder / ADAPTER_WEIGHTS_FILE)
        with self.ledger.transaction():
            self.ledger.record_release(
                ReleaseRecord(
                    name=name, collection=collection, version=version, batch=self.batch_id, parent=parent.name if parent else None,
                    relative_path=str(folder.relative_to(self.session.root)), digest=digest, rank=memory.rank,
                    placement=self.plan.placement, base_fingerprint=self.session.fingerprint,
                )
            )  # fmt: skip
            self.ledger.record_proofs(proof_records(name, "in-process", self.proof.facts))
            record_measured(self.ledger, name, self.proof.measured)
            self.ledger.transition(self.batch_id, "released", {"release": name})
        self.progress(ProgressEvent("release", 1, 1, name))

    def papers(self, name: str, digests: dict[str, str]) -> str:
        """`memupdate.json` of a release: all that one needs to check it without the ledger."""
        assert self.proof is not None
        document = {
            "schema_version": 1,
            "memupdate_version": __version__,
            "release": name,
            "batch": self.batch_id,
            "kind": self.batch.kind,
            "reason": self.batch.reason,
            "base_model": self.session.config.model,
            "base_fingerprint": self.session.fingerprint,
            "files": digests,
            "plan": json.loads(self.batch.plan_json or "null"),
            "law": self.law(),
            "policy": json.loads(self.batch.policy_json),
            "facts": [
                {"id": p.fact_id, "proved": p.proved, "min_probability": p.min_probability} for p in self.proof.facts
            ],
            "dead": [
                {"id": d.fact_id, "is_greedy": d.is_greedy, "probability": d.probability} for d in self.proof.dead
            ],
            "probes_unchanged_share": self.proof.locality.share,
            "kl_nats": self.proof.kl_nats,
            "loss_nats": self.proof.loss_nats,
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    def law(self) -> dict[str, object]:
        """The law that the plan used, in figures; the ledger has it whole under this id."""
        record = self.ledger.fit(self.plan.fit_id)
        if record is None:
            return {"fit_id": self.plan.fit_id}
        fit = LawFit.from_json(record.fit_json)
        laws = {"memory": fit.memory, "loss": fit.loss, "harm": fit.harm}
        names = ("c", "alpha", "beta", "b", "k", "gamma", "delta", "floor", "r2")
        figures = {
            name: {k: v for k, v in asdict(law).items() if k in names} for name, law in laws.items() if law is not None
        }
        return {"fit_id": fit.fit_id, "points": fit.points, "confidence": fit.confidence, **figures}

    def facts(self) -> list[Fact]:
        """The live facts as they will be with this batch."""
        return self.ledger.live_facts(self.batch.collection, with_batch=self.batch_id)

    def dead(self) -> list[Fact]:
        """Facts whose answers must not come out (of a retraction: its own), or are looked at, where facts are added."""
        if self.batch.kind == "retract":
            return self.ledger.superseded_by(self.batch_id)
        return self.ledger.replaced_facts(self.batch.collection, with_batch=self.batch_id)

    def prove(self, facts: list[Fact]) -> MemoryProof:
        """The memory as it will be released, under the proofs that the batch asks for."""
        stand_ins = {
            item.stand_in.id for item in self.ledger.stand_ins(self.batch.collection, with_batch=self.batch_id)
        }
        return prove_memory(self.session, self.memory(), facts, self.progress, dead=self.dead(), stand_ins=stand_ins)

    def parent_release(self) -> ReleaseRecord | None:
        """The release whose memory this batch begins with; none for the first one and for a compaction."""
        return None if self.batch.kind == "compact" else self.ledger.latest_release(self.batch.collection)

    def parent_memory(self) -> Memory:
        """The parent's memory, or an empty one."""
        from memupdate.training.memory import empty_memory, load_adapter

        parent = self.parent_release()
        return load_adapter(self.session.root / parent.relative_path) if parent else empty_memory(self.placed.shape)

    def memory(self) -> Memory:
        """Parent and slice put together: what is proved and released."""
        from memupdate.training.memory import apply_slice, load_slice

        return apply_slice(self.parent_memory(), load_slice(self.session.layout.slices / str(self.batch_id)))

    def report(self) -> AddReport:
        """What happened, for people and scripts."""
        batch, proof = self.batch, self.proof
        plan = plan_from_json(batch.plan_json) if batch.plan_json else None
        release = self.ledger.release(batch.release) if batch.release else None
        return AddReport(
            batch_id=batch.id, collection=batch.collection, state=batch.state, release=batch.release, plan=plan,
            rank=release.rank if release else None, attempts=self.attempts, epochs=self.epochs,
            measured_loss_nats=proof.loss_nats if proof else None, kl_nats=proof.kl_nats if proof else None,
            facts_total=len(proof.facts) if proof else 0, facts_proved=proof.proved if proof else 0,
            facts_new=batch.facts_new + batch.facts_superseding, failures=failures_of(proof.facts) if proof else (),
            probes_unchanged_share=proof.locality.share if proof else None, probes=proof.locality.probes if proof else 0,
            publication=None, duration_s=time.monotonic() - self.started, messages=tuple(self.messages),
            generality_share=proof.measured.generality.if_asked if proof else None,
            locality_share=proof.measured.locality.if_asked if proof else None,
            perplexity_ratio=proof.measured.perplexity_ratio if proof else None,
        )  # fmt: skip


def tightened(settings: TrainingSettings, outcome: TrainingOutcome) -> TrainingSettings:
    """The same under twice the guard, to half of the harm that a run under a guard has done."""
    assert outcome.kl_nats is not None  # measured wherever there is a guard
    return replace(settings, guard_weight=2 * settings.guard_weight, max_kl_nats=outcome.kl_nats / 2)
