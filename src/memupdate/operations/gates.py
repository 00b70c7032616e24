"""What a trained memory must show before it may be released, by the policy and by what its batch is for. Torch-free.

Invariant: a retraction is released only where each stand-in is proved and no retracted answer comes out any more; a
compaction only where all that is live is proved and all that is dead is gone. Facts that a batch adds may leave traces
of what they supersede under phrasings that were not trained on: that is reported, not refused.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memupdate.ledger.records import Batch
from memupdate.operations.measuring import Measured
from memupdate.operations.proving import MemoryProof, failures_of
from memupdate.policies import Policy
from memupdate.verification.neighbours import is_guess
from memupdate.verification.questions import OTHER_WORDINGS, Answered

if TYPE_CHECKING:
    from memupdate.verification.gone import DeadAnswer

_SHOWN = 10
"""Dead answers, and answers in other words, that are listed."""


@dataclass(frozen=True)
class Gates:
    """The gates of one batch."""

    policy: Policy
    batch: Batch
    own: Set[str]
    """Ids of the facts that the batch itself writes."""

    def reasons(self, proof: MemoryProof) -> list[str]:
        """What is asked and this memory does not give, in words; empty where it may be released."""
        return [*self._unproved(proof), *self._not_gone(proof), *self._harm(proof)]

    def _unproved(self, proof: MemoryProof) -> list[str]:
        unproved = len(proof.facts) - proof.proved
        older = sum(not p.proved and p.fact_id not in self.own for p in proof.facts)
        if unproved and self.policy.proof.publish == "all":
            return [f"{unproved} of {len(proof.facts)} facts are not proved"]
        if older:
            return [f"{older} older facts are no longer proved"]
        if unproved and self.batch.kind == "retract":
            return [f"{unproved} answers that stand in for retracted facts are not proved"]
        if proof.facts and not proof.proved:
            return ["no fact is proved"]
        return []

    def _not_gone(self, proof: MemoryProof) -> list[str]:
        if not (left := self.left_over(proof.dead)):
            return []
        what = "retracted" if self.batch.kind == "retract" else "superseded or retracted"
        return [f"{len(left)} of {len(proof.dead)} {what} answers are not gone"]

    def _harm(self, proof: MemoryProof) -> list[str]:
        policy, reasons = self.policy, []
        if proof.locality.share < policy.proof.min_probes_unchanged:
            reasons.append(
                f"{proof.locality.share:.1%} of {proof.locality.probes} probes answer as before, "
                f"{policy.proof.min_probes_unchanged:.1%} wanted"
            )
        if policy.guard.enabled and proof.kl_nats is not None and proof.kl_nats > policy.guard.max_kl_nats:
            reasons.append(f"harm is {proof.kl_nats:.4f} nats per token, {policy.guard.max_kl_nats:.4f} allowed")
        return reasons + shortfalls(policy, proof.measured)

    def left_over(self, dead: Sequence[DeadAnswer]) -> list[DeadAnswer]:
        """Those that hold the release back."""
        bound = self.policy.compaction.max_dead_probability
        if self.batch.kind == "compact":
            return [d for d in dead if not d.is_gone(bound) and not d.is_the_bases(bound)]
        return [d for d in dead if d.is_greedy] if self.batch.kind == "retract" else []

    def details(self, proof: MemoryProof) -> list[str]:
        """One line per fact that is not proved, per answer that is not gone, and for some that a bound of the policy is missed by."""
        bound = self.policy.compaction.max_dead_probability
        left = [d.explain(bound) for d in self.left_over(proof.dead)]
        return [f.explanation for f in failures_of(proof.facts)] + left + differing(self.policy, proof.measured)

    def advice(self, proof: MemoryProof) -> str:
        """What to do about a refused batch."""
        if proof.proved < len(proof.facts):
            return 'raise memory.max_rank or training.max_epochs, or set proof.publish = "proved" to release what is proved'
        if (left := self.left_over(proof.dead)) and self.batch.kind == "retract":
            return "set another retraction.answer in the policy, or raise training.max_epochs"
        if left:
            return "raise escalation.attempts, retract what still says so, or raise compaction.max_dead_probability for mere guesses"
        if (missed := _generality_shortfall(self.policy, proof.measured)) and self._harm(proof) == missed:
            return (
                "train more wordings (facts.train_paraphrases, facts.templates, paraphrases of the facts) or raise memory.min_rank; "
                "`proof.min_generality` is what the policy asks for"
            )
        advice = "raise memory.min_rank or guard.weight in the policy: rank buys harmlessness"
        if self.batch.kind == "compact":
            return advice
        return f"{advice}; or `memupdate compact -c {self.batch.collection}`, which begins with an unharmed model"

    def remarks(self, proof: MemoryProof) -> list[str]:
        """What an operator should know of dead answers in a memory that is released."""
        bound = self.policy.compaction.max_dead_probability
        if self.batch.kind == "compact":
            own = [d for d in proof.dead if d.is_the_bases(bound)]
            gone = len(proof.dead) - len(own)
            lines = [f"{gone} superseded or retracted answers are proved gone"] if gone else []
            return lines + [f"the base model itself says so: {d.prompt!r} → {d.answer!r}" for d in own]
        if self.batch.kind == "retract":
            return [f"the retracted answers come out under none of {len(proof.dead)} phrasings"]
        said = [
            f"still answered as before: {d.prompt!r} → {d.answer!r}"
            for d in proof.dead
            if d.is_greedy and not d.base_is_greedy
        ]
        more = [f"and {len(said) - _SHOWN} more superseded or retracted answers"] if len(said) > _SHOWN else []
        return said[:_SHOWN] + more


def shortfalls(policy: Policy, measured: Measured) -> list[str]:
    """What the policy asks of generality, locality and general text and this memory does not give, in words."""
    reasons, proof = _generality_shortfall(policy, measured), policy.proof
    locality = measured.locality
    if locality.asked and locality.value < proof.min_locality:
        reasons.append(
            f"locality is {locality.value:.1%}: {locality.exact:,} of {locality.asked:,} probes and near neighbours are answered as "
            f"before, {proof.min_locality:.1%} wanted"
        )
    if measured.text is not None and measured.text.perplexity_ratio > 1 + proof.max_perplexity_increase:
        increase = measured.text.perplexity_ratio - 1
        reasons.append(
            f"perplexity of general text ({measured.corpus}) is up by {increase:.1%}, {proof.max_perplexity_increase:.1%} allowed"
        )
    return reasons


def _generality_shortfall(policy: Policy, measured: Measured) -> list[str]:
    generality, wanted = measured.generality, policy.proof.min_generality
    if not generality.asked or generality.value >= wanted:
        return []
    return [
        f"generality is {generality.value:.1%}: {generality.exact:,} of {generality.asked:,} phrasings that were not trained on are "
        f"answered word for word, {wanted:.1%} wanted"
    ]


def differing(policy: Policy, measured: Measured) -> list[str]:
    """The first answers by which a bound on generality or locality is missed, a line each."""
    missed: list[Answered] = []
    if _generality_shortfall(policy, measured):
        missed += [a for a in measured.answers if a.question.part in OTHER_WORDINGS and a.judged != "exact"][:_SHOWN]
    if measured.locality.value < policy.proof.min_locality:
        local = (a for a in measured.answers if a.question.measure == "locality" and not is_guess(a.question.part))
        missed += [a for a in local if a.judged != "exact"][:_SHOWN]
    return [f"{a.question.part}: {a.question.example.prompt!r}: {a.answer!r}, not {a.expected!r}" for a in missed]
