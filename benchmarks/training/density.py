"""Bits proved per adapter parameter: the smallest rank at which every fact is proved, and how full it is.

Invariant: a bit is the base model's own loss on the targets; a rank counts only where every fact is proved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.budget.batches import number_facts
from benchmarks.training.lab import Lab
from benchmarks.training.store import Row, Store, code_of_ours

from memupdate.budget.bits import bits_per_parameter, bits_stored
from memupdate.models.scoring import mean_loss_nats, score_examples
from memupdate.operations.proving import prove_memory
from memupdate.progress import no_progress
from memupdate.training.loop import write_facts

STUDY = "density"
SEED = 7200
_HOPELESS = 0.9
"""Share of facts stored by an attempt under which no further one is made."""
_PATIENCE = 3.0
"""Each attempt gets so many times the policy's epochs by default: what is asked for is the room, not the time."""


@dataclass(frozen=True)
class Ladder:
    """Ranks to climb until every fact is proved; no guard, as the guard spends room on harmlessness."""

    facts: int
    placement: str
    ranks: tuple[int, ...]
    kind: str = "world"
    """`world`: the study's facts; `numbers`: seven random digits each, of which the base model can guess nothing, as in PhoneBook."""
    patience: float = _PATIENCE


FULL = (
    Ladder(64, "mlp-one", (1, 2, 3, 4, 6, 8)),
    Ladder(256, "mlp-all", (1, 2, 3, 4)),
    Ladder(100, "mlp-all", (1, 2), "numbers"),
    Ladder(150, "mlp-all", (1, 2), "numbers"),
    Ladder(200, "mlp-all", (1,), "numbers", patience=10),
    Ladder(250, "mlp-all", (1,), "numbers", patience=10),
)
QUICK = (Ladder(8, "mlp-one", (1, 2, 4)),)


def run(lab: Lab, store: Store, ladders: Sequence[Ladder]) -> None:
    """Measure what is missing."""
    for ladder in ladders:
        for rank in ladder.ranks:
            row = _rung(lab, store, ladder, rank)
            if row["proved"] == ladder.facts:
                break


def found(store: Store, ladder: Ladder) -> Row | None:
    """The row of the smallest rank that proves every fact."""
    rows = (store.get(STUDY, _cell(ladder, rank), code_of_ours()) for rank in ladder.ranks)
    return next((row for row in rows if row is not None and row["proved"] == ladder.facts), None)


def _cell(ladder: Ladder, rank: int) -> dict[str, object]:
    said = {name: value for name, value in asdict(ladder).items() if name != "ranks"}
    by_default = {"kind": "world", "patience": _PATIENCE}
    return {**{k: v for k, v in said.items() if k not in by_default or v != by_default[k]}, "rank": rank}


def _rung(lab: Lab, store: Store, ladder: Ladder, rank: int) -> Row:
    return store.get_or(STUDY, _cell(ladder, rank), code_of_ours(), lambda: _row(lab, ladder, rank))


def _row(lab: Lab, ladder: Ladder, rank: int) -> Row:
    session = lab.session
    facts = lab.facts(ladder.facts) if ladder.kind == "world" else number_facts(ladder.facts, seed=SEED)
    examples = session.renderer.render_all(facts)
    before = mean_loss_nats(score_examples(session.base.model, examples, session.base.device))
    memory = lab.fresh_memory(ladder.placement, rank)
    epochs = round(ladder.patience * session.policy.training.max_epochs)
    settings = replace(session.training_settings(max_epochs=epochs), guard_weight=0.0)
    for _ in range(session.policy.escalation.attempts):
        outcome = write_facts(session.base, memory, examples, settings, None, None, no_progress)
        memory = outcome.memory
        stored = sum(score.min_probability >= settings.threshold for score in outcome.scores)
        if stored == ladder.facts or stored < _HOPELESS * ladder.facts:
            break
    tokens = sum(len(e.target_ids) for e in examples)
    bits, proved = bits_stored(before, tokens), prove_memory(session, memory, facts, no_progress).proved
    return {
        "rank": rank, "proved": proved, "base_loss_nats": before, "target_tokens": tokens, "bits": bits,
        "parameters": memory.parameters, "bits_per_parameter": bits_per_parameter(bits, memory.parameters),
    }  # fmt: skip
