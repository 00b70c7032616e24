"""Proving a memory in this process: all live facts, locality against the base model, harm on held-out anchors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from memupdate.facts.model import Fact
from memupdate.facts.render import Example
from memupdate.ledger.records import Engine, ProofRecord
from memupdate.operations.measuring import Measured, locality_result, measure, prepare, probe_questions
from memupdate.operations.reports import NearThreshold, ProofFailure
from memupdate.operations.session import Session
from memupdate.progress import Progress, ProgressEvent
from memupdate.verification.recall import FactProof

if TYPE_CHECKING:
    from memupdate.training.memory import Memory
    from memupdate.verification.gone import DeadAnswer
    from memupdate.verification.inprocess import LocalityResult


NEAR = 0.02
"""Of a probability: what another dtype or batch size may change it by."""


@dataclass(frozen=True)
class MemoryProof:
    """What one memory was shown to do."""

    facts: tuple[FactProof, ...]
    """One per live fact, in order."""
    loss_nats: float
    """Mean over the live facts' target tokens."""
    locality: LocalityResult
    kl_nats: float | None
    dead: tuple[DeadAnswer, ...] = ()
    """What became of the answers that are live no longer, one per phrasing."""
    measured: Measured = field(default_factory=Measured)
    """Beyond verbatim: in other words, around the facts, on general text."""

    @property
    def proved(self) -> int:
        """How many facts are proved."""
        return sum(p.proved for p in self.facts)


def prove_memory(
    session: Session,
    memory: Memory,
    facts: Sequence[Fact],
    progress: Progress,
    *,
    dead: Sequence[Fact] = (),
    stand_ins: Collection[str] = (),
) -> MemoryProof:
    """Attach `memory` to the base model and look: one forward pass over the facts, one over all else that is asked, one over
    anchors, and one over the answers of `dead` facts.

    Args:
        facts: live facts.
        dead: facts whose answers must not come out.
        stand_ins: ids of live facts that only stand in for retracted ones.
    """
    from memupdate.models.scoring import mean_loss_nats
    from memupdate.training.anchors import measure_kl
    from memupdate.training.memory import attach, detach
    from memupdate.verification.gone import look_for_dead_answers
    from memupdate.verification.inprocess import prove_recall

    base, policy = session.base, session.policy
    prepared = prepare(session, facts, stand_ins, progress)
    holdout = session.guard(progress).holdout
    progress(ProgressEvent("prove", 0, len(facts), "every fact, then what must not change"))
    model = attach(base.model, memory)
    try:
        examples = session.renderer.render_all(facts)
        proofs, scores = prove_recall(base, model, examples, min_probability=policy.proof.min_probability)
        measured, locality = measure(session, model, prepared, list(zip(examples, scores, strict=True)), progress)
        kl = measure_kl(model, holdout, base.device) if holdout is not None else None
        gone = look_for_dead_answers(
            model,
            dead_examples(session, dead, facts),
            base.device,
            max_probability=policy.compaction.max_dead_probability,
        )
    finally:
        base.model = detach(model)
    progress(ProgressEvent("prove", len(facts), len(facts), f"{sum(p.proved for p in proofs)} of {len(facts)} proved"))
    return MemoryProof(tuple(proofs), mean_loss_nats(scores), locality, kl, tuple(gone), measured)


def look_at_probes(session: Session, memory: Memory, facts: Sequence[Fact], progress: Progress) -> LocalityResult:
    """How many probes `memory` answers as the base model does; `facts` are live, and some bring probes of their own."""
    from memupdate.training.memory import attach, detach
    from memupdate.verification.asking import ask

    questions = probe_questions(session, facts, progress)
    model = attach(session.base.model, memory)
    try:
        return locality_result(ask(session.base, model, questions, progress))
    finally:
        session.base.model = detach(model)


def look_at_dead(session: Session, memory: Memory, live: Sequence[Fact], dead: Sequence[Fact]) -> list[DeadAnswer]:
    """What became of the answers of `dead` facts in `memory`, one verdict per phrasing."""
    from memupdate.training.memory import attach, detach
    from memupdate.verification.gone import look_for_dead_answers

    bound = session.policy.compaction.max_dead_probability
    model = attach(session.base.model, memory)
    try:
        return look_for_dead_answers(
            model, dead_examples(session, dead, live), session.base.device, max_probability=bound
        )
    finally:
        session.base.model = detach(model)


def dead_examples(session: Session, dead: Sequence[Fact], live: Sequence[Fact]) -> list[Example]:
    """The answers of `dead` facts under all their phrasings, but for those that a live fact gives there too.

    The end token is left out, so that an answer that only goes on longer is found; it is kept where the live answer itself
    begins with the dead one.
    """
    by_key = {fact.key: fact.target for fact in live}
    by_prompt = {fact.wording_key(prompt): fact.target for fact in live for prompt in session.wordings(fact)}
    examples = []
    for fact in dead:
        for prompt in session.wordings(fact):
            now = by_prompt.get(fact.wording_key(prompt), by_key.get(fact.key))
            if now == fact.target:
                continue
            example = session.renderer.render(fact, prompt)
            goes_on = now is not None and now.startswith(fact.target)
            examples.append(example if goes_on else replace(example, target_ids=example.target_ids[:-1]))
    return examples


def failures_of(proofs: Sequence[FactProof]) -> tuple[ProofFailure, ...]:
    """Those that failed, explained."""
    return tuple(ProofFailure(p.fact_id, p.prompt, p.explain()) for p in proofs if not p.proved)


def near(proofs: Sequence[FactProof], threshold: float) -> tuple[NearThreshold, ...]:
    """Facts that other numerics could bring to the other side of `threshold`, least sure first."""
    close = sorted((p for p in proofs if abs(p.min_probability - threshold) <= NEAR), key=lambda p: p.min_probability)
    return tuple(NearThreshold(p.fact_id, p.prompt, p.min_probability) for p in close)


def smallest(proofs: Sequence[FactProof]) -> float | None:
    """The least sure token of all; None without facts."""
    return min((p.min_probability for p in proofs), default=None)


def proof_records(release: str, engine: Engine, proofs: Sequence[FactProof]) -> list[ProofRecord]:
    """Verdicts as ledger rows."""
    return [
        ProofRecord(
            release=release, fact=p.fact_id, engine=engine, proved=p.proved, min_probability=p.min_probability,
            failed_position=p.failed_position, failed_token=p.failed_token, emitted_token=p.emitted_token,
        )
        for p in proofs
    ]  # fmt: skip
